"""The loop that both training scripts share: settings, run folder, log, validation, test.

A run writes its own folder:

    args.json     every setting, versions, device, data: before the first step
    log.jsonl     one JSON object a line: "run" (the data's name), then "train", "nc" (metrics) and "val"
    best.pt       weights with the best validation accuracy so far
    result.json   test accuracy of those weights, at the end
    timing.json   minutes and memory, apart from what the seed determines

"step" is always the number of meta-updates that the weights had seen.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import numpy
import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

import distributed
import nc_metrics
import taskwise
from cuda_graph import GraphedStep
from files import Parser, UserError, atomic
from learner import Config, Learner
from meta import Meta, join
from tasks import Prefetched, Tasks, finish, pick, to_device

VAL_SEED, TEST_SEED = 1, 2  # of the held-out tasks: the same for every run, so that runs compare on the same tasks
TEST_FLAGS = ("k_qry", "update_step_test", "test_tasks")  # what --test may set anew
EVALUATION_BATCH = 50  # tasks drawn together for validation and test
PLACE_FLAGS = ("root", "cache", "device")  # where a run happens; no part of the experiment


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


# ---- settings


def parse_args(description: str, defaults: dict, argv: Sequence[str] | None, epoch_help: str) -> argparse.Namespace:
    """The command line of a training script.

    Args:
        description: first line of --help.
        defaults: of the flags whose default is the script's own; "rotations" only where the data has them.
        argv: arguments without the program's name; sys.argv's if None.
    Raises:
        UserError: unknown or malformed flags.
    """
    parser = _parser(description, defaults, epoch_help)
    args = parser.parse_args(argv)
    if args.test is not None:
        given = _parser(description, defaults, epoch_help, only_given=True).parse_args(argv)
        args = _settings_of(args.test, vars(parser.parse_args([])), vars(given))
    return args


def _parser(description: str, defaults: dict, epoch_help: str, only_given: bool = False) -> argparse.ArgumentParser:
    """The flags; with `only_given`, those that are not on the command line are left unset."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def flag(name: str, default, text: str, **options):
        if not isinstance(default, bool):
            options["type"] = str if default is None else type(default)
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS if only_given else default, help=text, **options)

    def choice(name: str, default: bool, text: str):
        flag(name, default, text, action=argparse.BooleanOptionalAction)

    flag("epoch", defaults["epoch"], epoch_help)
    flag("n_way", defaults["n_way"], "classes a task")
    flag("k_spt", defaults["k_spt"], "support images a class (k-shot)")
    flag("k_qry", defaults["k_qry"], "query images a class")
    flag("imgsz", defaults["imgsz"], "images are resized to this square, pixels")
    flag("imgc", defaults["imgc"], "channels of an image")
    flag("task_num", defaults["task_num"], "tasks a meta-step (the meta-batch)")
    flag("meta_lr", defaults["meta_lr"], "learning rate of the outer loop, Adam")
    flag("update_lr", defaults["update_lr"], "learning rate of the inner loop, SGD on the mean cross-entropy")
    flag("update_step", defaults["update_step"], "inner steps in training")
    flag("update_step_test", defaults["update_step_test"], "inner steps in validation and testing")
    flag("first_order", False, "take the inner gradients as constants (first-order MAML)", action="store_true")
    flag("net", "paper", "order within a block: paper = conv, batch norm, relu; original = conv, relu, batch norm",
         choices=["paper", "original"])
    if "rotations" in defaults:
        choice("rotations", defaults["rotations"],
               "in training, every class also turned by 90, 180, 270 degrees as further classes")
    flag("root", defaults["root"], "folder of the data")
    if "data_name" in defaults:
        flag("data_name", defaults["data_name"], "what logs and figures call the data in ROOT; miniImageNet only where "
             "the splits have its 64, 16 and 20 classes of 600 images")
    flag("cache", None, "folder of the decoded images; ROOT/cache if not given")
    choice("synthetic", False, "train on generated images, with no data at all")
    flag("out", None, "folder of the run; runs/SCRIPT-<n>w<k>s-seed<seed>-<time> if not given")
    flag("task_chunk", 0, "tasks in memory together at most: less memory, the same result; 0: as fits the device")
    choice("cuda_graph", True, "on CUDA, capture the training step once and replay it: the same result, sooner")
    flag("precision", "float32", "of matrix products: tf32 (CUDA) and bf16 are faster and coarser",
         choices=["float32", "tf32", "bf16"])
    flag("seed", 222, "of the initial weights and the training tasks")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "where to compute: cpu, cuda, cuda:1, ...")
    flag("nc_every", 100, "meta-steps between two neural-collapse measurements on training tasks; 0: none at all")
    flag("eval_every", 500, "meta-steps between two validations, with metrics on the same held-out tasks")
    flag("eval_tasks", 100, "tasks of a validation, always the same")
    flag("test_tasks", 600, "tasks of the test at the end")
    flag("test", None, f"test a finished run again, on its own settings but for {', '.join(TEST_FLAGS)} where given",
         metavar="RUN_FOLDER")
    if not only_given:
        parser.set_defaults(script=defaults["script"], print_every=defaults["print_every"])
    return parser


def _settings_of(run: str, defaults: dict, given: dict) -> argparse.Namespace:
    """The settings of a finished run, with what may be given anew."""
    path = Path(run) / "args.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        wrong = [name for name, default in defaults.items() if name not in settings
                 or default is not None and type(settings[name]) is not type(default)]
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; --test takes the folder of a finished run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what a run writes; --test takes the folder of a finished run") from error
    if wrong or settings["script"] != defaults["script"]:
        raise UserError(f"{path} is not of this script and version ({', '.join(wrong) or settings['script']}); "
                        "test the run with the code that made it")
    allowed = TEST_FLAGS + PLACE_FLAGS + ("test",)
    for name in given:
        if name not in allowed:
            raise UserError(f"--{name} can't be set with --test: the run's own holds; "
                            f"there are {', '.join('--' + flag for flag in allowed[:-1])}")
    return argparse.Namespace(**({name: settings[name] for name in defaults} | given))


def check(args: argparse.Namespace, dataset: Dataset, layers: Callable[[argparse.Namespace], Config]) -> dict:
    """Refuse settings that can't work, before any image is read.

    Returns:
        The data's sizes: split -> (classes, images a class).
    Raises:
        UserError: one line that names the flag and what it can be.
    """
    for name, least in {"epoch": 1, "n_way": 2, "k_spt": 1, "k_qry": 1, "imgsz": 1, "task_num": 1, "update_step": 1,
                        "update_step_test": 1, "eval_every": 1, "eval_tasks": 2, "test_tasks": 2, "nc_every": 0,
                        "task_chunk": 0, "seed": 0}.items():
        if not least <= getattr(args, name) < 2**31:
            raise UserError(f"--{name} {getattr(args, name)}: must be a whole number from {least}")
    for name in ("meta_lr", "update_lr"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be a number above 0")
    if args.imgc != dataset.channels:
        raise UserError(f"--imgc {args.imgc}: {dataset.name} has {dataset.channels}")
    if meta_steps(args) < 1:
        raise UserError(f"--epoch {args.epoch}: fewer tasks than one meta-step takes; at least {args.task_num}")
    check_device(args.device)
    if args.task_num % distributed.size():
        raise UserError(f"--task_num {args.task_num}: {distributed.size()} processes need a multiple of "
                        f"{distributed.size()}")
    try:
        Learner(layers(args), args.imgc, args.imgsz)
    except ValueError as error:
        raise UserError(f"--imgsz {args.imgsz}: {error}") from error
    sizes = dataset.sizes()
    for split, (classes, images) in sizes.items():
        classes *= 4 if split == "train" and getattr(args, "rotations", False) else 1
        if args.n_way > classes:
            raise UserError(f"--n_way {args.n_way}: {dataset.name} has {classes} classes in its {split} split")
        if args.k_spt + args.k_qry > images:
            raise UserError(f"--k_spt {args.k_spt} --k_qry {args.k_qry}: {dataset.name} has {images} images "
                            f"a class in its {split} split; their sum can be at most that")
    return sizes


def check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; take cpu, or cuda on a machine with an NVIDIA GPU") from error


def meta_steps(args: argparse.Namespace) -> int:
    """How many meta-steps the run takes: --epoch counts meta-steps, or tasks on miniImageNet, as in the original."""
    return args.epoch if args.script == "omniglot_train" else args.epoch // args.task_num


# ---- the run


def train(args: argparse.Namespace, dataset: Dataset, layers: Callable[[argparse.Namespace], Config]) -> None:
    """Train, validate and test as the settings say; or test a finished run again, with `args.test`."""
    args.device = distributed.local_device(args.device)
    sizes = check(args, dataset, layers)
    device = torch.device(args.device)
    distributed.start(device)
    try:
        _train(args, dataset, sizes, layers(args), device)
    finally:
        distributed.stop()


def _train(args: argparse.Namespace, dataset: Dataset, sizes: dict, config: Config, device: torch.device) -> None:
    keep_memory()
    _set_precision(args.precision)
    torch.manual_seed(args.seed)
    net = Learner(config, args.imgc, args.imgsz)
    net.to(device)
    maml = Meta(net, args.update_lr, args.meta_lr, args.update_step, args.update_step_test, args.first_order,
                args.nc_every, args.task_chunk, args.seed)
    splits = _Splits(args, dataset, device)
    if args.test is not None:
        return _test_again(args, maml, splits)

    steps = meta_steps(args)
    out = _folder(args)
    images, held_out = splits.load("train"), splits.load("val")
    dataset.load("test")  # not looked at: what is wrong with it is said now, not after the training
    _write_args(args, dataset, sizes, steps, out)
    _say(_banner(args, net, dataset, steps, out))
    on_host = images.device.type != device.type
    generator, sample = splits.sampler(images, args.seed, args.task_num, getattr(args, "rotations", False), on_host)
    replay = device.type == "cuda" and args.cuda_graph and not on_host
    replayed = None  # the CUDA graph of a step on which nothing is looked at
    best = -1.0
    started = time.perf_counter()
    with Log(out / "log.jsonl") as log, _progress(steps) as bar:
        log.add("run", 0, data=dataset.name, meta_steps=steps)
        for step in range(steps):
            if step % args.eval_every == 0:
                best = _validate(args, maml, splits, held_out, best, out, log)
            shown = step % args.print_every == 0
            if shown or maml.measures_next or not replay:
                seen = maml(sample(), every_step=shown)
            else:
                replayed = replayed or GraphedStep(maml, lambda: maml(sample()), generator)
                seen = replayed()
            if shown:
                log.add("train", step, loss=seen.loss, acc=seen.accuracy.mean(0))
                _say(f"step: {step} \ttraining acc: {_percent(seen.accuracy.mean(0))}")
            if seen.metrics:
                _log_metrics(log, step, "train", net, seen.metrics)
            if step % 10 == 0:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{seen.loss:.3f}", acc=f"{seen.accuracy[:, -1].mean():.3f}", refresh=False)
            bar.update()
        best = _validate(args, maml, splits, held_out, best, out, log)
    minutes = (time.perf_counter() - started) / 60
    del images, held_out
    _write_json(out / "result.json", _test(args, maml, splits, out))
    memory = _memory(device)
    _write_json(out / "timing.json", {"training_minutes": round(minutes, 2), "meta_steps": steps} | memory)
    _say(f"{minutes:.1f} minutes for {steps} meta-steps, peak memory {memory['peak_memory_gb']} GB; results in {out}")


class _Splits:
    """The images of each split, and tasks from them."""

    def __init__(self, args: argparse.Namespace, dataset: Dataset, device: torch.device):
        self.dataset, self.device = dataset, device
        self.n_way, self.k_spt, self.k = args.n_way, args.k_spt, args.k_spt + args.k_qry
        self.mean, self.std = (torch.tensor(values, device=device) for values in (dataset.mean, dataset.std))

    def load(self, split: str) -> Tensor:
        """uint8 [class, image, c, h, w] on the device, or on the host where it would take over half of what is free."""
        images = self.dataset.load(split)
        if self.device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(self.device)[0] / 2:
            _say(f"the {split} images stay on the host: {images.numel() / 2**30:.1f} GB")
            return images
        return images.to(self.device)

    def sampler(self, images: Tensor, seed: int, n_tasks: int, rotations: bool = False, prefetch: bool = False):
        """A generator of tasks, and the function that draws the next `n_tasks` from it."""
        generator = torch.Generator(images.device).manual_seed(seed)

        def draw(count: int = n_tasks) -> tuple[Tensor | None, ...]:
            return pick(images, count, self.n_way, self.k, generator, rotations)

        ahead = Prefetched(draw, self.device) if prefetch else None

        def sample(*count: int) -> Tasks:
            drawn = ahead() if ahead else to_device(draw(*count), self.device)
            return finish(*drawn, self.k_spt, self.mean, self.std)

        return generator, sample

    def evaluate(self, maml: Meta, images: Tensor, n_tasks: int, seed: int, measure: bool = False) -> list:
        """`maml.finetune` of `n_tasks` tasks, always the same for a seed, a batch at a time."""
        _, sample = self.sampler(images, seed, EVALUATION_BATCH)
        results = []
        for i, start in enumerate(range(0, n_tasks, EVALUATION_BATCH)):
            tasks = sample(min(EVALUATION_BATCH, n_tasks - start))
            if i % distributed.size() == distributed.rank():
                results.append(maml.finetune(tasks, measure))
        return distributed.gather_lists(results)


def _validate(args, maml: Meta, splits: _Splits, images: Tensor, best: float, out: Path, log: "Log") -> float:
    """Validate, log, keep the weights if they are the best yet; the best accuracy so far."""
    results = splits.evaluate(maml, images, args.eval_tasks, VAL_SEED, measure=args.nc_every > 0)
    accuracy = torch.cat([accuracy for accuracy, _ in results])  # [tasks, steps + 1]
    mean, interval = _mean_and_interval(accuracy)
    log.add("val", maml.step, acc=mean, ci95=interval, tasks=len(accuracy))
    if args.nc_every > 0:
        _log_metrics(log, maml.step, "heldout", maml.net, join([metrics for _, metrics in results]))
    _say(f"step: {maml.step} \tvalidation acc: {_percent(mean)} (last ± {100 * interval[-1]:.1f})")
    if mean[-1] > best:
        best = mean[-1].item()
        if distributed.rank() == 0:
            with atomic(out / "best.pt") as file:
                torch.save({"weights": maml.net.state_dict(), "step": maml.step, "val_accuracy": best}, file)
    return best


def _test(args: argparse.Namespace, maml: Meta, splits: _Splits, run: Path) -> dict:
    """Test accuracy of a run's best weights on the test classes."""
    path = run / "best.pt"
    distributed.wait()  # for the process that writes it
    try:
        best = torch.load(path, map_location=splits.device, weights_only=True)
        maml.net.load_state_dict(best["weights"])
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run hasn't got to its first validation") from error
    except Exception as error:  # whatever torch.load makes of a damaged file
        raise UserError(f"{path} can't be read as this network's weights; train again") from error
    _say(f"testing on {args.test_tasks} tasks of the test classes")
    results = splits.evaluate(maml, splits.load("test"), args.test_tasks, TEST_SEED)
    mean, interval = _mean_and_interval(torch.cat([accuracy for accuracy, _ in results]))
    k = args.update_step_test
    _say(f"test accuracy on {splits.dataset.name}, {args.n_way}-way {args.k_spt}-shot, after {k} inner steps: "
         f"{100 * mean[-1]:.2f}% ± {100 * interval[-1]:.2f} (95%, {args.test_tasks} tasks, {args.k_qry} queries a class, "
         f"best weights of step {best['step']})")
    _say(f"after 0..{k} inner steps: {_percent(mean)}")
    return {"data": splits.dataset.name, "test": {"accuracy": _numbers(mean), "ci95": _numbers(interval),
            "inner_steps": list(range(k + 1)), "tasks": args.test_tasks, "n_way": args.n_way, "k_spt": args.k_spt,
            "k_qry": args.k_qry}, "best_step": best["step"], "val_accuracy": _numbers(best["val_accuracy"])}


def _test_again(args: argparse.Namespace, maml: Meta, splits: _Splits) -> None:
    run = Path(args.test)
    result = _test(args, maml, splits, run)
    path = run / f"test-{args.test_tasks}tasks-{args.k_qry}qry-{args.update_step_test}steps.json"
    _write_json(path, result)
    _say(f"written to {path}")


def _set_precision(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    taskwise.use_bf16(precision == "bf16")


# ---- what a run writes and says


def _folder(args: argparse.Namespace) -> Path:
    """Where the run goes; it is made when its first file is written."""
    name = f"{args.script}-{args.n_way}w{args.k_spt}s-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(args.out or f"runs/{name}")
    if distributed.rank() == 0 and (out / "log.jsonl").exists():
        raise UserError(f"--out {out}: there is a run already; name another folder")
    return out


def _write_args(args: argparse.Namespace, dataset: Dataset, sizes: dict, steps: int, out: Path) -> None:
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    _write_json(out / "args.json", {
        "settings": vars(args),
        "meta_steps": steps,
        "data": {"name": dataset.name, "synthetic": args.synthetic, "splits": {
            split: {"classes": classes, "images_per_class": images}
            for split, (classes, images) in sizes.items()}},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__},
        "git_commit": _commit(),
    })


def processor() -> str:
    """What the processor calls itself, e.g. "AMD EPYC"; its architecture where it doesn't say."""
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this code, with "+" where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def _banner(args: argparse.Namespace, net: Learner, dataset: Dataset, steps: int, out: Path) -> str:
    parameters = sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
    settings = ", ".join(f"{name}={value}" for name, value in vars(args).items())
    return (f"{settings}\n{net}\nTotal trainable parameters: {parameters}\n"
            f"Data: {dataset.name}. {steps} meta-steps of {args.task_num} tasks on {args.device}, to {out}")


class Log:
    """log.jsonl: one JSON object a line, on disk at once, so that a plot can be drawn while it runs."""

    def __init__(self, path: Path):
        self.file = open(path if distributed.rank() == 0 else os.devnull, "w", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def add(self, kind: str, step: int, **values) -> None:
        line = {"kind": kind, "step": step} | {name: _numbers(value) for name, value in values.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def _log_metrics(log: Log, step: int, classes: str, net: Learner, metrics: dict) -> None:
    """One "nc" line: mean and standard error over tasks of every metric, a value a layer."""
    def summary(values: Tensor) -> dict:  # [..., T]
        mean, se = nc_metrics.mean_and_se(values.double())
        return {"mean": _numbers(mean), "se": _numbers(se)}

    inner = {name: values.permute(2, 0, 1) for name, values in metrics["inner"].items()}  # [K+1, L, T]
    inner["accuracy"] = inner["accuracy"][:, 0]
    models = {model: {name: summary(values) for name, values in metrics[model].items()}
              for model in ("meta", "finetuned")}
    tasks = metrics["meta"]["within"].shape[1]
    log.add("nc", step, classes=classes, tasks=tasks, layers=net.blocks, **models,
            inner={name: summary(values) for name, values in inner.items()})
    if classes == "train":
        traces = [models[model][name]["mean"][-2] for model in models for name in ("within", "between")]
        _say("step: {} \ttraces of {}: meta within {:.4g} between {:.4g}, finetuned within {:.4g} between {:.4g}".format(
            step, net.blocks[-2], *(math.nan if t is None else t for t in traces)))


def _progress(steps: int):
    if sys.stderr.isatty():
        return tqdm(total=steps, unit="step", dynamic_ncols=True, disable=distributed.rank() > 0)
    return _Lines(steps)


class _Lines:
    """What tqdm shows, as a plain line every 100 steps: for logs of a batch system."""

    def __init__(self, steps: int):
        self.steps, self.step, self.started, self.postfix = steps, 0, time.perf_counter(), ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_postfix(self, refresh: bool = False, **values: str) -> None:
        self.postfix = ", ".join(f"{name} {value}" for name, value in values.items())

    def update(self) -> None:
        self.step += 1
        if self.step % 100 == 0 or self.step == self.steps:
            left = (time.perf_counter() - self.started) / self.step * (self.steps - self.step)
            _say(f"{self.step}/{self.steps} steps, {self.postfix}, {left / 60:.1f} minutes left")


def _say(text: str) -> None:
    """Print a line, above the bar where there is one; of several processes only the first speaks."""
    if distributed.rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def _percent(values: Tensor) -> str:
    return "[" + " ".join(f"{100 * value:.2f}" for value in values.tolist()) + "]"


def _numbers(values):
    """Tensors to lists, six digits; what is not a number to None, for JSON has none."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.6g}") if math.isfinite(values) else None
    return values


def _write_json(path: Path, value: dict) -> None:
    if distributed.rank() > 0:
        return
    with atomic(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def _mean_and_interval(accuracy: Tensor) -> tuple[Tensor, Tensor]:
    """[tasks, steps] -> mean, and half of the 95% interval over tasks (normal)."""
    mean, se = nc_metrics.mean_and_se(accuracy.double().T)
    return mean, 1.96 * se


def _memory(device: torch.device) -> dict:
    """Peak memory of the run: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return {"peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)}
    scale = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes there, KiB elsewhere
    return {"peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 2)}


def keep_memory() -> None:
    """Let glibc keep large blocks instead of returning them to the system and faulting them in again.

    The inner loop allocates and frees the same megabytes thousands of times. What it saves are page faults: it helps
    code that allocates more (benchmarks/speed.py shows vmap 1.5 times as fast); a whole step here is about the same.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        with contextlib.suppress(AttributeError):
            libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)  # the most that some allow
            libc.mallopt(trim_threshold, 2**31 - 1)
