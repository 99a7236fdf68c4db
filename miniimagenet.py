"""miniImageNet, and any photographs in one of its layouts (Vinyals et al., 2016; splits of Ravi and Larochelle, 2017).

`find` looks which layout there is:

    train.csv, val.csv, test.csv    header filename,label; the images in images/, in images/CLASS/ or in CLASS/, under
                                    the CSV's names, with another extension, or under ImageNet's names
    train/, val/, test/             of class folders
    *train.pkl, *val.pkl, *test.pkl the caches in which it is passed on, see pickles.py

`MiniImagenet` gives single tasks, for use with a DataLoader.
"""

import contextlib
import csv
import os
import re
from pathlib import Path

import torch
from PIL import Image

import folders
import images
import pickles
from files import UserError, listed, reading, short
from images import SPLITS, ImageFile, ImageSet, normal, stem_and_extension
from tasks import sample_tasks

CHANNELS = 3
MAX_TABLE = 64 * 2**20  # bytes of a CSV file: a million images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red green blue
RESAMPLE = Image.Resampling.BILINEAR
PICKLE = r"(?i)(?:.*[-_])?(train|val|test)(?:idation|_phase_train)?\.(?:pkl|pickle)"


def load(root: str | Path, split: str, imgsz: int, cache: str | Path | None = None) -> torch.Tensor:
    """The photographs of one split: uint8 [class, image, 3, imgsz, imgsz], RGB. Errors as `find`, `ImageSet.load`."""
    images.check_request(split, imgsz)
    return find(root, cache).load(split, imgsz, CHANNELS)


def sizes(root: str | Path) -> dict[str, tuple[int, int]]:
    """(classes, images of the smallest) of each split; decodes no image. Errors as `find`."""
    return find(root).sizes()


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
        raise UserError(f"there is no folder {root}; {_where(root)}")
    top, layouts = root, _layouts(root)
    if not _whole(layouts):
        below = [(path, _layouts(path)) for path in map(Path, images.subfolders(root))]
        below = [(path, found) for path, found in below if _whole(found)]
        top, layouts = below[0] if len(below) == 1 else (root, layouts)
    whole = _whole(layouts)
    if len(whole) > 1:
        raise UserError(f"{top} can be read in two ways, from {' and from '.join(whole)}; move one away")
    if not whole:
        raise UserError(f"{_missing(top, layouts)}; {_where(top)}")
    (layout,), cache = whole, Path(cache) if cache else root / "cache"
    found = layouts[layout]
    if layout == CSV:
        splits, layout = _from_tables(top, found)
    elif layout == FOLDERS:
        splits = {split: folders.class_folders(found[split]) for split in SPLITS}
    else:
        splits = {split: pickles.classes(found[split], split) for split in SPLITS}
        splits = {split: {label: classes[label] for label in sorted(classes)} for split, classes in splits.items()}
    return ImageSet("miniimagenet", layout, splits, RESAMPLE, cache,
                    "put the images there again, or take them out" + " of the CSV file" * (whole == [CSV]))


CSV, FOLDERS, PICKLES = "train.csv, val.csv and test.csv", "folders train/, val/ and test/", "pickled caches (*.pkl)"


def _layouts(root: Path) -> dict[str, dict[str, Path]]:
    """For each layout, what there is of its splits."""
    parts = folders.split_folders(root)
    found = {CSV: {}, FOLDERS: {split: parts[split] for split in parts if images.subfolders(parts[split])}, PICKLES: {}}
    for entry in images.entries(root):
        if entry.name in [f"{split}.csv" for split in SPLITS]:
            found[CSV][entry.name[:-4]] = Path(entry.path)
        if match := re.fullmatch(PICKLE, entry.name):
            split = match[1].lower()
            if re.search(r"(?i)train_phase_(val|test)", entry.name):
                continue  # other images of the training classes
            if split in found[PICKLES]:
                raise UserError(f"{found[PICKLES][split]} and {entry.path} are both of the {split} split; "
                                "move one away")
            found[PICKLES][split] = Path(entry.path)
    return found


def _whole(layouts: dict[str, dict[str, Path]]) -> list[str]:
    return [layout for layout, there in layouts.items() if len(there) == len(SPLITS)]


def _missing(root: Path, layouts: dict[str, dict[str, Path]]) -> str:
    """What a folder without a whole layout has, and what it lacks."""
    for layout, there in layouts.items():
        if there:
            has = ", ".join(path.name for path in there.values())
            absent = ", ".join(split for split in SPLITS if split not in there)
            return f"{root} has {has}, and of {layout} those of {absent} are missing"
    classes = sum(any(file.name.lower().endswith(images.EXTENSIONS) for file in images.entries(folder.path))
                  for folder in images.subfolders(root))
    return f"{root} has no CSV files, no folders train/, val/ and test/ and no caches" + (
        f", but {classes:,} folders with images: for images of your own, --data {root}" if classes else "")


def _where(root: Path) -> str:
    return ("put images/ with train.csv, val.csv and test.csv (filename,label), or train/, val/ and test/ of class "
            f"folders, or the caches *-train.pkl, *-val.pkl and *-test.pkl into {root}, or use --synthetic, which "
            "needs no data")


# ---- the CSV files


def _from_tables(root: Path, tables: dict[str, Path]) -> tuple[dict[str, dict[str, list[ImageFile]]], str]:
    """The images of each split and label, and in words how they were found."""
    rows = {split: _rows(tables[split]) for split in SPLITS}
    index = _Files(root, {label for split in SPLITS for _, _, label in rows[split]})
    paths = {split: [index.find(name, label) for _, name, label in rows[split]] for split in SPLITS}
    absent = {stem_and_extension(name)[0] for split in SPLITS for (_, name, _), path in zip(rows[split], paths[split])
              if not path}
    renamed, how = index.imagenet(absent)
    splits = {}
    for split in SPLITS:
        classes, faults, seen = {}, [], set()
        for (line, name, label), found in zip(rows[split], paths[split]):
            found = found or renamed.get(stem_and_extension(name)[0], [])
            if len(found) != 1:
                what = f"may be {' or '.join(found)}" if found else f"is not in {index.folder}"
                faults.append(f"line {line}: {short(name)} {what}")
            elif found[0] in seen:
                faults.append(f"line {line}: {short(name)} is there twice, so support and query images could be the "
                              "same")
            else:
                seen.add(found[0])
                try:
                    file = images.image_file(index.files[found[0]], normal(name))
                    classes.setdefault(label, []).append(file)
                except UserError as error:
                    faults.append(str(error).rpartition("; ")[0])
        listed(faults, f"{tables[split]}, {len(faults):,} of {len(rows[split]):,} images",
               "put the images there, or remove the lines")
        splits[split] = {label: classes[label] for label in sorted(classes)}
    others = sum(bool(path) and stem_and_extension(name)[1] != stem_and_extension(path[0])[1]
                 for split in SPLITS for (_, name, _), path in zip(rows[split], paths[split]))
    places = {os.path.dirname(path[0]) != "" for split in SPLITS for path in paths[split] if path}
    return splits, f"{CSV} with {os.path.relpath(index.folder, root)}/{'CLASS/' * (places == {True})}" + (
        f", {others:,} images with another extension than in the CSV files" if others else "") + how


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """(line number, file name, label) of each row of a CSV file."""
    rows, faults = [], []
    with reading(table, _where(table.parent), "is no CSV file in UTF-8"):
        if os.path.getsize(table) > MAX_TABLE or not os.path.isfile(table):
            raise UserError(f"{table} is no file of at most {MAX_TABLE // 2**20} MB, a list of images; "
                            f"{_where(table.parent)}")
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = [normal(name).lower() for name in reader.fieldnames or ()]
            for column in ("filename", "label"):
                if column not in reader.fieldnames:
                    raise UserError(f"{table} has no column {column}; its first line must be filename,label")
            for row in reader:
                name, label = row["filename"] or "", normal(row["label"] or "")
                rows.append((reader.line_num, name, label))
                if not normal(name) or not label:
                    faults.append(f"line {reader.line_num}")
    listed(faults, f"{table} lacks filename or label", "write both there, or remove the lines")
    if not rows:
        raise UserError(f"{table} lists no images; {_where(table.parent)}")
    return rows


class _Files:
    """The files in images/ and in its folders; without images/, in the folders that have the labels' names.

    files: path relative to `folder` -> file.
    stems: the path without extension, as names are compared, -> paths. "*/x" stands for x in any folder.
    """

    def __init__(self, root: Path, labels: set[str]):
        self.root = root
        self.folder = root / "images" if os.path.isdir(root / "images") else root
        inside = images.subfolders(self.folder)
        named = [entry for entry in inside if normal(entry.name) in labels]
        if self.folder == root and not named:
            raise UserError(f"{root / 'images'} is missing; {_where(root)}")
        self.files = {entry.name: entry for entry in images.entries(self.folder)}
        for folder in named or inside:
            self.files |= {f"{folder.name}/{entry.name}": entry for entry in images.entries(folder.path)}
        self.stems: dict[str, list[str]] = {}
        for path in self.files:
            stem, _ = stem_and_extension(path)
            self.stems.setdefault(stem, []).append(path)
            if "/" in stem:
                self.stems.setdefault(f"*/{stem.rpartition('/')[2]}", []).append(path)

    def find(self, name: str, label: str) -> list[str]:
        """The paths that a CSV file may mean by `name`: relative to images/ or its folder, absolute, or a bare name."""
        if name in self.files:
            return [name]
        ways = [name]
        with contextlib.suppress(ValueError):  # another drive
            ways.append(os.path.relpath(os.path.join(self.root, normal(name).replace("\\", "/")), self.folder))
        for way in ways:
            stem, extension = stem_and_extension(way)
            for key in (stem, f"{label}/{stem}", f"*/{stem}"):
                if found := self.stems.get(key):
                    same = [path for path in found if stem_and_extension(path)[1] == extension]
                    return same or found if extension in ("", *images.EXTENSIONS) else same
        return []

    def imagenet(self, stems: set[str]) -> tuple[dict[str, list[str]], str]:
        """Files with ImageNet's names, nXXXXXXXX_NUMBER.JPEG, for names of the CSV files, nXXXXXXXXNNNNNNNN.

        In the CSV files of Ravi and Larochelle NNNNNNNN is a rank, from 1, among the numbers of the class's images, as
        the tools that make miniImageNet from ImageNet take it. Others name the file whose number is NNNNNNNN. That
        reading is taken which finds all images.

        Returns:
            stem -> [path], and the reading in words.
        Raises:
            UserError: both find all images, and not the same ones.
        """
        numbered: dict[str, dict[int, str]] = {}
        for path in self.files:
            if match := re.fullmatch(r"(?:.*/)?(n\d{8})_(\d+)\.\w+", path):
                numbered.setdefault(match[1], {})[int(match[2])] = path
        ranked = {name: [files[number] for number in sorted(files)] for name, files in numbered.items()}
        wanted = {stem: (match[1], int(match[2]))
                  for stem in stems if (match := re.fullmatch(r"(n\d{8})(\d{8})", stem))}
        by_number = {stem: numbered.get(name, {}).get(number) for stem, (name, number) in wanted.items()}
        by_rank = {stem: (ranked.get(name, [])[number - 1:number] or [None])[0] if number else None
                   for stem, (name, number) in wanted.items()}
        readings = {how: found for how, found in {"number": by_number, "rank": by_rank}.items() if all(found.values())}
        if not wanted or not readings:
            return {}, ""
        if len(readings) == 2 and by_number != by_rank:
            stem = next(stem for stem in wanted if by_number[stem] != by_rank[stem])
            raise UserError(f"{stem} of the CSV files can be {by_number[stem]} (by its number) or {by_rank[stem]} (by "
                            "its rank among the class's numbers); rename the files as in the CSV files")
        how, found = next(iter(readings.items()))
        return {stem: [path] for stem, path in found.items()}, f", ImageNet's names by {how}"


# ---- single tasks


class MiniImagenet(torch.utils.data.Dataset):
    """`batchsz` tasks of one split; item i is (support_x, support_y, query_x, query_y).

    support_x [n_way*k_shot, 3, resize, resize] and query_x [n_way*k_query, 3, resize, resize]
    are normalised floats, the labels int64 in 0..n_way-1. An item depends on i and
    `startidx` alone, so it is the same in every epoch and in every loader process.

    Args:
        root: the data folder, as in `find`.
        mode: the split: train, val or test.
        batchsz: how many tasks.
        n_way: classes per task.
        k_shot: support images per class.
        k_query: query images per class.
        resize: image size in pixels.
        startidx: the number of the first task: item i is task startidx + i, so that
            `startidx=batchsz` gives the next `batchsz` tasks. (In the original it
            numbered the classes before they were numbered again, without any effect.)
        cache: as in `find`.

    Raises:
        UserError: as `find` and `ImageSet.load`, and for tasks that the split is too small for.
    """

    def __init__(
        self, root: str | Path, mode: str, batchsz: int, n_way: int, k_shot: int, k_query: int, resize: int,
        startidx: int = 0, cache: str | Path | None = None,
    ) -> None:
        if batchsz < 1 or startidx < 0:
            raise UserError(f"batchsz {batchsz} must be at least 1 and startidx {startidx} at least 0")
        images.check_request(mode, resize)
        found = find(root, cache)
        self.images, self.counts = found.load(mode, resize, CHANNELS), found.counts(mode)
        images.check_tasks(self.images, n_way, k_shot, k_query, found.sizes()[mode][1])
        self.batchsz, self.startidx = batchsz, startidx
        self.n_way, self.k_shot, self.k_query = n_way, k_shot, k_query

    def __len__(self) -> int:
        return self.batchsz

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if not 0 <= index < self.batchsz:
            raise IndexError(f"task {index} of {self.batchsz}")
        generator = torch.Generator().manual_seed(self.startidx + index)
        sizes = self.n_way, self.k_shot, self.k_query
        tasks = sample_tasks(self.images, 1, *sizes, generator, mean=MEAN, std=STD, counts=self.counts)
        return tuple(tensor[0] for tensor in tasks)
