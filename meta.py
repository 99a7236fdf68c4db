"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017), all tasks of a meta-step together.

`adapt` is the inner loop (the paper's algorithm 2, lines 6 and 7, K times), `meta_gradient` the outer gradient (its
line 10), and `Meta` takes the meta-steps.

    net = Learner(layers, imgc=1, imgsz=28)
    maml = Meta(net, update_lr=0.4, update_step=5)
    step = maml(tasks)                          # one meta-step; tasks.py shows where tasks come from
    adapted = maml.finetune(tasks)              # test: accuracy after each inner step; theta stays as it is
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import device as devices
from adam import GuardedAdam
from baselines import BASELINES, inner_rates
from learner import Learner, Weights, leaves
from measuring import accuracies, accuracy, collapse_metrics, cross_entropy, one_by_one, permuted_labels
from tasks import Tasks, cat, chunked, chunks, tree_map

LATE = 7_500  # the meta-step from which `nc_every_late` holds instead of `nc_every`
NO_LIMIT = 2**31 - 1
SMALL = 13 * 2**16  # on a CPU, a task with more values in its largest activation goes alone
TOGETHER = 5 * 2**21  # most values in the largest activation of tasks that go together


class Step(NamedTuple):
    """Results of one meta-step, before its update; all on the device."""

    losses: Tensor  # [T], mean query cross-entropy of the adapted weights; a baseline's own loss
    accuracy: Tensor  # of the queries (classifier: all images), [T, 1]; of an inner loop with every_step [T, K+1]
    metrics: dict | None  # as `measuring.collapse_metrics`, at every nc_every-th step, else None


class Adapted(NamedTuple):
    """What `Meta.finetune` finds on the query sets, before adaptation and after each of K inner steps."""

    accuracy: Tensor  # [T, K+1]
    nearest_mean: Tensor  # [T, K+1] accuracy of the nearest support mean at the classifier's input
    metrics: dict | None  # as `measuring.collapse_metrics`
    nontransductive: dict | None  # both, each query normalised with the support set alone, at the steps asked for


def adapt(net: Learner, weights: Weights, x: Tensor, y: Tensor, lr: float | Mapping[str, float], steps: int,
          second_order: bool = False) -> list[Weights]:
    """The inner loop: K steps of SGD on each task's mean cross-entropy, all tasks at once. Nothing passed in changes.

    Args:
        weights: where to start; one set for all tasks, or each with a leading task axis [T, ...].
        x, y: support sets, [T, N, c, h, w] and [T, N].
        lr: the paper's alpha, or one per adapted weight: numbers, or parameters of `net` (Meta-SGD, Li et al. 2017).
        second_order: differentiate the inner gradients too; else they are constants in the returned weights' graph.
    Returns:
        `steps` + 1 sets of weights, each [T, ...]: the start, which shares memory with `weights`, and after each step.
    """
    lr = lr if isinstance(lr, Mapping) else dict.fromkeys(net.adaptable, lr)
    with torch.enable_grad():
        x = net.patches(x)
        trajectory = [net.per_task(weights, len(x))]
        for _ in range(steps):
            last = trajectory[-1]
            weights = last if second_order else leaves(last)
            loss = cross_entropy(net(x, weights), y).sum()  # tasks share nothing: each gets its own gradient
            gradients = torch.autograd.grad(loss, [weights[name] for name in lr], create_graph=second_order)
            trajectory.append(last | {name: last[name] - lr[name] * g for name, g in zip(lr, gradients)})
    return trajectory


def query_pass(net: Learner, weights: Weights, tasks: Tasks) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Query loss [T], accuracy [T], and the loss's gradient with respect to each task's own weights, each [T, ...]."""
    weights = leaves(weights)
    logits = net(tasks.x_qry, weights)
    loss = cross_entropy(logits, tasks.y_qry)
    gradients = torch.autograd.grad(loss.sum(), list(weights.values()))
    return loss.detach(), accuracy(logits, tasks.y_qry), list(gradients)


def meta_gradient(net: Learner, tasks: Tasks, lr: float | Mapping[str, float], steps: int, first_order: bool = False,
                  query_chunk: int = NO_LIMIT) -> tuple[list[Tensor], Tensor, Tensor, list[Weights]]:
    """Gradient of the sum of the adapted weights' query losses with respect to theta (algorithm 2, line 10).

    The gradient with respect to the adapted weights, `query_chunk` tasks at a time, is pulled back through the inner
    loop. `lr` and `steps` are those of `adapt`; `first_order` takes the inner gradients as constants.

    Returns:
        A gradient per parameter of `net`, losses [T], accuracies [T], the inner loop's weights (detached).
    """
    trajectory = adapt(net, net.weights, tasks.x_spt, tasks.y_spt, lr, steps, not first_order)
    last = trajectory[-1]
    losses, correct, outer = chunked(partial(query_pass, net), query_chunk, len(tasks.y_qry), last, tasks)
    if not first_order:  # in the weights' layout: faster
        outer = [torch.empty_like(w).copy_(g) for w, g in zip(last.values(), outer)]
    gradient = torch.autograd.grad(list(last.values()), list(net.parameters()), outer, materialize_grads=True)
    return list(gradient), losses, correct, tree_map(Tensor.detach, trajectory)


@dataclass(eq=False, repr=False)
class Meta:
    """MAML around a Learner: its weights are theta, Adam is the outer optimiser.

    `step` counts meta-steps, and `updates`, on the device, those that changed the weights. If a loss, a gradient,
    Adam's state or a new weight is not finite, the update is skipped, and all later ones too unless `skip_nonfinite` is
    set: nothing is raised, so compare `updates` with `step`. Of several processes (device.py), each takes an equal
    share of the tasks. Later changes of update_lr, meta_lr, learner, clip and the like have no effect.

    Raises:
        ValueError: an unknown learner or block, a weight that requires no gradient, a last layer that is not linear.
    """

    net: Learner  # on the device and in the dtype of training; its last layer is linear, with one output per class
    update_lr: float = 0.4  # inner learning rate
    meta_lr: float = 1e-3  # Adam's
    update_step: int = 5  # inner steps K in training
    update_step_test: int = 10  # inner steps in `finetune`
    first_order: bool = False  # take the inner gradients as constants
    nc_every: int = 0  # measure at meta-steps 0, nc_every, 2 nc_every, ...; 0: never
    task_chunk: int = 0  # maximum tasks in memory at once; the same up to rounding; 0: all on a GPU, by size on a CPU
    seed: int = 222  # of the permuted labels (the metrics' null)
    nc_every_late: int | None = None  # nc_every from meta-step LATE on; None: the same
    clip: float = 0.0  # each value of the outer gradient is clipped to -clip..clip, as in the paper's code; 0: none
    skip_nonfinite: bool = False  # skip an update that is not finite and continue, else training halts there
    learner: str = "maml"  # or anil, boil (see `inner_rates`); protonet, classifier: no inner loop in training
    head_lr: float | None = None  # inner learning rate of the last layer; None: update_lr
    freeze_head: bool = False  # the last layer's weights in theta are not trained; the inner loop still adapts them
    adapt_blocks: Collection[int] | None = None  # the only blocks that MAML's inner loop adapts (`Learner.block`)
    cosine_steps: int = 0  # Adam's rate falls to 0 as half a cosine over so many updates, and stays 0; 0: constant
    keep_norms: bool = False  # each update scales the convolutions' kernels back to the norms that they began with

    def __post_init__(self) -> None:
        if not all(weight.requires_grad for weight in self.net.parameters()):
            raise ValueError("Meta trains all weights; the last layer's can be kept with freeze_head")
        if self.net.config[-1][0] != "linear":
            raise ValueError(f"the last layer is {self.net.config[-1][0]} and must be linear")
        self.step = 0
        self.rates = inner_rates(self.net, self.learner, self.update_lr, self.head_lr, self.adapt_blocks)
        self.outer = GuardedAdam(self.net.parameters(), self.meta_lr, self.cosine_steps, self.clip, self.skip_nonfinite,
                                 self.keep_norms)
        self.optimizer, self.updates, self.state = self.outer.adam, self.outer.updates, self.outer.state

    @property
    def measures_next(self) -> bool:
        """Whether the next meta-step measures."""
        every = self.nc_every if self.step < LATE or self.nc_every_late is None else self.nc_every_late
        return self.nc_every > 0 and every > 0 and self.step % every == 0

    def __call__(self, tasks: Tasks, every_step: bool = False, measured: Tasks | None = None,
                 classes: Tensor | None = None) -> Step:
        """One meta-step: gradients, metrics of the weights before the update, Adam.

        Args:
            tasks: T tasks; the gradient is of the mean of their query losses.
            every_step: accuracy before adaptation and after each inner step, not only after the last (a baseline: one).
            measured: the same tasks with other query sets, on which the metrics are measured; `tasks` if None.
            classes: [T, n_way], which training class each label stands for; the classifier needs them.
        """
        measured = (measured or tasks) if self.measures_next else None
        null = permuted_labels(measured, self.seed + self.step)
        local = tree_map(devices.local_tasks, (tasks, measured, null, classes))
        baseline, gradients, steps = BASELINES.get(self.learner), [], []
        inner, query = self._together(tasks.x_spt), self._together(tasks.x_qry)
        if baseline:  # one pass: classifier's batch norm is over all images of the step
            inner = NO_LIMIT if self.learner == "classifier" else min(inner, query)
        for tasks, measured, null, classes in chunks(inner, len(local[0].y_spt), *local):
            if baseline:
                gradient, losses, correct = baseline(self.net, tasks, classes)
                trajectory = measured and self.adapt(tasks, self.update_step)
            else:
                gradient, losses, correct, trajectory = meta_gradient(
                    self.net, tasks, self.rates, self.update_step, self.first_order, query)
            along = every_step and not baseline
            correct = self._chunked(accuracies, tasks, trajectory)["accuracy"] if along else correct[:, None]
            metrics = measured and self._chunked(collapse_metrics, measured, trajectory, null)
            gradients.append(gradient)
            steps.append(Step(losses, correct, metrics))
        step = tree_map(devices.gather, cat(steps))
        total = devices.all_reduce([sum(parts) for parts in zip(*gradients)])
        if self.freeze_head and not baseline:  # Adam leaves a weight whose gradient is always 0 as it is
            for (name, _), g in zip(self.net.named_parameters(), total):
                g *= name.removeprefix("weights.") not in self.net.head
        self.outer.step([gradient / len(step.losses) for gradient in total], step.losses)
        self.step += 1
        return step

    def finetune(self, tasks: Tasks, measured: Tasks | None = None, null_seed: int = 0,
                 nontransductive: Sequence[int] = (), every_query: bool = True) -> Adapted:
        """Test-time adaptation from theta, which stays as it is; a ValueError if the tasks' n_way is not the net's.

        Args:
            measured: the same tasks, of any query sets, on which the metrics are measured, after `update_step` inner
                steps as in training; None: nothing is measured.
            null_seed: of the metrics' permuted labels.
            nontransductive: numbers of inner steps after which each query is also classified alone, normalised with the
                support set only.
            every_query: for all queries, or only the first of each class; each needs its own support-set pass.
        """
        if (classes := int(tasks.y_spt.max()) + 1) != self.net.shapes[-1][0]:
            raise ValueError(f"tasks have {classes} classes, and the network has {self.net.shapes[-1][0]} outputs")
        steps = max(self.update_step_test, self.update_step if measured else 0)
        inner = self._together(tasks.x_spt)
        given, results = (tasks, measured, permuted_labels(measured, null_seed)), []
        for tasks, measured, null in chunks(inner, len(given[0].y_spt), *given):
            trajectory = self.adapt(tasks, steps)
            answers = self._chunked(accuracies, tasks, trajectory[:self.update_step_test + 1])
            metrics = measured and self._chunked(collapse_metrics, measured, trajectory[:self.update_step + 1], null)
            alone = self._chunked(one_by_one, tasks, [trajectory[k] for k in nontransductive], every_query)
            results.append(Adapted(**answers, metrics=metrics, nontransductive=alone))
        return cat(results)

    def adapt(self, tasks: Tasks, steps: int) -> list[Weights]:
        """The inner loop from theta, without its graph: K+1 sets of weights, as `adapt`."""
        theta = tree_map(Tensor.detach, dict(self.net.weights))
        return adapt(self.net, theta, tasks.x_spt, tasks.y_spt, self.rates, steps)

    def _together(self, x: Tensor) -> int:
        """How many tasks with images x [T, N, c, h, w] go together: all on a GPU, by their size on a CPU."""
        values = x.shape[1] * max(map(math.prod, self.net.shapes))
        fitting = TOGETHER // values if values <= SMALL else 1
        return min(fitting if x.device.type == "cpu" else NO_LIMIT, self.task_chunk or NO_LIMIT)

    def _chunked(self, function: Callable, tasks: Tasks, *trees):
        return chunked(partial(function, self.net), self._together(tasks.x_qry), len(tasks.y_qry), tasks, *trees)
