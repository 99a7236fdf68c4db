"""Generated images: the right shapes, the same every time, classes that hang together and differ."""

import random

import numpy as np
import pytest
import torch

import synthetic

KINDS = {"characters": (synthetic.characters, 1, 28), "photos": (synthetic.photos, 3, 84)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """(name, function, channels, size, images [20, 20, c, s, s])."""
    make, channels, size = KINDS[request.param]
    return request.param, make, channels, size, make(20, 20, size, seed=3)


def nearest_mean_accuracy(features: torch.Tensor, shots: int, ways: int = 5, tasks: int = 100) -> float:
    """Share of held images [class, image, feature] nearest to their class's mean of `shots` others."""
    generator = torch.Generator().manual_seed(0)
    right = []
    for _ in range(tasks):
        classes = torch.randperm(len(features), generator=generator)[:ways]
        order = torch.randperm(features.shape[1], generator=generator)
        chosen = features[classes][:, order]
        means, held = chosen[:, :shots].mean(1), chosen[:, shots:]
        nearest = torch.cdist(held.flatten(0, 1), means).argmin(1).view(ways, -1)
        right.append((nearest == torch.arange(ways)[:, None]).float().mean().item())
    return sum(right) / tasks


def test_shape_type_and_range(kind):
    _, _, channels, size, images = kind
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert images.shape == (20, 20, channels, size, size)
    assert images.min() < 40 and images.max() > 215


@pytest.mark.parametrize("size", [8, 20, 33])
def test_other_sizes(size):
    assert synthetic.characters(2, 3, size, seed=0).shape == (2, 3, 1, size, size)
    assert synthetic.photos(2, 3, size, seed=0).shape == (2, 3, 3, size, size)


def test_characters_are_thin_dark_ink_on_white_paper():
    images = synthetic.characters(20, 20, 28, seed=3)
    ink = (images < 128).float().mean((2, 3, 4))
    assert images.flatten(2).amin(2).max() < 128, "an image without ink"
    assert 0.02 < ink.mean() < 0.2 and ink.max() < 0.4
    assert (images == 255).float().mean() > 0.7
    grey = (images > 30) & (images < 225)
    assert grey.float().mean() > 0.02, "edges are not antialiased"


def test_same_arguments_give_the_same_bytes_with_any_number_of_threads(kind):
    _, make, _, size, images = kind
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(make(20, 20, size, seed=3), images)
    finally:
        torch.set_num_threads(threads)


def test_a_class_does_not_depend_on_how_many_there_are(kind):
    _, make, _, size, images = kind
    assert torch.equal(make(3, 20, size, seed=3), images[:3])
    assert torch.equal(make(2, 20, size, seed=3, first_class=7), images[7:9])


def test_another_seed_gives_other_classes(kind):
    _, make, _, size, images = kind
    other = make(20, 20, size, seed=4)
    assert not (other.flatten(2)[:, :, None] == images.flatten(2)[:, None]).all(-1).any()


def test_global_generators_are_left_alone(kind):
    _, make, _, size, _ = kind
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = make(2, 2, size, seed=0)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert torch.equal(make(2, 2, size, seed=0), first)


def test_no_two_images_are_the_same(kind):
    *_, images = kind
    assert len({image.numpy().tobytes() for image in images.flatten(0, 1)}) == 400


def test_images_of_a_class_are_closer_than_images_of_two(kind):
    *_, images = kind
    pixels = images.flatten(2).float() / 255  # [class, image, pixel]
    distances = torch.cdist(pixels.flatten(0, 1), pixels.flatten(0, 1)).view(20, 20, 20, 20).mean((1, 3))
    own = distances.diagonal() * 20 / 19  # an image's distance to itself, 0, is in the mean
    others = (distances.sum(1) - distances.diagonal()) / 19
    assert own.mean() < 0.97 * others.mean()
    assert (own < others).float().mean() > 0.8


def test_few_shot_is_learnable_and_not_trivial(kind):
    *_, images = kind
    pixels = images.flatten(2).float() / 255
    assert 0.45 < nearest_mean_accuracy(pixels, shots=5) < 0.95  # chance is 0.2


def test_mean_colour_alone_does_not_tell_photos_apart():
    colour = synthetic.photos(20, 20, 84, seed=3).float().mean((3, 4))
    assert nearest_mean_accuracy(colour, shots=5) < 0.75


def test_photos_differ_in_texture_direction():
    grey = synthetic.photos(20, 20, 84, seed=3).float().mean(2)
    dx, dy = grey[..., :-1, 1:] - grey[..., :-1, :-1], grey[..., 1:, :-1] - grey[..., :-1, :-1]
    direction = torch.atan2(dy, dx) % torch.pi
    size = torch.hypot(dx, dy)
    bins = [(size * (direction // (torch.pi / 8) == b)).mean((2, 3)) for b in range(8)]
    histogram = torch.stack(bins, 2)
    accuracy = nearest_mean_accuracy(histogram / histogram.sum(2, keepdim=True), shots=5)
    assert accuracy > 0.58  # 0.49 from horizons and outlines alone, with textures that have no direction


@pytest.mark.parametrize("make", [synthetic.characters, synthetic.photos])
@pytest.mark.parametrize(
    "change", [{"n_classes": 0}, {"n_images": 0}, {"imgsz": 7}, {"seed": -1}, {"first_class": -1}]
)
def test_values_out_of_range_are_refused(make, change):
    arguments = {"n_classes": 1, "n_images": 1, "imgsz": 28, "seed": 0} | change
    with pytest.raises(ValueError, match="n_classes"):
        make(**arguments)


@pytest.mark.parametrize("splits", [synthetic.CHARACTER_SPLITS, synthetic.PHOTO_SPLITS])
def test_splits_share_no_class_and_none_is_tiny(splits):
    assert list(splits) == ["train", "val", "test"]
    numbers = [number for first, count in splits.values() for number in range(first, first + count)]
    assert len(numbers) == len(set(numbers))
    assert min(count for _, count in splits.values()) >= 16


def test_loaders_return_their_split():
    size = 8  # small: this is about which classes they hold, not about what they look like
    splits = {name: synthetic.load_characters(name, size) for name in ("train", "val", "test")}
    assert {name: tuple(images.shape) for name, images in splits.items()} == {
        "train": (200, 20, 1, 8, 8),
        "val": (40, 20, 1, 8, 8),
        "test": (60, 20, 1, 8, 8),
    }
    everything = torch.cat(list(splits.values()))
    again = synthetic.characters(3, 20, size, synthetic.SEED, first_class=200)
    assert torch.equal(everything[200:203], again)
    assert synthetic.load_photos("val", 16).shape == (16, 40, 3, 16, 16)
    assert torch.equal(
        synthetic.load_photos("test", 16)[:2], synthetic.photos(2, 40, 16, synthetic.SEED, first_class=80)
    )
    with pytest.raises(ValueError, match="no split 'validation'; there are train, val, test"):
        synthetic.load_photos("validation", 16)
