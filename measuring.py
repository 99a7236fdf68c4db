"""Accuracy and neural collapse of the query sets along the inner loop: what is measured while MAML trains.

T tasks, K inner steps, L layers: the blocks and the logits. Tasks lead every tensor.
"""

from typing import Sequence

import torch
from torch import Tensor

import nc_metrics
from learner import Learner, Weights
from tasks import Tasks


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers in each task: [T, N, C], [T, N] -> [T]."""
    return (logits.argmax(-1) == labels).float().mean(1)


@torch.no_grad()
def accuracies(net: Learner, tasks: Tasks, trajectory: Sequence[Weights]) -> Tensor:
    """Query accuracy with each set of weights, [T, K+1]."""
    return torch.stack([accuracy(net(tasks.x_qry, weights), tasks.y_qry) for weights in trajectory], 1)


def permuted_labels(tasks: Tasks, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The support and query labels in a random order, for the metrics' null."""
    return nc_metrics.permuted(tasks.y_spt, generator), nc_metrics.permuted(tasks.y_qry, generator)


@torch.no_grad()
def collapse_metrics(net: Learner, tasks: Tasks, trajectory: Sequence[Weights],
                     null: tuple[Tensor, Tensor] | None) -> dict | None:
    """Neural collapse of the query features, and of the adapted model's support features, task by task.

    Args:
        trajectory: the weights before adaptation and after each inner step, from `meta.adapt`.
        null: permuted support and query labels, [T, N_spt] and [T, N_qry]; None: nothing is measured.
    Returns:
        None without `null`, else
        "meta" (before adaptation), "finetuned" (after the last inner step): entries of `nc_metrics.measure`, [T, L].
        "support": the same of the adapted model's support features, where there are two or more per class.
        "inner": "within" and "between" [T, K+1, L], "accuracy" [T, K+1]: before and after each inner step.
    """
    if null is None:
        return None
    null_spt, null_qry = null
    metrics, inner, last = {}, [], len(trajectory) - 1
    for k, weights in enumerate(trajectory):
        logits, layers = net(tasks.x_qry, weights, features=True)
        n_way = logits.shape[-1]
        if k in (0, last):
            _, support_layers = net(tasks.x_spt, weights, features=True)
            support, of_support = (support_layers, tasks.y_spt), (n_way, weights[net.classifier])
            model = {0: "meta", last: "finetuned"}[k]
            metrics[model] = nc_metrics.measure(layers, tasks.y_qry, *support, *of_support, null_qry, null_spt)
            if k == last and tasks.y_spt.shape[1] > n_way:
                metrics["support"] = nc_metrics.measure(*support, *support, *of_support, null_spt, null_spt)
            within, between = (metrics[model][name].T for name in ("within", "between"))
        else:
            traces = [nc_metrics.covariance_traces(features, tasks.y_qry, n_way) for features in layers]
            within, between = (torch.stack(trace, 1) for trace in zip(*traces))
        inner.append({"within": within, "between": between, "accuracy": accuracy(logits, tasks.y_qry)})
    return {model: {name: values.T for name, values in found.items()} for model, found in metrics.items()} | {
        "inner": {name: torch.stack([step[name] for step in inner], 1) for name in inner[0]}}
