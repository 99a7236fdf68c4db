"""From image files to one uint8 tensor per split, decoded once and cached.

omniglot.py, miniimagenet.py and folders.py find the files and make an `ImageSet` of them, which checks that splits
share no classes and no images. `ImageSet.load` decodes a split in parallel threads and keeps the array in a cache file,
which `numpy.load` reads too.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from files import UserError, atomic, listed, note, progress, reading, remove_stale, short
from tasks import Dataset

SPLITS = ("train", "val", "test")
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # few parsers, and none that starts a program, as PIL's for EPS does
SYSTEM_FOLDERS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # in zips and on disks
CACHE_VERSION = 2  # raised whenever the same files would give other pixels
SHARED = 1e-3  # share of a split's images that may be in another too: ImageNet has some photographs twice


class ImageFile(NamedTuple):
    """One image, not yet read."""

    name: str  # relative to the data folder, with "/"
    size: int  # bytes, encoded
    stamp: int  # changes with the content: the time of its change in ns, or the CRC-32 in a zip file
    path: str  # its name in messages
    read: Callable[[], bytes | np.ndarray]  # the encoded bytes, or uint8 pixels [h, w] or [h, w, 3]


Splits = dict[str, dict[str, list[ImageFile]]]  # split -> class -> images


@dataclass(frozen=True)
class ImageSet:
    """The image files of each class of each split. Splits that are empty, or share a class or an image, are refused."""

    name: str  # of the cache files
    layout: str  # where and how the images were found, in words
    splits: Splits  # in the order of the tensor
    resample: Image.Resampling  # filter of the resize
    cache: Path  # folder of the decoded images; made if absent
    remedy: str  # ends every message about an image
    _names: dict[str, dict[int, str]] = field(default_factory=dict)  # loaded split -> hash of pixels -> image

    def __post_init__(self) -> None:
        for split, classes in self.splits.items():
            if not classes:
                raise UserError(f"the {split} split has no class with images ({self.layout}); add some")
            listed([f"{short(label)} in {split}" for label, files in classes.items() if len(files) < 2],
                   "a task needs at least 2 images per class, and these classes have one",
                   "add images, or remove the class")
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            classes, others = self.splits.get(one, {}), self.splits.get(other, {})
            what = f"are in both {one} and {other} ({self.layout}), which must not share any"
            listed([short(label) for label in classes if label in others], f"classes {what}",
                   "remove each from one of them, or put all images of a class into one folder, and have the classes "
                   "split with --data FOLDER")
            paths = {file.path for file in itertools.chain(*others.values())}
            listed([file.name for file in itertools.chain(*classes.values()) if file.path in paths],
                   f"images {what}", "remove each from one of them")

    @property
    def summary(self) -> str:
        """The layout and the size of each split, in one line."""
        sizes = []
        for split, classes in self.splits.items():
            counts = {label: len(files) for label, files in classes.items()}
            smallest, most = min(counts, key=counts.get), max(counts.values())
            least = f"{counts[smallest]:,} ({short(smallest)}) to " if counts[smallest] < most else ""
            sizes.append(f"{split} {len(classes):,} classes of {least}{most:,} images")
        return f"{self.layout}: {', '.join(sizes)}"

    def counts(self) -> dict[str, list[int]]:
        """Split -> images of each class."""
        return {split: list(map(len, classes.values())) for split, classes in self.splits.items()}

    def digest(self, split: str) -> str:
        """Digest of the names of a split's classes, in the order of the tensor."""
        return hashlib.sha256("\n".join(self.splits[split]).encode(errors="surrogateescape")).hexdigest()[:16]

    def load(self, split: str, imgsz: int, channels: int) -> torch.Tensor:
        """The images of one split, from the cache folder or decoded into it.

        Returns:
            uint8 [class, image, channels, imgsz, imgsz]. Classes with fewer images than the largest are filled up with
            zeros.
        Raises:
            UserError: an image can't be read or decoded, or is in another split too; the cache folder can't be
                written; the array doesn't fit into memory.
        """
        classes = self.splits[split].values()
        shape = (len(classes), max(map(len, classes)), channels, imgsz, imgsz)
        sources = [[(file.name, file.size, file.stamp) for file in files] for files in classes]
        key = json.dumps([CACHE_VERSION, split, shape, int(self.resample), sources])  # all that the array depends on
        path = self.cache / f"{self.name}-{split}-{imgsz}px-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        try:
            images, hashes = _read_cache(path) or self._decode(path, split, shape)
        except MemoryError as error:
            raise UserError(f"no memory for the {split} images at {imgsz} x {imgsz}; lower --imgsz") from error
        self._check_shared(split, hashes)
        return torch.from_numpy(images)

    def _decode(self, path: Path, split: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Decode in parallel threads into a cache file -> uint8 of `shape`, uint64 hashes [class, image].

        If any image can't be read or decoded, those of all splits are named together, in their order.
        """
        if os.path.exists(path):
            note(f"the cache {path} is damaged: building it again")
        images, hashes = np.zeros(shape, np.uint8), np.zeros(shape[:2], np.uint64)

        def decode_into(place: tuple[int, int] | None, file: ImageFile) -> str | None:
            """Decode an image into its place in the arrays, if it has one -> what is wrong with it, or None."""
            try:
                with reading(file.path):  # a damaged zip entry raises zlib.error, BadZipFile, RuntimeError, ...
                    data = file.read()
                decoded = decode(data, file.path, *shape[2:4], self.resample)
                if place is not None:
                    images[place], hashes[place] = decoded
            except UserError as error:
                return str(error)

        places = [((row, column), file) for row, files in enumerate(self.splits[split].values())
                  for column, file in enumerate(files)]
        with atomic(path, remedy="name another folder with --cache FOLDER, or free some space") as cache, \
                warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor() as pool:
            remove_stale(self.cache, "*.npy", age=24 * 3600)
            warnings.simplefilter("ignore")  # PIL's, about files that it decodes all the same, or that become a fault
            decoding = pool.map(decode_into, *zip(*places))
            faults = [*filter(None, progress(decoding, f"decoding the {split} split", len(places), "images"))]
            if faults:  # name those of the splits that are not yet decoded too
                others = [file for other, classes in self.splits.items() if other not in (split, *self._names)
                          for files in classes.values() for file in files]
                decoding = pool.map(decode_into, [None] * len(others), others)
                faults += filter(None, progress(decoding, "checking the other splits", len(others), "images"))
            listed(faults, f"{len(faults):,} images can't be used", self.remedy)
            np.save(cache, images)
            np.save(cache, hashes)
        return images, hashes

    def _check_shared(self, split: str, hashes: np.ndarray) -> None:
        """Refuse a split that has more than a `SHARED` part of its images in common with one loaded before."""
        if split in self._names:
            return
        names = {value: file.name for files, row in zip(self.splits[split].values(), hashes.tolist())
                 for file, value in zip(files, row)}
        copies = sum(self.counts()[split]) - len(names)
        if copies > SHARED * len(names):
            note(f"note: {copies:,} images of {split} have the same pixels as another one; a task's support and query "
                 "images may be the same")
        for other, others in self._names.items():
            pairs = [f"{others[value]} = {names[value]}" for value in others if value in names]
            what = f"{len(pairs):,} images are in both {other} and {split}"
            if len(pairs) > SHARED * min(len(names), len(others)):
                listed(pairs, f"{what}, which must not share any", "remove each from one of them")
            elif pairs:
                note(f"note: {what}: {'; '.join(pairs[:10])}")
        self._names[split] = names


def dataset(find: Callable[[], ImageSet], name: Callable[[], str], channels: int, mean: Sequence[float],
            std: Sequence[float], imgsz: int) -> Dataset:
    """A Dataset for `training.train`; `find` is called once, when the images are first needed.

    `mean` and `std` are of the script's own data set; for another number of channels their averages are taken.
    """
    find = functools.cache(find)
    if channels != len(mean):
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    return Dataset(name, channels, mean, std, lambda: find().counts(),
                   lambda split: find().load(split, imgsz, channels),
                   lambda: find().summary, lambda split: find().digest(split))


def check_images(images: torch.Tensor, dataset: Dataset, split: str, imgsz: int) -> torch.Tensor:
    """`images`, the result of `dataset.load`, if they are what a Dataset promises; a UserError if not."""
    where = f"the {split} split of {dataset.name()}"
    counts = dataset.counts()[split]
    expected = (len(counts), max(counts), dataset.channels, imgsz, imgsz)
    given = images.dtype if isinstance(images, torch.Tensor) else type(images)
    if given != torch.uint8:
        raise UserError(f"{where}: load gives {given} and must give a tensor of uint8 in 0..255, which is scaled and "
                        "normalised later: (255 * images).round().to(torch.uint8) of 0..1")
    if images.shape != expected:
        raise UserError(f"{where}: load gives the shape {list(images.shape)}; counts, channels and --imgsz say "
                        f"{list(expected)}; make them agree")
    if images.max() <= 1:
        raise UserError(f"{where} has only pixels 0 and 1, and they must be 0..255; multiply them by 255")
    return images


# ---- names and files


def normal(text: str) -> str:
    """A label or name in the form in which it is compared: composed Unicode, without invisible or outer blanks."""
    if not text.isascii():  # in ASCII nothing is composed, and nothing invisible of this kind
        text = "".join(char for char in unicodedata.normalize("NFC", text) if unicodedata.category(char) != "Cf")
    return text.strip()


def entries(folder: Path | str) -> list[os.DirEntry]:
    """What is in `folder`, sorted by name, without hidden entries and those that operating systems create."""
    with reading(os.fspath(folder), "check the path and its permissions"), os.scandir(folder) as scan:
        shown = [entry for entry in scan if not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS]
        return sorted(shown, key=lambda entry: entry.name)


def subfolders(folder: Path | str) -> list[os.DirEntry]:
    """The folders in `folder`, without those of training runs, whose figures are no data."""
    return [entry for entry in entries(folder) if os.path.isdir(entry)  # is_dir() raises on a link to itself
            and not all(os.path.exists(os.path.join(entry, name)) for name in ("args.json", "log.jsonl"))]


def by_class(files: Iterable[tuple[str, ImageFile]]) -> dict[str, list[ImageFile]]:
    """Pairs (class, image) -> class -> images, the classes sorted by name, the images in the order of the pairs."""
    classes = {}
    for label, file in files:
        classes.setdefault(label, []).append(file)
    return dict(sorted(classes.items()))


def image_file(file: os.DirEntry | Path, name: str) -> ImageFile:
    """The file, or what it links to, as an image named `name`. A dead link is refused when the images are read."""
    size = stamp = 0
    with contextlib.suppress(OSError):
        status = os.stat(file)
        size, stamp = status.st_size, status.st_mtime_ns
    return ImageFile(name, size, stamp, os.fspath(file), Path(file).read_bytes)


# ---- decoding


def decode(data: bytes | np.ndarray | Image.Image, name: str, channels: int, imgsz: int,
           resample: Image.Resampling) -> tuple[np.ndarray, int]:
    """One image -> uint8 [channels, imgsz, imgsz], and a hash of its pixels before the resize.

    The EXIF orientation is applied. Palette, CMYK and greyscale images are converted. Transparent ones get a white
    background, so that black ink on a transparent one stays visible. Greyscale of 16 bits is taken as one of 8, 12 or
    16 bits, by its own largest value.

    Raises:
        UserError: it can't be decoded, is truncated, has more pixels than PIL takes, or is of 16-bit colours that are
            black in 8 bits; the line begins with `name`.
    """
    if not isinstance(data, Image.Image) and not len(data):
        raise UserError(f"{name} is empty")
    with reading(name, wrong="can't be decoded"):
        try:
            if isinstance(data, bytes):
                data = Image.open(io.BytesIO(data), formats=FORMATS)
                colours_of_16_bits = any(";16B" in str(tile[-1]) for tile in data.tile) and data.mode[0] != "I"
                if colours_of_16_bits and max(high for _, high in data.convert("RGB").getextrema()) < 16:
                    raise ValueError("16 bits per channel, of which only the lower are used; convert it to 8 bits")
        except UnidentifiedImageError as error:
            raise UserError(f"{name} is none of {', '.join(FORMATS)}") from error
        if isinstance(data, np.ndarray) and data.ndim != 2 and data.shape[2:] not in ((2,), (3,), (4,)):
            raise ValueError(f"its shape is {list(data.shape)}, not [h, w] or [h, w, 2 to 4]")
        image = data if isinstance(data, Image.Image) else Image.fromarray(data)
        if image.mode == "F":  # convert() would clip 0..1 to black
            raise ValueError("floats; give 8 bits in 0..255")
        with contextlib.suppress(Exception):  # EXIF data that PIL can't parse is ignored
            image = ImageOps.exif_transpose(image)
        image = _opaque(image).convert("RGB" if channels == 3 else "L")
        array = np.asarray(image.resize((imgsz, imgsz), resample)).reshape(imgsz, imgsz, channels).transpose(2, 0, 1)
    digest = hashlib.blake2b(image.tobytes(), digest_size=8, key=b"%dx%d" % image.size).digest()
    return array, int.from_bytes(digest, "little")


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip; many hold 8 or 12 bits of data
        pixels = np.asarray(image).astype(np.int64)
        bits = next((bits for bits in (8, 12) if pixels.max() < 2**bits), 16)
        return Image.fromarray((pixels >> bits - 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The two arrays in a cache file, the images and their hashes; None if it is absent or damaged.

    The images are memory-mapped: processes share one copy, and a page that is written to becomes private.
    """
    with contextlib.suppress(Exception):  # a damaged file makes NumPy raise nearly anything
        images = np.load(path, mmap_mode="c")
        with open(path, "rb") as file:
            file.seek(images.offset + images.nbytes)
            return images, np.load(file)
    return None
