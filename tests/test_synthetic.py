"""Generated images: the right shapes, the same every time, classes that hang together and differ."""

import numpy as np
import pytest
import torch

import synthetic

SIZES = {synthetic.CHARACTERS: (1, 28), synthetic.PHOTOS: (3, 84)}  # channels, pixels


@pytest.fixture(scope="module", params=SIZES)
def kind(request):
    """(name, size, images [20, 20, c, size, size] of seed 3)."""
    name, (channels, size) = request.param, SIZES[request.param]
    images = synthetic.generate(name, 0, 20, 20, size, seed=3)
    assert images.dtype == torch.uint8 and images.shape == (20, 20, channels, size, size)
    return name, size, images


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
    name, size, images = kind
    assert images.min() < 20 and images.max() > 235
    if name == synthetic.CHARACTERS:
        ink = (images < 128).float().mean((2, 3, 4))
        assert 0.01 < ink.min() and 0.05 < ink.mean() < 0.2 and ink.max() < 0.4
        assert (images == 255).float().mean() > 0.7
        assert ((images > 30) & (images < 225)).float().mean() > 0.02, "edges are not antialiased"
    assert synthetic.generate(name, 0, 2, 3, 33, seed=0).shape[3:] == (33, 33)
    smaller = torch.nn.functional.interpolate(images[0].float(), (size // 2, size // 2), mode="area")
    again = synthetic.generate(name, 0, 1, 20, size // 2, seed=3)[0]
    assert (again - smaller).abs().mean() < 20, "a class looks the same in every size"


def test_a_class_is_the_same_whatever_else_is_drawn(kind):
    name, size, images = kind
    np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(synthetic.generate(name, 0, 3, 20, size, seed=3), images[:3])
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(9)
    assert torch.equal(synthetic.generate(name, 7, 2, 20, size, seed=3), images[7:9])


def test_every_image_differs_also_from_those_of_another_seed(kind):
    name, size, images = kind
    both = torch.cat([images, synthetic.generate(name, 0, 20, 20, size, seed=4)])
    assert len({image.numpy().tobytes() for image in both.flatten(0, 1)}) == 800


def test_the_images_stay_the_same_from_version_to_version(kind):
    name, _, images = kind
    mean, spread = images.float().mean(), images.float().std(1).mean()  # spread: of a pixel within a class
    expected = (232.12, 35.77) if name == synthetic.CHARACTERS else (121.44, 53.83)
    assert (mean.item(), spread.item()) == pytest.approx(expected, abs=0.05)


def test_few_shot_is_learnable_and_not_trivial(kind):
    name, size, images = kind
    assert 0.5 < nearest_mean_accuracy(images.flatten(2) / 255) < 0.9
    assert nearest_mean_accuracy(images.float().mean((3, 4))) < 0.7, "the mean colour alone tells the classes"
    distances = torch.cdist(images.flatten(2) / 255, images.flatten(2) / 255)
    assert distances.sum((1, 2)).min() / 380 > 0.1 * size, "the images of a class are nearly the same"


@pytest.mark.parametrize("name, splits, images", [
    (synthetic.CHARACTERS, {"train": 200, "val": 40, "test": 60}, 20),
    (synthetic.PHOTOS, {"train": 64, "val": 16, "test": 20}, 40)])
def test_splits_share_no_class(name, splits, images):
    dataset = synthetic.dataset(name, SIZES[name][0], (0.0,), (1.0,), 8)
    loaded = [dataset.load(split) for split in splits]
    assert list(map(len, loaded)) == list(splits.values())
    assert torch.equal(torch.cat(loaded), synthetic.generate(name, 0, sum(splits.values()), images, 8, synthetic.SEED))
