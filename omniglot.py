"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al., Science 2015).

`find` looks for images_background and images_evaluation, folders or zip files, in the data folder and up to two
folders below it. A zip file is read without unpacking it. What is absent is downloaded.
"""

import contextlib
import functools
import io
import os
import random
import shutil
import socket
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

import images
from files import UserError, locked, one_line, reading
from images import ImageFile, ImageSet

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
PARTS = {  # and the md5 sum of the official zip
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
SPLITS = {"train": 1100, "val": 100, "test": 423}  # characters
VINYALS = {"train": 1028, "val": 172, "test": 423}  # the same, with --split vinyals
VINYALS_VAL = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")  # its validation alphabets
DRAWINGS = 20  # of each character
SPLIT_SEED = 2015  # of the shuffle before the cut; its own: --seed never moves a class to another split
TIMEOUT = 30.0  # seconds without a byte, after which a download is given up

CHANNELS = 1
MEAN, STD = (0.0,), (1.0,)  # scaled to 0..1 and no more, as the original does
RESAMPLE = Image.Resampling.BICUBIC


def load(root: str | Path, split: str, imgsz: int, cache: str | Path | None = None) -> torch.Tensor:
    """The characters of one split: uint8 [class, 20, 1, imgsz, imgsz], paper 255, ink 0. Errors as `find`."""
    images.check_request(split, imgsz)
    return find(root, cache).load(split, imgsz, CHANNELS)


def find(root: str | Path, cache: str | Path | None = None, split: str = "shuffled") -> ImageSet:
    """All drawings, found in `root` or downloaded into it.

    Which character is in which split depends on the characters' names alone.

    Args:
        root: the folder with images_background and images_evaluation.
        cache: folder of the decoded images; `<root>/cache` if None.
        split: shuffled or vinyals, see `split_names`.
    Raises:
        UserError: no data and no download; a character or a drawing too many or too few; a file that can't be read.
    """
    root = Path(root)
    found = _candidates(root)
    absent = [part for part in PARTS if part not in found]
    if absent:
        _download(root, absent, found)
        found = _candidates(root)
    chosen, characters = [], {}
    for part in PARTS:  # a half-unpacked folder loses to the whole zip file next to it
        drawings = {path: _unpacked(path) if path.name == part else _zipped(path) for path in found[part]}
        chosen.append(max(drawings, key=lambda path: len(drawings[path])))
        for name, file in drawings[chosen[-1]]:
            characters.setdefault(name, []).append(file)
    _check_counts(characters, chosen, root)
    names = split_names(characters, split)
    return ImageSet(
        "omniglot", f"{split} split, from {' and '.join(os.path.relpath(path, root) for path in chosen)}",
        {part: {name: sorted(characters[name], key=lambda file: file.name) for name in names[part]} for part in names},
        RESAMPLE, Path(cache) if cache else root / "cache", _where(root))


def split_names(names: Iterable[str], split: str = "shuffled") -> dict[str, list[str]]:
    """Character names, `part/alphabet/character` in any order -> the names in each split, always the same.

    shuffled: a fixed shuffle of all names, cut into 1,100, 100 and 423. vinyals: the alphabets of Vinyals et al.
    (2016), as in the lists of prototypical networks and Torchmeta: validation has five alphabets of images_background,
    test the last 423 characters by name, from the 42nd of Gurmukhi on.
    """
    names = sorted(names)
    if split == "vinyals":
        val = [name for name in names if name.split("/")[1] in VINYALS_VAL]
        train = [name for name in names[:-VINYALS["test"]] if name not in val]
        return {"train": train, "val": val, "test": names[-VINYALS["test"]:]}
    random.Random(SPLIT_SEED).shuffle(names)
    splits, start = {}, 0
    for split, count in SPLITS.items():
        splits[split] = names[start:start + count]
        start += count
    return splits


def _candidates(root: Path) -> dict[str, list[Path]]:
    """Where each part lies, a folder or a zip file: in `root` or up to two folders below it, nearest first."""
    found: dict[str, list[Path]] = {}
    level = [root] if os.path.isdir(root) else []
    for _ in range(3):
        below = []
        for folder in level:
            for entry in images.entries(folder):
                part, extension = os.path.splitext(entry.name)
                if entry.name in PARTS and os.path.isdir(entry.path) or part in PARTS and extension.lower() == ".zip":
                    found.setdefault(part, []).append(Path(entry.path))
                elif os.path.isdir(entry.path) and not os.path.islink(entry.path):
                    below.append(Path(entry.path))
        level = below
    return found


def _unpacked(folder: Path) -> list[tuple[str, ImageFile]]:
    """(character, drawing) of `<part>/<alphabet>/<character>/*.png`; the part's folder may hold itself once more."""
    drawings = []
    if os.path.isdir(folder / folder.name):
        folder = folder / folder.name
    for alphabet in images.subfolders(folder):
        for character in images.subfolders(alphabet.path):
            name = f"{folder.name}/{alphabet.name}/{character.name}"
            drawings += [(name, images.image_file(entry, f"{name}/{entry.name}"))
                         for entry in images.entries(character.path) if entry.name.lower().endswith(".png")]
    return drawings


def _zipped(path: Path) -> list[tuple[str, ImageFile]]:
    """(character, drawing) of `.../<part>/<alphabet>/<character>/*.png` in a zip file, which stays open."""
    drawings = []
    if not os.path.isfile(path):  # a pipe would be waited on for ever, a device be read without end
        raise UserError(f"{path} is not a file; {_where(path.parent)}")
    with reading(path, _where(path.parent), "is no whole zip file"):
        archive = zipfile.ZipFile(path)
        for entry in archive.infolist():
            steps = entry.filename.replace("\\", "/").split("/")
            if steps[-4:-3] == [path.stem] and steps[-1].lower().endswith(".png") and not steps[-1].startswith("."):
                read = functools.partial(_read_entry, archive, entry)
                file = ImageFile("/".join(steps[-4:]), entry.file_size, entry.CRC, f"{path}/{entry.filename}", read)
                drawings.append(("/".join(steps[-4:-1]), file))
    return drawings


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Never more than the size that the entry states; zipfile unpacks other methods whole and cuts afterwards."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compressed by method {entry.compress_type}, only 0 and 8 are read")
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def _check_counts(characters: dict[str, list[ImageFile]], chosen: list[Path], root: Path) -> None:
    wanted = sum(SPLITS.values())
    if len(characters) != wanted:
        there = ", ".join(_described(path, characters) for path in chosen)
        raise UserError(f"{root} holds {len(characters):,} characters ({there}) where Omniglot has {wanted:,}; "
                        f"{_where(root)}")
    for name, files in sorted(characters.items()):
        count = len({file.name for file in files})  # a zip may hold a name twice
        if count != DRAWINGS or count != len(files):
            raise UserError(f"{root} holds {len(files)} drawings of {name} where Omniglot has {DRAWINGS}; "
                            f"{_where(root)}")


def _described(path: Path, characters: dict[str, list[ImageFile]]) -> str:
    """How much of a part there is, and where nothing is, which files there are instead."""
    count = sum(name.startswith(path.stem) for name in characters)
    if count or path.is_file():
        return f"{count:,} in {path.name}"
    others = Counter(os.path.splitext(name)[1] for _, _, names in os.walk(path) for name in names)
    return f"none in {path.name}, whose files are {', '.join(f'{n:,} {end}' for end, n in others.items()) or 'absent'}"


def _where(root: Path, parts: Iterable[str] = PARTS) -> str:
    zips = " and ".join(f"{part}.zip" for part in parts)
    return f"put {zips} from {URL} into {root}, or use --synthetic, which needs no data"


def _download(root: Path, absent: list[str], found: dict[str, list[Path]]) -> None:
    """Fetch the zips that are not there: into a folder of their own, checked, then renamed.

    An interrupted download therefore never passes for a whole one, and its rest is removed by the next.
    """
    from torchvision.datasets.utils import download_url  # as slow to import as torch, and needed once

    made, timeout = not os.path.exists(root), socket.getdefaulttimeout()
    try:
        with locked(root / ".download.lock", remedy="name another folder with --root FOLDER") as alone:
            for rest in root.glob(".download-*.tmp") if alone else ():
                shutil.rmtree(rest, ignore_errors=True)
            socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait for ever
            with tempfile.TemporaryDirectory(prefix=".download-", suffix=".tmp", dir=root) as folder:
                for part in absent:
                    if os.path.exists(root / f"{part}.zip"):  # another process has fetched it meanwhile
                        continue
                    print(f"downloading {URL}/{part}.zip", file=sys.stderr, flush=True)
                    with contextlib.ExitStack() as quiet:  # torchvision's lines and, off a terminal, its bar
                        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                        if not sys.stderr.isatty():
                            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
                        download_url(f"{URL}/{part}.zip", folder, md5=PARTS[part])
                    os.replace(Path(folder) / f"{part}.zip", root / f"{part}.zip")
    except Exception as error:  # URLError, a timeout, HTTPException, RuntimeError: wrong md5, a full disk
        if isinstance(error, UserError):
            raise
        reason = one_line(str(error)).strip("<>") or type(error).__name__
        if type(error) is RuntimeError:
            reason = "what came is cut or not the official file: its md5 is wrong"
        there = "; ".join(f"{part} is there" for part in found)
        raise UserError(f"{' and '.join(absent)} of Omniglot: absent from {root}{there and f' ({there})'}, and can't "
                        f"be downloaded ({reason}); {_where(root, absent)}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
