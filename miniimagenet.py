"""miniImageNet, and any photographs in its layout: `images/` and `train.csv`, `val.csv`, `test.csv`.

Each CSV file has the header `filename,label`; the label column says which class
an image is of (Vinyals et al., 2016; the splits of Ravi and Larochelle, 2017).
`MiniImagenet` gives single tasks, for use with a DataLoader.
"""

import csv
import os
from pathlib import Path

import torch
from PIL import Image

import images
from files import UserError
from images import ImageFile

CHANNELS = 3
MAX_TABLE = 64 * 2**20  # bytes of a CSV file: a million images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red green blue


def load(root: str | Path, split: str, imgsz: int, cache: str | Path | None = None) -> torch.Tensor:
    """The photographs of one split, decoded once. Classes in the order of their labels, images in the CSV's.

    Args:
        root: the folder with images/ and the CSV files.
        split: train, val or test: the classes of `<split>.csv`.
        imgsz: photographs are resized to this square, bilinear.
        cache: folder of the decoded images; `<root>/cache` when None.

    Returns:
        uint8 [class, image, 3, imgsz, imgsz], RGB.

    Raises:
        UserError: a folder, CSV file, column or image is missing or can't be read;
            a name is there twice or leads out of images/; the classes have
            different numbers of images; the cache folder can't be written.
    """
    images.check_request(split, imgsz)
    classes = _split(Path(root), split)
    return images.load(
        [classes[label] for label in sorted(classes)], dataset="miniimagenet", split=split, channels=CHANNELS,
        imgsz=imgsz, resample=Image.Resampling.BILINEAR, cache=Path(cache) if cache else Path(root) / "cache",
    )


def sizes(root: str | Path) -> dict[str, tuple[int, int]]:
    """(classes, images a class) of each split; reads the CSV files and no image. Errors as `load`."""
    found = {split: _split(Path(root), split) for split in images.SPLITS}
    return {split: (len(classes), len(next(iter(classes.values())))) for split, classes in found.items()}


class MiniImagenet(torch.utils.data.Dataset):
    """`batchsz` tasks of one split; item i is (support_x, support_y, query_x, query_y).

    support_x [n_way*k_shot, 3, resize, resize] and query_x [n_way*k_query, 3, resize, resize]
    are normalised floats, the labels int64 in 0..n_way-1. An item depends on i and
    `startidx` alone, so it is the same in every epoch and in every loader process.

    Args:
        root: the data folder, as in `load`.
        mode: the split: train, val or test.
        batchsz: how many tasks.
        n_way: classes a task.
        k_shot: support images a class.
        k_query: query images a class.
        resize: image size in pixels.
        startidx: the number of the first task: item i is task startidx + i, so that
            `startidx=batchsz` gives the next `batchsz` tasks. (In the original it
            numbered the classes before they were numbered again, without any effect.)
        cache: as in `load`.

    Raises:
        UserError: as `load`, and for tasks that the split is too small for.
    """

    def __init__(
        self, root: str | Path, mode: str, batchsz: int, n_way: int, k_shot: int, k_query: int, resize: int,
        startidx: int = 0, cache: str | Path | None = None,
    ) -> None:
        if batchsz < 1 or startidx < 0:
            raise UserError(f"batchsz {batchsz} must be at least 1 and startidx {startidx} at least 0")
        self.images = load(root, mode, resize, cache)
        images.check_tasks(self.images, n_way, k_shot, k_query)
        self.batchsz, self.startidx = batchsz, startidx
        self.n_way, self.k_shot, self.k_query = n_way, k_shot, k_query

    def __len__(self) -> int:
        return self.batchsz

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        from tasks import sample_tasks

        if not 0 <= index < self.batchsz:
            raise IndexError(f"task {index} of {self.batchsz}")
        generator = torch.Generator().manual_seed(self.startidx + index)
        sizes = self.n_way, self.k_shot, self.k_query
        tasks = sample_tasks(self.images, 1, *sizes, generator, mean=MEAN, std=STD)
        return tuple(tensor[0] for tensor in tasks)


def _split(root: Path, split: str) -> dict[str, list[ImageFile]]:
    """The images of each label of one split, all there and equally many."""
    table = root / f"{split}.csv"
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}; {_where(root)}")
    for path, there in ((root / "images", os.path.isdir), (table, os.path.isfile)):
        if not there(path):
            raise UserError(f"{path} is missing; {_where(root)}")
    classes = _classes(table, root / "images")
    _check_counts(classes, table)
    return classes


def _classes(table: Path, folder: Path) -> dict[str, list[ImageFile]]:
    """The images of each label of a CSV file."""
    present = images.folder_files(folder)
    classes: dict[str, list[ImageFile]] = {}
    seen: set[str] = set()
    for line, name, label in _rows(table):
        where = f"{table} line {line}"
        if any(char in name for char in "/\\\0") or name in (".", ".."):
            raise UserError(f"{where}: {_short(name)} leads out of {folder}; give a bare file name")
        if name in seen:
            raise UserError(f"{where}: {_short(name)} is there twice, so support and query images "
                            "could be the same; remove one of the lines")
        if name not in present:
            raise UserError(f"{where}: {_short(name)} is not in {folder}; put it there or remove the line")
        seen.add(name)
        classes.setdefault(label, []).append(images.image_file(present[name], name))
    return classes


def _rows(table: Path) -> list[tuple[int, str, str]]:
    """(line number, file name, label) of each row of a CSV file."""
    rows = []
    try:
        if os.path.getsize(table) > MAX_TABLE:
            raise UserError(f"{table} has over {MAX_TABLE // 2**20} MB, too many for a list of images; "
                            f"{_where(table.parent)}")
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for column in ("filename", "label"):
                if column not in (reader.fieldnames or ()):
                    raise UserError(f"{table} has no column {column}; its first line must be filename,label")
            for row in reader:
                if not row["filename"] or not row["label"]:
                    raise UserError(f"{table} line {reader.line_num} lacks filename or label; mend it")
                rows.append((reader.line_num, row["filename"], row["label"]))
    except OSError as error:
        raise UserError(f"can't read {table}: {error.strerror}; check its rights") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is no CSV file in UTF-8 ({error}); {_where(table.parent)}") from error
    return rows


def _check_counts(classes: dict[str, list[ImageFile]], table: Path) -> None:
    if not classes:
        raise UserError(f"{table} lists no images; {_where(table.parent)}")
    fewest = min(classes, key=lambda label: len(classes[label]))
    most = max(classes, key=lambda label: len(classes[label]))
    low, high = len(classes[fewest]), len(classes[most])
    if low != high:
        raise UserError(f"{table}: class {_short(fewest)} has {low} images, class {_short(most)} has {high}; "
                        "every class of a split needs the same number: add or remove lines")
    if low < 2:
        raise UserError(f"{table}: class {_short(fewest)} has 1 image and a task needs at least 2; add some")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _where(root: Path) -> str:
    return (f"put images/, train.csv, val.csv and test.csv (filename,label) into {root}, "
            "or use --synthetic, which needs no data")
