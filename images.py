"""What both data sets share: image files in, one uint8 tensor a split out, decoded once and cached.

`load` takes the image files of a split, class by class, decodes them in
parallel threads into one array [class, image, c, s, s] and keeps it in a cache
file: the .npy format, so `numpy.load` reads it too, followed by a line that
ties it to the very files it was made from.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from files import UserError, atomic, locked, remove_stale

SPLITS = ("train", "val", "test")
FORMATS = ("JPEG", "PNG", "GIF", "BMP")  # what data sets hold: few parsers, none that starts a program
MAX_PIXELS = 64 * 2**20  # ImageNet's largest photograph has 61 million
MAX_BYTES = 256 * 2**20  # of one encoded file
LARGE = 16 * 2**20  # pixels or bytes of an image that is decoded alone: a thread for each would fill the memory
CACHE_VERSION = 1  # goes up whenever the same files would give other pixels

_alone = threading.RLock()


class ImageFile(NamedTuple):
    """One encoded image, not read yet."""

    name: str  # relative to the data folder, with '/'
    size: int  # bytes, encoded
    stamp: int  # changes with the content: the time of change in ns, or the CRC-32 that a zip holds
    path: str  # what a message calls it
    read: Callable[[], bytes]


def load(
    classes: Sequence[Sequence[ImageFile]],
    *,
    dataset: str,
    split: str,
    channels: int,
    imgsz: int,
    resample: Image.Resampling,
    cache: Path,
) -> torch.Tensor:
    """The images of one split, from the cache folder or decoded into it.

    Args:
        classes: the same number of files for each class.
        dataset: goes into the cache file's name.
        channels: 3 for RGB, 1 for greyscale.
        imgsz: images are resized to this square.
        resample: the filter of the resize.
        cache: the folder; made when absent.

    Returns:
        uint8 [class, image, channels, imgsz, imgsz]

    Raises:
        UserError: an image can't be read or decoded, the cache folder can't be
            written, or the array doesn't fit into memory.
    """
    shape = (len(classes), len(classes[0]), channels, imgsz, imgsz)
    _check_memory(shape, split)
    key = _key(classes, split, channels, imgsz, resample)
    path = Path(cache) / f"{dataset}-{split}-{imgsz}px-{key[:16]}.npy"
    remedy = "free some space, or name another folder with --cache FOLDER"
    try:
        array, _ = _read_cache(path, key, shape)
        if array is None:
            with locked(path.parent / ".cache.lock", remedy=remedy) as alone:
                array, fault = _read_cache(path, key, shape)  # again: another process may have built it
                if array is None:
                    if fault:
                        _say(f"the cache {path} {fault}: building it again")
                    if alone:
                        remove_stale(path.parent, f"{dataset}-*px-*.npy")
                    array = decode_all(classes, f"{dataset} {split}", channels, imgsz, resample)
                    _write_cache(path, key, array, remedy)
    except MemoryError as error:
        raise UserError(f"no memory for the {split} images at {imgsz} x {imgsz}; lower --imgsz") from error
    return torch.from_numpy(array)


def check_request(split: str, imgsz: int) -> None:
    """Refuse a split or an image size that can't be, before anything is read."""
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose train, val or test")
    if not isinstance(imgsz, int) or imgsz < 1:
        raise UserError(f"the image size must be a whole number of at least 1, not {imgsz!r}; change --imgsz")


def folder_files(folder: Path) -> dict[str, os.DirEntry]:
    """What lies in `folder`, by name; hidden files aside.

    Raises:
        UserError: the folder can't be read, or a symbolic link in it leads out of it.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise UserError(f"can't read the folder {folder}: {error.strerror}; check path and rights") from error
    for entry in found.values():
        # realpath, for Path.resolve raises at a link to itself
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{entry.path} is a link that leads out of its folder; put the file itself there")
    return found


def image_file(entry: os.DirEntry, name: str) -> ImageFile:
    """The file `entry` as an image named `name`.

    Raises:
        UserError: it isn't a regular file (a folder, a dangling link, a pipe).
    """
    try:
        if entry.is_file():
            status = entry.stat()
            read = Path(entry.path).read_bytes
            return ImageFile(name, status.st_size, status.st_mtime_ns, entry.path, read)
    except OSError as error:
        raise UserError(f"can't read {entry.path}: {error.strerror}; check its rights") from error
    raise UserError(f"{entry.path} is not a file; put the image there")


def decode(data: bytes, name: str, channels: int, imgsz: int, resample: Image.Resampling) -> np.ndarray:
    """One encoded image -> uint8 [channels, imgsz, imgsz].

    Palette, CMYK and greyscale images are converted; transparent ones are laid
    on white, so that ink drawn on nothing doesn't become black on black.

    Raises:
        UserError: it can't be decoded, is cut, or has more than MAX_PIXELS pixels; names `name`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before any pixel is decoded
                raise Image.DecompressionBombError
            with _alone if image.width * image.height > LARGE else contextlib.nullcontext():
                image = _opaque(image).convert("RGB" if channels == 3 else "L").resize((imgsz, imgsz), resample)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 10**6
        raise UserError(f"{name} has more than {limit} million pixels; put a smaller image there") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is none of {', '.join(FORMATS)}; put the image there again") from error
    except Exception as error:  # damaged files make PIL's decoders raise nearly anything
        raise UserError(f"{name} can't be decoded ({error}); put the image there again") from error
    return np.asarray(image).reshape(imgsz, imgsz, channels).transpose(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to white
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


def decode_all(
    classes: Sequence[Sequence[ImageFile]], what: str, channels: int, imgsz: int, resample: Image.Resampling
) -> np.ndarray:
    """Decode in parallel threads, with a bar -> uint8 [class, image, c, s, s].

    Neither the array nor the error, where there is one, depends on the number
    of threads: each image has its place, and the first bad one is reported.
    """
    array = np.empty((len(classes), len(classes[0]), channels, imgsz, imgsz), np.uint8)
    places = [(row, column) for row in range(array.shape[0]) for column in range(array.shape[1])]

    def put(place: tuple[int, int]) -> None:
        file = classes[place[0]][place[1]]
        with _alone if file.size > LARGE else contextlib.nullcontext():
            array[place] = decode(_read(file), file.path, channels, imgsz, resample)

    terminal = sys.stderr.isatty()
    if not terminal:
        _say(f"decoding {len(places):,} images, {what}")
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        warnings.simplefilter("ignore")  # PIL's, about a file that it then decodes or that gets its own line
        try:
            decoded = pool.map(put, places)
            for _ in tqdm(decoded, f"decoding {what}", len(places), disable=not terminal, unit=" images"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return array


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(file: ImageFile) -> bytes:
    if file.size > MAX_BYTES:
        raise UserError(f"{file.path} has {file.size:,} bytes, too many for an image; put it there again")
    try:
        return file.read()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged zip entry raises zlib.error, BadZipFile, RuntimeError, ...
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read {file.path}: {reason}; put the file there again") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The cache


def _check_memory(shape: tuple[int, ...], split: str) -> None:
    """Systems that overcommit would grant the array, then kill the process that fills it."""
    size = 1
    for length in shape:
        size *= length
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(f"the {split} images at {shape[-1]} x {shape[-1]} take {size // 10**9:,} GB, "
                        "more than this machine's memory; lower --imgsz")


def _key(
    classes: Sequence[Sequence[ImageFile]], split: str, channels: int, imgsz: int, resample: Image.Resampling
) -> str:
    """A hash of all that the array depends on: other files, classes, size or filter give another key."""
    made_from = [[(file.name, file.size, file.stamp) for file in row] for row in classes]
    parts = [CACHE_VERSION, split, channels, imgsz, int(resample), made_from]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _trailer(key: str, checksum: int) -> bytes:
    return f"\n{key} {checksum:08x}\n".encode()


def _write_cache(path: Path, key: str, array: np.ndarray, remedy: str) -> None:
    with atomic(path, remedy=remedy) as file:
        file.write(_header(array.shape))
        file.write(array.data)
        file.write(_trailer(key, zlib.crc32(array.data)))


def _read_cache(path: Path, key: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, str]:
    """(the array, "") where the cache is there and sound, else (None, what is wrong with it or "").

    All that the file may say about itself is known beforehand, so nothing in it
    is parsed or trusted: it is compared.
    """
    if not os.path.isfile(path):
        return None, ""
    header, trailer_size = _header(shape), len(_trailer(key, 0))
    try:
        with open(path, "rb", buffering=0) as file:
            size = len(header) + int(np.prod(shape, dtype=np.int64)) + trailer_size
            if os.fstat(file.fileno()).st_size != size or file.read(len(header)) != header:
                return None, "is cut or not of this program"
            # mapped, not read: several processes share one copy; a page that is written to becomes private
            array = np.memmap(file, np.uint8, "c", offset=len(header), shape=shape)
            file.seek(-trailer_size, os.SEEK_END)
            if file.read(trailer_size) != _trailer(key, zlib.crc32(array)):
                return None, "is damaged (wrong checksum)"
    except OSError as error:
        return None, f"can't be read ({error.strerror})"
    return array, ""


# The picture


def check_tasks(images: torch.Tensor, n_way: int, k_spt: int, k_qry: int) -> None:
    """Refuse tasks that can't be drawn from `images` [class, image, c, h, w].

    Raises:
        UserError: fewer than 1 asked for, more classes than there are, or more images of a class.
    """
    classes, count = images.shape[:2]
    if min(n_way, k_spt, k_qry) < 1:
        raise UserError(f"--n_way {n_way}, --k_spt {k_spt} and --k_qry {k_qry} must be at least 1")
    if n_way > classes:
        raise UserError(f"--n_way {n_way} is more than the {classes} classes of this split; lower it")
    if k_spt + k_qry > count:
        raise UserError(f"--k_spt {k_spt} and --k_qry {k_qry} need {k_spt + k_qry} images of a class, "
                        f"and there are {count}; lower one")
