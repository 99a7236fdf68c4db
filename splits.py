"""The images of each split as the loop sees them: where they come from, on the device, and tasks drawn from them."""

import argparse
from collections import deque
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from record import say
from tasks import Prefetched, Tasks, finish, pick, with_rotations


@dataclass(frozen=True)
class Dataset:
    """Where a script's images come from."""

    called: Callable[[], str]  # what logs and figures call it; may look at the sizes
    channels: int
    mean: Sequence[float]  # a channel, of images scaled to 0..1
    std: Sequence[float]
    sizes: Callable[[], dict[str, tuple[int, int]]]  # split -> (classes, images a class), no image read
    load: Callable[[str], Tensor]  # split -> uint8 [class, image, c, h, w]

    @property
    def name(self) -> str:
        return self.called()


class Splits:
    """The images of each split, and tasks from them."""

    def __init__(self, args: argparse.Namespace, dataset: Dataset, device: torch.device):
        self.dataset, self.device = dataset, device
        self.rotations = getattr(args, "rotations", False)  # not all scripts have them
        self.n_way, self.k_spt, self.k = args.n_way, args.k_spt, args.k_spt + args.k_qry
        self.mean, self.std = (torch.tensor(values, device=device) for values in (dataset.mean, dataset.std))

    def load(self, split: str) -> Tensor:
        """uint8 [class, image, c, h, w] on the device, or on the host where it would take over half of what is free.

        The training classes come with their rotations, where the settings ask for them.
        """
        images = self.dataset.load(split)
        if split == "train" and self.rotations:
            images = with_rotations(images)
        if self.device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(self.device)[0] / 2:
            say(f"the {split} images stay on the host: {images.numel() / 2**30:.1f} GB")
            return images
        return images.to(self.device)

    def sampler(self, images: Tensor, seed: int, n_tasks: int) -> "Sampler":
        return Sampler(self, images, seed, n_tasks, prefetch=images.device.type != self.device.type)


class Sampler:
    """Draws tasks from a generator; calling it gives the next `n_tasks`.

    With `prefetch` a thread draws one batch ahead, so that the generator is ahead of what has been given out:
    `state` is the one that the next batch comes from, whether it has been drawn or not.
    """

    def __init__(self, splits: Splits, images: Tensor, seed: int, n_tasks: int, prefetch: bool):
        self.splits, self.images, self.n_tasks = splits, images, n_tasks
        self.generator = torch.Generator(images.device).manual_seed(seed)
        self.drawn_from = deque()  # the generator's state before each draw ahead whose tasks haven't been given out
        self.ahead = Prefetched(self._draw_ahead, splits.device) if prefetch else None

    def __call__(self, n_tasks: int | None = None) -> Tasks:
        if self.ahead:
            drawn = self.ahead()
            self.drawn_from.popleft()
        else:
            drawn = self._draw(n_tasks or self.n_tasks)
        return finish(drawn, self.splits.k_spt, self.splits.mean, self.splits.std)

    def _draw(self, n_tasks: int) -> Tensor:
        return pick(self.images, n_tasks, self.splits.n_way, self.splits.k, self.generator)

    def _draw_ahead(self) -> Tensor:
        self.drawn_from.append(self.generator.get_state())
        return self._draw(self.n_tasks)

    @property
    def state(self) -> Tensor:
        if not self.ahead:
            return self.generator.get_state()
        self.ahead.next.result()  # or the thread might not have begun
        return self.drawn_from[0]

    @state.setter
    def state(self, state: Tensor) -> None:
        if self.ahead:
            self.ahead.next.result()  # what it has drawn is thrown away
            self.drawn_from.clear()
        self.generator.set_state(state)
        if self.ahead:
            self.ahead = Prefetched(self._draw_ahead, self.splits.device)
