"""Small data sets, written to files: Omniglot's drawings, photographs in miniImageNet's layouts, damaged images."""

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import images
import omniglot
from files import UserError
from learner import Learner
from tasks import Dataset, Sampler

ALPHABETS = {"images_background": ("Greek",), "images_evaluation": ("Angelic", "Tibetan")}


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind, **options)
    return data.getvalue()


def sampler(images: torch.Tensor, **options) -> Sampler:
    """Of 5-way 1-shot tasks with 3 queries per class; its generator is on the images' device if that is a GPU."""
    dataset = Dataset(str, 1, (0.0,), (1.0,), dict, None)
    return Sampler(images, dataset, images.device, 1, 5, 1, 3, on_device=images.is_cuda, **options)


def load(module: ModuleType, root: Path, split: str, imgsz: int, cache: Path | None = None) -> torch.Tensor:
    """A split of the images that omniglot.py or miniimagenet.py finds."""
    return module.find(root, cache).load(split, imgsz, module.CHANNELS)


def real_data(variable: str) -> Path:
    """The folder of the real data that an environment variable names; without it the test is skipped."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is unset: it names the folder of the real data")
    return Path(os.environ[variable])


def drawing(number: int) -> bytes:
    """A 1-bit PNG of 105 x 105, like Omniglot's, with a bar whose place tells `number`."""
    pixels = np.full((105, 105), True)
    pixels[10:95, 4 * number:4 * number + 4] = False
    return encode(pixels)


def omniglot_entries() -> dict[str, bytes]:
    """6 characters of 4 drawings: name -> PNG."""
    names = [f"{part}/{alphabet}/character{character:02}/{number:04}_{number:02}.png" for part in ALPHABETS
             for alphabet in ALPHABETS[part] for character in (1, 2) for number in (1, 2, 3, 4)]
    return {name: drawing(i) for i, name in enumerate(names)}


@pytest.fixture
def small_omniglot(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(omniglot, "SPLITS", {"train": 3, "val": 1, "test": 2})
    monkeypatch.setattr(omniglot, "DRAWINGS", 4)
    monkeypatch.setattr(omniglot, "EVALUATION", set(ALPHABETS["images_evaluation"]))
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:1")  # no test asks the network
    return omniglot_entries()


def write_folders(root: Path, entries: dict[str, bytes]) -> None:
    for name, data in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def write_zips(root: Path, entries: dict[str, bytes], top: str = "", method: int = zipfile.ZIP_DEFLATED) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part in ALPHABETS:
        with zipfile.ZipFile(root / f"{part}.zip", "w", method) as archive:
            for name, data in entries.items():
                if name.startswith(part):
                    archive.writestr(top + name, data)


def colour(split: str, label: int, number: int) -> tuple[int, int, int]:
    """What `write_photos` paints: the red tells class and image, the green tells the split."""
    return 20 + 40 * label + 5 * number, {"train": 20, "val": 120, "test": 220}[split], 0


def write_photos(root: Path, classes: int = 3, count: int = 4, size: int = 20) -> None:
    """Splits of `classes` classes of `count` PNG files in images/, and the CSV files.

    In the order of the file names, p<number><label>.png in train, the classes alternate.
    """
    (root / "images").mkdir(parents=True)
    for split, letter in (("test", "t"), ("val", "v"), ("train", "p")):
        lines = ["filename,label"]
        for label, number in itertools.product(range(classes), range(count)):
            name = f"{letter}{number}{label}.png"
            pixels = np.full((size, size, 3), colour(split, label, number), np.uint8)
            (root / "images" / name).write_bytes(encode(pixels))
            lines.append(f"{name},{split if split != 'train' else ''}class{classes - label}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


# What `write_photos` wrote, in the other layouts; the images stay the same


def rows(root: Path, split: str) -> list[list[str]]:
    """[file name, label] of each image of a split."""
    return [line.split(",") for line in (root / f"{split}.csv").read_text().split()[1:]]


def into_folders(root: Path, place: str = "images/{label}") -> None:
    for split in images.SPLITS:
        for name, label in rows(root, split):
            folder = root / place.format(split=split, label=label)
            folder.mkdir(exist_ok=True, parents=True)
            (root / "images" / name).rename(folder / name)


def cached(root: Path, form: str = "image_data", protocol: int = 4, pickler: type = pickle.Pickler, **change) -> None:
    """mini-imagenet-cache-*.pkl in place of CSV files and images."""
    for split in images.SPLITS:
        names, labels = zip(*rows(root, split))
        pixels = np.stack([np.asarray(Image.open(root / "images" / name)) for name in names])
        numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
        numbered = {"data": pixels, "labels": [numbers[label] for label in labels]}
        class_dict = {label: [i for i, other in enumerate(labels) if other == label] for label in numbers}
        content = {
            "image_data": {"image_data": pixels, "class_dict": class_dict},
            "image_data by number": {"image_data": pixels, "class_dict": dict(enumerate(class_dict.values()))},
            "labels": numbered, "catname2label": numbered | {"catname2label": numbers},
            "list of arrays": {"data": list(pixels), "labels": labels}}[form] | (change if split == "train" else {})
        with open(root / f"mini-imagenet-cache-{split}.pkl", "wb") as file:
            pickler(file, protocol).dump(content)
        (root / f"{split}.csv").unlink()
    shutil.rmtree(root / "images")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


def write_classes(folder: Path, classes: int, first: int = 0, count: int = 4, name: str = "class",
                  size: int = 48) -> None:
    """`classes` folders of noise images; class i has i more than `count`."""
    for label in range(classes):
        (folder / f"{name} {label}").mkdir(parents=True)
        for number in range(count + label):
            pixels = np.random.default_rng([first, label, number]).integers(0, 256, (size, size + 4, 3), np.uint8)
            (folder / f"{name} {label}" / f"{number}.png").write_bytes(encode(pixels))


def log_rows(run: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's log, all or those of a kind."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row for row in rows if kind in (None, row["kind"])]


def read_json(run: Path, name: str = "result.json") -> dict:
    return json.loads((run / name).read_text())


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last number is the most tasks that a network has taken at once; append 0 to count from the start."""
    found, forward = [0], Learner.forward

    def watched(net: Learner, x: torch.Tensor, *args, **options):
        found[-1] = max(found[-1], len(x))
        return forward(net, x, *args, **options)

    monkeypatch.setattr(Learner, "forward", watched)
    return found


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Call:
    """Pickled as a call of a function, perhaps with the state of its result."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@contextlib.contextmanager
def refused(*words: str):
    """The block raises a UserError of one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        yield caught
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and "object at 0x" not in text


def refusal(main: Callable, *arguments: object) -> str:
    """The line with which a program refuses these arguments."""
    with refused() as caught:
        main(list(map(str, arguments)))
    assert len(text := str(caught.value)) < 1500
    return text
