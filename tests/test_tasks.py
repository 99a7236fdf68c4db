"""Sampled tasks, of images whose pixels say which class and image they are: a task can be read back."""

import pytest
import torch

import tasks as module
from tasks import Tasks, sample_tasks, with_rotations

CLASSES, PER_CLASS = 12, 7


def encoded(classes=CLASSES, per_class=PER_CLASS, channels=1):
    """uint8 [classes, images, c, 2, 2]: class and image number above, 255 and 254 below."""
    images = torch.empty(classes, per_class, channels, 2, 2, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes, dtype=torch.uint8)[:, None, None]
    images[..., 0, 1] = torch.arange(per_class, dtype=torch.uint8)[:, None]
    images[..., 1, 0], images[..., 1, 1] = 255, 254
    return images


def decoded(x):
    """Of images [T, N, c, 2, 2]: class, image number and quarter turns, each [T, N]."""
    upright = torch.full(x.shape[:2], -1)
    pixels = (x[:, :, 0] * 255).round().long()
    read = pixels.clone()
    for turn in range(4):
        back = torch.rot90(pixels, -turn, (-2, -1))
        here = (back[..., 1, 0] == 255) & (back[..., 1, 1] == 254)
        upright[here], read[here] = turn, back[here]
    assert (upright >= 0).all()
    return read[..., 0, 0], read[..., 0, 1], upright


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(n_tasks=40, n_way=5, k_spt=2, k_qry=3, seed=0, images=None, rotations=False, **options):
    images = encoded() if images is None else images
    images = with_rotations(images) if rotations else images
    return sample_tasks(images, n_tasks, n_way, k_spt, k_qry, generator(seed), **options)


def test_shapes_and_types():
    tasks = draw(images=encoded(channels=3))
    assert tasks.x_spt.shape == (40, 10, 3, 2, 2) and tasks.x_qry.shape == (40, 15, 3, 2, 2)
    assert tasks.y_spt.shape == (40, 10) and tasks.y_qry.shape == (40, 15)
    assert tasks.x_spt.dtype == tasks.x_qry.dtype == torch.float32
    assert tasks.y_spt.dtype == tasks.y_qry.dtype == torch.int64


@pytest.mark.parametrize("rotations", [False, True])
def test_support_and_query_share_no_image(rotations):
    tasks = draw(rotations=rotations)
    x = torch.cat([tasks.x_spt, tasks.x_qry], 1)
    for row in torch.stack(decoded(x), -1):
        assert len(set(map(tuple, row.tolist()))) == 25


def test_all_images_of_a_class_can_be_used():
    tasks = draw(k_spt=3, k_qry=4)
    classes, images, _ = decoded(torch.cat([tasks.x_spt, tasks.x_qry], 1))
    for task_classes, task_images in zip(classes, images):
        for c in task_classes.unique():
            assert task_images[task_classes == c].sort().values.tolist() == list(range(PER_CLASS))


@pytest.mark.parametrize("rotations", [False, True])
def test_a_label_is_one_class_in_support_and_query_and_each_has_its_images(rotations):
    tasks = draw(rotations=rotations)
    (spt_classes, _, spt_turns), (qry_classes, _, qry_turns) = decoded(tasks.x_spt), decoded(tasks.x_qry)
    for t in range(40):
        seen = set()
        for label in range(5):
            spt, qry = tasks.y_spt[t] == label, tasks.y_qry[t] == label
            assert spt.sum() == 2 and qry.sum() == 3
            pairs = set(zip(spt_classes[t][spt].tolist(), spt_turns[t][spt].tolist()))
            pairs |= set(zip(qry_classes[t][qry].tolist(), qry_turns[t][qry].tolist()))
            assert len(pairs) == 1
            seen |= pairs
        assert len(seen) == 5
        assert set(tasks.y_spt[t].tolist()) == set(tasks.y_qry[t].tolist()) == set(range(5))


def label_of_class(tasks):
    """[T] dicts."""
    return [dict(zip(classes.tolist(), labels.tolist()))
            for classes, labels in zip(decoded(tasks.x_spt)[0], tasks.y_spt)]


def test_which_label_a_class_gets_is_drawn_anew():
    tasks = draw(n_tasks=400, n_way=4, images=encoded(classes=4))
    labels = torch.tensor([[mapping[c] for c in range(4)] for mapping in label_of_class(tasks)])  # [T, class]
    for c in range(4):
        counts = labels[:, c].bincount(minlength=4)
        assert (counts > 60).all(), "each about 100 of 400 times"


def test_classes_and_images_are_drawn_evenly():
    tasks = draw(n_tasks=2000, n_way=3, k_spt=1, k_qry=1)
    for x in (tasks.x_spt, tasks.x_qry):
        classes, images, turns = decoded(x)
        for values, count in ((classes, CLASSES), (images, PER_CLASS)):
            share = values.flatten().bincount(minlength=count) / values.numel()
            assert ((share * count - 1).abs() < 0.2).all()
        assert (turns == 0).all(), "nothing is turned unless asked for"


def test_same_state_same_tasks_and_the_state_moves_on():
    images, first, second = encoded(), generator(3), generator(3)
    one = [sample_tasks(images, 4, 5, 1, 2, first) for _ in range(2)]
    two = [sample_tasks(images, 4, 5, 1, 2, second) for _ in range(2)]
    for a, b in zip(one, two):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(one[0].x_qry, one[1].x_qry)
    assert not torch.equal(one[0].x_qry, sample_tasks(images, 4, 5, 1, 2, generator(4)).x_qry)


def test_global_generator_and_images_stay_as_they_were():
    images = encoded()
    before, state = images.clone(), torch.get_rng_state()
    draw(images=images, rotations=True, mean=(0.4,), std=(0.2,))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before)


def test_a_turned_image_is_the_whole_image_turned():
    generator_ = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, 4, 3, 5, 5), dtype=torch.uint8, generator=generator_)
    tasks = sample_tasks(with_rotations(images), 3, 4, 2, 2, generator())
    turned = {tuple(torch.rot90(image, turn, (1, 2)).flatten().tolist()): turn
              for image in images[0] for turn in range(4)}
    for x, y in zip(tasks.x_spt, tasks.y_spt):
        turns = [turned[tuple((image * 255).round().long().flatten().tolist())] for image in x]
        assert len(set(zip(turns, y.tolist()))) == 4 and set(turns) == {0, 1, 2, 3}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("mean, std", [((0.5, 0.25, 0.125), (0.5, 2.0, 4.0)), ((0.3,), (0.7,))])
def test_normalisation(mean, std, as_tensor):
    given = (torch.tensor(mean), torch.tensor(std)) if as_tensor else (mean, std)
    images = encoded(channels=3)
    raw, normalised = draw(images=images), draw(images=images, mean=given[0], std=given[1])
    assert raw.x_spt.min() >= 0 and raw.x_spt.max() == 1
    for x, found in ((raw.x_qry, normalised.x_qry), (raw.x_spt, normalised.x_spt)):
        for c in range(3):
            torch.testing.assert_close(found[:, :, c], (x[:, :, c] - mean[c % len(mean)]) / std[c % len(std)])


@pytest.mark.parametrize("options, text", [
    ({"n_way": 13}, "13-way tasks need 13 classes, here are 12"),
    ({"n_way": 49, "rotations": True}, "49-way tasks need 49 classes, here are 48"),
    ({"k_spt": 3, "k_qry": 5}, "support and .*query images need 8 per class, here are 7"),
])
def test_too_few(options, text):
    with pytest.raises(ValueError, match=text):
        draw(**options)


def test_chunks_cut_along_tasks_and_cat_puts_them_together():
    tasks = draw(n_tasks=5)
    tree = {"tasks": tasks, "list": [tasks.y_spt, None], "nothing": None}
    parts = [part for part, in module.chunks(2, 5, tree)]
    assert [len(part["tasks"].y_spt) for part in parts] == [2, 2, 1]
    assert all(isinstance(part["tasks"], Tasks) for part in parts)
    whole = module.cat(parts)
    assert all(torch.equal(a, b) for a, b in zip(whole["tasks"], tasks, strict=True))
    assert torch.equal(whole["list"][0], tasks.y_spt) and whole["list"][1] is whole["nothing"] is None
    double = module.chunked(lambda t, y: (2 * y, t.y_qry), 3, 5, tasks, tasks.y_spt)
    assert torch.equal(double[0], 2 * tasks.y_spt) and torch.equal(double[1], tasks.y_qry)


def sampler(images, seed=3, turns=1, k_qry=3):
    dataset = module.Dataset(str, 1, (0.0,), (1.0,), dict, None)
    return module.Sampler(images, dataset, torch.device("cpu"), seed, 3, 2, k_qry, turns)


def test_a_sampler_goes_back_to_a_state_and_gathers_what_it_drew():
    sample = sampler(encoded())
    sample(4)
    state = sample.state
    first = [sample(4), sample(4)]
    sample.state = state
    again = [sample.gather(sample.draw(4)), sample(4)]
    assert all(torch.equal(x, y) for a, b in zip(first, again, strict=True) for x, y in zip(a, b, strict=True))


def test_more_query_images_leave_the_first_ones_as_they_are():
    few, many = sampler(encoded(), k_qry=1)(6), sampler(encoded(), k_qry=4)(6)
    assert torch.equal(few.x_spt, many.x_spt)
    assert torch.equal(few.x_qry, many.x_qry.unflatten(1, (3, 4))[:, :, 0])


def test_a_character_never_meets_its_own_rotation():
    sample = sampler(with_rotations(encoded(classes=4)), turns=4)
    turns = set()
    for _ in range(20):
        classes, _, turned = decoded(sample(10).x_spt)
        assert all(len(set(row.tolist())) == 3 for row in classes)
        turns |= set(turned.flatten().tolist())
    assert turns == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="3-way tasks need 3 classes, here are 2"):
        sampler(with_rotations(encoded(classes=2)), turns=4)(1)
