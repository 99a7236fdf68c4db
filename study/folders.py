"""Makes the class folders that some settings train on.

    python -m study.folders     from the zip files in omniglot/, and the CSV files and images/ in miniimagenet/
"""

import csv
import random
import shutil
import zipfile
from pathlib import Path


def omniglot(root: Path) -> None:
    """folders, a folder per character, and folders-100 with 100 of them."""
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(root / f"{part}.zip") as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    *_, alphabet, character, file = name.split("/")
                    folder = root / "folders" / f"{alphabet}-{character}"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(archive.read(name))
    names = sorted(path.name for path in (root / "folders").iterdir() if not path.name.startswith("."))
    for name in random.Random(0).sample(names, 100):
        shutil.copytree(root / "folders" / name, root / "folders-100" / name)


def photographs(root: Path) -> None:
    """folders-20, with the first 20 images of each training class."""
    for split in ("train", "val", "test"):
        with open(root / f"{split}.csv") as file:
            for row in csv.DictReader(file):
                folder = root / "folders-20" / split / row["label"]
                folder.mkdir(parents=True, exist_ok=True)
                if split != "train" or len(list(folder.iterdir())) < 20:
                    shutil.copy(root / "images" / row["filename"], folder)


if __name__ == "__main__":
    omniglot(Path("omniglot"))
    photographs(Path("miniimagenet"))
