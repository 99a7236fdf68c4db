"""Generated images: the right shapes, the same every time, classes that hang together and differ."""

import numpy as np
import pytest
import torch

import synthetic
from synthetic import CHARACTERS, PHOTOS, generate

SIZES = {CHARACTERS: (1, 28), PHOTOS: (3, 84)}  # channels, pixels


@pytest.fixture(scope="module", params=SIZES)
def kind(request):
    """(name, size, images [20, 20, c, size, size] of seed 3)."""
    name, (channels, size) = request.param, SIZES[request.param]
    images = generate(name, 0, 20, 20, size, seed=3)
    assert images.dtype == torch.uint8 and images.shape == (20, 20, channels, size, size)
    return name, size, images


def test_a_class_looks_the_same_in_every_size(kind):
    name, size, images = kind
    assert generate(name, 0, 2, 3, 33, seed=0).shape[3:] == (33, 33)
    smaller = torch.nn.functional.interpolate(images[0].float(), (size // 2, size // 2), mode="area")
    assert (generate(name, 0, 1, 20, size // 2, seed=3)[0] - smaller).abs().mean() < 20


def test_a_class_is_the_same_whatever_else_is_drawn(kind):
    name, size, images = kind
    np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(generate(name, 0, 3, 20, size, seed=3), images[:3])
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(9)
    assert torch.equal(generate(name, 7, 2, 20, size, seed=3), images[7:9])


def test_every_image_differs_also_from_those_of_another_seed(kind):
    name, size, images = kind
    both = torch.cat([images, generate(name, 0, 20, 20, size, seed=4)])
    assert len({image.numpy().tobytes() for image in both.flatten(0, 1)}) == 800


def test_the_images_stay_the_same_from_version_to_version(kind):
    """The mean of a pixel, its spread within a class, and that between classes."""
    name, _, images = kind
    means = images.float().mean(1)
    expected = (232.12, 35.77, 22.84) if name == CHARACTERS else (121.44, 53.83, 35.85)
    found = means.mean().item(), images.float().std(1).mean().item(), means.std(0).mean().item()
    assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name, splits, images", [
    (CHARACTERS, {"train": 200, "val": 40, "test": 60}, 20), (PHOTOS, {"train": 64, "val": 16, "test": 20}, 40)])
def test_splits_share_no_class(name, splits, images):
    dataset = synthetic.dataset(name, SIZES[name][0], (0.0,), (1.0,), 8)
    loaded = [dataset.load(split) for split in splits]
    assert list(map(len, loaded)) == list(splits.values())
    assert torch.equal(torch.cat(loaded), generate(name, 0, sum(splits.values()), images, 8, synthetic.SEED))
