"""Generated images in the shapes of Omniglot and miniImageNet, so that a fresh clone trains with no download.

    characters(...)   stroke-drawn characters, dark ink on white, each redrawn by an unsteady hand
    photos(...)       textured, photo-like scenes: a ground, a sky or wall, an object, under changing light

They are for trying the programs out, never for a result: whoever trains on them says "synthetic" in every
log and figure (use `CHARACTERS` and `PHOTOS` as the data set's name). `python omniglot_train.py --synthetic`
and `python miniimagenet_train.py --synthetic` use them.

A class is a function of (kind, seed, class number, images, size) alone. The splits of `load_characters` and
`load_photos` are ranges of class numbers under one seed, so they share no class, whatever their sizes. Only
generators made here are used and no step is threaded: on one machine the same arguments give the same bytes,
whatever ran before and with however many threads.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw

from files import progress

CHARACTERS = "synthetic characters"
PHOTOS = "synthetic photos"

# split: (first class number, classes): few enough to take seconds, more than a task needs.
CHARACTER_SPLITS = {"train": (0, 200), "val": (200, 40), "test": (240, 60)}
PHOTO_SPLITS = {"train": (0, 64), "val": (64, 16), "test": (80, 20)}
CHARACTER_IMAGES = 20
PHOTO_IMAGES = 40
SEED = 222

_CHARACTER_STREAM, _PHOTO_STREAM = 1, 2  # first word of a generator's seed: the kinds share no numbers


def load_characters(split: str, imgsz: int = 28, seed: int = SEED) -> torch.Tensor:
    """Characters of one split: uint8 [200 (train) | 40 (val) | 60 (test), 20, 1, imgsz, imgsz], 0..255."""
    first, n_classes = _split(CHARACTER_SPLITS, split)
    return characters(n_classes, CHARACTER_IMAGES, imgsz, seed, first_class=first)


def load_photos(split: str, imgsz: int = 84, seed: int = SEED) -> torch.Tensor:
    """Scenes of one split: uint8 [64 (train) | 16 (val) | 20 (test), 40, 3, imgsz, imgsz], 0..255."""
    first, n_classes = _split(PHOTO_SPLITS, split)
    return photos(n_classes, PHOTO_IMAGES, imgsz, seed, first_class=first)


def characters(n_classes: int, n_images: int, imgsz: int, seed: int, first_class: int = 0) -> torch.Tensor:
    """Draw `n_classes` characters, `n_images` times each.

    Args:
        n_classes, n_images: how many classes, and how many drawings of each; at least 1.
        imgsz: side of the square images in pixels; at least 8.
        seed: any integer from 0; another seed gives other characters.
        first_class: number of the first class: classes first_class .. first_class + n_classes - 1 are drawn.

    Returns:
        uint8 tensor [n_classes, n_images, 1, imgsz, imgsz]; paper is 255, ink is dark, as in Omniglot.

    Raises:
        ValueError: a count, size or seed out of range.
    """
    return _generate(_character_class, _CHARACTER_STREAM, 1, n_classes, n_images, imgsz, seed, first_class)


def photos(n_classes: int, n_images: int, imgsz: int, seed: int, first_class: int = 0) -> torch.Tensor:
    """Make `n_classes` kinds of scene, `n_images` views of each; arguments and errors as for `characters`.

    Returns:
        uint8 tensor [n_classes, n_images, 3, imgsz, imgsz], RGB.
    """
    return _generate(_photo_class, _PHOTO_STREAM, 3, n_classes, n_images, imgsz, seed, first_class)


def _split(splits: dict[str, tuple[int, int]], split: str) -> tuple[int, int]:
    if split not in splits:
        raise ValueError(f"no split {split!r}; there are {', '.join(splits)}")
    return splits[split]


def _generate(
    draw: Callable[[np.random.Generator, int, int], np.ndarray],
    stream: int,
    channels: int,
    n_classes: int,
    n_images: int,
    imgsz: int,
    seed: int,
    first_class: int,
) -> torch.Tensor:
    if min(n_classes, n_images) < 1 or imgsz < 8 or min(seed, first_class) < 0:
        raise ValueError(
            f"need n_classes, n_images >= 1, imgsz >= 8, seed, first_class >= 0; "
            f"got {n_classes}, {n_images}, {imgsz}, {seed}, {first_class}"
        )
    images = np.empty((n_classes, n_images, channels, imgsz, imgsz), np.uint8)
    for index in progress(range(n_classes), f"drawing images of {imgsz} x {imgsz}", n_classes, "classes"):
        rng = np.random.default_rng([stream, seed, first_class + index])
        images[index] = draw(rng, n_images, imgsz)
    return torch.from_numpy(images)


# ---- characters: a class is 2-4 strokes of control points in the unit square; an image redraws them

_SAMPLES = 9  # points drawn between two control points of a smooth stroke
_INK = 0  # as in Omniglot, whose ink is 0; thin lines turn grey when the drawing is reduced


def _character_class(rng: np.random.Generator, n_images: int, imgsz: int) -> np.ndarray:
    """n_images drawings of one new character: uint8 [n_images, 1, imgsz, imgsz]."""
    strokes = _new_character(rng)
    points = np.concatenate([control for control, _ in strokes])  # [points, 2]
    owner = np.repeat(np.arange(len(strokes)), [len(control) for control, _ in strokes])

    # The hand: each point a little off, each stroke a little off, then the whole turned, slanted, stretched.
    wobble = 0.023 * rng.standard_normal((n_images, len(points), 2))
    wobble[:, 1:] += 0.6 * wobble[:, :-1]  # neighbouring points go astray together: curves stay curves
    drawn = points + wobble
    drawn += (0.016 * rng.standard_normal((n_images, len(strokes), 2)))[:, owner]
    drawn = (drawn - 0.5) @ _hand_affine(rng, n_images) + 0.5 + 0.05 * rng.standard_normal((n_images, 1, 2))
    drawn = drawn.clip(0.04, 0.96)

    supersample = max(3, math.ceil(168 / imgsz))
    side = supersample * imgsz
    widths = np.maximum(1, np.rint(side * rng.uniform(0.03, 0.046, n_images))).astype(int)
    paths = []  # per stroke [n_images, samples, 2] in pixels of the large drawing
    start = 0
    for control, smooth in strokes:
        part = drawn[:, start : start + len(control)]
        paths.append((_curve_basis(len(control)) @ part if smooth else part) * side)
        start += len(control)

    images = np.empty((n_images, 1, imgsz, imgsz), np.uint8)
    for index, width in enumerate(widths.tolist()):
        canvas = Image.new("L", (side, side), 255)
        pen = ImageDraw.Draw(canvas)
        for path in paths:
            xy = path[index].ravel().tolist()
            pen.line(xy, fill=_INK, width=width)
            for x, y in zip(xy[0::2], xy[1::2]):  # a round nib: no notch at a corner, round ends
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=_INK)
        images[index, 0] = np.asarray(canvas.reduce(supersample))
    return images


def _new_character(rng: np.random.Generator) -> list[tuple[np.ndarray, bool]]:
    """Strokes of a new character, each (control points [P, 2] in the unit square, y down; smooth or not)."""
    strokes = [_new_stroke(rng)]
    for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
        drawn = np.concatenate([control for control, _ in strokes])
        offers = []  # of four tries the one that keeps clear of the others: a character is no scribble
        for _ in range(4):
            control, smooth = _new_stroke(rng)
            if rng.random() < 0.75:  # most strokes of a script touch an earlier one
                own = control[rng.choice([0, len(control) - 1, len(control) // 2], p=[0.5, 0.2, 0.3])]
                control = control + drawn[rng.integers(len(drawn))] - own
            clear = np.linalg.norm(control[:, None] - drawn, axis=2).min(1).mean()
            offers.append((min(clear, 0.3), len(offers), control, smooth))
        strokes.append(max(offers)[2:])
    everything = np.concatenate([control for control, _ in strokes])
    low, high = everything.min(0), everything.max(0)
    extent = np.maximum(high - low, 0.02)
    room = rng.uniform(0.5, 0.78, 2)  # the box to fill; stretched by at most half to do so
    scale = np.minimum(room / extent, 1.5 * (room / extent).min())
    return [((control - (low + high) / 2) * scale + 0.5, smooth) for control, smooth in strokes]


def _new_stroke(rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """One stroke: a bar, a bent line, an arc, a loop, a wave or a short tick."""
    kind = rng.choice(["bar", "bent", "arc", "loop", "wave", "tick"], p=[0.28, 0.18, 0.24, 0.12, 0.12, 0.06])
    origin = rng.uniform(0.15, 0.85, 2)
    if kind in ("bar", "tick"):
        angle = rng.choice([0, 0, 1, 2, 2, 3]) * math.pi / 4 + rng.normal(0, 0.08)  # mostly level or upright
        length = rng.uniform(0.45, 0.9) if kind == "bar" else rng.uniform(0.12, 0.2)
        middle = rng.normal(0, 0.02, 2)
        step = length * np.array([math.cos(angle), math.sin(angle)])
        return np.stack([origin - step / 2, origin + middle, origin + step / 2]), True
    if kind == "bent":
        turns = rng.choice([-1, 1], 3) * rng.choice([2, 2, 3], 3) * math.pi / 4
        angle = rng.integers(8) * math.pi / 4 + rng.normal(0, 0.08)
        return origin + _walk(angle, turns[: rng.integers(1, 4)], rng.uniform(0.3, 0.6, 4)), False
    if kind == "wave":
        turns = rng.choice([-1.0, 1.0]) * np.array([0.9, 0.9, -0.9, -0.9, -0.9]) * rng.uniform(0.8, 1.2)
        angle = rng.integers(8) * math.pi / 4
        return origin + _walk(angle, turns[: rng.integers(3, 6)], np.full(6, rng.uniform(0.14, 0.24))), True
    sweep = 2 * math.pi * (1.03 if kind == "loop" else rng.choice([-1, 1]) * rng.uniform(0.35, 0.8))
    radii = rng.uniform(0.14, 0.3, 2) if kind == "loop" else rng.uniform(0.2, 0.42, 2)
    angles = rng.integers(8) * math.pi / 4 + np.linspace(0, sweep, 8 if kind == "loop" else 6)
    return origin + radii * np.stack([np.cos(angles), np.sin(angles)], 1), True


def _walk(angle: float, turns: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Points [len(turns) + 2, 2] of a path that starts at 0 along `angle` and turns after each step."""
    angles = angle + np.concatenate([[0.0], np.cumsum(turns)])
    steps = lengths[: len(angles), None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])


def _hand_affine(rng: np.random.Generator, n_images: int) -> np.ndarray:
    """[n_images, 2, 2]: a few degrees of turn, some slant, sizes that differ by a seventh."""
    turn, slant = rng.normal(0, 0.1, n_images), rng.normal(0, 0.12, n_images)
    sizes = np.exp(rng.normal(0, 0.1, (n_images, 2)) + rng.normal(-0.05, 0.1, (n_images, 1)))
    rotation = np.stack([np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)], 1).reshape(-1, 2, 2)
    shear = np.stack([np.ones(n_images), np.zeros(n_images), slant, np.ones(n_images)], 1).reshape(-1, 2, 2)
    return (sizes[:, :, None] * shear) @ rotation


def _curve_basis(n_points: int) -> np.ndarray:
    """[samples, n_points]: times the control points, a Catmull-Rom curve through all of them."""
    t = np.linspace(0, n_points - 1, (n_points - 1) * _SAMPLES + 1)
    segment = np.minimum(t.astype(int), n_points - 2)
    u = t - segment
    weights = 0.5 * np.stack(
        [-(u**3) + 2 * u**2 - u, 3 * u**3 - 5 * u**2 + 2, -3 * u**3 + 4 * u**2 + u, u**3 - u**2], 1
    )
    basis = np.zeros((len(t), n_points))
    for offset in range(4):  # the end points stand in for the neighbours they lack
        columns = (segment + offset - 1).clip(0, n_points - 1)
        np.add.at(basis, (np.arange(len(t)), columns), weights[:, offset])
    return basis


# ---- photos: a class is a palette, three textures, a horizon and an object; an image is one view of it


def _photo_class(rng: np.random.Generator, n_images: int, imgsz: int) -> np.ndarray:
    """n_images views of one new kind of scene: uint8 [n_images, 3, imgsz, imgsz]."""
    palette = _new_palette(rng)  # [4, 3]: far, near, object, object's second colour
    textures = [_new_texture(rng) for _ in range(3)]  # far, near, object
    horizon, tilt = rng.uniform(0.2, 0.8), rng.normal(0, 0.25)
    soft = rng.uniform(0.01, 0.12)  # how sharply far meets near
    outline = _new_outline(rng)
    home, size = rng.uniform(0.35, 0.65, 2), rng.uniform(0.17, 0.3)
    copies = int(rng.choice([1, 1, 2, 3]))
    contrast = rng.uniform(0.12, 0.3, 3)

    n, s = n_images, imgsz

    def one(values: np.ndarray) -> np.ndarray:  # one number an image, ready to broadcast over its pixels
        return np.asarray(values, np.float32).reshape(n, 1, 1)

    y, x = np.meshgrid(*[(np.arange(s, dtype=np.float32) + 0.5) / s] * 2, indexing="ij")  # [s, s], 0..1

    # Ground and sky meet at a line that moves with the camera.
    line = one(horizon + rng.normal(0, 0.14, n)) + one(tilt + rng.normal(0, 0.12, n)) * (x - 0.5)
    near = _step((y - line) / soft)
    far_t, near_t, object_t = (
        _texture(rng, texture, n, s) * one(c * np.exp(rng.normal(0, 0.3, n)))
        for texture, c in zip(textures, contrast)
    )
    light = far_t + near * (near_t - far_t)  # brightness around the palette colour

    # The object, in one to three copies; its second colour follows its texture.
    covered = np.zeros((n, s, s), np.float32)
    for copy in range(copies):
        spread = 0.11 if copy == 0 else 0.24
        place = home + rng.normal(0, spread, (n, 2))
        scale = size * np.exp(rng.normal(0, 0.25, n)) * (0.65 if copy else 1.0)
        inside = _object(rng, outline, x - one(place[:, 0]), y - one(place[:, 1]), one(scale))
        covered = np.maximum(covered, inside)
    mix = _step(object_t / max(contrast[2], 1e-3) * 2)
    light += covered * (object_t - light)

    # Every view has palette colours of its own, near the class's: the mean colour alone doesn't tell a class.
    colours = palette + rng.normal(0, 0.05, (n, 4, 3))
    colours = colours.astype(np.float32)[..., None, None]  # [n, 4, 3, 1, 1]
    near, covered, mix = near[:, None], covered[:, None], mix[:, None]
    image = colours[:, 0] + near * (colours[:, 1] - colours[:, 0])
    thing = colours[:, 2] + mix * (colours[:, 3] - colours[:, 2])
    image = image + covered * (thing - image)
    image *= 1 + 1.3 * light[:, None]

    # The light: which side it comes from, how strong and how warm; then the sensor's noise.
    side, strength = rng.uniform(0, 2 * math.pi, n), rng.uniform(0, 0.7, n)
    shade = 1 + one(strength * np.cos(side)) * (x - 0.5) + one(strength * np.sin(side)) * (y - 0.5)
    image *= (shade * one(np.exp(rng.normal(0, 0.22, n))))[:, None]
    image *= np.exp(rng.normal(0, 0.07, (n, 3, 1, 1))).astype(np.float32)
    image += one(rng.uniform(0.01, 0.05, n))[:, None] * rng.standard_normal(image.shape, np.float32)
    return (image * 255).clip(0, 255).astype(np.uint8)


def _step(values: np.ndarray) -> np.ndarray:
    """A smooth step from 0 to 1 around 0."""
    return 0.5 + 0.5 * np.tanh(values)


def _new_palette(rng: np.random.Generator) -> np.ndarray:
    """Four muted colours [4, 3] in 0..1: two neighbouring hues for the ground, an accent for the object."""
    warm_or_cool = rng.choice([0.08, 0.58]) + rng.normal(0, 0.1)  # earth and leaves, or sky and water
    hues = warm_or_cool + np.array([0, rng.normal(0, 0.12), rng.uniform(0.2, 0.8), rng.uniform(-0.2, 0.2)])
    saturation, value = rng.uniform(0.05, 0.6, 4), rng.uniform(0.25, 0.8, 4)
    wheel = 0.5 + 0.5 * np.cos(2 * math.pi * (hues[:, None] - np.array([0, 1 / 3, 2 / 3])))
    return value[:, None] * (1 - saturation[:, None] * (1 - wheel))


def _new_texture(rng: np.random.Generator) -> tuple[float, float, float, float, float]:
    """(fall-off of the spectrum, frequency in cycles an image, its width in octaves, angle, how oriented)."""
    return (
        rng.uniform(0.9, 1.6),
        math.exp(rng.uniform(math.log(4), math.log(18))),
        rng.uniform(0.2, 0.5),
        rng.uniform(0, math.pi),
        rng.choice([0.0, 1.5, 5.0]),
    )


def _texture(rng: np.random.Generator, texture: tuple, n: int, s: int) -> np.ndarray:
    """[n, s, s], mean 0, deviation about 1: noise of the class's spectrum, angle and frequency a bit off."""
    falloff, frequency, octaves, angle, oriented = texture
    frequency = np.float32(frequency) * np.exp(rng.normal(0, 0.15, (n, 1, 1))).astype(np.float32)
    angle = np.float32(angle) + rng.normal(0, 0.2, (n, 1, 1)).astype(np.float32)
    fy, fx = np.fft.fftfreq(s, 1 / s)[:, None], np.fft.rfftfreq(s, 1 / s)[None]
    radius = np.hypot(fx, fy)
    radius[0, 0] = 1
    log_radius, direction = np.log2(radius).astype(np.float32), np.arctan2(fy, fx).astype(np.float32)
    cloud = (radius**-falloff).astype(np.float32)  # the 1/f of natural scenes
    band = np.exp(-((log_radius - np.log2(frequency)) ** 2) / (2 * octaves**2)) / frequency
    amplitude = (cloud + 1.6 * band) * np.exp(oriented * (np.cos(2 * (direction - angle)) - 1))
    amplitude[:, 0, 0] = 0
    noise = rng.standard_normal((n, s, s // 2 + 1, 2), np.float32).view(np.complex64)[..., 0]
    scale = np.sqrt(4 * np.square(amplitude).sum((1, 2), keepdims=True)) / (s * s)
    return np.fft.irfft2(noise * amplitude, (s, s)).astype(np.float32) / scale


def _new_outline(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """A closed outline, radius against angle: (amplitudes, phases of waves 2..5, how long against wide)."""
    waves = np.arange(2, 6)
    amplitude = rng.uniform(0, 0.9, 4) * (rng.random(4) < 0.6) / waves**0.8
    return amplitude, rng.uniform(0, 2 * math.pi, 4), math.exp(rng.normal(0, 0.35))


def _object(
    rng: np.random.Generator, outline: tuple, x: np.ndarray, y: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """[n, s, s] in 0..1: 1 inside the outline placed at (0, 0) and turned a little, soft at its edge."""
    amplitude, phase, aspect = outline
    turn = rng.normal(0, 0.25, (len(scale), 1, 1)).astype(np.float32)
    angle = np.arctan2(y / np.float32(aspect), x * np.float32(aspect)) - turn
    distance = np.hypot(x * np.float32(aspect), y / np.float32(aspect))
    radius = np.ones_like(angle)
    for wave, (a, p) in enumerate(zip(amplitude.tolist(), phase.tolist()), start=2):
        if a:
            radius += a * np.cos(wave * angle + np.float32(p))
    return _step((np.maximum(radius, 0.1) * scale - distance) * 60)
