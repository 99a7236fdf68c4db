"""Draws neural collapse while MAML trains, from the training scripts' logs.

    python plot_nc.py                          every figure of the README, from the logs committed under res/
    python plot_nc.py --figure layers          one of them
    python plot_nc.py RUN                      draw another run's traces into RUN/result.png
    python plot_nc.py RUN RUN RUN -o FILE.png  several seeds of one setting: their mean with a 95% band
    python plot_nc.py RUN --layer block2       another layer than the last hidden one
    python plot_nc.py RUN RUN --figure nc      another figure, into the first RUN; different settings side by side

A RUN is a run's folder (log.jsonl or log.jsonl.gz, and args.json) or the log itself with args.json beside it.

    traces                 the original's panels (result.png): the meta model's traces and its relative within trace
                           over the first 7,500 meta-steps, then both models' traces over the whole run
    nc                     NC1 to NC4 and CDNV against meta-steps, with their permuted-label nulls
    layers                 collapse by layer, one line a checkpoint
    inner_steps            traces and accuracy after each inner step
    collapse_vs_accuracy   CDNV against held-out error over all checkpoints
    accuracy               validation accuracy against meta-steps, one line a setting

The meta model is theta, before adaptation; the finetuned one theta'_K, after the inner steps. Every quantity is that of
query features, task by task (nc_metrics.py says which formula). The band is a t interval over seeds; for a single run
it is the mean over tasks and 1.96 standard errors to each side.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

import files
import nc_statistics
import runs as logs
from runs import Curve, Run

HERE = Path(__file__).resolve().parent
EARLY_STEPS = 7_500  # the original's first figure: 3 epochs of 2,500 meta-steps
CHECKPOINTS = (0, 250, 500, 1_500, 6_000, 15_000, 60_000)  # of the figure by layer, as far as a run goes
BEGINNING = 250  # meta-steps: "early" in the figure of inner steps

LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's
WITHIN, BETWEEN, NOISE = "#0072B2", "#D55E00", "#555555"  # blue, vermilion, grey
META, FINETUNED = "#0072B2", "#D55E00"
DARKER = {WITHIN: "#00324F", BETWEEN: "#6B2F00"}  # the same hues for held-out tasks, drawn on top
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
}
WIDTH, DPI = 9.0, 200  # inches; 1,800 pixels wide, shown at about 900 in a README
TRANSDUCTIVE = "features of query sets, batch norm by the query batch's own statistics (transductive)"

_DASHED = {"linestyle": (0, (4, 2)), "linewidth": 1.1}
_DOTTED = {"linestyle": (0, (1, 1.6)), "linewidth": 1.8}
_BAND = Patch(color=NOISE, alpha=0.4, linewidth=0, label="95% band")
_NULL = Line2D([], [], color=NOISE, label="null: permuted labels", **_DOTTED)

MODELS = {"meta": META, "finetuned": FINETUNED}
MODEL_STYLES = {"finetuned": {"linestyle": "-", "linewidth": 1.6}, "meta": {"linestyle": (0, (4, 2)), "linewidth": 1.2}}
MOMENTS = {
    "untrained": {"linestyle": (0, (1, 1.6)), "linewidth": 1.5},
    "early": {"linestyle": (0, (4, 2)), "linewidth": 1.3},
    "late": {"linestyle": "-", "linewidth": 1.8},
}


class Panel(NamedTuple):
    """A row of panels: the metric, what its axis is called, whether that is logarithmic."""

    metric: str
    label: str
    log: bool = False


NC_PANELS = (
    Panel("relative_within", "NC1: relative\nwithin trace"),
    Panel("nc1", "NC1: tr S$_W$S$_B^+$/C", log=True),
    Panel("cdnv", "CDNV", log=True),
    Panel("equinorm", "NC2: unequal\nlengths of means"),
    Panel("equiangularity", "NC2: angles off\na simplex's"),
    Panel("etf_error", "NC2: distance\nto a simplex"),
    Panel("self_duality", "NC3: classifier\noff the means"),
    Panel("ncc_mismatch", "NC4: not as\nnearest mean"),
)
LAYER_PANELS = (
    Panel("relative_within", "relative within trace"),
    Panel("cdnv", "CDNV", log=True),
    Panel("ncc_accuracy", "nearest-class-mean\naccuracy"),
)


# ---- traces: the original's panels


def traces_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """The original's panels for the seeds of one setting, at one layer; default the last hidden layer.

    Raises:
        UserError: several settings, no measurements, no such layer, or no value at it.
    """
    if len(groups) > 1:
        differing = logs.differing_settings([group[0] for group in groups])
        raise files.UserError(
            f"{groups[0][0].path} and {groups[1][0].path} differ in {', '.join(differing)}; only seeds of one "
            f"setting are averaged: draw them apart"
        )
    (runs,) = groups
    layer = _layer(runs, layer)
    figure = Figure(figsize=(WIDTH, 10.6), dpi=DPI)
    grid = figure.add_gridspec(4, 2, height_ratios=[1.1, 0.9, 1, 1])
    early, early_share = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])
    panels = {
        model: (figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1]))
        for row, model in enumerate(("meta", "finetuned"), start=2)
    }

    curves = _trace_curves(runs, layer)
    if not any(np.isfinite(c.mean).any() for (_, _, classes), c in curves.items() if classes == "train"):
        raise files.UserError(
            f"{runs[0].path}: no finite trace at layer {layer}; traces need two queries a class or more"
        )
    last = max(int(c.steps[-1]) for c in curves.values())
    first_steps = min(EARLY_STEPS, last)
    wide = _spans_decades([c for (_, metric, _), c in curves.items() if metric in ("within", "between")])
    noise = logs.noise_share(int(runs[0].settings["n_way"]), int(runs[0].settings["k_qry"]))

    _draw_traces(early, curves, "meta", wide, until=first_steps)
    early.set_title(f"Meta model, first {first_steps:,} meta-steps: traces", loc="left")
    _draw_shares(early_share, curves, "meta", noise, ("within",), until=first_steps)
    early_share.set_title("Meta model, same steps: relative within trace (vertical axis zoomed)", loc="left")
    for model, (traces, shares) in panels.items():
        name = {"meta": "Meta model", "finetuned": "Finetuned"}[model]
        _draw_traces(traces, curves, model, wide, until=last)
        traces.set_title(f"{name}, whole run: traces", loc="left")
        _draw_shares(shares, curves, model, noise, ("within", "between"), until=last)
        shares.set_ylim(0, 1)
        shares.set_title(f"{name}, whole run: relative traces", loc="left")
    both = (panels["meta"][0], panels["finetuned"][0])
    low, high = (pick(edges) for pick, edges in zip((min, max), zip(*(axes.get_ylim() for axes in both))))
    for axes in both:
        axes.set_ylim(low, high)  # one scale, so that before and after adaptation can be compared

    handles = [
        Line2D([], [], color=WITHIN, linewidth=2.5, label="within classes"),
        Line2D([], [], color=BETWEEN, linewidth=2.5, label="between classes"),
        *_class_handles(any(classes == "heldout" for _, _, classes in curves)),
        Line2D([], [], color=NOISE, linestyle=":", linewidth=1.6, label=f"within, pure noise: {noise:.3f}"),
        _BAND,
    ]
    _frame(figure, *captions(runs, layer), handles, 3, _band_note(groups))
    return figure


def captions(runs: Sequence[Run], layer: str) -> tuple[str, str]:
    """Title and subtitle: data set ("synthetic" if it is), layer, task shape, tasks a measurement, seeds."""
    settings = runs[0].settings
    title = f"Class traces while MAML trains\n{runs[0].data['name']}, {_place(runs, layer)}"
    net = f", {settings['net']} network" if settings.get("net") == "paper" else ""
    shape = f"{logs.describe(runs[0])}{net}, {settings['k_qry']} queries a class"
    return title, f"{shape}\neach measurement: {_tasks([runs])}; {_seeds(runs)}\n{TRANSDUCTIVE}"


def _trace_curves(runs: Sequence[Run], layer: str) -> dict[tuple[str, str, str], Curve]:
    """The figure's curves by (model, metric, classes); the relative between trace is 1 - the within one."""
    curves = {}
    for classes, model, metric in itertools.product(
        ("train", "heldout"), ("meta", "finetuned"), ("within", "between", "relative_within")
    ):
        found = logs.curve(runs, model, metric, layer, classes)
        if found is None:
            continue
        curves[model, metric, classes] = found
        if metric == "relative_within":
            steps, mean, low, high = found
            curves[model, "relative_between", classes] = Curve(steps, 1 - mean, 1 - high, 1 - low)
    if not any(classes == "train" for _, _, classes in curves):
        raise files.UserError("the runs have no measured step in common; draw them apart")
    return curves


def _spans_decades(curves: list[Curve]) -> bool:
    """Whether traces need a logarithmic axis: all positive, the largest over thirty times the smallest."""
    values = np.concatenate([c.mean[np.isfinite(c.mean)] for c in curves])
    return bool(values.size and values.min() > 0 and values.max() > 30 * values.min())


def _draw_traces(axes: Axes, curves: dict, model: str, wide: bool, until: int) -> None:
    if wide:
        _log_axis(axes)
    for metric, colour in (("within", WITHIN), ("between", BETWEEN)):
        _draw_both(axes, curves, model, metric, colour, until)
    # From zero where that is possible; else a band that reaches toward zero must not stretch the axis.
    means = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    axes.set_ylim(bottom=0.6 * np.nanmin(means) if wide else 0)
    axes.set_ylabel("trace" + (", log scale" if wide else "") + "\n(squared feature units)")
    _step_axis(axes, until)


def _draw_shares(
    axes: Axes, curves: dict, model: str, noise: float, parts: Sequence[str], until: int
) -> None:
    axes.axhline(noise, color=NOISE, linestyle=":", linewidth=1.6)
    for part in parts:
        _draw_both(axes, curves, model, f"relative_{part}", WITHIN if part == "within" else BETWEEN, until)
    axes.set_ylabel("share of total trace")
    _step_axis(axes, until)


def _draw_both(axes: Axes, curves: dict, model: str, metric: str, colour: str, until: int) -> None:
    """One quantity up to step `until`, on training tasks and on held-out ones."""
    for classes in ("train", "heldout"):
        found = curves.get((model, metric, classes))
        if found is not None:
            _draw(axes, Curve(*(part[found.steps <= until] for part in found)), colour, classes)


# ---- nc: NC1 to NC4 and CDNV


def nc_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Every metric against meta-steps, with its null; settings side by side.

    Raises:
        UserError: no measurements, no such layer, or a metric is missing.
    """
    layer = _layer(groups[0], layer)
    most = "heldout" if _has_heldout(groups) else "train"  # more tasks, so a smoother null
    figure, cells = _panels(NC_PANELS, groups, columns_alone=2, row_height=1.75)
    for axes, panel, runs in cells:
        if panel.log:
            _log_axis(axes)
        for model, colour in MODELS.items():
            for classes in ("train", "heldout"):
                found = logs.curve(runs, model, panel.metric, layer, classes)
                if found is not None:
                    _draw(axes, found, colour, classes)
            if logs.is_logged(runs, model, f"{panel.metric}_null", most):
                null = logs.curve(runs, model, f"{panel.metric}_null", layer, most)
                axes.plot(null.steps, null.mean, color=colour, **_DOTTED)
        if not panel.log:
            axes.set_ylim(bottom=0)
        _log_step_axis(axes, _last_step(runs))
    title = f"Neural collapse while MAML trains\n{_data(groups)}, {_place(groups[0], layer)}"
    models = [Line2D([], [], color=colour, linewidth=2.5, label=model) for model, colour in MODELS.items()]
    handles = [*models, *_class_handles(_has_heldout(groups)), _NULL, _BAND]
    _frame(figure, title, _subtitle(groups, "train", "heldout"), handles, 3, _band_note(groups),
           f"full collapse is 0 in every panel{_lacking(NC_PANELS, groups)}")  # fmt: skip
    return figure


# ---- layers: intermediate collapse


def layers_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Collapse by layer, one line a checkpoint; settings side by side. There is no `layer` to choose.

    Raises:
        UserError: a layer was chosen, no measurements, or a metric is missing.
    """
    if layer is not None:
        raise files.UserError("--layer doesn't go with --figure layers, which draws all of them")
    classes = "heldout" if _has_heldout(groups) else "train"
    colours = _checkpoint_colours(groups, classes)
    figure, cells = _panels(LAYER_PANELS, groups, columns_alone=3, row_height=2.5)
    for axes, panel, runs in cells:
        names = logs.layers_of(runs[0])
        if panel.log:
            _log_axis(axes)
        for model, style in MODEL_STYLES.items():
            by_layer = [logs.curve(runs, model, panel.metric, name, classes) for name in names]
            for step in _checkpoints(runs, classes):
                at = by_layer[0].steps.tolist().index(step)
                mean, low, high = np.array([[c.mean[at], c.low[at], c.high[at]] for c in by_layer]).T
                axes.plot(names, mean, color=colours[step], **style)
                axes.fill_between(names, low, high, color=colours[step], alpha=0.15, linewidth=0)
        if logs.is_logged(runs, "finetuned", f"{panel.metric}_null", classes):
            null = [logs.curve(runs, "finetuned", f"{panel.metric}_null", name, classes).mean[-1] for name in names]
            axes.plot(names, null, color=NOISE, **_DOTTED)
        if not panel.log:
            axes.set_ylim(0, 1)
        axes.tick_params(axis="x", rotation=35)
    title = f"Collapse by layer while MAML trains\n{_data(groups)}"
    handles = [Line2D([], [], color=c, linewidth=2.5, label=f"meta-step {step:,}") for step, c in colours.items()]
    handles += [Line2D([], [], color="#222222", label=model, **style) for model, style in MODEL_STYLES.items()]
    _frame(figure, title, _subtitle(groups, classes), [*handles, _NULL, _BAND], 5, _band_note(groups),
           "full collapse: trace and CDNV 0, accuracy 1; null: finetuned, at the end" + _lacking(LAYER_PANELS, groups))
    return figure


def _checkpoints(runs: Sequence[Run], classes: str) -> list[int]:
    """The measured steps nearest to CHECKPOINTS, as far as the runs go, and their last."""
    steps = logs.common_steps(runs, classes)
    if not steps:
        raise files.UserError(f"{runs[0].path} and its other seeds have no measured step in common; draw them apart")
    wanted = [step for step in CHECKPOINTS if step <= steps[-1]] + [steps[-1]]
    return sorted({logs.nearest(steps, step) for step in wanted})


def _checkpoint_colours(groups: Sequence[Sequence[Run]], classes: str) -> dict[int, tuple]:
    steps = sorted({step for runs in groups for step in _checkpoints(runs, classes)})
    return dict(zip(steps, matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(steps)))))


# ---- inner_steps: what adaptation does


def inner_steps_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Traces and accuracy after each inner step, before, early and late in training; settings side by side.

    Raises:
        UserError: no measurements, no such layer, or none after each inner step.
    """
    layer = _layer(groups[0], layer)
    classes = "heldout" if _has_heldout(groups) else "train"
    panels = (
        Panel("traces", f"traces, {layer}\n(squared units)", log=True),
        Panel("relative_within", f"relative within\ntrace, {layer}"),
        Panel("logits", "relative within\ntrace, logits"),
        Panel("accuracy", "accuracy"),
    )
    figure, cells = _panels(panels, groups, columns_alone=2, row_height=2.0)
    for axes, panel, runs in cells:
        if panel.log:
            _log_axis(axes)
        place = "logits" if panel.metric == "logits" else layer
        for moment, step in _moments(runs, classes).items():
            lines = {"traces": ("within", "between"), "logits": ("relative_within",)}.get(panel.metric, (panel.metric,))
            for quantity in lines:
                steps, mean, low, high = logs.inner_steps(runs, quantity, place, classes, step)
                colour = {"within": WITHIN, "between": BETWEEN}.get(quantity, "#222222")
                axes.plot(steps, mean, color=colour, marker="o", markersize=3, **MOMENTS[moment])
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if not panel.log:
            axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("inner step" if _is_at_bottom(axes) else "")
    moments = {name: {_moments(runs, classes).get(name) for runs in groups} - {None} for name in MOMENTS}
    title = f"What each inner step does\n{_data(groups)}"
    handles = [
        Line2D([], [], color=WITHIN, linewidth=2.5, label="within classes"),
        Line2D([], [], color=BETWEEN, linewidth=2.5, label="between classes"),
        *(Line2D([], [], color="#222222", label=f"{name}: meta-step {_either(steps)}", **MOMENTS[name])
          for name, steps in moments.items() if steps),
        _BAND,
    ]
    _frame(figure, title, _subtitle(groups, classes), handles, 3, _band_note(groups),
           "relative within trace here: of the mean traces")  # fmt: skip
    return figure


def _moments(runs: Sequence[Run], classes: str) -> dict[str, int]:
    """The measured steps that are called untrained, early and late; of two that are the same, the later name."""
    steps = logs.common_steps(runs, classes)
    early = logs.nearest(steps[1:] or steps, BEGINNING)
    named = {step: name for name, step in zip(MOMENTS, (steps[0], early, steps[-1]))}
    return {name: step for step, name in named.items()}


# ---- collapse_vs_accuracy


def collapse_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """CDNV against held-out error, a point a checkpoint of a run: all of them by step, the late ones by setting.

    Raises:
        UserError: no measurements on held-out tasks, no such layer, or CDNV or accuracy is missing.
    """
    layer = _layer(groups[0], layer)
    if not _has_heldout(groups):
        raise files.UserError(f"{groups[0][0].path} has no measurement on held-out tasks; let it run to its first")
    late = nc_statistics.LATE
    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI)
    by_step, by_setting = figure.subplots(1, 2)
    colours = PowerNorm(0.4, vmin=0, vmax=max(_last_step(runs) for runs in groups))
    handles = []
    for runs, marker, colour in zip(groups, itertools.cycle("o^sD"), itertools.cycle(LINES)):
        for run in runs:
            steps, cdnv, error = nc_statistics.collapse_and_error(run, layer)
            style = {"s": 24, "marker": marker, "linewidths": 0}
            drawn = by_step.scatter(cdnv, 100 * error, c=steps, cmap="viridis_r", norm=colours, **style)
            shown = steps >= late
            by_setting.scatter(cdnv[shown], 100 * error[shown], color=colour, alpha=0.75, **style)
        r, r_late = (_correlation(runs, layer, first) for first in (0, late))
        label = f"{_setting(runs)}: r = {r}; from step {late:,}: {r_late}"
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=label))
    for axes in (by_step, by_setting):
        _log_axis(axes, "x")
        _log_axis(axes, "y")
        axes.set_xlabel(f"CDNV of {layer}, finetuned")
    by_step.set_ylabel("error on held-out tasks (%)")
    by_step.set_title("all checkpoints, by meta-step", loc="left")
    for axis in (by_setting.xaxis, by_setting.yaxis):
        axis.set_major_locator(MaxNLocator(4))  # within a decade
    by_setting.set_title(f"from step {late:,}, by setting (zoomed)", loc="left")
    ticks = [step for step in CHECKPOINTS if step <= colours.vmax]
    bar = figure.colorbar(drawn, ax=[by_step, by_setting], location="bottom", aspect=60, pad=0.02, ticks=ticks)
    bar.ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bar.set_label("meta-step (left panel)")
    title = f"Collapse against accuracy while MAML trains\n{_data(groups)}, {_place(groups[0], layer)}"
    subtitle = f"a point: a checkpoint of a seed, {_tasks(groups, 'heldout')}, after all inner steps of training"
    _frame(figure, title, f"{_shape(groups)}\n{subtitle}\n{TRANSDUCTIVE}", handles, 1,
           "r: correlation of the logarithms over a seed's checkpoints, mean and 95% interval over seeds")  # fmt: skip
    return figure


def _correlation(runs: Sequence[Run], layer: str, first: int) -> str:
    values = [nc_statistics.correlation(run, layer, first) for run in runs]
    return nc_statistics.written(nc_statistics.correlations_over_seeds(values))


# ---- accuracy


def accuracy_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Validation accuracy against meta-steps, one line a setting.

    Raises:
        UserError: a layer was chosen, or a run was never validated.
    """
    if layer is not None:
        raise files.UserError("--layer doesn't go with --figure accuracy, which is of the whole network")
    figure = Figure(figsize=(WIDTH, 4.0), dpi=DPI)
    axes = figure.subplots()
    handles, counts = [], set()
    for runs, colour in zip(groups, itertools.cycle(LINES)):
        steps, mean, low, high = (100 * part if i else part for i, part in enumerate(logs.validation(runs)))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=colour, marker="o" if len(steps) < 40 else None, markersize=3.5, linewidth=1.6)
        label = f"{_setting(runs)}; {runs[0].settings.get('task_num', '?')} tasks a meta-step"
        handles.append(Line2D([], [], color=colour, linewidth=2.5, label=label))
        counts |= {row["tasks"] for run in runs for row in run.rows if row.get("kind") == "val"}
    _step_axis(axes, int(max(axes.dataLim.x1, 1)))
    axes.set_ylabel("accuracy on held-out classes (%)")
    settings = [runs[0].settings for runs in groups]
    queries, inner = (_either({one.get(name, "all") for one in settings}) for name in ("k_qry", "update_step_test"))
    _frame(figure, f"Validation accuracy while MAML trains\n{_data(groups)}",
           f"{_either(counts)} tasks of held-out classes, {queries} queries a class, after {inner} inner steps",
           handles, 1, _band_note(groups))  # fmt: skip
    return figure


# ---- what the figures share


def _layer(runs: Sequence[Run], layer: str | None) -> str:
    """The layer to draw: the last hidden one unless one is named.

    Raises:
        UserError: there is no such layer, or no measurement.
    """
    layers = logs.layers_of(runs[0])
    if layer is not None and layer not in layers:
        raise files.UserError(f"no layer {layer!r} in {runs[0].path}; --layer takes one of: {', '.join(layers)}")
    return layer or logs.last_hidden(runs[0])


def _panels(panels: Sequence[Panel], groups: Sequence[Sequence[Run]], columns_alone: int, row_height: float):
    """A figure with a row a panel and a column a setting, or one setting's panels in so many columns.

    Returns:
        The figure, and [(axes, panel, runs)].
    """
    alone = len(groups) == 1
    rows, columns = (math.ceil(len(panels) / columns_alone), columns_alone) if alone else (len(panels), len(groups))
    figure = Figure(figsize=(WIDTH, rows * row_height), dpi=DPI)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=False if alone else "row")
    cells = [(axes, *cell) for axes, cell in zip(grid.flat, itertools.product(panels, groups))]
    for axes, panel, runs in cells:
        if runs is groups[0]:
            axes.set_ylabel(panel.label)
        if not alone and panel is panels[0]:
            axes.set_title("\n".join([*logs.describe(runs[0]).split(", ", 1), _seeds(runs)]), fontsize=10.5)
    return figure, cells


def _frame(figure: Figure, title: str, subtitle: str, handles: Sequence, columns: int, *notes: str) -> None:
    """Enlarge the figure by a title above, and a legend and notes below its panels, where they cover nothing."""
    above = 0.3 + 0.28 * (1 + title.count("\n")) + 0.19 * (1 + subtitle.count("\n"))  # inches
    below = 0.35 + 0.215 * math.ceil(len(handles) / columns) + 0.19 * len(notes)
    height = above + figure.get_figheight() + below
    figure.set_size_inches(WIDTH, height)
    rect = (0.005, below / height, 0.985, 1 - (above + below) / height)
    figure.set_layout_engine("constrained", rect=rect, h_pad=0.07, w_pad=0.07)
    centred = {"ha": "center", "linespacing": 1.3}
    figure.text(0.5, 1 - 0.14 / height, title, va="top", fontsize=14, weight="bold", **centred)
    lines = 1 + title.count("\n")
    figure.text(0.5, 1 - (0.16 + 0.28 * lines) / height, subtitle, va="top", fontsize=10, **centred)
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=10,
                  bbox_to_anchor=(0.5, (0.04 + 0.19 * len(notes)) / height))  # fmt: skip
    figure.text(0.5, 0.08 / height, "\n".join(notes), va="bottom", fontsize=10, **centred)


def _draw(axes: Axes, found: Curve, colour: str, classes: str) -> None:
    """A curve with its band: training tasks solid; held-out ones thin, dashed, darker, on top."""
    line = {"color": colour, "linewidth": 1.5} if classes == "train" else {"color": DARKER[colour], **_DASHED}
    few = len(found.steps) < 12
    marker = "o" if few or classes == "heldout" else None  # a line alone would hide how far apart the points are
    shade = 0.25 if classes == "train" else 0.12
    axes.fill_between(found.steps, found.low, found.high, color=colour, alpha=shade, linewidth=0)
    axes.plot(found.steps, found.mean, marker=marker, markersize=3.5 if few else 2, **line)


def _step_axis(axes: Axes, last: int) -> None:
    columns = axes.get_subplotspec().get_gridspec().ncols
    span = axes.get_subplotspec().colspan
    axes.set_xlim(0, last * 1.02)
    axes.set_xlabel("meta-step")
    axes.xaxis.set_major_locator(MaxNLocator({1: 8, 2: 5}.get(columns // (span.stop - span.start), 3)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _log_step_axis(axes: Axes, last: int) -> None:
    """Meta-steps, logarithmic from 100 on and linear before, so that step 0 has its place."""
    axes.set_xscale("symlog", linthresh=100, linscale=0.4)
    axes.set_xlim(0, last * 1.05)
    axes.set_xlabel("meta-step" if _is_at_bottom(axes) else "")
    axes.set_xticks([0, *(step for step in (100, 300, 1_000, 3_000, 10_000, 30_000) if step <= last)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _is_at_bottom(axes: Axes) -> bool:
    return axes.get_subplotspec().is_last_row()


def _log_axis(axes: Axes, which: str = "y") -> None:
    """Logarithmic, with ticks at 1, 2 and 5 in plain figures."""
    getattr(axes, f"set_{which}scale")("log", nonpositive="clip")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _class_handles(heldout: bool) -> list[Line2D]:
    if not heldout:
        return []
    return [
        Line2D([], [], color="#222222", linewidth=1.5, label="training tasks"),
        Line2D([], [], color="#222222", label="held-out tasks (darker)", **_DASHED),
    ]


def _band_note(groups: Sequence[Sequence[Run]]) -> str:
    """What the band is: of seeds, or of tasks where there is a single run."""
    counts = {len(runs) for runs in groups}
    tasks = "over tasks: mean \u00b1 1.96 standard errors of a measurement's tasks"
    if counts == {1}:
        return f"95% band {tasks}"
    seeds = f"over seeds: t interval of the mean of {_either(counts - {1})} seeds"
    return f"95% band {seeds}" + (f" (a single seed: {tasks})" if 1 in counts else "")


def _lacking(panels: Sequence[Panel], groups: Sequence[Sequence[Run]]) -> str:
    """What a note says of nulls that aren't in the logs."""
    nulls = [logs.is_logged(runs, "finetuned", f"{panel.metric}_null") for panel in panels for runs in groups]
    return "" if all(nulls) else "; no null is drawn where the log has none"


def _has_heldout(groups: Sequence[Sequence[Run]]) -> bool:
    return all(logs.common_steps(runs, "heldout") for runs in groups)


def _last_step(runs: Sequence[Run]) -> int:
    return max(step for classes in ("train", "heldout") for step in [0, *logs.common_steps(runs, classes)])


def _place(runs: Sequence[Run], layer: str) -> str:
    return f"layer {layer}" + (" (last hidden layer)" if layer == logs.last_hidden(runs[0]) else "")


def _data(groups: Sequence[Sequence[Run]]) -> str:
    return _either({runs[0].data["name"] for runs in groups})


def _setting(runs: Sequence[Run]) -> str:
    return f"{logs.describe(runs[0])}, {_seeds(runs)}"


def _seeds(runs: Sequence[Run]) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def _shape(groups: Sequence[Sequence[Run]]) -> str:
    """The setting, if there is one alone, and the queries."""
    queries = f"{_either({runs[0].settings['k_qry'] for runs in groups})} queries a class"
    return f"{_setting(groups[0])}; {queries}" if len(groups) == 1 else queries


def _subtitle(groups: Sequence[Sequence[Run]], *classes: str) -> str:
    return f"{_shape(groups)}; each measurement: {_tasks(groups, *classes)}\n{TRANSDUCTIVE}"


def _tasks(groups: Sequence[Sequence[Run]], *classes: str) -> str:
    """How many tasks a measurement has: "8 training tasks or 100 held-out tasks"."""
    names = {"train": "training tasks", "heldout": "held-out tasks"}
    chosen = [one for one in classes or names if one == "train" or _has_heldout(groups)]
    return " or ".join(f"{_either({logs.tasks_of(runs, one) for runs in groups})} {names[one]}" for one in chosen)


def _either(values: set) -> str:
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(values, key=str))


# ---- the program

FIGURES = {  # what --figure takes: the function, and the name of its picture
    "traces": (traces_figure, "result.png"),
    "nc": (nc_figure, "nc.png"),
    "layers": (layers_figure, "layers.png"),
    "inner_steps": (inner_steps_figure, "inner_steps.png"),
    "collapse_vs_accuracy": (collapse_figure, "collapse_vs_accuracy.png"),
    "accuracy": (accuracy_figure, "accuracy.png"),
}


class Picture(NamedTuple):
    """What is drawn of which runs, and where it goes."""

    figure: str
    groups: list[list[Run]]
    path: Path


def committed_pictures() -> list[Picture]:
    """Every figure of the README, of the study's runs in res/; accuracy.png of all Omniglot runs there.

    Raises:
        UserError: there are none, or one is broken.
    """
    res = HERE / "res"
    study = nc_statistics.committed_study(res)
    omniglot = [runs for runs in study if runs[0].data["name"] == "Omniglot"] or study[:1]
    pictures = [Picture("traces", study[:1], HERE / "result.png")]
    pictures += [Picture(name, omniglot, res / FIGURES[name][1])
                 for name in ("nc", "layers", "inner_steps", "collapse_vs_accuracy")]  # fmt: skip
    pictures += [Picture("nc", [runs], res / "photographs.png") for runs in study if runs not in omniglot]
    everything = logs.grouped(sorted({log.parent for log in res.glob("*/log.jsonl*")}))
    compared = [runs for runs in everything if runs[0].data["name"] == omniglot[0][0].data["name"]]
    return [*pictures, Picture("accuracy", compared, res / "accuracy.png")]


def draw(picture: Picture, layer: str | None) -> None:
    """Draw the picture, write it, say where it is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same picture whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        drawn = FIGURES[picture.figure][0](picture.groups, layer)
        with files.atomic(picture.path) as file:
            drawn.savefig(file, format="png", metadata={"Software": None})  # same input, same bytes
    runs = [run for group in picture.groups for run in group]
    print(f"wrote {picture.path}: {len(runs)} run(s), {_data(picture.groups)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs that the command line names, draw them, write the pictures, say where they are."""
    parser = files.Parser(
        description="Draw neural collapse against meta-steps from training logs.",
        epilog="With no RUN: rewrite the README's figures from the logs committed under res/.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder or log; several: seeds, settings")
    parser.add_argument("--figure", choices=FIGURES, help="default: traces of the RUNs; with no RUN, all figures")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="PNG to write (default: in the first RUN)")
    parser.add_argument("--layer", metavar="NAME", help="layer to draw (default: the last hidden layer)")
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.suffix.lower() != ".png":
        raise files.UserError(f"{options.output}: pictures are PNG files; name one that ends in .png")

    if options.runs:
        name = options.figure or "traces"
        groups = logs.grouped(options.runs)
        pictures = [Picture(name, groups, groups[0][0].path / FIGURES[name][1])]
    else:
        pictures = [one for one in committed_pictures() if options.figure in (None, one.figure)]
    if options.output is not None:
        if len(pictures) > 1:
            raise files.UserError("-o takes one picture: name a RUN, or a --figure of which there is one")
        pictures = [pictures[0]._replace(path=options.output)]
    for picture in pictures:
        if picture.figure != "accuracy":
            _note_unequal(picture.groups)
        draw(picture, options.layer)


def _note_unequal(groups: Sequence[Sequence[Run]]) -> None:
    for runs in groups:
        ends = [max(logs.measurements(run, "train"), default=0) for run in runs]
        if min(ends) < max(ends):
            shortest = runs[ends.index(min(ends))].path
            print(f"note: drawn up to meta-step {min(ends):,}, where {shortest} ends", file=sys.stderr)


if __name__ == "__main__":
    files.run(main)
