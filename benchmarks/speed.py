"""The time per meta-step: this project, and the ways in which people write MAML.

    pip install -r benchmarks/requirements.txt                      # optional: higher, torchopt, JAX
    python benchmarks/speed.py                                      # all cases; writes benchmarks/speed.json
    python benchmarks/speed.py --only omniglot-paper --repeats 15   # one case; writes speed-omniglot-paper.json
    OMP_NUM_THREADS=1 python benchmarks/speed.py                    # on one core

benchmarks/README.md says what is compared. Tasks are random images: the time does not depend on what they show. The
implementations take turns in float32, `--repeats` rounds after a warm-up, in a process of their own. On Linux there are
two such processes, with glibc's default and with `device.keep_memory`; the table shows the better of the two.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from implementations import OTHERS, PRODUCT, THIS, Case, Implementation, MatrixProduct, implementations_on

import device as devices
import files
import miniimagenet_train
import omniglot_train
from learner import Learner
from tasks import Tasks

SEED = 222
TOLERANCE = 1e-6  # relative error of a gradient in float64; correct implementations agree to about 1e-10
CHECKED = {"tasks": 2, "steps": 2, "k_qry": 5}  # at most, in the comparison of gradients: float64 is slow


def script_case(title: str, script: ModuleType, n_way: int, k_spt: int, **sizes: int) -> Case:
    """A case with the default network, image size and inner rate of a training script."""
    args = script.arguments(["--n_way", str(n_way)])
    return Case(title, script.layers(args), args.imgc, args.imgsz, args.update_lr, n_way, k_spt, **sizes)


CASES = {
    "omniglot-paper": script_case("Omniglot 5-way 1-shot, paper's sizes", omniglot_train, 5, 1, tasks=32, steps=1,
                                  k_qry=1),
    "omniglot-5w1s": script_case("Omniglot 5-way 1-shot", omniglot_train, 5, 1, tasks=32),
    "omniglot-5w5s": script_case("Omniglot 5-way 5-shot", omniglot_train, 5, 5, tasks=32),
    "omniglot-20w1s": script_case("Omniglot 20-way 1-shot", omniglot_train, 20, 1, tasks=16),
    "miniimagenet-5w1s": script_case("miniImageNet 5-way 1-shot", miniimagenet_train, 5, 1, tasks=4),
    "miniimagenet-5w5s": script_case("miniImageNet 5-way 5-shot", miniimagenet_train, 5, 5, tasks=4),
}


def prepare(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Implementation], Learner, Tasks]:
    """Every implementation, at the same theta and with the same tasks."""
    torch.manual_seed(SEED)
    net = Learner(case.config, case.imgc, case.imgsz).to(device, dtype)
    parts = []
    for per_class in (case.k_spt, case.k_qry):
        images = torch.randn(case.tasks, case.n_way * per_class, case.imgc, case.imgsz, case.imgsz)
        labels = torch.arange(case.n_way).repeat_interleave(per_class).repeat(case.tasks, 1)
        parts += [images.to(device, dtype), labels.to(device)]
    tasks = Tasks(*parts)
    return {name: make(case, net, tasks) for name, make in implementations_on(device).items()}, net, tasks


def check(case: Case, device: torch.device) -> dict[str, float]:
    """Compare all gradients in float64, on a part of the case; stop if one is wrong.

    Returns:
        The relative error of each: its distance from the median of all gradients, taken value by value.
    """
    part = case._replace(**{field: min(getattr(case, field), most) for field, most in CHECKED.items()})
    gradients = {}
    for name, implementation in prepare(part, device, torch.float64)[0].items():
        implementation.step()
        gradients[name] = torch.cat([g.flatten() for g in implementation.gradient()])
    median = torch.stack(list(gradients.values())).median(0).values
    errors = {name: float((g - median).norm() / median.norm()) for name, g in gradients.items()}
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        sys.exit(f"{case.title}: gradients differ in float64, relative: {', '.join(wrong)}; nothing was timed")
    return errors


def measure(case: Case, args: argparse.Namespace, keep: bool) -> dict:
    """Time the implementations in turn: {"GFLOP", "times": {name: {"s": median, "min_s", "first_s": the warm-up}}}."""
    if keep:
        devices.keep_memory()
    device = start(args)
    implementations, net, tasks = prepare(case, device, torch.float32)
    implementations[PRODUCT] = product = MatrixProduct(case, net, tasks)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in implementations}
    for _ in range(1 + args.repeats):
        for name, implementation in implementations.items():
            gc.collect()
            synchronize()
            began = time.perf_counter()
            implementation.step()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {"GFLOP": round(product.flops / 1e9, 1),
            "times": {name: {"s": statistics.median(times), "min_s": min(times), "first_s": first}
                      for name, (first, *times) in seconds.items()}}


def start(args: argparse.Namespace) -> torch.device:
    """Set up the process as every implementation needs it; returns the device."""
    if hasattr(os, "sched_setaffinity"):  # JAX takes as many threads as it sees cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:torch.get_num_threads()])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for all
    os.environ |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    torch.backends.cudnn.benchmark = True  # shapes never change
    return devices.select_device(args.device)


def measure_in_processes(case: Case, args: argparse.Namespace) -> dict:
    """`measure`, with each implementation under the allocator setting that suits it better."""
    glibc = platform.libc_ver()[0] == "glibc" and args.device == "cpu"  # elsewhere keep_memory has no effect
    runs = []
    for keep in (False, True) if glibc else (False,):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            runs.append(pool.submit(measure, case, args, keep).result())
    return runs[0] | {"times": {name: min((run["times"][name] for run in runs), key=lambda row: row["s"])
                                for name in runs[0]["times"]}}


def table(report: dict) -> str:
    """A Markdown table: a row per implementation, a column per case."""
    cases = report["cases"]
    heads = [f"{CASES[case].title} ({found['GFLOP']:.0f} GFLOP)" for case, found in cases.items()]
    lines = [f"| implementation | {' | '.join(heads)} | compile time |", "|---" * (len(heads) + 2) + "|"]
    times = [found["times"] for found in cases.values()]
    for name in times[0]:
        rows = [one[name] for one in times]
        cells = [f"{one[name]['s']:.3g} s ({one[name]['s'] / one[THIS]['s']:.2f}x)" for one in times]
        compiling = " to ".join(dict.fromkeys(f"{most(row['first_s'] for row in rows):.0f}" for most in (min, max)))
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{compiling} s' if name == 'JAX' else '-'} |")
    return "\n".join([*lines, "", f"{report['machine']}; medians of {report['repeats']} rounds."])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case, not all")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds; 7 if not given")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    path = HERE / (f"speed-{args.only}.json" if args.only else "speed.json")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    device = start(args)
    if absent := [name for name in OTHERS if name not in implementations_on(device)]:
        print(f"left out: {', '.join(absent)}; pip install -r benchmarks/requirements.txt")
    cases = {args.only: CASES[args.only]} if args.only else CASES
    for case in cases.values():
        worst = max(check(case, device).values())
        print(f"{case.title}: all gradients agree in float64, relative error at most {worst:.0e}", flush=True)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    report = {"machine": f"{devices.device_name(device)}{threads}, PyTorch {torch.__version__}",
              "repeats": args.repeats, "cases": {}}
    for name, case in cases.items():
        report["cases"][name] = measure_in_processes(case, args)
        with files.atomic(path, "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")
        print(f"\n{table(report)}", flush=True)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    files.run(main)
