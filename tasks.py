"""N-way K-shot tasks, gathered from one tensor of images; trees of tensors that lead with tasks.

A task picks `n_way` classes and, of each, `k_spt` support and `k_qry` query images, all different (Vinyals et al.
2016). One random permutation is cut into support and query, so they are disjoint by construction. Labels are
0..n_way-1: which class gets which label is drawn for every task.

A training loop of your own:

    import torch, omniglot_train
    from meta import Meta
    from tasks import Sampler, with_rotations

    torch.manual_seed(0)
    args = omniglot_train.arguments(["--recipe", "paper", "--synthetic"])
    dataset, net = omniglot_train.dataset(args), omniglot_train.network(args)
    train, val = (Sampler(with_rotations(dataset.load(split)), dataset, torch.device("cpu"), seed=0, n_way=5, k_spt=1,
                          k_qry=1, nc_qry=15, turns=4, counts=dataset.counts()[split]) for split in ("train", "val"))
    maml = Meta(net, update_lr=2.0, update_step=1, update_step_test=3, nc_every=100)
    for _ in range(1_000):
        index = train.draw(32)
        step = maml(train.gather(index), measured=train.gather(index, measured=True) if maml.measures_next else None)
        if step.metrics:
            print(maml.step, step.metrics["meta"]["relative_within"].mean(0))  # by layer, with 15 queries per class
    print(maml.finetune(val(100)).accuracy.mean(0))  # after 0, 1, 2 and 3 inner steps
    torch.save(net.state_dict(), "weights.pt")
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tasks(NamedTuple):
    """T tasks. Images are float, scaled to 0..1 and normalised; labels are int64, 0..n_way-1, each equally often.

    A `Sampler` orders each task class by class; `one_by_one` relies on it to take the first query of each class.
    """

    x_spt: Tensor  # [T, n_way * k_spt, c, h, w]
    y_spt: Tensor  # [T, n_way * k_spt]
    x_qry: Tensor  # [T, n_way * k_qry, c, h, w]
    y_qry: Tensor  # [T, n_way * k_qry]


@dataclass(frozen=True)
class Dataset:
    """Where a script's images come from. `predict` and --test of a run know only the data sets of the two scripts."""

    name: Callable[[], str]  # in logs and figures; may depend on the counts
    channels: int
    mean: Sequence[float]  # per channel, of images scaled to 0..1
    std: Sequence[float]
    counts: Callable[[], Mapping[str, Sequence[int]]]  # split -> images of each class; reads no image
    load: Callable[[str], Tensor]  # split -> uint8 [class, image, c, h, w], filled up to the largest class
    found: Callable[[], str] = str  # where and how the images were found, in words
    digest: Callable[[str], str | None] = lambda split: None  # of the names of a split's classes

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Split -> (classes, images of the smallest class)."""
        return {split: (len(counts), min(counts)) for split, counts in self.counts().items()}

    def described(self) -> str:
        """The name, and where and how the images were found."""
        return f"{self.name()} ({self.found()})" if self.found() else self.name()


# ---- trees: tensors in dicts, lists and tuples


def tree_map(function: Callable, tree: Any, *others: Any) -> Any:
    """Apply `function` to the corresponding tensors of trees of the same structure; non-tensors are kept."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: tree_map(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [tree_map(function, *values) for values in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def chunks(size: int, total: int, *trees: Any) -> Iterator[tuple]:
    """Split the trees into even chunks of at most `size` of their `total` tasks (axis 0), both 1 or more."""
    size = math.ceil(total / math.ceil(total / size))
    for start in range(0, total, size):
        yield tree_map(lambda values, start=start: values[start:start + size], trees)


def cat(trees: Sequence[Any]) -> Any:
    """The tasks of several trees in one tree."""
    return trees[0] if len(trees) == 1 else tree_map(lambda *parts: torch.cat(parts), *trees)


def chunked(function: Callable, size: int, total: int, *trees: Any) -> Any:
    """`function(*trees)`, a tree of tensors that lead with tasks, computed for at most `size` tasks at a time."""
    return cat([function(*parts) for parts in chunks(size, total, *trees)])


# ---- sampling


def normalisation(pixels: str, mean: Sequence[float], std: Sequence[float]) -> tuple[Sequence, Sequence]:
    """Mean and deviation per channel by which images in 0..1 become a network's input.

    Args:
        pixels: "normalised" by the data's own `mean` and `std`; "unit": 0..1 as they are; "inverted": 1..0, so that
            Omniglot's paper is 0, as zero padding is, and its ink 1.
    """
    channels = len(mean)
    return {"normalised": (mean, std), "unit": ((0.0,) * channels, (1.0,) * channels),
            "inverted": ((1.0,) * channels, (-1.0,) * channels)}[pixels]


def with_rotations(images: Tensor) -> Tensor:
    """Every class at 0, 90, 180 and 270 degrees: [classes, n, c, s, s] -> [4 classes, n, c, s, s] (Santoro 2016).

    Turned once and not in every task: four times the memory (Omniglot's training images: 69 MB).
    """
    return torch.stack([torch.rot90(images, turns, (-2, -1)) for turns in range(4)], 1).flatten(0, 1)


def as_tasks(picked: Tensor, k_spt: int, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tasks:
    """Scale and normalise picked images, uint8 [T, n_way, k, c, h, w]; cut each class into support and query."""
    n_tasks, n_way, k = picked.shape[:3]
    mean, std = (torch.as_tensor(values, device=picked.device).view(-1, 1, 1) for values in (mean, std))
    images = (picked.float() / 255 - mean) / std
    labels = torch.arange(n_way, device=picked.device).view(1, n_way, 1).expand(n_tasks, n_way, k)
    (x_spt, x_qry), (y_spt, y_qry) = (
        [part.flatten(1, 2) for part in values.split([k_spt, k - k_spt], 2)] for values in (images, labels))
    return Tasks(x_spt, y_spt, x_qry, y_qry)


class Sampler:
    """Tasks from the images of a split.

    Args:
        images: uint8 [classes * turns, images per class, c, h, w], on `device` or on the host.
        dataset: whose mean and deviation normalise them.
        device: where tasks go.
        seed: of the generator. It is on the device if `on_device` is set and the images are there, as a captured step
            needs; otherwise on the CPU, so that every machine draws the same tasks.
        turns: rotations of each class, one after the other in `images`; a task takes each class in one random
            rotation, so that a character never meets its own.
        k_qry, nc_qry: query images per class of a task, and of the same task when neural collapse is measured. The
            smaller set is a subset of the larger.
        counts: images of each class; None: all have as many.
    Raises:
        ValueError: images are not uint8; too few classes, or too few images per class; `turns` or `counts` don't fit.
    """

    def __init__(self, images: Tensor, dataset: Dataset, device: torch.device, seed: int, n_way: int, k_spt: int,
                 k_qry: int, turns: int = 1, on_device: bool = False, nc_qry: int | None = None,
                 counts: Sequence[int] | None = None):
        self.images, self.device, self.n_way, self.k_spt, self.turns = images, device, n_way, k_spt, turns
        self.k_qry, self.nc_qry = k_qry, k_qry if nc_qry is None else nc_qry
        self.k = k_spt + max(self.k_qry, self.nc_qry)
        classes, per_class = len(images) // turns, images.shape[1]
        least = per_class if counts is None else min(counts)
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype} and must be uint8 in 0..255, which is scaled to 0..1 later")
        if len(images) % turns or counts is not None and len(counts) != classes:
            raise ValueError(f"{len(images)} classes with rotations are not {turns} rotations of "
                             f"{classes if counts is None else len(counts)} classes")
        if n_way > classes:
            raise ValueError(f"{n_way}-way tasks need {n_way} classes, here are {classes}")
        if self.k > least:
            raise ValueError(f"support and query images need {self.k} per class, and one class has {least}")
        self.mean, self.std = (torch.tensor(values, device=device) for values in (dataset.mean, dataset.std))
        self.generator = torch.Generator(images.device if on_device else "cpu").manual_seed(seed)
        self.counts = torch.as_tensor(counts, device=self.generator.device) if least < per_class else None

    def __call__(self, n_tasks: int) -> Tasks:
        return self.gather(self.draw(n_tasks))

    def draw(self, n_tasks: int) -> tuple[Tensor, Tensor]:
        """Indices of the next tasks, for `gather`: class [T, n_way, 1], image [T, n_way, k].

        From the same generator state, a larger k starts with the images of a smaller k, unless two random numbers are
        equal (at 600 images per class, in 1 class of 10,000).
        """
        rows, per_class = self.images.shape[:2]
        random = {"device": self.generator.device, "generator": self.generator}
        chosen = torch.rand(n_tasks, rows // self.turns, **random).topk(self.n_way).indices  # [T, n_way]
        order = torch.rand(n_tasks, self.n_way, per_class, **random)
        if self.counts is not None:  # what a class lacks comes last
            lacking = torch.arange(per_class, device=order.device) >= self.counts[chosen][..., None]
            order = order.masked_fill(lacking, -1)
        order = order.topk(self.k).indices
        if self.turns > 1:
            chosen = chosen * self.turns + torch.randint(self.turns, chosen.shape, **random)
        return chosen[..., None], order

    def gather(self, index: tuple[Tensor, Tensor], measured: bool = False) -> Tasks:
        """The tasks of these indices, with `nc_qry` query images per class if `measured`, else with `k_qry`."""
        classes, order = (part.to(self.images.device) for part in index)
        order = order[..., :self.k_spt + (self.nc_qry if measured else self.k_qry)]
        return as_tasks(self.images[classes, order].to(self.device), self.k_spt, self.mean, self.std)
