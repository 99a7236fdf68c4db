"""Measures a run's weights, and controls to compare them with, on the run's test tasks.

    python -m study.controls res/RUN                                    writes res/RUN/controls.json, control by control
    python -m study.controls res/RUN --root DATA --only final pixels    measures these; the others stay in the file

The tasks are those of the run's test. `measure` lists the controls, and each one's function says what it measures.
"effective_dimension" is that of the test classes' means at the classifier's input; for it, in every control, one
upright image of every class goes through the network as one batch. Metrics that are undefined are null.
"""

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import files
import nc_metrics
import predict
from baselines import inner_rates
from device import keep_memory, memory_runs_out, select_device, set_arithmetic
from files import Parser, UserError, atomic, listed, progress, quoted, reading
from learner import BLOCK_STARTS, Learner, Weights, before_and_after
from measuring import accuracies, accuracy, collapse_metrics, cross_entropy, permuted_labels, scores
from meta import Meta, adapt
from record import check_network, numbers, other_test_classes, say, summary
from settings import check
from study.design import CONTROL_QUERIES, CONTROL_SHOTS, STEP_SIZES
from tasks import Dataset, Tasks, as_tasks, cat, chunked
from training import Data, held_out_tasks, meta_of

CLASSIFIER_METRICS = ("self_duality", "ncc_mismatch", "within_original", "between_original")
NOT_TRANSDUCTIVE = "batch norm by one query and the support set"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m study.controls",
                    description="Measure a run's weights and their controls on its test tasks: RUN/controls.json.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks (default: 600)")
    parser.add_argument("--only", nargs="+", metavar="CONTROL", help="measure only these (default: all)")
    for name in ("root", "data", "cache", "device", "task_chunk"):
        parser.add_argument(f"--{name}", help="as the training scripts' (default: the run's)")
    given = vars(parser.parse_args(arguments))
    folder, n_tasks, only = given.pop("run"), given.pop("tasks"), given.pop("only")
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    script, args = predict.settings_of(folder, f"--test_tasks={n_tasks}", *flags)
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} is not finished; continue it with --resume")
    path, kept = folder / "controls.json", {}
    if path.exists():
        with reading(path, "remove it, and measure all controls again", "is damaged"):
            kept = dict(json.loads(path.read_bytes()))
            larger = [name for name in only or kept if kept.get(name, {"tasks": 0})["tasks"] > n_tasks]
        listed(larger, f"{path} has controls of more than {n_tasks} tasks", "give as many --tasks, or move it away")
    with memory_runs_out("lower --task_chunk or take another --device"):
        for name, control in measure(folder, args, script, only):
            kept[name] = control
            with atomic(path, "w", "free space or fix the permissions there, then measure again") as file:
                file.write("{" + ",\n".join(f"{json.dumps(key)}: {json.dumps(kept[key])}" for key in kept) + "}\n")
    say(f"wrote {path}")


@torch.no_grad()
def measure(folder: Path, args: argparse.Namespace, script: ModuleType,
            only: Sequence[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Each control's name and values: "tasks", metrics of each model, accuracies, "effective_dimension"."""
    device, dataset = select_device(args.device), script.dataset(args)
    check(args, dataset, script.network)
    if other_test_classes(folder, dataset):
        raise UserError(f"{folder} has other test classes than {dataset.described()}; name its own images with --root "
                        "or --data")
    say(f"Data: {dataset.described()}")  # perhaps other images of the same classes
    keep_memory()
    set_arithmetic(args.precision, args.deterministic)
    final = predict.load(folder, "last" if (folder / "last.pt").exists() else "best", args.device).net
    torch.manual_seed(args.seed)  # of this and all networks of `controls_of`, which are drawn in this order
    untrained = script.network(args).to(device)
    check_network(folder, untrained)  # the controls draw theirs from this version's layers
    per_class = min(dataset.counts()["test"])
    wanted = controls_of(args, script, final, untrained, per_class)
    if not wanted.keys() >= set(only or ()):
        raise UserError(f"--only {' '.join(only)}: the controls are {', '.join(map(quoted, wanted))}")
    data = Data(copy.copy(args), dataset, device)
    images = data.load("test")
    upright = images[::data.turns("test"), :per_class]
    dimension_of = functools.cache(lambda net: dimension(net, upright, dataset))
    for name in only or wanted:
        net, function, (data.args.k_spt, data.args.k_qry_test) = wanted[name]
        data.args.nc_qry = data.args.k_qry_test  # or more are drawn than a class may have
        loop = {"learner": "maml", "adapt_blocks": None} if name == "pixels" else {}  # no body for BOIL, and one block
        maml = meta_of(net, argparse.Namespace(**vars(args) | loop))
        parts = in_batches(maml, data, images, function)
        results = cat(list(progress(parts, name, math.ceil(args.test_tasks / args.task_num), "batches")))
        metrics = results.pop("metrics", None)
        means = {key: nc_metrics.mean_and_se(values) for key, values in results.items()}
        control = {"tasks": args.test_tasks} | {key: numbers(mean) for key, (mean, _) in means.items()} | {
            f"{key}_ci95": numbers(1.96 * se) for key, (_, se) in means.items()}
        if metrics:
            control |= summary(metrics) | {"effective_dimension": {"meta": numbers(dimension_of(net))}}
            share, nearest = (metrics["meta"][key][:, -2:][:, 0].mean()  # at the classifier's input
                              for key in ("relative_within", "ncc_accuracy"))
            say(f"{name}: relative within trace {share:.3f}, nearest support mean {nearest:.2%}, before adaptation")
        else:
            say(f"{name}: {control}")
        yield name, control


def controls_of(args: argparse.Namespace, script: ModuleType, final: Learner, untrained: Learner,
                per_class: int) -> dict[str, tuple]:
    """Name -> (network, function, (support, query images per class)); a class has at least `per_class` images."""
    pixels = Learner([("flatten", []), ("linear", [args.n_way, math.prod(untrained.input_shape)])],
                     args.imgc, args.imgsz).to(args.device)  # its classifier is not used
    redrawn = with_classifier(final, script.network(args))
    usual = args.k_spt, min(CONTROL_QUERIES, per_class - args.k_spt)
    sizes = {f"queries {queries}": (args.k_spt, queries) for queries in (1, 5, 19) if args.k_spt + queries <= per_class}
    if args.k_spt != CONTROL_SHOTS < per_class:
        sizes["5-shot"] = CONTROL_SHOTS, min(CONTROL_QUERIES, per_class - CONTROL_SHOTS)
    controls = {
        "final": (final, Meta.finetune),  # the run's last weights, or its best where those are absent
        "untrained": (untrained, Meta.finetune),  # a fresh network of the run's seed
        # the first inner step moves nothing but the classifier (Kao, Chiu, Chen 2022, arXiv:2106.15367)
        "classifier at zero": (with_classifier(final, None), Meta.finetune),
        "classifier at random": (redrawn, Meta.finetune),  # a newly drawn classifier, as training starts with
        "pixels": (pixels, not_adapted),  # the input itself
        **dict.fromkeys(sizes, (final, Meta.finetune)),  # other numbers of queries and support images
        "similarity, final": (final, similarity),
        "similarity, untrained": (untrained, similarity),
        "gradients, final": (final, gradients),
        "gradients, untrained": (untrained, gradients),
        NOT_TRANSDUCTIVE: (final, not_transductive)}
    kernels = [weight for weight in final.weights.values() if weight.dim() > 1]
    if len(final.blocks) == len(kernels) == len(STEP_SIZES) + 1:  # one per block, as in the study's networks
        controls |= {"similarity of blocks 1-2, final": (final, partial(similarity, blocks=(1, 2))),
                     "similarity of blocks 3-5, final": (final, partial(similarity, blocks=(3, 4, 5))),
                     "similarity at equal steps, final": (final, partial(similarity, sizes=STEP_SIZES)),
                     "similarity at equal steps, untrained": (untrained, partial(similarity, sizes=STEP_SIZES))}
    return {name: (*control, sizes.get(name, usual)) for name, control in controls.items()}


def with_classifier(net: Learner, other: Learner | None) -> Learner:
    """A copy of `net` with the classifier of `other`, or with zeros."""
    net = copy.deepcopy(net)
    for name in net.head:
        net.weights[name].copy_(torch.zeros(()) if other is None else other.weights[name])
    return net


def in_batches(maml: Meta, data: Data, images: Tensor, function: Callable) -> Iterator[dict]:
    """`function` of the run's test tasks, as many at a time as in its test, or --task_chunk.

    Values [T, ...] by name, and "metrics" of each model if the function has them.
    """
    sampler = data.sampler("test", images)
    for start, part in held_out_tasks(sampler, data.args.test_tasks, data.args.task_num):
        tasks, seed = sampler.gather(part), maml.seed + start
        if function is Meta.finetune:  # it takes chunks itself
            adapted = maml.finetune(tasks, tasks, seed)
            yield {"metrics": adapted.metrics, "accuracy": adapted.accuracy, "nearest_mean": adapted.nearest_mean}
        else:
            total = len(tasks.y_qry)
            yield chunked(partial(function, maml), maml.task_chunk or total, total, tasks, permuted_labels(tasks, seed))


def not_adapted(maml: Meta, tasks: Tasks, null: tuple[Tensor, Tensor]) -> dict:
    """The classifier's input alone, before adaptation; nothing of the classifier."""
    start = maml.adapt(tasks, 0)
    metrics = {name: values[:, :1] for name, values in collapse_metrics(maml.net, tasks, start, null)["meta"].items()
               if name.removesuffix("_null") not in CLASSIFIER_METRICS}
    return {"metrics": {"meta": metrics}, "nearest_mean": accuracies(maml.net, tasks, start)["nearest_mean"]}


def similarity(maml: Meta, tasks: Tasks, null: tuple[Tensor, Tensor], blocks: Sequence[int] | None = None,
               sizes: Sequence[float] = ()) -> dict:
    """"cka" [T, L] of the query features before and after MAML's inner loop, with as many steps as in training.

    With it, before the loop, "norm", the `kernel_norms` [T, L]; of the loop "step", its `step_sizes` [T, L]; after it
    "accuracy" [T, 1] of the queries. The loop adapts these blocks, or all if None, for every learner. With `sizes` what
    it changes in each block but the last is then scaled to these step sizes, and "metrics" are measured too.
    """
    rates = inner_rates(maml.net, "maml", maml.update_lr, maml.head_lr, blocks)
    before, *_, after = adapt(maml.net, maml.net.weights, tasks.x_spt, tasks.y_spt, rates, maml.update_step)
    if sizes:
        scales = torch.tensor(sizes).to(tasks.x_qry) / step_sizes(before, after)[:, :-1]
        after |= {name: start + torch.einsum("t,t...->t...", scales[:, maml.net.block(name) - 1], after[name] - start)
                  for name, start in before.items() if name not in maml.net.head}
    layers = [maml.net(tasks.x_qry, weights, features=True)[1] for weights in (before, after)]
    metrics = {"metrics": collapse_metrics(maml.net, tasks, [before, after], null)} if sizes else {}
    return {"cka": torch.stack([cka(*features) for features in zip(*layers)], 1), "step": step_sizes(before, after),
            "norm": kernel_norms(before), "accuracy": accuracy(layers[1][-1], tasks.y_qry)[:, None]} | metrics


def gradients(maml: Meta, tasks: Tasks, _null: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The support loss's gradient, and the variance of the convolutions, layer by layer before adaptation.

    "gradient" [T, L]: the norm of the support loss's gradient with respect to the layer's features. "variance" [T, L]:
    `variance_ratio` of each convolution. Batch norm divides its output by the root of the variance, and thus also the
    gradient that reaches its kernel and the layers below.
    """
    net, x = maml.net, tasks.x_spt.detach().requires_grad_()
    with torch.enable_grad():
        outputs = net.outputs(x)
        loss = cross_entropy(outputs[-1], tasks.y_spt).sum()
    norms = [g.flatten(1).norm(dim=1) for g in torch.autograd.grad(loss, outputs)]
    weights = net.per_task(net.weights, len(x))
    starts = [i for i, (name, _) in enumerate(net.config) if name in BLOCK_STARTS]
    inputs = [x.permute(0, 1, 3, 4, 2), *outputs[:-1]][-len(starts):]  # of the layers that begin a block
    ratios = [variance_ratio(h, weights[net.keys[i][0]], *net.config[i][1][3:])
              for i, h in zip(starts, inputs) if net.config[i][0] == "conv2d"]
    return {"gradient": torch.stack(norms, 1)} | ({"variance": torch.stack(ratios, 1)} if ratios else {})


def variance_ratio(h: Tensor, weight: Tensor, kernel: int, stride: int, padding: int | str) -> Tensor:
    """The variance of a convolution's output as a multiple of that of a random kernel of the same norm, [T].

    Summed over channels: tr(W S W^T) / (||W||^2 tr S / p), where S is the covariance of patches of p values. It is at
    most p: where patches vary in one direction alone, and all kernels lie along it.

    Args:
        h: images [T, N, h, w, c].
        weight: [T, o, c, k, k].
    """
    images = h.permute(0, 1, 4, 2, 3).flatten(0, 1)
    images = F.pad(images, 2 * before_and_after(h.shape[2], kernel, stride, padding))
    patches = F.unfold(images, kernel, stride=stride).unflatten(0, h.shape[:2])  # [T, N, p, h'*w']
    patches = patches - patches.mean((1, 3), keepdim=True)
    matrix = weight[:, None].flatten(3)  # [T, 1, o, p]
    variance = (matrix @ patches).square().mean((1, 3)).sum(1)
    return variance / matrix.square().sum((1, 2, 3)) / patches.square().mean((1, 2, 3))


def kernel_norms(weights: Weights) -> Tensor:
    """The norm of each layer's kernel, [T, L]."""
    return torch.stack([weight.flatten(1).norm(dim=1) for weight in weights.values() if weight.dim() > 2], 1)


def step_sizes(before: Weights, after: Weights) -> Tensor:
    """The change of each layer's kernel as a multiple of its norm, [T, L]."""
    return kernel_norms({name: after[name] - start for name, start in before.items()}) / kernel_norms(before)


def cka(one: Tensor, other: Tensor) -> Tensor:
    """Linear centred kernel alignment of two features of the same samples (Kornblith et al. 2019).

    1: they are the same up to rotation, shift and scale. Without the bias of few samples: 0 in the mean for features
    that are independent, by U-centred Gram matrices (Szekely, Rizzo 2014), which give HSIC's unbiased estimate (Song et
    al. 2007).

    Args:
        one, other: [..., N, D] and [..., N, D'] with N >= 4.
    Returns:
        [...], in float64.
    """
    def u_centred(features: Tensor) -> Tensor:
        features = features.double() - features.double().mean(-2, keepdim=True)
        gram = features @ features.mT
        gram = gram - gram.diagonal(dim1=-2, dim2=-1).diag_embed()
        n, rows = gram.shape[-1], gram.sum(-1, keepdim=True)
        gram = gram - (rows + rows.mT) / (n - 2) + rows.sum(-2, keepdim=True) / ((n - 1) * (n - 2))
        return gram - gram.diagonal(dim1=-2, dim2=-1).diag_embed()

    grams = u_centred(one), u_centred(other)
    return torch.mul(*grams).sum((-2, -1)) / math.prod(torch.linalg.matrix_norm(gram) for gram in grams)


def not_transductive(maml: Meta, tasks: Tasks, null: tuple[Tensor, Tensor]) -> dict:
    """Each query apart from the others; accuracies before adaptation and after the last inner step."""
    net, steps = maml.net, (0, maml.update_step, maml.update_step_test)
    trajectory = maml.adapt(tasks, max(steps))
    results = [scores(net, tasks, trajectory[k], transductive=False) for k in steps]
    by_classifier, by_mean = ([accuracy(result[i], tasks.y_qry) for result in results] for i in (0, 1))
    _, null_qry = null
    metrics = {}
    for model, k, (logits, _, query), nearest in zip(("meta", "finetuned"), steps, results, by_mean):
        queries, weight = ([query, logits], tasks.y_qry), trajectory[k][net.classifier]
        values = nc_metrics.measure(*queries, *queries, logits.shape[-1], weight, null_qry, null_qry)
        metrics[model] = {name: value[:1].T for name, value in values.items() if not name.startswith("ncc_")}
        metrics[model]["ncc_accuracy"] = nearest[:, None]  # by support means of its own for every query
    return {"metrics": metrics, "accuracy": torch.stack(by_classifier[::2], 1),
            "nearest_mean": torch.stack(by_mean[::2], 1)}


def dimension(net: Learner, images: Tensor, dataset: Dataset) -> Tensor:
    """Effective dimension of the class means of images [class, image, c, h, w] at the classifier's input."""
    device = next(net.parameters()).device
    means = 0
    for image in images.split(1, 1):
        x = as_tasks(image[None].to(device), 1, dataset.mean, dataset.std).x_spt  # [1, classes, c, h, w]
        means = means + net(x, features=True)[1][-2][0].double() / images.shape[1]
    return nc_metrics.effective_dimension(means)


if __name__ == "__main__":
    files.run(main)
