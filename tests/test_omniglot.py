"""Omniglot from folders and zips wherever people have them, and its download.

    OMNIGLOT_ROOT=... python -m pytest tests/test_omniglot.py
"""

import contextlib
import functools
import hashlib
import http.server
import io
import shutil
import socket
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import listing, load, real_data, refused, write_classes, write_folders, write_zips
from PIL import Image

import omniglot

PLACES = {  # where people have it: how it is written, words of the line that says what was found
    "folders": (write_folders, "from images_background and images_evaluation"),
    "zips": (write_zips, "from images_background.zip and images_evaluation.zip"),
    "zip and folder": (lambda root, entries: (
        write_zips(root, entries), (root / "images_evaluation.zip").unlink(), write_folders(
            root, {name: entries[name] for name in entries if "evaluation" in name})), "background.zip and images"),
    "zips with a top folder": (lambda root, entries: write_zips(
        root, dict(reversed(entries.items())), "omniglot-master/python/"), ".zip"),
    "raw/ and processed/": (lambda root, entries: (write_zips(root / "omniglot/raw", entries),
                            write_folders(root / "omniglot/processed", entries)), "raw/images_background.zip and"),
    "folders in themselves": (lambda root, entries: write_folders(root, {
        f"{name.split('/')[0]}/{name}": data for name, data in entries.items()}), "evaluation/images_ev"),
    "half unpacked, next to whole folders": (lambda root, entries: (
        write_folders(root / "omniglot", entries), write_folders(root, dict(list(entries.items())[:7]))),
        "from omniglot/images_background and omniglot/images_evaluation"),
    "upper case, and files that a notebook made": (lambda root, entries: write_folders(
        root, {name.replace(".png", ".PNG"): data for name, data in entries.items()} | {
            "images_background/Greek/.ipynb_checkpoints/0001_01-checkpoint.png": b""}), "from images_background and"),
    "all alphabets in one part's folder": (lambda root, entries: (root / "images_evaluation").mkdir(
        parents=True) or write_folders(root, {f"images_background/{name.partition('/')[2]}": data for name, data
                                              in entries.items()}), "from images_background and images_evaluation"),
    "all alphabets in one folder": (lambda root, entries: write_folders(root / "omniglot/data", {
        name.partition("/")[2]: data for name, data in entries.items()}), "from omniglot/data: train"),
    "zips with backslashes and macOS's files": (lambda root, entries: write_zips(root, {
        name.replace("/", "\\"): data for name, data in entries.items()} | {
            name.replace("00", "._00", 1): b"" for name in entries}), ".zip"),
}


@pytest.mark.parametrize("place", PLACES)
def test_omniglot_is_read_wherever_it_lies(tmp_path, small_omniglot, place):
    write, words = PLACES[place]
    write(tmp_path, small_omniglot)
    summary = omniglot.find(tmp_path).summary
    assert words in summary and "train 3 classes of 4 images, val 1 classes of 4" in summary
    names = omniglot.split_names({name.rpartition("/")[0] for name in small_omniglot})
    for split, count in omniglot.SPLITS.items():
        data = load(omniglot, tmp_path, split, 28, tmp_path / "cache")
        assert data.shape == (count, 4, 1, 28, 28) and data.dtype == torch.uint8
        for row, character in enumerate(names[split]):
            drawings = sorted(name for name in small_omniglot if name.startswith(f"{character}/"))
            for column, name in enumerate(drawings):
                image = Image.open(io.BytesIO(small_omniglot[name])).convert("L").resize((28, 28))
                assert np.array_equal(data[row, column, 0], np.asarray(image))
    assert data.max() == 255 and data.min() < 60  # white paper, dark ink: as stored, not inverted
    if place == "zips":  # not unpacked
        assert not [path for path in tmp_path.glob("images_*") if path.is_dir()]


def test_splits_are_pinned_and_disjoint():
    names = [f"images_background/alphabet{n % 50:02}/character{n // 50:02}" for n in range(1623)]
    splits = omniglot.split_names(names)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [1100, 100, 423]
    assert set().union(*splits.values()) == set(names)
    assert splits == omniglot.split_names(reversed(names))
    digest = hashlib.sha256("\n".join(splits["test"]).encode()).hexdigest()
    assert digest.startswith("d8a3b8a32078ff2d")  # another split would make measured numbers incomparable


MISSING = {  # what is wrong: how to make it so, the words that the line must hold
    "a drawing": (lambda root: (root / "images_background/Greek/character01/0001_01.png").unlink(),
                  ["3 of images_background/Greek/character01", "drawings than Omniglot's 4"]),
    "one too many": (lambda root: shutil.copy(*(root / f"images_background/Greek/character01/000{i}_01.png" for i in (
        1, 9))), ["5 of images_background/Greek/character01", "drawings than Omniglot's 4"]),
    "an empty one": (lambda root: (root / "images_background/Greek/character01/0001_01.png").write_bytes(b""),
                     ["0001_01.png is empty"]),
    "a character too many": (lambda root: shutil.copytree(*(root / f"images_background/Greek/character{i}" for i in (
        "01", "99"))), ["7 characters (3 in images_background, 4 in images_evaluation)", "Omniglot has 6"]),
    "a character": (lambda root: shutil.rmtree(root / "images_background/Greek/character01"),
                    ["5 characters (1 in images_background, 4 in images_evaluation)", "Omniglot has 6"]),
    "an alphabet": (lambda root: shutil.rmtree(root / "images_evaluation/Tibetan"),
                    ["4 characters (2 in images_background, 2 in images_evaluation, without Tibetan)"]),
    "a part": (lambda root: shutil.rmtree(root / "images_evaluation"),
               ["images_evaluation of Omniglot: absent", "images_background is there", "can't be downloaded"]),
    "PNG files": (lambda root: [path.rename(path.with_suffix(".jpg")) for path in root.rglob("images_eval*/**/*.png")],
                  ["none in images_evaluation with 16 .jpg files)"]),
}


@pytest.mark.parametrize("make, words", MISSING.values(), ids=MISSING)
def test_what_is_there_and_what_is_missing_are_named_and_the_zips_lead_out(tmp_path, small_omniglot, make, words):
    write_folders(tmp_path, small_omniglot)
    make(tmp_path)
    with refused(*words, "put images_", "images_evaluation.zip from", "--synthetic"):
        [load(omniglot, tmp_path, split, 28) for split in omniglot.SPLITS]
    with refused("absent"):
        load(omniglot, tmp_path / "mistyped", "train", 28)
    assert not (tmp_path / "mistyped").exists()
    write_zips(tmp_path, small_omniglot)  # as advised
    assert [len(load(omniglot, tmp_path, split, 28)) for split in omniglot.SPLITS] == list(omniglot.SPLITS.values())


@pytest.mark.parametrize("split", ["", "train"])
def test_other_images_start_no_download(tmp_path, small_omniglot, split):
    write_classes(tmp_path / split, 3)
    with refused("images_evaluation, but 3 folders with images", f"--data {tmp_path};", "--root FOLDER"):
        omniglot.find(tmp_path)


def test_damaged_zips(tmp_path, small_omniglot):
    write_zips(tmp_path, small_omniglot, method=zipfile.ZIP_STORED)
    path = tmp_path / "images_background.zip"
    whole, data = path.read_bytes(), next(iter(small_omniglot.values()))
    flipped = whole.replace(data, data[:-1] + bytes([data[-1] ^ 1]))  # the zip's own checksum finds it
    for damaged, words in ((b"", "complete"), (b"not a zip", "complete"), (whole[:len(whole) // 2], "complete"),
                           (flipped, "CRC")):
        path.write_bytes(damaged)
        with refused("images_background.zip", words, "--synthetic"):
            image_set = omniglot.find(tmp_path)
            for split in omniglot.SPLITS:
                image_set.load(split, 28, 1)
    with refused("images_background.zip is a file; name the folder"):
        omniglot.find(path)
    (tmp_path / "images_background/Greek").mkdir(parents=True)
    with refused("images_background is a part of Omniglot; name the folder that it is in"):
        omniglot.find(tmp_path / "images_background")


# The download


@contextlib.contextmanager
def server(folder: Path):
    """A loopback HTTP server of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.fixture
def official(tmp_path, small_omniglot, monkeypatch) -> Path:
    """A folder with the two zips, their md5 sums those that the module asks for."""
    folder = tmp_path / "official"
    write_zips(folder, small_omniglot)
    monkeypatch.setattr(omniglot, "PARTS", {
        part: hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest() for part in omniglot.PARTS})
    return folder


@pytest.mark.parametrize("present", [[], ["images_background.zip"]])
def test_download_of_what_is_absent(tmp_path, official, monkeypatch, capfd, present):
    root = tmp_path / "deep" / "omniglot"
    root.mkdir(parents=True)
    for name in present:
        (official / name).rename(root / name)
    with server(official) as url:
        monkeypatch.setattr(omniglot, "URL", url)
        omniglot.find(root)
    assert listing(root) == ["images_background.zip", "images_evaluation.zip"]
    assert socket.getdefaulttimeout() is None and capfd.readouterr().err.count("downloading ") == 2 - len(present)
    assert load(omniglot, root, "train", 28).shape == (3, 4, 1, 28, 28)  # needs no server


@pytest.mark.parametrize("fault, words", [("wrong md5", "corrupted"), ("not found", "404"), ("refused", "refused"),
                                          ("hangs", "timed out")])
def test_download_that_fails_leaves_nothing_half(tmp_path, official, monkeypatch, fault, words):
    root = tmp_path / "omniglot"
    monkeypatch.setattr(omniglot, "TIMEOUT", 0.2 if fault == "hangs" else 30)
    if fault == "wrong md5":
        monkeypatch.setattr(omniglot, "PARTS", dict.fromkeys(omniglot.PARTS, "0" * 32))
    with server(tmp_path if fault == "not found" else official) as url, socket.socket() as listener:
        if fault in ("refused", "hangs"):
            listener.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if fault == "hangs":  # takes the connection and never answers
            listener.listen()
        monkeypatch.setattr(omniglot, "URL", url)
        with refused("images_background.zip", "images_evaluation.zip", str(root), "--synthetic", words):
            load(omniglot, root, "train", 28)
    assert listing(root) == [] and socket.getdefaulttimeout() is None


@pytest.mark.slow
def test_real_omniglot(tmp_path):
    root = real_data("OMNIGLOT_ROOT")
    image_set = omniglot.find(root, tmp_path)
    splits = {split: image_set.load(split, 28, 1) for split in omniglot.SPLITS}
    assert [tuple(data.shape) for data in splits.values()] == [
        (1100, 20, 1, 28, 28), (100, 20, 1, 28, 28), (423, 20, 1, 28, 28)]
    drawings = torch.cat([data.flatten(0, 1) for data in splits.values()]).flatten(1)
    assert (drawings.amax(1) == 255).all() and (drawings.amin(1) < 160).all()  # each has paper and ink
    assert 0.05 < 1 - drawings.float().mean().item() / 255 < 0.15
    assert len(set(map(bytes, drawings.numpy()))) > 0.99 * len(drawings)  # all but a few drawings are unique

    vinyals = omniglot.find(root, tmp_path, "vinyals").splits
    assert {split: len(names) for split, names in vinyals.items()} == omniglot.VINYALS
    alphabets = {split: {name.split("/")[1] for name in names} for split, names in vinyals.items()}
    assert alphabets["val"] == set(omniglot.VINYALS_VAL)
    assert alphabets["test"] == {
        "Gurmukhi", "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya",
        "Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG"}
    assert [name[-11:] for name in vinyals["test"] if "Gurmukhi" in name] == [
        f"character{number}" for number in (42, 43, 44, 45)]
    assert not alphabets["train"] & (alphabets["val"] | alphabets["test"] - {"Gurmukhi"})
