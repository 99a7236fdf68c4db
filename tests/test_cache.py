"""The cache of decoded images, locks, and files written whole or not at all.

    python -m pytest tests/test_cache.py
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import drawing, encode, listing, photos, refused, small_omniglot, write_zips  # noqa: F401

import files
import images
import miniimagenet
import omniglot
from files import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Grows by one at each decoding of a split."""
    done, real = [], images.decode_all
    monkeypatch.setattr(images, "decode_all", lambda *args: done.append(args[1]) or real(*args))
    return done


def test_cache_is_taken_and_rebuilt_when_anything_changes(photos, builds):
    def load(split="train", size=12):
        before = len(builds)
        data = miniimagenet.load(photos, split, size)
        return data, len(builds) - before

    first, built = load()
    assert built == 1
    again, built = load()
    assert built == 0 and torch.equal(first, again)
    path, = (photos / "cache").iterdir()
    assert path.name.startswith("miniimagenet-train-12px-")
    assert np.array_equal(np.load(path), first.numpy())  # a plain .npy file

    assert load(size=13)[1] == 1 and load(split="val")[1] == 1 and load()[1] == 0
    (photos / "images" / "p00.png").write_bytes(encode(np.full((20, 20, 3), 255, np.uint8)))
    changed, built = load()
    assert built == 1 and changed[2, 0].min() == 255
    file = photos / "images" / "p10.png"
    same_size = file.read_bytes()
    file.write_bytes(same_size)
    os.utime(file, ns=(1, 1))
    assert load()[1] == 1
    file.write_bytes(same_size + b"\0")
    os.utime(file, ns=(1, 1))
    assert load()[1] == 1
    names = [path.stem.split("-") for path in (photos / "cache").iterdir()]
    assert len({key for *_, key in names}) == len(names) == 6  # the key alone tells splits and sizes apart
    lines = (photos / "train.csv").read_text().split()
    (photos / "train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    flipped, built = load()
    assert built == 1 and torch.equal(flipped, changed.flip(1))


def test_omniglot_cache_follows_the_zip_content(tmp_path, small_omniglot, builds):
    write_zips(tmp_path, small_omniglot)
    first = omniglot.load(tmp_path, "train", 28)
    write_zips(tmp_path, small_omniglot)  # packed again: other times, the same content
    assert torch.equal(omniglot.load(tmp_path, "train", 28), first) and len(builds) == 1
    write_zips(tmp_path, {name: drawing(30) for name in small_omniglot})
    assert not torch.equal(omniglot.load(tmp_path, "train", 28), first) and len(builds) == 2


def test_damaged_caches_are_found_and_rebuilt(photos, builds, capfd):
    expected = miniimagenet.load(photos, "train", 12)
    path, = (photos / "cache").iterdir()
    whole = path.read_bytes()
    miniimagenet.load(photos, "train", 13, cache=photos / "other")
    foreign = next((photos / "other").iterdir()).read_bytes()
    plain, pickled = io.BytesIO(), io.BytesIO()
    np.save(plain, np.zeros((3, 4, 3, 12, 12), np.uint8))
    np.save(pickled, np.array([{}]), allow_pickle=True)
    damaged = {
        "cut": whole[:-1], "half": whole[:len(whole) // 2], "empty": b"", "foreign": foreign,
        "no hashes": plain.getvalue(), "pickle": pickled.getvalue(),
        "magic": b"X" + whole[1:], "header": whole[:20] + b"X" + whole[21:],
    }
    capfd.readouterr()
    for fault, data in damaged.items():
        path.write_bytes(data)
        before = len(builds)
        assert torch.equal(miniimagenet.load(photos, "train", 12), expected), fault
        assert len(builds) == before + 1, fault
        assert path.read_bytes() == whole
        said, = capfd.readouterr().err.splitlines()
        assert str(path) in said and "building it again" in said, fault


def test_cache_folder_that_can_not_be_written(photos, builds):
    (photos / "file").write_text("in the way")
    with refused("--cache FOLDER", "file"):
        miniimagenet.load(photos, "train", 12, cache=photos / "file")
    with refused("--cache FOLDER"):
        miniimagenet.load(photos, "train", 12, cache=photos / "file" / "deeper")
    with refused("--cache FOLDER"):
        miniimagenet.load(photos, "train", 12, cache=photos / ("long" * 100))
    assert not builds  # found before the minutes of decoding
    assert miniimagenet.load(photos, "train", 12, cache=photos / "named").shape[0] == 3  # as advised


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_cache_in_a_folder_without_the_right_to_write(photos):
    photos.chmod(0o555)
    try:
        with refused("--cache FOLDER"):
            miniimagenet.load(photos, "train", 12)
    finally:
        photos.chmod(0o755)


def test_disk_full_while_the_cache_is_written(photos, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused("No space left", "--cache FOLDER", "miniimagenet-train"):
        miniimagenet.load(photos, "train", 12)
    assert listing(photos / "cache") == []


def test_next_build_removes_what_a_killed_one_left(photos):
    folder = photos / "cache"
    folder.mkdir()
    stale = folder / ".miniimagenet-val-84px-0123456789abcdef.npy.abcdefgh.tmp"
    others = [folder / "notes.tmp", folder / ".omniglot-val-28px-0123456789abcdef.npy.abcdefgh.tmp"]
    for path in (stale, *others):
        path.write_text("half")
    (folder / ".cache.lock").write_text("")  # a lock file whose holder is gone holds nothing
    miniimagenet.load(photos, "train", 12)
    assert not stale.exists() and all(path.exists() for path in others)  # none but its own
    assert not (folder / ".cache.lock").exists()


SLOW_BUILD = """
import sys
import images, miniimagenet
real = images.decode_all
def slow(*args):
    array = real(*args)
    print("building", flush=True)
    sys.stdin.readline()
    return array
images.decode_all = slow
print("ready", flush=True)
sys.stdin.readline()
print(miniimagenet.load(sys.argv[1], "train", 12).sum().item(), flush=True)
"""


def slow_build(root: Path) -> subprocess.Popen:
    """A process that loads `root` after a line on its stdin, and goes on from decoding after another."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(root)], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_processes_that_build_one_cache(photos):
    """Of three at once one builds; it is killed; of the two that wait, one builds and one takes its cache."""
    processes = [slow_build(photos) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        killed, *others = processes
        killed.stdin.write("\n"), killed.stdin.flush()
        assert killed.stdout.readline() == "building\n"
        for process in others:
            process.stdin.write("\n\n"), process.stdin.flush()
            assert process.stderr.readline().startswith("waiting for another process")
        killed.send_signal(signal.SIGKILL)
        outputs = [process.communicate() for process in others]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in others] == [0, 0], outputs
    lines = [line for out, _ in outputs for line in out.split()]
    assert lines.count("building") == 1
    assert set(lines) == {"building", str(miniimagenet.load(photos, "train", 12).sum().item())}
    assert len(listing(photos / "cache")) == 1


def test_lock_refuses_a_second_holder(tmp_path):
    with files.locked(tmp_path / "lock"):
        with refused("in use by another process"), files.locked(tmp_path / "lock", wait=False):
            pass
    with files.locked(tmp_path / "lock", wait=False) as held:
        assert held
    assert listing(tmp_path) == []


def test_lock_that_was_waited_for_is_held(tmp_path, capfd):
    """The first holder unlinks the file that the second waits on: that one must not lock nothing."""
    taken, done = threading.Event(), threading.Event()

    def second():
        with files.locked(tmp_path / "lock"):
            taken.set()
            done.wait()

    thread = threading.Thread(target=second)
    with files.locked(tmp_path / "lock"):
        thread.start()
        said = ""
        while "waiting" not in said:
            said += capfd.readouterr().err
            time.sleep(0.01)
        assert not taken.is_set()
    try:
        taken.wait()
        with refused("in use"), files.locked(tmp_path / "lock", wait=False):
            pass
    finally:
        done.set()
        thread.join()


def test_without_locks_everything_still_works(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    stale = photos / "cache" / ".miniimagenet-val-84px-0123456789abcdef.npy.abcdefgh.tmp"
    stale.parent.mkdir()
    stale.write_text("may be another process's, at work")
    assert miniimagenet.load(photos, "train", 12).shape[0] == 3
    assert stale.exists() and len(listing(stale.parent)) == 2


# files.py


def test_atomic_writes_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with files.atomic(path) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), files.atomic(path) as file:
        file.write(b"half")
        file.write(1 // 0)
    assert path.read_bytes() == b"whole" and listing(path.parent) == ["file"]
    with refused("can't write", "name another folder"), files.atomic(path / "below"):
        pass


def test_run_prints_one_line_and_exits_with_2(capsys):
    def main():
        raise UserError("a name with\na line end and \x1b[31m colour")

    with pytest.raises(SystemExit) as stopped:
        files.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a name with\\na line end and \\x1b[31m colour\n"
