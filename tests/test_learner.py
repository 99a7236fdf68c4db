"""Learner against the same network of torch.nn layers, for every layer type; its features, start, errors."""

import math
from functools import partial

import pytest
import torch
from oracle import forward

import miniimagenet_train
import omniglot_train
from learner import LAYERS, Learner

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)

# name of a case: (channels, image size, layers). Each ends flat, so that the order of values counts.
FLAT = ("flatten", [])
CASES = {
    "conv2d stride": (3, 9, [("conv2d", [4, 3, 3, 3, 2, 0]), ("conv2d", [5, 4, 2, 2, 1, 0]), FLAT]),
    "conv2d same": (3, 8, [("conv2d", [4, 3, 3, 3, 2, "same"]), FLAT]),
    "bn_shift": (3, 6, [("conv2d", [4, 3, 3, 3, 1, 0]), ("bn_shift", [4]), FLAT]),
    "mean": (3, 6, [("conv2d", [4, 3, 3, 3, 1, 0]), ("mean", []), ("linear", [2, 4])]),
    "convt2d stride": (3, 5, [("convt2d", [3, 4, 4, 4, 2, 1]), ("conv2d", [2, 4, 3, 3, 1, 0]), FLAT]),
    "bn": (3, 6, [("conv2d", [4, 3, 3, 3, 1, 0]), ("bn", [4]), FLAT]),
    "first conv2d and bn": (1, 6, [("conv2d", [9, 1, 3, 3, 1, 1]), ("bn", [9]), ("relu", [True]), FLAT]),
    "first conv2d and bn_shift": (3, 6, [("conv2d", [27, 3, 3, 3, 2, "same"]), ("bn_shift", [27]),
                                         ("max_pool2d", [2, 2, 0]), FLAT]),
    "first conv2d and bn of an even kernel": (1, 9, [("conv2d", [4, 1, 2, 2, 3, 0]), ("bn", [4]), FLAT]),
    "first conv2d and bn of single pixels": (3, 4, [("conv2d", [4, 3, 1, 1, 1, 0]), ("bn", [4]), FLAT]),
    "bn of features": (3, 4, [FLAT, ("linear", [6, 48]), ("bn", [6]), ("linear", [2, 6])]),
    "max_pool2d padding": (3, 8, [("conv2d", [4, 3, 3, 3, 1, 0]), ("max_pool2d", [3, 2, 1]), FLAT]),
    "avg_pool2d": (3, 8, [("conv2d", [4, 3, 3, 3, 1, 0]), ("avg_pool2d", [3, 2, 1]), FLAT]),
    "reshape": (3, 4, [("reshape", [12, 2, 2]), ("conv2d", [4, 12, 2, 2, 1, 0]), FLAT]),
    "reshape to an image": (3, 4, [FLAT, ("linear", [12, 48]), ("reshape", [3, 2, 2]), ("bn", [3]), FLAT]),
    "all": (3, 16, [("conv2d", [6, 3, 3, 3, 1, 1]), ("bn", [6]), ("relu", [True]), ("max_pool2d", [2, 2, 0]),
                    ("convt2d", [6, 4, 3, 3, 1, 1]), ("leakyrelu", [0.1, True]), ("upsample", [2]),
                    ("tanh", []), ("avg_pool2d", [4, 4, 0]), ("sigmoid", []), ("reshape", [16, 2, 2]), FLAT,
                    ("linear", [5, 64])]),
}


def make(case):
    """(the Learner in float64 with random weights everywhere, images of 3 tasks with 4 samples each)"""
    imgc, imgsz, config = CASES[case]
    torch.manual_seed(0)
    net = Learner(config, imgc, imgsz).double()
    for weight in net.weights.values():
        weight.data += 0.3 * torch.randn_like(weight)
    return net, torch.randn(3, 4, imgc, imgsz, imgsz, dtype=torch.float64)


def output_and_gradients(output, inputs):
    """The gradients are of a loss that tells all outputs apart, with respect to inputs: one list of tensors."""
    loss = (output.sin() * torch.linspace(1, 2, output.numel(), dtype=output.dtype).view(output.shape)).sum()
    return [output.detach(), *torch.autograd.grad(loss, inputs)]


def test_every_layer_type_has_a_case():
    assert {name for _, _, config in CASES.values() for name, _ in config} == set(LAYERS)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_set_of_weights_on_images_and_on_tasks(case, given):
    """Evaluation is training, and no statistics are kept."""
    net, x = make(case)
    assert torch.equal(net.eval()(x), net.train()(x)) and list(net.buffers()) == []
    weights = {name: (1.1 * w).detach().requires_grad_() for name, w in net.weights.items()} if given else net.weights
    own = weights if given else None
    inputs = [x.requires_grad_(), *weights.values()]
    expected = torch.stack([forward(net.config, weights, task)[0] for task in x])  # batch norm is task by task
    assert_close(output_and_gradients(torch.stack([net(x[0], own), *net(x[1:], own)]), inputs),
                 output_and_gradients(expected, inputs))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tasks", [1, 3])
def test_tasks_with_weights_of_their_own(case, tasks):
    net, x = make(case)
    x = x[:tasks]
    weights = {name: (w + 0.2 * torch.randn(tasks, *w.shape, dtype=w.dtype)).detach().requires_grad_()
               for name, w in net.weights.items()}
    inputs = [x.requires_grad_(), *weights.values()]
    expected = torch.stack([forward(net.config, {name: w[t] for name, w in weights.items()}, images)[0]
                            for t, images in enumerate(x)])
    expected = output_and_gradients(expected, inputs)
    assert_close(output_and_gradients(net(x, weights), inputs), expected)
    logits, _, *gradients = expected
    for images in (x.detach(), net.patches(x.detach())):  # without a gradient of theirs
        assert_close(output_and_gradients(net(images, weights), inputs[1:]), [logits, *gradients])
    for images in (x, x.detach()):
        halves = [net(half, weights) for half in images.split(2, 1)]
        assert_close([net(images, weights, groups=2)], [torch.cat(halves, 1)])


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_of_the_first_block_whose_features_it_changes(case):
    net, x = make(case)
    before = net(x, features=True)[1]
    for name, weight in net.weights.items():
        after = net(x, {**net.weights, name: weight + torch.randn_like(weight)}, features=True)[1]
        changed = [not torch.allclose(*features) for features in zip(before, after)]
        if any(changed):  # batch norm removes a bias before it
            assert net.block(name) == 1 + changed.index(True), name


# ---- the scripts' networks ----

@pytest.mark.parametrize("net", ["conv_bn_relu", "original"])
@pytest.mark.parametrize("script, weights, dims", [
    (omniglot_train, 91_781, [10816, 64 * 6 * 6, 64 * 2 * 2, 64, 5]),
    (miniimagenet_train, 32_901, [53792, 32 * 19 * 19, 32 * 8 * 8, 800, 5])])
def test_number_of_weights_and_features_of_the_blocks(script, weights, dims, net):
    """Features up to the order of values in a row: products of rows don't depend on it."""
    torch.manual_seed(0)
    learner = script.network(script.arguments(["--net", net])).double()
    assert sum(w.numel() for w in learner.parameters()) == weights
    x = torch.randn(4, *learner.input_shape, dtype=torch.float64)
    logits, features = learner(x, features=True)
    assert learner.blocks == ["block1", "block2", "block3", "block4", "logits"]
    assert [f.shape for f in features] == [(4, d) for d in dims] and torch.equal(features[-1], logits)
    assert_close(learner(x[None], features=True)[1], [f[None] for f in features])
    assert_close([logits], [features[-2] @ learner.weights[learner.classifier].T + learner.weights[learner.head[1]]])
    for got, rows in zip(features, forward(learner.config, learner.weights, x)[1], strict=True):
        assert_close([got @ got.T, got.sort().values], [rows @ rows.T, rows.sort().values])


def test_initial_weights():
    torch.manual_seed(1)
    net = omniglot_train.network(omniglot_train.arguments([]))
    plain = Learner(net.config, *net.input_shape[:2])
    for name, weight in (*net.weights.items(), *plain.weights.items()):
        if "bn_weight" in name:
            assert (weight == 1).all()
        elif name.endswith("bias"):
            assert (weight == 0).all()
        else:
            std, n = math.sqrt(2 / weight[0].numel()), weight.numel()
            assert weight.std().item() == pytest.approx(std, rel=3 / math.sqrt(n))
            assert abs(weight.mean().item()) < 4 * std / math.sqrt(n)


@pytest.mark.parametrize("config, text", [
    ([("conv2d", [4, 3, 3, 3, 1, 0]), ("conv", [])], r"layer 1, conv.*unknown layer 'conv'; there are conv2d"),
    ([("conv2d", [4, 3, 3, 1, 0])], r"layer 0, conv2d.*must be \[out, in"), ([("tanh", [1])], r"layer 0, tanh.*\[\]"),
    ([("conv2d", [4, 3, 3, 2, 1, 0])], r"layer 0, conv2d.*square"),
    ([("conv2d", [4, 3, 9, 9, 1, 0])], r"layer 0, conv2d.*Kernel size can't be greater"),
    ([("conv2d", [4, 3, 3, 3, 1, 0]), ("bn", [3])], r"layer 1, bn.*takes 3 channels, not 4"),
    ([("max_pool2d", [2, 2, 0]), ("max_pool2d", [5, 2, 0])], r"layer 1, max_pool2d.*too small"),
    ([FLAT, ("linear", [5, 100])], r"layer 1, linear.*takes \[100\], not \[192\]"),
    ([FLAT, ("mean", [])], r"layer 1, mean.*takes an image"),
    ([("bn", 3), ("tanh", None)], r"layer 1, tanh.*\[\]"),
    ([("conv2d", [4, 3, 3, 3, 2.0, 0])], r"layer 0, conv2d.*stride must be an integer >= 1, not 2.0"),
    ([("conv2d", [4, 3, 3, 3, 0, 0])], r"layer 0, conv2d.*stride must be an integer >= 1, not 0"),
    ([("conv2d", [4, 3, 3, 3, 1, "valid"])], r"layer 0, conv2d.*padding must .*, or \"same\", not 'valid'"),
    ([("convt2d", [3, 4, 3, 3, 1, "same"])], r"layer 0, convt2d.*padding must be an integer >= 0, not 'same'"),
    ([("reshape", [3, 4, 16]), ("conv2d", [4, 3, 3, 3, 1, "same"])], r"layer 1, conv2d.*takes square images"),
    ([], "there are no layers"), ([("reshape", [3, 64])], r"layer 0, reshape.*takes \[features\] or \[c, h, w\]"),
    (["nope"], r"layer 0, 'nope': must be a pair \(name, params\)"), ([("tanh",)], r"layer 0, .*must be a pair"),
    ([("upsample", ["x"])], r"layer 0, upsample.*invalid combination.*of:$")])
def test_layers_that_do_not_fit_are_refused_by_name(config, text):
    with pytest.raises(ValueError, match=text):
        Learner(config, imgc=3, imgsz=8)


def test_weights_of_other_tasks_than_the_images(case="first conv2d and bn"):
    net, x = make(case)
    weights = net.per_task(net.weights, 3)
    for images in (x[0], x[:1], x[:2]):
        with pytest.raises(ValueError, match="tasks, and the weights are of another number"):
            net(images, weights)
