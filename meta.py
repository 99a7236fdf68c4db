"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017), all tasks of a meta-step together.

`adapt` is the inner loop (the paper's equation 1, K times). `Meta.forward` is one
meta-step (its algorithm 2): adapt theta to every task's support set, take the
query loss of the adapted weights, and step Adam along its gradient with respect
to theta. Second order differentiates through the inner gradients; first order
takes the inner gradients as constants.

    net = Learner(layers, imgc=1, imgsz=28)
    maml = Meta(net, update_lr=0.4, update_step=5)
    step = maml(tasks)                  # one meta-step
    result = maml.finetune(tasks)       # test: accuracy after each inner step; theta stays
"""

import math
from typing import Iterator, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import device as devices
import nc_metrics
from learner import Learner, Weights
from tasks import Tasks


ALL = 2**31 - 1
PIECE = 2**20  # numbers of a layer's features measured together: in float64 some 8 MB, a few passes over a CPU's cache
LATE = 7_500  # meta-steps: the three epochs of the original's first figure, which measured more often than later ones


Output = tuple[Tensor, list[Tensor]]  # logits and features, as `Learner.forward` returns them


class Step(NamedTuple):
    """What one meta-step saw, before its update; all on the device."""

    losses: Tensor  # [T], each task's query cross-entropy with its adapted weights, mean over samples
    accuracy: Tensor  # [T, 1 or K+1] on the query set: after the inner loop, or before it and after each inner step
    metrics: dict | None  # as `Meta._measure`, at every nc_every-th step


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each task: [T, N, C], [T, N] -> [T]."""
    return -F.log_softmax(logits, -1).gather(-1, labels[..., None]).mean((1, 2))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers in each task: [T, N, C], [T, N] -> [T]."""
    return (logits.argmax(-1) == labels).float().mean(1)


def adapt(
    net: Learner, weights: Weights, x: Tensor, y: Tensor, lr: float, steps: int, second_order: bool = False
) -> list[Weights]:
    """The inner loop: SGD on each task's own loss, for all tasks at once.

    A pure function: nothing that is passed in changes.

    Args:
        net: the network.
        weights: where to start; one set for all tasks, or each with a leading task axis [T, ...].
        x, y: support sets, [T, N, c, h, w] and [T, N].
        lr: of SGD on the mean cross-entropy of a task's support set (the paper's alpha).
        steps: K.
        second_order: keep the graph, so that the last weights can be differentiated with respect to the first.
    Returns:
        K+1 sets of weights, each [T, ...]: the start, and after each step.
    """
    weights = net.per_task(weights, len(x))
    trajectory = [weights]
    for _ in range(steps):
        with torch.enable_grad():
            if not second_order:
                weights = _leaves(weights)
            loss = cross_entropy(net(x, weights), y).sum()  # tasks share nothing: each gets its own gradient
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
            weights = {name: w.add(g, alpha=-lr) for (name, w), g in zip(weights.items(), gradients)}
        trajectory.append(weights)
    return trajectory


def chunk_sizes(device: torch.device, net: Learner, support: int, query: int) -> tuple[int, int]:
    """How many tasks go together at most through the inner loop, and through the query pass.

    Args:
        support, query: images per task.
    """
    if device.type != "cpu":
        return ALL, ALL
    largest = max(math.prod(shape) for shape in net.shapes)  # values of an image's largest activation
    return tasks_together(support * largest, 9 * 2**16), tasks_together(query * largest, 5 * 2**16)


def tasks_together(values: int, most: int) -> int:
    """Tasks per chunk on a CPU (benchmarks/README.md has the measurements).

    Args:
        values: of a task's largest activation. Up to `most`, one task is too little work per operation, and as many
            tasks go together as make 5 * 2^19 values (10 MB). Above it, one task fills the cache.
    """
    return 5 * 2**19 // values if values <= most else 1


class Meta(nn.Module):
    """MAML around a Learner: its weights are theta, Adam is the outer optimiser.

    Args:
        net: the network, on the device where training runs; its last layer is linear, one output a class.
        update_lr: inner learning rate. meta_lr: Adam's.
        update_step: inner steps K in training. update_step_test: in `finetune`.
        first_order: take the inner gradients as constants.
        nc_every: measure at meta-steps 0, nc_every, 2 nc_every, ...; 0 never.
        nc_every_late: the same from meta-step LATE on; nc_every if None.
        task_chunk: tasks in memory together at most; less memory, the same result. 0: all, or as fits the device.
        seed: of the permuted labels (the metrics' null).
        clip: the outer gradient is clipped to [-clip, clip], value by value, as in the paper's code; 0 doesn't clip.
        skip_nonfinite: what to do when a loss or the gradient isn't finite. That update is never made: weights and
            Adam stay as they are. True goes on with the next tasks; False makes no further update either, so that
            whoever looks at `updates` later still finds the weights that failed.

    `step` counts meta-steps and `updates`, on the device, how many of them changed the weights: the two differ after
    a loss that wasn't finite, and knowing it costs no wait for the device.

    With several processes (`distributed`), each takes an equal share of a meta-step's tasks.
    """

    def __init__(self, net: Learner, update_lr: float = 0.4, meta_lr: float = 1e-3, update_step: int = 5,
                 update_step_test: int = 10, first_order: bool = False, nc_every: int = 0, task_chunk: int = 0,
                 seed: int = 222, nc_every_late: int | None = None, clip: float = 0.0, skip_nonfinite: bool = False):
        super().__init__()
        self.net = net
        self.update_lr = update_lr
        self.update_step, self.update_step_test = update_step, update_step_test
        self.first_order = first_order
        self.nc_every, self.task_chunk, self.seed = nc_every, task_chunk, seed
        self.nc_every_late = nc_every if nc_every_late is None else nc_every_late
        self.clip, self.skip_nonfinite = clip, skip_nonfinite
        self.step = 0
        weight = next(net.parameters())
        self.updates = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.going = torch.ones((), dtype=torch.bool, device=weight.device)  # False: no update is made any more
        self.optimizer = torch.optim.Adam(net.parameters(), lr=meta_lr, capturable=weight.is_cuda)

    @property
    def measures_next(self) -> bool:
        """Whether the next meta-step measures."""
        every = self.nc_every if self.step < LATE else self.nc_every_late
        return every > 0 and self.step % every == 0

    def forward(self, tasks: Tasks, every_step: bool = False) -> Step:
        """One meta-step: gradients, what is measured of the weights as they are, Adam.

        Args:
            tasks: T tasks; the gradient is of the mean of their query losses.
            every_step: accuracy before adaptation and after each inner step, not only after the last.
        """
        n_tasks = len(tasks.y_spt)
        null = self._null(tasks) if self.measures_next else None
        tasks = Tasks(*map(devices.share, tasks))
        losses, accuracies, metrics, gradients = [], [], [], []
        inner, query = self._chunk_sizes(tasks)
        for i, chunk in enumerate(tasks.split(inner)):
            trajectory, loss, last, gradient, outputs = self._gradient(chunk, query, features=null is not None)
            losses.append(loss)
            gradients.append(gradient)
            if null:
                metrics.append(self._measure(chunk, trajectory, query,
                                             [devices.share(y).split(inner)[i] for y in null], outputs))
            if not every_step:
                accuracies.append(last[:, None])
            elif null:
                accuracies.append(metrics[-1]["inner"]["accuracy"][0])
            else:
                accuracies.append(self._accuracies(chunk, trajectory, query, {self.update_step: last}))
        losses, seen = devices.gather(torch.cat(losses)), devices.gather(torch.cat(accuracies))
        gradients = devices.add_up([sum(parts) for parts in zip(*gradients)])
        self._update([gradient / n_tasks for gradient in gradients], losses)
        return Step(losses, seen, _gather(join(metrics)) if null else None)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], losses: Tensor) -> None:
        """Adam's step, undone on the device where it must not be made."""
        made = torch.stack([values.isfinite().all() for values in (losses, *gradients)]).all()
        made &= self.going
        weights = list(self.net.parameters())
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clamp(-self.clip, self.clip) if self.clip else gradient
        before = [weight.clone() for weight in weights]
        moments = [{name: t.clone() for name, t in self.optimizer.state[weight].items()} for weight in weights]
        self.optimizer.step()
        for weight, old, state in zip(weights, before, moments):
            weight.copy_(torch.where(made, weight, old))
            for name, new in self.optimizer.state[weight].items():  # Adam makes them, all zero, in its first step
                new.copy_(torch.where(made, new, state.get(name, torch.zeros_like(new))))
        self.updates += made
        if not self.skip_nonfinite:
            self.going.copy_(made)
        self.step += 1

    def losses(self, tasks: Tasks) -> Tensor:
        """What `forward` would see as `Step.losses`, [T]; nothing is updated."""
        inner, query = self._chunk_sizes(tasks)
        return torch.cat([self._gradient(chunk, query)[1] for chunk in tasks.split(inner)])

    def _gradient(self, tasks: Tasks, query_chunk: int, features: bool = False):
        """The gradient of the sum of these tasks' query losses with respect to theta.

        The query loss is differentiated with respect to the adapted weights first, and that gradient is then pulled
        back through the inner loop: the same as one backward pass, but the two can be chunked differently.

        Returns:
            The inner loop's weights (detached), losses [t], accuracies [t], a gradient for each of theta's weights,
            and with `features` the query pass's (logits, features) of each chunk.
        """
        theta = dict(self.net.weights)
        second_order = not self.first_order
        trajectory = adapt(self.net, theta, tasks.x_spt, tasks.y_spt, self.update_lr, self.update_step, second_order)
        adapted = trajectory[-1]
        losses, accuracies, parts, outputs = [], [], [], []
        for chunk, weights in zip(tasks.split(query_chunk), _split(adapted, query_chunk)):
            weights = _leaves(weights)
            logits, seen = self.net(chunk.x_qry, weights, features=True)
            if features:
                outputs.append((logits.detach(), [layer.detach() for layer in seen]))
            loss = cross_entropy(logits, chunk.y_qry)
            parts.append(torch.autograd.grad(loss.sum(), list(weights.values())))
            losses.append(loss.detach())
            accuracies.append(accuracy(logits, chunk.y_qry))
        # each [t, ...], in the weights' memory layout: the double backward reads it as it reads them
        gradient = [torch.cat(same, out=torch.empty_like(w)) for same, w in zip(zip(*parts), adapted.values())]
        if second_order:
            gradient = torch.autograd.grad(list(adapted.values()), list(theta.values()), gradient)
        else:  # adapted = theta - constants
            gradient = [g.sum(0) for g in gradient]
        trajectory = [{name: w.detach() for name, w in weights.items()} for weights in trajectory]
        return trajectory, torch.cat(losses), torch.cat(accuracies), gradient, outputs

    def finetune(self, tasks: Tasks, measure: bool = False) -> tuple[Tensor, dict | None]:
        """Test-time adaptation from theta, which stays as it is.

        Args:
            measure: also the metrics, after `update_step` inner steps as in training.
        Returns:
            Query accuracy [T, update_step_test + 1], before adaptation and after each inner step; the metrics or None.
        """
        inner, query = self._chunk_sizes(tasks)
        null = self._null(tasks) if measure else None
        steps = max(self.update_step_test, self.update_step if measure else 0)
        theta = {name: w.detach() for name, w in self.net.weights.items()}
        accuracies, metrics = [], []
        for i, chunk in enumerate(tasks.split(inner)):
            trajectory = adapt(self.net, theta, chunk.x_spt, chunk.y_spt, self.update_lr, steps)
            known = {}
            if null:
                metrics.append(self._measure(chunk, trajectory[:self.update_step + 1], query,
                                             [y.split(inner)[i] for y in null]))
                known = dict(enumerate(metrics[-1]["inner"]["accuracy"][0].unbind(1)))
            accuracies.append(self._accuracies(chunk, trajectory[:self.update_step_test + 1], query, known))
        return torch.cat(accuracies), join(metrics) if null else None

    def _chunk_sizes(self, tasks: Tasks) -> tuple[int, int]:
        sizes = chunk_sizes(tasks.x_spt.device, self.net, tasks.x_spt.shape[1], tasks.x_qry.shape[1])
        return tuple(min(size, self.task_chunk or ALL) for size in sizes)

    def _null(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Permuted support and query labels, drawn from a generator of their own: measuring changes nothing else."""
        generator = torch.Generator(tasks.y_qry.device).manual_seed(self.seed + self.step)
        return nc_metrics.permuted(tasks.y_spt, generator), nc_metrics.permuted(tasks.y_qry, generator)

    def _query(self, tasks: Tasks, weights: Weights, query_chunk: int, features: bool = False) -> list:
        """What `Learner.forward` gives for the query sets, chunk by chunk."""
        return [self.net(chunk.x_qry, w, features)
                for chunk, w in zip(tasks.split(query_chunk), _split(weights, query_chunk))]

    @torch.no_grad()
    def _accuracies(self, tasks: Tasks, trajectory: list[Weights], query_chunk: int,
                    known: Mapping[int, Tensor]) -> Tensor:
        """Query accuracy [t, steps] with each set of weights; {position: [t]} is what is known of it already."""
        return torch.stack([
            known[k] if k in known else accuracy(torch.cat(self._query(tasks, weights, query_chunk)), tasks.y_qry)
            for k, weights in enumerate(trajectory)], 1)

    @torch.no_grad()
    def _measure(self, tasks: Tasks, trajectory: list[Weights], query_chunk: int, null: Sequence[Tensor],
                 outputs: Sequence[Output] = ()) -> dict:
        """Neural-collapse metrics of the query sets, task by task, with the weights along the inner loop.

        Args:
            null: permuted support and query labels.
            outputs: of the query pass with the last weights, if it has been made.
        Returns:
            "meta" (theta) and "finetuned" (after the last inner step): every entry of `nc_metrics.measure`, [L, t].
            "inner": "within" and "between" [L, t, K+1] and "accuracy" [1, t, K+1], before and after each inner step.
        """
        last, found, inner = len(trajectory) - 1, {}, []
        for k, weights in enumerate(trajectory):
            known = outputs if k == last else ()
            chunks = known or self._query(tasks, weights, query_chunk, features=True)
            logits = torch.cat([logits for logits, _ in chunks])
            layers = [_pieces(layer) for layer in zip(*(features for _, features in chunks))]
            if k in (0, last):
                found[k] = self._metrics(tasks, weights, logits, layers, null)
                traces = [found[k][name] for name in ("within", "between")]
            else:
                traces = [torch.stack(trace) for trace in zip(*(self._traces(pieces, tasks) for pieces in layers))]
            inner.append([*traces, accuracy(logits, tasks.y_qry)[None]])
        return {"meta": found[0], "finetuned": found[last],
                "inner": {name: torch.stack(steps, -1) for name, steps in zip(("within", "between", "accuracy"),
                                                                              zip(*inner))}}

    def _metrics(self, tasks: Tasks, weights: Weights, logits: Tensor, layers: list[list[Tensor]],
                 null: Sequence[Tensor]) -> dict[str, Tensor]:
        """`nc_metrics.measure`, each layer in its own pieces."""
        n_way = logits.shape[-1]
        _, support_layers = self.net(tasks.x_spt, weights, features=True)
        null_spt, null_qry = null
        reduced = []
        for i, (pieces, support) in enumerate(zip(layers, support_layers)):
            per_task = [tasks.y_qry, support, tasks.y_spt, null_qry, null_spt]
            if i == len(layers) - 2:
                per_task.append(weights[self.net.classifier])
            sizes = [len(piece) for piece in pieces]
            parts = [nc_metrics.reduce(piece, y, x, y_spt, n_way, *rest)
                     for piece, y, x, y_spt, *rest in zip(pieces, *(values.split(sizes) for values in per_task))]
            reduced.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return nc_metrics.metrics(reduced, logits, tasks.y_qry, null_qry)

    def _traces(self, pieces: list[Tensor], tasks: Tasks) -> list[Tensor]:
        """tr S_W and tr S_B of one layer, [t] each."""
        n_way = self.net.shapes[-1][-1]
        labels = tasks.y_qry.split([len(piece) for piece in pieces])
        parts = [nc_metrics.covariance_traces(piece, y, n_way) for piece, y in zip(pieces, labels)]
        return [torch.cat(trace) for trace in zip(*parts)]


def _pieces(chunks: Sequence[Tensor]) -> list[Tensor]:
    """A layer's features, chunk by chunk [t, N, D] -> the same tasks in pieces that fill a cache, none smaller."""
    together = max(1, PIECE // chunks[0].numel())
    if together == 1:
        return list(chunks)
    return [torch.cat(chunks[i:i + together]) for i in range(0, len(chunks), together)]


def _leaves(weights: Weights) -> dict[str, Tensor]:
    return {name: w.detach().requires_grad_() for name, w in weights.items()}


def _split(weights: Weights, size: int) -> Iterator[Weights]:
    """The weights of `size` tasks at a time."""
    return (dict(zip(weights, part)) for part in zip(*(w.split(size) for w in weights.values())))


def join(parts: list[dict]) -> dict:
    """Put the tasks (axis 1) of several measurements side by side."""
    first = parts[0]
    if isinstance(next(iter(first.values())), dict):
        return {name: join([part[name] for part in parts]) for name in first}
    return {name: torch.cat([part[name] for part in parts], 1) for name in first}


def _gather(found: dict) -> dict:
    """The tasks (axis 1) that each process measured, all together in every process."""
    return {name: _gather(part) if isinstance(part, dict) else devices.gather(part, 1)
            for name, part in found.items()}
