"""The outer optimiser: Adam, whose step changes nothing where something in it is not finite.

Nothing here waits for the device, so a CUDA graph can hold the step.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class GuardedAdam:
    """Adam with a clipped gradient, a rate that may fall, and steps that are skipped if they are not finite.

    Args:
        weights: all on one device.
        rate: Adam's.
        cosine_steps: the rate falls from `rate` to 0 as half a cosine over so many updates; 0: it is constant.
        clip: bound of each value of the gradient; 0: none.
        skip_nonfinite: after a step that is not finite, continue; else `halted` is set, and no step changes anything.

    `adam` is torch's optimiser. `updates` counts the steps that changed the weights. All but the settings is on the
    weights' device.
    """

    def __init__(self, weights: Iterable[nn.Parameter], rate: float, cosine_steps: int, clip: float,
                 skip_nonfinite: bool):
        self.weights, self.rate, self.cosine_steps = list(weights), rate, cosine_steps
        self.clip, self.skip_nonfinite = clip, skip_nonfinite
        device = self.weights[0].device
        lr = torch.tensor(rate, device=device) if cosine_steps else rate  # a tensor may change within a graph
        self.adam = torch.optim.Adam(self.weights, lr, capturable=device.type == "cuda")
        for weight in self.weights:  # as Adam itself makes it in its first step
            self.adam.state[weight] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(weight),
                                       "exp_avg_sq": torch.zeros_like(weight)}
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        moments = [tensor for weight in self.weights for tensor in self.adam.state[weight].values()]
        return [*self.weights, *moments, self.updates, self.halted]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], losses: Tensor) -> None:
        """One Adam step; undone on the device, without a sync, if a loss, a gradient or its square is not finite."""
        for weight, gradient in zip(self.weights, gradients):
            weight.grad = gradient.clamp(-self.clip, self.clip) if self.clip else gradient
        *changed, _, _ = self.state()
        before = [tensor.clone() for tensor in changed]
        if self.cosine_steps:
            cosine = torch.cos(self.updates * (math.pi / self.cosine_steps))
            self.adam.param_groups[0]["lr"].copy_(self.rate * (1 + cosine) / 2)
        self.adam.step()
        squares = [self.adam.state[weight]["exp_avg_sq"] for weight in self.weights]
        finite = torch.cat([values.flatten() for values in (losses, *gradients, *squares)]).isfinite().all()
        counts = finite & ~self.halted
        for tensor, old in zip(changed, before):
            torch.where(counts, tensor, old, out=tensor)
        self.updates += counts
        if not self.skip_nonfinite:
            self.halted |= ~finite
