"""N-way K-shot tasks, gathered from one tensor of images on its own device.

A task picks `n_way` classes and, of each, `k_spt` support and `k_qry` query
images, all different (Vinyals et al. 2016). One random permutation is cut into
support and query, so they are disjoint by construction. Labels are 0..n_way-1,
whatever the classes: which class gets which label is drawn anew for every task.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor


class Tasks(NamedTuple):
    """T tasks. Images are float, scaled to 0..1 and normalised; labels are int64, 0..n_way-1."""

    x_spt: Tensor  # [T, n_way * k_spt, c, h, w]
    y_spt: Tensor  # [T, n_way * k_spt]
    x_qry: Tensor  # [T, n_way * k_qry, c, h, w]
    y_qry: Tensor  # [T, n_way * k_qry]

    def split(self, size: int) -> Iterator["Tasks"]:
        """The same tasks in chunks of at most `size`."""
        return (Tasks(*part) for part in zip(*(field.split(size) for field in self)))


def sample_tasks(
    images: Tensor,
    n_tasks: int,
    n_way: int,
    k_spt: int,
    k_qry: int,
    generator: torch.Generator,
    mean: Tensor | Sequence[float] = (0.0,),
    std: Tensor | Sequence[float] = (1.0,),
) -> Tasks:
    """Draw tasks.

    Args:
        images: uint8 [classes, images a class, c, h, w].
        n_tasks: T.
        n_way: classes a task.
        k_spt, k_qry: support and query images a class.
        generator: on the device of `images`; the same state gives the same tasks.
        mean, std: of images scaled to 0..1; one number, or one a channel (a tensor on the device is not copied).
    Raises:
        ValueError: too few classes, or too few images a class.
    """
    return finish(pick(images, n_tasks, n_way, k_spt + k_qry, generator), k_spt, mean, std)


def with_rotations(images: Tensor) -> Tensor:
    """Every class also turned by 90, 180 and 270 degrees, as further classes (Santoro et al. 2016).

    [classes, images a class, c, s, s] -> [4 classes, images a class, c, s, s]. Turned once, and not in every task: four
    times the memory (Omniglot's 1,100 training classes: 69 MB), and nothing to do in a meta-step.
    """
    return torch.stack([torch.rot90(images, turns, (-2, -1)) for turns in range(4)], 1).flatten(0, 1)


def pick(images: Tensor, n_tasks: int, n_way: int, k: int, generator: torch.Generator) -> Tensor:
    """The images of `sample_tasks` as they are stored, uint8 [T, n_way, k, c, h, w]: what is copied to a device."""
    classes, per_class = images.shape[:2]
    if n_way > classes:
        raise ValueError(f"{n_way}-way tasks need {n_way} classes, here are {classes}")
    if k > per_class:
        raise ValueError(f"support and query images need {k} a class, here are {per_class}")
    random = {"device": images.device, "generator": generator}
    chosen = torch.rand(n_tasks, classes, **random).topk(n_way).indices  # [T, n_way]
    order = torch.rand(n_tasks, n_way, per_class, **random).topk(k).indices  # [T, n_way, k]
    return images[chosen[..., None], order]


def finish(picked: Tensor, k_spt: int, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tasks:
    """Scale and normalise what `pick` returns, and cut each class into support and query."""
    n_tasks, n_way, k = picked.shape[:3]
    shape = (1, 1, 1, -1, 1, 1)
    mean = torch.as_tensor(mean, device=picked.device).view(shape)
    std = torch.as_tensor(std, device=picked.device).view(shape)
    picked = (picked.float() / 255 - mean) / std
    labels = torch.arange(n_way, device=picked.device).view(1, n_way, 1).expand(n_tasks, n_way, k)
    x_spt, x_qry = (part.flatten(1, 2) for part in picked.split([k_spt, k - k_spt], 2))
    y_spt, y_qry = (part.flatten(1, 2) for part in labels.split([k_spt, k - k_spt], 2))
    return Tasks(x_spt, y_spt, x_qry, y_qry)


class Prefetched:
    """Calls `draw` (a `pick`) in a thread, one batch ahead, and copies its result to `device` from pinned memory.

    For images that stay on the host because the device can't hold them: drawing and copying go on beside a meta-step.
    """

    def __init__(self, draw: Callable[[], Tensor], device: torch.device):
        self.draw, self.device = draw, device
        self.thread = ThreadPoolExecutor(1)
        self.next = self.thread.submit(self._draw)

    def _draw(self) -> Tensor:
        drawn = self.draw()
        return drawn.pin_memory() if self.device.type == "cuda" else drawn

    def __call__(self) -> Tensor:
        drawn, self.next = self.next.result(), self.thread.submit(self._draw)
        return drawn.to(self.device, non_blocking=True)
