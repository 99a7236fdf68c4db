"""A run's state between two meta-steps, in one file. A resumed run continues from it bit for bit.

On CUDA this needs --deterministic, and of several processes as many as before.

    {"step": 500,                     meta-steps so far
     "updates": 500,                  Adam's updates, one per meta-step: fewer only with --skip_nonfinite
     "weights": {...}, "adam": {...}, state_dicts
     "generator", "cuda_generator", "tasks",    states of the generators: torch's own, and the training tasks'
     "best": {"weights", "step", "val_accuracy"} or None,    what best.pt holds
     "log_bytes": 12345, "minutes": 1.5,        size of the log, time in training
     "experiment": {...}}              settings and data
"""

import io
import math
import zipfile
from pathlib import Path

import torch

import device as devices
import record
from files import UserError, atomic, quoted, reading
from learner import Learner
from meta import Meta
from tasks import Sampler, tree_map

UNUSABLE = "is damaged, or belongs to another program, run or network"  # a file that can't be used


def write(path: Path, value: dict) -> None:
    """Save `value` as torch.save does, whole or not at all; of several processes, only the first writes."""
    if devices.rank() > 0:
        return
    buffer = io.BytesIO()  # torch.save into a file can't report a full disk
    torch.save(value, buffer)
    with atomic(path, remedy=record.REMEDY) as file:
        file.write(buffer.getbuffer())


def read(path: Path, remedy: str) -> dict:
    """Read what `write` wrote, to the CPU, and check the content against the checksums in the file.

    Raises:
        UserError: it is missing, can't be read, or is damaged; the line ends in `remedy`.
    """
    with reading(path, remedy, UNUSABLE):
        data = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(data) as archive:
            if archive.testzip():  # torch.load doesn't look at the checksums
                raise ValueError("wrong checksum")
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)


def load_weights(run: Path, name: str, net: Learner) -> tuple[int, float]:
    """Load "best", "last" or "weights-STEP" of a run's folder into `net`, without `classes` if `net` has none.

    Returns:
        The number of meta-steps that the weights had seen, and their validation accuracy (weights-STEP.pt: NaN).
    Raises:
        UserError: the file is missing, damaged, or of another network; the line names those that are there.
    """
    path = run / f"{name}.pt"
    names = sorted(file.stem for file in run.glob("*.pt") if file.stem.startswith(("best", "last", "weights")))
    remedy = f"the weights here are {', '.join(names) or 'none'}"
    if not (run / "result.json").exists():
        remedy += f"; the run is not finished, continue it: --resume {quoted(run)}"
    saved = read(path, remedy)
    with reading(path, remedy, UNUSABLE):
        net.load_state_dict({name: weight for name, weight in saved["weights"].items()
                             if net.classes is not None or not name.startswith("classes.")})
        return int(saved["step"]), float(saved.get("val_accuracy", math.nan))


def save(path: Path, maml: Meta, rest: dict) -> None:
    """Write a checkpoint: the state of `maml`, torch's own generators, and `rest`, the state of the training loop."""
    device = maml.updates.device
    write(path, {
        "step": maml.step,
        "updates": int(maml.updates),
        "weights": maml.net.state_dict(),
        "adam": maml.optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    } | rest)


def restore(path: Path, saved: dict, experiment: dict, maml: Meta, sampler: Sampler,
            remedy: str) -> tuple[dict | None, float, int]:
    """Restore `maml`, the generators and `sampler` from `saved`, which `read` returned, bit for bit.

    Returns:
        What best.pt held, minutes of training, bytes of the log.
    Raises:
        UserError: `saved` is of another experiment, or its parts don't fit; the line ends in `remedy`.
    """
    with reading(path, f"put it back, or {remedy}", UNUSABLE):
        for name, value in experiment.items():
            other = saved["experiment"].get(name)
            if repr(other) != repr(value):
                raise UserError(f"{path} is of a run with {name} {other}, and here it is {value}; restore that, or "
                                f"{remedy}")
        step, updates, best = int(saved["step"]), int(saved["updates"]), saved["best"]
        if not 0 <= updates <= step < 2**31:
            raise ValueError("impossible counts")
        if best is not None:
            maml.net.load_state_dict(best["weights"])  # raises an error if they don't fit
            best = best | {"step": int(best["step"]), "val_accuracy": float(best["val_accuracy"])}
        maml.net.load_state_dict(saved["weights"])
        tree_map(lambda own, value: own.copy_(value.view_as(own)), maml.optimizer.state_dict()["state"],
                 saved["adam"]["state"])  # learning rate and other options are the run's settings
        maml.step = step
        maml.updates.fill_(updates)
        sampler.generator.set_state(saved["tasks"])
        torch.set_rng_state(saved["generator"])
        if maml.updates.is_cuda:
            torch.cuda.set_rng_state(saved["cuda_generator"], maml.updates.device)
        return best, float(saved["minutes"]), int(saved["log_bytes"])
