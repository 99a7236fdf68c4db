"""N-way K-shot tasks, gathered from one tensor of images on its own device.

A task picks `n_way` classes and, of each, `k_spt` support and `k_qry` query
images, all different (Vinyals et al. 2016). One random permutation is cut into
support and query, so they are disjoint by construction. Labels are 0..n_way-1,
whatever the classes: which class gets which label is drawn anew for every task.
"""

from typing import Iterator, NamedTuple, Sequence

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
    rotations: bool = False,
) -> Tasks:
    """Draw tasks.

    Args:
        images: uint8 [classes, images a class, c, h, w].
        n_tasks: T.
        n_way: classes a task.
        k_spt, k_qry: support and query images a class.
        generator: on the device of `images`; the same state gives the same tasks.
        mean, std: of images scaled to 0..1; one number, or one a channel (a tensor on the device is not copied).
        rotations: every class also turned by 90, 180 and 270 degrees, as further classes (Santoro et al. 2016).
    Raises:
        ValueError: too few classes, or too few images a class.
    """
    classes, per_class = images.shape[:2]
    turns = 4 if rotations else 1
    if n_way > classes * turns:
        raise ValueError(f"{n_way}-way tasks need {n_way} classes, here are {classes * turns}")
    if k_spt + k_qry > per_class:
        raise ValueError(f"{k_spt} support and {k_qry} query images need {k_spt + k_qry} a class, here are {per_class}")
    random = {"device": images.device, "generator": generator}
    chosen = torch.rand(n_tasks, classes * turns, **random).topk(n_way).indices  # [T, n_way]
    order = torch.rand(n_tasks, n_way, per_class, **random).topk(k_spt + k_qry).indices  # [T, n_way, k]
    picked = images[(chosen // turns)[..., None], order]  # [T, n_way, k, c, h, w]
    if rotations:
        picked = _rotate(picked, chosen % turns)
    shape = (1, 1, 1, -1, 1, 1)
    mean = torch.as_tensor(mean, device=images.device).view(shape)
    std = torch.as_tensor(std, device=images.device).view(shape)
    picked = (picked.float() / 255 - mean) / std
    labels = torch.arange(n_way, device=images.device).repeat_interleave(k_spt + k_qry)
    labels = labels.view(1, n_way, -1).expand(n_tasks, -1, -1)  # [T, n_way, k]
    x_spt, x_qry = (part.flatten(1, 2) for part in picked.split([k_spt, k_qry], 2))
    y_spt, y_qry = (part.flatten(1, 2) for part in labels.split([k_spt, k_qry], 2))
    return Tasks(x_spt, y_spt, x_qry, y_qry)


def _rotate(picked: Tensor, quarters: Tensor) -> Tensor:
    """Turn the images of each class by its own number of quarter turns: [T, n_way, k, c, s, s], [T, n_way]."""
    for turn in (1, 2, 3):
        turned = torch.rot90(picked, turn, (-2, -1))
        picked = torch.where((quarters == turn)[..., None, None, None, None], turned, picked)
    return picked
