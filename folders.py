"""Folders of class folders: your own images, and photographs laid out as for torchvision's ImageFolder.

    FOLDER/CLASS/*.jpg                  split by class, with a shuffle of the class names
    FOLDER/{train,val,test}/CLASS/*.jpg as they are; to test a trained model, test/ is enough

The images of a class may lie in CLASS/images/ instead, as in Tiny ImageNet.
"""

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

import images
from files import UserError, listed, note, quoted, short
from images import FORMATS, ImageFile, ImageSet, Splits
from tasks import Dataset

SPLIT_SEED = 2015  # of the shuffle of the class names; fixed, so that --seed never moves a class to another split
SHARES = {"val": 0.16, "test": 0.20}  # of the classes, as miniImageNet's; the others are for training
REMEDY = "replace or convert them, or remove them"  # of images that can't be read
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp")
NO_IMAGES = (".txt", ".csv", ".json", ".xml", ".db", ".ini", ".npy")  # left out without a note
OTHER_EXTENSIONS = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".ppm", ".pgm",
                    ".pnm")  # refused, not silently left out
NAMES = {"train": ("train", "training", "base", "meta_train"), "val": ("val", "valid", "validation", "meta_val"),
         "test": ("test", "testing", "novel", "meta_test")}


def dataset(args: argparse.Namespace, mean: Sequence[float], std: Sequence[float],
            resample: Image.Resampling) -> Dataset:
    """The images of --data, for `training.train`; --imgc is 1 (greyscale) or 3 (colour), for files of either kind."""
    if args.imgc not in (1, 3):
        raise UserError(f"--imgc {args.imgc}: images are read as greyscale (1) or colour (3)")
    return images.dataset(lambda: find(args.data, resample, args.cache, args.test is not None),
                          lambda: args.data_name or f"images in {Path(args.data).resolve().name}",
                          args.imgc, mean, std, args.imgsz)


def find(root: str | Path, resample: Image.Resampling, cache: str | Path | None = None,
         tests_only: bool = False) -> ImageSet:
    """The images of `root`, by split and class. Single folders around the class folders are entered.

    Args:
        cache: folder of the decoded images; `<root>/.cache` if None.
        tests_only: a folder test/ is enough.
    Raises:
        UserError: there is no folder with images, it can't be read, or it has too few classes for three splits.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {Path(root).absolute()} that can be read; name the folder of the class "
                        "folders with --data FOLDER")
    top = _around_classes(Path(root))
    if top != Path(root):
        _note_left_out(Path(root), _loose(Path(root)))
    if all((top / f"{split}.csv").exists() for split in NAMES):
        note(f"note: with --data the CSV files in {top} are not read; miniimagenet_train.py reads them with --root "
             f"{quoted(top)}")
    cache = Path(cache or Path(root) / ".cache")  # hidden, because FOLDER/cache may be a class
    parts = split_folders(top)
    if len(parts) == 3 or tests_only and "test" in parts and image_folders(parts["test"]):
        layout = f"folders {', '.join(path.name for path in parts.values())} of class folders"
        if others := [short(name) for name in image_folders(top) if top / name not in parts.values()]:
            note(f"note: {len(others):,} folders with images next to them in {top} are left out: {', '.join(others)}")
        return ImageSet("folders", layout, split_classes(parts), resample, cache, REMEDY)
    if any(map(image_folders, parts.values())):
        missing = ", ".join(f"{split}/" for split in NAMES if split not in parts)
        raise UserError(f"{top} has {', '.join(path.name for path in parts.values())} and no {missing}; add what "
                        "is missing, or put all class folders into one, to have them split automatically")
    classes = class_folders(top)
    if len(classes) < 3:
        where = f"in {top / 'test'}" if tests_only else "there, at least 3 classes"
        raise UserError(f"{top} holds {len(classes)} class folders ({len(_loose(top)):,} images outside them); "
                        f"put the images of each class ({', '.join(EXTENSIONS)}) into its own folder {where}")
    names = sorted(classes)
    random.Random(SPLIT_SEED).shuffle(names)
    n_test, n_val = (max(1, round(len(names) * SHARES[split])) for split in ("test", "val"))
    cut = {"train": names[n_test + n_val:], "val": names[n_test:n_test + n_val], "test": names[:n_test]}
    splits = {split: {label: classes[label] for label in sorted(labels)} for split, labels in cut.items()}
    layout = f"class folders, split by a shuffle of their names with seed {SPLIT_SEED}"
    return ImageSet("folders", layout, splits, resample, cache, REMEDY)


def _around_classes(folder: Path) -> Path:
    """The folder itself if it has class folders, test/ or several splits, else that in its only folder of folders."""
    parts = split_folders(folder)
    if image_folders(folder) or "test" in parts or len(parts) > 1:
        return folder
    inner = [entry for entry in images.subfolders(folder) if images.subfolders(entry)]
    return _around_classes(Path(inner[0])) if len(inner) == 1 else folder


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder, for each split that has one. Two of a split, such as val and validation, are refused."""
    folders = {entry.name.lower(): Path(entry) for entry in images.subfolders(root)}
    parts = {split: [folders[name] for name in names if name in folders] for split, names in NAMES.items()}
    listed([" and ".join(map(str, paths)) for paths in parts.values() if len(paths) > 1],
           "there are two folders of one split", "move one away")
    return {split: paths[0] for split, paths in parts.items() if paths}


def split_classes(parts: dict[str, Path]) -> Splits:
    splits = {split: class_folders(folder) for split, folder in parts.items()}
    for split in ("val", "test"):
        if list(splits.get(split, ())) == ["images"]:  # Tiny ImageNet's val/images and test/images
            alone = (f", or have the classes of {parts['train'].name}/ alone split, with --data "
                     f"{quoted(parts['train'])}" if "train" in parts else "")
            raise UserError(f"{parts[split]} has one folder, images, where class folders are needed; put the images of "
                            f"each class into a folder of its own in it{alone}")
    return splits


def class_folders(folder: Path) -> dict[str, list[ImageFile]]:
    """Class -> its images, both sorted by name, for each folder in `folder` that has images.

    Images that would be left out, because of their format or because they lie deeper, are refused. Those directly in
    `folder`, folders without images, and other files are left out with a note; those of NO_IMAGES without one.
    """
    found, others, deeper, left_out = [], [], [], []
    listed([short(entry.name) for entry in images.entries(folder)
            if entry.is_symlink() and not os.path.exists(entry) and not _is_image(entry)],
           f"links in {folder} lead nowhere, and their classes would be left out", "correct or remove them")
    for entry in images.subfolders(folder):
        files = _files(entry)
        pictures = [images.image_file(file, f"{folder.name}/{entry.name}/{file.name}")
                    for file in files if _is_image(file)]
        found += [(images.normal(entry.name), picture) for picture in pictures]
        left_out += [entry.name] if files and not pictures else []
        others += [f"{entry.name}/{file.name}" for file in files if file.name.lower().endswith(OTHER_EXTENSIONS)]
        left_out += [f"{entry.name}/{file.name}" for file in files if pictures and not _is_image(file)
                     and not file.name.lower().endswith(NO_IMAGES) and not os.path.isdir(file)]
        deeper += [Path(inner).relative_to(folder).as_posix() for inner in _deeper(entry)
                   if not pictures or os.path.dirname(pictures[0].path) != inner]
    if deeper and not found:  # such as the characters of several alphabets
        parents = {os.path.dirname(name) for name in deeper}
        remedy = f"give --data {quoted(folder / parents.pop())}" if len(parents) == 1 else (
            f"move them up into {folder}, each under a name of its own")
        raise UserError(f"{len(deeper):,} class folders lie too deep in {folder}, such as {deeper[0]}; {remedy}")
    listed(others, f"images in {folder} in other formats than {', '.join(FORMATS)}", "convert them, or remove them")
    listed(list(map(short, deeper)), f"folders in the class folders of {folder} have images that would be left out",
           "move these into the class folder itself, or remove them")
    _note_left_out(folder, left_out + _loose(folder))
    return images.by_class(found)


def own_images(root: Path) -> str:
    """The end of a message: how to use the class folders in `root`; empty if there are fewer than three."""
    count = max(len(image_folders(root)), sum(len(image_folders(part)) for part in split_folders(root).values()))
    return f", but {count:,} folders with images: for images of your own, --data {quoted(root)}" if count > 2 else ""


def image_folders(folder: Path | os.DirEntry) -> list[str]:
    """Names of the folders in `folder` that have images."""
    return [entry.name for entry in images.subfolders(folder) if any(map(_is_image, _files(entry)))]


def _deeper(folder: os.DirEntry) -> Iterator[str]:
    """Paths of the folders below it, at any depth, that have images; links are not followed further."""
    for inner in images.subfolders(folder):
        if any(map(_is_image, images.entries(inner))):
            yield inner.path
        if os.path.realpath(inner) == os.path.join(os.path.realpath(folder), inner.name):  # no link, no junction
            yield from _deeper(inner)


def _files(folder: os.DirEntry) -> list[os.DirEntry]:
    """What is in a class folder; if that has no images itself, in its folder images/."""
    files, inner = images.entries(folder), os.path.join(folder, "images")
    return images.entries(inner) if os.path.isdir(inner) and not any(map(_is_image, files)) else files


def _note_left_out(folder: Path, names: Sequence[str]) -> None:
    if names:
        note(f"note: {len(names):,} files and folders in {folder} are left out, as only images in class folders "
             f"({', '.join(EXTENSIONS)}) are read: {', '.join(map(short, names[:10]))}")


def _loose(folder: Path) -> list[str]:
    """Names of the images directly in the folder."""
    return [entry.name for entry in images.entries(folder) if _is_image(entry) and not os.path.isdir(entry)]


def _is_image(file: os.DirEntry) -> bool:
    return file.name.lower().endswith(EXTENSIONS + OTHER_EXTENSIONS)
