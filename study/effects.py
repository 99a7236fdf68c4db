"""Single numbers of a run, and their intervals: over seeds by Student's t, over the tasks of a seed by bootstrap.

"The end" of a run is the mean over the measurements of the last tenth of training. Held-out tasks are the same at every
measurement and for every seed, so an interval over seeds does not cover their choice; `share_over_tasks` does.

A number is of held-out tasks and at the classifier's input if nothing else is said.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from files import UserError
from study.logs import Run, Series, number

END_SHARE = 0.1  # the last part of training, whose measurements are averaged
HIDDEN = -2      # the classifier's input; a layer is a name, or an index into the run's layers
BY_PARTS = "first step by parts"  # the control in controls.json
UNTRAINED = f"{BY_PARTS}, untrained"
CONTROL_QUERIES = 15  # per class in controls.json, if its name says nothing else
LATE = 1_000     # correlations and drops use the checkpoints from this meta-step on, after the steep beginning

# 97.5% points of Student's t for 1..10 degrees of freedom; beyond them the last one, which is slightly too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Estimate(NamedTuple):
    """A mean and the edges of its 95% interval; the edges are nan for a single value."""

    mean: float
    low: float
    high: float


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
    """Mean and t interval of correlations by Fisher's z, which keeps the interval within -1 and 1."""
    with np.errstate(divide="ignore"):
        return Estimate(*map(math.tanh, over_seeds(np.arctanh(np.array(values, float)))))


def share_over_tasks(run: Run) -> float:
    """Half of the 95% interval over held-out tasks of the adapted relative within trace at the end of one run.

    The percentile interval of 2,000 resampled means, if the log has the traces of each task; else 1.96 standard errors.
    """
    rows = [row.get("per_task", {}).get("finetuned", {})
            for step, row in run.rows["heldout"].items() if step >= end_from(run)]
    if not rows or any(trace not in row for row in rows for trace in ("within", "between")):
        steps, _, se = series(run, "heldout", "finetuned", "relative_within")
        return 1.96 * mean_at_end(run, steps, se)
    traces = np.array([[row[trace] for row in rows] for trace in ("within", "between")], float)  # [2, S, T]
    shares = within_share(traces).mean(0)  # [T], as the tasks are the same at every measurement
    drawn = np.random.default_rng(0).integers(len(shares), size=(2_000, len(shares)))
    low, high = np.percentile(shares[drawn].mean(1), (2.5, 97.5))
    return float(high - low) / 2


# ---- numbers of one run


def end_from(run: Run) -> float:
    """The meta-step from which on measurements belong to the end."""
    return (1 - END_SHARE) * run.last_step


def series(run: Run, split: str, model: str, metric: str, layer: int | str = HIDDEN) -> Series:
    """A logged metric; "cdnv_unbiased" is `unbiased_cdnv` of the mean CDNV, so that older logs have it too."""
    if isinstance(layer, int):
        layer = run.layers[max(layer, -len(run.layers))]
    if metric != "cdnv_unbiased":
        return run.series(split, model, metric, layer)
    steps, mean, se = run.series(split, model, "cdnv", layer)
    unbiased = unbiased_cdnv(mean, run.queries)
    return Series(steps, unbiased, se * unbiased / mean)


def nearest(run: Run, split: str, metric: str, step: int, model: str = "finetuned") -> float:
    """A metric, or accuracy in percent, at the measurement nearest to the meta-step."""
    if metric == "accuracy":
        steps, values = run.along_inner_loop(split, "accuracy")
        values = 100 * values[:, -1]
    else:
        steps, values, _ = series(run, split, model, metric)
    return float(values[np.abs(steps - step).argmin()])


def logged(run: Run, model: str, metric: str) -> bool:
    return run.has("heldout", model, "cdnv" if metric == "cdnv_unbiased" else metric)


def unbiased_cdnv(measured: np.ndarray, queries: int) -> np.ndarray:
    """CDNV without the bias of means over few queries, to first order; nan if all is noise.

    Means of n samples reduce the variance v by (n-1)/n and increase a squared distance d by 2v/n. So V = v/d is
    measured as m = V (n-1)/n / (1 + 2V/n). Solved for V.
    """
    denominator = queries - 1 - 2 * np.asarray(measured, float)
    return queries * measured / np.where(denominator > 0, denominator, np.nan)


def untrained(run: Run, model: str, metric: str, layer: int | str = HIDDEN) -> float:
    """The measurement at step 0.

    Raises:
        UserError: nothing was measured then.
    """
    steps, mean, _ = series(run, "heldout", model, metric, layer)
    if 0 not in steps:
        raise UserError(f"{run.path} has no measurement (heldout) at step 0; train it from the start")
    return float(mean[steps == 0][0])


def end(run: Run, model: str, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    """The mean over the measurements of the last tenth of training; nan if there are none."""
    steps, mean, _ = series(run, split, model, metric, layer)
    return mean_at_end(run, steps, mean)


def mean_at_end(run: Run, steps: np.ndarray, values: np.ndarray) -> float:
    """Mean of the values [S] measured in the last tenth of training; nan if there are none."""
    late = values[steps >= end_from(run)]
    return float(late.mean()) if len(late) else math.nan


def growth(run: Run, model: str, metric: str) -> float:
    """The end as a multiple of the untrained network."""
    return end(run, model, metric) / untrained(run, model, metric)


def lowest(run: Run, model: str, metric: str) -> float:
    """The smallest value of the run as a multiple of the untrained network's."""
    return float(series(run, "heldout", model, metric).mean.min()) / untrained(run, model, metric)


def adapted_minus_meta(run: Run, metric: str, layer: int | str = HIDDEN) -> float:
    return end(run, "finetuned", metric, layer) - end(run, "meta", metric, layer)


def heldout_minus_train(run: Run, model: str, metric: str) -> float:
    return end(run, model, metric) - end(run, model, metric, split="train")


def matched_dimension(run: Run, model: str) -> float:
    """`matching_dimension` of the ETF error at the end."""
    return matching_dimension(end(run, model, "etf_error"), run.settings["n_way"])


def accuracy_at_end(run: Run, inner_step: int, split: str = "heldout") -> float:
    """Query accuracy of the classifier after `inner_step` inner steps; -1: after the last one."""
    steps, values = run.along_inner_loop(split, "accuracy")
    return mean_at_end(run, steps, values[:, inner_step]) if len(steps) else math.nan


def logit_traces(run: Run, model: str, suffix: str, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Meta-steps [S], and the traces of the logits within and between classes [2, S].

    By label with the suffix ""; with "_original", what the original took for them.
    """
    within, between = (series(run, split, model, trace + suffix, -1) for trace in ("within", "between"))
    return within.steps, np.array([within.mean, between.mean])


def within_share(traces: np.ndarray | Sequence) -> np.ndarray:
    """within / (within + between): [2, ...] -> [...]."""
    return traces[0] / (traces[0] + traces[1])


def logit_share_change(run: Run, model: str, suffix: str, start: int, split: str = "train") -> float:
    """Change of the relative within trace of the logits, from the measurement nearest to step `start` to the end."""
    steps, traces = logit_traces(run, model, suffix, split)
    start_traces = traces[:, np.abs(steps - start).argmin()]
    end_traces = [mean_at_end(run, steps, trace) for trace in traces]
    return float(within_share(end_traces) - within_share(start_traces))


# ---- collapse against accuracy


def late_error(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Meta-steps from LATE on, and the error of the adapted classifier on held-out tasks then: [S], [S]."""
    steps, values = run.along_inner_loop("heldout", "accuracy")
    late = steps >= LATE
    return steps[late], 1 - values[late, -1]


def detrended(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values minus their straight line (least squares) in log step: [S], [S] -> [S]."""
    x = np.log10(steps) - np.log10(steps).mean()
    return values - values.mean() - x * ((x @ values) / (x @ x))


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of the defined ones within 10% of its step: [S], [S] -> [S]."""
    defined = np.isfinite(values)
    near = (np.abs(steps[:, None] - steps) <= 0.1 * steps[:, None]) & defined
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, near @ np.where(defined, values, 0) / near.sum(1), np.nan)


def residuals(run: Run, model: str, metric: str, layer: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Log metric and log held-out error from meta-step LATE on, each minus its trend; empty if undefined."""
    steps, error = late_error(run)
    metric_steps, values, _ = series(run, "heldout", model, metric, layer)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log([values[metric_steps >= LATE], error])
    if len(steps) < 4 or not np.isfinite(logs).all():  # three points are too few for a trend; 0 has no logarithm
        return np.empty(0), np.empty(0)
    return detrended(steps, logs[0]), detrended(steps, logs[1])


def correlation(run: Run, model: str, metric: str, layer: int | str) -> float:
    """Of the `residuals`: positive if checkpoints less collapsed than their neighbours are less accurate."""
    x, y = residuals(run, model, metric, layer)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(x, y)[0, 1]) if len(x) else math.nan


def error_spread(run: Run) -> float:
    """Standard deviation of log held-out error minus its trend, from meta-step LATE on: 0.1 is a tenth of the error."""
    steps, error = late_error(run)
    if len(steps) < 4 or not error.all():
        return math.nan
    deviations = detrended(steps, np.log(error))
    return float(np.sqrt((deviations**2).sum() / (len(steps) - 2)))


def largest_drop(run: Run) -> float:
    """The largest drop of held-out accuracy from one checkpoint to the next, from meta-step LATE on."""
    _, error = late_error(run)
    return float(np.diff(error).max()) if len(error) > 1 else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    x, y = np.array(x, float), np.array(y, float)
    if len(x) < 3 or not np.isfinite([x, y]).all():
        return math.nan
    ranks = [(v < v[:, None]).sum(1) + (v <= v[:, None]).sum(1) for v in (x, y)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


# ---- of saved weights (controls.json, result.json), else of the log


def measured(run: Run, model: str, metric: str, kind: str = "final") -> float:
    """On the test tasks of the control `kind` in controls.json; without it, from the log, of held-out tasks."""
    if control := run.controls().get(kind):
        values = control.get(model, {}).get("cdnv" if metric == "cdnv_unbiased" else metric, {}).get("mean") or [None]
        value = number(values[max(len(values) - 2, 0)])
        queries = int(kind.split()[1]) if kind.startswith("queries") else CONTROL_QUERIES
        return float(unbiased_cdnv(value, queries)) if metric == "cdnv_unbiased" else value
    value_of = {"final": end, "untrained": untrained}.get(kind)
    return value_of(run, model, metric) if value_of and logged(run, model, metric) else math.nan


def dimension(run: Run, kind: str = "final") -> float:
    """Participation ratio of the means of all test classes before adaptation; without controls.json, matched to NC2."""
    if control := run.controls().get(kind):
        return number(control["effective_dimension"]["meta"])
    return matching_dimension(measured(run, "meta", "etf_error", kind), run.settings["n_way"])


def accuracy_in(test: dict | None, key: str, place: int) -> float:
    """A test's "accuracy" or "nearest_mean" before (0) or after (-1) adaptation; nan if it has none."""
    return number(((test or {}).get(key) or [None])[place])


def by_parts(run: Run, quantity: str, kind: str = BY_PARTS) -> list[float]:
    """Accuracy or margin before adaptation, and after the first step of the classifier, of the body, of both.

    Of "rows" and "body" one value: see `first_step`.
    """
    return run.controls().get(kind, {}).get(quantity, [math.nan] * 4)


def first_step(run: Run, quantity: str, kind: str = BY_PARTS) -> float:
    """ "rows": the norm of the classifier's rows minus their mean; "body": of the body's first step, over its own."""
    return by_parts(run, quantity, kind)[0]


def accuracy_after(run: Run, part: str) -> float:
    """Accuracy after the first inner step of the "classifier" or the "body" alone."""
    return by_parts(run, "accuracy")[("classifier", "body").index(part) + 1]


def body_part(run: Run, kind: str = BY_PARTS) -> float:
    """The body's part of the margin that the first inner step adds, if classifier and body step one at a time."""
    before, classifier, body, _ = by_parts(run, "margin", kind)
    return (body - before) / (body - before + classifier - before)


def five_shot_share(run: Run, samples: str, inner_step: int) -> float:
    """Unbiased relative within trace of "query" or "support" features after `inner_step` steps, of the mean traces.

    Of the control "5-shot"; nan without it. Unbiased as in `nc_metrics.unbiased_traces`.
    """
    inner = run.controls().get("5-shot", {}).get("inner")
    if inner is None:
        return math.nan
    images, prefix = (CONTROL_QUERIES, "") if samples == "query" else (5, "support_")
    within, between = (inner[f"{prefix}{trace}"]["mean"][inner_step][HIDDEN] for trace in ("within", "between"))
    error, n_way = within / (images - 1), run.settings["n_way"]  # the squared standard error of a class mean
    return within_share([within + error, between - error * (n_way - 1) / n_way])


def tested(run: Run, key: str, place: int, transductive: bool = True) -> float:
    """`accuracy_in` the test of result.json."""
    name = "test" if transductive else "test_nontransductive"
    return accuracy_in(run.file("result.json").get(name), key, place)


def own_accuracy(run: Run, transductive: bool = True, interval: bool = False) -> float:
    """Test accuracy by the learner's own rule: nearest support mean before adaptation, or adapted classifier.

    With `interval` half of its 95% interval over tasks instead.
    """
    if run.settings["learner"] in ("protonet", "classifier"):
        return tested(run, "nearest_mean_ci95" if interval else "nearest_mean", 0, transductive)
    return tested(run, "ci95" if interval else "accuracy", -1, transductive)


# ---- references


def noise_share(n_way: int, queries: int) -> float:
    """Relative within trace of pure noise, and of permuted labels: (n-1) / (n-1 + (C-1)/C)."""
    return (queries - 1) / (queries - 1 + (n_way - 1) / n_way)


@functools.cache
def random_etf_errors(n_way: int) -> np.ndarray:
    """Mean ETF error of n_way random Gaussian directions in d dimensions, for d = 1 .. 64: [64]."""
    samples = np.random.default_rng(0).standard_normal((max(50_000 // n_way**2, 100), n_way, 64))
    centred = samples - samples.mean(1, keepdims=True)
    grams = np.cumsum(centred[:, :, None, :] * centred[:, None, :, :], -1)  # [draws, C, C, d]
    grams = grams / np.sqrt((grams**2).sum((1, 2), keepdims=True))
    simplex = (np.eye(n_way) - 1 / n_way) / math.sqrt(n_way - 1)
    return np.sqrt(((grams - simplex[..., None]) ** 2).sum((1, 2))).mean(0)


def matching_dimension(etf_error: float, n_way: int) -> float:
    """The dimension in which n_way random directions have this ETF error; nan beyond 1 to 64 dimensions."""
    errors = random_etf_errors(n_way)
    if not errors[-1] <= etf_error <= errors[0]:
        return math.nan
    return float(np.interp(-etf_error, -errors, np.arange(1, len(errors) + 1)))
