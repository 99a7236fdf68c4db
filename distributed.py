"""Several processes, one meta-step: `torchrun --nproc_per_node=N omniglot_train.py`.

Every process draws the same tasks and adapts its own share of them; gradients
are summed, so that all take the same Adam step. Only the first process writes.
With one process every function here does nothing.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> None:
    """Join the other processes, if torchrun started several: nccl between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the others, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 .. size-1; known from the start."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes there are; known from the start."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(name: str) -> str:
    """The device of this process: on one machine with several GPUs, "cuda" is another one for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


def share(values: Tensor, axis: int = 0) -> Tensor:
    """This process's equal part of `values` along `axis`."""
    return values if size() == 1 else values.chunk(size(), axis)[rank()]


def add_up(tensors: list[Tensor]) -> list[Tensor]:
    """The sum of each tensor over the processes."""
    if size() == 1:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def largest(value: Tensor) -> Tensor:
    """The largest of the processes' values, element by element; `value` itself is overwritten by it."""
    if size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gather(values: Tensor, axis: int = 0) -> Tensor:
    """Put the processes' equal parts side by side along `axis`: the inverse of `share`."""
    if size() == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts, axis)


def gather_lists(own: list) -> list:
    """Deal round: lists of items 0, n, 2n, ...; 1, n+1, ...; one a process -> all items in order, in every process."""
    if size() == 1:
        return own
    lists = [None] * size()
    dist.all_gather_object(lists, own)
    return [lists[i % size()][i // size()] for i in range(sum(map(len, lists)))]


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        dist.barrier()
