"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al., Science 2015).

`load` reads the data folder as it is: `images_background` and
`images_evaluation`, each a folder or a zip file, which is read without
unpacking it; what is absent is downloaded.
"""

import contextlib
import functools
import io
import os
import random
import socket
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Iterable

import torch
from PIL import Image

import images
from files import UserError, locked, one_line
from images import ImageFile

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
PARTS = {  # and the md5 sum of the official zip
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
SPLITS = {"train": 1100, "val": 100, "test": 423}  # characters
DRAWINGS = 20  # of each character
SPLIT_SEED = 2015  # of the shuffle before the cut; its own: --seed never moves a class to another split
TIMEOUT = 30.0  # seconds without a byte, after which a download is given up

CHANNELS = 1
MEAN, STD = (0.0,), (1.0,)  # scaled to 0..1 and no more, as the original does


def load(root: str | Path, split: str, imgsz: int, cache: str | Path | None = None) -> torch.Tensor:
    """The characters of one split, downloaded when absent, decoded once.

    Which character is in which split depends on the characters' names alone.

    Args:
        root: the folder with images_background and images_evaluation, as folders or as zip files.
        split: train, val or test.
        imgsz: drawings are resized to this square, bicubic.
        cache: folder of the decoded images; `<root>/cache` when None.

    Returns:
        uint8 [class, 20, 1, imgsz, imgsz], paper 255, ink 0.

    Raises:
        UserError: no data and no download, a character or a drawing too many or
            too few, a file that can't be read or decoded, or a cache folder that can't be written.
    """
    root = Path(root)
    images.check_request(split, imgsz)
    _download_absent(root)
    with contextlib.ExitStack() as stack:
        characters: dict[str, list[ImageFile]] = {}
        for part in PARTS:
            unpacked = os.path.isdir(root / part)
            found = _folder(root, part) if unpacked else _zip(root / f"{part}.zip", part, stack)
            for file in found:
                characters.setdefault(file.name.rpartition("/")[0], []).append(file)
        _check_counts(characters, root)
        classes = [sorted(characters[name], key=_name) for name in split_names(characters)[split]]
        return images.load(
            classes, dataset="omniglot", split=split, channels=CHANNELS, imgsz=imgsz,
            resample=Image.Resampling.BICUBIC, cache=Path(cache) if cache else root / "cache",
        )


def split_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Character names, in any order -> the names in each split, always the same."""
    shuffled = sorted(names)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    splits, start = {}, 0
    for split, count in SPLITS.items():
        splits[split] = shuffled[start:start + count]
        start += count
    return splits


def _folder(root: Path, part: str) -> list[ImageFile]:
    """The drawings in `<root>/<part>/<alphabet>/<character>/*.png`."""
    files = []
    for alphabet in _subfolders(root / part):
        for character in _subfolders(alphabet):
            name = f"{part}/{alphabet.name}/{character.name}"
            for file, entry in images.folder_files(character).items():
                if _is_png(file):
                    files.append(images.image_file(entry, f"{name}/{file}"))
    return files


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in images.folder_files(folder).values() if os.path.isdir(entry.path)]


def _zip(path: Path, part: str, stack: contextlib.ExitStack) -> list[ImageFile]:
    """The drawings `<part>/<alphabet>/<character>/*.png` in a zip file, open until `stack` closes."""
    if not os.path.isfile(path):  # a pipe would be waited on for ever, a device be read without end
        raise UserError(f"{path} is not a file; {_where(path.parent)}")
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}; {_where(path.parent)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged directory makes zipfile raise nearly anything
        raise UserError(f"{path} is no whole zip file ({error}); {_where(path.parent)}") from error
    files = []
    for entry in archive.infolist():
        steps = entry.filename.replace("\\", "/").split("/")
        if ".." in steps or steps[0] == "" or ":" in steps[0]:
            raise UserError(f"{path} holds {entry.filename!r}, which leads outside; {_where(path.parent)}")
        if len(steps) == 4 and steps[0] == part and _is_png(steps[3]):
            shown, read = f"{path}/{entry.filename}", functools.partial(_read_entry, archive, entry)
            files.append(ImageFile("/".join(steps), entry.file_size, entry.CRC, shown, read))
    return files


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Never more than the size that the entry states: `archive.read` unpacks first and cuts afterwards."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compressed by method {entry.compress_type}, only 0 and 8 are read")
    with archive.open(entry) as file:
        return file.read(entry.file_size)


def _name(file: ImageFile) -> str:
    return file.name


def _is_png(name: str) -> bool:
    return name.lower().endswith(".png") and not name.startswith(".")


def _check_counts(characters: dict[str, list[ImageFile]], root: Path) -> None:
    wanted = sum(SPLITS.values())
    if len(characters) != wanted:
        parts = (f"{sum(name.startswith(part) for name in characters):,} in {part}" for part in PARTS)
        raise UserError(f"{root} holds {len(characters):,} characters ({', '.join(parts)}) "
                        f"where Omniglot has {wanted:,}; {_where(root)}")
    for name, files in sorted(characters.items()):
        count = len(set(map(_name, files)))  # a zip may hold a name twice
        if count != DRAWINGS or count != len(files):
            raise UserError(f"{root} holds {len(files)} drawings of {name} where Omniglot has {DRAWINGS}; "
                            f"{_where(root)}")


def _where(root: Path) -> str:
    zips = " and ".join(f"{part}.zip" for part in PARTS)
    return f"put {zips} from {URL} into {root}, or use --synthetic, which needs no data"


# The download


def _absent(root: Path) -> list[str]:
    return [part for part in PARTS if not any(map(os.path.exists, (root / part, root / f"{part}.zip")))]


def _download_absent(root: Path) -> None:
    """Fetch the zips that are not there: into a folder of their own, checked, then renamed.

    An interrupted download therefore never passes for a whole one, and its rest is removed by the next.
    """
    if not _absent(root):
        return
    made = not os.path.exists(root)
    try:
        with locked(root / ".download.lock", remedy="name another folder with --root FOLDER") as alone:
            if alone:
                for rest in root.glob(".download-*.tmp"):
                    _remove(rest)
            _download(root, _absent(root))  # asked again: another process may have fetched them
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise


def _download(root: Path, parts: list[str]) -> None:
    from torchvision.datasets.utils import download_url  # as slow to import as torch, and needed once

    terminal = sys.stderr.isatty()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait for ever
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", suffix=".tmp", dir=root) as folder:
            for part in parts:
                print(f"downloading {URL}/{part}.zip", file=sys.stderr, flush=True)
                with contextlib.ExitStack() as quiet:  # torchvision's lines and, off a terminal, its bar
                    quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    if not terminal:
                        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
                    download_url(f"{URL}/{part}.zip", folder, md5=PARTS[part])
            for part in parts:
                os.replace(Path(folder) / f"{part}.zip", root / f"{part}.zip")
    except Exception as error:  # URLError, a timeout, HTTPException, RuntimeError: wrong md5, a full disk
        reason = one_line(str(error)).strip("<>") or type(error).__name__
        if type(error) is RuntimeError:
            reason = "what came is cut or not the official file: its md5 is wrong"
        raise UserError(f"can't download Omniglot, absent from {root} ({reason}); {_where(root)}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
