"""How long a meta-step takes: this project, and the ways in which people write MAML in PyTorch.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py                          # four cases, a table and benchmarks/speed.png
    python benchmarks/speed.py --only omniglot-5w1s --repeats 15 --json speed.json
    python benchmarks/speed.py --scaling                # also: how the time grows with tasks, inner steps, ways

Every implementation does the same: second-order MAML with the network of `--net paper` (convolution, batch norm,
relu), from the same theta, on the same tasks (random images of the data's shape: the time does not depend on what
they show), the gradient of the mean query loss, and one step of torch.optim.Adam. The time of all that is measured.
theta is put back before every step, outside the measured time.

    this project   Meta.forward; on CUDA as the training scripts run it, in a CUDA graph, and also without
    plain loop     torch.nn.functional and autograd.grad(create_graph=True), task by task
    higher         higher.innerloop_ctx over a torch.nn.Sequential, task by task
    torchopt       torchopt.MetaSGD over the same Sequential, its state put back after each task
    vmap           torch.func.vmap over tasks of torch.func.grad

The loops go backward task by task, which is faster than one pass over the sum of the losses and takes less memory.
vmap is structured as PyTorch's own functorch example, but for the batch norm: vmap over F.batch_norm gives a wrong
second derivative (pytorch/functorch#534), so it gets one written from mean, variance and rsqrt.

First all gradients are compared in float64, with 2 tasks, 2 inner steps and 5 queries; one that is off is named, and
nothing is timed. Then the implementations take turns in float32, `--repeats` rounds after a warm-up, with Python's
garbage collected between the steps. On a CPU all of it runs twice, each time in a process of its own: with the system's
allocator as it is ("default"), and with glibc told to keep large blocks, as the training scripts do ("kept").
"""

import argparse
import copy
import functools
import gc
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import device as devices
import miniimagenet_train
import omniglot_train
from device import GraphedStep
from files import Parser, UserError, atomic, run
from learner import Config, Learner
from meta import Meta
from tasks import Tasks

META_LR, SEED = 1e-3, 222
TOLERANCE = 1e-6  # relative error of a gradient in float64; correct implementations agree to about 1e-10
CHECKED = {"tasks": 2, "steps": 2, "k_qry": 5}  # at most: float64 is slow
SCALING = {"tasks": (1, 2, 4, 8, 16, 32, 64), "steps": (1, 2, 3, 5, 7, 10), "n_way": (5, 20)}
THIS, EAGER = "this project", "this project, no graph"
LOOPS = ("plain loop", "higher", "torchopt")


class Case(NamedTuple):
    """A setting of MAML."""

    name: str
    layers: Callable[[argparse.Namespace], Config]
    imgc: int
    imgsz: int
    lr: float  # of the inner loop
    n_way: int
    k_spt: int
    tasks: int
    steps: int = 5
    k_qry: int = 15

    @property
    def config(self) -> Config:
        return self.layers(argparse.Namespace(net="paper", imgc=self.imgc, imgsz=self.imgsz, n_way=self.n_way))


_OMNIGLOT = omniglot_train.layers, 1, 28, 0.4
_MINIIMAGENET = miniimagenet_train.layers, 3, 84, 0.01
CASES = {case.name: case for case in (
    Case("omniglot-5w1s", *_OMNIGLOT, n_way=5, k_spt=1, tasks=32),
    Case("omniglot-5w5s", *_OMNIGLOT, n_way=5, k_spt=5, tasks=32),
    Case("omniglot-20w1s", *_OMNIGLOT, n_way=20, k_spt=1, tasks=16),
    Case("miniimagenet-5w5s", *_MINIIMAGENET, n_way=5, k_spt=5, tasks=4),
)}
TRIAL = Case("trial", *_OMNIGLOT, n_way=2, k_spt=1, tasks=2, steps=2, k_qry=2)  # small: does everything run?


class Settings(NamedTuple):
    """What every measurement of a run shares."""

    repeats: int
    device: str
    threads: int


# ---- the implementations


class Implementation:
    """One way to take a meta-step. `weights` are its theta, in the order of the layers; `step` leaves their .grad."""

    weights: list[nn.Parameter]

    def step(self, tasks: Tasks) -> None:
        """The gradient of the mean query loss with respect to theta, and a step of Adam."""
        raise NotImplementedError


class ThisProject(Implementation):
    def __init__(self, case: Case, net: Learner):
        self.meta = Meta(copy.deepcopy(net), update_lr=case.lr, meta_lr=META_LR, update_step=case.steps)
        self.weights = list(self.meta.net.weights.values())

    def step(self, tasks: Tasks) -> None:
        self.meta(tasks)


class ThisProjectGraphed(ThisProject):
    """The same, captured at its first step (the warm-up) and replayed."""

    graph = None

    def step(self, tasks: Tasks) -> None:
        if self.graph is None:
            theta = [w.detach().clone() for w in self.weights]
            self.meta(tasks)  # Adam's state must be there before the capture
            put_back(self.weights, theta)
            self.graph = GraphedStep(self.meta, lambda: self.meta(tasks), torch.Generator(tasks.y_spt.device))
        self.graph()


class _WithAdam(Implementation):
    def __init__(self, case: Case, weights: Sequence[Tensor]):
        self.case, self.config = case, case.config
        self.weights = list(weights)
        self.optimizer = torch.optim.Adam(self.weights, lr=META_LR)

    def step(self, tasks: Tasks) -> None:
        self.optimizer.zero_grad()
        self.backward(tasks)
        self.optimizer.step()

    def backward(self, tasks: Tasks) -> None:
        raise NotImplementedError


class PlainLoop(_WithAdam):
    def __init__(self, case: Case, net: Learner):
        super().__init__(case, _ordinary(net))

    def backward(self, tasks: Tasks) -> None:
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks):
            fast = self.weights
            for _ in range(self.case.steps):
                loss = F.cross_entropy(logits(self.config, fast, x_spt, _native_batch_norm), y_spt)
                gradients = torch.autograd.grad(loss, fast, create_graph=True)
                fast = [w - self.case.lr * g for w, g in zip(fast, gradients)]
            loss = F.cross_entropy(logits(self.config, fast, x_qry, _native_batch_norm), y_qry)
            (loss / len(tasks.y_qry)).backward()


class Vmap(_WithAdam):
    def __init__(self, case: Case, net: Learner):
        super().__init__(case, _ordinary(net))

    def backward(self, tasks: Tasks) -> None:
        losses = torch.func.vmap(functools.partial(self.loss_of_task, self.weights))(*tasks)
        losses.mean().backward()

    def loss_of_task(self, weights: list[Tensor], x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Tensor:
        def loss(fast: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits(self.config, fast, x, elementary_batch_norm), y)

        for _ in range(self.case.steps):
            gradients = torch.func.grad(loss)(weights, x_spt, y_spt)
            weights = [w - self.case.lr * g for w, g in zip(weights, gradients)]
        return loss(weights, x_qry, y_qry)


class Higher(_WithAdam):
    def __init__(self, case: Case, net: Learner):
        self.higher = _package("higher")
        self.net = module(case.config, _ordinary(net))
        super().__init__(case, self.net.parameters())
        self.inner = torch.optim.SGD(self.net.parameters(), lr=case.lr)

    def backward(self, tasks: Tasks) -> None:
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks):
            with self.higher.innerloop_ctx(self.net, self.inner, copy_initial_weights=False) as (net, inner):
                for _ in range(self.case.steps):
                    inner.step(F.cross_entropy(net(x_spt), y_spt))
                (F.cross_entropy(net(x_qry), y_qry) / len(tasks.y_qry)).backward()


class TorchOpt(_WithAdam):
    def __init__(self, case: Case, net: Learner):
        self.torchopt = _package("torchopt")
        self.net = module(case.config, _ordinary(net))
        super().__init__(case, self.net.parameters())
        self.inner = self.torchopt.MetaSGD(self.net, lr=case.lr)

    def backward(self, tasks: Tasks) -> None:
        state = self.torchopt.extract_state_dict(self.net, by="reference", detach_buffers=True)
        inner_state = self.torchopt.extract_state_dict(self.inner, by="reference")
        for x_spt, y_spt, x_qry, y_qry in zip(*tasks):
            for _ in range(self.case.steps):
                self.inner.step(F.cross_entropy(self.net(x_spt), y_spt))
            (F.cross_entropy(self.net(x_qry), y_qry) / len(tasks.y_qry)).backward()
            self.torchopt.recover_state_dict(self.net, state)
            self.torchopt.recover_state_dict(self.inner, inner_state)


OTHERS = {"plain loop": PlainLoop, "higher": Higher, "torchopt": TorchOpt, "vmap": Vmap}


def implementations_on(device: torch.device) -> dict[str, Callable[[Case, Learner], Implementation]]:
    own = {THIS: ThisProjectGraphed, EAGER: ThisProject} if device.type == "cuda" else {THIS: ThisProject}
    return own | OTHERS


def put_back(weights: Sequence[nn.Parameter], theta: Sequence[Tensor]) -> None:
    """theta into the weights, at the address where they are."""
    with torch.no_grad():
        for weight, value in zip(weights, theta):
            weight.copy_(value)


def _ordinary(net: Learner) -> list[nn.Parameter]:
    """The Learner's weights in the memory layout that torch's own layers give theirs."""
    return [nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format)) for w in net.weights.values()]


def _package(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"no module {error.name or name}: pip install -r benchmarks/requirements.txt") from error


def logits(config: Config, weights: Sequence[Tensor], x: Tensor, batch_norm: Callable) -> Tensor:
    """The network as a function of its weights: images [N, c, h, w] of one task -> [N, n_way]."""
    weights = iter(weights)
    for name, params in config:
        match name:
            case "conv2d":
                x = F.conv2d(x, next(weights), next(weights), params[4], params[5])
            case "bn":
                x = batch_norm(x, next(weights), next(weights))
            case "relu":
                x = F.relu(x, inplace=True)
            case "max_pool2d":
                x = F.max_pool2d(x, *params)
            case "flatten":
                x = x.flatten(1)
            case "linear":
                x = F.linear(x, next(weights), next(weights))
            case _:
                raise ValueError(f"no layer {name!r} here")
    return x


def _native_batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def elementary_batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As F.batch_norm with the batch's own statistics: [N, c, h, w]; weight and bias [c]."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    r = (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
    return centred * (r * weight[:, None, None]) + bias[:, None, None]


def module(config: Config, weights: Sequence[nn.Parameter]) -> nn.Sequential:
    """The network as a module of torch's own layers, on these weights."""
    make = {
        "conv2d": lambda out, c, k, _, stride, padding: nn.Conv2d(c, out, k, stride, padding),
        "bn": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        "relu": lambda _: nn.ReLU(inplace=True),
        "max_pool2d": nn.MaxPool2d,
        "flatten": nn.Flatten,
        "linear": lambda out, features: nn.Linear(features, out),
    }
    net = nn.Sequential(*(make[name](*params) for name, params in config))
    weights = iter(weights)
    for layer in net:
        for name, _ in list(layer.named_parameters()):  # weight, then bias, as in the Learner
            setattr(layer, name, next(weights))
    return net


# ---- the measurement


def prepare(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Implementation], Tasks]:
    """Every implementation, at the same theta, and the tasks."""
    torch.manual_seed(SEED)
    net = Learner(case.config, case.imgc, case.imgsz).to(device, dtype)
    generator = torch.Generator().manual_seed(SEED)

    def images(per_class: int) -> Tensor:
        shape = case.tasks, case.n_way * per_class, case.imgc, case.imgsz, case.imgsz
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def labels(per_class: int) -> Tensor:
        return torch.arange(case.n_way).repeat_interleave(per_class).repeat(case.tasks, 1).to(device)

    tasks = Tasks(images(case.k_spt), labels(case.k_spt), images(case.k_qry), labels(case.k_qry))
    return {name: make(case, net) for name, make in implementations_on(device).items()}, tasks


def check(case: Case, device: torch.device) -> dict[str, float]:
    """Compare all gradients in float64, on a part of the case.

    Returns:
        The relative error of each, from the median of all, number by number.
    Raises:
        UserError: implementations that are off, by name.
    """
    part = case._replace(**{field: min(getattr(case, field), most) for field, most in CHECKED.items()})
    implementations, tasks = prepare(part, device, torch.float64)
    gradients = {}
    for name, implementation in implementations.items():
        implementation.step(tasks)
        gradients[name] = torch.cat([w.grad.flatten() for w in implementation.weights])
    median = torch.stack(list(gradients.values())).median(0).values
    errors = {name: float((g - median).norm() / median.norm()) for name, g in gradients.items()}
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        raise UserError(f"{case.name}: gradients differ in float64, relative: {', '.join(wrong)}; nothing was timed")
    return errors


def measure(case: Case, settings: Settings, allocator: str, only: Sequence[str] = ()) -> list[dict]:
    """Time the implementations (all, or `only` those) in turn; in a process of its own, for `allocator` stays.

    Returns:
        A row for each.
    """
    device = start(settings)
    if allocator == "kept":
        devices.keep_memory()
    implementations, tasks = prepare(case, device, torch.float32)
    if only:
        implementations = {name: implementations[name] for name in only}
    theta = {name: [w.detach().clone() for w in one.weights] for name, one in implementations.items()}
    seconds = {name: [] for name in implementations}
    for _ in range(1 + settings.repeats):
        for name, implementation in implementations.items():
            put_back(implementation.weights, theta[name])
            gc.collect()
            _synchronize(device)
            began = time.perf_counter()
            implementation.step(tasks)
            _synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    common = {"tasks": case.tasks, "steps": case.steps, "n_way": case.n_way, "k_spt": case.k_spt, "k_qry": case.k_qry,
              "repeats": settings.repeats, "allocator": allocator, "device": device.type,
              "device_name": devices.device_name(device), "threads": settings.threads, "torch": torch.__version__}
    rows = []
    for name, (_, *times) in seconds.items():  # the first was the warm-up
        median = statistics.median(times)
        rows.append({"case": case.name, "implementation": name, "median_s": median, "min_s": min(times),
                     "max_s": max(times), "tasks_per_s": case.tasks / median, **common})
    return rows


def start(settings: Settings) -> torch.device:
    """Set the process up as every implementation finds it; the device."""
    torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for all
    torch.backends.cudnn.benchmark = True  # shapes never change
    return torch.device(settings.device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_a_process(function: Callable, *arguments):
    """`function(*arguments)` in a fresh process, which ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError("a measurement was killed, for want of memory perhaps; --only takes one case") from error


# ---- the report


def table(rows: list[dict]) -> str:
    """The rows of one case and one allocator, and how this project compares."""
    own = next(row for row in rows if row["implementation"] == THIS)
    lines = [f"{'implementation':<24}{'s / meta-step':>14}{'min - max':>18}{'tasks / s':>11}{'relative time':>16}"]
    for row in rows:
        spread = f"{row['min_s']:.4f} - {row['max_s']:.4f}"
        lines.append(f"{row['implementation']:<24}{row['median_s']:>14.4f}{spread:>18}{row['tasks_per_s']:>11.1f}"
                     f"{row['median_s'] / own['median_s']:>16.2f}")
    loop = best_other(rows, LOOPS)
    best = best_other(rows)
    lines.append(f"{THIS} is {best['median_s'] / own['median_s']:.2f}x as fast as the best other "
                 f"({best['implementation']}), {loop['median_s'] / own['median_s']:.2f}x as the best loop "
                 f"({loop['implementation']})")
    return "\n".join(lines)


def best_other(rows: list[dict], among: Sequence[str] = tuple(OTHERS)) -> dict:
    """The fastest row that is not this project's."""
    return min((row for row in rows if row["implementation"] in among), key=lambda row: row["median_s"])


def where(row: dict) -> str:
    """Where a row was measured."""
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row["device"] == "cpu" else ""
    return f"{row['device_name']}{threads}, PyTorch {row['torch']}"


def scaling(case: Case, rival: str, settings: Settings, allocator: str) -> list[dict]:
    """This project and one other, with more tasks, more inner steps, more ways; prints as it goes.

    Returns:
        Rows as `measure`, whose case says what was changed: omniglot-5w1s, tasks=8.
    """
    rows = []
    for field, values in SCALING.items():
        print(f"\n{case.name}, {field.replace('n_way', 'ways')} changed, allocator {allocator}: s / meta-step\n"
              f"{field.replace('n_way', 'ways'):>6}{THIS:>14}{rival:>14}{'ratio':>8}")
        for value in values:
            changed = case._replace(**{field: value}, name=f"{case.name}, {field}={value}")
            pair = in_a_process(measure, changed, settings, allocator, (THIS, rival))
            own, other = (row["median_s"] for row in pair)
            print(f"{value:>6}{own:>14.4f}{other:>14.4f}{other / own:>8.2f}", flush=True)
            rows += pair
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """A panel a case, a bar an implementation and allocator; whiskers from the fastest to the slowest repeat."""
    import matplotlib
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    allocators = list(dict.fromkeys(row["allocator"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours = {"default": "#56B4E9", "kept": "#0072B2"}  # Okabe and Ito's sky blue and blue
    height = 0.8 / len(allocators)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same picture whatever the user's matplotlibrc says
        matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(9, 1.2 + 2.2 * len(cases)), layout="constrained")
        for axes, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases):
            longest = max(row["max_s"] for row in rows if row["case"] == case)
            for i, allocator in enumerate(allocators):
                of_case = [row for row in rows if (row["case"], row["allocator"]) == (case, allocator)]
                medians = [row["median_s"] for row in of_case]
                shift = (i - (len(allocators) - 1) / 2) * height
                places = [names.index(row["implementation"]) + shift for row in of_case]
                whiskers = [[row["median_s"] - row["min_s"] for row in of_case],
                            [row["max_s"] - row["median_s"] for row in of_case]]
                axes.barh(places, medians, height * 0.94, color=colours[allocator], xerr=whiskers,
                          error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2},
                          label=f"allocator: {allocator}")
                for place, row in zip(places, of_case):
                    axes.text(row["max_s"] + longest * 0.012, place, f"{row['median_s']:.3g} s", va="center",
                              fontsize=9.5)
            axes.set_yticks(range(len(names)), names)
            axes.get_yticklabels()[names.index(THIS)].set_fontweight("bold")
            axes.invert_yaxis()
            axes.set_xlim(0, longest * 1.12)
            one = of_case[0]
            axes.set_title(f"{case}: {one['tasks']} tasks, {one['steps']} inner steps", loc="left", fontsize=11.5)
        axes.set_xlabel("seconds a meta-step, second order: median and range; shorter is better")
        if len(allocators) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
        figure.suptitle(where(one), x=0.01, ha="left", fontsize=10)
        with atomic(path, remedy="name another file with --chart") as file:
            figure.savefig(file, format="png", dpi=200, metadata={"Software": None})


# ---- the command


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: unknown flags, or values that can't be.
    """
    parser = Parser(description="Time a meta-step: this project and others.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", choices=[*CASES, TRIAL.name], metavar="CASE",
                        help=f"one case: {', '.join(CASES)}; {TRIAL.name} is small and only shows that all runs")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds, after a warm-up")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on a CPU")
    parser.add_argument("--allocator", choices=["default", "kept", "both"], default="both",
                        help="of the CPU's memory: the system's as it is, or told to keep large blocks")
    parser.add_argument("--scaling", action="store_true",
                        help="also how the first case's time grows, of this project and the best other")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--chart", type=Path, metavar="FILE", default=HERE / "speed.png", help="write the bar chart")
    args = parser.parse_args(argv)
    for name in ("repeats", "threads"):
        if not 1 <= getattr(args, name) < 2**31:
            raise UserError(f"--{name} {getattr(args, name)}: must be a whole number from 1")
    if args.chart.suffix.lower() != ".png":
        raise UserError(f"--chart {args.chart}: pictures are PNG files; name one that ends in .png")
    devices.check_device(args.device)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        del os.environ[name]  # the measuring processes inherit the rest
    cases = list(CASES.values()) if args.only is None else [{**CASES, TRIAL.name: TRIAL}[args.only]]
    settings = Settings(args.repeats, args.device, args.threads)
    allocators = ["default", "kept"] if args.allocator == "both" else [args.allocator]
    device = start(settings)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        allocators = ["default"]
    print(where({"device": device.type, "device_name": devices.device_name(device), "threads": args.threads,
                 "torch": torch.__version__}))
    for case in cases:
        worst = max(check(case, device).values())
        print(f"{case.name}: all gradients agree in float64, relative error at most {worst:.0e}", flush=True)
    rows = []
    for case in cases:
        for allocator in allocators:
            measured = in_a_process(measure, case, settings, allocator)
            print(f"\n{case.name}: {case.tasks} tasks, {case.steps} inner steps, {args.repeats} repeats, "
                  f"allocator {allocator}\n{table(measured)}", flush=True)
            rows += measured
    grown = []
    if args.scaling:
        of_first = [row for row in rows if (row["case"], row["allocator"]) == (cases[0].name, allocators[-1])]
        grown = scaling(cases[0], best_other(of_first)["implementation"], settings, allocators[-1])
    draw(rows, args.chart)
    print(f"\nwrote {args.chart}")
    if args.json:
        with atomic(args.json, "w", remedy="name another file with --json") as file:
            json.dump(rows + grown, file, indent=1)
            file.write("\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    run(main)
