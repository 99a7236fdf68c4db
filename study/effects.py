"""One number of a run, and its interval: over seeds by Student's t, over the tasks of a seed by bootstrap.

"The end" of a run is the mean over the measurements of the last tenth of training. Held-out tasks are the same at every
measurement and for every seed, so an interval over seeds does not cover their choice: `over_tasks` does.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from study.logs import Run, Series, UserError, number

END_SHARE = 0.1  # the part of training, at its end, whose measurements are averaged
HIDDEN = -2      # the classifier's input: layers are named, or counted as in a list
LATE = 1_000     # meta-steps: correlations and drops are of the checkpoints from here on, past the steep beginning

MISSING = "–"  # what stands for a number that is not defined or not logged

# 97.5% points of Student's t for 1..10 degrees of freedom; beyond them the last one, which is slightly too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Estimate(NamedTuple):
    """A mean and the edges of its 95% interval; the edges are nan for a single value."""

    mean: float
    low: float
    high: float


# ---- numbers as text


def written(estimate: Estimate) -> str:
    """ "0.352 ± 0.021", or "0.78 [0.48, 0.91]" if not symmetric, to two digits of the half-width, one if above 35."""
    mean, low, high = estimate
    half = (high - low) / 2
    if not half > 1e-9 * abs(mean):  # a single seed, or rounding alone
        return short(mean)
    decimals = 1 - math.floor(math.log10(half))
    decimals = min(max(decimals - (half * 10**decimals > 35), 0), 4)
    mean_text, low_text, high_text, half_text = (fixed(value, decimals) for value in (mean, low, high, half))
    symmetric = math.isclose(mean - low, high - mean, rel_tol=1e-6)
    return f"{mean_text} ± {half_text}" if symmetric else f"{mean_text} [{low_text}, {high_text}]"


def short(value: float) -> str:
    """Two significant digits, or one decimal."""
    if not math.isfinite(value):
        return MISSING
    return fixed(value, max(1 - math.floor(math.log10(abs(value))), 1) if value else 1)


def fixed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def correlated(estimate: Estimate) -> str:
    """A correlation and its interval, to two decimals."""
    if not math.isfinite(estimate.mean):
        return MISSING
    mean, low, high = (fixed(value, 2) if math.isfinite(value) else MISSING for value in estimate)
    return mean if low == MISSING else f"{mean} [{low}, {high}]"


# ---- intervals


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds and its t interval."""
    values = np.array(values, float)
    half = math.nan
    if len(values) > 1:
        half = _T[min(len(values) - 1, len(_T)) - 1] * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def correlations_over_seeds(values: Sequence[float]) -> Estimate:
    """The same for correlations, through Fisher's z, which keeps the interval within -1 and 1."""
    with np.errstate(divide="ignore"):
        return Estimate(*map(math.tanh, over_seeds(np.arctanh(np.array(values, float)))))


def bootstrap(values: np.ndarray, draws: int = 2000) -> Estimate:
    """Mean over tasks [T] and the 95% percentile interval of resampled means; the same at every call."""
    values = np.asarray(values, float)
    drawn = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return Estimate(float(values.mean()), *map(float, np.percentile(values[drawn].mean(1), (2.5, 97.5))))


def over_tasks(run: Run, model: str, metric: str) -> float:
    """Half of the 95% interval over held-out tasks, at the end of one run, at the classifier's input.

    By bootstrap of the logged values of each task, where the log has them; else 1.96 standard errors.
    """
    names = ("within", "between") if metric == "relative_within" else (metric,)
    rows = [row.get("per_task", {}).get(model, {})
            for step, row in run.rows["heldout"].items() if step >= end_from(run)]
    if rows and all(name in row for row in rows for name in names):
        values = np.array([[row[name] for row in rows] for name in names], float)  # [1 or 2, steps, tasks]
        values = values[0] / values.sum(0) if metric == "relative_within" else values[0]
        _, low, high = bootstrap(values.mean(0))  # the same tasks at every measurement
        return (high - low) / 2
    logged_series = series(run, "heldout", model, metric)
    return 1.96 * float(logged_series.se[logged_series.steps >= end_from(run)].mean())


# ---- numbers of one run


def end_from(run: Run) -> float:
    """The meta-step from which on a measurement counts to the end."""
    return (1 - END_SHARE) * run.last_step


def series(run: Run, split: str, model: str, metric: str, layer: int | str = HIDDEN) -> Series:
    """As logged, but "cdnv_unbiased" is `unbiased_cdnv` of the mean CDNV: defined near noise, and in older logs."""
    layer = layer if isinstance(layer, str) else run.layers[max(layer, -len(run.layers))]
    if metric == "cdnv_unbiased":
        steps, mean, se = run.series(split, model, "cdnv", layer)
        return Series(steps, unbiased_cdnv(mean, run.queries), se * unbiased_cdnv(mean, run.queries) / mean)
    return run.series(split, model, metric, layer)


def logged(run: Run, model: str, metric: str) -> bool:
    return run.has("heldout", model, "cdnv" if metric == "cdnv_unbiased" else metric)


def unbiased_cdnv(measured: np.ndarray, queries: int) -> np.ndarray:
    """CDNV without the bias of means over few queries, to first order; nan where noise is all there is.

    Means of n samples shorten the spread by (n-1)/n and lengthen a squared distance d by 2v/n, so that V = v/d is
    measured as m = V (n-1)/n / (1 + 2V/n). Solved for V.
    """
    left = queries - 1 - 2 * np.asarray(measured, float)
    return queries * measured / np.where(left > 0, left, np.nan)


def at(run: Run, split: str, model: str, metric: str, step: int, layer: int | str = HIDDEN) -> float:
    """The metric at a measured step.

    Raises:
        UserError: nothing was measured then.
    """
    logged_series = series(run, split, model, metric, layer)
    if step not in logged_series.steps:
        raise UserError(f"{run.path} has no measurement ({split}) at step {step}; train it from the start")
    return float(logged_series.mean[logged_series.steps == step][0])


def untrained(run: Run, model: str, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    return at(run, split, model, metric, 0, layer)


def end(run: Run, model: str, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    """The mean over the measurements of the last tenth of training; nan without any."""
    logged_series = series(run, split, model, metric, layer)
    used = logged_series.mean[logged_series.steps >= end_from(run)]
    return float(used.mean()) if len(used) else math.nan


def growth(run: Run, model: str, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    """The end as a multiple of the untrained network."""
    return end(run, model, metric, layer, split) / untrained(run, model, metric, layer, split)


def lowest(run: Run, model: str, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    """The smallest value of the run as a multiple of the untrained network's."""
    logged_series = series(run, split, model, metric, layer)
    return float(logged_series.mean.min()) / untrained(run, model, metric, layer, split)


def adapted_minus_meta(run: Run, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    return end(run, "finetuned", metric, layer, split) - end(run, "meta", metric, layer, split)


def heldout_minus_train(run: Run, model: str, metric: str, layer: int | str = HIDDEN) -> float:
    return end(run, model, metric, layer) - end(run, model, metric, layer, "train")


def nearest_mean(run: Run, model: str) -> float:
    """Accuracy of the nearest support mean at the classifier's input, at the end, on held-out tasks."""
    return end(run, model, "ncc_accuracy")


def matched_dimension(run: Run, model: str) -> float:
    """`matching_dimension` of the ETF error at the end, on held-out tasks."""
    return matching_dimension(end(run, model, "etf_error"), run.settings["n_way"])


def accuracy_at_end(run: Run, inner_step: int, split: str = "heldout") -> float:
    """Query accuracy of the classifier after so many inner steps; -1: after the last one."""
    steps, values = run.along_inner_loop(split, "accuracy")
    late = values[steps >= end_from(run)]
    return float(late[:, inner_step].mean()) if len(late) else math.nan


def logit_share(run: Run, model: str, suffix: str, step: int | None) -> float:
    """within / (within + between) of the mean traces of the logits, training tasks, at a step; None: at the end.

    With the suffix "_original", of what the original took for the traces; with "", of the traces by label.
    """
    names = f"within{suffix}", f"between{suffix}"
    within, between = (end(run, model, name, -1, "train") if step is None else at(run, "train", model, name, step, -1)
                       for name in names)  # fmt: skip
    return within / (within + between)


# ---- collapse against accuracy


def held_out_error(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Meta-steps and the error of the adapted classifier on held-out tasks."""
    steps, values = run.along_inner_loop("heldout", "accuracy")
    return steps, 1 - values[:, -1]


def detrended(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values minus their straight line (least squares) in log step: [S], [S] -> [S]."""
    x = np.log10(steps) - np.log10(steps).mean()
    return values - values.mean() - x * ((x @ values) / (x @ x))


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each point the mean of the defined ones within 10% of its step: [S], [S] -> [S]."""
    defined = np.isfinite(values)
    near = (np.abs(steps[:, None] - steps) <= 0.1 * steps[:, None]) & defined
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, near @ np.where(defined, values, 0) / near.sum(1), np.nan)


def residuals(run: Run, model: str, metric: str, layer: int | str, first: int = LATE) -> tuple[np.ndarray, np.ndarray]:
    """Log metric and log held-out error from meta-step `first` on, each minus its trend; empty if undefined."""
    steps, error = held_out_error(run)
    metric_steps, values, _ = series(run, "heldout", model, metric, layer)
    used = steps >= max(first, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pair = [np.log(one[used]) for one in (values, error)]
    if used.sum() < 4 or not np.isfinite(pair).all():  # a line fits two points of three; 0 has no logarithm
        return np.empty(0), np.empty(0)
    return detrended(steps[used], pair[0]), detrended(steps[used], pair[1])


def correlation(run: Run, model: str, metric: str, layer: int | str, first: int = LATE) -> float:
    """Of these residuals: whether a checkpoint more collapsed than its neighbours is more accurate too."""
    x, y = residuals(run, model, metric, layer, first)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(x, y)[0, 1]) if len(x) else math.nan


def error_spread(run: Run, first: int = LATE) -> float:
    """Standard deviation of log held-out error minus its trend: 0.1 is a tenth of the error."""
    steps, error = held_out_error(run)
    used = steps >= max(first, 1)
    if used.sum() < 4 or not error[used].all():
        return math.nan
    return float(np.sqrt((detrended(steps[used], np.log(error[used])) ** 2).sum() / (used.sum() - 2)))


def largest_drop(run: Run, first: int = LATE) -> float:
    """The largest drop of held-out accuracy from one checkpoint to the next."""
    steps, error = held_out_error(run)
    return float(np.diff(error[steps >= first]).max()) if (steps >= first).sum() > 1 else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    x, y = np.array(x, float), np.array(y, float)
    if len(x) < 3 or not np.isfinite([x, y]).all():
        return math.nan
    ranks = [(v < v[:, None]).sum(1) + (v <= v[:, None]).sum(1) for v in (x, y)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


# ---- of saved weights (controls.json, result.json), else of the log


def control_of(run: Run, kind: str) -> dict | None:
    """What controls.json has under the name `kind`, or the first name that begins with it."""
    controls = run.controls()
    return controls.get(kind) or next((controls[name] for name in controls if name.startswith(kind)), None)


def measured(run: Run, model: str, metric: str, kind: str = "final") -> float:
    """At the classifier's input, on the test tasks of controls.json; without it, of the log's held-out tasks."""
    if control := control_of(run, kind):
        values = control.get(model, {}).get("cdnv" if metric == "cdnv_unbiased" else metric, {}).get("mean") or [None]
        value = number(values[max(len(values) - 2, 0)])
        queries = int(kind.split()[1]) if kind.startswith("queries") else run.queries
        return float(unbiased_cdnv(value, queries)) if metric == "cdnv_unbiased" else value
    value_of = {"final": end, "untrained": untrained}.get(kind)
    return value_of(run, model, metric) if value_of and logged(run, model, metric) else math.nan


def dimension(run: Run, model: str, kind: str = "final") -> float:
    """Participation ratio of the means of all test classes, if controls.json has it; else matched to the ETF error."""
    value = (control_of(run, kind) or {}).get("effective_dimension")
    if value is not None:
        return number(value.get(model) if isinstance(value, dict) else value)
    return matching_dimension(measured(run, model, "etf_error", kind), run.settings["n_way"])


def tested(key: str, place: int, transductive: bool = True, kind: str = "final",
           control: bool = False) -> Callable[[Run], float]:
    """Accuracy ("accuracy" or "nearest_mean") before (0) or after (-1) adaptation.

    Of result.json; with another `kind` than "final", or `control`, of controls.json, which is transductive.
    """
    def value(run: Run) -> float:
        if kind == "final" and not control:
            test = run.file("result.json").get("test" if transductive else "test_nontransductive")
        else:
            test = control_of(run, kind) if transductive else None
        return number(((test or {}).get(key) or [None])[place])

    return value


def own_accuracy(run: Run, transductive: bool = True) -> float:
    """By the learner's own rule: the nearest support mean without adaptation, or the adapted classifier."""
    by_mean = run.settings["learner"] in ("protonet", "classifier")
    return tested(*(("nearest_mean", 0) if by_mean else ("accuracy", -1)), transductive)(run)


# ---- references


def noise_share(n_way: int, queries: int) -> float:
    """Relative within trace of pure noise, and of permuted labels: (n-1) / (n-1 + (C-1)/C)."""
    return (queries - 1) / (queries - 1 + (n_way - 1) / n_way)


@functools.cache
def random_etf_errors(n_way: int, largest: int = 64) -> np.ndarray:
    """Mean ETF error of n_way random Gaussian directions in d dimensions, for d = 1 .. largest."""
    samples = np.random.default_rng(0).standard_normal((max(50_000 // n_way**2, 100), n_way, largest))
    centred = samples - samples.mean(1, keepdims=True)
    grams = np.cumsum(centred[:, :, None, :] * centred[:, None, :, :], -1)  # [draws, C, C, d]
    grams = grams / np.sqrt((grams**2).sum((1, 2), keepdims=True))
    simplex = (np.eye(n_way) - 1 / n_way) / math.sqrt(n_way - 1)
    return np.sqrt(((grams - simplex[..., None]) ** 2).sum((1, 2))).mean(0)


def matching_dimension(etf_error: float, n_way: int) -> float:
    """The dimension in which as many random directions have this ETF error: what NC2 says in one number."""
    errors = random_etf_errors(n_way)
    if not errors[-1] <= etf_error <= errors[0]:
        return math.nan
    return float(np.interp(-etf_error, -errors, np.arange(1, len(errors) + 1)))
