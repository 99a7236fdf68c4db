"""Figures of runs: groups of seeds in, a matplotlib figure out; plot_nc.py is the program.

A colour per setting. Lines are solid after adaptation and dashed before it, thin for single seeds and thick for their
mean. Curves of training tasks, of which a measurement has few, are smoothed over the steps within 10%.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from files import UserError, atomic, one_line
from study import effects
from study.design import MODELS, TASKS, label
from study.logs import Run, describe, differing

Group = list[Run]  # the seeds of a setting
Curve = Callable[[Run], tuple]  # steps, values and optionally half of a 95% interval over tasks, each [S]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
GREY, DARK = "#777777", "#333333"
STYLES = {"finetuned": "-", "meta": (0, (4, 2))}
SPLITS = {"train": "-", "heldout": ":"}
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "legend.frameon": False,
         "legend.fontsize": 8, "axes.titlelocation": "left", "lines.solid_capstyle": "butt"}
WIDTH, DPI = 9.0, 160  # inches, dots per inch: a picture shown about 900 pixels wide stays sharp

LABELS = {"relative_within": "relative within trace", "nc1": "tr(S$_W$S$_B^+$)/C", "cdnv_unbiased": "CDNV, unbiased",
          "etf_error": "NC2: ETF error", "self_duality": "NC3: self-duality", "ncc_mismatch": "NC4: mismatch"}
LOGARITHMIC = {"nc1", "cdnv_unbiased"}
BY_CONSTRUCTION = {"self_duality", "ncc_mismatch"}  # 2 and chance before adaptation: labels are drawn for every task


def save(figure: Figure, path: Path) -> None:
    """Write a PDF, an SVG, or a PNG with 128 colours, which is small; the same figure gives the same PNG."""
    with atomic(path, remedy="name another file with -o") as file:
        if path.suffix.lower() == ".png":
            figure.savefig(buffer := io.BytesIO(), format="png", dpi=DPI)
            Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        else:
            figure.savefig(file, format=path.suffix[1:].lower())


def colours(groups: Sequence[Group]) -> list[tuple[Group, str, str]]:
    """Each group with its colour and its name in the legend.

    The name includes the data's name if there are several, and the end of the folder's path if two share a name.
    """
    runs = [run for run, *_ in groups]
    names = list(map(label, runs))
    if len({run.data for run in runs}) > 1:
        names = [f"{run.data}, {name}" if name == describe(run) else name for run, name in zip(runs, names)]
    folders = [one_line("/".join(run.path.resolve().parts[-2:])) for run in runs]
    names = [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders)]
    return [(group, colour, name.replace("$", r"\$"))
            for group, colour, name in zip(groups, itertools.cycle(PALETTE), names)]


def draw(axes: Axes, group: Group, curve: Curve, colour: str, style="-") -> None:
    """A thin line per seed, and a thick one for their mean at the steps that all have; for one seed, with a band."""
    seeds = []  # per seed: step -> value
    for run in group:
        steps, values, *half = curve(run)
        if len(steps):
            seeds.append(dict(zip(steps, values)))
        if len(group) > 1:
            axes.plot(steps, values, color=colour, linestyle=style, linewidth=0.6, alpha=0.5)
        elif half:
            axes.fill_between(steps, values - half[0], values + half[0], color=colour, alpha=0.15, linewidth=0)
    if not seeds:
        return
    common = sorted(set.intersection(*map(set, seeds)))
    mean = [np.mean([seed[step] for seed in seeds]) for step in common]
    marker = "o" if len(common) < 12 else None  # shows how few the points are
    axes.plot(common, mean, color=colour, linestyle=style, linewidth=1.6, marker=marker, markersize=3)


def of_metric(split: str, model: str, metric: str, layer: str | None = None) -> Curve:
    """A logged metric, accuracies in percent."""
    scale = 100 if metric.endswith("accuracy") else 1

    def curve(run: Run) -> tuple:
        steps, mean, se = effects.series(run, split, model, metric, layer or effects.HIDDEN)
        if split == "train":
            mean, se = effects.smoothed(steps, mean), effects.smoothed(steps, se)
        return steps, scale * mean, 1.96 * scale * se

    return curve


def curves(axes: Axes, groups: Sequence[Group], lines: Sequence[tuple[Curve, str | tuple]]) -> None:
    """Each curve in its style, of each group in its colour, against meta-steps."""
    for group, colour, _ in colours(groups):
        for curve, style in lines:
            draw(axes, group, curve, colour, style)
    step_axis(axes, groups)


def step_axis(axes: Axes, groups: Sequence[Group]) -> None:
    """Meta-steps, logarithmic from 100 on and linear before, so that step 0 is shown."""
    last = max(run.last_step for run in itertools.chain(*groups))
    axes.set_xlabel("meta-step")
    axes.set_xlim(0, max(last, 1) * 1.04)
    if last > 300:
        axes.set_xscale("symlog", linthresh=100, linscale=0.5)
        ticks = []
        for step in (60_000, 20_000, 10_000, 6_000, 3_000, 1_000, 300, 100):
            if step <= last and (not ticks or 2 * step < ticks[-1]):  # labels need room
                ticks.append(step)
        axes.xaxis.set_major_locator(FixedLocator([0, *ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}")


def fit(axes: Axes, log: bool = False) -> None:
    """Fit the y axis to the lines; a panel in which nothing is defined says so."""
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), float) for line in axes.get_lines())])
    values = values[np.isfinite(values) & (values > 0 if log else True)]
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
    """The legend of the settings, of the two models if asked for, and `others`; refuses more settings than colours."""
    if len(groups) > len(PALETTE):
        raise UserError(f"{len(groups)} settings, and there are {len(PALETTE)} colours; name runs of fewer settings")
    lines = [key(MODELS[model], linestyle=style) for model, style in STYLES.items() if models]
    return [*(key(name, colour, linewidth=2.2) for _, colour, name in colours(groups)), *lines, *others]


def frame(rows: int, columns: int, height: float, legend: Sequence[Line2D], **options) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns panels with one legend below them."""
    for per_row in range(min(len(legend), 6), 0, -1):
        below = 0.08 + 0.19 * math.ceil(len(legend) / per_row)
        figure = Figure(figsize=(WIDTH, height + below))
        drawn = figure.legend(handles=legend, loc="lower center", ncols=per_row)
        if drawn.get_window_extent().width <= figure.bbox.width:
            break
    share = below / (height + below)
    figure.set_layout_engine("constrained", rect=(0.003, share, 0.994, 1 - share))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def distinct(groups: Sequence[Group], what: str) -> str:
    """An attribute of the groups' runs, each value once."""
    return " and ".join(dict.fromkeys(getattr(run, what) for run, *_ in groups))


def headline(figure: Figure, groups: Sequence[Group], *words: str) -> None:
    """The names of the data, and `words`, above the panels."""
    figure.suptitle(textwrap.fill(", ".join([distinct(groups, "data"), *words]), 100), fontsize=10, parse_math=False)


def reference(axes: Axes, level: float, name: str) -> None:
    axes.axhline(level, color=GREY, linestyle="-.", linewidth=0.9)
    axes.text(0.98, level - 0.01, name, transform=axes.get_yaxis_transform(), ha="right", va="top", fontsize=8,
              color=GREY)


def common_split(groups: Sequence[Group]) -> str:
    """Held-out tasks, which are many, if all runs have measured them; else training tasks."""
    return "heldout" if all(run.rows["heldout"] for run in itertools.chain(*groups)) else "train"


def zoom_on_accuracy(axes: Axes) -> None:
    """88 to 100% from meta-step 100 on, if the accuracy of every line and meta-steps come that far."""
    ends = [line.get_ydata()[-1] for line in axes.get_lines() if len(line.get_ydata())]
    if min(ends, default=0) > 88 and axes.get_xlim()[1] > 300:
        axes.set(ylim=(88, 100), xlim=(100, None))


def traces(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """The original's panels: traces within and between classes, and the share within, before and after adaptation."""
    if len(groups) > 1:
        (one, *_), (other, *_), *_ = groups
        raise UserError("--figure traces draws the seeds of one setting; --figure metrics and --figure accuracy "
                        f"compare settings ({one.path} and {other.path}: {', '.join(differing(one, other))})")
    group, run = groups[0], groups[0][0]
    kinds = {"within": PALETTE[0], "between": PALETTE[1]}
    legend = [key(f"{name} classes", colour, linewidth=2.2) for name, colour in kinds.items()]
    figure, panels = frame(2, 2, 4.6, [*legend, *(key(TASKS[split], linestyle=SPLITS[split]) for split in TASKS)])
    for (left, right), model in zip(panels, ("meta", "finetuned")):
        for split, style in SPLITS.items():
            for kind, colour in kinds.items():
                draw(left, group, of_metric(split, model, kind, layer), colour, style)
        step_axis(left, groups)
        curves(right, groups, [(of_metric(split, model, "relative_within", layer), style)
                               for split, style in SPLITS.items()])
        reference(right, effects.noise_share(run), "permuted labels")
        left.set_title(f"{model} model ({MODELS[model]}): traces of {layer or run.hidden}")
        right.set_title("within / (within + between)")
        for axes in (left, right):
            fit(axes)
        right.set_ylim(0, 1.02)
    headline(figure, groups, describe(run))
    return figure


def metrics(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """NC1 to NC4 against meta-steps, and their level with permuted labels; for NC2, with random directions."""
    split = common_split(groups)

    # permuted labels' values depend on ways, queries and features: a line per setting, in its colour
    references = [(run, colour if len(groups) > 1 else GREY) for (run, *_), colour, _ in colours(groups)]
    ways = {run.settings["n_way"]: colour for run, colour in references}
    directions = {n_way: colour if len(ways) > 1 else GREY for n_way, colour in ways.items()}
    note = key("permuted labels, adapted; NC2: random directions", GREY, linestyle=":")
    shown = layer or distinct(groups, "hidden")
    logged = set.intersection(*(set(next(iter(run.rows[split].values())).get("finetuned", ()))
                                for run in itertools.chain(*groups)))  # older runs lack newer metrics
    titles = {metric: title for metric, title in LABELS.items() if metric in logged} or LABELS
    rows = math.ceil(len(titles) / 3)
    figure, panels = frame(rows, 3, 2.2 * rows, keys(groups, note, models=True))
    for axes in panels.flat[len(titles):]:
        axes.remove()
    headline(figure, groups, TASKS[split], shown)
    for axes, (metric, title) in zip(panels.flat, titles.items()):
        curves(axes, groups, [(of_metric(split, model, metric, layer), style) for model, style in STYLES.items()
                              if model == "finetuned" or metric not in BY_CONSTRUCTION])
        if metric == "etf_error":
            for (n_way, colour), dimension in itertools.product(directions.items(), (16, 64)):
                error = effects.random_etf_errors(n_way)[dimension - 1]
                axes.axhline(error, color=colour, linestyle=":", linewidth=1)
                axes.text(1.01, error, f"d = {dimension}", transform=axes.get_yaxis_transform(), va="center",
                          fontsize=7, color=colour)
        else:
            null = of_metric(split, "finetuned", f"{metric}_null", layer)
            for run, colour in references:
                draw(axes, [run], lambda run, null=null: null(run)[:2], colour, ":")  # without a band
        axes.set_title(title)
        fit(axes, metric in LOGARITHMIC)
    return figure


def layers(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """The relative within trace by layer at a few meta-steps, a panel per setting; `layer` is not used."""
    split = common_split(groups)
    measured = set.intersection(*(set(run.rows[split]) for run in itertools.chain(*groups)))  # that all have
    steps = sorted({min(measured, key=lambda other, step=step: (abs(other - step), other))
                    for step in (0, 250, 1_000, 6_000, 20_000, 60_000) if measured})
    shades = dict(zip(steps, matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1, len(steps)))))
    legend = [key(f"meta-step {step:,}", shade, linewidth=2.2) for step, shade in shades.items()]
    rows = math.ceil(len(groups) / 3)
    columns = math.ceil(len(groups) / rows)
    figure, panels = frame(rows, columns, 0.2 + 2.5 * rows, [*legend, *keys([], models=True)], sharey=True)
    headline(figure, groups, TASKS[split])
    for axes in panels.flat[len(groups):]:
        axes.remove()
    for axes, (group, _, title) in zip(panels.flat, colours(groups)):
        names = group[0].layers
        for model, style in STYLES.items():
            for step, shade in shades.items():
                values = [[effects.at(run, model, "relative_within", step, name, split) for name in names]
                          for run in group]
                axes.plot(names, np.mean(values, 0), "o", color=shade, linestyle=style, markersize=2.5)
        axes.set(title=textwrap.fill(title, 120 // columns), ylim=(0, 1))
    for axes in panels[:, 0]:
        axes.set_ylabel("relative within trace")
    return figure


def accuracy(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """Accuracy on held-out tasks: by the classifier after training's number of inner steps, and by the nearest support
    mean before adaptation."""
    for run in itertools.chain(*groups):
        if run.layers and not run.rows["heldout"]:  # `layers` raises an error if nothing was measured
            raise UserError(f"{run.path} has no measurement on held-out tasks; let it run to its first validation")
    shown = layer or distinct(groups, "hidden")
    before = key(f"nearest support mean at {shown}, before adaptation", linestyle=STYLES["meta"])
    figure, ((axes,),) = frame(1, 1, 3.1, keys(groups, key("adapted classifier, after training's inner steps"), before))
    queries = " or ".join(map(str, sorted({run.queries for run, *_ in groups})))
    headline(figure, groups, TASKS["heldout"], f"{queries} queries per class")
    curves(axes, groups, [(of_metric("heldout", "finetuned", "accuracy"), STYLES["finetuned"]),
                          (of_metric("heldout", "meta", "ncc_accuracy", layer), STYLES["meta"])])
    axes.set_ylabel("accuracy, %")
    fit(axes)
    zoom_on_accuracy(axes)
    return figure


ANY = {"traces": traces, "metrics": metrics, "layers": layers, "accuracy": accuracy}
