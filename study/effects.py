"""Single numbers of a run, and their intervals: over seeds by Student's t, over the tasks of a seed by the normal's.

"The end" of a run is the mean over the measurements of the last tenth of training. Held-out tasks are the same at every
measurement and for every seed, so an interval over seeds does not cover their choice; `share_over_tasks` does.

Numbers are for held-out tasks at the classifier's input unless stated otherwise.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np

from files import reading
from study.design import CONTROL_QUERIES, CONTROL_SHOTS
from study.logs import BASELINES, Run

HIDDEN = -2  # the classifier's input; a layer is a name, or an index into the run's layers

# 97.5% points of Student's t for 1..10 degrees of freedom; beyond them the last one, which is slightly too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95% t interval, which is nan for a single value."""
    if len(values) == 1:
        return float(values[0]), math.nan
    point = _T[min(len(values) - 1, len(_T)) - 1]
    return float(np.mean(values)), point * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def share_over_tasks(run: Run) -> float:
    """Half of the 95% interval over held-out tasks of the adapted relative within trace at the end of one run."""
    rows = [row["per_task"]["finetuned"] for step, row in run.rows["heldout"].items() if step >= run.end_from]
    traces = np.array([[row[trace] for row in rows] for trace in ("within", "between")], float)  # [2, S, T]
    shares = within_share(traces).mean(0)  # [T], as the tasks are the same at every measurement
    return 1.96 * float(np.std(shares, ddof=1)) / math.sqrt(len(shares))


def number(value: float | None) -> float:
    """A logged value; nan for null and for numbers too large to draw."""
    value = math.nan if value is None else float(value)
    return value if abs(value) < 1e100 else math.nan


@functools.cache
def series(run: Run, split: str, model: str, metric: str, layer: int | str = HIDDEN) -> np.ndarray:
    """A logged metric of `model` ("meta", "finetuned", "support") at S measurements: [3, S].

    The rows are step, mean over tasks and its standard error; nan where undefined. "accuracy" is the adapted
    classifier's for every model and layer. "cdnv_unbiased" is `unbiased_cdnv` of the mean CDNV: that of a single
    task may be undefined.

    Raises:
        UserError: the log lacks it.
    """
    if metric == "cdnv_unbiased":
        steps, mean, se = series(run, split, model, "cdnv", layer)
        unbiased = unbiased_cdnv(mean, run.queries)
        slope = (unbiased / mean) ** 2 * (run.queries - 1) / run.queries
        return np.array([steps, unbiased, slope * se])
    if isinstance(layer, int):
        layer = run.layers[max(layer, -len(run.layers))]
    points = []
    for step, row in sorted(run.rows[split].items()):
        lacks = f"lacks {model} {metric} of {layer} in the measurement ({split}) at step {step}"
        with reading(run.path, "its log is incomplete, or older than this metric", lacks):
            if metric == "accuracy":
                mean, se = (row["inner"]["accuracy"][name][-1] for name in ("mean", "se"))
            else:
                mean, se = (row[model][metric][name][row["layers"].index(layer)] for name in ("mean", "se"))
            points.append((step, number(mean), number(se)))
    return np.array(points, float).reshape(-1, 3).T


def unbiased_cdnv(measured: np.ndarray, queries: int) -> np.ndarray:
    """CDNV without the bias of means over few queries, to first order; nan if all is noise.

    Means of n samples reduce the variance v by (n-1)/n and increase a squared distance d by 2v/n. So V = v/d is
    measured as m = V (n-1)/n / (1 + 2V/n). Solved for V.
    """
    denominator = queries - 1 - 2 * np.asarray(measured, float)
    return queries * measured / np.where(denominator > 0, denominator, np.nan)


def at(run: Run, model: str, metric: str, step: int, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    """The measurement nearest to the meta-step; at 0 it is that of the untrained network."""
    steps, mean, _ = series(run, split, model, metric, layer)
    return float(mean[np.abs(steps - step).argmin()])


def end(run: Run, model: str, metric: str, layer: int | str = HIDDEN, split: str = "heldout") -> float:
    """The mean over the measurements of the last tenth of training; nan if there are none."""
    steps, mean, _ = series(run, split, model, metric, layer)
    late = mean[steps >= run.end_from]
    return float(late.mean()) if len(late) else math.nan


def within_share(traces: np.ndarray | Sequence) -> np.ndarray:
    """within / (within + between): [2, ...] -> [...]."""
    return traces[0] / (traces[0] + traces[1])


def logit_share_change(run: Run, model: str, suffix: str) -> float:
    """Change of the relative within trace of the logits on training tasks, from the untrained network to the end.

    By label with the suffix ""; with "_original", of what the original took for the traces.
    """
    traces = f"within{suffix}", f"between{suffix}"
    starts = [at(run, model, trace, 0, -1, "train") for trace in traces]
    ends = [end(run, model, trace, -1, "train") for trace in traces]
    return within_share(ends) - within_share(starts)


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of the defined ones within 10% of its step: [S], [S] -> [S]."""
    defined = np.isfinite(values)
    near = (np.abs(steps[:, None] - steps) <= 0.1 * steps[:, None]) & defined
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, near @ np.where(defined, values, 0) / near.sum(1), np.nan)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    x, y = np.array(x, float), np.array(y, float)
    if len(x) < 3 or not np.isfinite([x, y]).all():
        return math.nan
    ranks = [(v < v[:, None]).sum(1) + (v <= v[:, None]).sum(1) for v in (x, y)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


def in_control(run: Run, kind: str, *keys: str | int) -> float:
    """A number of the control `kind` in controls.json (study/controls.py says what it holds); nan without it.

    Accuracies are "accuracy" (by the classifier) and "nearest_mean", before (0) and after (-1) adaptation.
    """
    try:
        return number(functools.reduce(operator.getitem, keys, run.controls[kind]))
    except KeyError:
        return math.nan


def measured(run: Run, model: str, metric: str, kind: str = "final", layer: int = HIDDEN) -> float:
    """A metric on the test tasks, from the control `kind` in controls.json; nan without it."""
    if metric == "cdnv_unbiased":
        queries = int(kind.split()[1]) if kind.startswith("queries") else CONTROL_QUERIES
        return float(unbiased_cdnv(measured(run, model, "cdnv", kind, layer), queries))
    means = run.controls.get(kind, {}).get(model, {}).get(metric, {}).get("mean", [None])
    return number(means[layer:][0])  # some controls have one layer


def relative(run: Run, model: str, metric: str) -> float:
    """`measured`, divided by its value for permuted labels: 0 is collapse, 1 if labels mean nothing."""
    return measured(run, model, metric) / measured(run, model, f"{metric}_null")


def five_shot_share(run: Run, samples: str, inner_step: int) -> float:
    """Unbiased relative within trace of "query" or "support" features after `inner_step` steps in control "5-shot".

    From the mean traces, as in `nc_metrics.unbiased_traces`; nan without that control.
    """
    images, prefix = (CONTROL_QUERIES, "") if samples == "query" else (CONTROL_SHOTS, "support_")
    within, between = (in_control(run, "5-shot", "inner", f"{prefix}{trace}", "mean", inner_step, HIDDEN)
                       for trace in ("within", "between"))
    error, n_way = within / (images - 1), run.settings["n_way"]  # the squared standard error of a class mean
    return within_share([within + error, between - error * (n_way - 1) / n_way])


def tested(run: Run, key: str, place: int, transductive: bool = True) -> float:
    """An accuracy of the run's test, in result.json; the key and the place are those of `in_control`."""
    test = run.result.get("test" if transductive else "test_nontransductive", {})
    values = test.get(key, [None])
    return number(values[place] if place == 0 or len(values) > 1 else None)  # raw pixels are not adapted


def own_accuracy(run: Run, transductive: bool = True, interval: bool = False) -> float:
    """Test accuracy by the learner's own rule: nearest support mean before adaptation, or adapted classifier.

    With `interval` half of its 95% interval over tasks instead.
    """
    if run.settings["learner"] in BASELINES:
        return tested(run, "nearest_mean_ci95" if interval else "nearest_mean", 0, transductive)
    return tested(run, "ci95" if interval else "accuracy", -1, transductive)


def as_used(run: Run, value: Callable, metric: str, *arguments):
    """value(run, model, metric, *arguments) of the features that the run's learner classifies by.

    Those of a learner without an inner loop are not adapted. "accuracy" is that of the learner's own rule.
    """
    if run.settings["learner"] in BASELINES:
        return value(run, "meta", "ncc_accuracy" if metric == "accuracy" else metric, *arguments)
    return value(run, "finetuned", metric, *arguments)


def noise_share(run: Run) -> float:
    """Relative within trace of pure noise, and of permuted labels: (n-1) / (n-1 + (C-1)/C)."""
    n_way = run.settings["n_way"]
    return within_share([run.queries - 1, (n_way - 1) / n_way])


@functools.cache
def random_etf_errors(n_way: int) -> np.ndarray:
    """Mean ETF error of n_way random Gaussian directions in d dimensions, for d = 1 .. 64: [64].

    In the n_way - 1 coordinates of centred rows a simplex has the unit matrix as its Gram matrix. A Gram matrix G of
    norm 1 has the squared distance 2 - 2 tr(G) / sqrt(n_way - 1) from it.
    """
    generator, gram, errors = np.random.default_rng(0), 0, []
    for _ in range(64):
        x = generator.standard_normal((2_500_000 // n_way**2, n_way - 1))  # one more dimension of every draw
        gram = gram + x[:, :, None] * x[:, None]
        cosine = np.trace(gram, axis1=1, axis2=2) / np.sqrt((n_way - 1) * (gram**2).sum((1, 2)))
        errors.append(np.sqrt(np.maximum(2 - 2 * cosine, 0)).mean())
    return np.array(errors)


def matching_dimension(run: Run) -> float:
    """The dimension in which random directions have the adapted ETF error of the end; nan beyond 1 to 64 dimensions."""
    errors = random_etf_errors(run.settings["n_way"])
    error = end(run, "finetuned", "etf_error")
    return float(np.interp(-error, -errors, np.arange(1, len(errors) + 1), math.nan, math.nan))
