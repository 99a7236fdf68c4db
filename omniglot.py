"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al., Science 2015).

`find` looks for images_background and images_evaluation, folders or zip files, in the data folder and up to two
folders below it, or for one folder there with all alphabets. A zip file is read without unpacking it. A missing part is
downloaded.
"""

import contextlib
import functools
import itertools
import os
import random
import re
import socket
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

import folders
import images
from files import UserError, listed, note, reading
from images import ImageFile, ImageSet

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
PARTS = {  # and the md5 sum of the official zip
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
EVALUATION = {  # the alphabets of images_evaluation
    "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez", "Glagolitic", "Gurmukhi", "Kannada",
    "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti",
    "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG"}
SPLITS = {"train": 1100, "val": 100, "test": 423}  # characters
VINYALS = {"train": 1028, "val": 172, "test": 423}  # characters, with --split vinyals
VINYALS_VAL = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")  # its validation alphabets
DRAWINGS = 20  # of each character
SPLIT_SEED = 2015  # of the shuffle before the cut; fixed, so that --seed never moves a class to another split
TIMEOUT = 30.0  # seconds without a byte, after which a download fails

CHANNELS = 1
MEAN, STD = (0.0,), (1.0,)  # scaled to 0..1 only, as in the original
RESAMPLE = Image.Resampling.BICUBIC


def find(root: str | Path, cache: str | Path | None = None, split: str = "shuffled") -> ImageSet:
    """All drawings, found in `root` or downloaded into it; paper is 255, ink 0.

    Args:
        cache: folder of the decoded images; `<root>/cache` if None.
        split: shuffled or vinyals, see `split_names`.
    Raises:
        UserError: the data is absent and can't be downloaded, or isn't Omniglot; characters or drawings are missing or
            extra; a file can't be read.
    """
    root = Path(root)
    with reading(root, "name another folder with --root FOLDER"):
        with contextlib.suppress(FileNotFoundError):
            root.stat()  # glob passes over a folder that can't be read
        missing = [part for part in PARTS if not _candidates(root, part)]
    if missing:
        what = "a file" if os.path.isfile(root) else "a part of Omniglot" if root.resolve().name in PARTS else None
        if what:
            raise UserError(f"--root {root} is {what}; name the folder that it is in")
        if os.path.isdir(root) and (others := folders.own_images(root)):
            raise UserError(f"{root} has no {' and no '.join(missing)}{others}; to download Omniglot, name another "
                            "folder with --root FOLDER")
        _download(root, missing)
    drawings, chosen, characters = functools.cache(_drawings), {}, {}  # one folder may have both parts
    for part in PARTS:  # of several, the one with the most complete characters: no half-unpacked folder
        path = max(_candidates(root, part),
                   key=lambda path: sum(len(files) == DRAWINGS for files in drawings(path).values()))
        chosen[path] = len(drawings(path))
        characters |= drawings(path)
    expected = sum(SPLITS.values())
    if len(characters) != expected:
        counts = ", ".join(_described(path, count) for path, count in chosen.items())
        absent = EVALUATION - {name.split("/")[1] for name in characters}
        without = f", without {', '.join(sorted(absent))}" if 0 < len(absent) < len(EVALUATION) else ""
        raise UserError(f"{root} holds {len(characters):,} characters ({counts}{without}) where Omniglot has "
                        f"{expected:,}; {_where(root)}")
    listed([f"{len(files)} of {name}" for name, files in sorted(characters.items()) if len(files) != DRAWINGS],
           f"{root} holds other numbers of drawings than Omniglot's {DRAWINGS}", _where(root))
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
    """The zip files of a part, in `root` or up to two folders below it, nearest first; if there is none, its folders.

    If there is none either, the folders there with the alphabets of both parts.
    """
    zips, parts = ([path for depth in ("", "*/", "*/*/") for path in sorted(root.glob(depth + name))]
                   for name in (f"{part}.zip", part))
    return zips or parts or [path for path in (root, *sorted(root.glob("*")), *sorted(root.glob("*/*")))
                     if path.name not in PARTS and all((path / alphabet).is_dir() for alphabet in EVALUATION)]


def _drawings(path: Path) -> dict[str, list[ImageFile]]:
    """Character -> its drawings, <part>/<alphabet>/<character>/*.png in a folder or a zip file.

    The zip file stays open. It may have other folders around <part>. In a folder the alphabets say which part it is.
    """
    background, evaluation = PARTS
    if path.suffix == ".zip":
        with reading(path, _where(path.parent), "is not a complete zip file"):
            archive = zipfile.ZipFile(path)
            files = [ImageFile("/".join(entry.filename.replace("\\", "/").split("/")[-4:]), entry.file_size, entry.CRC,
                               f"{path}/{entry.filename}", functools.partial(archive.read, entry))
                     for entry in archive.infolist()]
    else:
        files = []
        for alphabet in images.subfolders(path):
            part = evaluation if alphabet.name in EVALUATION else background
            files += [images.image_file(file, f"{part}/{alphabet.name}/{character.name}/{file.name}")
                      for character in images.subfolders(alphabet) for file in images.entries(character)]
    drawing = re.compile(rf"({background}|{evaluation})/[^/]+/[^/]+/[^/.][^/]*(?i:\.png)")
    return images.by_class((os.path.dirname(file.name), file) for file in sorted(files, key=lambda file: file.name)
                           if drawing.fullmatch(file.name))


def _described(path: Path, count: int) -> str:
    """How many characters a folder or zip file has, and which files in it are no PNG files."""
    others = Counter(file.suffix for file in path.rglob("*") if file.is_file() and file.suffix.lower() != ".png")
    files = " and ".join(f"{number:,} {suffix}" for suffix, number in others.items())
    return f"{f'{count:,}' if count else 'none'} in {path.name}" + (f" with {files} files" if files else "")


def _where(root: Path, parts: Iterable[str] = PARTS) -> str:
    zips = " and ".join(f"{part}.zip" for part in parts)
    return (f"put {zips} from {URL} into {root.absolute()}, name their folder with --root, or train with --synthetic, "
            "which needs no data")


def _download(root: Path, missing: list[str]) -> None:
    """Fetch the zip files of missing parts: under a temporary name, then checked, then renamed."""
    from torchvision.datasets.utils import download_url  # as slow to import as torch, and needed once

    timeout, is_new = socket.getdefaulttimeout(), not root.exists()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait forever
    try:
        for part in missing:
            path, temporary = root / f"{part}.zip", root / f".{part}.zip.{os.getpid()}.tmp"
            note(f"downloading {URL}/{path.name}")
            try:
                download_url(f"{URL}/{path.name}", root, temporary.name, PARTS[part])
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except Exception as error:  # URLError, a timeout, HTTPException, RuntimeError: wrong md5, a full disk
        present = "".join(f" ({part} is there)" for part in PARTS if part not in missing)
        raise UserError(f"{' and '.join(missing)} of Omniglot: absent from {root}{present}, and can't be downloaded "
                        f"({str(error) or type(error).__name__}); {_where(root, missing)}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        if is_new and root.exists() and not any(root.iterdir()):  # perhaps a mistyped --root
            root.rmdir()
