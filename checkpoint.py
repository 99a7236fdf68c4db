"""A run's state between two meta-steps, in one file: a resumed run continues from it bit for bit.

    {"step": 500,                     meta-steps made
     "updates": 500,                  Adam's updates, one per meta-step: fewer only with --skip_nonfinite
     "weights": {...}, "adam": {...}, state_dicts
     "generator", "cuda_generator", "tasks",    states of the generators: torch's own, and the training tasks'
     "best": {"weights", "step", "val_accuracy"} or None,    what best.pt holds
     "log_bytes": 12345, "minutes": 1.5,        the log's size, and the time in training
     "of": {...}}                      the experiment: its settings and data

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
from learner import Learner
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
    """What `write` wrote; every byte is checked against the checksums in the file.

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
        where = device if device.index is None or device.type != "cpu" else "cpu"  # torch.load refuses cpu:0
        value = torch.load(data, map_location=where, weights_only=True)
        if not isinstance(value, dict):
            raise ValueError("no dictionary")
    except Exception as error:  # damage makes zipfile, pickle and torch raise nearly anything
        raise UserError(f"{path} is cut, damaged or no file of this program; {remedy}") from error
    return value


def load_weights(path: Path, net: Learner, device: torch.device, remedy: str, validated: bool = False) -> dict:
    """Puts the weights of best.pt, last.pt or weights-STEP.pt into `net`.

    A classifier's layer of all training classes is left out where `net` has none.

    Returns:
        "step", the meta-steps that they had seen, and with `validated` "val_accuracy".
    Raises:
        UserError: the file is missing (the line ends in `remedy`), damaged, or of another network.
    """
    try:
        kept = read(path, device, "train again")
        net.load_state_dict({name: weight for name, weight in kept["weights"].items()
                             if net.classes is not None or not name.startswith("classes.")})
        return {"step": int(kept["step"])} | ({"val_accuracy": float(kept["val_accuracy"])} if validated else {})
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} doesn't hold this network's weights; train again") from error


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
        state = read(path, device, remedy)
    except FileNotFoundError:
        return None
    wrong = [name for name, kind in KINDS.items() if not isinstance(state.get(name), kind)]
    if wrong or not 0 <= state["updates"] <= state["step"] or state["log_bytes"] < 0:
        raise UserError(f"{path} is no checkpoint ({', '.join(wrong) or 'its counts are impossible'}); {remedy}")
    return state


def restore(path: Path, state: dict, experiment: dict, maml: Meta, sampler: Sampler, remedy: str) -> None:
    """Put `state` back into `maml`, the generators and `sampler`, bit for bit.

    Raises:
        UserError: it is of another experiment, or its parts don't fit; the line ends in `remedy`.
    """
    for name, value in experiment.items():
        saved = state["of"].get(name)
        if repr(saved) != repr(value):  # a damaged one may hold tensors, whose comparison is no bool
            raise UserError(f"{path} is of a run with {name} {saved}, and here it is {value}; {remedy}")
    try:
        if state["best"] is not None:
            maml.net.load_state_dict(state["best"]["weights"])
            state["best"] |= {"step": int(state["best"]["step"]), "val_accuracy": float(state["best"]["val_accuracy"])}
        maml.net.load_state_dict(state["weights"])
        saved, own = ([group | ({"lr": None} if maml.cosine_steps else {}) for group in groups]
                      for groups in (state["adam"]["param_groups"], maml.optimizer.state_dict()["param_groups"]))
        if repr(saved) != repr(own):  # a schedule's rate is where it was at the checkpoint
            raise ValueError("other settings of Adam")
        maml.optimizer.load_state_dict(state["adam"])
        for weight in maml.net.parameters():  # load_state_dict takes any
            moments = maml.optimizer.state[weight]
            if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == weight.shape or not moments["step"] >= 0:
                raise ValueError("not Adam's state of these weights")
        maml.step = state["step"]
        maml.updates.fill_(state["updates"])
        sampler.state = state["tasks"].cpu()
        torch.set_rng_state(state["generator"].cpu())
        if maml.updates.is_cuda:
            torch.cuda.set_rng_state(state["cuda_generator"].cpu(), maml.updates.device)
    except Exception as error:  # parts that don't fit make torch raise nearly anything
        raise UserError(f"{path} doesn't fit this run; {remedy}") from error
