"""Makes the variants of the data sets that some settings train on, as class folders.

    python -m study.variants     from the zip files in omniglot/, and the CSV files and images/ in miniimagenet/
"""

import csv
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import files
from files import Parser, UserError, reading


def omniglot(root: Path) -> None:
    """folders, one per character; folders-100, of 100 characters; folders-noise*, faint characters in noise."""
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(root / f"{part}.zip") as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    *_, alphabet, character, file = name.split("/")
                    (made(root / "folders" / f"{alphabet}-{character}") / file).write_bytes(archive.read(name))
    names = sorted(path.name for path in (root / "folders").iterdir() if not path.name.startswith("."))
    for name in random.Random(0).sample(names, 100):
        shutil.copytree(root / "folders" / name, root / "folders-100" / name, dirs_exist_ok=True)
    generator = np.random.default_rng(0)
    for name in names:
        for path in sorted((root / "folders" / name).glob("*.png")):
            light = np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.BILINEAR)) / 255
            noise = generator.normal(size=light.shape)
            for noisy, deviation in (("folders-noise-0.2", 0.2), ("folders-noise-0.3", 0.3), ("folders-noise", 0.4)):
                faint = 0.3 + 0.4 * light + deviation * noise
                image = Image.fromarray((255 * faint.clip(0, 1)).astype(np.uint8))
                image.save(made(root / noisy / name) / path.name)


def photographs(root: Path) -> None:
    """folders-20, 20 images of each training class; folders-crops, a class of 20 random crops per photograph."""
    for split in ("train", "val", "test"):
        with open(root / f"{split}.csv", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                folder = made(root / "folders-20" / split / row["label"])
                if split != "train" or len(list(folder.iterdir())) < 20:
                    shutil.copy(root / "images" / row["filename"], folder)
    paths, generator = sorted((root / "images").iterdir()), random.Random(0)
    if len(paths) < 1623:
        raise UserError(f"{root / 'images'} has {len(paths):,} images, and the crops need 1,623, as Omniglot's classes")
    for path in generator.sample(paths, 1623):
        folder = made(root / "folders-crops" / path.stem)
        photograph = Image.open(path).convert("RGB")
        for i in range(20):
            size = generator.randint(min(photograph.size) // 2, min(photograph.size))
            left, top = (generator.randint(0, whole - size) for whole in photograph.size)
            photograph.crop((left, top, left + size, top + size)).save(folder / f"{i:02}.png")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    Parser(prog="python -m study.variants", description=__doc__.partition("\n")[0]).parse_args()
    for make, root in ((omniglot, Path("omniglot")), (photographs, Path("miniimagenet"))):
        with reading(root, "put the data set there (Omniglot's two zip files), or make that folder a link to it"):
            make(root)


if __name__ == "__main__":
    files.run(main)
