"""A whole training step as one CUDA graph: captured once, then replayed.

A meta-step is thousands of small kernels, and launching them takes the CPU
longer than running them takes the GPU. Replaying a graph launches them all at
once. Everything that a step reads or writes must then stay at its address:
weights, Adam's state (`capturable=True`), the images, the generator's state.
"""

from typing import Callable

import torch

from meta import Meta, Step

WARM_UP = 3  # steps before the capture, as torch.cuda.graph asks for: libraries choose and allocate in the first ones


class GraphedStep:
    """Calling it does what `step()` does, and returns the same tensors, overwritten, every time.

    Args:
        maml: whose weights and Adam the step changes; Adam has made at least one step, so that its state is there.
        step: one meta-step, without arguments, on the device alone: draw tasks, forward, backward, Adam.
        generator: what the tasks are drawn from.
    """

    def __init__(self, maml: Meta, step: Callable[[], Step], generator: torch.Generator):
        self.maml = maml
        tensors = [*maml.net.parameters(), maml.updates, maml.going]
        tensors += [t for state in maml.optimizer.state.values() for t in state.values()]
        before = [t.detach().clone() for t in tensors], generator.get_state(), maml.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
                maml.step = before[2]
        torch.cuda.current_stream().wait_stream(side)
        # the warm-up must leave no trace: graph or not, the training curve is the same
        with torch.no_grad():
            for tensor, value in zip(tensors, before[0]):
                tensor.copy_(value)
        generator.set_state(before[1])
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.seen = step()
        maml.step = before[2]  # a capture records, and computes nothing

    def __call__(self) -> Step:
        self.graph.replay()
        self.maml.step += 1
        return self.seen
