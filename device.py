"""Choice of the device, its arithmetic and memory; several processes; signals; a meta-step as a CUDA graph.

Several processes share a meta-step (`torchrun --nproc_per_node=N omniglot_train.py`). All draw the same tasks, each
adapts its share, and the gradients are summed, so all take the same Adam step. Only rank 0 writes. With one process the
functions for several return their input; `gather_lists` moves its tensors to the CPU. T tasks, P processes.
"""

import contextlib
import ctypes
import datetime
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from files import UserError, note
from tasks import tree_map

DECODING = datetime.timedelta(hours=6)  # longest wait for the process that decodes the images
WARM_UP = 3  # steps before a capture, as torch.cuda.graph needs: in the first ones libraries choose and allocate


def select_device(name: str) -> torch.device:
    """Check that torch computes on the device, and make it current; returns cpu, or cuda with its number.

    Args:
        name: cpu, cuda or cuda:N. Under torchrun, cuda is cuda:LOCAL_RANK.
    Raises:
        UserError: the device is of another kind, is absent, or can't run a kernel of this build of torch.
    """
    try:
        device = torch.device(name)
        if name in ("cpu", "cpu:0"):
            return torch.device("cpu")
        if device.type != "cuda" or str(device) != name:  # torch reads cuda:300 as cuda:44
            raise RuntimeError("the metrics need float64, which MPS doesn't have" if device.type == "mps" else
                               "there is no such device to train on")
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if 0 < torch.cuda.device_count() < processes_here:
            raise UserError(f"--device {name}: each process takes a GPU of its own; start at most "
                            f"{torch.cuda.device_count()} here, not {processes_here}")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        elif processes_here > 1:
            raise RuntimeError("several processes would share this GPU; with cuda each takes its own")
        torch.cuda.init()
        torch.cuda.set_device(device)  # streams and graphs are made on the current device
        torch.ones(1, device=device).add(1).item()  # a GPU that this build has no kernels for fails only here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name}: {reason}; take cpu, or cuda on a machine with an NVIDIA GPU") from error
    return device


def device_name(device: torch.device) -> str:
    """The name of the GPU or processor, for example "AMD EPYC"; the architecture if there is no name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    return platform.processor() or platform.machine()


def set_arithmetic(precision: str, deterministic: bool) -> None:
    """Set CUDA's matrix products and convolutions to "float32" or "tf32"; if `deterministic`, only repeatable kernels.

    Call it before the first matrix product: cuBLAS reads its setting once.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def keep_memory() -> None:
    """Let glibc keep freed blocks, which the inner loop allocates again and again (benchmarks/README.md: the gain)."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, to the most that the version allows
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def memory_runs_out(remedy: str) -> Iterator[None]:
    """Raise a UserError, one line that ends in `remedy`, if the device or the host runs out of memory."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:  # the CPU's allocators raise no MemoryError
        words = "can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED"  # the last: CUDA's libraries
        if isinstance(error, MemoryError) or any(part in str(error) for part in words):
            raise UserError(f"out of memory; {remedy}") from error
        raise


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in GiB: reserved by torch on CUDA, graphs' included; of the process on a CPU; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved(device) / 2**30, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    scale = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 2)


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes, if torchrun started several, and leave them at the end.

    After an error they are not left: that could hang.
    """
    if size() == 1:
        yield
        return
    backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=DECODING, device_id=gpu)
    try:
        yield
    except Stopped:  # raised in all processes at once: they leave together
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 .. P-1; known before `processes`."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """P, the number of processes; known before `processes`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_tasks(values: Tensor) -> Tensor:
    """This process's equal share of the tasks: [T, ...] -> [T / P, ...]; P divides T."""
    return values.chunk(size())[rank()]


def gather(values: Tensor) -> Tensor:
    """The tasks of all processes in order, in every process: [T / P, ...] -> [T, ...]; the inverse of `local_tasks`."""
    if size() == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the processes; any shapes, one dtype."""
    if size() == 1:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def gather_lists(own: list) -> list:
    """All items in order, their tensors on the CPU, in every process; process r had items r, r + P, r + 2 P, ..."""
    own = tree_map(lambda values: values.cpu(), own)  # received tensors would be on the sender's GPU
    if size() == 1:
        return own
    lists = [None] * size()
    dist.all_gather_object(lists, own)
    return [lists[i % size()][i // size()] for i in range(sum(map(len, lists)))]


def wait() -> None:
    """Return when every process has called it."""
    if size() > 1:
        dist.barrier()


class Stopped(SystemExit):
    """A signal stopped the run; the exit code is 128 + its number. Not an Exception, so no error handler catches it."""


class Signals:
    """Within its context Ctrl-C, SIGTERM and a closed terminal only set a flag; `check` raises Stopped.

    A second signal ends the process at once; with several processes it is ignored, because a launcher passes on a
    signal that the processes have already received.
    """

    def __init__(self):
        self.number = 0  # of the signal that was received

    def __enter__(self) -> "Signals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(hangup)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.number and size() == 1:
            os._exit(128 + number)
        self.number = number

    def check(self, device: torch.device) -> None:
        """Raise Stopped if any process received a signal; with several processes, all have to call it."""
        number = gather(torch.tensor([self.number], device=device if size() > 1 else "cpu")).max()
        if number:
            raise Stopped(128 + int(number))


class GraphedStep:
    """A meta-step that is captured as a CUDA graph once, and replayed; a replay overwrites what the last one returned.

    A step with every_step=True or with a measurement runs eagerly. After a failed capture older versions of torch can't
    free what it had allocated.

    Args:
        maml: `state()` lists every tensor that later steps depend on, `step` counts the steps, and `measures_next`
            says whether the next one measures.
        step: step(every_step=False) draws tasks and takes one meta-step, all on the current CUDA device.
        generator: the CUDA generator that `step` draws tasks from.
        required: a failed capture raises a UserError; otherwise a line reports it, and all steps run eagerly. All
            state is restored in either case.
    """

    def __init__(self, maml, step: Callable, generator: torch.Generator, required: bool = True):
        self.maml, self.step, self.generator, self.required = maml, step, generator, required
        self.graph, self.eager = None, False

    def __call__(self, every_step: bool = False):
        """Take one meta-step."""
        if every_step or self.maml.measures_next or self.eager:
            return self.step(every_step=every_step)
        if self.graph is None:
            self.graph, self.result, reason = self._capture()
            reason = next(filter(None, gather_lists([reason])), None)  # NCCL: a graph in all processes or in none
            if reason and self.required:
                raise UserError(f"--cuda_graph: the step can't be captured here ({reason}); give --no-cuda_graph")
            if reason:
                note(f"note: training is slower, because a step can't be captured as a CUDA graph here ({reason})")
                self.graph, self.result, self.eager = None, None, True
                if self.generator.device.type == "cuda":  # before torch 2.14 a failed capture leaves it unusable
                    fresh = torch.Generator(self.generator.device)
                    fresh.set_state(self.generator.get_state())
                    self.generator.graphsafe_set_state(fresh)
                return self.step()
        self.graph.replay()
        self.maml.step += 1
        return self.result

    def _capture(self) -> tuple:
        """The graph of one step, its result, and None; or two times None, and why the step can't be captured.

        `maml` and `generator` are restored. An error in a warm-up step is raised: without a graph it would fail too.
        """
        tensors, step, drawn = self.maml.state(), self.maml.step, self.generator.get_state()
        before = [tensor.detach().clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.step()
                    self.maml.step -= 1  # or a warm-up step might become one that measures
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            if torch.__version__ < (2, 14):  # newer versions find the generators of a capture, and warn of this call
                graph.register_generator_state(self.generator)
            try:
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # the first is restored
                    return graph, self.step(), None
            except (RuntimeError, MemoryError) as error:
                # the end of a failed capture is an error of its own; a name for either would keep the step's tensors
                return None, None, str(error.__context__ or error).partition("\n")[0] or "out of memory"
        finally:
            torch.cuda.synchronize()  # a failed warm-up may still be writing on its stream
            with torch.no_grad():
                for tensor, value in zip(tensors, before):
                    tensor.copy_(value)
            self.generator.set_state(drawn)
            self.maml.step = step
