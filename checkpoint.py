"""A run's state between two meta-steps, in one file: from it the run goes on as if nothing had happened.

    {"step": 500,                     meta-steps made
     "updates": 500,                  of these, updates made: fewer only with --skip_nonfinite
     "weights": {...}, "adam": {...}, state_dicts
     "generator", "cuda_generator", "tasks",    states of the generators: torch's own, and the training tasks'
     "best": {"weights", "step", "val_accuracy"} or None,    what best.pt holds
     "log_bytes": 12345, "minutes": 1.5,        the log's size, and the time in training
     "of": {...}}                      settings and data that make the experiment

`torch.load(path, weights_only=True)` reads it: numbers and tensors, no code.
"""

import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

import device as devices
import record
from files import UserError, atomic, contents
from meta import Meta
from tasks import Sampler

KINDS = {"step": int, "updates": int, "weights": dict, "adam": dict, "generator": Tensor,
         "cuda_generator": Tensor | None, "tasks": Tensor, "best": dict | None, "log_bytes": int, "minutes": float,
         "of": dict}


def write(path: Path, value: dict) -> None:
    """Save `value` as torch.save does, whole or not at all; of several processes the first does."""
    if devices.rank() > 0:
        return
    buffer = io.BytesIO()  # torch.save into a file can't report a full disk
    torch.save(value, buffer)
    with atomic(path, remedy=record.REMEDY) as file:
        file.write(buffer.getbuffer())


def read(path: Path, device: torch.device, remedy: str) -> dict:
    """What `write` wrote, every byte checked against the checksums in the file.

    Raises:
        FileNotFoundError: there is none.
        UserError: it can't be read, or is cut, damaged, or not such a file; the line ends in `remedy`.
    """
    data = io.BytesIO(contents(path, remedy))
    try:
        with zipfile.ZipFile(data) as archive:
            if archive.testzip():  # torch.load doesn't look at the checksums
                raise ValueError("wrong checksum")
        data.seek(0)
        value = torch.load(data, map_location=device, weights_only=True)
        if not isinstance(value, dict):
            raise ValueError("no dictionary")
    except Exception as error:  # whatever zipfile, pickle and torch make of damage
        raise UserError(f"{path} is cut, damaged or no file of this program; {remedy}") from error
    return value


def save(path: Path, maml: Meta, rest: dict) -> None:
    """Write a checkpoint: `maml`, torch's own generators, and `rest`, which is what the loop knows."""
    device = maml.updates.device
    write(path, {
        "step": maml.step,
        "updates": int(maml.updates),
        "weights": maml.net.state_dict(),
        "adam": maml.optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    } | rest)


def load(path: Path, device: torch.device, remedy: str) -> dict | None:
    """A checkpoint, or None where there is none.

    Raises:
        UserError: it isn't a whole checkpoint; the line ends in `remedy`.
    """
    try:
        found = read(path, device, remedy)
    except FileNotFoundError:
        return None
    wrong = [name for name, kind in KINDS.items() if not isinstance(found.get(name), kind)]
    if wrong or not 0 <= found["updates"] <= found["step"] or found["log_bytes"] < 0:
        raise UserError(f"{path} is no checkpoint ({', '.join(wrong) or 'its counts are impossible'}); {remedy}")
    return found


def restore(path: Path, found: dict, of: dict, maml: Meta, sampler: Sampler, remedy: str) -> None:
    """Put everything back into `maml`, the generators and `sampler`, bit for bit.

    Raises:
        UserError: it is of another run than `of` says, or its parts don't fit; the line ends in `remedy`.
    """
    for name, value in of.items():
        if repr(found["of"].get(name)) != repr(value):  # a damaged one may hold tensors, which don't compare to a bool
            raise UserError(f"{path} is of a run with {name} {found['of'].get(name)}, and here it is {value}; {remedy}")
    try:
        if found["best"] is not None:
            maml.net.load_state_dict(found["best"]["weights"])
            found["best"] |= {"step": int(found["best"]["step"]), "val_accuracy": float(found["best"]["val_accuracy"])}
        maml.net.load_state_dict(found["weights"])
        if repr(found["adam"]["param_groups"]) != repr(maml.optimizer.state_dict()["param_groups"]):
            raise ValueError("other settings of Adam")
        maml.optimizer.load_state_dict(found["adam"])
        if found["step"]:
            for weight in maml.net.parameters():  # load_state_dict takes any
                state = maml.optimizer.state[weight]
                if not state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape or not state["step"] >= 0:
                    raise ValueError("not Adam's state of these weights")
        maml.step = found["step"]
        maml.updates.fill_(found["updates"])
        sampler.state = found["tasks"].cpu()
        torch.set_rng_state(found["generator"].cpu())
        if maml.updates.is_cuda:
            torch.cuda.set_rng_state(found["cuda_generator"].cpu(), maml.updates.device)
    except Exception as error:  # whatever torch makes of parts that don't fit
        raise UserError(f"{path} doesn't fit this run; {remedy}") from error
