"""Effects: one number of each run, and its mean and 95% t interval over runs that differ only in their seed.

nc_statistics.py writes them into tables, figures.py into a legend. Two moments recur: `FROM_STEP`, where the original's
decline begins to count, and the end, which is the mean over the last tenth of training. Correlations go through
Fisher's z.
"""

import math
from typing import NamedTuple, Sequence

import numpy as np

import curves
import files
import runs as logs
from runs import Run

FROM_STEP = 100  # changes are counted from the measurement nearest to this meta-step
END_SHARE = 0.1  # the last part of training, whose measurements are averaged to "the end"
SLOPE_FROM = 30  # meta-steps; the first measurement whose step has a logarithm
LATE = 1_000  # meta-steps: slopes and correlations are given from here on too, past the fast beginning


class Estimate(NamedTuple):
    """A mean over runs and the edges of its 95% interval; the edges are nan for a single run."""

    mean: float
    low: float
    high: float


# ---- numbers of one run


def at(run: Run, model: str, metric: str, layer: str, classes: str, step: int) -> float:
    """The metric at a measured step.

    Raises:
        UserError: nothing was measured then.
    """
    found = curves.series(run, model, metric, layer, classes)
    if step not in found.steps:
        raise files.UserError(f"{run.path} has no {classes} measurement at step {step}; train it from the start")
    return float(found.mean[found.steps.tolist().index(step)])


def first_step(run: Run, classes: str = "train") -> int:
    """The measured step nearest to FROM_STEP."""
    return logs.nearest(sorted(logs.measurements(run, classes)), FROM_STEP)


def at_end(run: Run, model: str, metric: str, layer: str, classes: str) -> float:
    """The mean over the measurements of the last tenth of training."""
    found = curves.series(run, model, metric, layer, classes)
    return float(found.mean[found.steps >= end_from(run)].mean())


def end_from(run: Run) -> float:
    """Where the last tenth of training begins, in meta-steps."""
    return (1 - END_SHARE) * max(max(logs.measurements(run, classes), default=0) for classes in ("train", "heldout"))


def change(run: Run, model: str, metric: str, layer: str) -> float:
    """From the step nearest to FROM_STEP to the end, on training tasks."""
    return at_end(run, model, metric, layer, "train") - at(run, model, metric, layer, "train", first_step(run))


def learned(run: Run, model: str, metric: str, layer: str) -> float:
    """The end minus the untrained network, on held-out tasks."""
    return at_end(run, model, metric, layer, "heldout") - at(run, model, metric, layer, "heldout", 0)


def slope(run: Run, model: str, metric: str, layer: str, from_step: int) -> float:
    """Change of the metric per tenfold of meta-steps on training tasks: least squares on log10 of the step.

    Nan for fewer than three measurements.
    """
    found = curves.series(run, model, metric, layer, "train")
    used = found.steps >= from_step
    if used.sum() < 3:
        return math.nan
    return float(_per_tenfold(found.steps[used], found.mean[used]))


def models_apart(run: Run, metric: str, layer: str, classes: str) -> float:
    """Finetuned minus meta at the end."""
    finetuned, meta = (at_end(run, model, metric, layer, classes) for model in ("finetuned", "meta"))
    return finetuned - meta


def classes_apart(run: Run, model: str, metric: str, layer: str) -> float:
    """Held-out minus training tasks at the end."""
    heldout, train = (at_end(run, model, metric, layer, classes) for classes in ("heldout", "train"))
    return heldout - train


def from_null(run: Run, model: str, metric: str, layer: str) -> float:
    """The metric minus its permuted-label null at the end, on held-out tasks."""
    value, null = (at_end(run, model, metric + suffix, layer, "heldout") for suffix in ("", "_null"))
    return value - null


def accuracy(run: Run, model: str, classes: str, step: int) -> float:
    """Share of query samples classified rightly at a measured step, before or after the inner steps of training."""
    after_each = curves.inner_curve([run], "accuracy", logs.layers_of(run)[-1], classes, step).mean
    return float(after_each[{"meta": 0, "finetuned": -1}[model]])


def accuracy_at_end(run: Run, model: str, classes: str) -> float:
    """The mean of that over the measurements of the last tenth of training."""
    steps = [step for step in logs.measurements(run, classes) if step >= end_from(run)]
    return float(np.mean([accuracy(run, model, classes, step) for step in steps]))


def share_of_means(run: Run, model: str, suffix: str, layer: str, step: int | None = None) -> float:
    """within / (within + between) of the mean traces on training tasks, at a step or, with None, at the end.

    With the suffix "_original" the traces are what the original took for them (nc_metrics.original_traces); with ""
    they are the right ones.
    """
    within, between = (
        at_end(run, model, name + suffix, layer, "train")
        if step is None
        else at(run, model, name + suffix, layer, "train", step)
        for name in ("within", "between")
    )
    return within / (within + between)


def share_change(run: Run, model: str, suffix: str, layer: str) -> float:
    """That, from the step nearest to FROM_STEP to the end."""
    return share_of_means(run, model, suffix, layer) - share_of_means(run, model, suffix, layer, first_step(run))


def collapse_and_error(run: Run, layer: str, from_step: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, CDNV of the finetuned model's layer, and the error after the inner steps, on the same held-out tasks."""
    cdnv = curves.series(run, "finetuned", "cdnv", layer, "heldout")
    error = np.array([1 - accuracy(run, "finetuned", "heldout", int(step)) for step in cdnv.steps])
    used = cdnv.steps >= from_step
    return cdnv.steps[used], cdnv.mean[used], error[used]


def beside_trend(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What is left of the values beside their straight line (least squares) in log step: [S] and [S] -> [S]."""
    x = np.log10(steps)
    return values - values.mean() - (x - x.mean()) * _per_tenfold(steps, values)


def _per_tenfold(steps: np.ndarray, values: np.ndarray) -> float:
    """The slope of that line, per tenfold of steps."""
    x = np.log10(steps) - np.log10(steps).mean()
    return (x @ values) / (x @ x)


def correlation(run: Run, layer: str, from_step: int = 0, detrended: bool = False, of_ranks: bool = False) -> float:
    """Correlation of log CDNV with log held-out error over a run's checkpoints; nan for fewer than three.

    Both fall while a network trains, so that they correlate whether or not one has to do with the other.

    Args:
        detrended: leave that out: correlate what remains of each beside its trend (`beside_trend`), from
            `from_step` > 0 on; nan for fewer than four checkpoints.
        of_ranks: Spearman's correlation instead of Pearson's: a few checkpoints far off weigh no more than others.
    """
    steps, *pair = collapse_and_error(run, layer, from_step)
    if len(steps) < 3 + detrended:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        pair = np.log(pair)
        if not np.isfinite(pair).all():  # 0 has no logarithm, and a missing value no rank
            return math.nan
        if detrended:
            pair = [beside_trend(steps, values) for values in pair]
        if of_ranks:
            pair = [_ranks(values) for values in pair]
        return float(np.corrcoef(*pair)[0, 1])  # no spread: nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean: [S] -> [S]."""
    return ((values < values[:, None]).sum(1) + (values <= values[:, None]).sum(1) - 1) / 2


def error_spread(run: Run, layer: str, from_step: int) -> float:
    """Standard deviation of log held-out error beside its trend: 0.1 is a tenth of the error. Nan as `correlation`."""
    steps, _, error = collapse_and_error(run, layer, from_step)
    if len(steps) < 4 or not error.all():
        return math.nan
    return float(np.sqrt((beside_trend(steps, np.log(error)) ** 2).sum() / (len(steps) - 2)))


def largest_fall(run: Run, layer: str, from_step: int) -> float:
    """The largest fall of held-out accuracy, a share, from one checkpoint to the next; nan for a single checkpoint."""
    _, _, error = collapse_and_error(run, layer, from_step)
    return float(np.diff(error).max()) if len(error) > 1 else math.nan


# ---- over seeds


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over runs and its 95% t interval."""
    values = np.array(values, float)
    half = float(curves.half_interval(values))
    return Estimate(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def correlations_over_seeds(values: Sequence[float]) -> Estimate:
    """The same for correlations, through Fisher's z, which keeps the interval within -1..1."""
    return Estimate(*(math.tanh(edge) for edge in over_seeds(np.arctanh(np.array(values, float)))))
