"""Generated images: the right shapes, the same every time, classes that hang together and differ."""

import numpy as np
import pytest
import torch

import synthetic

KINDS = {"characters": (synthetic.characters, 1, 28), "photos": (synthetic.photos, 3, 84)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """(function, size, images [20, 20, c, size, size] of seed 3)."""
    make, channels, size = KINDS[request.param]
    images = make(20, 20, size, seed=3)
    assert images.dtype == torch.uint8 and images.shape == (20, 20, channels, size, size)
    return make, size, images


def nearest_mean_accuracy(features: torch.Tensor, shots: int = 5, ways: int = 5, tasks: int = 100) -> float:
    """Share of held images [class, image, feature] nearest to their class's mean of `shots` others; chance is 0.2."""
    generator = torch.Generator().manual_seed(0)
    right = []
    for _ in range(tasks):
        classes = torch.randperm(len(features), generator=generator)[:ways]
        order = torch.randperm(features.shape[1], generator=generator)
        support, held = features[classes][:, order].split([shots, features.shape[1] - shots], 1)
        nearest = torch.cdist(held, support.mean(1)).argmin(2)
        right.append((nearest == torch.arange(ways)[:, None]).float().mean().item())
    return sum(right) / tasks


def test_characters_are_thin_black_ink_on_white_paper(kind):
    make, size, images = kind
    assert images.min() < 20 and images.max() > 235
    if make is synthetic.characters:
        ink = (images < 128).float().mean((2, 3, 4))
        assert 0.01 < ink.min() and 0.05 < ink.mean() < 0.2 and ink.max() < 0.4
        assert (images == 255).float().mean() > 0.7
        assert ((images > 30) & (images < 225)).float().mean() > 0.02, "edges are not antialiased"
    assert make(2, 3, 33, seed=0).shape[3:] == (33, 33)
    smaller = torch.nn.functional.interpolate(images[0].float(), (size // 2, size // 2), mode="area")
    assert (make(1, 20, size // 2, seed=3)[0] - smaller).abs().mean() < 20, "a class looks the same in every size"


def test_a_class_is_the_same_whatever_else_is_drawn(kind):
    make, size, images = kind
    np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(make(3, 20, size, seed=3), images[:3])
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(9)
    assert torch.equal(make(2, 20, size, seed=3, first_class=7), images[7:9])


def test_every_image_differs_also_from_those_of_another_seed(kind):
    make, size, images = kind
    both = torch.cat([images, make(20, 20, size, seed=4)])
    assert len({image.numpy().tobytes() for image in both.flatten(0, 1)}) == 800


def test_the_images_stay_the_same_from_version_to_version(kind):
    make, _, images = kind
    mean, spread = images.float().mean(), images.float().std(1).mean()  # spread: of a pixel within a class
    expected = (232.12, 35.77) if make is synthetic.characters else (121.44, 53.83)
    assert (mean.item(), spread.item()) == pytest.approx(expected, abs=0.05)


def test_few_shot_is_learnable_and_not_trivial(kind):
    make, size, images = kind
    assert 0.5 < nearest_mean_accuracy(images.flatten(2) / 255) < 0.9
    assert nearest_mean_accuracy(images.float().mean((3, 4))) < 0.7, "the mean colour alone tells the classes"
    distances = torch.cdist(images.flatten(2) / 255, images.flatten(2) / 255)
    assert distances.sum((1, 2)).min() / 380 > 0.1 * size, "the images of a class are nearly the same"


@pytest.mark.parametrize("load, make, splits, images", [
    (synthetic.load_characters, synthetic.characters, {"train": 200, "val": 40, "test": 60}, 20),
    (synthetic.load_photos, synthetic.photos, {"train": 64, "val": 16, "test": 20}, 40)])
def test_splits_share_no_class(load, make, splits, images):
    everything = torch.cat([load(split, 8) for split in splits])
    assert [len(load(split, 8)) for split in splits] == list(splits.values())
    assert torch.equal(everything, make(sum(splits.values()), images, 8, synthetic.SEED))
