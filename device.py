"""The device: is it there, how it computes, its memory; several processes; a meta-step as one CUDA graph.

Several processes, one meta-step: `torchrun --nproc_per_node=N omniglot_train.py`. Every process draws the same tasks
and adapts its share of them; gradients are summed, so that all take the same Adam step. Only the first process writes.
With one process these functions do nothing.
"""

import contextlib
import ctypes
import os
import platform
import sys
from typing import TYPE_CHECKING, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from files import UserError

if TYPE_CHECKING:
    from meta import Meta, Step

def check_device(name: str) -> None:
    """Refuse a device that isn't there.

    Raises:
        UserError: torch's own reason in one line.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; take cpu, or cuda on a machine with an NVIDIA GPU") from error


def set_arithmetic(precision: str, deterministic: bool) -> None:
    """Precision of matrix products, and whether CUDA may pick kernels whose sums differ from run to run.

    Call it before the first product: cuBLAS reads its setting once.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def keep_memory() -> None:
    """Let glibc keep large blocks instead of returning them to the system and faulting them in again.

    The inner loop allocates and frees the same megabytes thousands of times. What it saves are page faults: it helps
    code that allocates more (benchmarks/speed.py: vmap, 1.4 to 3.3 times as fast); a whole step here is about the same.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        with contextlib.suppress(AttributeError):
            libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)  # the most that some allow
            libc.mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def memory_runs_out(remedy: str) -> Iterator[None]:
    """Turn what torch raises when the device or the host has no memory left into one line.

    Raises:
        UserError: out of memory; the line ends in `remedy`.
    """
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory; {remedy}") from error
    except RuntimeError as error:  # the CPU's allocators have no class of their own
        if not any(words in str(error) for words in ("can't allocate memory", "bad_alloc", "out of memory")):
            raise
        raise UserError(f"out of memory; {remedy}") from error


def peak_memory(device: torch.device) -> float:
    """GiB: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    import resource

    scale = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 2)


def device_name(device: torch.device) -> str:
    """What the GPU or the processor calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """What the processor calls itself, e.g. "AMD EPYC"; its architecture where it doesn't say."""
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    return platform.processor() or platform.machine()


# ---- several processes


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


# ---- a CUDA graph


WARM_UP = 3  # steps before the capture, as torch.cuda.graph asks for: libraries choose and allocate in the first ones


class GraphedStep:
    """A whole training step as one CUDA graph: captured once, then replayed. Calling it does what `step()` does, and returns the same tensors, overwritten, every time.

    Args:
        maml: whose weights and Adam the step changes; Adam has made at least one step, so that its state is there.
        step: one meta-step, without arguments, on the device alone: draw tasks, forward, backward, Adam.
        generator: what the tasks are drawn from.
    """

    def __init__(self, maml: "Meta", step: "Callable[[], Step]", generator: torch.Generator):
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

    def __call__(self) -> "Step":
        self.graph.replay()
        self.maml.step += 1
        return self.seen
