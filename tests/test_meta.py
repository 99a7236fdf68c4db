"""MAML against the plain loop over tasks, torch's own Adam and finite differences, all in float64."""

import copy
import math

import oracle
import pytest
import torch
from torch.utils._pytree import tree_leaves

import measuring
import meta
import miniimagenet_train
import nc_metrics
import omniglot_train
from baselines import BASELINES
from learner import Learner
from meta import Meta, adapt, meta_gradient
from tasks import Tasks, tree_map

N_WAY = 3
SMALL = [("conv2d", [4, 1, 3, 3, 1, 0]), ("bn", [4]), ("relu", [True]), ("max_pool2d", [2, 2, 0]),
         ("conv2d", [5, 4, 2, 2, 1, 0]), ("bn", [5]), ("relu", [True]),
         ("flatten", []), ("linear", [N_WAY, 45])]
both_orders = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_a_wrong_answer(value):
    logits = torch.eye(3).repeat(2, 1, 1)
    logits[1, :2] = value
    assert measuring.accuracy(logits, torch.arange(3).expand(2, 3)).tolist() == [1, pytest.approx(1 / 3)]


def small_net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = Learner(SMALL, 1, 10)
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


def meta_step(net, tasks, **options):
    """(the gradient of one meta-step from these weights, its losses); net stays as it is."""
    maml = Meta(copy.deepcopy(net), **options)
    step = maml(tasks)
    return {name: w.grad for name, w in maml.net.weights.items()}, step.losses


def copies(*trees):
    """The tensors of states, tasks, results, ... as they are now."""
    return [tensor.detach().clone() for tensor in tree_leaves(trees) if tensor is not None]


def equal(*trees):
    """Whether the trees hold the same bits; nan equals nan."""
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*map(copies, trees), strict=True))


# ---- the inner loop and the outer gradient ----

@both_orders
def test_adapt_is_sgd_on_each_task_and_changes_nothing_that_is_passed_in(first_order):
    net, tasks, lr, steps = small_net(), make_tasks(k_spt=2), 0.3, 4
    before = copies(net.state_dict(), tasks, torch.get_rng_state())
    trajectory = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, lr, steps, not first_order)
    assert equal(before, [net.state_dict(), tasks, torch.get_rng_state()])
    assert all(w.grad is None and w.requires_grad for w in net.parameters())
    for t, (x, y) in enumerate(zip(tasks.x_spt, tasks.y_spt)):
        for weights, expected in zip(trajectory, oracle.adapt(net.config, net.weights, x, y, lr, steps), strict=True):
            torch.testing.assert_close({name: w[t] for name, w in weights.items()}, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # it starts from theta or each task's own weights, and needs no gradients to be switched on
        for start in (0, 1):
            weights = trajectory[1] if start else dict(net.weights)
            rest = adapt(net, weights, tasks.x_spt, tasks.y_spt, lr, steps - start, not first_order)
            assert equal(rest, trajectory[start:])


def test_second_order_gradient_is_the_finite_difference_of_the_adapted_loss():
    net, tasks, lr, steps = small_net(seed=2), make_tasks(n_tasks=2, k_spt=2), 0.2, 3
    gradient, _ = meta_step(net, tasks, update_lr=lr, update_step=steps)
    norm = sum(g.square().sum() for g in gradient.values()).sqrt().item()
    for _ in range(5):
        direction = {name: torch.randn_like(w) for name, w in net.weights.items()}
        size = sum(d.square().sum() for d in direction.values()).sqrt().item()
        ends = []
        for h in (1e-5 / size, -1e-5 / size):
            theta = {name: (w + h * direction[name]).detach().requires_grad_() for name, w in net.weights.items()}
            ends.append(oracle.meta_loss(net.config, theta, tasks, lr, steps).item())
        along = sum((g * direction[name]).sum() for name, g in gradient.items()).item()
        assert along / size == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6 * norm)


@pytest.mark.parametrize("first_order, steps", [(False, 2), (True, 1)])  # of one step both orders are exact
def test_inner_rates_can_be_trained(first_order, steps):
    net, tasks = small_net(), make_tasks(n_tasks=2, k_spt=2)
    net.rate = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    rates = dict.fromkeys(net.adaptable, net.rate)
    gradient, *_ = meta_gradient(net, tasks, rates, steps, first_order)
    ends = [meta_gradient(net, tasks, 0.2 + h, steps)[1].sum().item() for h in (1e-5, -1e-5)]
    of_rate = gradient[list(dict(net.named_parameters())).index("rate")]
    assert of_rate.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    maml = Meta(net, first_order=first_order, update_step=steps, freeze_head=True)
    maml.rates, before = rates, copies(net.state_dict())
    maml(tasks)
    changed = {name for old, (name, new) in zip(before, net.state_dict().items()) if not equal(old, new)}
    assert changed >= {"rate", "weights.0_conv2d_weight"} and not changed & {f"weights.{name}" for name in net.head}


@both_orders
@pytest.mark.parametrize("steps, k_spt", [(1, 5), pytest.param(5, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", ["conv_bn_relu", "original"])
@pytest.mark.parametrize("script, imgsz, n_way", [(omniglot_train, 28, 3), (miniimagenet_train, 46, 2)])
def test_gradient_of_the_scripts_networks(script, imgsz, n_way, net, k_spt, steps, first_order):
    # With some seeds the original network starts with dead channels, which batch norm turns into gradients
    # 10,000 times as large: there the plain loop is off from itself, rows in another order, by 1e-9 to 1e-7.
    torch.manual_seed(1)
    args = script.arguments(["--net", net, "--imgsz", str(imgsz), "--n_way", str(n_way)])
    learner = script.network(args).double()
    tasks = make_tasks(2, n_way, k_spt, k_qry=3, imgc=args.imgc, imgsz=imgsz)
    lr = args.update_lr
    gradient, losses = meta_step(learner, tasks, update_lr=lr, update_step=steps, first_order=first_order)
    loss, expected = oracle.meta_gradient(learner.config, learner.weights, tasks, lr, steps, not first_order)
    assert oracle.relative_error(gradient, expected) <= 1e-9
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("first_order, clip, cosine_steps, keep_norms", [
    (False, 0, 0, False), (True, 0.01, 0, False), (False, 0, 3, False), (False, 0, 0, True)])
def test_meta_steps_are_adams_on_the_plain_loops_gradient(first_order, clip, cosine_steps, keep_norms):
    net = small_net()
    maml = Meta(copy.deepcopy(net), update_lr=0.3, meta_lr=0.01, update_step=2, first_order=first_order, clip=clip,
                cosine_steps=cosine_steps, keep_norms=keep_norms)
    theta = {name: w.detach().clone().requires_grad_() for name, w in net.weights.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: (
        1 + math.cos(math.pi * min(1, update / (cosine_steps or math.inf)))) / 2)  # after its cosine it stays 0
    for seed in range(5):
        tasks = make_tasks(seed=seed)
        maml(tasks)
        _, gradient = oracle.meta_gradient(net.config, theta, tasks, 0.3, 2, not first_order)
        for name, weight in theta.items():
            weight.grad = gradient[name].clip(-clip or None, clip or None) if clip else gradient[name]
        optimizer.step()
        schedule.step()
        for name in ("0_conv2d_weight", "4_conv2d_weight") if keep_norms else ():
            theta[name].data *= net.weights[name].norm() / theta[name].norm()
    assert maml.step == maml.updates == 5
    # Adam divides by the gradient's size, so a gradient that is 0 but for rounding still moves a weight
    for name in set(theta) - {"0_conv2d_bias", "4_conv2d_bias"}:
        moved, expected = ((w[name] - net.weights[name]).detach() for w in (maml.net.weights, theta))
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-9, msg=name)


# ---- what is not finite ----

@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_no_update_where_a_loss_is_not_finite(steps_before, skip):
    good, bad = make_tasks(), make_tasks(seed=1)
    bad.x_qry[1, 0, 0, 0, 0] = torch.inf
    maml, other = (Meta(small_net(), update_step=2, skip_nonfinite=skip) for _ in range(2))
    for _ in range(steps_before):
        maml(good), other(good)
    assert maml(bad).losses.isfinite().tolist() == [True, False, True, True]
    assert equal(maml.state()[:-1], other.state()[:-1]) and maml.outer.halted.item() == (not skip)
    maml(good)
    if skip:  # as if the bad tasks had never been
        other(good)
    assert equal(maml.state()[:-1], other.state()[:-1])
    assert (maml.step, maml.updates.item()) == (steps_before + 2, steps_before + skip)


@pytest.mark.parametrize("value, clip, meta_lr, fits", [
    (1e21, 0, 1e-3, False),  # finite, but not its square: Adam's second moment would stay infinite
    (1e21, 10, 1e-3, True), (torch.inf, 0, 1e-3, False), (torch.inf, 10, 1e-3, False),
    (-1, 0, 1e37, False)])  # a weight would be infinite
def test_an_update_that_would_not_be_finite_changes_nothing(value, clip, meta_lr, fits):
    maml = Meta(small_net(dtype=torch.float32), clip=clip, meta_lr=meta_lr)
    maml.net.weights["0_conv2d_weight"].data.fill_(3.4e38)
    before = copies(maml.state()[:-1])
    maml.outer.step([torch.full_like(weight, value) for weight in maml.net.parameters()], torch.ones(4))
    assert equal(before, maml.state()[:-1]) == (not fits) and maml.outer.halted.item() == (not fits)


# ---- what is measured ----

def expected_results(net, tasks, lr, steps, nulls):
    """The metrics that Meta should measure, of the plain loop, one task at a time."""
    rows = []
    for x_spt, y_spt, x_qry, y_qry, null_spt, null_qry in zip(*tasks, *nulls):
        queries, supports, accuracies = [], [], []
        for weights in oracle.adapt(net.config, net.weights, x_spt, y_spt, lr, steps):
            _, support = oracle.forward(net.config, weights, x_spt)
            logits, query = oracle.forward(net.config, weights, x_qry)
            rest = support, y_spt, N_WAY, weights["8_linear_weight"]
            queries.append(nc_metrics.measure(query, y_qry, *rest, null_qry, null_spt))
            supports.append(nc_metrics.measure(support, y_spt, *rest, null_spt, null_spt))
            accuracies.append((logits.argmax(1) == y_qry).float().mean())
        row = {"meta": queries[0], "finetuned": queries[-1], "inner": {"accuracy": torch.stack(accuracies)}}
        for prefix, measured in (("", queries), ("support_", supports)):
            row["inner"] |= {prefix + name: torch.stack([m[name] for m in measured]) for name in ("within", "between")}
        rows.append(row | {"support": supports[-1]})
    return tree_map(lambda *values: torch.stack(values), *rows)


@pytest.fixture
def null_labels(monkeypatch):
    """The permuted labels that Meta draws, in the order in which it draws them."""
    drawn, permuted = [], nc_metrics.permuted
    monkeypatch.setattr(nc_metrics, "permuted", lambda *args: drawn.append(permuted(*args)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("chunks, k_spt, test_steps, first_order", [
    ((4, 4), 1, 3, False), ((1, 1), 2, 1, True), ((3, 2), 2, 5, False), ((2, 4), 1, 2, True)])
def test_whatever_the_chunks_a_step_and_an_adaptation_are_the_plain_loops(monkeypatch, null_labels, chunks, k_spt,
                                                                          test_steps, first_order):
    net, tasks, lr, steps = small_net(), make_tasks(k_spt=k_spt), 0.3, 2
    other = make_tasks(k_spt=k_spt, k_qry=2, seed=5)
    other = tasks._replace(x_qry=other.x_qry, y_qry=other.y_qry) if k_spt > 1 else None  # to measure on
    inner, query = chunks
    monkeypatch.setattr(Meta, "_together", lambda _, x: inner if x is tasks.x_spt else query)
    maml = Meta(copy.deepcopy(net), update_lr=lr, update_step=steps, update_step_test=test_steps, nc_every=2,
                first_order=first_order)
    measured = maml.finetune(tasks, other or tasks), maml(tasks, True, other)
    gradient = {name: w.grad for name, w in maml.net.weights.items()}
    plain = maml.finetune(tasks), maml(tasks)  # the next step measures nothing
    assert plain[0].metrics is plain[1].metrics is None
    assert plain[1].accuracy.shape == (4, 1)
    if test_steps >= steps:
        assert torch.equal(plain[1].accuracy[:, 0], plain[0].accuracy[:, steps])
    longest = expected_results(net, tasks, lr, max(steps, test_steps), [tasks.y_spt, tasks.y_qry])["inner"]["accuracy"]
    assert longest.unique().numel() > 3
    torch.testing.assert_close(measured[0].accuracy, longest[:, :test_steps + 1])
    torch.testing.assert_close(measured[1].accuracy, longest[:, :steps + 1])
    for result, null in zip(measured, (null_labels[:2], null_labels[2:4])):
        expected = expected_results(net, other or tasks, lr, steps, null)
        if k_spt == 1:  # one per class has no spread
            del expected["support"], expected["inner"]["support_within"], expected["inner"]["support_between"]
        torch.testing.assert_close(result.metrics, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    loss, expected = oracle.meta_gradient(net.config, net.weights, tasks, lr, steps, not first_order)
    assert measured[1].losses.mean().item() == pytest.approx(loss.item(), rel=1e-12)
    assert oracle.relative_error(gradient, expected) <= 1e-9  # measuring doesn't change it


def test_null_labels_are_the_tasks_labels_permuted_by_the_seed_the_step_and_nothing_else(null_labels):
    tasks = make_tasks()
    for rng, seed in ((0, 222), (1, 222), (1, 223)):
        maml = Meta(small_net(), update_step=1, update_step_test=1, nc_every=1, seed=seed)
        torch.manual_seed(rng)
        state = torch.get_rng_state()
        maml(tasks), maml(tasks), maml.finetune(tasks, tasks)
        assert torch.equal(torch.get_rng_state(), state)
    for got, labels in zip(null_labels, [tasks.y_spt, tasks.y_qry] * 9, strict=True):
        assert torch.equal(got.sort(1).values, labels.sort(1).values)
    first, second, of_0, again, second_again, of_0_again, other, _, of_0_other = null_labels[1::2]
    assert equal([first, second, of_0], [again, second_again, of_0_again]) and torch.equal(of_0, of_0_other)
    assert len({str(labels.tolist()) for labels in (tasks.y_qry, first, second, of_0)}) == 4
    assert torch.equal(second, other)  # the seed plus the step


@pytest.mark.parametrize("every, late, expected", [
    (0, None, []), (0, 2, []), (1, None, range(13)), (2, None, range(0, 13, 2)), (2, 4, [0, 2, 4, 8, 12]),
    (2, 0, [0, 2, 4])])
def test_steps_that_measure(monkeypatch, every, late, expected):
    monkeypatch.setattr(meta, "LATE", 6)
    maml = Meta(small_net(), nc_every=every, nc_every_late=late)
    found = []
    for maml.step in range(13):
        found += [maml.step] if maml.measures_next else []
    assert found == list(expected)


def test_finetune_leaves_everything_as_it_was_and_results_hold_no_graph():
    maml = Meta(small_net(), update_step=2, update_step_test=3, nc_every=1, task_chunk=3)
    maml(make_tasks())
    tasks, gradients = make_tasks(seed=9), [w.grad for w in maml.net.parameters()]
    changeable = maml.state(), gradients, tasks, torch.get_rng_state()
    before = copies(*changeable)
    found = maml.finetune(tasks, tasks)
    assert equal(before, [*changeable[:-1], torch.get_rng_state()]) and maml.step == 1
    assert all(w.requires_grad and w.grad is g for w, g in zip(maml.net.parameters(), gradients))
    assert equal([maml.finetune(tasks, tasks)], [found])
    step = maml(tasks, every_step=True)
    results = tree_leaves([found, step, [w.grad for w in maml.net.parameters()]])
    assert not any(tensor.requires_grad for tensor in results if tensor is not None)


# ---- chunks by device ----

@pytest.mark.parametrize("script, k_spt, k_qry, together", [
    (omniglot_train, 1, 15, (100, 10)), (omniglot_train, 5, 5, (32, 32)),
    (omniglot_train, 5, 19, (32, 1)), (miniimagenet_train, 5, 15, (1, 1))])  # large ones go singly
def test_a_cpu_takes_small_tasks_together(script, k_spt, k_qry, together):
    maml = Meta(script.network(script.arguments([])))
    tasks = Tasks(*(torch.empty(2, 5 * k, 0) for k in (k_spt, k_spt, k_qry, k_qry)))
    for images, about in zip((tasks.x_spt, tasks.x_qry), together, strict=True):
        assert about <= maml._together(images) < 2 * about
        assert maml._together(images.to("meta")) >= 1000  # as on a GPU
        assert Meta(maml.net, task_chunk=1)._together(images) == 1


def test_a_prototypical_network_has_one_pass(monkeypatch):
    tasks, sizes, gradient = make_tasks(), [], BASELINES["protonet"]
    monkeypatch.setattr(Meta, "_together", lambda _, x: 4 if x is tasks.x_spt else 2)
    monkeypatch.setitem(BASELINES, "protonet", lambda *args: sizes.append(len(args[1].y_qry)) or gradient(*args))
    Meta(small_net(), learner="protonet")(tasks)
    assert sizes == [2, 2]
