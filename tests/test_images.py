"""Decoding, the cache, and files written whole or not at all.

    python -m pytest tests/test_images.py
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import files
import images
import miniimagenet
import omniglot
import tasks
from data_files import (drawing, encode, listing, photos, png_header, refused, small_omniglot,  # noqa: F401
                        write_zips)
from files import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
BILINEAR = Image.Resampling.BILINEAR


@pytest.mark.parametrize("module", [miniimagenet, omniglot])
def test_bad_requests(photos, module):
    with refused("split", "'training'"):
        module.load(photos, "training", 12)
    with refused("--imgsz"):
        module.load(photos, "train", 0)


def test_array_that_no_memory_holds(photos):
    with refused("memory", "--imgsz"):
        miniimagenet.load(photos, "train", 2_000_000)
    assert not (photos / "cache").exists()


# Decoding


def decode(data: bytes, channels: int = 3, size: int = 8) -> np.ndarray:
    return images.decode(data, "some.png", channels, size, BILINEAR)[0]


def test_every_mode_becomes_rgb_and_grey():
    red = np.zeros((10, 10, 3), np.uint8) + np.array([200, 40, 40], np.uint8)
    grey = np.full((10, 10), 90, np.uint8)
    clear = np.dstack([red, np.full((10, 10), 0, np.uint8)])
    clear[:, :5, 3] = 255
    cmyk = io.BytesIO()
    Image.fromarray(red).convert("CMYK").save(cmyk, "JPEG", quality=100)
    palette, masked = io.BytesIO(), io.BytesIO()
    Image.fromarray(red).quantize(4).save(palette, "PNG")
    Image.fromarray(np.repeat([[0, 1]], 10, 0).astype(np.uint8).repeat(5, 1)).convert("P").save(
        masked, "PNG", transparency=1)
    deep = io.BytesIO()
    Image.fromarray((grey.astype(np.uint16) << 8) + 17).save(deep, "PNG")

    def colour(data, x):
        return decode(data)[:, 4, x].tolist()

    assert colour(encode(red), 1) == [200, 40, 40]
    assert colour(encode(grey), 1) == colour(encode(grey, "BMP"), 1) == colour(deep.getvalue(), 1) == [90] * 3
    assert colour(encode(np.full((10, 10), True)), 1) == [255] * 3
    assert np.abs(np.array(colour(cmyk.getvalue(), 1)) - [200, 40, 40]).max() <= 3
    assert np.abs(np.array(colour(palette.getvalue(), 1)) - [200, 40, 40]).max() <= 3
    assert colour(encode(clear), 0) == [200, 40, 40] and colour(encode(clear), 7) == [255] * 3  # on white
    ink = np.dstack([np.zeros((10, 10), np.uint8), clear[..., 3]])  # black ink on nothing: grey and alpha
    assert colour(encode(ink), 0) == [0] * 3 and colour(encode(ink), 7) == [255] * 3
    assert colour(masked.getvalue(), 7) == [255] * 3 and colour(masked.getvalue(), 0) == [0] * 3
    for buffer in (cmyk, palette, masked, deep):
        assert decode(buffer.getvalue(), channels=1).shape == (1, 8, 8)
    assert decode(encode(grey), channels=1)[0, 3, 3] == 90


@pytest.mark.parametrize("bits, value", [(8, 200), (12, 3000), (16, 40_000), (16, 65_535)])
def test_16_bit_images_keep_their_range(bits, value):
    """Scanners and microscopes write 8 or 12 bits of data into 16; as 16 bits they would come out black."""
    pixels = np.zeros((10, 10), np.uint16)
    pixels[:5] = value
    for channels in (1, 3):
        decoded = decode(encode(pixels), channels)
        assert decoded[:, 0, 0].tolist() == [value >> bits - 8] * channels and decoded[0, 7, 0] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(encode(pixels, exif=exif))[0]
    corner = {1: (0, 0), 2: (0, 7), 3: (7, 7), 4: (7, 0), 5: (0, 0), 6: (0, 7), 7: (7, 7), 8: (7, 0)}[orientation]
    assert [place for place in ((0, 0), (0, 7), (7, 0), (7, 7)) if turned[place] == 255] == [corner]
    damaged = encode(pixels, "JPEG", exif=exif, quality=100).replace(b"Exif\0\0", b"Exif\0\1")
    assert decode(damaged)[0, 0, 0] > 200  # EXIF data that can't be read says nothing


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_images_are_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = encode(noise, kind)
    for part in (0.02, 0.3, 0.7):
        with refused("some.png"):
            decode(whole[:int(len(whole) * part)])


def test_mutated_images_decode_or_are_refused():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
    sources = [encode(noise, "JPEG"), encode(noise), encode(noise, "BMP"), encode(noise[..., 0], "GIF")]
    for number in range(400):
        data = bytearray(sources[number % 4])
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(0, 256)
        with contextlib.suppress(UserError):
            assert decode(bytes(data)).shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_other_formats_and_bombs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (postscript, encode(np.zeros((9, 9), np.uint8), "TIFF"), b"<svg/>"):
        with refused("some.png", "JPEG"):
            decode(data)
    for side in (8_200, 12_000, 2_000_000):  # over this module's limit, PIL's warning and PIL's error
        with refused("some.png", "million pixels"):
            decode(png_header(side, side))


def test_result_and_error_do_not_depend_on_threads(photos, monkeypatch):
    results, errors = [], set()
    for threads in (1, 2, 7):
        monkeypatch.setattr(images, "_threads", lambda: threads)
        results.append(miniimagenet.load(photos, "train", 12, cache=photos / f"cache{threads}"))
    assert all(torch.equal(results[0], other) for other in results)
    for name in ("p10.png", "p02.png", "p31.png"):
        (photos / "images" / name).write_text("broken")
    for threads in (1, 2, 7):
        monkeypatch.setattr(images, "_threads", lambda: threads)
        with refused("3 of the 12 images") as caught:
            miniimagenet.load(photos, "train", 12)
        errors.add(str(caught.value))
    assert len(errors) == 1 and sorted("p02 p31 p10".split(), key=errors.pop().index) == "p02 p31 p10".split()


@pytest.mark.parametrize("limit", [399, 400])
def test_large_images_are_decoded_one_at_a_time(photos, monkeypatch, limit):
    """Else a folder of them, each a few kilobytes on disk, takes the memory of one times the machine's cores."""
    at_work, most, convert = [], [], images._opaque

    def watched(image):
        at_work.append(image)
        time.sleep(0.01)
        most.append(len(at_work))
        at_work.pop()
        return convert(image)

    monkeypatch.setattr(images, "LARGE", limit)  # the photographs have 20 x 20 pixels, and fewer bytes
    monkeypatch.setattr(images, "_threads", lambda: 4)
    monkeypatch.setattr(images, "_opaque", watched)
    miniimagenet.load(photos, "train", 12)
    assert max(most) == 1 if limit < 400 else max(most) > 1


# The cache


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
    write_zips(tmp_path, small_omniglot)  # packed anew: other times, the same content
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
        "cut": whole[:-1], "half": whole[:len(whole) // 2], "empty": b"", "foreign": foreign, "no hashes": plain.getvalue(),
        "pickle": pickled.getvalue(), "magic": b"X" + whole[1:], "header": whole[:20] + b"X" + whole[21:],
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
import sys, time
import images, miniimagenet
real = images.decode_all
def slow(*args):
    array = real(*args)
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    return array
images.decode_all = slow
print("ready", flush=True)
sys.stdin.readline()
print(miniimagenet.load(sys.argv[1], "train", 12).sum().item(), flush=True)
"""


def slow_build(root: Path, seconds: float) -> subprocess.Popen:
    """A process that loads `root` after a line on its stdin, and takes `seconds` to decode."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(root), str(seconds)], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_processes_that_build_one_cache(photos):
    """Of three at once one builds; it is killed; of the two that wait, one builds and one takes its cache."""
    processes = [slow_build(photos, 60), slow_build(photos, 0.5), slow_build(photos, 0.5)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        killed, *others = processes
        killed.stdin.write("\n"), killed.stdin.flush()
        assert killed.stdout.readline() == "building\n"
        for process in others:
            process.stdin.write("\n"), process.stdin.flush()
            assert process.stderr.readline().startswith("waiting for another process")
        killed.send_signal(signal.SIGKILL)
        outputs = [process.communicate(timeout=30) for process in others]
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
            done.wait(10)

    thread = threading.Thread(target=second)
    with files.locked(tmp_path / "lock"):
        thread.start()
        said, deadline = "", time.monotonic() + 10
        while "waiting" not in said and time.monotonic() < deadline:
            said += capfd.readouterr().err
            time.sleep(0.01)
        assert "waiting" in said and not taken.wait(0.1)
    try:
        assert taken.wait(10)
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


# Progress, and what a Dataset promises


@pytest.mark.parametrize("items, seconds, said", [(3, 0.0, []), (5, 1.0, ["reading: 3 of 5 files"]),
                                                  (30, 1.0, ["reading: 3 of 30 files", "reading: 14 of 30 files",
                                                             "reading: 25 of 30 files"])])
def test_what_takes_over_two_seconds_says_how_far_it_is(items, seconds, said, monkeypatch, capfd):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * seconds)
    assert list(files.progress(range(items), "reading", items, "files")) == list(range(items))
    assert capfd.readouterr().err.splitlines() == said


PROMISED = torch.randint(256, (3, 4, 1, 8, 8), dtype=torch.uint8)
BROKEN = PROMISED / 255


@pytest.mark.parametrize("images_, counts, words", [
    (BROKEN, None, ["torch.float32", "must give uint8", "(255 * images)"]), (PROMISED.int(), None, ["torch.int32"]),
    (PROMISED.numpy(), None, ["uint8"]), (PROMISED // 255, None, ["0 and 1 alone", "multiply them by 255"]),
    (PROMISED[:2], None, ["[2, 4, 1, 8, 8]", "[3, 4, 1, 8, 8]"]), (PROMISED[:, :3], None, ["make them agree"]),
    (PROMISED[..., :7], None, ["make them agree"]), (PROMISED.expand(3, 4, 3, 8, 8), None, ["channels"]),
    (PROMISED, [4, 4, 3], ["counts has 3 classes of at least 3", "sizes says 3 of 4"]), (PROMISED, [4, 4], ["counts has 2"])])
def test_a_dataset_that_breaks_its_promise(images_, counts, words):
    def made(images_, counts):
        return tasks.Dataset(lambda: "mine", 1, (0.0,), (1.0,), lambda: {"train": (3, 4)}, lambda split: images_,
                             counts=lambda split: counts)

    with refused("the train split of mine", *words):
        images.check_images(images_, made(images_, counts), "train", 8)
    assert images.check_images(PROMISED, made(PROMISED, None), "train", 8) is PROMISED
    if images_ is BROKEN:
        mended = (255 * images_).round().to(torch.uint8)  # as advised
        assert torch.equal(images.check_images(mended, made(mended, None), "train", 8), PROMISED)
