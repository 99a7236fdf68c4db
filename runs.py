"""Reads what the training scripts left: logs, settings, results; and turns their rows into curves over meta-steps.

figures.py draws them, effects.py computes from them, study.py makes them. Runs that differ only in their seed
belong together; STUDY names the settings that the README's figures and tables are made from, so that a further run
under res/ never slips into an average.
"""

import gzip
import json
import math
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np

import files

HERE = Path(__file__).resolve().parent

# Settings that leave the measured numbers' meaning alone: runs that differ in these are seeds of one setting.
NOT_COMPARED = {"seed", "out", "root", "cache", "device", "task_chunk", "cuda_graph", "print_every", "test_tasks",
                "resume", "save_every", "from_args", "test", "deterministic"}  # fmt: skip

WINDOW = 0.1  # of a step: smoothed, a curve takes in the measurements from 0.9 to 1.1 times it

# 97.5% points of Student's t for 1..10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Setting(NamedTuple):
    """One setting of the study: the start of its runs' folders' names, and the command that trains them."""

    name: str  # its runs are res/NAME-seed1, res/NAME-seed2, ...
    script: str
    flags: str
    seeds: tuple[int, ...]


_OMNIGLOT = "--task_num 8 --epoch 6000 --nc_every 30 --eval_every 250"
_PHOTOGRAPHS = "--task_num 2 --epoch 1200 --nc_every 30 --eval_every 150 --eval_tasks 50"
STUDY = (
    Setting("omniglot-5w1s", "omniglot_train.py", _OMNIGLOT, (1, 2, 3)),
    Setting("omniglot-5w5s", "omniglot_train.py", f"{_OMNIGLOT} --k_spt 5", (1, 2, 3)),
    Setting("omniglot-5w1s-first-order-original", "omniglot_train.py",
            f"{_OMNIGLOT} --first_order --net original", (1, 2, 3)),
    Setting("tinyimagenet-in-miniimagenet-layout-5w5s", "miniimagenet_train.py",
            f"{_PHOTOGRAPHS} --data_name 'Tiny ImageNet in the miniImageNet layout'", (1,)),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run: its folder, its args.json (settings and data apart), and its log's rows in order."""

    path: Path
    settings: dict
    data: dict
    rows: list[dict]


class Curve(NamedTuple):
    """A quantity against meta-steps: steps, mean and its 95% band's edges, each [S]; nan where missing."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


# ---- reading


def read_log(path: Path) -> list[dict]:
    """The rows of a log, one JSON object a line, plain or gzipped (.gz).

    A run that was stopped while writing leaves half a last line: it is ignored, with a note on stderr.

    Raises:
        UserError: the file is missing or unreadable, or another line isn't a JSON object.
    """
    path = Path(path)
    remedy = "name a run folder or its log"
    try:
        data = files.contents(path, remedy)
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise files.UserError(f"can't read {path}: {reason}; {remedy}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == numbered[-1][0]:
                print(f"note: {path}, line {number}: half-written, ignored", file=sys.stderr)
                break
            raise files.UserError(f"{path}, line {number}: not JSON; mend or remove that line") from error
        if not isinstance(row, dict):
            raise files.UserError(f"{path}, line {number}: not a JSON object; mend or remove that line")
        rows.append(row)
    return rows


def read_run(path: Path) -> Run:
    """The run at `path`: a folder with log.jsonl or log.jsonl.gz, or such a log, with args.json beside it.

    Raises:
        UserError: the folder, the log or args.json is missing or broken.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        raise files.UserError(f"no run at {path}; name a run folder or its log")
    if os.path.isdir(path):
        logs = [log for log in (path / "log.jsonl", path / "log.jsonl.gz") if os.path.isfile(log)]
        if not logs:
            raise files.UserError(f"no log.jsonl in {path}; name the folder that a training script wrote")
        path = logs[0]
    settings_path = path.parent / "args.json"
    try:
        arguments = json.loads(files.contents(settings_path, "keep the run's own beside its log"))
        settings, data = dict(arguments["settings"]), dict(arguments["data"])
        for value, kind in ((data["name"], str), *((settings[name], int) for name in ("n_way", "k_spt", "k_qry"))):
            if type(value) is not kind:
                raise TypeError(f"{value!r} should be of type {kind.__name__}")
        for name, value in settings.items():
            if not isinstance(value, str | int | float | None):
                raise TypeError(f"{name} can't be {value!r}")
        if not data["name"].isprintable() or not _is_label(settings.get("net", "paper")):
            raise ValueError("a name that can't be printed")
    except OSError as error:
        raise files.UserError(
            f"can't read {settings_path}, which says what data and settings the run had: {error.strerror}; "
            f"keep it beside the log"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise files.UserError(
            f"{settings_path} isn't a run's args.json (settings, data): {type(error).__name__}: {error}; "
            f"take it from the run's folder again"
        ) from error
    return Run(path.parent, settings, data, read_log(path))


def read_json(run: Run, name: str, key: str) -> Any:
    """What `key` has in a JSON file of the run's folder: args.json, result.json or timing.json.

    Raises:
        UserError: the file is missing, or isn't what a run writes.
    """
    path = run.path / name
    try:
        return json.loads(files.contents(path, "let the run finish first"))[key]
    except OSError as error:
        raise files.UserError(f"can't read {path}: {error.strerror}; let the run finish first") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise files.UserError(f"{path} has no {key}; take it from the run's folder again") from error


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs to be averaged: different seeds of one setting on one data set.

    Raises:
        UserError: a run can't be read, settings differ, or a seed comes twice.
    """
    runs = [read_run(path) for path in paths]
    for run in runs:
        refuse_differing([runs[0], run])
    _refuse_same_seed(runs)
    return runs


def grouped(paths: Sequence[Path]) -> list[list[Run]]:
    """Runs put together by setting and data set: each group holds the seeds of one setting, in the order named.

    Raises:
        UserError: a run can't be read, or a seed comes twice in a setting.
    """
    groups: list[list[Run]] = []
    for run in map(read_run, paths):
        group = next((group for group in groups if not differing_settings([group[0], run])), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    for group in groups:
        _refuse_same_seed(group)
    return groups


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which the runs differ, apart from what doesn't change the experiment."""
    names = set().union(*(run.settings for run in runs)) - NOT_COMPARED
    differing = sorted(name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1)
    return ["the data set"] * (len({run.data["name"] for run in runs}) > 1) + differing


def refuse_differing(runs: Sequence[Run]) -> None:
    """Refuse runs that aren't seeds of one setting.

    Raises:
        UserError: it names the first two, and what differs.
    """
    differing = differing_settings(runs)
    if differing:
        raise files.UserError(
            f"{runs[0].path} and {runs[1].path} differ in {', '.join(differing)}; only seeds of one setting "
            f"are averaged: draw them apart"
        )


def _refuse_same_seed(runs: Sequence[Run]) -> None:
    seen: dict = {}
    for run in runs:
        other = seen.setdefault(run.settings.get("seed"), run)
        if other is not run:
            raise files.UserError(
                f"{other.path} and {run.path} have the same seed, {run.settings.get('seed')}; name one of them"
            )


def committed(name: str, folder: Path) -> list[Path]:
    """The run folders of the study's setting `name` in `folder`, in order of name; none of a setting not run yet."""
    return sorted({log.parent for log in folder.glob(f"{name}-seed[0-9]*/log.jsonl*")})


def describe(run: Run, data: bool = False) -> str:
    """What a run's setting is called in figures and tables: "5-way 1-shot, first order, original network"."""
    settings = run.settings
    words = [f"{settings['n_way']}-way {settings['k_spt']}-shot"]
    if "first_order" in settings:
        words.append("first order" if settings["first_order"] else "second order")
    if settings.get("net", "paper") != "paper":
        words.append(f"{settings['net']} network")
    return (f"{run.data['name']}, " if data else "") + ", ".join(words)


# ---- from rows to curves


def measurements(run: Run, classes: str) -> dict[int, dict]:
    """Measured rows of a run by meta-step; `classes` is "train" or "heldout"; of a repeated step the last."""
    return _by_step(run, "measurement", kind="nc", classes=classes)


def validations(run: Run) -> dict[int, dict]:
    """The same of its validations."""
    return _by_step(run, "validation", kind="val")


def _by_step(run: Run, what: str, **wanted: str) -> dict[int, dict]:
    rows = (row for row in run.rows if all(row.get(name) == value for name, value in wanted.items()))
    try:
        return {_count(row["step"]): row for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise files.UserError(f"{run.path}: a {what} has no step; its log is broken") from error


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no count")
    return value


def layers_of(run: Run) -> list[str]:
    """Names of the measured layers, first to last.

    Raises:
        UserError: the run has no measurements of training tasks.
    """
    measured = measurements(run, "train")
    if not measured:
        off = run.settings.get("nc_every") == 0
        why = "it ran with --nc_every 0" if off else "it stopped before the first"
        raise files.UserError(
            f"{run.path} holds no neural-collapse measurements ({why}); train it with --nc_every 100, say"
        )
    layers = next(iter(measured.values())).get("layers")
    if not isinstance(layers, list) or not layers or not all(map(_is_label, layers)):
        raise files.UserError(f"{run.path}: a measurement names no layers; its log is broken")
    return layers


def _is_label(name: object) -> bool:
    """Whether a figure can show it: text without what matplotlib takes for mathematics."""
    return isinstance(name, str) and name.isprintable() and "$" not in name


def last_hidden(run: Run) -> str:
    """The layer before the logits: the classifier's input."""
    layers = layers_of(run)
    return layers[max(len(layers) - 2, 0)]


def task_counts(runs: Sequence[Run], classes: str) -> set[int]:
    """How many tasks the measurements of these runs have; more than one number where they differ.

    Raises:
        UserError: a measurement doesn't say.
    """
    return _task_counts(runs, "measurement", [row for run in runs for row in measurements(run, classes).values()])


def validation_task_counts(runs: Sequence[Run]) -> set[int]:
    """The same of their validations."""
    return _task_counts(runs, "validation", [row for run in runs for row in validations(run).values()])


def _task_counts(runs: Sequence[Run], what: str, rows: Sequence[dict]) -> set[int]:
    try:
        return {_count(row["tasks"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise files.UserError(f"{runs[0].path}: a {what} doesn't say of how many tasks; it is broken") from error


def is_logged(runs: Sequence[Run], model: str, metric: str, classes: str = "train") -> bool:
    """Whether every measurement of every run has `metric`: logs from before it existed don't."""
    rows = [row for run in runs for row in measurements(run, classes).values()]
    return bool(rows) and all(metric in row.get(model, {}) for row in rows)


def series(run: Run, model: str, metric: str, layer: str, classes: str) -> Curve:
    """`metric` of one run against meta-steps: mean over a measurement's tasks and 1.96 standard errors to each side.

    `model` is "meta" or "finetuned". Without measurements on such classes the arrays are empty.

    Raises:
        UserError: a measurement lacks the metric or the layer.
    """
    steps, mean, error = [], [], []
    for step, row in sorted(measurements(run, classes).items()):
        try:
            index = _index(row, layer)
            mean.append(_number(row[model][metric]["mean"][index]))
            error.append(_number(row[model][metric]["se"][index]))
        except (KeyError, IndexError, TypeError, ValueError) as failure:
            raise files.UserError(
                f"{run.path}: the {classes} measurement at step {step} lacks {model} {metric} of {layer}; "
                f"its log is broken"
            ) from failure
        steps.append(step)
    return _over_tasks(np.array(steps, int), np.array(mean), np.array(error))


def curve(runs: Sequence[Run], model: str, metric: str, layer: str, classes: str = "train",
          smooth: bool = False) -> Curve | None:
    """`metric` of several seeds against meta-steps; None if they have no measured step in common.

    Several runs: mean over runs at the steps that all of them have, with its t interval. One run: `series`.

    Args:
        smooth: take of each run the mean of the measurements around a step (`smoothed`) before it is averaged.
    Raises:
        UserError: a measurement lacks the metric or the layer.
    """
    found = [series(run, model, metric, layer, classes) for run in runs]
    return _together([smoothed(one) for one in found] if smooth else found)


def share_curve(runs: Sequence[Run], model: str, suffix: str, layer: str) -> Curve | None:
    """within / (within + between) of the mean traces on training tasks, smoothed; without a band for a single run.

    With the suffix "_original" of what the original took for the traces (nc_metrics.original_traces), with "" of the
    right ones.

    Raises:
        UserError: a measurement lacks them.
    """
    found = []
    for run in runs:
        within, between = (series(run, model, name + suffix, layer, "train") for name in ("within", "between"))
        with np.errstate(divide="ignore", invalid="ignore"):  # no spread at all: nan
            share = within.mean / (within.mean + between.mean)
        found.append(smoothed(_over_tasks(within.steps, share, np.full_like(share, np.nan))))
    return _together(found)


def _together(found: Sequence[Curve]) -> Curve | None:
    """Curves of several seeds as one, at the steps that all have; None if there is none. A single one as it is."""
    steps = sorted(set.intersection(*(set(one.steps.tolist()) for one in found)))
    if not steps:
        return None
    if len(found) == 1:
        return found[0]
    return _over_seeds(np.array(steps), np.array([one.mean[np.isin(one.steps, steps)] for one in found]))  # [R, S]


def smoothed(found: Curve) -> Curve:
    """Each point the mean of the measurements within WINDOW of its step; its error, that of independent ones.

    Measurements on training tasks are independent, each of tasks of its own. A missing value stays missing.
    """
    known = np.isfinite(found.mean)
    near = (np.abs(found.steps[:, None] - found.steps) <= WINDOW * found.steps[:, None]) & known  # [S, S]
    counts = np.where(known, near.sum(1), np.nan)
    mean = near @ np.where(known, found.mean, 0) / counts
    half = np.sqrt(near @ np.where(known, (found.high - found.mean) ** 2, 0)) / counts
    return Curve(found.steps, mean, mean - half, mean + half)


def inner_steps(runs: Sequence[Run], quantity: str, layer: str, classes: str, step: int) -> Curve:
    """A quantity after 0..K inner steps, measured at meta-step `step`; the curve's steps are the inner ones.

    `quantity` is "within", "between", "relative_within" (of the mean traces; without a band for a single run) or
    "accuracy" (of the whole network, whatever the layer).

    Raises:
        UserError: the measurement lacks it.
    """
    means, errors = [], []
    for run in runs:
        try:
            row = measurements(run, classes)[step]
            if quantity == "relative_within":
                within, between = (_after_each(row, name, "mean", layer) for name in ("within", "between"))
                means.append(within / (within + between))
                errors.append(np.full_like(within, np.nan))
            else:
                means.append(_after_each(row, quantity, "mean", layer))
                errors.append(_after_each(row, quantity, "se", layer))
        except (KeyError, IndexError, TypeError, ValueError) as failure:
            raise files.UserError(
                f"{run.path}: the {classes} measurement at step {step} lacks {quantity} after each inner step; "
                f"its log is broken"
            ) from failure
    steps = np.arange(len(means[0]))
    return _over_tasks(steps, means[0], errors[0]) if len(runs) == 1 else _over_seeds(steps, np.array(means))


def _index(row: dict, layer: str) -> int:
    """The layer's place in a measurement's lists."""
    return list(row["layers"]).index(layer)


def _after_each(row: dict, quantity: str, part: str, layer: str) -> np.ndarray:
    """Mean or standard error after 0..K inner steps, [K+1]; accuracy has no layers."""
    values, index = row["inner"][quantity][part], _index(row, layer)
    return np.array([_number(value if quantity == "accuracy" else value[index]) for value in values])


def validation(runs: Sequence[Run]) -> Curve:
    """Held-out accuracy after the last inner step against meta-steps, at the steps that all runs have.

    Several runs: mean over runs with its t interval. One run: the 95% interval over its tasks.

    Raises:
        UserError: a run was never validated, the runs have no validation at the same step, or one lacks its accuracy.
    """
    rows = [validations(run) for run in runs]
    for run, found in zip(runs, rows):
        if not found:
            raise files.UserError(f"{run.path} holds no validation accuracy; let it run to its first validation")
    steps = sorted(set.intersection(*(set(found) for found in rows)))
    if not steps:
        raise files.UserError(f"{runs[0].path} and its other seeds have no validation in common; draw them apart")
    try:
        mean, half = (np.array([[_number(found[step][key][-1]) for step in steps] for found in rows])
                      for key in ("acc", "ci95"))  # fmt: skip
    except (KeyError, IndexError, TypeError, ValueError) as failure:
        raise files.UserError(f"{runs[0].path}: a validation lacks its accuracy; its log is broken") from failure
    if len(runs) > 1:
        return _over_seeds(np.array(steps), mean)
    return Curve(np.array(steps), mean[0], mean[0] - half[0], mean[0] + half[0])


def common_steps(runs: Sequence[Run], classes: str) -> list[int]:
    """The meta-steps at which all of the runs have a measurement, in order."""
    return sorted(set.intersection(*(set(measurements(run, classes)) for run in runs)))


def nearest(steps: Sequence[int], wanted: int) -> int:
    """The step nearest to the wanted one; of two as near, the earlier."""
    return min(steps, key=lambda step: (abs(step - wanted), step))


def student_t(freedom: int) -> float:
    """97.5% point of Student's t distribution, to 0.001; Cornish and Fisher's expansion beyond the table."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half of the 95% t interval of the mean over the first axis: [R, ...] -> [...]; nan for a single run."""
    n_runs = len(values)
    if n_runs < 2:
        return np.full(np.shape(values)[1:], np.nan)
    return student_t(n_runs - 1) * np.std(values, axis=0, ddof=1) / math.sqrt(n_runs)


def either(values: set) -> str:
    """What all agree on; else all of it, joined by "or"."""
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(values))


def noise_share(n_way: int, k_qry: int) -> float:
    """Relative within trace of pure noise: (n-1)/(n-1 + (C-1)/C), n queries in each of C classes."""
    return (k_qry - 1) / (k_qry - 1 + (n_way - 1) / n_way)


def _over_tasks(steps: np.ndarray, mean: np.ndarray, error: np.ndarray) -> Curve:
    return Curve(steps, mean, mean - 1.96 * error, mean + 1.96 * error)


def _over_seeds(steps: np.ndarray, values: np.ndarray) -> Curve:
    mean, half = values.mean(0), half_interval(values)
    return Curve(steps, mean, mean - half, mean + half)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
