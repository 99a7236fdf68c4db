"""Per-task layers against native convolutions, pools and elementary batch norm: values, two derivatives."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import taskwise

TASKS = [1, 3]
# kernel, stride, padding, size: some sizes are no multiple of the stride, some kernels as large as the image
GEOMETRIES = [(3, 2, (0, 0), 8), (3, 2, (0, 0), 7), (2, 1, (0, 0), 2), (1, 1, (0, 0), 4), (3, 2, (1, 1), 6),
              (5, 1, (2, 2), 5), (2, 3, (0, 0), 9), (3, 1, (1, 1), 1), (3, 2, (0, 1), 8)]


def native_conv2d(x, weight, bias, stride=1, padding=(0, 0)):
    x = F.pad(x, (0, 0, *padding, *padding))
    return torch.stack([F.conv2d(images.permute(0, 3, 1, 2), w, b, stride).permute(0, 2, 3, 1)
                        for images, w, b in zip(x, weight, bias)])


def elementary_batch_norm(x, weight, bias):
    """F.batch_norm can't be differentiated twice without a scale."""
    rows = x.flatten(1, -2)
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    xhat = (rows - mean) / (variance + 1e-5).sqrt()
    return ((xhat if weight is None else weight[:, None] * xhat) + bias[:, None]).view(x.shape)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def batch_norm_inputs(tasks, *middle):
    return [random(tasks, *middle, 3), random(tasks, 3, seed=1), random(tasks, 3, seed=2)]


def dead_channel(tasks):
    """As behind a dead relu: variance 0, derivatives finite and large."""
    x, weight, bias = batch_norm_inputs(tasks, 4, 2)
    x.data[..., 1] = 0.25
    return [x, weight, bias]


def conv(kernel, stride, padding, size):
    """(ours, native, inputs by number of tasks)"""
    layers = [partial(layer, stride=stride, padding=padding) for layer in (taskwise.conv2d, native_conv2d)]
    return *layers, lambda tasks: [random(tasks, 2, size, size, 3), random(tasks, 4, 3, kernel, kernel, seed=1),
                                   random(tasks, 4, seed=2)]


BATCH_NORMS = taskwise.batch_norm, elementary_batch_norm
LAYERS = {
    **{f"conv2d-{'-'.join(map(str, geometry))}": conv(*geometry) for geometry in GEOMETRIES},
    "batch_norm": (*BATCH_NORMS, lambda tasks: batch_norm_inputs(tasks, 4, 3, 2)),
    "batch_norm-no_scale": (*(lambda x, bias, norm=norm: norm(x, None, bias) for norm in BATCH_NORMS),
                            lambda tasks: batch_norm_inputs(tasks, 4, 3, 2)[::2]),
    "batch_norm-flat": (*BATCH_NORMS, lambda tasks: batch_norm_inputs(tasks, 5)),
    "batch_norm-dead_channel": (*BATCH_NORMS, dead_channel),
    "max_pool2d": (
        lambda x: taskwise.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(
            x.movedim(-1, 2).flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2]).movedim(2, -1),
        lambda tasks: [random(tasks, 2, 7, 7, 3)])}


def derivatives(layer, inputs, wrt, then_wrt):
    """The value, first derivatives with respect to inputs `wrt`, and second ones, of those along a direction each."""
    value = layer(*inputs)
    g = random(*value.shape, seed=5)
    first = torch.autograd.grad(value, [inputs[i] for i in wrt], g, create_graph=True)
    loss = sum((random(*f.shape, seed=7 + i).detach() * f).sum() for i, f in zip(wrt, first))
    second = torch.autograd.grad(loss, [*(inputs[i] for i in then_wrt), g], materialize_grads=True)
    return [value, *first, *second]


def check(ours, native, inputs, wrt=None, then_wrt=None):
    """Value and both derivatives, with respect to all inputs or some."""
    every = range(len(inputs))
    got, expected = (derivatives(layer, inputs, wrt or every, then_wrt or every) for layer in (ours, native))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * max(1, other.abs().max().item()))


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name, tasks):
    ours, native, make = LAYERS[name]
    check(ours, native, make(tasks))


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv2d")])
def test_large_tasks_as_groups_of_one_call(name, monkeypatch):
    monkeypatch.setattr(taskwise, "_native", lambda *_: True)
    ours, native, make = LAYERS[name]
    x, *own = make(3)
    shared = [w[:1].expand_as(w) for w in own]  # as in the first inner step
    for weights in (own, shared):
        check(ours, native, [x, *weights])


@pytest.mark.parametrize("onednn, processor, native", [
    (True, "AMD EPYC", True), (False, "AMD EPYC", False), (True, "Intel(R) Xeon(R) Processor", False)])
def test_which_tasks_are_large(onednn, processor, native, monkeypatch):
    """By the sizes of the paper's blocks, of a first layer, and of a map of 2 x 2; one task is always one call."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(taskwise, "device_name", lambda device: processor)
    monkeypatch.setattr(taskwise, "_fast_products", taskwise._fast_products.__wrapped__)  # not cached
    for images, side, channels, large in ((5, 15, 64, True), (5, 9, 64, True), (5, 5, 64, False), (20, 29, 1, False),
                                          (20, 6, 64, False)):
        x, weight = torch.empty(4, images, side, side, channels), torch.empty(4, 64, channels, 3, 3)
        assert taskwise._native(x, weight, 2) == (large and native)
        assert taskwise._native(x[:1], weight, 2)


SOME = [some for count in (1, 2, 3) for some in itertools.combinations(range(3), count)]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", ["conv2d-3-2-(1, 1)-6", "batch_norm"])
def test_second_derivative_of_some_first_ones_with_respect_to_some_inputs(name, tasks):
    """Every combination; so also images that ask for no gradient, as in the first layer of the inner loop."""
    ours, native, make = LAYERS[name]
    for first, second in itertools.product(SOME, SOME):
        inputs = make(tasks)
        for i, x in enumerate(inputs):
            x.requires_grad_(i in first + second)
        check(ours, native, inputs, first, second)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("rows, change, tolerance", [
    (200, lambda x: x + 300, 1e-3),  # a mean far larger than the spread
    (400_000, lambda x: (x + 1).relu(), 1e-5)])  # torch's own kernel for channels last on a CPU is off by 1e-3 here
def test_batch_norm_in_float32(rows, change, tolerance, tasks):
    x, weight, bias = (values.detach().float() for values in batch_norm_inputs(tasks, rows))
    x = change(x)
    exact = elementary_batch_norm(x.double(), weight.double(), bias.double())
    assert (taskwise.batch_norm(x, weight, bias) - exact).abs().max() < tolerance


@pytest.mark.parametrize("offset", [0, 300])
def test_conv_bn_in_float32_of_smooth_images(offset):
    """An edge filter answers them with a small part of their variance, and a mean with a small part of the offset."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 84), torch.linspace(0, 3, 84), indexing="ij")
    images = torch.stack([(a * x).sin() * (b * y).cos() for a, b in ((1, 2), (2, 3), (3, 1))])[None, :, None] + offset
    edges = torch.tensor([[0.0, 10, 0], [10, -40, 10], [0, 10, 0]])
    weight = torch.stack([edges, torch.full((3, 3), 0.1)])[None, :, None]
    scale, shift = torch.ones(1, 2), torch.zeros(1, 2)
    got = taskwise.conv_bn(taskwise.patches(images, 3), weight, shift, scale, shift)
    exact = native_conv2d(images.permute(0, 1, 3, 4, 2).double(), weight.double(), shift.double())
    torch.testing.assert_close(got.double(), elementary_batch_norm(exact, scale, shift), rtol=0, atol=1e-3)


def test_conv_bn_in_float32_of_no_variance():
    """A sum of rows and columns, which these kernels remove: rounding makes the variance of some of them negative."""
    images = (random(12, 1, seed=1) + random(1, 12, seed=2)).detach().float().expand(1, 1, 1, 12, 12)
    weight = torch.zeros(1, 4, 1, 3, 3)
    for i, (row, col) in enumerate(itertools.product(range(2), repeat=2)):
        weight[0, i, 0, row:row + 2, col:col + 2] = torch.tensor([[1000.0, -1000], [-1000, 1000]])
    shift = torch.zeros(1, 4)
    assert taskwise.conv_bn(taskwise.patches(images, 3), weight, shift, None, shift).isfinite().all()


@pytest.mark.filterwarnings("ignore:Using backward")  # of a cycle of references
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", ["conv2d-3-2-(0, 0)-7", "conv2d-3-2-(0, 1)-8", "batch_norm", "max_pool2d"])
def test_third_derivative_raises(name, tasks):
    layer, _, make = LAYERS[name]
    inputs = make(tasks)
    first = torch.autograd.grad(layer(*inputs).pow(4).sum(), inputs, create_graph=True)
    loss = sum(f.square().sum() for f in first)
    for x in inputs:
        with pytest.raises(RuntimeError, match="no third derivatives"):
            torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivatives"):
        loss.backward(create_graph=True)
