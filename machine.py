"""What a run asks of the machine it is on: a device that is there, memory, how numbers are computed."""

import contextlib
import ctypes
import os
import platform
import resource
import sys
from typing import Iterator

import torch

import taskwise
from files import UserError


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
    taskwise.use_bf16(precision == "bf16")
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
