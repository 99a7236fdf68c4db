"""Turns the rows of logs into curves: a quantity against meta-steps, or against inner steps, with its 95% band.

The band of several seeds is a t interval over them; that of a single run is the mean over tasks and 1.96 standard
errors to each side.
"""

import math
from typing import NamedTuple, Sequence

import numpy as np

import files
import runs as logs
from runs import Run

WINDOW = 0.1  # of a step: smoothed, a curve takes in the measurements from 0.9 to 1.1 times it

# 97.5% points of Student's t for 1..10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Curve(NamedTuple):
    """A quantity against meta-steps: steps, mean and its 95% band's edges, each [S]; nan where missing."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def series(run: Run, model: str, metric: str, layer: str, classes: str) -> Curve:
    """`metric` of one run against meta-steps: mean over a measurement's tasks and 1.96 standard errors to each side.

    `model` is "meta" or "finetuned". Without measurements on such classes the arrays are empty.

    Raises:
        UserError: a measurement lacks the metric or the layer.
    """
    steps, mean, error = [], [], []
    for step, row in sorted(logs.measurements(run, classes).items()):
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


def metric_curve(runs: Sequence[Run], model: str, metric: str, layer: str, classes: str = "train",
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


def validation_curve(runs: Sequence[Run]) -> Curve:
    """Held-out accuracy after the last inner step against meta-steps, at the steps that all runs have.

    Several runs: mean over runs with its t interval. One run: the 95% interval over its tasks.

    Raises:
        UserError: a run was never validated, the runs have no validation at the same step, or one lacks its accuracy.
    """
    rows = [logs.validations(run) for run in runs]
    for run, found in zip(runs, rows):
        if not found:
            raise files.UserError(f"{run.path} holds no validation accuracy; let it run to its first validation")
    steps = logs.in_all(rows)
    if not steps:
        raise files.UserError(f"{runs[0].path} and its other seeds have no validation in common; draw them apart")
    means, halves = [], []
    for run, found in zip(runs, rows):
        try:
            means.append([_number(found[step]["acc"][-1]) for step in steps])
            halves.append([_number(found[step]["ci95"][-1]) for step in steps])
        except (KeyError, IndexError, TypeError, ValueError) as failure:
            raise files.UserError(f"{run.path}: a validation lacks its accuracy; its log is broken") from failure
    mean, half = np.array(means), np.array(halves)
    if len(runs) > 1:
        return _over_seeds(np.array(steps), mean)
    return Curve(np.array(steps), mean[0], mean[0] - half[0], mean[0] + half[0])


def inner_curve(runs: Sequence[Run], quantity: str, layer: str, classes: str, step: int) -> Curve:
    """A quantity after 0..K inner steps, measured at meta-step `step`; the curve's steps are the inner ones.

    `quantity` is "within", "between", "relative_within" (of the mean traces; without a band for a single run) or
    "accuracy" (of the whole network, whatever the layer).

    Raises:
        UserError: the measurement lacks it.
    """
    means, errors = [], []
    for run in runs:
        try:
            row = logs.measurements(run, classes)[step]
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


def _after_each(row: dict, quantity: str, part: str, layer: str) -> np.ndarray:
    """Mean or standard error after 0..K inner steps, [K+1]; accuracy has no layers."""
    values, index = row["inner"][quantity][part], _index(row, layer)
    return np.array([_number(value if quantity == "accuracy" else value[index]) for value in values])


def _index(row: dict, layer: str) -> int:
    """The layer's place in a measurement's lists."""
    return list(row["layers"]).index(layer)


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


def _together(found: Sequence[Curve]) -> Curve | None:
    """Curves of several seeds as one, at the steps that all have; None if there is none. A single one as it is."""
    steps = logs.in_all(one.steps.tolist() for one in found)
    if not steps:
        return None
    if len(found) == 1:
        return found[0]
    return _over_seeds(np.array(steps), np.array([one.mean[np.isin(one.steps, steps)] for one in found]))  # [R, S]


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
