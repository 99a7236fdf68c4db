"""Sampled tasks, of images whose pixels say which class and image they are: a task can be read back."""

import textwrap
from pathlib import Path

import pytest
import torch

import tasks as module
from tasks import Tasks, with_rotations
from training import held_out_tasks

CLASSES, PER_CLASS = 12, 7


def encoded(classes=CLASSES, per_class=PER_CLASS, channels=1):
    """uint8 [classes, images, c, 2, 2]: class and image number above, 255 and 254 below."""
    images = torch.empty(classes, per_class, channels, 2, 2, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes, dtype=torch.uint8)[:, None, None]
    images[..., 0, 1] = torch.arange(per_class, dtype=torch.uint8)[:, None]
    images[..., 1, 0], images[..., 1, 1] = 255, 254
    return images


def decoded(x):
    """Of images [T, N, c, 2, 2]: class, image number and quarter turns, [3, T, N]."""
    upright = torch.full(x.shape[:2], -1)
    pixels = (x[:, :, 0] * 255).round().long()
    read = pixels.clone()
    for turn in range(4):
        back = torch.rot90(pixels, -turn, (-2, -1))
        here = (back[..., 1, 0] == 255) & (back[..., 1, 1] == 254)
        upright[here], read[here] = turn, back[here]
    assert (upright >= 0).all()
    return torch.stack([read[..., 0, 0], read[..., 0, 1], upright])


def sampler(images=None, seed=0, n_way=5, k_spt=2, k_qry=3, mean=(0.0,), std=(1.0,), **options):
    dataset = module.Dataset(str, 1, mean, std, dict, None)
    images = encoded() if images is None else images
    return module.Sampler(images, dataset, torch.device("cpu"), seed, n_way, k_spt, k_qry, **options)


def equal(*pairs):
    return all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("images", [encoded(), with_rotations(encoded())])
def test_a_label_is_one_class_and_support_and_query_share_no_image(images):
    tasks = sampler(images)(40)
    assert tasks.x_spt.shape == (40, 10, 1, 2, 2) and tasks.x_qry.shape == (40, 15, 1, 2, 2)
    assert tasks.x_qry.dtype == torch.float32 and tasks.y_qry.dtype == torch.int64
    found = torch.cat([decoded(tasks.x_spt), decoded(tasks.x_qry)], 2).permute(1, 2, 0)  # [T, N, 3]
    for drawn, labels in zip(found.tolist(), torch.cat([tasks.y_spt, tasks.y_qry], 1).tolist()):
        assert len(set(map(tuple, drawn))) == 25
        classes = {(label, klass, turn) for label, (klass, _, turn) in zip(labels, drawn)}
        assert len(classes) == 5 and {label for label, *_ in classes} == set(range(5))
    for y, k in ((tasks.y_spt, 2), (tasks.y_qry, 3)):
        assert all(torch.equal(row.bincount(), torch.full((5,), k)) for row in y)


def test_classes_labels_and_images_are_drawn_evenly():
    tasks = sampler(n_way=3, k_spt=1, k_qry=1)(2000)
    for x, labels in ((tasks.x_spt, tasks.y_spt), (tasks.x_qry, tasks.y_qry)):
        classes, images, turns = decoded(x)
        for values, count in ((classes, CLASSES), (images, PER_CLASS), (labels * CLASSES + classes, 3 * CLASSES)):
            share = values.flatten().bincount(minlength=count) / values.numel()
            assert ((share * count - 1).abs() < 0.3).all()
        assert (turns == 0).all(), "nothing is turned unless asked for"


def test_normalisation_and_nothing_else_changes():
    mean, std = (0.5, 0.25, 0.125), (0.5, 2.0, 4.0)
    images = encoded(channels=3)
    before, state = images.clone(), torch.get_rng_state()
    raw, normalised = sampler(images)(40), sampler(images, mean=mean, std=std)(40)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before)
    assert raw.x_spt.min() >= 0 and raw.x_spt.max() == 1
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    for x, found in ((raw.x_qry, normalised.x_qry), (raw.x_spt, normalised.x_spt)):
        torch.testing.assert_close(found, (x - mean) / std)


@pytest.mark.parametrize("options, text", [
    ({"images": encoded().float()}, "images are torch.float32 and must be uint8"),
    ({"n_way": 13}, "13-way tasks need 13 classes, here are 12"),
    ({"turns": 5}, "12 classes with rotations are not 5 rotations of 2 classes"),
    ({"counts": [7] * 11}, "12 classes with rotations are not 1 rotations of 11 classes"),
    ({"turns": 4}, "5-way tasks need 5 classes, here are 3"),
    ({"k_spt": 3, "k_qry": 5}, "support and query images need 8 per class, and one class has 7"),
    ({"counts": [7, 4] * 6}, "support and query images need 5 per class, and one class has 4")])
def test_what_a_sampler_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        sampler(**options)


def test_the_loop_of_the_docstring(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in module.__doc__.split("\n") if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(lines)).replace("range(1_000)", "range(2)").replace("val(100)", "val(4)"), {})
    assert capsys.readouterr().out.count("tensor([") == 2 and Path("weights.pt").exists()


def test_classes_of_unequal_size():
    counts = torch.tensor([5, 7] * 6)
    tasks = sampler(counts=counts)(400)
    classes, images, _ = decoded(torch.cat([tasks.x_spt, tasks.x_qry], 1))
    for klass, count in enumerate(counts):
        assert images[classes == klass].unique().tolist() == list(range(count))


def test_a_sampler_goes_back_to_a_state_and_gathers_what_it_drew():
    sample = sampler()
    sample(4)
    state = sample.generator.get_state()
    first, second = sample(4), sample(4)
    sample.generator.set_state(state)
    again = sample.gather(sample.draw(4))
    assert equal(first, again) and equal(second, sample(4)) and not torch.equal(first.x_qry, second.x_qry)
    assert not torch.equal(sampler()(4).x_qry, sampler(seed=4)(4).x_qry)


def test_a_larger_query_set_begins_with_the_smaller_one():
    few, more = sampler(k_qry=1), sampler(k_qry=1, nc_qry=4)
    for _ in range(3):
        index = more.draw(6)
        tasks, measured = more.gather(index), more.gather(index, measured=True)
        assert equal(few(6), tasks) and measured.x_qry.shape[1] == 20
        assert torch.equal(measured.x_qry.unflatten(1, (5, 4))[:, :, 0], tasks.x_qry)


def test_fewer_held_out_tasks_are_the_first_of_more():
    few, more = (module.cat([part for _, part in held_out_tasks(sampler(), n_tasks, 7)]) for n_tasks in (20, 60))
    assert all(len(one) == 20 and torch.equal(one, other[:20]) for one, other in zip(few, more, strict=True))


def test_a_character_never_meets_its_own_rotation_and_its_class_is_the_index_drawn():
    sample, turns = sampler(with_rotations(encoded(classes=4)), n_way=3, turns=4), set()
    for _ in range(20):
        index = sample.draw(10)
        tasks = sample.gather(index)
        for x, y in ((tasks.x_spt, tasks.y_spt), (tasks.x_qry, tasks.y_qry)):
            classes, _, turned = decoded(x)
            assert torch.equal(4 * classes + turned, index[0][..., 0].gather(1, y))
        assert all(len(set(row.tolist())) == 3 for row in classes)
        turns |= set(turned.flatten().tolist())
    assert turns == {0, 1, 2, 3}


def test_chunks_cut_along_tasks_and_cat_puts_them_together():
    tasks = sampler()(5)
    tree = {"tasks": tasks, "list": [tasks.y_spt, None], "nothing": None}
    parts = [part for part, in module.chunks(4, 5, tree)]
    assert [len(part["tasks"].y_spt) for part in parts] == [3, 2]
    whole = module.cat(parts)
    assert isinstance(whole["tasks"], Tasks) and equal(whole["tasks"], tasks)
    assert torch.equal(whole["list"][0], tasks.y_spt) and whole["list"][1] is whole["nothing"] is None
    double = module.chunked(lambda t, y: (2 * y, t.y_qry), 3, 5, tasks, tasks.y_spt)
    assert torch.equal(double[0], 2 * tasks.y_spt) and torch.equal(double[1], tasks.y_qry)
