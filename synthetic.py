"""Generated images in the shapes of Omniglot and miniImageNet, so that a fresh clone trains with no download.

    python omniglot_train.py --synthetic --epoch 200        # characters: black strokes on white
    python miniimagenet_train.py --synthetic --epoch 400    # photos: an object on patterned ground

They are for trying the programs out, never for a result: logs and figures name the data `CHARACTERS` or `PHOTOS`.

A class is a function of (kind, seed, class number, images per class, size) alone, so it does not depend on what else
is drawn. The splits are ranges of class numbers under one seed, so they share no class.
"""

import math
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import torch

from files import progress
from tasks import Dataset

CHARACTERS, PHOTOS = "synthetic characters", "synthetic photos"

# split: (first class number, classes): few enough to take seconds, more than a task needs.
CHARACTER_SPLITS = {"train": (0, 200), "val": (200, 40), "test": (240, 60)}
PHOTO_SPLITS = {"train": (0, 64), "val": (64, 16), "test": (80, 20)}
CHARACTER_IMAGES, PHOTO_IMAGES = 20, 40
SEED = 222

_T = np.linspace(0, 1, 33)[:, None]
_BEZIER = np.concatenate([math.comb(3, i) * _T**i * (1 - _T) ** (3 - i) for i in range(4)], 1)  # [points, 4]


def dataset(name: str, channels: int, mean: Sequence[float], std: Sequence[float], imgsz: int) -> Dataset:
    """CHARACTERS or PHOTOS, for `training.train`."""
    splits, count = (CHARACTER_SPLITS, CHARACTER_IMAGES) if name == CHARACTERS else (PHOTO_SPLITS, PHOTO_IMAGES)
    counts = {split: [count] * classes for split, (_, classes) in splits.items()}
    return Dataset(lambda: name, channels, mean, std, lambda: counts,
                   lambda split: generate(name, *splits[split], count, imgsz, SEED))


def generate(name: str, first_class: int, n_classes: int, n_images: int, imgsz: int, seed: int) -> torch.Tensor:
    """Draw the classes first_class .. first_class + n_classes - 1 of CHARACTERS or PHOTOS, `n_images` times each.

    Returns:
        uint8 [n_classes, n_images, c, imgsz, imgsz]: characters in dark ink on white paper (255), as Omniglot's, with
        c = 1; photos in RGB, c = 3.
    """
    draw, channels = (_character_class, 1) if name == CHARACTERS else (_photo_class, 3)
    images = np.empty((n_classes, n_images, channels, imgsz, imgsz), np.uint8)
    for index in progress(range(n_classes), f"drawing images of {imgsz} x {imgsz}", n_classes, "classes"):
        images[index] = draw(np.random.default_rng([channels, seed, first_class + index]), n_images, imgsz)
    return torch.from_numpy(images)


def _character_class(rng: np.random.Generator, n_images: int, imgsz: int) -> np.ndarray:
    """n_images drawings of a new character, 2 to 4 Bezier curves between 4 points: uint8 [n_images, 1, s, s]."""
    n_strokes = rng.integers(2, 5)
    points = 0.27 * rng.permutation(list(product((-1, 0, 1), repeat=2)))[:4] + rng.normal(0, 0.04, (4, 2))
    ends = rng.permutation(list(combinations(range(4), 2)))[:n_strokes]  # strokes that share a point touch there
    points -= points[ends].mean((0, 1))  # the origin is the centre of the image
    curved = rng.random((n_strokes, 1, 1)) < 0.6
    bends = curved * rng.normal(0, 0.25, (n_strokes, 2, 2))

    # The hand: each control point a little off, then the whole turned, slanted, stretched and moved.
    start, end = (points + rng.normal(0, 0.04, (n_images, 4, 2)))[:, ends.T].swapaxes(0, 1)
    bends = bends + rng.normal(0, 0.05, (n_images, n_strokes, 2, 2))
    controls = np.stack([start, start + bends[:, :, 0], end + bends[:, :, 1], end], 2)  # [n_images, strokes, 4, 2]
    hand = np.eye(2) + rng.normal(0, 0.12, (n_images, 1, 2, 2))
    paths = _BEZIER @ controls @ hand + rng.normal(0, 0.05, (n_images, 1, 1, 2))

    # The ink: the integral of a Gaussian nib along the path, which is a product of its x and its y part per piece.
    pieces = np.diff(paths, axis=2).reshape(n_images, -1, 2)
    middles = ((paths[:, :, 1:] + paths[:, :, :-1]) / 2).reshape(n_images, -1, 2)
    nib = rng.uniform(0.012, 0.018, (n_images, 1, 1))
    pixels = (np.arange(imgsz) + 0.5) / imgsz - 0.5
    x, y = (np.exp(-(((middles[..., i, None] - pixels) / nib) ** 2) / 2) for i in range(2))  # [n_images, pieces, s]
    ink = (y * np.linalg.norm(pieces, axis=2, keepdims=True) / nib).swapaxes(1, 2) @ x
    return (255.5 - 255 * ink.clip(0, 1)).astype(np.uint8)[:, None]


def _photo_class(rng: np.random.Generator, n_images: int, imgsz: int) -> np.ndarray:
    """n_images views of a new scene: uint8 [n_images, 3, s, s]. Three layers: far ground, near ground, an object.

    A class has a colour, two waves that cross and their angles per layer, a horizon and an outline. In each view all of
    them vary, so that its mean colour alone doesn't tell the class.
    """
    colours = rng.uniform(0.15, 0.75, (3, 3, 1, 1, 1))  # [layer, rgb, 1, 1, 1]
    pitches = rng.uniform(math.log(3), math.log(16), (3, 2, 1, 1, 1))  # [layer, wave, 1, 1, 1]: log of cycles per image
    angles = rng.uniform(0, math.pi, (3, 2, 1, 1, 1))
    horizon, tilt = rng.uniform(0.2, 0.8), rng.normal(0, 0.3)
    petals, depth, aspect = int(rng.integers(2, 6)), rng.uniform(0, 0.6), math.exp(rng.normal(0, 0.35))
    size = rng.uniform(0.17, 0.3)

    def varied(mean: float | np.ndarray, deviation: float, *shape: int) -> np.ndarray:
        """A number per image around `mean`: [*shape, n_images, 1, 1]."""
        return (mean + rng.normal(0, deviation, (*shape, n_images, 1, 1))).astype(np.float32)

    y, x = np.mgrid[:imgsz, :imgsz].astype(np.float32) / imgsz - 0.5  # the origin is the centre of the image
    frequency, angle, phase = np.exp(varied(pitches, 0.12, 3, 2)), varied(angles, 0.15, 3, 2), varied(0, 9, 3, 2)
    waves = np.sin(2 * math.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase).mean(1)  # [layer, ...]

    below = _step((y + 0.5 - varied(horizon, 0.12) - varied(tilt, 0.12) * x) * 20)
    x, y = (x - varied(0, 0.14)) * aspect, (y - varied(0, 0.14)) / aspect
    outline = varied(size, 0.2 * size) * (1 + depth * np.cos(petals * np.arctan2(y, x) + varied(0, 0.3)))
    inside = _step((outline - np.hypot(x, y)) * 60)

    image = np.zeros((3, n_images, imgsz, imgsz), np.float32)
    for colour, wave, mask in zip(colours, waves, (1, below, inside)):
        image += mask * (varied(colour, 0.12, 3) * (1 + varied(0.5, 0.15) * wave) - image)
    image *= np.exp(varied(0, 0.25))  # the light
    image += 0.03 * rng.standard_normal(image.shape, np.float32)  # the sensor's noise
    return (image * 255).clip(0, 255).astype(np.uint8).swapaxes(0, 1)


def _step(values: np.ndarray) -> np.ndarray:
    """A smooth step from 0 to 1 around 0."""
    return 0.5 + 0.5 * np.tanh(values)
