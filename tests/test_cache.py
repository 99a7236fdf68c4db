"""The cache of decoded images, and files written whole or not at all."""

import io
import os

import numpy as np
import pytest
import torch
from data_files import drawing, encode, listing, load, refused, write_zips

import files
import images
import miniimagenet
import omniglot
from files import UserError


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Grows by one at each decoding of a split."""
    done, real = [], images.progress
    monkeypatch.setattr(images, "progress", lambda *args: done.append(args[1]) or real(*args))
    return done


def test_cache_is_taken_and_rebuilt_when_anything_changes(photos, builds):
    first = load(miniimagenet, photos, "train", 12)
    assert torch.equal(load(miniimagenet, photos, "train", 12), first) and len(builds) == 1
    path, = (photos / "cache").iterdir()
    assert path.name.startswith("miniimagenet-train-12px-")
    assert np.array_equal(np.load(path), first.numpy())  # a plain .npy file

    load(miniimagenet, photos, "train", 13), load(miniimagenet, photos, "val", 12)
    assert len(builds) == 3
    file = photos / "images" / "p00.png"
    file.write_bytes(encode(np.full((20, 20, 3), 255, np.uint8)))
    changed = load(miniimagenet, photos, "train", 12)
    assert len(builds) == 4 and changed[2, 0].min() == 255
    os.utime(file, ns=(1, 1))  # another time
    load(miniimagenet, photos, "train", 12)
    file.write_bytes(file.read_bytes() + b"\0")
    os.utime(file, ns=(1, 1))  # another size
    load(miniimagenet, photos, "train", 12)
    assert len(builds) == 6
    lines = (photos / "train.csv").read_text().split()
    (photos / "train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert torch.equal(load(miniimagenet, photos, "train", 12), changed.flip(1))
    keys = {path.stem.rpartition("-")[2] for path in (photos / "cache").iterdir()}
    assert len(keys) == len(builds) == 7  # the key alone tells splits and sizes apart


def test_what_a_killed_decoding_left_goes_a_day_later(photos):
    (photos / "cache").mkdir()
    yesterday, running = ((photos / "cache" / f".miniimagenet-train-84px-{key}.npy.abcd1234.tmp") for key in "ab")
    for path in (yesterday, running):
        path.write_bytes(b"half")
    os.utime(yesterday, (0, 0))
    load(miniimagenet, photos, "train", 12)
    assert running.exists() and not yesterday.exists()


def test_omniglot_cache_follows_the_zip_content(tmp_path, small_omniglot, builds):
    write_zips(tmp_path, small_omniglot)
    first = load(omniglot, tmp_path, "train", 28)
    write_zips(tmp_path, small_omniglot)  # packed again: other times, the same content
    assert torch.equal(load(omniglot, tmp_path, "train", 28), first) and len(builds) == 1
    write_zips(tmp_path, {name: drawing(30) for name in small_omniglot})
    assert not torch.equal(load(omniglot, tmp_path, "train", 28), first) and len(builds) == 2


def test_damaged_caches_are_found_and_rebuilt(photos, capfd):
    expected = load(miniimagenet, photos, "train", 12)
    path, = (photos / "cache").iterdir()
    whole, plain = path.read_bytes(), io.BytesIO()
    np.save(plain, expected.numpy())
    capfd.readouterr()
    for damaged in (whole[:-1], whole[:len(whole) // 2], b"", plain.getvalue(), whole[:20] + b"X" + whole[21:]):
        path.write_bytes(damaged)
        assert torch.equal(load(miniimagenet, photos, "train", 12), expected)
        assert path.read_bytes() == whole
        assert capfd.readouterr().err == f"the cache {path} is damaged: building it again\n"


@pytest.mark.parametrize("name", ["file", "file/deeper"])
def test_cache_folder_that_can_not_be_written(photos, builds, name):
    (photos / "file").write_text("in the way")
    with refused("--cache FOLDER"):
        load(miniimagenet, photos, "train", 12, photos / name)
    assert not builds  # refused before the minutes of decoding
    before = listing(photos)
    load(miniimagenet, photos, "train", 12, photos.parent / "named")
    assert listing(photos) == before  # the data may be read-only


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

    with pytest.raises(SystemExit, match="2"):
        files.run(main)
    assert capsys.readouterr().err == "error: a name with\\na line end and \\x1b[31m colour\n"
