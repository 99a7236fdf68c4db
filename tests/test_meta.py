"""MAML against the plain loop over tasks, torch's own optimisers and finite differences, all in float64."""

import argparse
import copy
import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F

import device
import meta
import miniimagenet_train
import nc_metrics
import omniglot_train
from learner import Learner
from meta import Meta, adapt
from tasks import Tasks

N_WAY = 3
SMALL = [("conv2d", [4, 1, 3, 3, 1, 0]), ("bn", [4]), ("relu", [True]), ("max_pool2d", [2, 2, 0]),
         ("conv2d", [5, 4, 2, 2, 1, 0]), ("bn", [5]), ("relu", [True]),
         ("flatten", []), ("linear", [N_WAY, 45])]
SMOOTH = [("conv2d", [4, 1, 3, 3, 1, 0]), ("bn", [4]), ("tanh", []), ("avg_pool2d", [2, 2, 0]),
          ("conv2d", [5, 4, 2, 2, 1, 0]), ("bn", [5]), ("sigmoid", []),
          ("flatten", []), ("linear", [N_WAY, 45])]
CHUNKS = [(1, 1), (4, 1), (4, 4), (2, 1), (2, 2), (3, 2), (1, 4)]


def small_net(config=SMALL, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = Learner(config, 1, 10)
    with torch.no_grad():
        for weight in net.weights.values():  # away from where all biases are 0
            weight += 0.1 * torch.randn_like(weight)
    return net.to(dtype)


def make_tasks(n_tasks=4, n_way=N_WAY, k_spt=1, k_qry=4, imgc=1, imgsz=10, seed=0, dtype=torch.float64):
    """Noise around a pattern for each class, rows in a random order."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(n_tasks, n_way, imgc, imgsz, imgsz, generator=generator, dtype=torch.float64)

    def images(k):
        labels = torch.stack([torch.arange(n_way).repeat(k)[torch.randperm(n_way * k, generator=generator)]
                              for _ in range(n_tasks)])
        x = torch.stack([pattern[y] for pattern, y in zip(patterns, labels)])
        return (x + torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(dtype), labels

    return Tasks(*images(k_spt), *images(k_qry))


def meta_step(net, tasks, every_step=False, **options):
    """(the gradient of one meta-step from these weights, what it returned); net stays as it is."""
    maml = Meta(copy.deepcopy(net), **options)
    step = maml(tasks, every_step)
    return {name: w.grad for name, w in maml.net.weights.items()}, step


def oracle_forward(net, weights, x):
    return oracle.forward(net.config, weights, x)


def oracle_trajectories(net, tasks, lr, steps):
    """The inner loop of each task."""
    theta = {name: w.detach().clone().requires_grad_() for name, w in net.weights.items()}
    return [oracle.adapt(net.config, theta, x, y, lr, steps) for x, y in zip(tasks.x_spt, tasks.y_spt)]


def oracle_accuracies(net, tasks, trajectories):
    """[T, K+1]"""
    return torch.tensor([[(oracle_forward(net, w, x)[0].argmax(1) == y).double().mean() for w in trajectory]
                         for trajectory, x, y in zip(trajectories, tasks.x_qry, tasks.y_qry)])


def same(a, b):
    """Equal in every bit, through dicts, lists and tensors; nan equals nan."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return a == b


# ---- the inner loop ----

@pytest.mark.parametrize("second_order", [False, True])
def test_adapt_is_sgd_on_each_task(second_order):
    net, tasks, lr, steps = small_net(), make_tasks(k_spt=2), 0.3, 4
    trajectory = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, lr, steps, second_order)
    assert len(trajectory) == steps + 1
    for t, (x, y) in enumerate(zip(tasks.x_spt, tasks.y_spt)):
        model = oracle.network(net.config, net.weights)
        optimizer = torch.optim.SGD(model.parameters(), lr)
        for weights in trajectory:
            for (name, got), expected in zip(weights.items(), model.parameters(), strict=True):
                torch.testing.assert_close(got[t], expected, rtol=1e-9, atol=1e-12, msg=name)
            optimizer.zero_grad()
            F.cross_entropy(model(x.clone()), y).backward()
            optimizer.step()


@pytest.mark.parametrize("second_order", [False, True])
def test_adapt_changes_nothing_that_is_passed_in(second_order):
    net, tasks = small_net(), make_tasks()
    weights = {name: w.detach().clone() for name, w in net.weights.items()}
    before = copy.deepcopy((net.state_dict(), weights, tuple(tasks)))
    state = torch.get_rng_state()
    given = dict(weights) if not second_order else dict(net.weights)
    adapt(net, given, tasks.x_spt, tasks.y_spt, 0.3, 2, second_order)
    assert same((net.state_dict(), weights, tuple(tasks)), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(w.grad is None and w.requires_grad for w in net.parameters())
    assert not any(w.requires_grad for w in weights.values())


def test_adapt_goes_on_from_each_tasks_own_weights():
    net, tasks = small_net(), make_tasks()
    whole = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, 0.3, 3)
    rest = adapt(net, whole[1], tasks.x_spt, tasks.y_spt, 0.3, 2)
    assert same([{n: w.detach() for n, w in weights.items()} for weights in whole[1:]],
                [{n: w.detach() for n, w in weights.items()} for weights in rest])


def test_adapt_works_where_gradients_are_switched_off():
    net, tasks = small_net(), make_tasks()
    expected = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, 0.3, 2)[-1]
    with torch.no_grad():
        got = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, 0.3, 2)[-1]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_first_order_weights_do_not_lead_back_to_theta():
    net, tasks = small_net(), make_tasks()
    last = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, 0.3, 2)[-1]
    total = sum(w.sum() for w in last.values())
    reached = torch.autograd.grad(total, list(net.weights.values()), allow_unused=True)
    assert all(g is None for g in reached)


# ---- the outer gradient ----

@pytest.mark.parametrize("config, tolerance", [(SMOOTH, 1e-7), (SMALL, 1e-6)], ids=["smooth", "relu"])
@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_gradient_is_the_finite_difference_of_the_adapted_loss(config, tolerance, steps):
    net, tasks, lr = small_net(config, seed=2), make_tasks(n_tasks=2, k_spt=2), 0.2
    gradient, step = meta_step(net, tasks, update_lr=lr, update_step=steps)
    norm = sum(g.square().sum() for g in gradient.values()).sqrt().item()

    def loss(direction, size):
        theta = {name: (w.detach() + size * direction[name]).requires_grad_()
                 for name, w in net.weights.items()}
        return oracle.meta_loss(config, theta, tasks, lr, steps).item()

    def slope(direction, size=1e-5):
        return (loss(direction, size) - loss(direction, -size)) / (2 * size)

    directions = [{name: torch.randn_like(w) for name, w in net.weights.items()} for _ in range(3)]
    for name, g in gradient.items():  # and the weight of each layer that matters most
        one = {other: torch.zeros_like(w) for other, w in net.weights.items()}
        one[name][torch.unravel_index(g.abs().argmax(), g.shape)] = 1
        directions.append(one)
    for direction in directions:
        size = sum(d.square().sum() for d in direction.values()).sqrt().item()
        along = sum((g * direction[name]).sum() for name, g in gradient.items()).item()
        assert along == pytest.approx(slope(direction, 1e-5 / size), abs=tolerance * norm * size)
    assert step.losses.mean().item() == pytest.approx(loss(directions[0], 0), rel=1e-12)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("steps", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("k_spt", [1, 5])
@pytest.mark.parametrize("net", ["conv_bn_relu", "original"])
@pytest.mark.parametrize("script, imgsz, n_way", [(omniglot_train, 28, 3), (miniimagenet_train, 46, 2)])
def test_gradient_of_the_scripts_networks(script, imgsz, n_way, net, k_spt, steps, first_order):
    imgc, lr = script.DEFAULTS["imgc"], script.DEFAULTS["update_lr"]
    # With some seeds the original network starts with dead channels, which batch norm turns into gradients
    # 10,000 times as large: there the plain loop is off from itself, rows in another order, by 1e-9 to 1e-7.
    torch.manual_seed(1)
    args = argparse.Namespace(net=net, imgc=imgc, imgsz=imgsz, n_way=n_way)
    learner = Learner(script.layers(args), imgc, imgsz).double()
    tasks = make_tasks(2, n_way, k_spt, k_qry=3, imgc=imgc, imgsz=imgsz)
    gradient, step = meta_step(learner, tasks, update_lr=lr, update_step=steps, first_order=first_order)
    loss, expected = oracle.meta_gradient(learner.config, learner.weights, tasks, lr, steps, not first_order)
    assert oracle.relative_error(gradient, expected) <= 1e-9
    assert step.losses.mean().item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_gradient_does_not_depend_on_chunks(monkeypatch, chunks, first_order):
    net, tasks, lr, steps = small_net(), make_tasks(), 0.3, 2
    monkeypatch.setattr(Meta, "_together", lambda *_: chunks)
    gradient, step = meta_step(net, tasks, update_lr=lr, update_step=steps, first_order=first_order)
    loss, expected = oracle.meta_gradient(net.config, net.weights, tasks, lr, steps, not first_order)
    assert oracle.relative_error(gradient, expected) <= 1e-9
    assert step.losses.mean().item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("task_chunk", [0, 1, 2, 3, 4, 9])
def test_task_chunk_changes_nothing_but_memory(task_chunk):
    net, tasks = small_net(), make_tasks()
    expected, whole = meta_step(net, tasks, every_step=True, update_step=2, nc_every=1)
    gradient, step = meta_step(net, tasks, every_step=True, update_step=2, nc_every=1, task_chunk=task_chunk)
    assert oracle.relative_error(gradient, expected) <= 1e-9
    torch.testing.assert_close(step, whole, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_one_task_alone():
    net, tasks = small_net(), make_tasks(n_tasks=1)
    gradient, step = meta_step(net, tasks, update_lr=0.3, update_step=2)
    _, expected = oracle.meta_gradient(net.config, net.weights, tasks, 0.3, 2, True)
    assert oracle.relative_error(gradient, expected) <= 1e-9 and step.accuracy.shape == (1, 1)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_meta_steps_are_adams_on_the_plain_loops_gradient(first_order):
    net = small_net()
    maml = Meta(copy.deepcopy(net), update_lr=0.3, meta_lr=0.01, update_step=2, first_order=first_order)
    theta = {name: w.detach().clone().requires_grad_() for name, w in net.weights.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=0.01)
    for seed in range(4):
        tasks = make_tasks(seed=seed)
        maml(tasks)
        _, gradient = oracle.meta_gradient(net.config, theta, tasks, 0.3, 2, not first_order)
        for name, weight in theta.items():
            weight.grad = gradient[name]
        optimizer.step()
    assert maml.step == 4
    # Adam divides by the gradient's size, so a gradient that is 0 but for rounding still moves a weight
    moved = {name: (maml.net.weights[name] - net.weights[name]).detach() for name in theta}
    expected = {name: (theta[name] - net.weights[name]).detach() for name in theta}
    for name in set(theta) - {"0_conv2d_bias", "4_conv2d_bias"}:
        torch.testing.assert_close(moved[name], expected[name], rtol=1e-5, atol=1e-9, msg=name)


# ---- what is not finite, and what is too steep ----

def state(maml):
    """Copies of the weights and of Adam's moments and count."""
    weights = list(maml.net.parameters())
    moments = [t for weight in weights for t in maml.optimizer.state[weight].values()]
    return [t.detach().clone() for t in weights + moments]


def spoiled(tasks, task=1):
    """The same tasks with a query image of one that isn't finite."""
    x_qry = tasks.x_qry.clone()
    x_qry[task, 0, 0, 0, 0] = torch.inf
    return tasks._replace(x_qry=x_qry)


@pytest.mark.parametrize("skip", [False, True])
def test_no_update_where_a_loss_is_not_finite(skip):
    good, bad = make_tasks(), spoiled(make_tasks(seed=1))
    maml, other = (Meta(small_net(), update_step=2, skip_nonfinite=skip) for _ in range(2))
    maml(good), other(good)
    before = state(maml)
    step = maml(bad)
    assert step.losses.isfinite().tolist() == [True, False, True, True]
    assert all(torch.equal(old, new) for old, new in zip(before, state(maml), strict=True))
    assert (maml.step, maml.updates.item()) == (2, 1)
    maml(good)
    if skip:  # as if the bad tasks had never been
        other(good)
        assert (maml.step, maml.updates.item()) == (3, 2)
    else:
        assert (maml.step, maml.updates.item()) == (3, 1)
    assert all(torch.equal(old, new) for old, new in zip(state(other), state(maml), strict=True))


def test_no_update_in_the_first_step_either():
    maml, untouched = (Meta(small_net(), update_step=1, skip_nonfinite=True) for _ in range(2))
    maml(spoiled(make_tasks()))
    assert all(torch.equal(w, v) for w, v in zip(maml.net.parameters(), untouched.net.parameters()))
    maml(make_tasks()), untouched(make_tasks())
    assert all(torch.equal(old, new) for old, new in zip(state(untouched), state(maml), strict=True))


def test_losses_are_those_of_a_step_and_change_nothing():
    maml, tasks = Meta(small_net(), update_step=2, task_chunk=3), make_tasks()
    weights = state(maml)
    losses = maml.losses(tasks)
    assert all(torch.equal(old, new) for old, new in zip(weights, state(maml), strict=True)) and maml.step == 0
    assert torch.equal(losses, maml(tasks).losses) and losses.shape == (4,) and not losses.requires_grad


def test_clip_bounds_each_value_of_the_gradient():
    net, tasks = small_net(), make_tasks()
    gradient, _ = meta_step(net, tasks, update_step=2)
    bound = 0.5 * max(g.abs().max() for g in gradient.values()).item()
    clipped, _ = meta_step(net, tasks, update_step=2, clip=bound)
    for name, g in gradient.items():
        assert torch.equal(clipped[name], g.clip(-bound, bound)), name
    assert any((g.abs() > bound).any() for g in gradient.values())


# ---- what is measured ----

def own_metrics(net, weights, tasks, t, null_spt, null_qry):
    """What `measure` says of task t on the plain forward pass: {name: a value per layer}."""
    _, features = oracle_forward(net, weights, tasks.x_qry[t])
    _, support = oracle_forward(net, weights, tasks.x_spt[t])
    return nc_metrics.measure(features, tasks.y_qry[t], support, tasks.y_spt[t], N_WAY, weights["8_linear_weight"],
                              null_qry[t], null_spt[t])


def expected_metrics(net, tasks, lr, steps, null_spt, null_qry):
    """What Meta should measure: "meta", "finetuned" {name: [T, L]} and "inner" {name: [T, K+1, L] or [T, K+1]}."""
    trajectories = oracle_trajectories(net, tasks, lr, steps)
    every = [[own_metrics(net, weights, tasks, t, null_spt, null_qry) for weights in trajectory]
             for t, trajectory in enumerate(trajectories)]  # [T][K+1]
    of_support = tasks._replace(x_qry=tasks.x_spt, y_qry=tasks.y_spt)
    expected = {
        "meta": [task[0] for task in every], "finetuned": [task[-1] for task in every],
        "support": [own_metrics(net, trajectory[-1], of_support, t, null_spt, null_spt)
                    for t, trajectory in enumerate(trajectories)]}
    if tasks.y_spt.shape[1] == N_WAY:  # one per class has no spread
        del expected["support"]
    inner = {name: torch.stack([torch.stack([m[name] for m in task]) for task in every])
             for name in ("within", "between")}
    inner["accuracy"] = oracle_accuracies(net, tasks, trajectories)
    return {model: {name: torch.stack([task[name] for task in of_tasks]) for name in of_tasks[0]}
            for model, of_tasks in expected.items()} | {"inner": inner}


@pytest.fixture
def null_labels(monkeypatch):
    """The permuted labels that Meta draws, in the order in which it draws them."""
    drawn, permuted = [], nc_metrics.permuted
    monkeypatch.setattr(nc_metrics, "permuted", lambda *args: drawn.append(permuted(*args)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("call", ["forward", "finetune"])
@pytest.mark.parametrize("chunks", [(4, 1), (1, 1), (4, 4), (2, 2)])
@pytest.mark.parametrize("k_spt", [1, 2])
def test_metrics_are_those_of_each_tasks_query_set(monkeypatch, null_labels, call, chunks, k_spt):
    net, tasks, lr, steps = small_net(), make_tasks(k_spt=k_spt), 0.3, 2
    monkeypatch.setattr(Meta, "_together", lambda *_: chunks)
    maml = Meta(copy.deepcopy(net), update_lr=lr, update_step=steps, update_step_test=3, nc_every=1)
    metrics = maml(tasks).metrics if call == "forward" else maml.finetune(tasks, measure=True).metrics
    null_spt, null_qry = null_labels
    expected = expected_metrics(net, tasks, lr, steps, null_spt, null_qry)
    assert metrics.keys() == expected.keys()
    for model in expected:
        assert metrics[model].keys() == expected[model].keys()
        for name, values in expected[model].items():
            torch.testing.assert_close(metrics[model][name].double(), values, rtol=1e-6, atol=1e-9,
                                       equal_nan=True, msg=lambda text: f"{model} {name}: {text}")
    assert metrics["meta"]["within"].shape == (4, 3) and metrics["inner"]["within"].shape == (4, steps + 1, 3)
    assert metrics["inner"]["accuracy"].shape == (4, steps + 1)


def test_null_labels_are_the_tasks_labels_permuted(null_labels):
    net, tasks = small_net(), make_tasks()
    maml = Meta(net, update_step=1, nc_every=1)
    for _ in range(2):
        maml(tasks)
    for got, labels in zip(null_labels, [tasks.y_spt, tasks.y_qry] * 2, strict=True):
        assert torch.equal(got.sort(1).values, labels.sort(1).values)
    assert not torch.equal(null_labels[1], tasks.y_qry)
    assert not torch.equal(null_labels[1], null_labels[3]), "another step, other labels"


def test_null_labels_come_again_with_the_seed_and_owe_nothing_to_the_global_generator(null_labels):
    tasks = make_tasks()
    for rng, seed in ((0, 222), (1, 222), (1, 223)):
        net = small_net()
        torch.manual_seed(rng)
        state = torch.get_rng_state()
        Meta(net, update_step=1, nc_every=1, seed=seed)(tasks)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(null_labels[1], null_labels[3]) and torch.equal(null_labels[0], null_labels[2])
    assert not torch.equal(null_labels[1], null_labels[5])


def test_metrics_at_every_nc_every_th_step():
    tasks = make_tasks(n_tasks=1)
    for nc_every, measured in ((0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])):
        maml = Meta(small_net(), update_step=1, nc_every=nc_every)
        assert [i for i in range(5) if maml(tasks).metrics is not None] == measured


@pytest.mark.parametrize("late, measured", [(None, [0, 2, 4, 6, 8, 10, 12]), (3, [0, 2, 4, 6, 9, 12]), (0, [0, 2, 4])])
def test_a_second_rhythm_of_metrics(monkeypatch, late, measured):
    monkeypatch.setattr(meta, "LATE", 5)
    maml = Meta(small_net(), nc_every=2, nc_every_late=late)
    found = []
    for maml.step in range(13):
        found += [maml.step] if maml.measures_next else []
    assert found == measured


@pytest.mark.parametrize("first_order, k_spt", [(False, 1), (True, 1), (False, 5)])
def test_measuring_changes_no_bit_of_the_weights(first_order, k_spt):
    results = []
    for nc_every, every_step in ((0, False), (1, False), (0, True), (1, True)):
        maml = Meta(small_net(dtype=torch.float32), update_step=2, first_order=first_order, nc_every=nc_every)
        for seed in range(3):
            tasks = make_tasks(2, k_spt=k_spt, seed=seed, dtype=torch.float32)
            if nc_every:
                maml.finetune(tasks, measure=True)
            maml(tasks, every_step)
        results.append(copy.deepcopy((maml.net.state_dict(), maml.optimizer.state_dict())))
    assert all(same(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("chunks", [(4, 1), (1, 1), (3, 2)])
def test_accuracies(monkeypatch, chunks):
    net, tasks, lr = small_net(), make_tasks(), 0.3
    monkeypatch.setattr(Meta, "_together", lambda *_: chunks)
    expected = oracle_accuracies(net, tasks, oracle_trajectories(net, tasks, lr, 3)).float()
    assert expected.unique().numel() > 3
    options = {"update_lr": lr, "update_step": 2, "update_step_test": 3}
    torch.testing.assert_close(meta_step(net, tasks, every_step=True, **options)[1].accuracy, expected[:, :3])
    torch.testing.assert_close(meta_step(net, tasks, **options)[1].accuracy, expected[:, 2:3])
    torch.testing.assert_close(Meta(net, **options).finetune(tasks)[0], expected)


@pytest.mark.parametrize("test_steps", [1, 2, 5])
def test_finetune_measures_after_update_step_steps_whatever_the_test_steps(test_steps):
    net, tasks = small_net(), make_tasks()
    maml = Meta(net, update_lr=0.3, update_step=2, update_step_test=test_steps)
    found, plain = maml.finetune(tasks, measure=True), maml.finetune(tasks)
    assert plain.metrics is None and torch.equal(plain.accuracy, found.accuracy)
    assert found.accuracy.shape == found.nearest_mean.shape == (4, test_steps + 1)
    _, step = meta_step(net, tasks, update_lr=0.3, update_step=2, nc_every=1)
    for model, metrics in found.metrics.items():
        for name, values in step.metrics[model].items():
            torch.testing.assert_close(metrics[name], values, equal_nan=True)


@pytest.mark.parametrize("measure", [False, True])
def test_finetune_leaves_everything_as_it_was(measure):
    maml = Meta(small_net(), update_step=2, update_step_test=3, nc_every=1)
    for seed in range(2):
        maml(make_tasks(seed=seed))
    tasks = make_tasks(seed=9)

    def everything():
        return copy.deepcopy((maml.net.state_dict(), {name: w.grad for name, w in maml.net.weights.items()},
                              maml.optimizer.state_dict(), maml.step, torch.get_rng_state(), tuple(tasks),
                              [w.requires_grad for w in maml.net.parameters()], maml.training))

    before, weights = everything(), list(maml.net.parameters())
    first = maml.finetune(tasks, measure)
    assert same(everything(), before)
    assert all(a is b for a, b in zip(maml.net.parameters(), weights, strict=True))
    assert same(maml.finetune(tasks, measure), first)


def test_what_a_step_returns_holds_no_graph():
    maml = Meta(small_net(), update_step=2, nc_every=1)
    step = maml(make_tasks(), every_step=True)
    measured = itertools.chain(*(model.values() for model in step.metrics.values()))
    results = [step.losses, step.accuracy, *measured, maml.finetune(make_tasks())[0],
               *(w.grad for w in maml.net.parameters())]
    assert not any(tensor.requires_grad for tensor in results)


# ---- chunks by device ----

@pytest.mark.parametrize("script, k_spt, k_qry, together", [
    (omniglot_train, 1, 15, (32, 1)),  # a large query set goes singly
    (omniglot_train, 1, 1, (32, 32)),  # the paper's training sizes
    (omniglot_train, 5, 5, (8, 8)), (omniglot_train, 5, 15, (8, 1)), (miniimagenet_train, 5, 15, (1, 1))])
def test_a_cpu_takes_as_many_tasks_together_as_stay_in_its_cache(script, k_spt, k_qry, together):
    args = argparse.Namespace(net="conv_bn_relu", n_way=5, **{k: script.DEFAULTS[k] for k in ("imgc", "imgsz")})
    maml = Meta(Learner(script.layers(args), args.imgc, args.imgsz))
    tasks = Tasks(*(torch.empty(2, 5 * k, 0) for k in (k_spt, k_spt, k_qry, k_qry)))
    for got, about in zip(maml._together(tasks), together, strict=True):
        assert about <= got < 2 * about
    maml.task_chunk = 1
    assert maml._together(tasks) == (1, 1)


def test_a_gpu_takes_all_tasks_at_once():
    assert device.tasks_together(torch.device("cuda"), 10**9, 1) >= 1000


def test_a_gradient_too_large_for_adams_square_changes_nothing():
    """A finite gradient whose square isn't: Adam's second moment would stay infinite, and no weight would move."""
    maml = Meta(small_net(dtype=torch.float32))
    before = state(maml)
    huge = [torch.full_like(weight, 1e21) for weight in maml.net.parameters()]
    maml._update(huge, torch.ones(4))
    assert all(torch.equal(old, new) for old, new in zip(before, state(maml), strict=True))
    assert (maml.step, maml.updates.item(), maml.halted.item()) == (1, 0, True)


def test_halves_of_a_validation_have_their_own_null_labels(null_labels):
    maml, tasks = Meta(small_net(), update_step=1, update_step_test=1), make_tasks()
    for null_seed in (0, 50, 0):
        maml.finetune(tasks, measure=True, null_seed=null_seed)
    assert not torch.equal(null_labels[1], null_labels[3]) and torch.equal(null_labels[1], null_labels[5])
