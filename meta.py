"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017), all tasks of a meta-step together.

`adapt` is the inner loop (the paper's equation 1, K times), `meta_gradient` the outer gradient (its algorithm 2,
line 10), `Meta` one meta-step after the other. Second order differentiates through the inner gradients; first order
takes them as constants.

    net = Learner(layers, imgc=1, imgsz=28)
    maml = Meta(net, update_lr=0.4, update_step=5)
    step = maml(tasks)                          # one meta-step
    found = maml.finetune(tasks)                # test: accuracy after each inner step; theta stays as it is
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import device as devices
from baselines import BASELINES
from learner import Learner, Weights
from measuring import (
    accuracies,
    accuracy,
    collapse_metrics,
    cross_entropy,
    first_queries,
    permuted_labels,
    query_accuracy,
)
from tasks import Tasks, cat, chunked, chunks, tree_map

LATE = 7_500  # meta-steps: the original's first figure covers them, and measures more often than its second


class Step(NamedTuple):
    """What one meta-step saw, before its update; all on the device."""

    losses: Tensor  # [T], query cross-entropy of the adapted weights, mean over samples
    accuracy: Tensor  # [T, 1 or K+1] on the query set: after the inner loop, or before it and after each inner step
    metrics: dict | None  # as `measuring.collapse_metrics`, at every nc_every-th step


class Adapted(NamedTuple):
    """What `Meta.finetune` finds on the query sets, before adaptation and after each of K inner steps."""

    accuracy: Tensor  # [T, K+1]
    nearest_mean: Tensor  # [T, K+1] accuracy of the nearest support mean at the classifier's input
    metrics: dict | None  # as `measuring.collapse_metrics`
    nontransductive: dict | None  # "accuracy", "nearest_mean" [T, n]: the same query by query, after n chosen steps


def leaves(weights: Weights) -> dict[str, Tensor]:
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def adapt(net: Learner, weights: Weights, x: Tensor, y: Tensor, lr: float, steps: int,
          second_order: bool = False, adapted: Sequence[str] | None = None) -> list[Weights]:
    """The inner loop: K steps of SGD on each task's own loss, for all tasks at once. Nothing passed in changes.

    Args:
        weights: where to start; one set for all tasks, or each with a leading task axis [T, ...].
        x, y: support sets, [T, N, c, h, w] and [T, N].
        lr: of SGD on the mean cross-entropy of a task's support set (the paper's alpha).
        steps: K.
        second_order: keep the graph, so that the last weights can be differentiated with respect to the first.
        adapted: names of the weights that change; all that the network lets change if None.
    Returns:
        K+1 sets of weights, each [T, ...]: the start, and after each step.
    """
    names = net.adaptable if adapted is None else adapted
    trajectory = [net.per_task(weights, len(x))]
    for _ in range(steps):
        weights = trajectory[-1] if second_order else leaves(trajectory[-1])
        with torch.enable_grad():
            loss = cross_entropy(net(x, weights), y).sum()  # tasks share nothing: each gets its own gradient
            gradients = torch.autograd.grad(loss, [weights[name] for name in names], create_graph=second_order)
            trajectory.append(weights | {name: weights[name].add(g, alpha=-lr) for name, g in zip(names, gradients)})
    return trajectory


def query_pass(net: Learner, weights: Weights, tasks: Tasks) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Query loss [T], accuracy [T], and the loss's gradient with respect to each task's own weights, each [T, ...]."""
    weights = leaves(weights)
    logits = net(tasks.x_qry, weights)
    loss = cross_entropy(logits, tasks.y_qry)
    gradients = torch.autograd.grad(loss.sum(), list(weights.values()))
    return loss.detach(), accuracy(logits, tasks.y_qry), list(gradients)


def meta_gradient(net: Learner, tasks: Tasks, lr: float, steps: int, first_order: bool = False,
                  query_chunk: int = devices.NO_LIMIT, adapted: Sequence[str] | None = None,
                  ) -> tuple[list[Tensor], Tensor, Tensor, list[Weights]]:
    """Gradient of the sum of the adapted weights' query losses with respect to theta (algorithm 2, line 10).

    The gradient with respect to the adapted weights, `query_chunk` tasks at a time, is pulled back through the inner
    loop. Returns a gradient per weight of theta, losses [T], accuracies [T], the inner loop's weights (detached).
    """
    theta = dict(net.weights)
    trajectory = adapt(net, theta, tasks.x_spt, tasks.y_spt, lr, steps, not first_order, adapted)
    last = trajectory[-1]
    losses, right, outer = chunked(partial(query_pass, net), query_chunk, len(tasks.y_qry), last, tasks)
    if first_order:  # the last weights are theta minus constants
        gradient = [g.sum(0) for g in outer]
    else:
        outer = [torch.empty_like(w).copy_(g) for w, g in zip(last.values(), outer)]  # in their layout: faster
        gradient = list(torch.autograd.grad(list(last.values()), list(theta.values()), outer))
    return gradient, losses, right, tree_map(Tensor.detach, trajectory)


def adapted_by(learner: str, net: Learner) -> list[str] | None:
    """Names of the weights that the learner's inner loop adapts; None: all that may be."""
    return {"anil": net.head, "boil": [name for name in net.adaptable if name not in net.head]}.get(learner)


class Meta(nn.Module):
    """MAML around a Learner: its weights are theta, Adam is the outer optimiser.

    Args:
        net: the network, on the device where training runs; its last layer is linear, with one output per class.
        update_lr: inner learning rate. meta_lr: Adam's.
        update_step: inner steps K in training. update_step_test: in `finetune`.
        first_order: take the inner gradients as constants.
        nc_every: measure at meta-steps 0, nc_every, 2 nc_every, ...; 0 never.
        nc_every_late: the same from meta-step LATE on; nc_every if None.
        task_chunk: tasks in memory together at most; less memory, the same result. 0: all, or as fits the device.
        seed: of the permuted labels (the metrics' null).
        clip: the outer gradient is clipped to [-clip, clip], value by value, as in the paper's code; 0 doesn't clip.
        learner: which algorithm. maml; anil (Raghu et al. 2020): the inner loop adapts the last linear layer alone;
            boil (Oh et al. 2021): all but it; protonet, classifier: no inner loop in training (baselines.py).
        cosine_steps: Adam's rate falls from meta_lr to 0 as half a cosine over so many updates; 0: it is constant.
        skip_nonfinite: if a loss, a gradient or Adam's state is not finite, the update is skipped; training halts
            there (default) or continues with the next tasks.

    `step` counts meta-steps, and `updates`, on the device, those that changed the weights.
    With several processes (device.py), each takes an equal share of a meta-step's tasks.
    """

    def __init__(self, net: Learner, update_lr: float = 0.4, meta_lr: float = 1e-3, update_step: int = 5,
                 update_step_test: int = 10, first_order: bool = False, nc_every: int = 0, task_chunk: int = 0,
                 seed: int = 222, nc_every_late: int | None = None, clip: float = 0.0, skip_nonfinite: bool = False,
                 learner: str = "maml", cosine_steps: int = 0):
        super().__init__()
        self.net = net
        self.update_lr = update_lr
        self.update_step, self.update_step_test = update_step, update_step_test
        self.first_order = first_order
        self.nc_every, self.nc_every_late = nc_every, nc_every if nc_every_late is None else nc_every_late
        self.task_chunk, self.seed = task_chunk, seed
        self.clip, self.skip_nonfinite = clip, skip_nonfinite
        self.learner, self.meta_lr, self.cosine_steps = learner, meta_lr, cosine_steps
        self.adapted = adapted_by(learner, net)
        self.step = 0
        weights = list(net.parameters())
        on_device = {"device": weights[0].device}
        self.updates = torch.zeros((), dtype=torch.int64, **on_device)
        self.halted = torch.zeros((), dtype=torch.bool, **on_device)  # no update is made any more
        rate = torch.tensor(meta_lr, **on_device) if cosine_steps else meta_lr  # a tensor may change within a graph
        self.optimizer = torch.optim.Adam(weights, lr=rate, capturable=weights[0].is_cuda)
        for weight in weights:  # as Adam itself makes it in its first step
            self.optimizer.state[weight] = {"step": torch.zeros((), **on_device), "exp_avg": torch.zeros_like(weight),
                                            "exp_avg_sq": torch.zeros_like(weight)}

    @property
    def measures_next(self) -> bool:
        """Whether the next meta-step measures."""
        every = self.nc_every if self.step < LATE else self.nc_every_late
        return every > 0 and self.step % every == 0

    def state(self) -> list[Tensor]:
        """Every tensor that a meta-step changes."""
        adam = [t for weight in self.net.parameters() for t in self.optimizer.state[weight].values()]
        return [*self.net.parameters(), *adam, self.updates, self.halted]

    def forward(self, tasks: Tasks, every_step: bool = False, measured: Tasks | None = None,
                classes: Tensor | None = None) -> Step:
        """One meta-step: gradients, what is measured of the weights as they are, Adam.

        Args:
            tasks: T tasks; the gradient is of the mean of their query losses.
            every_step: accuracy before adaptation and after each inner step, not only after the last.
            measured: the same tasks with other query sets, on which the metrics are measured; `tasks` if None.
            classes: [T, n_way], which training class each label stands for; the classifier needs them.
        """
        n_tasks = len(tasks.y_spt)
        measured = (measured or tasks) if self.measures_next else None
        null = self._null(measured) if measured else None
        inner, query = self._training_chunks(tasks)
        shared = tree_map(devices.share, (tasks, measured, null, classes))
        gradients, steps = [], []
        for tasks, measured, null, classes in chunks(inner, len(shared[0].y_spt), *shared):
            gradient, losses, right, trajectory = self._gradient(tasks, classes, query, self.first_order)
            if trajectory is None and (every_step or measured):
                trajectory = self._adapt(tasks, self.update_step)
            right = self._chunked(query_accuracy, query, tasks, trajectory) if every_step else right[:, None]
            gradients.append(gradient)
            steps.append(Step(losses, right, self._metrics(query, measured, trajectory, null)))
        step = tree_map(devices.gather, cat(steps))
        total = devices.add_up([sum(parts) for parts in zip(*gradients)])
        self._update([gradient / n_tasks for gradient in total], step.losses)
        return step

    def _gradient(self, tasks: Tasks, classes: Tensor | None, query_chunk: int, first_order: bool) -> tuple:
        """What `meta_gradient` returns; without an inner loop there is no trajectory."""
        if self.learner in BASELINES:
            return *BASELINES[self.learner](self.net, tasks, classes), None
        return meta_gradient(self.net, tasks, self.update_lr, self.update_step, first_order, query_chunk, self.adapted)

    def _adapt(self, tasks: Tasks, steps: int) -> list[Weights]:
        return adapt(self.net, self.net.weights, tasks.x_spt, tasks.y_spt, self.update_lr, steps, adapted=self.adapted)

    @torch.no_grad()
    def _update(self, gradients: Sequence[Tensor], losses: Tensor) -> None:
        """One Adam step; undone on the device, without a sync, if anything in it is not finite."""
        for weight, gradient in zip(self.net.parameters(), gradients):
            weight.grad = gradient.clamp(-self.clip, self.clip) if self.clip else gradient
        *state, _, _ = self.state()
        before = [tensor.clone() for tensor in state]
        if self.cosine_steps:
            cosine = torch.cos(self.updates * (math.pi / self.cosine_steps))
            self.optimizer.param_groups[0]["lr"].copy_(self.meta_lr * (1 + cosine) / 2)
        self.optimizer.step()
        squares = [self.optimizer.state[weight]["exp_avg_sq"] for weight in self.net.parameters()]
        finite = torch.cat([values.flatten() for values in (losses, *gradients, *squares)]).isfinite().all()
        made = finite & ~self.halted
        for tensor, old in zip(state, before):
            torch.where(made, tensor, old, out=tensor)
        self.updates += made
        if not self.skip_nonfinite:
            self.halted |= ~finite
        self.step += 1

    def losses(self, tasks: Tasks, classes: Tensor | None = None) -> Tensor:
        """What `forward` would see as `Step.losses`, [T]; nothing is updated."""
        inner, query = self._training_chunks(tasks)
        return chunked(lambda *chunk: self._gradient(*chunk, query, first_order=True)[1],  # both orders: equal losses
                       inner, len(tasks.y_spt), tasks, classes)

    def finetune(self, tasks: Tasks, measure: bool = False, null_seed: int | None = None,
                 measured: Tasks | None = None, nontransductive: Sequence[int] = (),
                 every_query: bool = True) -> Adapted:
        """Test-time adaptation from theta, which stays as it is.

        Args:
            measure: also the metrics, after `update_step` inner steps as in training.
            null_seed: of the permuted labels; seed + step if None.
            measured: the same tasks with other query sets, on which the metrics are measured; `tasks` if None.
            nontransductive: after so many inner steps, also answer query by query.
            every_query: all queries that way, or the first of each class alone: each costs a pass of the support set.
        """
        steps = max(self.update_step_test, self.update_step if measure else 0)
        measured = (measured or tasks) if measure else None
        null = self._null(measured, null_seed) if measured else None
        inner, query = self._together(tasks)

        def one_chunk(tasks: Tasks, measured: Tasks | None, null: tuple | None) -> Adapted:
            trajectory = self._adapt(tasks, steps)
            tested = trajectory[:self.update_step_test + 1]
            answers = self._chunked(accuracies, query, tasks, tested)
            metrics = self._metrics(query, measured, trajectory[:self.update_step + 1], null)
            alone = tasks if every_query else first_queries(tasks, self.net.shapes[-1][0])
            one_by_one = self._chunked(partial(accuracies, transductive=False), query, alone,
                                       [tested[k] for k in nontransductive]) if nontransductive else None
            return Adapted(answers["accuracy"], answers["nearest_mean"], metrics, one_by_one)

        return chunked(one_chunk, inner, len(tasks.y_spt), tasks, measured, null)

    def _null(self, tasks: Tasks, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Permuted labels, from a generator of their own: measuring changes nothing else."""
        return permuted_labels(tasks, torch.Generator().manual_seed(self.seed + self.step if seed is None else seed))

    def _together(self, tasks: Tasks) -> tuple[int, int]:
        """How many tasks go together through the inner loop, and through the query pass."""
        largest = max(math.prod(shape) for shape in self.net.shapes)  # values of an image's largest activation
        sizes = (devices.tasks_together(x.device, x.shape[1] * largest, most)
                 for x, most in ((tasks.x_spt, 9 * 2**16), (tasks.x_qry, 5 * 2**16)))
        return tuple(min(size, self.task_chunk or devices.NO_LIMIT) for size in sizes)

    def _training_chunks(self, tasks: Tasks) -> tuple[int, int]:
        """As `_together`; the classifier takes all tasks, because its batch norm is over all images."""
        inner, query = self._together(tasks)
        return devices.NO_LIMIT if self.learner == "classifier" else inner, query

    def _metrics(self, query: int, measured: Tasks | None, trajectory: Sequence[Weights], null: tuple | None):
        """`collapse_metrics` of `measured`, at most `query` tasks at a time; None without it."""
        if measured is None:
            return None
        return self._chunked(collapse_metrics, min(query, self._together(measured)[1]), measured, trajectory, null)

    def _chunked(self, function: Callable, size: int, tasks: Tasks, *trees):
        return chunked(partial(function, self.net), size, len(tasks.y_qry), tasks, *trees)

