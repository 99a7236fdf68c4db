"""The figures that plot_nc.py draws: runs in, a matplotlib figure out.

Each function takes runs in groups, the seeds of one setting in a group, and the layer to draw (default: the last
hidden one). Every quantity is that of query features, task by task (nc_metrics.py says which formula). The band is a
t interval over seeds; for a single run it is the mean over tasks and 1.96 standard errors to each side. A measurement
on training tasks has few of them, so the curves of training tasks are smoothed: curves.smoothed says how.
"""

import itertools
from typing import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

import curves
import drawing
import effects
import files
import nc_statistics
import runs as logs
from curves import Curve
from drawing import Panel
from runs import Run

EARLY_STEPS = 7_500  # the original's first figure: 3 epochs of 2,500 meta-steps
CHECKPOINTS = (0, 250, 500, 1_500, 6_000, 15_000, 60_000)  # of the figure by layer, as far as a run goes
BEGINNING = 250  # meta-steps: "early" in the figure of inner steps

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
    logs.refuse_differing([runs[0] for runs in groups])
    (runs,) = groups
    layer = drawing.chosen_layer(runs, layer)
    figure = Figure(figsize=(drawing.WIDTH, 10.6), dpi=drawing.DPI)
    grid = figure.add_gridspec(4, 2, height_ratios=[1.1, 0.9, 1, 1])
    early, early_share = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])
    panels = {
        model: (figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1]))
        for row, model in enumerate(("meta", "finetuned"), start=2)
    }

    lines = _trace_curves(runs, layer)
    if not any(np.isfinite(c.mean).any() for (_, _, classes), c in lines.items() if classes == "train"):
        raise files.UserError(
            f"{runs[0].path}: no finite trace at layer {layer}; traces need two queries a class or more"
        )
    last = max(int(c.steps[-1]) for c in lines.values())
    first_steps = min(EARLY_STEPS, last)
    wide = _spans_decades([c for (_, metric, _), c in lines.items() if metric in ("within", "between")])
    noise = curves.noise_share(int(runs[0].settings["n_way"]), int(runs[0].settings["k_qry"]))

    _draw_traces(early, lines, "meta", wide, until=first_steps)
    drawing.fit_to_lines([early], wide)
    early.set_title(f"Meta model, first {first_steps:,} meta-steps: traces", loc="left")
    _draw_shares(early_share, lines, "meta", noise, ("within",), until=first_steps)
    early_share.set_title("Meta model, same steps: relative within trace", loc="left")
    for model, (traces, shares) in panels.items():
        name = {"meta": "Meta model", "finetuned": "Finetuned"}[model]
        _draw_traces(traces, lines, model, wide, until=last)
        traces.set_title(f"{name}, whole run: traces", loc="left")
        _draw_shares(shares, lines, model, noise, ("within", "between"), until=last)
        shares.set_title(f"{name}, whole run: relative traces", loc="left")
    # one scale, so that before and after adaptation can be compared
    drawing.fit_to_lines([traces for traces, _ in panels.values()], wide)

    handles = [
        Line2D([], [], color=drawing.WITHIN, linewidth=2.5, label="within classes"),
        Line2D([], [], color=drawing.BETWEEN, linewidth=2.5, label="between classes"),
        *drawing.class_handles(any(classes == "heldout" for _, _, classes in lines)),
        Line2D([], [], color=drawing.NOISE, linestyle=":", linewidth=1.6, label=f"within, pure noise: {noise:.3f}"),
        drawing.BAND,
    ]
    drawing.frame(figure, *captions(runs, layer), handles, 3, drawing.band_note(groups), drawing.SMOOTH_NOTE)
    return figure


def captions(runs: Sequence[Run], layer: str) -> tuple[str, str]:
    """Title and subtitle: data set ("synthetic" if it is), layer, task shape, tasks a measurement, seeds."""
    settings = runs[0].settings
    title = f"Class traces while MAML trains\n{runs[0].data['name']}, {drawing.layer_words(runs, layer)}"
    net = f", {settings['net']} network" if settings.get("net") == "paper" else ""
    shape = f"{logs.describe(runs[0])}{net}, {settings['k_qry']} queries a class"
    measured = f"each measurement: {drawing.task_words([runs])}; {drawing.seed_words(runs)}"
    return title, f"{shape}\n{measured}\n{drawing.TRANSDUCTIVE}"


def _trace_curves(runs: Sequence[Run], layer: str) -> dict[tuple[str, str, str], Curve]:
    """The figure's curves by (model, metric, classes); the relative between trace is 1 - the within one."""
    lines = {}
    for classes, model, metric in itertools.product(
        ("train", "heldout"), ("meta", "finetuned"), ("within", "between", "relative_within")
    ):
        found = curves.metric_curve(runs, model, metric, layer, classes, smooth=classes == "train")
        if found is None:
            continue
        lines[model, metric, classes] = found
        if metric == "relative_within":
            steps, mean, low, high = found
            lines[model, "relative_between", classes] = Curve(steps, 1 - mean, 1 - high, 1 - low)
    if not any(classes == "train" for _, _, classes in lines):
        raise files.UserError("the runs have no measured step in common; draw them apart")
    return lines


def _spans_decades(lines: list[Curve]) -> bool:
    """Whether traces need a logarithmic axis: all positive, the largest over thirty times the smallest."""
    values = np.concatenate([c.mean[np.isfinite(c.mean)] for c in lines])
    return bool(values.size and values.min() > 0 and values.max() > 30 * values.min())


def _draw_traces(axes: Axes, lines: dict, model: str, wide: bool, until: int) -> None:
    if wide:
        drawing.log_axis(axes)
    for metric, colour in (("within", drawing.WITHIN), ("between", drawing.BETWEEN)):
        _draw_both(axes, lines, model, metric, colour, until)
    axes.set_ylabel("trace" + (", log scale" if wide else "") + "\n(squared feature units)")
    drawing.step_axis(axes, until)


def _draw_shares(
    axes: Axes, lines: dict, model: str, noise: float, parts: Sequence[str], until: int
) -> None:
    axes.axhline(noise, color=drawing.NOISE, linestyle=":", linewidth=1.6)
    for part in parts:
        colour = drawing.WITHIN if part == "within" else drawing.BETWEEN
        _draw_both(axes, lines, model, f"relative_{part}", colour, until)
    axes.set_ylabel("share of total trace")
    axes.set_ylim(0, 1)
    drawing.step_axis(axes, until)


def _draw_both(axes: Axes, lines: dict, model: str, metric: str, colour: str, until: int) -> None:
    """One quantity up to step `until`, on training tasks and on held-out ones."""
    for classes in ("train", "heldout"):
        found = lines.get((model, metric, classes))
        if found is not None:
            drawing.draw_curve(axes, Curve(*(part[found.steps <= until] for part in found)), colour, classes)


# ---- nc: NC1 to NC4 and CDNV


def nc_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Every metric against meta-steps, with its null; settings side by side.

    Raises:
        UserError: no measurements, no such layer, or a metric is missing.
    """
    layer = drawing.chosen_layer(groups[0], layer)
    most = "heldout" if drawing.has_heldout(groups) else "train"  # more tasks, so a smoother null
    figure, cells = drawing.panel_grid(NC_PANELS, groups, columns_alone=2, row_height=1.75)
    for axes, panel, runs in cells:
        if panel.log:
            drawing.log_axis(axes)
        for model, colour in drawing.MODELS.items():
            for classes in ("train", "heldout"):
                found = curves.metric_curve(runs, model, panel.metric, layer, classes, smooth=classes == "train")
                if found is not None:
                    drawing.draw_curve(axes, found, colour, classes)
            if logs.is_logged(runs, model, f"{panel.metric}_null", most):
                null = curves.metric_curve(runs, model, f"{panel.metric}_null", layer, most)
                axes.plot(null.steps, null.mean, color=colour, **drawing.DOTTED)
        drawing.log_step_axis(axes, drawing.last_step(runs))
    for panel in NC_PANELS:
        drawing.fit_to_lines([axes for axes, drawn, _ in cells if drawn is panel], panel.log)
    where = f"{drawing.data_names(groups)}, {drawing.layer_words(groups[0], layer)}"
    models = [Line2D([], [], color=colour, linewidth=2.5, label=model) for model, colour in drawing.MODELS.items()]
    handles = [*models, *drawing.class_handles(drawing.has_heldout(groups)), drawing.NULL, drawing.BAND]
    note = f"full collapse is 0 in every panel{drawing.lacking(NC_PANELS, groups)}"
    title, words = f"Neural collapse while MAML trains\n{where}", drawing.measurement_words(groups, "train", "heldout")
    drawing.frame(figure, title, words, handles, 3, drawing.band_note(groups), drawing.SMOOTH_NOTE, note)
    return figure


# ---- layers: intermediate collapse


def layers_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Collapse by layer, one line a checkpoint; settings side by side. There is no `layer` to choose.

    Raises:
        UserError: a layer was chosen, no measurements, or a metric is missing.
    """
    if layer is not None:
        raise files.UserError("--layer doesn't go with --figure layers, which draws all of them")
    classes = "heldout" if drawing.has_heldout(groups) else "train"
    colours = _checkpoint_colours(groups, classes)
    figure, cells = drawing.panel_grid(LAYER_PANELS, groups, columns_alone=3, row_height=2.5)
    for axes, panel, runs in cells:
        names = logs.layers_of(runs[0])
        if panel.log:
            drawing.log_axis(axes)
        for model, style in drawing.MODEL_STYLES.items():
            by_layer = [curves.metric_curve(runs, model, panel.metric, name, classes) for name in names]
            for step in _checkpoints(runs, classes):
                at = by_layer[0].steps.tolist().index(step)
                mean, low, high = np.array([[c.mean[at], c.low[at], c.high[at]] for c in by_layer]).T
                axes.plot(names, mean, color=colours[step], **style)
                axes.fill_between(names, low, high, color=colours[step], alpha=0.15, linewidth=0)
        if logs.is_logged(runs, "finetuned", f"{panel.metric}_null", classes):
            nulls = [curves.metric_curve(runs, "finetuned", f"{panel.metric}_null", name, classes) for name in names]
            axes.plot(names, [null.mean[-1] for null in nulls], color=drawing.NOISE, **drawing.DOTTED)
        if not panel.log:
            axes.set_ylim(0, 1)
        axes.tick_params(axis="x", rotation=35)
    title = f"Collapse by layer while MAML trains\n{drawing.data_names(groups)}"
    handles = [Line2D([], [], color=c, linewidth=2.5, label=f"meta-step {step:,}") for step, c in colours.items()]
    handles += [Line2D([], [], color="#222222", label=model, **style) for model, style in drawing.MODEL_STYLES.items()]
    handles += [drawing.NULL, drawing.BAND]
    note = "full collapse: trace and CDNV 0, accuracy 1; null: finetuned, at the end"
    note += drawing.lacking(LAYER_PANELS, groups)
    words = drawing.measurement_words(groups, classes)
    drawing.frame(figure, title, words, handles, 5, drawing.band_note(groups), note)
    return figure


def _checkpoints(runs: Sequence[Run], classes: str) -> list[int]:
    """The measured steps nearest to CHECKPOINTS, as far as the runs go, and their last."""
    steps = _measured_together(runs, classes)
    wanted = [step for step in CHECKPOINTS if step <= steps[-1]] + [steps[-1]]
    return sorted({logs.nearest(steps, step) for step in wanted})


def _measured_together(runs: Sequence[Run], classes: str) -> list[int]:
    """The measured steps that all these runs have.

    Raises:
        UserError: there is none.
    """
    steps = logs.common_steps(runs, classes)
    if not steps:
        raise files.UserError(f"{runs[0].path} and its other seeds have no measured step in common; draw them apart")
    return steps


def _checkpoint_colours(groups: Sequence[Sequence[Run]], classes: str) -> dict[int, tuple]:
    steps = sorted({step for runs in groups for step in _checkpoints(runs, classes)})
    return dict(zip(steps, matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(steps)))))


# ---- inner_steps: what adaptation does


def inner_steps_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Traces and accuracy after each inner step, before, early and late in training; settings side by side.

    Raises:
        UserError: no measurements, no such layer, or none after each inner step.
    """
    layer = drawing.chosen_layer(groups[0], layer)
    classes = "heldout" if drawing.has_heldout(groups) else "train"
    panels = (
        Panel("traces", f"traces, {layer}\n(squared units)", log=True),
        Panel("relative_within", f"relative within\ntrace, {layer}"),
        Panel("logits", "relative within\ntrace, logits"),
        Panel("accuracy", "accuracy"),
    )
    figure, cells = drawing.panel_grid(panels, groups, columns_alone=2, row_height=2.0)
    for axes, panel, runs in cells:
        if panel.log:
            drawing.log_axis(axes)
        place = "logits" if panel.metric == "logits" else layer
        for moment, step in _moments(runs, classes).items():
            lines = {"traces": ("within", "between"), "logits": ("relative_within",)}.get(panel.metric, (panel.metric,))
            for quantity in lines:
                steps, mean, low, high = curves.inner_curve(runs, quantity, place, classes, step)
                colour = {"within": drawing.WITHIN, "between": drawing.BETWEEN}.get(quantity, "#222222")
                axes.plot(steps, mean, color=colour, marker="o", markersize=3, **drawing.MOMENTS[moment])
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if not panel.log:
            axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("inner step" if drawing.is_at_bottom(axes) else "")
    moments = {name: {_moments(runs, classes).get(name) for runs in groups} - {None} for name in drawing.MOMENTS}
    title = f"What each inner step does\n{drawing.data_names(groups)}"
    handles = [
        Line2D([], [], color=drawing.WITHIN, linewidth=2.5, label="within classes"),
        Line2D([], [], color=drawing.BETWEEN, linewidth=2.5, label="between classes"),
        *(Line2D([], [], color="#222222", label=f"{name}: meta-step {logs.either(steps)}", **drawing.MOMENTS[name])
          for name, steps in moments.items() if steps),
        drawing.BAND,
    ]
    words, note = drawing.measurement_words(groups, classes), "relative within trace here: of the mean traces"
    drawing.frame(figure, title, words, handles, 3, drawing.band_note(groups), note)
    return figure


def _moments(runs: Sequence[Run], classes: str) -> dict[str, int]:
    """The measured steps that are called untrained, early and late; of two that are the same, the later name."""
    steps = logs.common_steps(runs, classes)
    early = logs.nearest(steps[1:] or steps, BEGINNING)
    named = {step: name for name, step in zip(drawing.MOMENTS, (steps[0], early, steps[-1]))}
    return {name: step for step, name in named.items()}


# ---- collapse_vs_accuracy


def collapse_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """CDNV against held-out error, a point a checkpoint of a run: all of them by step, the late ones by setting.

    Raises:
        UserError: no measurements on held-out tasks, no such layer, or CDNV or accuracy is missing.
    """
    layer = drawing.chosen_layer(groups[0], layer)
    if not drawing.has_heldout(groups):
        raise files.UserError(f"{groups[0][0].path} has no measurement on held-out tasks; let it run to its first")
    late = effects.LATE
    figure = Figure(figsize=(drawing.WIDTH, 4.6), dpi=drawing.DPI)
    by_step, by_setting = figure.subplots(1, 2)
    colours = PowerNorm(0.4, vmin=0, vmax=max(drawing.last_step(runs) for runs in groups))
    handles = []
    for runs, marker, colour in zip(groups, itertools.cycle("o^sD"), itertools.cycle(drawing.LINES)):
        for run in runs:
            steps, cdnv, error = effects.collapse_and_error(run, layer)
            style = {"s": 24, "marker": marker, "linewidths": 0}
            drawn = by_step.scatter(cdnv, 100 * error, c=steps, cmap="viridis_r", norm=colours, **style)
            shown = steps >= late
            by_setting.scatter(cdnv[shown], 100 * error[shown], color=colour, alpha=0.75, **style)
        r, r_late, r_beside = (_correlation(runs, layer, *how) for how in ((0,), (late,), (late, True)))
        label = f"r = {r}; from step {late:,}: {r_late}, beside the trend: {r_beside}"
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=drawing.setting_words(runs)))
        handles.append(Line2D([], [], linestyle="none", label=label))
    for axes in (by_step, by_setting):
        drawing.log_axis(axes, "x")
        drawing.log_axis(axes, "y")
        axes.set_xlabel(f"CDNV of {layer}, finetuned")
    by_step.set_ylabel("error on held-out tasks (%)")
    by_step.set_title("all checkpoints, by meta-step", loc="left")
    if not any(len(points.get_offsets()) for points in by_setting.collections):
        by_setting.set(xticks=[], yticks=[], xlabel="no checkpoint that late")
    else:
        for axis in (by_setting.xaxis, by_setting.yaxis):
            low, high = axis.get_view_interval()
            if high < 5 * low:  # too narrow for ticks at 1, 2 and 5
                axis.set_major_locator(MaxNLocator(4))
    by_setting.set_title(f"from step {late:,}, by setting (zoomed)", loc="left")
    ticks = [*(step for step in CHECKPOINTS if step < 0.8 * colours.vmax), colours.vmax]
    bar = figure.colorbar(drawn, ax=[by_step, by_setting], location="bottom", aspect=60, pad=0.02, ticks=ticks)
    bar.ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bar.set_label("meta-step (left panel)")
    where = f"{drawing.data_names(groups)}, {drawing.layer_words(groups[0], layer)}"
    tasks = drawing.task_words(groups, "heldout")
    points = f"a point: a checkpoint of a seed, {tasks}, after the inner steps of training"
    subtitle = f"{drawing.setting_and_queries(groups)}\n{points}\n{drawing.TRANSDUCTIVE}"
    notes = ("r: correlation of the logarithms over a seed's checkpoints, mean and 95% interval over seeds",
             "beside the trend: of what each leaves beside its own straight line in log step")  # fmt: skip
    drawing.frame(figure, f"Collapse against accuracy while MAML trains\n{where}", subtitle, handles, 1, *notes)
    return figure


def _correlation(runs: Sequence[Run], layer: str, first: int, detrended: bool = False) -> str:
    values = [effects.correlation(run, layer, first, detrended) for run in runs]
    return nc_statistics.written(effects.correlations_over_seeds(values))


# ---- original: what the original measured, and what it should have


def original_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """The relative within trace of the logits, by the original's class means and by the labels; settings side by side.

    Raises:
        UserError: a layer was chosen, no measurements, or the original's measure isn't logged.
    """
    if layer is not None:
        raise files.UserError("--layer doesn't go with --figure original, which is of the logits: all that it measured")
    panels = [Panel(model, f"{model} model:\nrelative within trace") for model in drawing.MODELS]
    figure, cells = drawing.panel_grid(panels, groups, columns_alone=2, row_height=2.5)
    kinds = {"_original": (drawing.BETWEEN, "as the original measured"), "": (drawing.WITHIN, "by label")}
    for axes, panel, runs in cells:
        _measured_together(runs, "train")
        for suffix, (colour, _) in kinds.items():
            found = curves.share_curve(runs, panel.metric, suffix, logs.layers_of(runs[0])[-1])
            drawing.draw_curve(axes, found, colour, "train")
        settings = runs[0].settings
        noise = curves.noise_share(settings["n_way"], settings["k_qry"])
        axes.axhline(noise, color=drawing.NOISE, linestyle=":", linewidth=1.6)
        axes.set_ylim(0, 1)
        drawing.log_step_axis(axes, drawing.last_step(runs))
    handles = [Line2D([], [], color=colour, linewidth=2.5, label=label) for colour, label in kinds.values()]
    handles.append(Line2D([], [], color=drawing.NOISE, linestyle=":", linewidth=1.6, label="pure noise, by label"))
    handles.append(drawing.BAND)
    title = f"What the original measured, and what was there\n{drawing.data_names(groups)}, logits, the same features"
    words = drawing.measurement_words(groups, "train")
    note = "as the original measured: class means over consecutive groups of five rows, whatever their labels"
    bands = drawing.band_note(groups, of_one="none")
    drawing.frame(figure, title, words, handles, 4, bands, drawing.SMOOTH_NOTE, note)
    return figure


# ---- accuracy


def accuracy_figure(groups: Sequence[Sequence[Run]], layer: str | None = None) -> Figure:
    """Validation accuracy against meta-steps, one line a setting.

    Raises:
        UserError: a layer was chosen, or a run was never validated.
    """
    if layer is not None:
        raise files.UserError("--layer doesn't go with --figure accuracy, which is of the whole network")
    figure = Figure(figsize=(drawing.WIDTH, 4.0), dpi=drawing.DPI)
    axes = figure.subplots()
    handles, counts = [], set()
    for runs, colour in zip(groups, itertools.cycle(drawing.LINES)):
        steps, mean, low, high = (100 * part if i else part for i, part in enumerate(curves.validation_curve(runs)))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=colour, marker="o" if len(steps) < 40 else None, markersize=3.5, linewidth=1.6)
        label = f"{drawing.setting_words(runs)}; {runs[0].settings.get('task_num', '?')} tasks a meta-step"
        handles.append(Line2D([], [], color=colour, linewidth=2.5, label=label))
        counts |= logs.validation_task_counts(runs)
    drawing.step_axis(axes, int(max(axes.dataLim.x1, 1)))
    axes.set_ylabel("accuracy on held-out classes (%)")
    settings = [runs[0].settings for runs in groups]
    queries, inner = (logs.either({one.get(name, "all") for one in settings}) for name in ("k_qry", "update_step_test"))
    title = f"Validation accuracy while MAML trains\n{drawing.data_names(groups)}"
    words = f"{logs.either(counts)} tasks of held-out classes, {queries} queries a class, after {inner} inner steps"
    drawing.frame(figure, title, words, handles, 1, drawing.band_note(groups))
    return figure
