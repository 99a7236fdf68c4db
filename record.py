"""What a run writes and prints: its folder, args.json, log.jsonl, results, lines on the screen."""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import device as devices
import nc_metrics
from files import UserError, atomic, locked, program, quoted, reading, remove_stale, same_place, writing
from learner import Learner
from tasks import Dataset, tree_map

WRITTEN = ("args.json", "*.pt", "result.png", "result.json", "timing.json")  # files that are written whole
PER_TASK = ("within", "between", "nc1", "cdnv", "directional_cdnv", "ncc_accuracy")  # what log.jsonl keeps per task
REMEDY = "free space or fix the permissions there; --resume continues a run that has begun"


# ---- the folder


@contextlib.contextmanager
def lock_run(args: argparse.Namespace) -> Iterator[Path]:
    """The run's folder, locked. It is created if absent; one that holds a run is refused, unless --resume names it.

    A folder into which nothing was written is removed at the end.
    """
    started = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # several runs may start in one second
    started, *_ = devices.gather_lists([started])  # of several processes, the first one's
    name = f"{args.script}-{args.n_way}w{args.k_spt}s-seed{args.seed}-{started}"
    out = Path(args.out or f"runs/{name}")
    if devices.rank() > 0:
        yield out
        return
    held = False
    try:
        with locked(out / ".run.lock"):
            held = True
            if args.resume is None and any(os.path.exists(out / file) for file in ("args.json", "log.jsonl")):
                raise UserError(f"--out {out}: there is a run already; name another folder, or continue it: "
                                f"--resume {quoted(out)}")
            for pattern in WRITTEN:
                remove_stale(out, pattern)
            yield out
    finally:
        with contextlib.suppress(OSError):
            if held and os.listdir(out) == [".run.lock"]:
                shutil.rmtree(out)


def write_args(out: Path, settings: dict, steps: int, layers: list, data: dict, device: torch.device) -> None:
    """Write args.json: settings, network, data, device and versions, before the first step."""
    write_json(out / "args.json", {
        "settings": settings,
        "meta_steps": steps,
        "layers": layers,
        "data": data,
        "device": {"type": device.type, "name": devices.device_name(device), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     **{name: metadata.version(name) for name in ("torchvision", "numpy", "pillow")}},
        "git_commit": _commit(),
    })


def _commit() -> str | None:
    """The commit of this code, with "+" where files differ from it; None outside a checkout."""
    command = "git describe --always --abbrev=40 --dirty=+ --exclude=*".split()  # no tags: the hash alone
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    return None


def check_network(run: Path, net: Learner) -> None:
    """Raise a UserError that names the first layer that differs, if the run recorded another network."""
    path = run / "args.json"
    with reading(path, wrong="is not what a run writes"):
        layers = json.loads(json.dumps(net.config))  # tuples become lists
        recorded = read_args(run).get("layers") or layers
        for i, (then, now) in enumerate(itertools.zip_longest(recorded, layers)):
            if then != now:
                then, now = (f"{layer[0]}{layer[1]}" if layer else "absent" for layer in (then, now))
                raise UserError(f"{path}: layer {i} was {then} in the run and is {now} here; use the code that made "
                                "the run")


def resumed(out: Path, epoch: int, step: int, steps: int, log_bytes: int) -> None:
    """Prepare a run's folder for resuming.

    The result is removed and, if training continues, last.pt and what was measured on it. args.json gets the new
    --epoch; nothing else there changes.

    Raises:
        UserError: the run has taken more than `steps` meta-steps, or its log is shorter than `log_bytes`.
    """
    log = out / "log.jsonl"
    size = os.path.getsize(log) if os.path.exists(log) else 0
    if size < log_bytes:
        raise UserError(f"{log} is missing or cut: {size:,} of the {log_bytes:,} bytes that the checkpoint counts; "
                        f"put it back, or start again: --from_args {quoted(out)}")
    if step > steps:
        raise UserError(f"--epoch {epoch} ends the run after {steps:,} meta-steps, and it has taken {step:,} already")
    if devices.rank() > 0:
        return
    recorded = read_args(out)
    patterns = ["result.json", "timing.json"]  # before args.json: a run with a result is complete
    if step < steps:
        patterns += ["last.pt", "controls.json", "test-*.json"]
    outdated = [path for pattern in patterns for path in sorted(out.glob(pattern))]
    for path in outdated:
        with writing(path, REMEDY):
            path.unlink(missing_ok=True)
    if outdated:
        say(f"removed from {out}, as the run continues: {', '.join(path.name for path in outdated)}")
    if recorded["settings"]["epoch"] != epoch:
        recorded["settings"]["epoch"], recorded["meta_steps"] = epoch, steps
        write_json(out / "args.json", recorded)


def read_args(run: Path) -> dict:
    """What the args.json of a run's folder holds; "layers" is missing in older ones."""
    return json.loads((run / "args.json").read_bytes())


def write_json(path: Path, value: dict, remedy: str = REMEDY) -> None:
    """Write `value`, whole or not at all; with several processes, only the first writes."""
    if devices.rank() == 0:
        with atomic(path, "w", remedy) as file:
            json.dump(value, file, indent=1)
            file.write("\n")


def other_test_classes(run: Path, dataset: Dataset) -> bool:
    """Whether the test classes differ from the run's own; if so, it may have been trained on some of them.

    False if the run recorded none.
    """
    own = dataset.digest("test")
    with reading(run / "args.json", wrong="is not what a run writes"):
        return read_args(run).get("data", {}).get("splits", {}).get("test", {}).get("classes_digest", own) != own


def check_test_classes(run: Path, args: argparse.Namespace, dataset: Dataset) -> None:
    """Refuse other test classes in the run's own folder of images; in one that the command line names, note them."""
    if other_test_classes(run, dataset):
        own = read_args(run)["settings"]
        differs = f"the test classes here are not those of {run}, which may have been trained on some of them"
        if same_place(args.data or args.root, own.get("data") or own["root"]):
            raise UserError(f"{differs}; restore the images ({dataset.found()}), or name others with --data FOLDER")
        say(f"note: {differs}")


def write_test(run: Path, result: dict, args: argparse.Namespace, dataset: Dataset) -> None:
    """Write the result of a later test to a file named after its settings; remove what a killed test left."""
    name = f"test-{args.test_tasks}tasks-{args.k_qry_test}qry-{args.update_step_test}steps"
    own = read_args(run)["settings"]
    if args.k_spt != own["k_spt"]:
        name += f"-{args.k_spt}shot"
    if args.test_weights != "best":
        name += f"-{args.test_weights}"
    if not args.transductive:
        name += "-not-transductive"
    if args.data and not same_place(args.data, own.get("data")) or other_test_classes(run, dataset):
        name += "-" + re.sub(r"[^\w.-]", "_", "_".join(Path(args.data or args.root).resolve().parts[-2:]))
    path = run / f"{name}.json"
    if devices.rank() == 0:
        remove_stale(run, path.name)  # not other names: another test may be writing its own
        write_json(path, result, "free space or fix the permissions there, then test again")
    say(f"written to {path}")


def draw_figure(out: Path) -> None:
    """Draw the run's result.png, as `python plot_nc.py RUN` does. If that fails, one line says so."""
    if devices.rank() > 0:
        return
    try:
        import plot_nc  # not earlier: a run needs matplotlib for nothing else

        plot_nc.main(["--", str(out)])
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        say(f"result.png was not drawn: {reason}; {program('plot_nc')} {quoted(out)} draws it")


# ---- the log


class Log:
    """log.jsonl: one JSON object per line, written without a buffer, so that a running run can be plotted.

    Args:
        keep: bytes of an existing log that stay; the rest is cut off. 0: a new log.
        board: a TensorBoard writer (`tensorboard`) that gets the scalars too, or None.
    Raises:
        UserError: the log can't be written.
    """

    def __init__(self, path: Path, keep: int = 0, board=None):
        self.path, self.board = path, board
        if devices.rank() > 0:
            self.file = open(os.devnull, "wb", buffering=0)
            return
        with writing(path, REMEDY):
            self.file = open(path, "ab", buffering=0)
            self.file.truncate(keep)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, error: type | None, *_) -> None:
        with writing(self.path, REMEDY):  # some file systems report a full disk only in fsync or close
            try:
                if error is None:
                    self.sync()  # before result.json, which says that the run is finished
            finally:
                self.file.close()
                if self.board:
                    self.board.close()

    def add(self, kind: str, step: int, **values) -> None:
        """Append a line; values are tensors, numbers, text, or nested. A UserError if the disk is full."""
        line = {"kind": kind, "step": step} | {name: numbers(value) for name, value in values.items()}
        rest = json.dumps(line).encode() + b"\n"
        with writing(self.path, REMEDY):
            while rest:
                rest = rest[self.file.write(rest):]
        for name, value in _scalars(line).items() if self.board else ():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def metrics(self, step: int, split: str, layers: list[str], metrics: dict) -> None:
        """Add an "nc" line: the `summary` of the metrics, one value per layer; per task only if "heldout"."""
        models = summary(metrics)
        if split == "train":
            del models["per_task"]
        self.add("nc", step, classes=split, tasks=len(metrics["meta"]["within"]), layers=layers, **models)
        if split == "train":
            traces = [metrics[model][name][:, -2].mean() for model in ("meta", "finetuned")
                      for name in ("within", "between")]
            line = "step: {} \ttraces of {}: meta within {:.4g} between {:.4g}, finetuned within {:.4g} between {:.4g}"
            say(line.format(step, layers[-2], *traces))

    def sync(self) -> int:
        """Flush the log to the disk; returns its size in bytes."""
        if devices.rank() > 0:
            return 0
        with writing(self.path, REMEDY):
            os.fsync(self.file.fileno())
            return os.fstat(self.file.fileno()).st_size


def _scalars(line: dict) -> dict[str, float | None]:
    """The scalars of a line of the log for TensorBoard: loss, accuracy after adaptation, relative within traces."""
    match line["kind"]:
        case "train":
            return {"train/loss": line["loss"], "train/accuracy": line["acc"][-1]}
        case "val":
            return {"val/accuracy": line["acc"][-1], "val/nearest support mean": line["nearest_mean"][0]}
        case "nc":
            return {f"{line['classes']}/relative within trace, {model}": line[model]["relative_within"]["mean"][-2]
                    for model in ("meta", "finetuned")}
    return {}


def tensorboard(out: Path, step: int):
    """A writer of scalars to OUT/tensorboard, from `step` on; without the package None, and a line that says so."""
    if devices.rank() > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("--tensorboard: the package is not installed (python -m pip install tensorboard); log.jsonl has the same")
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step)  # hides what a stopped run wrote from there on


def summary(metrics: dict) -> dict:
    """Each model's metrics [T, L] as {"mean": [...], "se": [...]} over tasks.

    "per_task" holds each task's values at the classifier's input, the last layer but one or the only one, for intervals
    over tasks.
    """
    metrics = tree_map(Tensor.cpu, metrics)  # one wait for a GPU per tensor, not one per number
    models = {model: {} for model in metrics}
    for model, entries in metrics.items():
        for name, values in entries.items():
            mean, se = nc_metrics.mean_and_se(values)
            models[model][name] = {"mean": numbers(mean), "se": numbers(se, 3)}
    per_task = {model: {name: numbers(metrics[model][name][:, -2:][:, 0], 4) for name in PER_TASK}
                for model in ("meta", "finetuned") if model in metrics}
    return models | {"per_task": per_task}


def numbers(values, digits: int = 6):
    """Tensors as lists, rounded to significant digits; NaN and infinity as None, because JSON has neither."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [numbers(value, digits) for value in values]
    if isinstance(values, float):
        return float(f"{values:.{digits}g}") if math.isfinite(values) else None
    return values


# ---- the screen


def say(text: str) -> None:
    """Print a line, above the progress bar if there is one; of several processes, only the first prints."""
    if devices.rank() > 0:
        return
    try:
        (tqdm.write if sys.stderr.isatty() else print)(text)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE, errno.ENOSPC):  # a closed terminal, a pipe's end, a full disk
            raise


def percent(values: Tensor) -> str:
    """Shares as "[12.34 56.78]"."""
    return "[" + " ".join(f"{100 * value:.2f}" for value in values.tolist()) + "]"
