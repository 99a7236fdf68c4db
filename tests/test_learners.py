"""The paper's network, the learners that MAML is compared with, and answers without transduction, each recomputed."""

import copy
from functools import partial

import oracle
import pytest
import test_meta
import torch
import torch.nn.functional as F

import miniimagenet_train
import omniglot_train
from baselines import BASELINES
from learner import Learner
from measuring import accuracies, one_by_one
from meta import Meta, adapt, meta_gradient

make_tasks = partial(test_meta.make_tasks, n_tasks=3, n_way=5, k_qry=3, imgsz=28)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = omniglot_train.network(omniglot_train.arguments(["--net", "paper"])).double()
    for name, weight in net.weights.items():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return net


def plain(net, x, weights):
    """One task's images by torch's own layers: (the classifier's input, logits)."""
    logits, features = oracle.forward(net.config, weights, x)
    return features[-2], logits


@pytest.mark.parametrize("script", [omniglot_train, miniimagenet_train])
@pytest.mark.parametrize("flags, layer", [
    ("--net paper", "bn_shift"), ("--net paper --bn_scale", "bn"), ("--net conv_bn_relu --no-bn_scale", "bn_shift"),
    ("--net original", "bn"), ("--net conv_bn_relu --spatial_mean", "mean"),
    ("--net paper --no-spatial_mean", "flatten")])
def test_flags_that_change_one_layer_of_a_network(script, flags, layer):
    config = script.layers(script.arguments(flags.split()))
    kind = ("bn", "bn_shift") if layer.startswith("bn") else ("mean", "flatten")
    assert {name for name, _ in config} & set(kind) == {layer}


def test_the_papers_sizes_and_initial_weights():
    def weights(script, flags):
        torch.manual_seed(0)
        return script.network(script.arguments(flags.split())).weights

    paper = weights(miniimagenet_train, "--net paper")
    assert paper["17_linear_weight"].shape == (5, 800)
    bound = (6 / (9 * 32 + 9 * 32)) ** 0.5  # Xavier, uniform
    for kernel in (paper["4_conv2d_weight"], weights(miniimagenet_train, "--conv_init xavier")["4_conv2d_weight"]):
        assert 0.95 * bound < kernel.abs().max() <= bound and abs(kernel.mean()) < 0.02 * bound
    for flags, expected in (("", 1), ("--head_std 0.2", 0.2), ("--conv_init kaiming", 1)):
        head = weights(omniglot_train, f"--net paper --n_way 20 {flags}")["13_linear_weight"]
        assert head.std().item() == pytest.approx(expected, rel=0.06)
    kernel = weights(omniglot_train, "--net paper --conv_init kaiming")["0_conv2d_weight"]
    assert kernel.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.06)  # fan in: 9


@pytest.mark.parametrize("learner, first_order", [("maml", False), ("maml", True), ("anil", False)])
def test_a_frozen_head_stays_in_theta_and_all_else_trains_as_without(net, learner, first_order):
    tasks, free = make_tasks(), copy.deepcopy(net)
    options = dict(update_lr=0.5, update_step=2, first_order=first_order, learner=learner)
    frozen = Meta(net, freeze_head=True, **options)
    before = {name: weight.clone() for name, weight in net.weights.items()}
    Meta(free, **options)(tasks)
    frozen(tasks)
    for name, weight in net.weights.items():
        if name in net.head:
            assert torch.equal(weight, before[name]) and not torch.equal(free.weights[name], before[name])
        elif name != "0_conv2d_bias":  # batch norm removes it: it has no gradient
            assert torch.equal(weight, free.weights[name]) and not torch.equal(weight, before[name])
    frozen(tasks)
    assert all(torch.equal(net.weights[name], before[name]) for name in net.head)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("head_lr", [None, 0.2])
@pytest.mark.parametrize("learner, blocks, changes", [
    ("maml", None, lambda name: "bn_shift" not in name), ("anil", None, lambda name: "linear" in name),
    ("boil", None, lambda name: "linear" not in name and "bn_shift" not in name),
    ("maml", [2, 3], lambda name: name.startswith(("3_", "6_")))])
def test_which_weights_the_inner_loop_adapts(net, learner, blocks, changes, head_lr, second_order):
    """The weights after adaptation, and the meta-gradient."""
    tasks, steps = make_tasks(n_tasks=2), 2
    maml = Meta(net, update_lr=0.5, learner=learner, head_lr=head_lr, adapt_blocks=blocks)

    def lr(name):
        return head_lr if head_lr and "linear" in name else 0.5

    trajectory = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, maml.rates, steps)
    gradient, losses, *_ = meta_gradient(net, tasks, maml.rates, steps, not second_order)
    for task, (x, y) in enumerate(zip(tasks.x_spt, tasks.y_spt)):
        weights = oracle.adapt(net.config, net.weights, x, y, lr, steps, changes=changes)[-1]
        for name, weight in weights.items():
            torch.testing.assert_close(trajectory[-1][name][task], weight.detach())
            assert changes(name) != torch.equal(weight, net.weights[name])
    loss, expected = oracle.meta_gradient(net.config, net.weights, tasks, lr, steps, second_order, changes)
    torch.testing.assert_close(losses.mean(), loss)
    torch.testing.assert_close(gradient, [len(losses) * g for g in expected.values()])


def test_networks_that_are_refused(net):
    with pytest.raises(ValueError, match="set net.classes before Meta"):
        Meta(net, learner="classifier")(make_tasks())
    net.classes = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="give each step the tasks' classes"):
        Meta(net, learner="classifier")(make_tasks())
    net.weights["0_conv2d_bias"].requires_grad_(False)
    with pytest.raises(ValueError, match="Meta trains all weights"):
        Meta(net)
    without = Learner([("flatten", []), ("linear", [5, 784]), ("linear", [5, 5])], imgc=1, imgsz=28)
    with pytest.raises(ValueError, match="maml: there are no weights that its inner loop adapts; .* or adapt"):
        Meta(without, adapt_blocks=[1])
    with pytest.raises(ValueError, match="the last layer is relu and must be linear"):
        Meta(Learner([("flatten", []), ("linear", [5, 784]), ("relu", [True])], imgc=1, imgsz=28))
    with pytest.raises(ValueError, match="tasks have 4 classes, and the network has 5 outputs"):
        Meta(Learner([("flatten", []), ("linear", [5, 784])], imgc=1, imgsz=28)).finetune(make_tasks(n_way=4))


def test_prototypical_network(net):
    tasks = make_tasks(k_spt=2)
    losses = []
    for x_spt, y_spt, x_qry, y_qry in zip(*tasks):
        support, query = (plain(net, x, net.weights)[0] for x in (x_spt, x_qry))
        means = torch.stack([support[y_spt == label].mean(0) for label in range(5)])
        losses.append(F.cross_entropy(-torch.cdist(query, means) ** 2, y_qry))
    gradient, ours, right = BASELINES["protonet"](net, tasks)
    torch.testing.assert_close(ours, torch.stack(losses).detach())
    expected = torch.autograd.grad(sum(losses), list(net.parameters()), materialize_grads=True)
    torch.testing.assert_close(gradient, list(expected))
    assert gradient[-1].abs().max() == 0 < gradient[0].abs().max()
    for every_step in (False, True):  # never of the head, which nothing trains
        step = Meta(copy.deepcopy(net), learner="protonet", nc_every=0)(tasks, every_step)
        assert step.accuracy.tolist() == right[:, None].tolist()


def test_classifier_of_all_classes(net):
    tasks, classes = make_tasks(), torch.stack([torch.randperm(12)[:5] for _ in range(3)])
    net.classes = torch.nn.Linear(64, 12).double()
    images = torch.cat([tasks.x_spt, tasks.x_qry], 1).flatten(0, 1)
    labels = torch.cat([classes.gather(1, y) for y in (tasks.y_spt, tasks.y_qry)], 1).flatten()
    loss = F.cross_entropy(net.classes(plain(net, images, net.weights)[0]), labels)
    expected = torch.autograd.grad(loss * len(tasks.y_spt), list(net.parameters()), materialize_grads=True)
    gradient, losses, _ = BASELINES["classifier"](net, tasks, classes)
    torch.testing.assert_close(losses.mean(), loss.detach())
    torch.testing.assert_close(gradient, list(expected))


@pytest.mark.parametrize("k_spt, every_query", [(1, True), (2, False)])
def test_accuracies_with_transduction_and_without(net, k_spt, every_query):
    tasks = make_tasks(k_spt=k_spt)
    trajectory = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, 2.0, 1)
    together, alone = accuracies(net, tasks, trajectory), one_by_one(net, tasks, trajectory, every_query)
    for k, weights in enumerate(trajectory):
        for task, (x_spt, y_spt, x_qry, y_qry) in enumerate(zip(*tasks)):
            own = {name: w[task] for name, w in weights.items()}

            def right(support, features, logits, y, y_spt=y_spt):
                means = torch.stack([support[y_spt == label].mean(0) for label in range(5)])
                nearest = torch.cdist(features, means).argmin(-1)
                return [(answers == y).double().mean().item() for answers in (logits.argmax(-1), nearest)]

            support, _ = plain(net, x_spt, own)
            expected, each = right(support, *plain(net, x_qry, own), y_qry), []
            for i in range(0, 15, 1 if every_query else 3):  # each query with the support set and nothing else
                features, logits = plain(net, torch.cat([x_spt, x_qry[i:i + 1]]), own)
                each.append(right(features[:-1], features[-1:], logits[-1:], y_qry[i]))
            for values, wanted in ((together, expected), (alone, torch.tensor(each).mean(0).tolist())):
                assert [values[name][task, k] for name in ("accuracy", "nearest_mean")] == pytest.approx(wanted)
