"""miniImageNet, and any photographs in one of its layouts (Vinyals et al., 2016; splits of Ravi and Larochelle, 2017).

`find` reads whichever layout is there:

    train.csv, val.csv, test.csv    header filename,label; the images in images/, in images/CLASS/ or in CLASS/, under
                                    the CSV's names, with another extension, or under ImageNet's names
    train/, val/, test/             of class folders
    *train.pkl, *val.pkl, *test.pkl the caches in which it is distributed; no code from them is run
    n01532829/*, n01558993/*, ...   all 100 classes, as folders or as files n0153282900000005.jpg in one folder, here or
                                    in images/, with no CSV files: in the splits of Ravi and Larochelle

`MiniImagenet` gives single tasks, for use with a DataLoader.
"""

import csv
import functools
import os
import pickle
import re
from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import folders
import images
from files import UserError, listed, note, reading, short
from images import SPLITS, ImageFile, ImageSet, Splits, normal
from tasks import Sampler

CHANNELS = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red green blue
RESAMPLE = Image.Resampling.BILINEAR
CSV, FOLDERS, PICKLES = "train.csv, val.csv and test.csv", "folders train/, val/ and test/", "pickled caches (*.pkl)"
WNIDS = {split: text.split() for split, text in {  # the classes in the CSV files of Ravi and Larochelle
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831 n02101006
        n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408 n02606052 n02687172
        n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743 n03220513 n03337140 n03347037
        n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605 n03908618 n03924679 n03998194 n04067472
        n04243546 n04251144 n04258138 n04275548 n04296562 n04389033 n04435653 n04443257 n04509417 n04515003 n04596742
        n04604644 n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560 n13133613""",
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042 n03535780
        n03584254 n03770439 n03773504 n03980874 n09256479""",
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525 n03127925
        n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480"""}.items()}
CLASSES = set().union(*WNIDS.values())
TABLE = r"(?i)(train|val|test)(?:idation)?\.csv"
# A pickled cache's name. train_phase_val and train_phase_test hold other images of the training classes; learn2learn's
# "bookkeeping" holds no images.
PICKLE = r"(?i)(?!.*bookkeeping)(?:.*[-_])?(?<!train_phase_)(train|val|test)(?:idation|_phase_train)?\.(?:pkl|pickle)"
PICKLE_REMEDY = "put the cache file there again, or the images as folders train/, val/ and test/ of class folders"


def find(root: str | Path, cache: str | Path | None = None) -> ImageSet:
    """All photographs, by split and class. Classes are in the order of their labels, images in the CSV's or by name.

    Args:
        root: the folder of the data; if it has no layout itself, the only folder in it that has one.
        cache: folder of the decoded images; `<root>/cache` if None.
    Raises:
        UserError: no layout or two; a file is missing or can't be read; the splits share classes.
    """
    root = Path(root)
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root.absolute()} that can be read; {_where(root)}")
    cache = Path(cache) if cache else root / "cache"
    top, complete, remedy = root, _complete(root), folders.REMEDY
    if not complete:
        inner = {Path(folder): found for folder in images.subfolders(root) if (found := _complete(Path(folder)))}
        top, complete = inner.popitem() if len(inner) == 1 else (root, {})
    if len(complete) > 1:
        raise UserError(f"{top} has two layouts, {' and '.join(complete)}; move one away")
    layout, parts = next(iter(complete.items()), (None, {}))
    if layout == CSV:
        splits, layout = _from_tables(top, parts, _images_of_tables(top))
        remedy += " from the CSV file"
    elif layout == FOLDERS:
        splits = folders.split_classes(parts)
        if tables := _layouts(top)[CSV]:
            note(f"note: {', '.join(path.name for path in tables.values())} in {top} are not read: the folders have "
                 "the splits")
    elif layout == PICKLES:
        splits = {split: _from_pickle(parts[split], split) for split in SPLITS}
    elif splits := _from_wnids(root, cache):
        layout = "all 100 classes by their names, split as by Ravi and Larochelle"
    else:
        raise UserError(f"{_missing(top)}; {_where(top)}")
    return ImageSet("miniimagenet", layout, splits, RESAMPLE, cache, remedy)


def _layouts(root: Path) -> dict[str, dict[str, Path]]:
    """Layout -> split -> its file or folder, for the splits that have one."""
    parts = {split: folder for split, folder in folders.split_folders(root).items() if images.subfolders(folder)}
    layouts = {CSV: {}, FOLDERS: parts, PICKLES: {}}
    for entry in images.entries(root):
        for layout, pattern in (CSV, TABLE), (PICKLES, PICKLE):
            if match := re.fullmatch(pattern, entry.name):
                other = layouts[layout].setdefault(match[1].lower(), Path(entry))
                if other != Path(entry):
                    raise UserError(f"{other} and {entry.path} are both of the {match[1].lower()} split; move one away")
    return layouts


def _complete(root: Path) -> dict[str, dict[str, Path]]:
    """Those of `_layouts` that have all splits; not CSV files without images, which another layout often has too."""
    return {layout: parts for layout, parts in _layouts(root).items()
            if len(parts) == len(SPLITS) and (layout != CSV or _images_of_tables(root))}


def _images_of_tables(root: Path) -> Path | None:
    """The folder of the images that the CSV files in `root` name: images/, `root` with class folders, or ../images/."""
    here, above = root / "images", root.absolute().parent / "images"
    if here.is_dir() and images.entries(here):
        return here
    return root if folders.image_folders(root) else above if above.is_dir() else None


def _missing(root: Path) -> str:
    """What a folder without a complete layout has, and what it lacks."""
    for layout, parts in _layouts(root).items():
        if parts:
            names = ", ".join(path.name for path in parts.values())
            missing = ", ".join(split for split in SPLITS if split not in parts)
            if not missing:
                return f"{root} has {names}, and {root / 'images'} is missing or empty"
            return f"{root} has {names} but none for {missing} (needed: {layout})"
    labels = set(folders.image_folders(root))
    if len(CLASSES & labels) > len(CLASSES) / 2:
        return (f"{root} has {len(CLASSES & labels)} of miniImageNet's {len(CLASSES)} classes (missing: "
                f"{', '.join(sorted(CLASSES - labels)[:10]) or 'none'}; not of it: "
                f"{', '.join(map(short, sorted(labels - CLASSES)[:10])) or 'none'})")
    there = ", ".join(map(short, sorted(os.listdir(root))[:10])) or "nothing"
    return (f"{root} has no CSV files, no folders train/, val/ and test/ and no caches{folders.own_images(root)}; it "
            f"has {there}")


def _where(root: Path) -> str:
    return ("put images/ with train.csv, val.csv and test.csv (filename,label), or train/, val/ and test/ of class "
            "folders, or the folders of all 100 classes, or the caches *-train.pkl, *-val.pkl and *-test.pkl into "
            f"{root}, or train with --synthetic, which needs no data")


def _from_wnids(root: Path, cache: Path) -> Splits | None:
    """The images of all 100 classes in `root`, its images/ or its only folder; None if there are not exactly these."""
    inner = [Path(folder) for folder in images.subfolders(root) if Path(folder) != cache]
    places = [root, root / "images", *(inner[0] / name for name in (".", "images") if len(inner) == 1)]
    for place in [] if _layouts(root)[CSV] else filter(Path.is_dir, places):
        labels = set(folders.image_folders(place))
        classes = {} if labels else images.by_class(
            (entry.name[:9], images.image_file(entry, entry.name)) for entry in images.entries(place)
            if re.fullmatch(r"n\d{8}(\d{8}|_\d+)\.\w+", entry.name))
        if labels == CLASSES:
            classes = folders.class_folders(place)
        if classes.keys() == CLASSES:
            return {split: {wnid: classes[wnid] for wnid in wnids} for split, wnids in WNIDS.items()}
    return None


# ---- the CSV files


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """Line number, file name and label of each row."""
    with reading(table, _where(table.parent), "is no CSV file in UTF-8"), \
            open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        reader.fieldnames = [normal(name).lower() for name in reader.fieldnames or ()]
        if not {"filename", "label"} <= set(reader.fieldnames):
            raise UserError(f"the first line of {table} must be filename,label and is "
                            f"{short(','.join(reader.fieldnames))}")
        rows = [(reader.line_num, normal(row["filename"] or ""), normal(row["label"] or "")) for row in reader]
    rows = [row for row in rows if any(row[1:])]
    listed([f"line {line}" for line, *texts in rows if not all(texts)], f"{table} lacks filename or label",
           "write both there, or remove the lines")
    return rows


def _from_tables(root: Path, tables: dict[str, Path], folder: Path) -> tuple[Splits, str]:
    """The images of each split and label, and where and by which names they were found, in words."""
    rows = {split: _rows(tables[split]) for split in SPLITS}
    index = _Files(root, folder, {label for split in SPLITS for _, _, label in rows[split]})
    renamed, how = index.imagenet([name for split in SPLITS for _, name, label in rows[split]
                                   if not index.find(name, label)])
    splits, parents = {}, set()
    for split in SPLITS:
        found, faults = {}, []  # path -> its label and name in the CSV file
        for line, name, label in rows[split]:
            paths = index.find(name, label) or renamed.get(_parts(name)[1], [])
            if len(paths) != 1:
                names = " or ".join(os.path.relpath(path, folder) for path in paths)
                faults.append(f"line {line}: {short(name)} " + (f"may be {names}" if names else f"is not in {folder}"))
            elif paths[0] in found:
                faults.append(f"line {line}: {short(name)} is there twice, so support and query images could be the "
                              "same")
            else:
                found[paths[0]] = label, name
        listed(faults, f"{tables[split]}, {len(faults):,} of {len(rows[split]):,} images",
               "put absent images there, or remove the lines")
        parents.update(path.parent for path in found)
        splits[split] = images.by_class((label, images.image_file(path, name)) for path, (label, name) in found.items())
    inside = "" if folder in parents else "CLASS/"
    return splits, f"{CSV} with {os.path.relpath(folder, root)}/{inside}{how}"


def _parts(filename: str) -> tuple[str, str, str]:
    """A file's name as it is compared, `a\\cat\\B .JPG` -> (folder "cat", stem "B", extension ".jpg")."""
    *parents, name = normal(filename).replace("\\", "/").split("/")
    stem, extension = os.path.splitext(name)
    return "".join(parents[-1:]), stem.strip(), extension.lower()


class _Files:
    """The files in `folder` and its folders, by stem. In `root` itself, in folders with names of labels or splits."""

    def __init__(self, root: Path, folder: Path, labels: set[str]):
        self.labels, self.folder, named = labels, folder, {*labels, *SPLITS}
        inside = [entry for entry in images.subfolders(folder) if folder != root or normal(entry.name) in named]
        self.paths: dict[str, list[Path]] = {}
        for place in (folder, *inside):
            for entry in images.entries(place):
                self.paths.setdefault(_parts(entry.name)[1], []).append(Path(entry))

    def find(self, name: str, label: str) -> list[Path]:
        """The files with the name's stem, except in another label's folder.

        Of several, those in the folder of the name, or directly in images/. Of several there, those with its extension.
        """
        folder, stem, extension = _parts(name)
        other_labels = self.labels - {label}
        paths = [path for path in self.paths.get(stem, []) if normal(path.parent.name) not in other_labels]
        for parent in (folder, self.folder.name):
            paths = [path for path in paths if normal(path.parent.name) == parent] or paths
        return [path for path in paths if path.suffix.lower() == extension] or paths

    def imagenet(self, names: list[str]) -> tuple[dict[str, list[Path]], str]:
        """Files with ImageNet's names, nXXXXXXXX_NUMBER.JPEG, for names nXXXXXXXXNNNNNNNN.

        In the CSV files of Ravi and Larochelle NNNNNNNN is a rank, from 1, among the numbers of the class's images.
        Other CSV files give the file's own NUMBER. The one that finds all images is used, or both if they agree.

        Returns:
            nXXXXXXXXNNNNNNNN -> files, and which of the two it was, in words.
        """
        stems = {stem for _, stem, _ in map(_parts, names) if re.fullmatch(r"n\d{16}", stem)}
        numbers: dict[str, dict[int, list[Path]]] = {}  # class -> NUMBER -> files
        for stem, paths in self.paths.items():
            if match := re.fullmatch(r"(n\d{8})_(\d+)", stem):
                numbers.setdefault(match[1], {})[int(match[2])] = paths
        by_number = {f"{wnid}{number:08}": paths for wnid, files in numbers.items() for number, paths in files.items()}
        by_rank = {f"{wnid}{rank:08}": files[number] for wnid, files in numbers.items()
                   for rank, number in enumerate(sorted(files), start=1)}
        fitting = {how: files for how, files in (("number", by_number), ("rank", by_rank)) if stems <= files.keys()}
        if not stems or not fitting:
            return {}, ""
        for stem in sorted(stems) if len(fitting) > 1 else ():
            if by_number[stem] != by_rank[stem]:
                raise UserError(f"{stem} of the CSV files can be {by_number[stem][0].name} (by its number) or "
                                f"{by_rank[stem][0].name} (by its rank among the class's numbers); rename the files as "
                                "in the CSV files")
        how, files = next(iter(fitting.items()))
        return files, f", ImageNet's names by {how}"


# ---- the pickled caches: a pickle may name any function to be called; what is called here is listed in REPLACED


def _from_pickle(path: Path, split: str) -> dict[str, list[ImageFile]]:
    """The images of each class, in the order of the cache file, which is a dict in one of two forms.

    `image_data` uint8 [N, 84, 84, 3] with `class_dict` (class -> indices), or `data` with `labels` (one per image) and
    perhaps `catname2label`.
    """
    with reading(path, PICKLE_REMEDY, "can't be read as a cache of miniImageNet"):
        status = path.stat()
        if status.st_size > 10**8:
            note(f"reading {path}, {status.st_size / 10**6:,.0f} MB")
        try:
            with open(path, "rb") as file:
                content = _Unpickler(file, encoding="latin1").load()  # of text from Python 2
        except MemoryError as error:  # a damaged file may give sizes that fit into no memory
            raise ValueError("it doesn't fit into memory") from error
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        if content.keys() >= {"image_data", "class_dict"}:
            pixels = content["image_data"]
            labelled = [(label, index) for label, indices in content["class_dict"].items() for index in indices]
        elif content.keys() >= {"data", "labels"}:
            pixels = content["data"]
            if len(content["labels"]) != len(pixels):
                raise ValueError(f"{len(content['labels']):,} labels of {len(pixels):,} images")
            names = {number: name for name, number in content.get("catname2label", {}).items()}
            labelled = [(names.get(label, label), index) for index, label in enumerate(content["labels"])]
        else:
            raise ValueError(f"its keys are {', '.join(map(short, map(str, content)))}, and not image_data and "
                             "class_dict, or data and labels")
        pixels = list(map(np.asarray, pixels))
        if others := {image.dtype for image in pixels} - {np.dtype(np.uint8)}:
            raise ValueError(f"its images are of {', '.join(map(str, others))}, not of uint8")
        indices = {index for _, index in labelled}
        if len(indices) < len(labelled) or not indices <= set(range(len(pixels))):
            raise ValueError(f"class_dict names an image twice, or one of {len(pixels):,} that isn't there")
        return images.by_class(
            (f"{split} {label}" if isinstance(label, Number) else normal(str(label)),  # each cache counts from 0
             ImageFile(f"{path.name}/{index}", pixels[index].size, status.st_mtime_ns, f"image {index} of {path}",
                       functools.partial(pixels.__getitem__, index)))
            for label, index in labelled)


class _Type:
    """Stands in for numpy.dtype. With a forged state, NumPy's own dtype and ndarray read memory that is not theirs."""

    def __init__(self, code: str, *_):
        self.type = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.type = self.type.newbyteorder(state[1])


class _Array(list):
    """Stands in for numpy.ndarray: a list of its rows, or of the objects in it."""

    def __init__(self, *_):  # a type and an empty shape; the state has them
        super().__init__()

    def __setstate__(self, state: tuple) -> None:
        *_, shape, dtype, fortran, data = state
        self[:] = data if dtype.type.hasobject else _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: bytes | str, dtype: _Type, shape: Sequence[int] = (-1,), order: str = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # from Python 2
    return np.frombuffer(data, dtype.type).reshape(shape, order=order)


REPLACED = {  # all functions that a pickle may name, and what is called in their place
    "ndarray": None, "dtype": _Type, "_reconstruct": _Array, "_frombuffer": _array,
    "scalar": lambda dtype, data: _array(data, dtype).item(),
    "encode": lambda text, _: text.encode("latin1"),  # bytes, in pickles of protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in REPLACED:
            return REPLACED[name]
        raise pickle.UnpicklingError(f"it would call {module}.{name}, and only arrays, dicts, lists, text and numbers "
                                     "are read")


# ---- single tasks


class MiniImagenet(torch.utils.data.Dataset):
    """`batchsz` tasks of one split; item i is (support_x, support_y, query_x, query_y).

    support_x [n_way*k_shot, 3, resize, resize] and query_x [n_way*k_query, 3, resize, resize] are normalised floats,
    the labels int64 in 0..n_way-1. An item depends on startidx + i alone: it is the same in every epoch and process.

    Args:
        root, cache: as in `find`.
        mode: the split: train, val or test.
        startidx: the number of the first task; `startidx=batchsz` gives the next `batchsz` tasks.
    Raises:
        UserError: as `find` and `ImageSet.load`.
        ValueError: there is no such split, or it has too few classes, or too few images per class.
    """

    def __init__(self, root: str | Path, mode: str, batchsz: int, n_way: int, k_shot: int, k_query: int, resize: int,
                 startidx: int = 0, cache: str | Path | None = None):
        if mode not in SPLITS:
            raise ValueError(f"mode {mode!r}: must be one of {', '.join(SPLITS)}")
        dataset = images.dataset(functools.partial(find, root, cache), str, CHANNELS, MEAN, STD, resize)
        self.batchsz, self.startidx = batchsz, startidx
        self.sampler = Sampler(dataset.load(mode), dataset, torch.device("cpu"), 0, n_way, k_shot, k_query,
                               counts=dataset.counts()[mode])
        self.sampler.generator = None  # workers that are not forked can't receive one (pytorch/pytorch#146828)

    def __len__(self) -> int:
        return self.batchsz

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if not 0 <= index < self.batchsz:
            raise IndexError(f"task {index} of {self.batchsz}")
        self.sampler.generator = torch.Generator().manual_seed(self.startidx + index)
        return tuple(tensor[0] for tensor in self.sampler(1))
