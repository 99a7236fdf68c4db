"""Small data sets, written to files: Omniglot's drawings, photographs in miniImageNet's layouts, damaged images."""

import contextlib
import io
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import images
import omniglot
from files import UserError

ALPHABETS = {"images_background": ("Greek", "Latin"), "images_evaluation": ("Angelic",)}


def encode(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **options)
    return data.getvalue()


def real_data(variable: str) -> Path:
    """The folder of the real data that the environment names; the test is skipped where it names none."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is unset: it names the folder of the real data")
    return Path(os.environ[variable])


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


@pytest.fixture
def small_omniglot(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
    monkeypatch.setattr(omniglot, "DRAWINGS", 4)
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:1")  # no test asks the network
    return omniglot_entries()


def write_folders(root: Path, entries: dict[str, bytes]) -> None:
    for name, data in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def write_zips(root: Path, entries: dict[str, bytes], top: str = "") -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part in ALPHABETS:
        with zipfile.ZipFile(root / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                if name.startswith(part):
                    archive.writestr(top + name, data)


def colour(split: str, label: int, number: int) -> tuple[int, int, int]:
    """What `write_photos` paints: the red tells class and image, the green tells the split."""
    return 20 + 40 * label + 5 * number, {"train": 20, "val": 120, "test": 220}[split], 0


def write_photos(root: Path, classes: int = 3, count: int = 4, size: int = 20) -> list[str]:
    """Splits of `classes` classes of `count` PNG files in images/, and the CSV files -> the lines of train.csv.

    The files' names mix the classes up, so that only the label column tells them apart: p<number><label>.png in train.
    """
    (root / "images").mkdir(parents=True)
    for split, letter in (("test", "t"), ("val", "v"), ("train", "p")):
        lines = ["filename,label"]
        for label in range(classes):
            for number in range(count):
                name = f"{letter}{number}{label}.png"
                pixels = np.full((size, size, 3), colour(split, label, number), np.uint8)
                (root / "images" / name).write_bytes(encode(pixels))
                lines.append(f"{name},{split if split != 'train' else ''}class{classes - label}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return lines


# What `write_photos` wrote, in the other layouts; the images stay the same


def into_classes(root: Path, inside: str = "images") -> None:
    for split in images.SPLITS:
        for line in (root / f"{split}.csv").read_text().split()[1:]:
            name, label = line.split(",")
            (root / inside / label).mkdir(exist_ok=True, parents=True)
            (root / "images" / name).rename(root / inside / label / name)


def image_folder(root: Path) -> None:
    for split in images.SPLITS:
        for line in (root / f"{split}.csv").read_text().split()[1:]:
            name, label = line.split(",")
            (root / split / label).mkdir(exist_ok=True, parents=True)
            (root / "images" / name).rename(root / split / label / name)
        (root / f"{split}.csv").unlink()
    (root / "images").rmdir()


def cached(root: Path, form: str = "image_data", protocol: int = 4, **change) -> None:
    """mini-imagenet-cache-*.pkl in place of CSV files and images."""
    for split in images.SPLITS:
        rows = [line.split(",") for line in (root / f"{split}.csv").read_text().split()[1:]]
        pixels = np.stack([np.asarray(Image.open(root / "images" / name)) for name, _ in rows])
        labels = [label for _, label in rows]
        members = {label: [i for i, other in enumerate(labels) if other == label] for label in labels}
        content = {"image_data": pixels, "class_dict": members} if form == "image_data" else {
            "data": pixels, "labels": [sorted(members).index(label) for label in labels]}
        if form == "catname2label":
            content["catname2label"] = {label: sorted(members).index(label) for label in members}
        if form == "list of arrays":
            content |= {"data": list(pixels), "labels": labels}
        content |= change if split == "train" else {}
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, protocol))
        (root / f"{split}.csv").unlink()
    shutil.rmtree(root / "images")


def python2(root: Path) -> None:
    """As Python 2 writes them: text without an encoding, in an array's data too."""
    cached(root, protocol=2)
    for path in root.glob("*.pkl"):
        content = pickle.loads(path.read_bytes())
        data, shape = content["image_data"].tobytes(), content["image_data"].shape
        members = content["class_dict"]
        array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n("
                 + b"".join(b"I%d\n" % n for n in shape) + b"tcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\n"
                 b"I0\ntbI00\nT" + len(data).to_bytes(4, "little") + data + b"tb")
        classes = b"(d" + b"".join(b"U%c%s(l" % (len(name), name.encode()) + b"".join(b"I%d\na" % i for i in rows)
                                   + b"s" for name, rows in members.items())
        path.write_bytes(b"(dU\x0aimage_data" + array + b"sU\x0aclass_dict" + classes + b"s.")


def rename_images(root: Path, name) -> None:
    """Give image i of each class (from 0, in the CSV's order) the name that `name` (class, i) gives, in a folder."""
    for split in images.SPLITS:
        lines, seen = ["filename,label"], {}
        for line in (root / f"{split}.csv").read_text().split()[1:]:
            old, label = line.split(",")
            wnid = f"n0{sum(map(ord, label)):07}"
            new, listed = name(wnid, seen.setdefault(label, 0))
            seen[label] += 1
            (root / "images" / old).rename(root / "images" / new)
            lines.append(f"{listed},{label}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


def edit(root: Path, pattern: str, new: str) -> None:
    for split in images.SPLITS:
        (root / f"{split}.csv").write_text(re.sub(pattern, new, (root / f"{split}.csv").read_text()))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextlib.contextmanager
def refused(*words: str):
    """The block raises a UserError of one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        yield caught
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and "object at 0x" not in text
