"""Figures of runs: groups of seeds in, a matplotlib figure out; plot_nc.py is the program.

One palette for settings and learners; solid lines after adaptation, dashed before it; thin lines are single seeds,
thick ones their mean. A measurement has few training tasks, so their curves are means over the steps within 10%.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from study import effects, tables
from study.logs import Run, Study, UserError, describe, write_bytes
from study.run import SETTINGS

Group = list[Run]
Curve = Callable[[Run], tuple]  # steps, values and perhaps half of a 95% interval over tasks, each [S]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
GREY, DARK = "#777777", "#333333"
STYLES = {"finetuned": "-", "meta": (0, (4, 2))}
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "legend.frameon": False,
         "legend.fontsize": 8, "axes.titlelocation": "left", "lines.solid_capstyle": "butt"}  # fmt: skip
WIDTH, DPI = 9.0, 160  # inches, dots per inch: a picture shown about 900 pixels wide stays sharp

LABELS = {"relative_within": "relative within trace", "nc1": "tr(S$_W$S$_B^+$)/C", "cdnv_unbiased": "CDNV, unbiased",
          "etf_error": "NC2: ETF error", "self_duality": "NC3: self-duality", "ncc_mismatch": "NC4: mismatch",
          "directional_cdnv": "directional CDNV"}  # fmt: skip
LOGARITHMIC = {"nc1", "cdnv_unbiased", "directional_cdnv"}


# ---- parts


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, which is small; same input, same bytes."""
    buffer, target = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    Image.open(buffer).convert("RGB").quantize(40, dither=Image.Dither.NONE).save(target, "PNG", optimize=True)
    write_bytes(path, target.getvalue())


def colours(groups: Sequence[Group]) -> list[tuple[Group, str, str]]:
    """Each group with its colour and what the legend calls it."""
    by_name = {setting.name: setting.label for setting in SETTINGS.values()}
    labels = [by_name.get(group[0].path.name.rpartition("-seed")[0], describe(group[0])) for group in groups]
    return [(group, PALETTE[i % len(PALETTE)], label) for i, (group, label) in enumerate(zip(groups, labels))]


def draw(axes: Axes, group: Group, curve: Curve, colour: str, style="-", smooth: bool = False) -> None:
    """A thin line per seed and a thick one of their mean, at the steps that all have; of a single seed, with a band."""
    curves = []
    for run in group:
        steps, values, *half = curve(run)
        if not len(steps):
            return
        values, *half = (effects.smoothed(steps, one) if smooth else one for one in (values, *half))
        curves.append(dict(zip(steps, values)))
        if len(group) == 1 and half:
            axes.fill_between(steps, values - half[0], values + half[0], color=colour, alpha=0.15, linewidth=0)
    steps = sorted(set.intersection(*map(set, curves)))
    marker = "o" if len(steps) < 12 else None  # a line alone would hide how few the points are
    if len(group) > 1:
        for one in curves:
            axes.plot(one.keys(), one.values(), color=colour, linestyle=style, linewidth=0.6, alpha=0.5)
    mean = [np.mean([one[step] for one in curves]) for step in steps]
    axes.plot(steps, mean, color=colour, linestyle=style, linewidth=1.6, marker=marker, markersize=3)


def of_metric(split: str, model: str, metric: str, layer: str | None = None, scale: float = 1) -> Curve:
    def curve(run: Run) -> tuple:
        steps, mean, se = effects.series(run, split, model, metric, layer or effects.HIDDEN)
        return steps, scale * mean, 1.96 * scale * se

    return curve


def of_accuracy(split: str) -> Curve:
    """In percent, by the classifier after the inner steps of training."""
    def curve(run: Run) -> tuple:
        steps, values = run.along_inner_loop(split, "accuracy")
        return steps, 100 * values[:, -1] if len(steps) else values

    return curve


def step_axis(axes: Axes, groups: Sequence[Group]) -> None:
    """Meta-steps, logarithmic from 100 on and linear before, so that step 0 has its place."""
    last = max(run.last_step for group in groups for run in group)
    axes.set_xlabel("meta-step")
    axes.set_xlim(0, max(last, 1) * 1.04)
    if last > 300:
        axes.set_xscale("symlog", linthresh=100, linscale=0.5)
        ticks = [step for step in (100, 300, 1_000, 3_000, 6_000, 10_000, 20_000, 60_000) if step <= last]
        ticks = [step for i, step in enumerate(ticks) if not any(0.5 * later <= step for later in ticks[i + 1:])]
        axes.xaxis.set_major_locator(FixedLocator([0, *ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}")


def fit(axes: Axes, log: bool = False) -> None:
    """A range around the lines; a panel in which nothing is defined says so."""
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), float) for line in axes.get_lines())])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not values.size:
        axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
        return
    if log:
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 1.4, values.max() * 1.4)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(min(0, values.min() * 1.05), values.max() * 1.08 or 1)


def key(label: str, colour: str = DARK, **style) -> Line2D:
    return Line2D([], [], color=colour, label=label, **style)


def keys(groups: Sequence[Group], *others: Line2D, models: bool = False) -> list[Line2D]:
    """The legend of settings, and of the models' lines."""
    lines = [key(tables.MODELS[model], linestyle=style) for model, style in STYLES.items() if models]
    return [*(key(label, colour, linewidth=2.2) for _, colour, label in colours(groups)), *lines, *others]


def frame(rows: int, columns: int, height: float, legend: Sequence[Line2D], **options) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns panels with one legend below them."""
    per_row = min(len(legend), 4)
    below = 0.08 + 0.19 * math.ceil(len(legend) / per_row)
    figure = Figure(figsize=(WIDTH, height + below))
    share = below / (height + below)
    figure.set_layout_engine("constrained", rect=(0.003, share, 0.994, 1 - share))
    figure.legend(handles=legend, loc="lower center", ncols=per_row)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def reference(axes: Axes, level: float, label: str) -> None:
    axes.axhline(level, color=GREY, linestyle="-.", linewidth=0.9)
    axes.text(0.98, level + 0.01, label, transform=axes.get_yaxis_transform(), ha="right", fontsize=8, color=GREY)


def common_split(groups: Sequence[Group]) -> str:
    """Held-out tasks where all runs have measured them, as they are many; else training tasks."""
    return "heldout" if all(run.rows["heldout"] for group in groups for run in group) else "train"


def zoom_on_accuracy(axes: Axes) -> None:
    """88 to 100%, where that is what matters, from meta-step 100 on."""
    if axes.get_ylim()[1] > 98:
        axes.set(ylim=(88, 100), xlim=(100, None))


# ---- of any runs


def traces(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """The original's panels: traces within and between classes, and the share within, before and after adaptation."""
    if len(groups) > 1:
        raise UserError("--figure traces takes the seeds of one setting; name other settings in a call of their own")
    (group,), run = groups, groups[0][0]
    kinds = {"within": PALETTE[0], "between": PALETTE[1]}
    legend = [key(f"{name} classes", colour, linewidth=2.2) for name, colour in kinds.items()]
    figure, panels = frame(2, 2, 4.6, [*legend, key("training tasks"), key("held-out tasks", linestyle=":")])
    for (left, right), model in zip(panels, ("meta", "finetuned")):
        for split, style in (("train", "-"), ("heldout", ":")):
            smooth = split == "train"
            for kind, colour in kinds.items():
                draw(left, group, of_metric(split, model, kind, layer), colour, style, smooth)
            draw(right, group, of_metric(split, model, "relative_within", layer), kinds["within"], style, smooth)
        reference(right, effects.noise_share(run.settings["n_way"], run.queries), "pure noise")
        left.set_title(f"{model} model ({tables.MODELS[model]}): traces of {layer or run.hidden}")
        right.set_title("within / (within + between)")
        for axes in (left, right):
            fit(axes)
            step_axis(axes, groups)
        right.set_ylim(0, 1.02)
    figure.suptitle(f"{run.data}, {describe(run)}", fontsize=10, parse_math=False)
    return figure


def metrics(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """NC1 to NC4 against meta-steps, with permuted labels, or for NC2 random directions, as the reference."""
    split, run = common_split(groups), groups[0][0]
    note = key("permuted labels; NC2: random directions", GREY, linestyle=":")
    figure, panels = frame(2, 3, 4.2, keys(groups, note, models=True))
    for axes, (metric, label) in zip(panels.flat, LABELS.items()):
        for group, colour, _ in colours(groups):
            for model, style in STYLES.items():
                draw(axes, group, of_metric(split, model, metric, layer), colour, style)
        if metric == "etf_error":
            for dimension in (16, 64):
                error = effects.random_etf_errors(run.settings["n_way"])[dimension - 1]
                axes.axhline(error, color=GREY, linestyle=":", linewidth=1)
                axes.text(1.01, error, f"d = {dimension}", transform=axes.get_yaxis_transform(), va="center",
                          fontsize=7)
        elif run.has(split, "finetuned", f"{metric}_null"):
            draw(axes, [run], lambda run, null=f"{metric}_null": of_metric(split, "finetuned", null, layer)(run)[:2],
                 GREY, ":")
        axes.set_title(label)
        fit(axes, metric in LOGARITHMIC)
        step_axis(axes, groups)
    return figure


def layers(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """The relative within trace by layer at a few meta-steps, a panel per setting; there is no `layer` to choose."""
    split, last = common_split(groups), max(group[0].last_step for group in groups)
    wanted = [step for step in (0, 250, 1_000, 6_000, 20_000, 60_000) if step <= last]
    shades = dict(zip(wanted, matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1, len(wanted)))))
    legend = [key(f"meta-step {step:,}", shade, linewidth=2.2) for step, shade in shades.items()]
    figure, (panels,) = frame(1, len(groups), 2.5, [*legend, *keys([], models=True)], sharey=True)
    for axes, (group, _, label) in zip(panels, colours(groups)):
        for model, style in STYLES.items():
            by_layer = [[effects.series(run, split, model, "relative_within", name) for name in run.layers]
                     for run in group]  # fmt: skip
            for step, shade in shades.items():
                means = [[one.mean[np.abs(one.steps - step).argmin()] for one in row] for row in by_layer]
                if step <= group[0].last_step:
                    axes.plot(group[0].layers, np.mean(means, 0), "o", color=shade, linestyle=style, markersize=2.5)
        axes.set(title=label, ylim=(0, 1))
    panels[0].set_ylabel("relative within trace")
    return figure


def accuracy(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """Accuracy on held-out tasks: by the adapted classifier, and by the nearest support mean before adaptation."""
    if groups[0][0].layers and common_split(groups) != "heldout":
        raise UserError(f"{groups[0][0].path} has no measurement on held-out tasks; let it run to its first validation")
    before = key("nearest support mean, before adaptation", linestyle=STYLES["meta"])
    figure, ((axes,),) = frame(1, 1, 2.9, keys(groups, key("adapted classifier"), before))
    for group, colour, _ in colours(groups):
        draw(axes, group, of_accuracy("heldout"), colour)
        nearest = of_metric("heldout", "meta", "ncc_accuracy", layer, scale=100)
        draw(axes, group, nearest, colour, STYLES["meta"])
    axes.set_ylabel("held-out accuracy, %")
    fit(axes)
    step_axis(axes, groups)
    zoom_on_accuracy(axes)
    return figure


ANY = {"traces": traces, "metrics": metrics, "layers": layers, "accuracy": accuracy}


# ---- of the study


def result(study: Study) -> Figure:
    """The figure of README.md: the share within classes, the two traces, the share by layer."""
    groups = [study[name] for name in tables.MAIN if study[name]]
    run = groups[0][0]
    figure = Figure(figsize=(WIDTH, 3.1))
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.03)
    first, second, third = figure.subplots(1, 3)

    def by_layer(group: Group, value: Callable, model: str, colour: str) -> None:
        means = np.mean([[value(run, model, "relative_within", name) for name in run.layers] for run in group], 0)
        third.plot(range(1, len(means) + 1), means, color=colour, linestyle=STYLES[model], marker="o", markersize=3)

    for group, colour, _ in colours(groups):
        for model, style in STYLES.items():
            draw(first, group, of_metric("train", model, "relative_within"), colour, style, smooth=True)
            by_layer(group, effects.end, model, colour)
        for trace, style in (("between", "-"), ("within", ":")):
            draw(second, group, functools.partial(relative_to_start, trace=trace), colour, style, smooth=True)
    for model in STYLES:
        by_layer(groups[0], effects.untrained, model, GREY)
    for level, name in ((effects.noise_share(run.settings["n_way"], run.queries), "permuted labels"),
                        (effects.measured(run, "meta", "relative_within", "pixel"), "raw pixels")):  # fmt: skip
        if math.isfinite(level):
            reference(first, level, name)
    first.legend(handles=keys(groups, models=True), loc="lower left", fontsize=7.5, handlelength=1.8,
                 labelspacing=0.25, borderaxespad=0.1)  # fmt: skip
    second.legend(handles=[key("between classes"), key("within classes", linestyle=":")], loc="upper left")
    third.text(3, 0.9, "untrained (1-shot)", ha="center", fontsize=8, color=GREY)
    first.set(title="A  Last hidden layer, training tasks", ylabel="within / (within + between)", ylim=(0, 1.02))
    second.set(title="B  Same layer, adapted", ylabel="trace / within trace at step 0", ylim=(0, None))
    third.set(title="C  By layer, held-out classes, end", ylim=(0, 1.02), xticks=range(1, len(run.layers) + 1),
              xticklabels=["block 1", *map(str, range(2, len(run.layers))), "logits"])  # fmt: skip
    for axes in (first, second):
        step_axis(axes, groups)
    return figure


def relative_to_start(run: Run, trace: str) -> tuple[np.ndarray, np.ndarray]:
    """A trace of the adapted model on training tasks as a multiple of the within trace at the first step."""
    steps, mean, _ = effects.series(run, "train", "finetuned", trace)
    return steps, mean / effects.series(run, "train", "finetuned", "within").mean[0]


def correlation(study: Study, layer: str = "block3") -> Figure:
    """Log CDNV and log held-out error, each minus its trend: a point per checkpoint, a shape per seed."""
    groups = [study[name] for name in tables.MAIN if study[name]]
    figure = Figure(figsize=(WIDTH, 2.9))
    figure.set_layout_engine("constrained")
    panels = np.atleast_1d(figure.subplots(1, len(groups), sharex=True, sharey=True))
    for axes, (group, colour, label) in zip(panels, colours(groups)):
        what = "finetuned", "cdnv", layer
        for run, marker in zip(group, "o^sDv"):
            axes.scatter(*effects.residuals(run, *what), s=14, color=colour, marker=marker, alpha=0.75, linewidths=0)
        r = effects.correlations_over_seeds([effects.correlation(run, *what) for run in group])
        axes.set(title=label, xlabel="log CDNV minus its trend")
        axes.text(0.03, 0.97, f"r = {effects.correlated(r)}", transform=axes.transAxes, va="top")
    panels[0].set_ylabel("log held-out error minus its trend")
    return figure


def original(study: Study) -> Figure:
    """The relative within trace of the same logits, by label and as the original took it, before adaptation."""
    groups = [study[name] for name in (*tables.MAIN, *tables.PHOTOGRAPHS) if study[name]]
    legend = [key("by label (in the setting's colour)"),
              key("class means over consecutive rows, as the original", GREY, linestyle=STYLES["meta"])]  # fmt: skip
    figure, (panels,) = frame(1, len(groups), 2.3, legend, sharey=True)

    def share(run: Run, suffix: str) -> tuple[np.ndarray, np.ndarray]:
        within, between = (effects.series(run, "train", "meta", name + suffix, -1) for name in ("within", "between"))
        return within.steps, within.mean / (within.mean + between.mean)

    for axes, (group, colour, label) in zip(panels, colours(groups)):
        draw(axes, group, functools.partial(share, suffix=""), colour, smooth=True)
        draw(axes, group, functools.partial(share, suffix="_original"), GREY, STYLES["meta"], smooth=True)
        axes.set(ylim=(0, 1))
        axes.set_title(label.replace(", ", ",\n", 2), fontsize=8)
        step_axis(axes, [group])
    panels[0].set_ylabel("relative within trace, logits")
    return figure


def learners(study: Study) -> Figure:
    """What adaptation does to each learner: the share within classes and accuracy, before it and after; and nc1."""
    groups = [study[name] for name in tables.LEARNERS if study[name]]
    figure = Figure(figsize=(WIDTH, 3.0))
    figure.set_layout_engine("constrained", w_pad=0.04)
    share, right, ranked = figure.subplots(1, 3)

    def change(axes: Axes, before: Callable, after: Callable, scale: float = 1) -> None:
        """A row per learner: open points before adaptation, filled ones after, a line between their means."""
        for row, (group, colour, _) in enumerate(colours(groups)):
            values = np.array([[scale * before(run), scale * after(run)] for run in group])
            axes.plot(values.mean(0), [row, row], color=colour, linewidth=1.2)
            for column, fill in enumerate(("white", colour)):
                axes.scatter(values[:, column], [row] * len(group), s=26, edgecolors=colour, color=fill, zorder=3)
        axes.set(yticks=range(len(groups)), ylim=(len(groups) - 0.5, -0.5))

    def share_of(model: str) -> Callable:
        return functools.partial(effects.measured, model=model, metric="relative_within")

    change(share, share_of("meta"), share_of("finetuned"))
    change(right, effects.tested("nearest_mean", 0), effects.tested("accuracy", -1), 100)
    share.set_yticklabels([label for _, _, label in colours(groups)])
    right.set_yticklabels([])
    for group, colour, _ in colours(groups):
        ranked.scatter([effects.measured(run, "meta", "nc1") for run in group],
                       [100 * effects.tested("nearest_mean", 0)(run) for run in group], color=colour, s=26)
    share.set(title="A  Within / (within + between)", xlim=(0, 0.8))
    right.set(title="B  Test accuracy, %")
    ranked.set(title="C  Before adaptation", xscale="log", ylabel="nearest support mean, %")
    ranked.set_xlabel(LABELS["nc1"])
    ranked.minorticks_off()
    ranked.set_xticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
    share.legend(handles=[key("before adaptation", GREY, marker="o", markerfacecolor="white", linestyle=""),
                          key("adapted", GREY, marker="o", linestyle="")], loc="lower left", fontsize=7.5)
    return figure


def length(study: Study) -> Figure:
    """The paper's recipe to its end: collapse on training and held-out classes, and accuracy."""
    groups = [study[name] for name in tables.LONG if study[name]]
    legend = keys(groups, key("training classes"), key("held-out classes", linestyle=":"))
    figure, (panels,) = frame(1, 3, 2.6, legend)
    titles = "relative within trace, adapted", LABELS["nc1"], "accuracy, adapted, %"
    for axes, metric, title in zip(panels, ("relative_within", "nc1", None), titles):
        for group, colour, _ in colours(groups):
            for split, style in (("train", "-"), ("heldout", ":")):
                curve = of_metric(split, "finetuned", metric) if metric else of_accuracy(split)
                draw(axes, group, curve, colour, style, smooth=split == "train")
        axes.set_title(title)
        fit(axes, metric in LOGARITHMIC)
        step_axis(axes, groups)
    zoom_on_accuracy(panels[2])
    return figure


def report(study: Study) -> dict[str, Figure]:
    """Every figure of README.md and study/README.md whose runs are there, by its file."""
    main = [study[name] for name in tables.MAIN if study[name]]
    if not main:
        raise UserError(f"no run of the study in {study.folder}; run python -m study.run, and then with --collect")
    of_groups = {name: draw_figure(main) for name, draw_figure in ANY.items() if name != "traces"}
    figures = of_groups | {"correlation": correlation(study), "original": original(study)}
    for name, draw_figure, settings in (("learners", learners, tables.LEARNERS), ("length", length, tables.LONG)):
        if any(study[setting] for setting in settings):
            figures[name] = draw_figure(study)
    return {"result.png": result(study)} | {f"res/{name}.png": figure for name, figure in figures.items()}
