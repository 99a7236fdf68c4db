"""Bad input at scale: thousands of damaged, foreign and hostile inputs, each repeatable from a seed.

    python -m pytest tests/test_fuzz.py                                   2,400 inputs
    FUZZ_INPUTS=20000 FUZZ_SEED=7 python -m pytest -s tests/test_fuzz.py  more and others; -s shows the counts
    FUZZ_SEED=7 FUZZ_ONLY=zip:41 python -m pytest tests/test_fuzz.py      one of them again, as a failure names it

Each input goes to the real loader or program, in this process or ("process") in one of its own. What is less than real,
for speed: data sets and synthetic ones have a few images; "arguments" and "from_args" end where training would begin,
for a valid one might take days; of the figures one in twenty is drawn, the others only built.
"""

import collections
import contextlib
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import files
import fuzzing
import images
import miniimagenet
import miniimagenet_train
import omniglot
import omniglot_train
import plot_nc
import synthetic
from fuzzing import Input, damage_file, damaged, mutated_json
from meta import Meta
from test_data import encode, omniglot_entries, png_header, write_folders, write_photos, write_zips
from test_plot_nc import rows, write_run

SHARES = {  # of the inputs, by kind
    "csv": 0.2, "image": 0.2, "zip": 0.12, "cache": 0.08, "log": 0.08, "test": 0.05, "resume": 0.04, "from_args": 0.06,
    "arguments": 0.15, "process": 0.02,
}
FED = collections.Counter()  # inputs of the kinds that ran
OUTSIDE = ["../secret.png", "/etc/hostname", "images/../../secret.png", "..\\secret.png", "C:\\secret.png", "..", ".",
           "sub/p00.png", "./p00.png", "~/secret.png", "file:///etc/hostname", "p00.png\0", "//host/x.png",
           "\x1b[2J.png"]


def feed(kind: str, make: Callable[[random.Random, Path], Input], folder: Path,
         attempt: Callable[[Input, Path], str] = fuzzing.attempt) -> None:
    """Give a kind its share of the inputs; say how many were accepted and refused, and how to repeat what is wrong."""
    numbers = range(max(1, round(SHARES[kind] * fuzzing.INPUTS)))
    if fuzzing.ONLY:
        only, _, number = fuzzing.ONLY.partition(":")
        if only != kind:
            pytest.skip(f"FUZZ_ONLY={fuzzing.ONLY}")
        numbers = [int(number)]
    outcomes, wrong = collections.Counter(), []
    for number in numbers:
        around = folder / str(number)
        (around / "cwd").mkdir(parents=True)
        given = make(fuzzing.random_of(kind, number), around)
        try:
            with contextlib.chdir(around / "cwd"), fuzzing.memory_limit(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[attempt(given, around)] += 1
        except AssertionError as error:
            wrong.append(f"FUZZ_SEED={fuzzing.SEED} FUZZ_ONLY={kind}:{number} ({given.recipe}): {error}")
        shutil.rmtree(around)
    FED[kind] += len(numbers)
    print(f"{kind}: {len(numbers):,} inputs of seed {fuzzing.SEED}: {dict(outcomes)}")
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(numbers)} inputs:\n" + "\n".join(wrong[:20]), pytrace=False)
    if not fuzzing.ONLY:
        assert outcomes.total() == len(numbers) and outcomes["accepted"] and outcomes["refused"], outcomes


def checked(load: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> Callable[[], None]:
    """What is accepted has the promised shape."""

    def call() -> None:
        loaded = load()
        assert loaded.dtype == torch.uint8 and loaded.shape[2:] == shape and loaded.numel(), loaded.shape

    return call


# ---- data sets

PHOTO_CLASSES, PHOTO_COUNT, PHOTO_SIZE = 2, 3, 8


@functools.cache
def drawings() -> dict[str, bytes]:
    """6 characters of 2 drawings."""
    return {name: data for name, data in omniglot_entries().items() if name.endswith(("_01.png", "_02.png"))}


def photos(around: Path) -> Path:
    write_photos(around / "data", PHOTO_CLASSES, PHOTO_COUNT, PHOTO_SIZE)
    (around / "secret.png").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    return around / "data"


def load_photos(root: Path, recipe: str) -> Input:
    def load() -> torch.Tensor:
        miniimagenet.sizes(root)
        return miniimagenet.load(root, "train", 8)

    return Input(recipe, checked(load, (3, 8, 8)), (root,), (root / "cache",))


def csv_input(rng: random.Random, around: Path) -> Input:
    root = photos(around)
    table = root / rng.choice(["train.csv", "train.csv", "train.csv", "val.csv"])
    kind = rng.choice(["bytes", "bytes", "special", "encoding", "ends", "outside", *CSV_LINES])
    lines = table.read_text().split()
    row = rng.randrange(1, len(lines))
    if kind == "bytes":
        kind = damage_file(rng, table)
    elif kind == "special":
        kind = special_file(rng, table)
    elif kind == "encoding":
        kind = rng.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "cp037", "latin-1"])
        lines[row] = lines[row].replace("class", "Größe")
        table.write_bytes("\n".join(lines).encode(kind))
    elif kind == "ends":
        kind = rng.choice(["\r\n", "\r", "\n\n", "\n\r", "\x0b", "\u2028", "", " \n", ";", "\0\n"])
        table.write_bytes(kind.join(lines).encode())
    else:
        table.write_bytes(("\n".join(CSV_LINES[kind](rng, lines, row)) + "\n").encode())
    return load_photos(root, f"{table.name}: {kind!r}, row {row}")


def columns(rng: random.Random, lines: list[str], row: int) -> list[str]:
    order = rng.choice([[1, 0], [0], [1], [0, 0], [0, 1, 1], [0, 1, 0], [2, 0, 1]])
    return [",".join([*line.split(","), "more"][column] for column in order) for line in lines]


def header(rng: random.Random, lines: list[str], row: int) -> list[str]:
    first = rng.choice(["", "filename", "label", "Filename,Label", "filename, label", "filename;label", "0,1",
                        "filename,label,", "label,filename", "filename,filename,label", lines[1], "\ufeff" * 2])
    return [first, *lines[1:]]


def leads_outside(rng: random.Random, lines: list[str], row: int) -> list[str]:
    _, label = lines[row].split(",")
    return [*lines[:row], f"{rng.choice(OUTSIDE)},{label}", *lines[row + 1:]]


def odd_field(rng: random.Random, lines: list[str], row: int) -> list[str]:
    name, label = lines[row].split(",")
    field = rng.choice(["", " ", "x" * 200_000, "x" * 5_000, "\0", "é", "\u202e", "-1", "nan", "=1+1", "\x1b[31m",
                        "None"])
    line = rng.choice([f"{field},{label}", f"{name},{field}", f"{name},{label},{field}"])
    return [*lines[:row], line, *lines[row + 1:]]


def quoted(rng: random.Random, lines: list[str], row: int) -> list[str]:
    name, label = lines[row].split(",")
    line = rng.choice([f'"{name},{label}', f'"{name}","{label}"', f'{name},"a\nb"', f'"{name}"x,{label}', '""', '"',
                       f'"{name},{label}"', f"'{name}',{label}", f'{name},"{label}""', f"{name}\\,{label}"])
    return [*lines[:row], line, *lines[row + 1:]]


def other_text(rng: random.Random, lines: list[str], row: int) -> list[str]:
    return [rng.choice(["{}", "\x89PNG\r\n", "<html>", "0", ",", ",,,,", "filename,label" * 3, ""])]


def other_rows(rng: random.Random, lines: list[str], row: int) -> list[str]:
    return rng.choice([lines[:1], lines[:row], lines + lines[1:], lines + [lines[row]], lines * 1000, lines[1:],
                       [lines[0], *reversed(lines[1:])], lines + ["absent.png,class1"], lines + ["," * 10_000]])


CSV_LINES = {  # the lines of a CSV file -> worse ones
    "columns": columns, "header": header, "outside": leads_outside, "field": odd_field, "quotes": quoted,
    "text": other_text, "rows": other_rows,
}


def special_file(rng: random.Random, path: Path) -> str:
    """Put something that is no regular file, or not the expected one, in the place of `path`."""
    kind = rng.choice(["nothing", "folder", "pipe", "link out", "link to itself", "dangling link", "socket", "device",
                       "empty"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind != "nothing":
        path.symlink_to({"link out": "../../secret.png", "link to itself": path.name, "dangling link": "absent",
                         "device": "/dev/zero"}[kind])
    return f"{path.name}: {kind}"


@functools.cache
def pictures() -> dict[str, bytes]:
    """Encoded images of the modes and formats that turn up in data sets, and of some that must not."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
    rgb, rgba, grey = Image.fromarray(noise[..., :3]), Image.fromarray(noise), Image.fromarray(noise[..., 0])
    two = Image.fromarray(noise[..., 1])
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    made = {
        "JPEG": (rgb, {}), "JPEG grey": (grey, {}), "JPEG CMYK": (rgb.convert("CMYK"), {}),
        "JPEG YCbCr": (rgb.convert("YCbCr"), {}), "JPEG progressive": (rgb, {"progressive": True}),
        "JPEG EXIF": (rgb, {"exif": exif}), "PNG": (rgb, {}), "PNG alpha": (rgba, {}),
        "PNG palette": (rgb.quantize(16), {}), "PNG masked": (rgb.quantize(4), {"transparency": 1}),
        "PNG 16 bit": (deep, {}), "PNG grey and alpha": (rgba.convert("LA"), {}), "PNG 1 bit": (grey.convert("1"), {}),
        "PNG animated": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}), "PNG EXIF": (rgb, {"exif": exif}),
        "GIF": (rgb.quantize(8), {}), "GIF animated": (grey, {"save_all": True, "append_images": [two]}),
        "BMP": (rgb, {}), "BMP 1 bit": (grey.convert("1"), {}), "TIFF": (rgb, {}), "TIFF 16 bit": (deep, {}),
        "WEBP": (rgb, {}), "PPM": (rgb, {}), "ICO": (rgb, {}), "TGA": (rgb, {}), "PCX": (rgb, {}), "PDF": (rgb, {}),
        "EPS": (rgb, {}),
    }
    encoded = {}
    for name, (image, options) in made.items():
        data = io.BytesIO()
        image.save(data, name.split()[0], **options)
        encoded[name] = data.getvalue()
    return encoded | {
        "text": b"hello\n", "empty": b"", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "XBM": b"#define i_width 8\n",
        "EPS script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(data):
        length, = struct.unpack(">I", data[place:place + 4])
        chunks.append((data[place + 4:place + 8], data[place + 8:place + 8 + length]))
        place += 12 + length
    return chunks


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of such chunks, each with the right checksum: damage that a decoder sees only when it looks inside."""
    packed = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        packed += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return packed


@functools.cache
def bomb() -> bytes:
    """30 KB that unpack to 30 MB."""
    return zlib.compress(bytes(3 * 10**7))


def crafted(rng: random.Random) -> tuple[bytes, str]:
    """An image that is well-formed outside and lies inside."""
    kind = rng.choice(["PNG size", "PNG size", "PNG header", "PNG chunk", "PNG chunks", "PNG text bomb",
                       "PNG profile bomb",
                       "PNG pixel bomb", "JPEG size", "GIF size", "BMP size"])
    side = rng.choice([0, 1, 23, 25, 5_000, 9_000, 65_535, 2**31 - 1, 2**32 - 1])
    source = pictures()[rng.choice([name for name in pictures() if name.startswith("PNG")])]
    chunks = png_chunks(source)
    if kind == "PNG size":
        data = png_header(side, rng.choice([1, 24, side]))
    elif kind == "PNG header":
        header = bytearray(chunks[0][1])
        header[rng.randrange(13)] = rng.randrange(256)
        data = png([(b"IHDR", bytes(header)), *chunks[1:]])
    elif kind == "PNG chunk":
        place = rng.randrange(len(chunks))
        new, _ = damaged(rng, chunks[place][1])
        data = png([*chunks[:place], (chunks[place][0], new), *chunks[place + 1:]])
    elif kind == "PNG chunks":
        rng.shuffle(chunks)
        data = png(chunks[:rng.randrange(len(chunks) + 1)])
    elif kind == "PNG text bomb":
        data = png([chunks[0], (b"zTXt", b"a\0\0" + bomb()), *chunks[1:]])
    elif kind == "PNG profile bomb":
        data = png([chunks[0], (b"iCCP", b"a\0\0" + bomb()), *chunks[1:]])
    elif kind == "PNG pixel bomb":  # far more pixels than the header says
        data = png([*png_chunks(png_header(8, 8))[:1], (b"IDAT", bomb()), (b"IEND", b"")])
    elif kind == "JPEG size":
        data = bytearray(pictures()["JPEG"])
        frame = data.index(b"\xff\xc0")
        data[frame + 5:frame + 9] = struct.pack(">HH", min(side, 65_535), rng.choice([0, 1, min(side, 65_535)]))
    elif kind == "GIF size":
        data = bytearray(pictures()["GIF"])
        data[6:10] = struct.pack("<HH", *[min(side, 65_535)] * 2)
    else:
        data = bytearray(pictures()["BMP"])
        data[18:26] = struct.pack("<II", side, rng.choice([side, 2**32 - 24]))
    return bytes(data), f"{kind} {side}"


def image_bytes(rng: random.Random) -> tuple[bytes, str]:
    kind = rng.choice(["whole", "damaged", "damaged", "damaged", "crafted", "joined"])
    if kind == "crafted":
        return crafted(rng)
    name = rng.choice(list(pictures()))
    if kind == "whole":
        return pictures()[name], name
    if kind == "joined":
        other = rng.choice(list(pictures()))
        return pictures()[name] + pictures()[other], f"{name}, then {other}"
    data, recipe = damaged(rng, pictures()[rng.choice([name, "JPEG", "PNG"])])
    return data, f"{name}: {recipe}"


def image_input(rng: random.Random, around: Path) -> Input:
    """One image of a data set is another: a photograph, or a drawing in an unpacked Omniglot."""
    if rng.random() < 0.6:
        root = photos(around)
        given = functools.partial(load_photos, root)
        path = rng.choice(sorted((root / "images").iterdir()))
    else:
        root = around / "data"
        write_folders(root, drawings())
        given = functools.partial(load_drawings, root)
        path = rng.choice(sorted(root.rglob("*.png")))
        if rng.random() < 0.1:  # instead of a drawing, the folder of a character
            path.parent.rename(root / path.parent.name)
            path = path.parent
            path.touch()
            return given(special_file(rng, path))
    if rng.random() < 0.12:
        return given(special_file(rng, path))
    data, recipe = image_bytes(rng)
    path.write_bytes(data)
    return given(f"{path.name}: {recipe}")


def load_drawings(root: Path, recipe: str) -> Input:
    def load() -> torch.Tensor:
        for split in ("val", "test"):
            loaded = omniglot.load(root, split, 28)
        return loaded

    return Input(recipe, checked(load, (1, 28, 28)), (root,), (root / "cache",))


def zip_input(rng: random.Random, around: Path) -> Input:
    root = around / "data"
    entries = dict(drawings())
    write_zips(root, entries)
    path = root / rng.choice(["images_background.zip", "images_background.zip", "images_evaluation.zip"])
    name = rng.choice([name for name in entries if name.startswith(path.stem)])
    kind = rng.choice(["bytes", "field", "special"] * 4 + ["outside", "entry", "nested", "place", *ZIP_ENTRIES])
    if kind == "bytes":
        kind = damage_file(rng, path)
    elif kind == "field":
        kind = damage_zip_field(rng, path)
    elif kind == "special":
        kind = special_file(rng, path)
    elif kind == "nested":
        inner = path.read_bytes()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(rng.choice([path.name, f"{path.stem}/{path.name}", name]), inner)
    elif kind == "place":
        kind = rng.choice(["a folder of its name", "a folder beside it", "a file of its name"])
        path.rename(root / path.stem) if "file" in kind else (root / path.stem).mkdir()
        if kind == "a folder of its name":
            path.unlink()
    else:
        kind, written, options = ZIP_ENTRIES[kind](rng, entries, name)
        with zipfile.ZipFile(path, "w", **{"compression": zipfile.ZIP_DEFLATED} | options) as archive:
            for entry, data in written:
                if entry.startswith(path.stem) or not entry.startswith("images_"):
                    with warnings.catch_warnings(action="ignore"):  # zipfile's, of a name that is there twice
                        archive.writestr(entry, data)
    return load_drawings(root, f"{path.name}: {kind}, {name}")


Written = tuple[str, list[tuple[str, bytes]], dict]  # what was done, names and contents, options of ZipFile


def entry_outside(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    part = name.partition("/")[0]
    lead = rng.choice(["../evil.png", f"{part}/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:/evil.png",
                       f"{part}\\..\\evil.png", f"/{name}", f"../{name}", f"./{name}", f"{part}//a/b.png", f"{name}/",
                       f"{part}/a/../b.png", f"{part}/\0/b/c.png", f"{part}/a/b/\x1b[2J.png", "\\\\host\\evil.png",
                       f"{part}/a/{'b' * 60_000}/c.png"])
    return f"has {lead[:50]!r}", [*entries.items(), (lead, entries[name])], {}


def other_entry(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    data, recipe = image_bytes(rng)
    return recipe, [*(entries | {name: data}).items()], {}


def zip_bomb(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    size = rng.choice([10**6, 10**7, 10**8])
    return f"bomb of {size} bytes", [*(entries | {name: bytes(size)}).items()], {"compresslevel": 1}


def missing_entries(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    lost = rng.sample(sorted(entries), rng.choice([1, 2, 4, 12]))
    return f"without {len(lost)}", [(entry, data) for entry, data in entries.items() if entry not in lost], {}


def renamed_entry(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    new = rng.choice([name.upper(), name.replace("character", "c"), name.replace("images_", "images"), name + ".txt",
                      "é" + name, name.replace(".png", ".PNG"), name.rpartition("/")[2], "é".join(name.split("a"))])
    return f"renamed to {new}", [(new if entry == name else entry, data) for entry, data in entries.items()], {}


def extra_entry(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    part = name.partition("/")[0]
    new = rng.choice([name, f"{part}/notes.txt", name.replace(".png", "b.png"), "__MACOSX/._x",
                      f"{part}/Greek/new/0001.png",
                      f"{part}/.DS_Store", f"{part}/Greek/", name.rpartition("/")[0] + "/.0001.png"])
    return f"also {new}", [*entries.items(), (new, rng.choice([entries[name], b""]))], {}


def other_method(rng: random.Random, entries: dict[str, bytes], name: str) -> Written:
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    return f"compression {method}", [*entries.items()], {"compression": method}


ZIP_ENTRIES = {  # the drawings -> what the zip file holds instead
    "outside": entry_outside, "entry": other_entry, "bomb": zip_bomb, "missing": missing_entries,
    "renamed": renamed_entry,
    "extra": extra_entry, "method": other_method,
}


def damage_zip_field(rng: random.Random, path: Path) -> str:
    """Overwrite one field of the records that a zip file is made of: its directory may lie about its entries."""
    data = bytearray(path.read_bytes())
    kind, fields = rng.choice([
        (b"PK\1\2", {"version": (6, 2), "flags": (8, 2), "method": (10, 2), "crc": (16, 4), "packed": (20, 4),
                     "size": (24, 4), "name": (28, 2), "extra": (30, 2), "attributes": (38, 4), "offset": (42, 4)}),
        (b"PK\3\4", {"flags": (6, 2), "method": (8, 2), "crc": (14, 4), "packed": (18, 4), "size": (22, 4),
                     "name": (26, 2), "extra": (28, 2)}),
        (b"PK\5\6", {"disk": (4, 2), "entries": (10, 2), "directory size": (12, 4), "directory offset": (16, 4)}),
    ])
    places = [place for place in range(len(data) - 4) if data[place:place + 4] == kind]
    field, (offset, width) = rng.choice(list(fields.items()))
    value = rng.choice([0, 1, 8, 9, 14, 99, 2**16 - 1, 2**31, 2**32 - 1]) % 2**(8 * width)
    place = rng.choice(places) + offset
    data[place:place + width] = value.to_bytes(width, "little")
    path.write_bytes(data)
    return f"{field} of record {kind!r} at {place} is {value}"


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A data folder with three caches, and the images of one of them."""
    root = photos(tmp_path_factory.mktemp("cached"))
    truth = miniimagenet.load(root, "train", 8).clone()
    miniimagenet.load(root, "val", 8)
    miniimagenet.load(root, "train", 9)
    return root, truth


def cache_input(cached: tuple[Path, torch.Tensor], rng: random.Random, around: Path) -> Input:
    """A cache file is damaged or another's: never taken for what it isn't, whatever it says about itself."""
    source, truth = cached
    root = around / "data"
    shutil.copytree(source, root)  # with the files' times, which the caches' keys hold
    cache = root / "cache"
    path, = cache.glob("*-train-8px-*")
    whole = path.read_bytes()
    kind = rng.choice(["damaged"] * 5 + ["header", "header", "other", "other", "foreign", "special", "folder"])
    if kind == "damaged":
        data, kind = damaged(rng, whole)
        path.write_bytes(data)
    elif kind == "header":  # numpy's own header, which says what follows
        header = rng.choice(["(2, 3, 3, 8, 9)", "(10**9,)", "(-1, 3)", "()", "(2, 3, 3, 8, 8), 'descr': '|O'",
                             "__import__('os')", "(999999999999, 999999999)", "(2, 3, 3, 8, 8), 'fortran_order': True"])
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {header}}}".ljust(117) + "\n"
        path.write_bytes(whole[:10] + text.encode() + whole[10 + len(text):])
        kind = f"header {header}"
    elif kind == "other":
        other = rng.choice(["*-val-*", "*-9px-*"])
        shutil.copy(*cache.glob(other), path)
        kind = f"the cache {other}"
    elif kind == "foreign":
        pickled, plain = io.BytesIO(), io.BytesIO()
        np.save(pickled, np.array([{}], object), allow_pickle=True)
        np.save(plain, np.zeros(truth.shape, np.uint8))
        path.write_bytes(rng.choice([pickled.getvalue(), plain.getvalue(), pictures()["PNG"], bytes(len(whole)),
                                     whole * 2]))
    elif kind == "special":
        kind = special_file(rng, path)
    else:
        kind = "the folder: " + rng.choice(["a file", "a dangling link", "a link to itself", "a pipe"])
        shutil.rmtree(cache)
        if kind.endswith("file"):
            cache.write_text("in the way")
        elif kind.endswith("pipe"):
            os.mkfifo(cache)
        else:
            cache.symlink_to("absent/deeper" if "dangling" in kind else "cache")

    def load() -> None:
        assert torch.equal(miniimagenet.load(root, "train", 8), truth)

    return Input(f"cache: {kind}", load, (root,), (cache, root / "absent"))


# ---- run folders


def log_input(rng: random.Random, around: Path) -> Input:
    """plot_nc.py on a run whose log or settings are damaged."""
    usual = {"update_step_test": 10, "first_order": False, "net": "paper"}
    run = write_run(around / "run", **usual)
    arguments = [str(run), "-o", str(around / "out" / "figure.png")]
    if rng.random() < 0.2:
        arguments.append(str(write_run(around / "second", seed=3, **usual)))
    if rng.random() < 0.3:
        arguments += ["--figure", "accuracy"]
    kind = rng.choice(["log bytes"] * 2 + ["row"] * 4 + ["args"] * 3 + ["args bytes", "special", "order"])
    lines = [json.dumps(row) for row in rows()]
    if kind == "log bytes":
        recipe = damage_file(rng, run / "log.jsonl")
    elif kind == "row":
        place = rng.randrange(len(lines))
        lines[place], recipe = mutated_json(rng, rows()[place])
        recipe = f"line {place + 1}: {recipe}"
        (run / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    elif kind == "order":
        recipe = rng.choice(["shuffled", "joined", "twice", "one", "blank lines", "gzip in name alone", "UTF-16", "CR"])
        rng.shuffle(lines)
        text = {"joined": "".join, "blank lines": "\n\n \n".join, "CR": "\r".join}.get(recipe, "\n".join)(
            lines * 2 if recipe == "twice" else lines[:1] if recipe == "one" else lines)
        (run / "log.jsonl").write_bytes(text.encode("utf-16" if recipe == "UTF-16" else "utf-8"))
        if recipe == "gzip in name alone":
            (run / "log.jsonl").rename(run / "log.jsonl.gz")
    elif kind == "args":
        text, recipe = mutated_json(rng, json.loads((run / "args.json").read_text()))
        (run / "args.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    elif kind == "args bytes":
        recipe = damage_file(rng, run / "args.json")
    else:
        recipe = special_file(rng, run / rng.choice(["log.jsonl", "args.json"]))
    call = functools.partial(plot_nc.main, arguments)
    return Input(f"{kind}: {recipe}", call, (around / "out",), (around / "out",), tuple(arguments))


TINY = ("--synthetic --device cpu --n_way 2 --k_qry 1 --task_num 1 --epoch 1 --update_step 1 --update_step_test 1 "
        "--eval_tasks 2 --test_tasks 2 --nc_every 0").split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of omniglot_train.py on few synthetic characters."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        few_characters(patch)
        patch.setattr(sys, "stdout", io.StringIO())
        omniglot_train.main([*TINY, "--out", str(run)])
    return run


def few_characters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(synthetic, "CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 2), "test": (6, 2)})
    patch.setattr(synthetic, "CHARACTER_IMAGES", 3)


class Code:
    """Unpickled, it would leave a file in the folder above the working one."""

    def __reduce__(self):
        return os.mkdir, ("../run-by-a-pickle",)


def damage_weights(rng: random.Random, path: Path) -> str:
    """Make best.pt or checkpoint.pt another file: damaged, with another content, of other code, or code itself."""
    kind = rng.choice(["damaged"] * 3 + ["content"] * 5 + ["pickle", "special", "foreign"])
    if kind == "special":
        return special_file(rng, path)
    if kind == "damaged":
        kind = damage_file(rng, path)
    elif kind == "foreign":
        pickled, empty_zip = b"\x80\x02}q\x00.", b"PK\5\6" + bytes(18)
        path.write_bytes(rng.choice([pictures()["PNG"], b"hello", pickled, pickled[:2], empty_zip]))
    elif kind == "pickle":
        torch.save(rng.choice([Code(), [Code()], {"weights": Code(), "step": 0, "val_accuracy": 0.5}]), path,
                   _use_new_zipfile_serialization=rng.random() < 0.5)
    else:
        held = torch.load(path, weights_only=True)
        parent, key, place = fuzzing.part_of(rng, held)
        if rng.random() < 0.2:
            del parent[key]
            kind = f"without {place}"
        else:
            parent[key] = value = rng.choice(CONTENTS)
            kind = f"{place} is {' '.join(str(value).split())[:60]}"
        torch.save(held, path)
    return f"{path.name}: {kind}"


CONTENTS = [
    None, True, -1, 0, 1, 10**9, 10**400, 0.5, float("nan"), float("inf"), "x", "\udcff", b"\0", [], {}, (1,), {"a": 1},
    torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.full((64, 1, 3, 3), float("inf")),
    torch.zeros(64, dtype=torch.complex64), torch.zeros(1).expand(64), torch.zeros(16, dtype=torch.uint8),
    torch.zeros(5056, dtype=torch.uint8), {"weights": {}, "step": 0, "val_accuracy": 0.5}, {"a": torch.ones(1)},
]


def rerun_input(finished: Path, rng: random.Random, around: Path) -> Input:
    """--test on a run whose settings or weights are damaged."""
    return again(rng, around, finished, ["--test", str(around / "run")], "best.pt")


def resume_input(finished: Path, rng: random.Random, around: Path) -> Input:
    """--resume, for one step more, on a run whose settings, log or checkpoint are damaged."""
    return again(rng, around, finished, ["--resume", str(around / "run"), "--epoch", "2"], "checkpoint.pt")


def from_args_input(finished: Path, rng: random.Random, around: Path) -> Input:
    """--from_args with a damaged args.json: what it would repeat is started, small or not."""
    return again(rng, around, finished, ["--from_args", str(around / "run" / "args.json")], "args.json")


def again(rng: random.Random, around: Path, finished: Path, arguments: list[str], weights: str) -> Input:
    run = around / "run"
    shutil.copytree(finished, run)
    settings, log = run / "args.json", run / "log.jsonl"
    kind = rng.choice(["weights"] * 5 + ["settings"] * 3 + ["settings bytes", "log", "special"])
    if kind == "weights" and weights != settings.name:
        recipe = damage_weights(rng, run / weights)
    elif kind == "special":
        recipe = special_file(rng, rng.choice(sorted(run.iterdir())))
    elif kind in ("settings bytes", "log"):
        path = log if kind == "log" else settings
        recipe = f"{path.name}: {damage_file(rng, path)}"
    else:
        recorded = json.loads(settings.read_text())
        text, recipe = mutated_json(rng, {"settings": recorded["settings"]} if rng.random() < 0.8 else recorded)
        recipe = f"args.json: {recipe}"
        settings.write_text(text, encoding="utf-8")
    return Input(recipe, functools.partial(omniglot_train.main, arguments), (around,), (run,), tuple(arguments))


def train_input(rng: random.Random, around: Path) -> Input:
    """A training of one or two steps, to its end, with settings that are odd and not large."""
    (around / "file").write_text("in the way")
    (around / "loop").symlink_to("loop")
    out = around / "out"
    places = [out, out / "é \u4e2d \udcff \n" / "deeper", out / ("x" * 300), ".", around / "file",
              around / "file" / "below", around / "loop"]
    arguments = [*TINY, "--out", str(rng.choice(places))]
    for flag in rng.sample(list(ODD), rng.choice([0, 1, 1, 2, 3])):
        arguments += [flag, rng.choice(ODD[flag])]
    call = functools.partial(omniglot_train.main, arguments)
    return Input(repr(arguments), call, (around,), (out, around / "cwd"), tuple(arguments))


ODD = {
    "--seed": ["0", "2147483647"], "--meta_lr": ["1e308", "5e-324", "1"], "--update_lr": ["1e308", "1e-320", "1e30"],
    "--clip": ["1e-300", "1e308"], "--nc_every": ["1", "2147483647"], "--precision": ["tf32"],
    "--net": ["original"], "--task_chunk": ["1", "2147483647"], "--save_every": ["1", "2147483647"], "--n_way": ["3"],
    "--k_spt": ["2"], "--epoch": ["2"], "--eval_every": ["1"], "--cache": ["\udcff", "/dev/null"],
    "--root": ["", "absent"], "--update_step": ["3"], "--imgsz": ["29", "64"],
}


# ---- argument lists

VALUES = [
    "", " ", "0", "-1", "1", "2", "3", "5", "28", "84", "100000", "2147483647", "2147483648", "9" * 30, "9" * 5000,
    "1.5", "nan", "inf", "-inf", "1e400", "1e308", "1e-320", "-1e-400", "0.01", "-0.0", "1e3", "0x10", "1_000",
    "１２", "½", "é", "\udcff", "a\0b", "a\nb", "\x1b[31m", "\u202e", "--", "-", "@file", "%s", "{}", "$x^$", "true",
    "None", "x" * 300,
    "cpu", "cpu:7", "cuda", "cuda:-1", "meta", "meta:0", "mps", "xla", "paper", "original", "float64",
    "RUN", "RUN/args.json", "../data", "/dev/null", "/proc/self",
]


@functools.cache
def flags_of(program: Callable) -> tuple[str, ...]:
    """What --help tells."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        program(["--help"])
    words = {word.strip("[],") for word in said.getvalue().split()}
    return tuple(sorted(word for word in words if word.startswith("-") and word.strip("-")))


def arguments_input(finished: Path, rng: random.Random, around: Path) -> Input:
    program = rng.choice([omniglot_train, miniimagenet_train, plot_nc]).main
    # plot_nc.py without a RUN rewrites the README's figures, and where -o comes twice the last one holds
    first, last = ([str(finished)], ["-o", str(around / "out.png")]) if program == plot_nc.main else (
        ["--synthetic", "--device", "cpu"] * (rng.random() < 0.9), [])
    chosen = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 8])):
        flag, value = rng.choice(flags_of(program)), rng.choice(VALUES).replace("RUN", str(finished))
        chosen += rng.choice([[flag, value]] * 3 + [[f"{flag}={value}"], [flag], [value], [flag + value]])
    chosen = [*first, *chosen, *last]
    return Input(repr(chosen), functools.partial(program, chosen), (around,), (around / "out.png",), tuple(chosen))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tasks this small take several times as long where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data sets, and no network."""
    monkeypatch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
    monkeypatch.setattr(omniglot, "DRAWINGS", 2)
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:1")
    few_characters(monkeypatch)


@pytest.fixture
def before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't refused by then ends, in success, where the network is handed to MAML: it might train for days."""
    monkeypatch.setattr(Meta, "__init__", lambda *_, **__: sys.exit(0))


def not_drawn(patch: pytest.MonkeyPatch) -> None:
    """A figure is built from the log and its picture, half a second each, of one input in twenty and small."""
    savefig, count = Figure.savefig, itertools.count()

    def save(figure: Figure, file: BinaryIO, **options) -> None:
        if next(count) % 20 == 0:
            savefig(figure, file, **options | {"dpi": 10})

    patch.setattr(Figure, "savefig", save)


# ---- processes


def program(module: str, arguments: tuple[str, ...], said: Path) -> None:
    """In a process of its own, what the shell starts: real streams, a real exit status."""
    streams = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(streams, 2)
    torch.set_num_threads(1)
    few_characters(pytest.MonkeyPatch())
    with fuzzing.memory_limit():
        files.run(functools.partial(importlib.import_module(module).main, arguments))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has torch loaded already, for that takes seconds."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # older Pythons preload from nowhere else
        multiprocessing.forkserver.ensure_running()
    return server


def attempt_in_a_process(processes: multiprocessing.context.BaseContext, given: Input, around: Path) -> str:
    said = around.with_name(f"{around.name}.stderr")
    before = fuzzing.snapshot(around, given.results)
    process = processes.Process(target=program, args=(given.call.func.__module__, given.arguments, said))
    process.start()
    process.join(fuzzing.SECONDS)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"a hang: more than {fuzzing.SECONDS:g} seconds")
    fuzzing.judge(process.exitcode, said.read_text(), given)
    assert fuzzing.snapshot(around, given.results) == before, "what lay there changed, or something was left"
    return "refused" if process.exitcode else "accepted"


# ---- the tests


@pytest.mark.parametrize("make", [csv_input, image_input, zip_input])
def test_fuzz_data(make, tmp_path):
    feed(make.__name__.removesuffix("_input"), make, tmp_path)


def test_fuzz_cache(cached, tmp_path):
    feed("cache", functools.partial(cache_input, cached), tmp_path)


def test_fuzz_log(tmp_path, monkeypatch):
    not_drawn(monkeypatch)
    feed("log", log_input, tmp_path)


@pytest.mark.parametrize("kind, make", [("test", rerun_input), ("resume", resume_input)])
def test_fuzz_runs(kind, make, finished, tmp_path):
    feed(kind, functools.partial(make, finished), tmp_path)


def test_fuzz_from_args(finished, tmp_path, before_training):
    feed("from_args", functools.partial(from_args_input, finished), tmp_path)


def test_fuzz_arguments(finished, tmp_path, monkeypatch, before_training):
    not_drawn(monkeypatch)
    feed("arguments", functools.partial(arguments_input, finished), tmp_path)


def test_fuzz_processes(finished, processes, tmp_path):
    again = [functools.partial(make, finished) for make in (rerun_input, resume_input)]

    def make(rng: random.Random, around: Path) -> Input:
        return rng.choice([log_input, train_input, *again])(rng, around)

    feed("process", make, tmp_path, functools.partial(attempt_in_a_process, processes))


def test_inputs_are_many():
    if fuzzing.ONLY or FED.keys() != SHARES.keys():
        pytest.skip("not all kinds ran")
    print(f"{FED.total():,} inputs")
    assert FED.total() >= min(2000, 0.9 * fuzzing.INPUTS)


# ---- the harness itself


def fault_outside(around: Path) -> None:
    with tempfile.TemporaryDirectory(dir=around.parent):  # gone again before anyone looks
        pass


def caught(_: Path) -> None:
    try:
        time.sleep(60)
    except Exception as error:
        raise files.UserError("a clear line, after a minute") from error


FAULTS = {  # what a program may do wrong, and what the judgement says of it
    "traceback": (lambda _: 1 // 0, "ZeroDivisionError"),
    "hang": (lambda _: time.sleep(60), "a hang"),
    "hang that ends as an error": (caught, "a hang"),
    "hang in a thread": (lambda _: images.decode_all([[slow_file()]], "", 1, 1, Image.Resampling.BOX), "a hang"),
    "status": (lambda _: sys.exit(1), "status 1"),
    "no line": (lambda _: sys.exit(2), "^$"),
    "two lines": (lambda _: print("a warning", file=sys.stderr) or files.run(refuse), "a warning"),
    "no clear line": (lambda _: refuse(""), "error:"),
    "a page": (lambda _: print("error: " + "x" * 5000, file=sys.stderr) or sys.exit(2), "xxx"),
    "characters that no terminal shows": (lambda _: print("\ud800"), "UnicodeEncodeError"),
    "memory": (lambda _: np.ones(2 * fuzzing.MEMORY, np.uint8), "Unable to allocate"),
    "left behind": (lambda _: Path("left").write_text("x"), "was left"),
    "changed": (lambda around: (around / "data").write_text("other"), "changed"),
    "removed": (lambda around: (around / "data").unlink(), "changed"),
    "outside": (fault_outside, "written outside"),
}


def slow_file() -> images.ImageFile:
    return images.ImageFile("", 0, 0, "", lambda: time.sleep(1.5))


def refuse(line: str = "a clear line that says what is wrong") -> None:
    raise files.UserError(line)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judgement_sees(fault, tmp_path, monkeypatch):
    call, words = FAULTS[fault]
    monkeypatch.setattr(fuzzing, "SECONDS", 0.3)
    around = tmp_path / "around"
    (around / "cwd").mkdir(parents=True)
    (around / "data").write_text("x")
    monkeypatch.chdir(around / "cwd")
    given = Input(fault, functools.partial(call, around), (around,), (around / "results",))
    with pytest.raises(AssertionError, match=words), fuzzing.memory_limit():
        fuzzing.attempt(given, around)


def test_what_is_right_is_judged_right(tmp_path):
    for call, outcome in ((refuse, "refused"), (lambda: (tmp_path / "out").write_text("x"), "accepted")):
        assert fuzzing.attempt(Input("", call, (tmp_path,), (tmp_path / "out",)), tmp_path) == outcome


def test_an_input_is_the_same_again(tmp_path):
    for make in (csv_input, image_input, zip_input, log_input):
        folders = tmp_path / make.__name__ / "a", tmp_path / make.__name__ / "b"
        given = [make(fuzzing.random_of("kind", 5), folder) for folder in folders]
        assert given[0].recipe == given[1].recipe
        contents = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                    for folder in folders]
        assert make is log_input or contents[0] == contents[1]  # a run's settings hold its path
