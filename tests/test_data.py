"""The data modules on real files that the tests write, good and bad, and on the real data sets.

    python -m pytest tests/test_data.py
    OMNIGLOT_ROOT=... MINIIMAGENET_ROOT=... python -m pytest tests/test_data.py
"""

import contextlib
import hashlib
import http.server
import io
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import files
import images
import miniimagenet
import omniglot
from files import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
ALPHABETS = {"images_background": ("Greek", "Latin"), "images_evaluation": ("Angelic",)}
BILINEAR = Image.Resampling.BILINEAR


# Small data sets


def encode(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **options)
    return data.getvalue()


def drawing(number: int) -> bytes:
    """A 1-bit PNG of 105 x 105, like Omniglot's, with a bar whose place tells `number`."""
    pixels = np.full((105, 105), True)
    pixels[10:95, 4 * number:4 * number + 4] = False
    return encode(pixels)


def omniglot_entries() -> dict[str, bytes]:
    """6 characters of 4 drawings: name -> PNG."""
    entries = {}
    for part, alphabets in ALPHABETS.items():
        for alphabet in alphabets:
            for character in range(2):
                for number in range(4):
                    name = f"{part}/{alphabet}/character{character + 1:02}/{number:04}_{number + 1:02}.png"
                    entries[name] = drawing(len(entries))
    return entries


def write_folders(root: Path, entries: dict[str, bytes]) -> None:
    for name, data in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def write_zips(root: Path, entries: dict[str, bytes]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part in ALPHABETS:
        with zipfile.ZipFile(root / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                if name.startswith(part):
                    archive.writestr(name, data)


@pytest.fixture
def small_omniglot(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
    monkeypatch.setattr(omniglot, "DRAWINGS", 4)
    return omniglot_entries()


def write_photos(root: Path, classes: int = 3, count: int = 4, size: int = 20) -> list[str]:
    """`classes` classes of `count` PNG files that all three CSV files list -> the CSV's lines."""
    (root / "images").mkdir(parents=True)
    lines = ["filename,label"]
    for label in range(classes):
        for number in range(count):
            value = 20 + 40 * label + 5 * number
            # Names that mix the classes up: only the label column tells them apart.
            name = f"p{number}{label}.png"
            (root / "images" / name).write_bytes(encode(np.full((size, size, 3), value, np.uint8)))
            lines.append(f"{name},class{classes - label}")
    write_csv(root, lines)
    return lines


def write_csv(root: Path, lines: list[str]) -> None:
    for split in ("train", "val", "test"):
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextlib.contextmanager
def refused(*words: str):
    """The block raises a UserError of one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and "object at 0x" not in text


# Omniglot


@pytest.mark.parametrize("write", [write_folders, write_zips])
def test_omniglot_is_read_from_folders_and_from_zips(tmp_path, small_omniglot, write):
    write(tmp_path, small_omniglot)
    names = omniglot.split_names({name.rpartition("/")[0] for name in small_omniglot})
    for split, count in omniglot.SPLITS.items():
        data = omniglot.load(tmp_path, split, 28)
        assert data.shape == (count, 4, 1, 28, 28) and data.dtype == torch.uint8
        for row, character in enumerate(names[split]):
            drawings = sorted(name for name in small_omniglot if name.startswith(f"{character}/"))
            for column, name in enumerate(drawings):
                image = Image.open(io.BytesIO(small_omniglot[name])).convert("L").resize((28, 28))
                assert np.array_equal(data[row, column, 0], np.asarray(image))
    assert data.max() == 255 and data.min() < 60  # white paper, dark ink: as stored, not inverted


def test_omniglot_zips_are_not_unpacked(tmp_path, small_omniglot):
    write_zips(tmp_path / "data", small_omniglot)
    omniglot.load(tmp_path / "data", "train", 28, cache=tmp_path / "cache")
    assert listing(tmp_path / "data") == ["images_background.zip", "images_evaluation.zip"]


def test_omniglot_split_depends_on_names_alone(tmp_path, small_omniglot, monkeypatch):
    shuffled = list(small_omniglot)
    loaded = []
    for seed in range(3):
        random.Random(seed).shuffle(shuffled)
        random.seed(seed), torch.manual_seed(seed), np.random.seed(seed)
        write_zips(tmp_path / str(seed), {name: small_omniglot[name] for name in shuffled})
        loaded.append(omniglot.load(tmp_path / str(seed), "train", 14))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: contextlib.nullcontext(reversed(list(scandir(folder)))))
    write_folders(tmp_path / "reversed", small_omniglot)
    loaded.append(omniglot.load(tmp_path / "reversed", "train", 14))
    assert all(torch.equal(loaded[0], other) for other in loaded[1:])


def test_omniglot_split_is_pinned_and_disjoint():
    names = [f"images_background/alphabet{n % 50:02}/character{n // 50:02}" for n in range(1623)]
    splits = omniglot.split_names(names)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [1100, 100, 423]
    assert set().union(*splits.values()) == set(names)
    assert splits == omniglot.split_names(reversed(names))
    digest = hashlib.sha256("\n".join(splits["test"]).encode()).hexdigest()
    assert digest.startswith("d8a3b8a32078ff2d")  # another split would make measured numbers incomparable


def test_omniglot_counts_are_checked(tmp_path, small_omniglot):
    name = next(iter(small_omniglot))
    missing_drawing = {other: data for other, data in small_omniglot.items() if other != name}
    write_zips(tmp_path / "a", missing_drawing)
    with refused("3 drawings", name.rpartition("/")[0], "--synthetic"):
        omniglot.load(tmp_path / "a", "train", 28)
    character = "Greek/character01"
    missing_character = {other: data for other, data in small_omniglot.items() if character not in other}
    write_folders(tmp_path / "b", missing_character)
    with refused("5 characters", "3 in images_background", "6", "images_evaluation.zip"):
        omniglot.load(tmp_path / "b", "train", 28)
    assert listing(tmp_path / "a") == ["images_background.zip", "images_evaluation.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_omniglot_zip_with_a_name_twice(tmp_path, small_omniglot):
    name, other = list(small_omniglot)[:2]
    write_zips(tmp_path, {entry: data for entry, data in small_omniglot.items() if entry != other})
    with zipfile.ZipFile(tmp_path / "images_background.zip", "a") as archive:
        archive.writestr(name, drawing(0))
    with refused("drawings", name.rpartition("/")[0]):
        omniglot.load(tmp_path, "train", 28)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "images_background/../../evil.png",
                                  "..\\evil.png", "C:/evil.png"])
def test_omniglot_zip_entry_that_leads_out(tmp_path, small_omniglot, name):
    write_zips(tmp_path / "data", small_omniglot)
    with zipfile.ZipFile(tmp_path / "data" / "images_background.zip", "a") as archive:
        archive.writestr(name, drawing(0))
    with refused("images_background.zip", "evil.png", "leads outside"):
        omniglot.load(tmp_path / "data", "train", 28)
    assert listing(tmp_path) == ["data", "data/images_background.zip", "data/images_evaluation.zip"]


def test_omniglot_damaged_zips(tmp_path, small_omniglot):
    write_zips(tmp_path, small_omniglot)
    path = tmp_path / "images_background.zip"
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip", whole[:len(whole) // 2]):
        path.write_bytes(damaged)
        with refused("images_background.zip", "--synthetic"):
            omniglot.load(tmp_path, "train", 28)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in small_omniglot.items():
            if name.startswith("images_background"):
                archive.writestr(name, data)
    stored = path.read_bytes()
    for name, data in small_omniglot.items():  # one byte of each: the zip's own checksum finds it
        stored = stored.replace(data, data[:-1] + bytes([data[-1] ^ 1]))
    path.write_bytes(stored)
    with refused("images_background.zip/", ".png", "CRC"):
        omniglot.load(tmp_path, "train", 28)
    assert not list(tmp_path.rglob("*.npy*")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_omniglot_zip_that_is_no_file(tmp_path, small_omniglot, kind):
    """A pipe would be waited on for ever, a device be read until the memory is full."""
    write_zips(tmp_path, small_omniglot)
    path = tmp_path / "images_background.zip"
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    with refused("images_background.zip is not a file", "--synthetic"):
        omniglot.load(tmp_path, "train", 28)


def test_omniglot_link_to_itself_in_the_place_of_a_folder(tmp_path, small_omniglot):
    write_folders(tmp_path, small_omniglot)
    shutil.rmtree(tmp_path / "images_background" / "Greek")
    (tmp_path / "images_background" / "Greek").symlink_to("Greek")
    with refused("4 characters"):
        omniglot.load(tmp_path, "train", 28)


def test_omniglot_zip_entry_that_understates_its_size(tmp_path, small_omniglot, monkeypatch):
    """A few kilobytes that unpack to 200 MB, said to be 100 bytes: no more than those are unpacked."""
    name = "images_background/Greek/character01/0000_01.png"
    write_zips(tmp_path, {**small_omniglot, name: bytes(200 * 2**20)})
    path = tmp_path / "images_background.zip"
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 200 * 2**20), struct.pack("<I", 100)))
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(name)
        assert entry.file_size == 100
        largest = []
        inflate = zlib.decompressobj

        class Watched:
            def __init__(self, *args):
                self.inner = inflate(*args)

            def decompress(self, *args):
                out = self.inner.decompress(*args)
                largest.append(len(out))
                return out

            def __getattr__(self, attribute):
                return getattr(self.inner, attribute)

        monkeypatch.setattr(zlib, "decompressobj", Watched)
        with pytest.raises(zipfile.BadZipFile):
            omniglot._read_entry(archive, entry)
        assert largest and max(largest) < 2**20


# Omniglot's download


@contextlib.contextmanager
def server(bodies: dict[str, bytes], cut: int = 0):
    """A loopback HTTP server of `bodies`; with `cut` it states the whole length and sends so much less."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = bodies.get(self.path.strip("/"))
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if body:
                self.wfile.write(body[:len(body) - cut])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture
def official(tmp_path, small_omniglot, monkeypatch) -> dict[str, bytes]:
    """The two zips as bodies, their md5 sums those that the module asks for."""
    write_zips(tmp_path / "official", small_omniglot)
    bodies = {f"{part}.zip": (tmp_path / "official" / f"{part}.zip").read_bytes() for part in omniglot.PARTS}
    md5s = {part: hashlib.md5(bodies[f"{part}.zip"]).hexdigest() for part in omniglot.PARTS}
    monkeypatch.setattr(omniglot, "PARTS", md5s)
    return bodies


def test_download_whole(tmp_path, official, monkeypatch, capfd):
    root = tmp_path / "deep" / "omniglot"
    stale = root / ".download-killed.tmp"
    stale.mkdir(parents=True)
    (stale / "images_background.zip").write_bytes(b"half")
    with server(official) as url:
        monkeypatch.setattr(omniglot, "URL", url)
        data = omniglot.load(root, "train", 28, cache=tmp_path / "cache")
    assert data.shape == (3, 4, 1, 28, 28)
    assert listing(root) == ["images_background.zip", "images_evaluation.zip"]
    assert socket.getdefaulttimeout() is None
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 3  # two downloads, one decoding
    assert torch.equal(omniglot.load(root, "train", 28, cache=tmp_path / "cache"), data)  # needs no server


def test_download_fetches_only_what_is_absent(tmp_path, official, monkeypatch):
    root = tmp_path / "omniglot"
    root.mkdir()
    (root / "images_background.zip").write_bytes(official["images_background.zip"])
    with server({"images_evaluation.zip": official["images_evaluation.zip"]}) as url:
        monkeypatch.setattr(omniglot, "URL", url)
        assert omniglot.load(root, "val", 28).shape[0] == 1


@pytest.mark.parametrize("fault", ["wrong md5", "cut body", "not found", "refused", "hangs"])
def test_download_that_fails_leaves_nothing(tmp_path, official, monkeypatch, fault):
    root = tmp_path / "omniglot"
    words = ["images_background.zip", "images_evaluation.zip", str(root), "--synthetic"]
    with contextlib.ExitStack() as stack:
        if fault == "wrong md5":
            bodies = {**official, "images_evaluation.zip": official["images_evaluation.zip"][::-1]}
            url, words = stack.enter_context(server(bodies)), words + ["md5"]
        elif fault == "cut body":
            url = stack.enter_context(server(official, cut=100))
        elif fault == "not found":
            url, words = stack.enter_context(server({})), words + ["404"]
        else:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            if fault == "hangs":  # takes the connection and never answers
                listener.listen()
                monkeypatch.setattr(omniglot, "TIMEOUT", 0.2)
        monkeypatch.setattr(omniglot, "URL", url)
        with refused(*words):
            omniglot.load(root, "train", 28)
    assert not root.exists()
    assert socket.getdefaulttimeout() is None


# miniImageNet


def test_photos_follow_the_label_column(photos):
    data = miniimagenet.load(photos, "train", 12)
    assert data.shape == (3, 4, 3, 12, 12) and data.dtype == torch.uint8
    # write_photos gives label L the class name 3 - L, so the sorted classes are 2, 1, 0; images in CSV order
    expected = [[20 + 40 * label + 5 * number for number in range(4)] for label in (2, 1, 0)]
    assert data[:, :, 0, 0, 0].tolist() == expected


def test_photos_are_resized_like_pil(tmp_path):
    lines = write_photos(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    (tmp_path / "images" / "p00.png").write_bytes(encode(noise))
    data = miniimagenet.load(tmp_path, "train", 12)
    assert lines[1] == "p00.png,class3"
    expected = np.asarray(Image.fromarray(noise).resize((12, 12), BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(data[2, 0], expected)


def test_csv_with_a_byte_order_mark_other_columns_and_line_ends(photos):
    expected = miniimagenet.load(photos, "train", 12)
    rows = [line.split(",") for line in (photos / "train.csv").read_text().split()]
    text = "\r\n".join(f"{label},x,{name}" for name, label in rows).replace(",x,filename", ",other,filename")
    (photos / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert torch.equal(miniimagenet.load(photos, "train", 12), expected)


def break_photos(root: Path, fault: str) -> None:
    lines = (root / "train.csv").read_text().split()
    if fault == "no root":
        shutil.rmtree(root)
    elif fault == "no csv":
        (root / "train.csv").unlink()
    elif fault == "no images folder":
        shutil.rmtree(root / "images")
    elif fault == "no image":
        (root / "images" / "p00.png").unlink()
    elif fault == "not an image":
        (root / "images" / "p00.png").write_text("hello")
    elif fault == "cut image":
        noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
        (root / "images" / "p00.png").write_bytes(encode(noise)[:1500])
    elif fault == "empty image":
        (root / "images" / "p00.png").write_bytes(b"")
    elif fault == "bomb":
        (root / "images" / "p00.png").write_bytes(png_header(40_000, 40_000))
    elif fault == "folder for an image":
        (root / "images" / "p00.png").unlink()
        (root / "images" / "p00.png").mkdir()
    elif fault == "pipe for an image":
        (root / "images" / "p00.png").unlink()
        os.mkfifo(root / "images" / "p00.png")
    elif fault == "link that leads out":
        (root / "images" / "p00.png").rename(root / "outside.png")
        (root / "images" / "p00.png").symlink_to("../outside.png")
    elif fault == "link that leads nowhere":
        (root / "images" / "p00.png").unlink()
        (root / "images" / "p00.png").symlink_to("absent.png")
    elif fault == "link to itself":
        (root / "images" / "p00.png").unlink()
        (root / "images" / "p00.png").symlink_to("p00.png")
    elif fault == "csv with NUL":
        (root / "train.csv").write_bytes(b"filename,label\np\x000.png,a\n")
    elif fault == "csv not utf-8":
        (root / "train.csv").write_bytes(b"filename,label\n\xff\xfe.png,a\n")
    elif fault == "csv without end":
        os.truncate(root / "train.csv", 10**12)  # no block of it is on disk
    elif fault == "csv with a long field":
        (root / "train.csv").write_text("filename,label\n" + "x" * 200_000 + ",a\n")
    else:
        write_csv(root, {
            "no column": ["filename,class", *lines[1:]],
            "no header": lines[1:],
            "no text at all": [],
            "empty split": lines[:1],
            "twice": [*lines, lines[1]],
            "unequal": lines[:-1],
            "too few": [lines[0], lines[1], lines[5]],
            "no label": [*lines, "p99.png"],
            "empty label": [*lines, "p99.png,"],
            "parent": [*lines, "../secret.png,class1"],
            "dots": [*lines, "..,class1"],
            "absolute": [*lines, "/etc/passwd,class1"],
            "backslash": [*lines, "..\\secret.png,class1"],
            "subfolder": [*lines, "sub/p.png,class1"],
        }[fault])


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


FAULTS = {  # and the words that the line must hold
    "no root": ["no folder", "--synthetic"], "no csv": ["train.csv", "missing"],
    "no images folder": ["images", "missing"],
    "no image": ["train.csv line 2", "'p00.png'", "remove the line"],
    "not an image": ["p00.png", "JPEG"], "cut image": ["p00.png", "can't be decoded"],
    "empty image": ["p00.png"], "bomb": ["p00.png", "million pixels"],
    "folder for an image": ["p00.png", "not a file"], "pipe for an image": ["p00.png", "not a file"],
    "link that leads out": ["p00.png", "link"], "link that leads nowhere": ["p00.png", "not a file"],
    "link to itself": ["p00.png", "can't read"],
    "csv with NUL": ["train.csv"], "csv not utf-8": ["train.csv", "UTF-8"],
    "csv with a long field": ["train.csv"], "csv without end": ["train.csv", "64 MB"],
    "no column": ["train.csv", "column label"], "no header": ["train.csv", "column filename"],
    "no text at all": ["train.csv", "column"], "empty split": ["train.csv", "no images"],
    "twice": ["train.csv line 14", "'p00.png'", "twice"], "unequal": ["'class1' has 3", "has 4"],
    "too few": ["train.csv", "has 1 image"],
    "no label": ["train.csv line 14"], "empty label": ["train.csv line 14"],
    "parent": ["leads out", "secret"], "dots": ["leads out"], "absolute": ["leads out", "passwd"],
    "backslash": ["leads out"], "subfolder": ["leads out", "sub/p.png"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_photo_folders(photos, fault):
    break_photos(photos, fault)
    with refused(*FAULTS[fault]):
        miniimagenet.load(photos, "train", 12)
    assert not [path for path in photos.rglob("*") if path.suffix in (".npy", ".tmp", ".lock")]


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


# MiniImagenet, the data set of single tasks


def test_tasks_of_the_dataset_class(photos):
    data = miniimagenet.MiniImagenet(photos, "train", 5, n_way=2, k_shot=1, k_query=3, resize=12)
    assert len(data) == 5 and len(list(data)) == 5
    x_spt, y_spt, x_qry, y_qry = data[3]
    assert x_spt.shape == (2, 3, 12, 12) and x_qry.shape == (6, 3, 12, 12)
    assert x_spt.dtype == torch.float32 and y_spt.dtype == y_qry.dtype == torch.int64
    assert y_spt.tolist() == [0, 1] and sorted(y_qry.tolist()) == [0, 0, 0, 1, 1, 1]

    def values(x):  # undo the normalisation: the grey values that write_photos chose
        return (x[:, 0, 0, 0] * miniimagenet.STD[0] + miniimagenet.MEAN[0]).mul(255).round().int()

    support, query = values(x_spt), values(x_qry)
    assert not set(support.tolist()) & set(query.tolist())
    for label in (0, 1):  # a class's values lie within 20 + 40 c .. 35 + 40 c
        assert ((query[y_qry == label] - 20) // 40 == (support[label] - 20) // 40).all()


def test_dataset_items_repeat_and_startidx_goes_on(photos):
    def make(batchsz, startidx=0):
        return miniimagenet.MiniImagenet(photos, "train", batchsz, 2, 1, 2, 12, startidx)

    first, again, shifted = make(6), make(6), make(3, startidx=3)
    torch.manual_seed(1)
    for index in (4, 0, 4):
        assert all(torch.equal(a, b) for a, b in zip(first[index], again[index]))
    assert all(torch.equal(a, b) for a, b in zip(first[4], shifted[1]))
    assert len({x_spt.sum().item() for x_spt, *_ in first}) > 1
    with pytest.raises(IndexError):
        first[6]
    batch = next(iter(torch.utils.data.DataLoader(first, batch_size=4)))
    assert batch[0].shape == (4, 2, 3, 12, 12)


@pytest.mark.parametrize("sizes, words", [
    ((4, 1, 2), ["--n_way 4", "3 classes"]), ((2, 2, 3), ["5 images", "4"]), ((2, 0, 3), ["--k_spt 0"])])
def test_dataset_that_is_too_small(photos, sizes, words):
    with refused(*words):
        miniimagenet.MiniImagenet(photos, "train", 1, *sizes, 12)


# Decoding


def decode(data: bytes, channels: int = 3, size: int = 8) -> np.ndarray:
    return images.decode(data, "some.png", channels, size, BILINEAR)


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
    results, errors = [], []
    for threads in (1, 2, 7):
        monkeypatch.setattr(images, "_threads", lambda: threads)
        results.append(miniimagenet.load(photos, "train", 12, cache=photos / f"cache{threads}"))
    assert all(torch.equal(results[0], other) for other in results)
    for name in ("p10.png", "p02.png", "p31.png"):
        (photos / "images" / name).write_text("broken")
    for threads in (1, 2, 7):
        monkeypatch.setattr(images, "_threads", lambda: threads)
        with pytest.raises(UserError) as caught:
            miniimagenet.load(photos, "train", 12)
        errors.append(str(caught.value))
    assert len(set(errors)) == 1 and "p02.png" in errors[0]  # the first in the order of the classes


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
    write_csv(photos, [lines[0], *reversed(lines[1:])])
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
    other = photos / "other"
    miniimagenet.load(photos, "train", 13, cache=other)
    foreign = next(other.iterdir()).read_bytes()
    relabelled = io.BytesIO()
    np.save(relabelled, np.zeros((3, 4, 3, 12, 12), np.uint8))
    damaged = {
        "cut": whole[:-1], "half": whole[:len(whole) // 2], "empty": b"", "longer": whole + b"\0",
        "foreign": foreign, "plain npy": relabelled.getvalue(),
        "header": whole[:20] + b"X" + whole[21:],
        "pixel": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        "last pixel": whole[:-75] + bytes([whole[-75] ^ 128]) + whole[-74:],
        "key": whole[:-60] + (b"1" if whole[-60:-59] == b"0" else b"0") + whole[-59:],
        "checksum": whole[:-5] + (b"1" if whole[-5:-4] == b"0" else b"0") + whole[-4:],
    }
    capfd.readouterr()
    for fault, data in damaged.items():
        path.write_bytes(data)
        before = len(builds)
        assert torch.equal(miniimagenet.load(photos, "train", 12), expected), fault
        assert len(builds) == before + 1, fault
        assert path.read_bytes() == whole
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2 and str(path) in said[0] and "building it again" in said[0], fault


def test_cache_folder_that_can_not_be_written(photos, builds):
    (photos / "file").write_text("in the way")
    with refused("--cache FOLDER", "file"):
        miniimagenet.load(photos, "train", 12, cache=photos / "file")
    with refused("--cache FOLDER"):
        miniimagenet.load(photos, "train", 12, cache=photos / "file" / "deeper")
    with refused("--cache FOLDER"):
        miniimagenet.load(photos, "train", 12, cache=photos / ("long" * 100))
    assert not builds  # found before the minutes of decoding


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


# The real data


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def real_root(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is unset: it names the folder of the real data")
    return Path(os.environ[variable])


def test_real_omniglot(cache, capfd):
    root = real_root("OMNIGLOT_ROOT")
    start = time.perf_counter()
    splits = {split: omniglot.load(root, split, 28, cache) for split in omniglot.SPLITS}
    assert time.perf_counter() - start < 60
    assert [tuple(data.shape) for data in splits.values()] == [
        (1100, 20, 1, 28, 28), (100, 20, 1, 28, 28), (423, 20, 1, 28, 28)]
    drawings = torch.cat([data.flatten(0, 1) for data in splits.values()]).flatten(1)
    assert (drawings.amax(1) == 255).all() and (drawings.amin(1) < 160).all()  # each has paper and ink
    assert 0.05 < 1 - drawings.float().mean().item() / 255 < 0.15
    # All but a few drawings are unique, so no class is in two splits.
    assert len(set(map(bytes, drawings.numpy()))) > 0.99 * len(drawings)
    capfd.readouterr()
    start = time.perf_counter()
    assert torch.equal(omniglot.load(root, "test", 28, cache), splits["test"])
    assert time.perf_counter() - start < 10 and capfd.readouterr().err == ""


def test_real_photos(cache, capfd):
    root = real_root("MINIIMAGENET_ROOT")
    start = time.perf_counter()
    splits = {split: miniimagenet.load(root, split, 84, cache) for split in ("train", "val", "test")}
    assert time.perf_counter() - start < 120
    assert [len(data) for data in splits.values()] == [64, 16, 20]
    labels = {split: {line.rpartition(",")[2] for line in (root / f"{split}.csv").read_text().split()[1:]}
              for split in splits}
    assert all(not labels[a] & labels[b] for a, b in (("train", "val"), ("train", "test"), ("val", "test")))
    for split, data in splits.items():
        lines = (root / f"{split}.csv").read_text().split()[1:]
        name, label = lines[-1].split(",")
        with Image.open(root / "images" / name) as image:
            expected = np.asarray(image.convert("RGB").resize((84, 84), BILINEAR)).transpose(2, 0, 1)
        row = sorted(labels[split]).index(label)
        assert data.shape[1] * len(data) == len(lines) and np.array_equal(data[row, -1], expected)
    start = time.perf_counter()
    capfd.readouterr()
    again = miniimagenet.load(root, "train", 84, cache)
    assert time.perf_counter() - start < 20 and capfd.readouterr().err == ""
    assert torch.equal(again, splits["train"])


def test_real_dataset_class(cache):
    root = real_root("MINIIMAGENET_ROOT")
    data = miniimagenet.MiniImagenet(root, "val", 100, 5, 5, 15, 84, cache=cache)
    x_spt, y_spt, x_qry, y_qry = data[0]
    assert x_spt.shape == (25, 3, 84, 84) and x_qry.shape == (75, 3, 84, 84)
    assert torch.bincount(y_spt).tolist() == [5] * 5 and torch.bincount(y_qry).tolist() == [15] * 5
    pixels = torch.cat([data[index][0] for index in range(8)])
    assert pixels.mean().abs() < 0.6 and 0.6 < pixels.std() < 1.6  # normalised
