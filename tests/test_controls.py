"""controls.json against a plain recomputation, and as the study reads it."""

from functools import partial
from unittest.mock import Mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from data_files import read_json, refused

import nc_metrics
import omniglot_train
import predict
import training
from study import controls, design, effects
from study.logs import read_run

FLAGS = ("--synthetic --device cpu --task_num 3 --epoch 1 --k_qry 2 --n_way 3 --update_step 1 --update_step_test 2 "
         "--eval_tasks 2 --test_tasks 2 --nc_every 1").split()
SIMILARITY = "similarity, final", "similarity, untrained"
EQUAL = "similarity at equal steps, final", "similarity at equal steps, untrained"
GRADIENTS = "gradients, final", "gradients, untrained"
read = partial(read_json, name="controls.json")
BY_BLOCKS = {"similarity of blocks 1-2, final": range(6), "similarity of blocks 3-5, final": range(6, 14)}  # its layers


def share(features, labels):
    """Mean over tasks of the relative within trace."""
    return nc_metrics.relative_within(*nc_metrics.covariance_traces(features, labels, 3)).mean().item()


def nearest(queries, support):
    """Share of queries nearest to their class's support sample: [T, N, D], [T, 3, D], 15 queries per class."""
    return (torch.cdist(queries, support).argmin(-1) == torch.arange(3).repeat_interleave(15)).double().mean().item()


def tasks_of(run, k_spt=1):
    """The run's settings, test images and first four test tasks."""
    script, args = predict.settings_of(run)
    args.k_spt, args.k_qry_test = k_spt, 15
    data = training.Data(args, script.dataset(args), torch.device("cpu"))
    images = data.load("test")
    sampler = data.sampler("test", images)
    (_, index), = training.held_out_tasks(sampler, 4, 4)
    return args, images, sampler.gather(index)


def hsic(one, other):
    """Its unbiased estimate for linear kernels, as Song et al. (2007) write it, up to a factor of the sample size."""
    k, m = ((x.double() @ x.double().T).fill_diagonal_(0) for x in (one, other))
    n = len(k)
    return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)


def similarity(one, other):
    return (hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt()).item()


def one_step(net, rate, changes=bool):
    """The inner loop of one task: its weights before and after one step, which changes the weights named so."""
    return lambda x, y: oracle.adapt(net.config, net.weights, x, y, rate, 1, changes=changes)


def kept(net, tasks, loop):
    """Means over tasks: each layer's similarity before and after this inner loop; accuracy and share after it."""
    alike, right, adapted = [], [], []
    for x, y, x_qry, y_qry in zip(*tasks):
        before, after = (oracle.forward(net.config, weights, x_qry)[1] for weights in loop(x, y))
        alike.append([similarity(*features) for features in zip(before, after)])
        right.append((after[-1].argmax(1) == y_qry).double().mean().item())
        adapted.append(after[-2])
    return torch.tensor(alike).mean(0).tolist(), sum(right) / len(right), share(torch.stack(adapted), tasks.y_qry)


def test_cka():
    one = torch.randn(6, 40, 30, generator=torch.Generator().manual_seed(0))
    other = 5 - torch.cat([one[..., :4], one.flip(0)], -1)
    expected = [similarity(*features) for features in zip(one, other)]
    assert controls.cka(one, other).tolist() == pytest.approx(expected, 1e-9) and max(expected) < 0.5
    rotation, _ = torch.linalg.qr(one[0, :30])
    assert controls.cka(one, 3 - 2 * one @ rotation).tolist() == pytest.approx([1] * 6, 1e-5)
    assert controls.cka(one[:3], one[3:]).mean().abs() < 0.05  # independent: the biased estimate has 0.4


def in_parts(net, x, y):
    """Of one task: norms of the loss's gradient with respect to each layer's features; ratios of variances."""
    norms, ratios = [], []
    for i, (name, params) in enumerate([*net.config, ("conv2d", None)]):  # the last: after the logits
        below = {key: weight.detach() for key, weight in net.weights.items() if int(key.split("_")[0]) < i}
        above = {key: weight.detach() for key, weight in net.weights.items() if key not in below}
        features = oracle.forward(net.config[:i], below, x)[0].requires_grad_()
        if name in ("conv2d", "linear") and i > 0:
            loss = F.cross_entropy(oracle.forward(net.config[i:], above, features)[0], y)
            norms.append(torch.autograd.grad(loss, features)[0].norm().item())
        if name == "conv2d" and params:
            ratios.append(variance_ratio(params, above[f"{i}_conv2d_weight"], features.detach()))
    return norms, ratios


def variance_ratio(params, weight, x):
    """That of the kernels over the mean of that of kernels with a single one."""
    with torch.device("meta"):
        conv = oracle.module("conv2d", params, x)

    def variances(kernels):
        own = zip([name for name, _ in conv.named_parameters()], (kernels, torch.zeros(len(kernels))))
        return torch.func.functional_call(conv, dict(own), x).var((0, 2, 3), unbiased=False)

    units = torch.eye(weight[0].numel()).view(-1, *weight[0].shape)
    return (variances(weight).sum() / weight.square().sum() / variances(units).mean()).item()


@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (1, 2), ("same", 2)])
def test_the_variance_of_a_convolution_against_that_of_a_random_kernel(padding, stride):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 4, 9, 9, 5), (2, 7, 5, 3, 3)))
    x = x.cumsum(2) + 3
    expected = [variance_ratio([7, 5, 3, 3, stride, padding], kernels, images.permute(0, 3, 1, 2))
                for kernels, images in zip(weight, x)]
    assert controls.variance_ratio(x, weight, 3, stride, padding).tolist() == pytest.approx(expected, 1e-4)


@pytest.mark.slow
def test_controls(tmp_path):
    run = tmp_path / "run-seed222"
    omniglot_train.main([*FLAGS, "--out", str(run)])
    controls.main([str(run), "--tasks", "4"])
    found = read(run)
    assert list(found) == ["final", "untrained", "classifier at zero", "classifier at random", "pixels", "queries 1",
                           "queries 5", "queries 19", "5-shot", *SIMILARITY, *GRADIENTS, controls.NOT_TRANSDUCTIVE,
                           *BY_BLOCKS, *EQUAL]
    args, images, tasks = tasks_of(run)
    final = predict.load(run, "last").net
    torch.manual_seed(args.seed)
    nets = {"final": final, "untrained": omniglot_train.network(args)}

    def shares(control):
        """At the classifier's input, or alone."""
        return found[control]["meta"]["relative_within"]["mean"][-2:][:1]

    # the networks
    for name, net in nets.items():
        query, support = (net(x, features=True)[1][-2] for x in (tasks.x_qry, tasks.x_spt))
        assert shares(name) == pytest.approx([share(query, tasks.y_qry)], 1e-4)
        assert found[name]["nearest_mean"][0] == pytest.approx(nearest(query, support), abs=1e-5)
    within = {name: [found[name][model]["within"]["mean"][:-1] for model in ("meta", "finetuned")] for name in
              ("final", "classifier at zero", "classifier at random")}
    before, after = within["classifier at zero"]  # equal logits, and no gradient but the classifier's own
    assert before == after and found["classifier at zero"]["accuracy"][0] == pytest.approx(1 / 3, abs=1e-5)
    before, after = within["classifier at random"]
    assert before == within["final"][0] and after not in (before, within["final"][1])
    pixels, support = tasks.x_qry.flatten(2), tasks.x_spt.flatten(2)
    assert shares("pixels") == pytest.approx([share(pixels, tasks.y_qry)], 1e-4)
    assert found["pixels"]["nearest_mean"] == pytest.approx([nearest(pixels, support)], abs=1e-5)
    spectrum = torch.linalg.svdvals((images.double() / 255).mean(1).flatten(1).T.cov())
    ratio = spectrum.sum() ** 2 / spectrum.square().sum()
    assert found["pixels"]["effective_dimension"]["meta"] == pytest.approx(ratio.item(), 1e-4)

    # the inner step, by layer
    for name, net in zip(SIMILARITY, nets.values()):
        steps = []
        for x, y, *_ in zip(*tasks):
            before, after = one_step(net, args.update_lr)(x, y)
            steps.append([((after[key] - weight).norm() / weight.norm()).item()
                          for key, weight in before.items() if weight.dim() > 1])
        assert found[name]["step"] == pytest.approx(torch.tensor(steps).mean(0).tolist(), 1e-3)
        norms = [weight.norm().item() for weight in net.weights.values() if weight.dim() > 1]
        assert found[name]["norm"] == pytest.approx(norms, 1e-4)
        alike, accuracy, _ = kept(net, tasks, one_step(net, args.update_lr))
        assert found[name]["cka"] == pytest.approx(alike, 1e-4, abs=2e-6)
        assert found[name]["accuracy"] == pytest.approx([accuracy], abs=1e-5)
    assert found[SIMILARITY[0]]["cka"] != found[SIMILARITY[1]]["cka"] and max(found[SIMILARITY[1]]["cka"]) < 1
    for name, adapted in BY_BLOCKS.items():
        loop = one_step(final, args.update_lr, lambda weight: int(weight.split("_")[0]) in adapted)
        alike, accuracy, _ = kept(final, tasks, loop)
        assert found[name]["cka"] == pytest.approx(alike, 1e-4, abs=2e-6)
        assert found[name]["accuracy"] == pytest.approx([accuracy], abs=1e-5)
    assert found[name]["cka"][0] == pytest.approx(1) != found["similarity, final"]["cka"][0]

    for name, net in zip(GRADIENTS, nets.values()):
        parts = [in_parts(net, x, y) for x, y, *_ in zip(*tasks)]
        norms, ratios = (torch.tensor(values).mean(0).tolist() for values in zip(*parts))
        assert found[name]["gradient"] == pytest.approx(norms, 1e-3)
        assert found[name]["variance"] == pytest.approx(ratios, 1e-3)

    for name, net in zip(EQUAL, nets.values()):
        def equal_steps(x, y):
            before, after = one_step(net, args.update_lr)(x, y)
            kernels = [key for key, weight in before.items() if weight.dim() > 2]
            rates = {net.block(key): args.update_lr * size * before[key].norm() / (after[key] - before[key]).norm()
                     for key, size in zip(kernels, design.STEP_SIZES)} | {5: args.update_lr}
            return one_step(net, lambda key: rates[net.block(key)])(x, y)

        alike, _, within = kept(net, tasks, equal_steps)
        assert found[name]["cka"] == pytest.approx(alike, 1e-3)
        assert found[name]["finetuned"]["relative_within"]["mean"][-2] == pytest.approx(within, 1e-4)
        assert found[name]["step"][:4] == pytest.approx(design.STEP_SIZES, 1e-4)

    # other queries, support images and statistics of batch norm
    five = torch.arange(45).reshape(3, 15)[:, :5].flatten()  # a smaller query set is the start of a larger one
    query = final(tasks.x_qry[:, five], features=True)[1][-2]
    assert shares("queries 5") == pytest.approx([share(query, tasks.y_qry[:, five])], 1e-4)
    assert found["queries 1"]["meta"]["within"]["mean"] == [None] * 5 and found["queries 1"]["accuracy"][-1] >= 0
    _, _, five_shot = tasks_of(run, k_spt=5)
    traces, one = found["5-shot"]["inner"], read_run(run)
    for x, y, samples, name in ((five_shot.x_qry, five_shot.y_qry, "query", "within"),
                                (five_shot.x_spt, five_shot.y_spt, "support", "support_within")):
        features = final(x, features=True)[1][-2]
        within, _ = nc_metrics.covariance_traces(features, y, 3)
        assert traces[name]["mean"][0][-2] == pytest.approx(within.mean().item(), 1e-4)
        within, between = (trace.mean().item() for trace in nc_metrics.unbiased_traces(features, y, 3))
        assert effects.five_shot_share(one, samples, 0) == pytest.approx(within / (within + between), 1e-4)
    trajectories = [oracle.adapt(final.config, final.weights, x, y, args.update_lr, 2) for x, y, *_ in zip(*tasks)]
    for k, model, place in ((0, "meta", 0), (1, "finetuned", None), (2, None, 1)):  # 1 step in training, 2 in the test
        weights = {name: torch.stack([steps[k][name] for steps in trajectories]) for name in final.weights}
        layers = [final(torch.cat([tasks.x_spt, query[:, None]], 1), weights, features=True)[1]
                  for query in tasks.x_qry.unbind(1)]
        each, logits = (torch.stack([layer[i] for layer in layers], 1) for i in (-2, -1))  # [T, 45, 4, D or 3]
        if model:
            (within,) = found[controls.NOT_TRANSDUCTIVE][model]["relative_within"]["mean"]
            assert within == pytest.approx(share(each[:, :, 3], tasks.y_qry), 1e-4)
        if place is not None:
            answers = {"accuracy": logits[:, :, 3].argmax(-1),
                       "nearest_mean": torch.cdist(each[:, :, 3:], each[:, :, :3])[:, :, 0].argmin(-1)}
            for name, given in answers.items():
                right = (given == tasks.y_qry).double().mean().item()
                assert found[controls.NOT_TRANSDUCTIVE][name][place] == pytest.approx(right, abs=1e-5)

    # the file, and how the study reads it
    assert len(found["final"]["per_task"]["finetuned"]["nc1"]) == found["final"]["tasks"] == 4
    with refused("controls.json has controls of more than 2 tasks: untrained; give as many --tasks"):
        controls.main([str(run), "--tasks", "2", "--only", "untrained"])
    controls.main([str(run), "--tasks", "5", "--only", "untrained"])  # the others stay
    again = read(run)
    assert list(again) == list(found) and again["untrained"]["tasks"] == 5 and again["final"] == found["final"]
    assert effects.measured(one, "meta", "relative_within") == shares("final")[0]
    assert effects.measured(one, "meta", "nc1", "pixels") == found["pixels"]["meta"]["nc1"]["mean"][0]
    assert effects.in_control(one, "final", "effective_dimension", "meta") > 1


@pytest.mark.slow
def test_no_more_tasks_go_together_than_asked_for(tmp_path, monkeypatch, largest):
    """The permuted labels don't depend on it."""
    run, found, kinds = tmp_path / "run", [], ("pixels", controls.NOT_TRANSDUCTIVE)
    omniglot_train.main([*FLAGS, "--adapt_blocks", "4", "5", "--out", str(run)])
    monkeypatch.setattr(controls, "dimension", lambda *_: torch.zeros(1))  # of all test classes together
    for chunk, most in ((0, 3), (2, 2)):
        for kind in ("similarity, final", *kinds):
            largest.append(0)
            controls.main([str(run), "--tasks", "5", "--only", kind, "--task_chunk", str(chunk)])
            assert largest[-1] == most, kind
        one = read(run)
        found.append([*one["similarity, final"]["step"], *(one[kind]["meta"]["nc1_null"]["mean"][0] for kind in kinds)])
    assert found[1] == pytest.approx(found[0], 1e-3)


def test_classes_of_fewer_images_than_five_shots_and_the_usual_queries(tmp_path, monkeypatch):
    monkeypatch.setattr("synthetic.CHARACTER_IMAGES", 17)
    run = tmp_path / "run"
    omniglot_train.main([*FLAGS, "--learner", "anil", "--out", str(run)])
    measure = [str(run), "--tasks", "2", "--only"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(controls, "similarity", Mock(side_effect=KeyboardInterrupt))
        controls.main([*measure, "5-shot", "similarity, final"])
    assert list(read(run)) == ["5-shot"]  # what was measured is kept
    controls.main([*measure, "queries 5", "similarity, final"])
    assert list(read(run)) == ["5-shot", "queries 5", "similarity, final"]
    assert read(run)["similarity, final"]["cka"][0] < 0.9999, "MAML's inner loop changes ANIL's body too"
    with monkeypatch.context() as patch, refused("--only similarity at equal steps, final: the controls are final"):
        patch.setattr(controls, "STEP_SIZES", (0.1, 0.1))  # of a network with other blocks
        controls.main([*measure, "similarity at equal steps, final"])
    (run / "controls.json").write_text("{")
    monkeypatch.setattr(controls, "measure", lambda *_: pytest.fail("measured, and it can't be kept"))
    with refused("controls.json is damaged", "; remove it, and measure all controls again"):
        controls.main([*measure, "final"])
    (run / "result.json").unlink()
    with refused("is not finished; continue it with --resume"):
        controls.main([str(run)])
