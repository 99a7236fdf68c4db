"""Accuracy and neural collapse of the query sets along the inner loop: what is measured while a network trains.

T tasks, K inner steps, L layers: the blocks and the logits. Tasks lead every tensor.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import nc_metrics
from learner import Learner, Weights
from tasks import Tasks


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each task: [T, N, C], [T, N] -> [T]."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct answers per task: [T, N, C], [T, N] -> [T]. Logits that are not finite count as wrong."""
    return ((logits.argmax(-1) == labels) & logits.isfinite().all(-1)).float().mean(1)


def class_means(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """As `nc_metrics.class_means`, in the features' dtype and for classes of any size."""
    one_hot = (labels[..., None] == torch.arange(n_way, device=labels.device)).to(features)
    return one_hot.mT @ features / one_hot.sum(-2)[..., None]


def squared_distances(features: Tensor, means: Tensor) -> Tensor:
    """[..., N, D], [..., C, D] -> [..., N, C]."""
    return (features[..., :, None, :] - means[..., None, :, :]).square().sum(-1)


def with_patches(net: Learner, tasks: Tasks) -> Tasks:
    """The tasks with their images as `Learner.patches`, which are made once for several sets of weights."""
    return tasks._replace(x_spt=net.patches(tasks.x_spt), x_qry=net.patches(tasks.x_qry))


@torch.no_grad()
def accuracies(net: Learner, tasks: Tasks, trajectory: Sequence[Weights], transductive: bool = True) -> dict:
    """Query accuracy with each set of weights, by the classifier and by the nearest support mean of its input.

    Returns:
        "accuracy", "nearest_mean": [T, K+1].
    """
    tasks = with_patches(net, tasks) if transductive else tasks
    answers = [scores(net, tasks, weights, transductive)[:2] for weights in trajectory]
    return {name: torch.stack([accuracy(one, tasks.y_qry) for one in along], 1)
            for name, along in zip(("accuracy", "nearest_mean"), zip(*answers))}


def one_by_one(net: Learner, tasks: Tasks, trajectory: Sequence[Weights], every_query: bool) -> dict | None:
    """`accuracies` without transduction, of all queries or of the first of each class; None for an empty trajectory."""
    if not every_query:  # queries lie class after class
        first = slice(None, None, tasks.y_qry.shape[1] // net.shapes[-1][0])
        tasks = tasks._replace(x_qry=tasks.x_qry[:, first], y_qry=tasks.y_qry[:, first])
    return accuracies(net, tasks, trajectory, transductive=False) if trajectory else None


def scores(net: Learner, tasks: Tasks, weights: Weights, transductive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, minus the squared distances to the support means, and the queries' features at the classifier's input.

    Args:
        transductive: batch norm by the statistics of the whole query set, as MAML's code does. Otherwise each query is
            normalised with the task's support set only, so that no query changes another's prediction.
    Returns:
        [T, N_qry, C], [T, N_qry, C], [T, N_qry, D].
    """
    if transductive:
        logits, query = net(tasks.x_qry, weights, features=True)
        _, support = net(tasks.x_spt, weights, features=True)
        means = class_means(support[-2], tasks.y_spt, logits.shape[-1])
        return logits, -squared_distances(query[-2], means), query[-2]
    logits, support, query = _with_own_support(net, tasks, weights)
    means = class_means(support, tasks.y_spt[:, None], logits.shape[-1])
    return logits, -squared_distances(query[:, :, None], means)[:, :, 0], query


def _with_own_support(net: Learner, tasks: Tasks, weights: Weights) -> list[Tensor]:
    """Logits [T, N_qry, C], features of a support set per query [T, N_qry, N_spt, D] and of the queries [T, N_qry, D].

    Each query is in a batch with the support set. About as many images go at once as the query set has.
    """
    n_support, n_query = tasks.x_spt.shape[1], tasks.x_qry.shape[1]
    parts = []
    for query in tasks.x_qry.split(max(1, n_query // (n_support + 1)), 1):
        support = tasks.x_spt[:, None].expand(-1, query.shape[1], *tasks.x_spt.shape[1:])
        images = torch.cat([support, query[:, :, None]], 2)  # [T, queries, N_spt + 1, c, h, w]
        logits, layers = net(images.flatten(1, 2), weights, features=True, groups=query.shape[1])
        logits, features = (values.unflatten(1, images.shape[1:3]) for values in (logits, layers[-2]))
        parts.append((logits[:, :, -1], features[:, :, :-1], features[:, :, -1]))
    return [torch.cat(values, 1) for values in zip(*parts)]


def permuted_labels(tasks: Tasks | None, seed: int) -> tuple[Tensor, Tensor] | None:
    """The support and query labels in a random order, for the metrics' null; no other generator is touched."""
    if tasks is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return nc_metrics.permuted(tasks.y_spt, generator), nc_metrics.permuted(tasks.y_qry, generator)


@torch.no_grad()
def collapse_metrics(net: Learner, tasks: Tasks, trajectory: Sequence[Weights], null: tuple[Tensor, Tensor]) -> dict:
    """Neural collapse of the query and support features along the inner loop, task by task.

    Args:
        trajectory: the weights before adaptation and after each inner step, from `meta.adapt`.
        null: permuted support and query labels, [T, N_spt] and [T, N_qry].
    Returns:
        "meta" (before adaptation), "finetuned" (after the last inner step, if there is one): entries of
        `nc_metrics.measure`, [T, L].
        "inner": "within" and "between" [T, K+1, L], "accuracy" [T, K+1]: before and after each inner step.
        With two or more support images per class (one has no spread) also "support", the same entries for the adapted
        model's support features, and in "inner" their traces, "support_within" and "support_between".
    """
    null_spt, null_qry = null
    tasks = with_patches(net, tasks)
    n_way, last = net.shapes[-1][0], len(trajectory) - 1
    several = tasks.y_spt.shape[1] > n_way
    metrics, inner = {}, []
    for k, weights in enumerate(trajectory):
        logits, query_layers = net(tasks.x_qry, weights, features=True)
        support_layers = net(tasks.x_spt, weights, features=True)[1] if several or k in (0, last) else []
        query, support = (query_layers, tasks.y_qry), (support_layers, tasks.y_spt)
        rest = n_way, weights[net.classifier]
        if k in (0, last):
            model = "finetuned" if k else "meta"
            metrics[model] = nc_metrics.measure(*query, *support, *rest, null_qry, null_spt)
        if k == last and several:
            metrics["support"] = nc_metrics.measure(*support, *support, *rest, null_spt, null_spt)
        within, between = _traces(*query, n_way)
        step = {"within": within, "between": between, "accuracy": accuracy(logits, tasks.y_qry)}
        if several:
            step["support_within"], step["support_between"] = _traces(*support, n_way)
        inner.append(step)
    metrics = {model: {name: layers.T for name, layers in values.items()} for model, values in metrics.items()}
    return metrics | {"inner": {name: torch.stack([step[name] for step in inner], 1) for name in inner[0]}}


def _traces(layers: Sequence[Tensor], labels: Tensor, n_way: int) -> list[Tensor]:
    """Within-class and between-class trace of every layer, each [T, L]."""
    return [torch.stack(traces, 1)
            for traces in zip(*(nc_metrics.covariance_traces(features, labels, n_way) for features in layers))]
