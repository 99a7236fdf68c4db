"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al., Science 2015).

`find` looks for images_background and images_evaluation, folders or zip files, in the data folder and up to two
folders below it. A zip file is read without unpacking it. What is absent is downloaded.
"""

import functools
import itertools
import os
import random
import socket
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

import images
from files import UserError, locked, reading
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
    absent = [part for part in PARTS if not _candidates(root, part)]
    if absent:
        _download(root, absent)
    chosen, characters = [], {}
    for part in PARTS:  # a half-unpacked folder loses to the whole zip file next to it
        drawings = {path: _drawings(path) for path in _candidates(root, part)}
        chosen.append(max(drawings, key=lambda path: sum(map(len, drawings[path].values()))))
        characters |= drawings[chosen[-1]]
    _check_counts(characters, chosen, root)
    names = split_names(characters, split)
    return ImageSet(
        "omniglot", f"{split} split, from {' and '.join(os.path.relpath(path, root) for path in chosen)}",
        {part: {name: characters[name] for name in names[part]} for part in names},
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
    remaining = iter(names)
    return {split: list(itertools.islice(remaining, count)) for split, count in SPLITS.items()}


def _candidates(root: Path, part: str) -> list[Path]:
    """Where a part lies, as a folder or a zip file: in `root` or up to two folders below it, nearest first."""
    return [path for depth in ("", "*/", "*/*/") for name in (part, f"{part}.zip")
            for path in sorted(root.glob(depth + name))]


def _drawings(path: Path) -> dict[str, list[ImageFile]]:
    """The drawings of each character, `<part>/<alphabet>/<character>/*.png`, in a folder or in a zip file, which stays
    open; a zip file may have other folders around them.
    """
    if path.suffix == ".zip":
        with reading(path, _where(path.parent), "is no whole zip file"):
            archive = zipfile.ZipFile(path)
            files = [ImageFile("/".join(entry.filename.split("/")[-4:]), entry.file_size, entry.CRC,
                               f"{path}/{entry.filename}", functools.partial(archive.read, entry))
                     for entry in archive.infolist()]
    else:
        files = [images.image_file(file, file.relative_to(path.parent).as_posix()) for file in path.glob("*/*/*.png")]
    characters = {}
    for file in sorted(files, key=lambda file: file.name):
        part, *_, name = file.name.split("/")
        if part == path.stem and file.name.count("/") == 3 and name.endswith(".png") and not name.startswith("."):
            characters.setdefault(os.path.dirname(file.name), []).append(file)
    return characters


def _check_counts(characters: dict[str, list[ImageFile]], chosen: list[Path], root: Path) -> None:
    wanted = sum(SPLITS.values())
    if len(characters) != wanted:
        there = ", ".join(_described(path, characters) for path in chosen)
        raise UserError(f"{root} holds {len(characters):,} characters ({there}) where Omniglot has {wanted:,}; "
                        f"{_where(root)}")
    for name, files in sorted(characters.items()):
        if len(files) != DRAWINGS:
            raise UserError(f"{root} holds {len(files)} drawings of {name} where Omniglot has {DRAWINGS}; "
                            f"{_where(root)}")


def _described(path: Path, characters: dict[str, list[ImageFile]]) -> str:
    """How much of a part there is, and where nothing is, which files there are instead."""
    if count := sum(name.startswith(path.stem) for name in characters):
        return f"{count:,} in {path.name}"
    others = Counter(file.suffix for file in path.rglob("*") if file.is_file())
    return f"none in {path.name}, whose files are {', '.join(f'{n:,} {end}' for end, n in others.items()) or 'absent'}"


def _where(root: Path, parts: Iterable[str] = PARTS) -> str:
    zips = " and ".join(f"{part}.zip" for part in parts)
    return f"put {zips} from {URL} into {root}, or use --synthetic, which needs no data"


def _download(root: Path, absent: list[str]) -> None:
    """Fetch the zips that are not there: under a temporary name, checked, then renamed."""
    from torchvision.datasets.utils import download_url  # as slow to import as torch, and needed once

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait for ever
    try:
        with locked(root / ".download.lock", remedy="name another folder with --root FOLDER"):
            for part in absent:
                path, temporary = root / f"{part}.zip", root / f".{part}.zip.tmp"
                if path.exists():  # another process has fetched it meanwhile
                    continue
                print(f"downloading {URL}/{path.name}", file=sys.stderr, flush=True)
                try:
                    download_url(f"{URL}/{path.name}", root, temporary.name, PARTS[part])
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
    except UserError:
        raise
    except Exception as error:  # URLError, a timeout, HTTPException, RuntimeError: wrong md5, a full disk
        there = "".join(f" ({part} is there)" for part in PARTS if part not in absent)
        raise UserError(f"{' and '.join(absent)} of Omniglot: absent from {root}{there}, and can't be downloaded "
                        f"({str(error) or type(error).__name__}); {_where(root, absent)}") from error
    finally:
        socket.setdefaulttimeout(timeout)
