"""The outer optimiser: Adam, whose step changes nothing if a loss, gradient or weight is not finite.

Nothing here waits for the device, so a CUDA graph can hold the step.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class GuardedAdam:
    """Adam with a clipped gradient, an optional cosine schedule, and steps that are skipped if they are not finite.

    The settings are those of `meta.Meta`; `rate` is its meta_lr. `weights` are all on one device.

    `adam` is torch's optimiser. `updates` counts the steps that changed the weights. `halted` is set by a step that is
    not finite, unless skip_nonfinite is: no later step then changes anything. All tensors are on the weights' device.
    """

    def __init__(self, weights: Iterable[nn.Parameter], rate: float, cosine_steps: int, clip: float,
                 skip_nonfinite: bool, keep_norms: bool):
        self.weights, self.rate, self.cosine_steps = list(weights), rate, cosine_steps
        self.clip, self.skip_nonfinite = clip, skip_nonfinite
        device = self.weights[0].device
        lr = torch.tensor(rate, device=device) if cosine_steps else rate  # a tensor may change within a graph
        self.adam = torch.optim.Adam(self.weights, lr, capturable=device.type == "cuda")
        for weight in self.weights:  # the state that Adam itself creates in its first step
            self.adam.state[weight] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(weight),
                                       "exp_avg_sq": torch.zeros_like(weight)}
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)
        kernels = [weight for weight in self.weights if keep_norms and weight.dim() == 4]
        self.norms = [(kernel, torch.linalg.vector_norm(kernel.detach())) for kernel in kernels]

    def state(self) -> list[Tensor]:
        """Every tensor that later steps depend on."""
        moments = [tensor for weight in self.weights for tensor in self.adam.state[weight].values()]
        return [*self.weights, *moments, self.updates, self.halted]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], losses: Tensor) -> None:
        """One Adam step; undone on the device, without a sync, if a loss, a gradient, Adam's state or a new weight is
        not finite."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.clamp(-self.clip, self.clip) if self.clip else gradient
        changed = self.state()[:-2]  # all but the two counters
        before = [tensor.clone() for tensor in changed]
        if self.cosine_steps:
            cosine = torch.cos(self.updates.clamp(max=self.cosine_steps) * (math.pi / self.cosine_steps))
            self.adam.param_groups[0]["lr"].copy_(self.rate * (1 + cosine) / 2)
        self.adam.step()
        for kernel, norm in self.norms:
            kernel *= norm / torch.linalg.vector_norm(kernel)
        squares = [self.adam.state[weight]["exp_avg_sq"] for weight in self.weights]
        values = losses, *gradients, *squares, *self.weights
        finite = torch.cat([value.flatten() for value in values]).isfinite().all()
        keep = finite & ~self.halted
        for tensor, old in zip(changed, before):
            torch.where(keep, tensor, old, out=tensor)
        self.updates += keep
        if not self.skip_nonfinite:
            self.halted |= ~finite
