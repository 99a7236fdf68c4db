"""Folders of class folders: one's own images, and photographs laid out as torchvision's ImageFolder.

    FOLDER/CLASS/*.jpg                  split by class, with a shuffle of the class names
    FOLDER/{train,val,test}/CLASS/*.jpg as they are
"""

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import images
from files import UserError, listed
from images import EXTENSIONS, ImageFile, ImageSet, is_image
from tasks import Dataset

SPLIT_SEED = 2015  # of the shuffle of the class names; its own: --seed never moves a class to another split
SHARES = {"train": 0.64, "val": 0.16, "test": 0.20}  # of the classes, as miniImageNet's
NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def dataset(root: str, name: str | None, channels: int, mean: Sequence[float], std: Sequence[float], imgsz: int,
            resample: Image.Resampling, cache: str | None) -> Dataset:
    """One's own images, for `training.train`; `channels` is 1 (greyscale) or 3 (colour), whatever the files have."""
    if channels not in (1, 3):
        raise UserError(f"--imgc {channels}: images are read as greyscale (1) or colour (3)")
    return images.dataset(lambda: find(root, resample, cache), lambda: name or f"images in {Path(root).resolve().name}",
                          channels, mean, std, imgsz)


def find(root: str | Path, resample: Image.Resampling, cache: str | Path | None = None) -> ImageSet:
    """The images of `root`, by split and class; a single folder around them is entered.

    Raises:
        UserError: there is no folder with images, it can't be read, or too few classes for three splits.
    """
    root = top = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; name the folder of the class folders with --data FOLDER")
    cache = Path(cache) if cache else root / "cache"
    while True:
        parts, classes = split_folders(top), class_folders(top)
        below = [Path(entry) for entry in images.subfolders(top) if Path(entry) != cache]
        if len(parts) == 3 or classes or len(below) != 1 or not images.subfolders(below[0]):
            break
        top = below[0]
    if len(parts) == 3:
        layout = f"folders {', '.join(path.name for path in parts.values())} of class folders"
        return ImageSet("folders", layout, {split: class_folders(parts[split]) for split in parts}, resample, cache)
    if parts and any(map(class_folders, parts.values())):
        absent = ", ".join(f"{split}/" for split in NAMES if split not in parts)
        raise UserError(f"{top} has {', '.join(path.name for path in parts.values())} and no {absent}; add it, or put "
                        "all class folders into one, to have them split here")
    if len(classes) < 3:
        loose = sum(map(is_image, images.entries(top)))
        raise UserError(f"{top} holds {len(classes)} class folders ({loose:,} images outside of any); put the images "
                        f"of each class ({', '.join(EXTENSIONS)}) into a folder of its own in it, at least 3 classes")
    names = sorted(classes)
    random.Random(SPLIT_SEED).shuffle(names)
    n_test, n_val = (max(1, round(len(names) * SHARES[split])) for split in ("test", "val"))
    chosen = {"train": names[n_test + n_val:], "val": names[n_test:n_test + n_val], "test": names[:n_test]}
    return ImageSet("folders", f"class folders, split by a shuffle of their names with seed {SPLIT_SEED}",
                    {split: {label: classes[label] for label in sorted(chosen[split])} for split in chosen},
                    resample, cache)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits that are there, by split.

    Raises:
        UserError: there are two of a split (val and validation).
    """
    there = {entry.name.lower(): Path(entry) for entry in images.subfolders(root)}
    found = {split: [there[name] for name in names if name in there] for split, names in NAMES.items()}
    listed([" and ".join(map(str, paths)) for paths in found.values() if len(paths) > 1],
           "there are two folders of one split", "move one away")
    return {split: paths[0] for split, paths in found.items() if paths}


def class_folders(folder: Path) -> dict[str, list[ImageFile]]:
    """The images of each folder in `folder`, sorted by name; folders without images aside."""
    classes: dict[str, list[ImageFile]] = {}
    for entry in images.subfolders(folder):
        for file in filter(is_image, images.entries(entry)):
            image = images.image_file(file, f"{folder.name}/{entry.name}/{file.name}")
            classes.setdefault(images.normal(entry.name), []).append(image)
    return classes
