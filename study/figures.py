"""Figures of runs: groups of seeds in, a matplotlib figure out; plot_nc.py is the program.

A colour per setting. Lines are solid after adaptation and dashed before it, thin for single seeds and thick for their
mean. Curves of training tasks, of which a measurement has few, are smoothed over the steps within 10%.
"""

import functools
import io
import math
import re
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
from study.design import CHANGES, DIFFICULTY, LEARNERS, LONG, MAIN, MODELS, TASKS, label
from study.logs import Run, Study, describe

Group = list[Run]  # the seeds of a setting
Curve = Callable[[Run], tuple]  # steps, values and optionally half of a 95% interval over tasks, each [S]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
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


# ---- parts


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with 128 colours, which is small and keeps every line's; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with atomic(path, remedy="name another file with -o") as file:
        Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def colours(groups: Sequence[Group]) -> list[tuple[Group, str, str]]:
    """Each group with its colour and its name in the legend.

    The name includes the data's name if there are several, and the folder's name if two groups share a name.
    """
    runs = [group[0] for group in groups]
    several = len({run.data for run in runs}) > 1
    names = [f"{run.data}, {name}" if several and name == describe(run) else name
             for run, name in zip(runs, map(label, runs))]
    folders = [one_line(run.path.resolve().name) for run in runs]
    names = [f"{name} ({folder})" if names.count(name) > 1 else name for name, folder in zip(names, folders)]
    return [(group, PALETTE[i % len(PALETTE)], names[i].replace("$", r"\$")) for i, group in enumerate(groups)]


def draw(axes: Axes, group: Group, curve: Curve, colour: str, style="-") -> None:
    """A thin line per seed, and a thick one for their mean at the steps that all have; for one seed, with a band."""
    seeds = []  # per seed: step -> value
    for run in group:
        steps, values, *half = curve(run)
        if not len(steps):
            continue
        seeds.append(dict(zip(steps, values)))
        if len(group) == 1 and half:
            axes.fill_between(steps, values - half[0], values + half[0], color=colour, alpha=0.15, linewidth=0)
    if not seeds:
        return
    if len(group) > 1:
        for seed in seeds:
            axes.plot(seed.keys(), seed.values(), color=colour, linestyle=style, linewidth=0.6, alpha=0.5)
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
    last = max(run.last_step for group in groups for run in group)
    axes.set_xlabel("meta-step")
    axes.set_xlim(0, max(last, 1) * 1.04)
    if last > 300:
        axes.set_xscale("symlog", linthresh=100, linscale=0.5)
        ticks = [step for step in (100, 300, 1_000, 3_000, 6_000, 10_000, 20_000, 60_000) if step <= last]
        ticks = [step for step in ticks if not any(step < later <= 2 * step for later in ticks)]  # labels need room
        axes.xaxis.set_major_locator(FixedLocator([0, *ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}")


def fit(axes: Axes, log: bool = False) -> None:
    """Fit the y axis to the lines; a panel in which nothing is defined says so."""
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), float) for line in axes.get_lines())])
    values = values[np.isfinite(values)]
    values = values[values > 0] if log else values
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
    axes.text(0.98, level + 0.01, name, transform=axes.get_yaxis_transform(), ha="right", fontsize=8, color=GREY)


def common_split(groups: Sequence[Group]) -> str:
    """Held-out tasks, which are many, if all runs have measured them; else training tasks."""
    return "heldout" if all(run.rows["heldout"] for group in groups for run in group) else "train"


def zoom_on_accuracy(axes: Axes) -> None:
    """88 to 100% from meta-step 100 on, if the accuracy of every line and meta-steps come that far."""
    ends = [line.get_ydata()[-1] for line in axes.get_lines() if len(line.get_ydata())]
    if min(ends, default=0) > 88 and axes.get_xlim()[1] > 300:
        axes.set(ylim=(88, 100), xlim=(100, None))


# ---- of any runs


def traces(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """The original's panels: traces within and between classes, and the share within, before and after adaptation."""
    if len(groups) > 1:
        raise UserError("--figure traces draws the seeds of one setting; --figure metrics and --figure accuracy "
                        "compare settings")
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
        reference(right, effects.noise_share(run.settings["n_way"], run.queries), "pure noise")
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

    # the references depend on ways and queries: one grey line for all settings, or a line in each one's colour
    one_size = len({(run.settings["n_way"], run.queries) for run, *_ in groups}) == 1
    references = [(groups[0][0], GREY)] if one_size else [(group[0], colour) for group, colour, _ in colours(groups)]
    note = key("permuted labels; NC2: random directions", GREY, linestyle=":")
    figure, panels = frame(2, 3, 4.4, keys(groups, note, models=True))
    headline(figure, groups, TASKS[split], layer or distinct(groups, "hidden"))
    for axes, (metric, title) in zip(panels.flat, LABELS.items()):
        curves(axes, groups, [(of_metric(split, model, metric, layer), style) for model, style in STYLES.items()
                              if model == "finetuned" or metric not in BY_CONSTRUCTION])
        for run, colour in references:
            if metric == "etf_error":
                for dimension in (16, 64):
                    error = effects.random_etf_errors(run.settings["n_way"])[dimension - 1]
                    axes.axhline(error, color=colour, linestyle=":", linewidth=1)
                    axes.text(1.01, error, f"d = {dimension}", transform=axes.get_yaxis_transform(), va="center",
                              fontsize=7)
            else:
                null = of_metric(split, "finetuned", f"{metric}_null", layer)
                draw(axes, [run], lambda run, null=null: null(run)[:2], colour, ":")  # without a band
        axes.set_title(title)
        fit(axes, metric in LOGARITHMIC)
    return figure


def layers(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """The relative within trace by layer at a few meta-steps, a panel per setting; `layer` is not used."""
    split = common_split(groups)
    measured = {step for group in groups for step in set.intersection(*(set(run.rows[split]) for run in group))}
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
        layers = group[0].layers
        for model, style in STYLES.items():
            for step, shade in shades.items():
                if all(step in run.rows[split] for run in group):
                    values = [[effects.at(run, model, "relative_within", step, name, split) for name in layers]
                              for run in group]
                    axes.plot(layers, np.mean(values, 0), "o", color=shade, linestyle=style, markersize=2.5)
        axes.set(title=textwrap.fill(title, 120 // columns), ylim=(0, 1))
    for axes in panels[:, 0]:
        axes.set_ylabel("relative within trace")
    return figure


def accuracy(groups: Sequence[Group], layer: str | None = None) -> Figure:
    """Accuracy on held-out tasks: by the classifier after training's number of inner steps, and by the nearest support
    mean before adaptation."""
    for run in [run for group in groups for run in group]:
        if run.layers and not run.rows["heldout"]:
            raise UserError(f"{run.path} has no measurement on held-out tasks; let it run to its first validation")
    shown = layer or distinct(groups, "hidden")
    before = key(f"nearest support mean at {shown}, before adaptation", linestyle=STYLES["meta"])
    figure, ((axes,),) = frame(1, 1, 3.1, keys(groups, key("adapted classifier, after training's inner steps"), before))
    queries = sorted({run.queries for run, *_ in groups})
    headline(figure, groups, TASKS["heldout"], f"{' or '.join(map(str, queries))} queries per class")
    curves(axes, groups, [(of_metric("heldout", "finetuned", "accuracy"), STYLES["finetuned"]),
                          (of_metric("heldout", "meta", "ncc_accuracy", layer), STYLES["meta"])])
    axes.set_ylabel("accuracy, %")
    fit(axes)
    zoom_on_accuracy(axes)
    return figure


ANY = {"traces": traces, "metrics": metrics, "layers": layers, "accuracy": accuracy}


# ---- of the study

POINTS = [key(name, GREY, marker="o", linestyle="", **style)
          for name, style in (("before adaptation", {"markerfacecolor": "white"}), ("adapted", {}))]

# Before and after adaptation, as the tables describe values: (function, *what it takes after the run).
SHARES = [(effects.measured, model, "relative_within") for model in MODELS]
ACCURACIES = [(effects.tested, "nearest_mean", 0), (effects.tested, "accuracy", -1)]


def result(study: Study) -> Figure:
    """The figure of README.md: the share within classes, the two traces, the share by layer."""
    groups = study.groups(MAIN)
    run = groups[0][0]
    figure = Figure(figsize=(WIDTH, 3.1))
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.03)
    first, second, third = figure.subplots(1, 3)

    curves(first, groups, [(of_metric("train", model, "relative_within"), style) for model, style in STYLES.items()])
    curves(second, groups, [(relative_to_start("between"), "-"), (relative_to_start("within"), ":")])
    untrained = groups[0], functools.partial(effects.at, step=0), GREY
    for group, value, colour in [*((group, effects.end, colour) for group, colour, _ in colours(groups)), untrained]:
        for model, style in STYLES.items():
            shares = [[value(run, model, "relative_within", layer=name) for name in run.layers] for run in group]
            third.plot(range(1, len(run.layers) + 1), np.mean(shares, 0), color=colour, linestyle=style, marker="o",
                       markersize=3)
    reference(first, effects.noise_share(run.settings["n_way"], run.queries), "permuted labels")
    pixels = effects.measured(run, "meta", "relative_within", "pixels")
    if math.isfinite(pixels):
        reference(first, pixels, "raw pixels")
    first.legend(handles=keys(groups, models=True), loc="lower left", fontsize=7.5, handlelength=1.8,
                 labelspacing=0.25, borderaxespad=0.1)
    second.legend(handles=[key("between classes"), key("within classes", linestyle=":")], loc="upper left")
    third.text(3, 0.9, "untrained (1-shot)", ha="center", fontsize=8, color=GREY)
    first.set(title="A  Last hidden layer, training tasks", ylabel="within / (within + between)", ylim=(0, 1.02))
    second.set(title="B  Same layer, adapted", ylabel="trace / within trace at step 0", ylim=(0, None))
    third.set(title="C  By layer, held-out classes, end", ylim=(0, 1.02), xticks=range(1, len(run.layers) + 1),
              xticklabels=["block 1", *map(str, range(2, len(run.layers))), "logits"])
    return figure


def relative_to_start(trace: str) -> Curve:
    """A trace of the adapted model on training tasks as a multiple of the within trace at the first step."""
    def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
        steps, values, _ = of_metric("train", "finetuned", trace)(run)
        return steps, values / effects.at(run, "finetuned", "within", 0, split="train")

    return curve


def learners(study: Study) -> Figure:
    """What adaptation does to each learner: the share within classes and accuracy, before it and after; and nc1."""
    groups = study.groups(LEARNERS)
    figure = Figure(figsize=(WIDTH, 3.0))
    figure.set_layout_engine("constrained", w_pad=0.04)
    share, right, ranked = figure.subplots(1, 3)

    before_and_after(share, colours(groups), *SHARES)
    before_and_after(right, colours(groups), *ACCURACIES, scale=100)
    share.set_yticklabels([name for _, _, name in colours(groups)])
    for group, colour, _ in colours(groups):
        ranked.scatter([effects.measured(run, "meta", "nc1") for run in group],
                       [100 * effects.tested(run, "nearest_mean", 0) for run in group], color=colour, s=26)
    share.set(title="A  Within / (within + between)", xlim=(0, 0.8))
    right.set(title="B  Test accuracy, %")
    ranked.set(title="C  Before adaptation", xscale="log", ylabel="nearest support mean, %")
    ranked.set_xlabel(LABELS["nc1"])
    ranked.minorticks_off()
    ranked.set_xticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
    share.legend(handles=POINTS, loc="center right", bbox_to_anchor=(1.03, 0.58), fontsize=7.5)
    return figure


def before_and_after(axes: Axes, groups: Sequence[tuple[Group, str, str]], before: tuple, after: tuple,
                     scale: float = 1) -> None:
    """A row per group: open points before adaptation, filled ones after, a line between their means."""
    for row, (group, colour, _) in enumerate(groups):
        values = scale * np.array([[value(run, *arguments) for value, *arguments in (before, after)] for run in group])
        axes.plot(values.mean(0), [row, row], color=colour, linewidth=1.2)
        for column, fill in enumerate(("white", colour)):
            axes.scatter(values[:, column], [row] * len(group), s=26, edgecolors=colour, color=fill, zorder=3)
    axes.set(yticks=range(len(groups)), ylim=(len(groups) - 0.5, -0.5), yticklabels=[])


def by_setting(study: Study, kinds: dict[str, Sequence[str]], shares: Sequence[tuple],
               accuracies: Sequence[tuple]) -> Figure:
    """A row per setting, a colour per kind: share and accuracy before and after adaptation, spread of the rows."""
    colour_of = dict(zip(kinds, PALETTE))
    groups = [(group, colour_of[kind], re.sub("classifier from | of 32 x 32(, MAML)?", "", label(group[0])))
              for kind, names in kinds.items() for group in study.groups(names)]
    legend = [key(kind, colour, linewidth=2.2) for kind, colour in colour_of.items()]
    figure, ((left, right, spread),) = frame(1, 3, 0.5 + 0.27 * len(groups), [*legend, *POINTS])
    before_and_after(left, groups, *shares)
    before_and_after(right, groups, *accuracies, scale=100)
    before_and_after(spread, groups, (effects.in_control, "first step by parts, untrained", "rows", 0),
                     (effects.in_control, "first step by parts", "rows", 0))
    left.set(title="A  Share within", xlim=(0, 0.9))
    right.set(title="B  Accuracy, %")
    spread.set(title="C  Spread of rows", xlabel="open: untrained\nfilled: trained", xscale="log")
    spread.minorticks_off()
    spread.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    left.set_yticklabels([name for _, _, name in groups])
    return figure


def changes(study: Study) -> Figure:
    """The paper's recipe with one thing changed, on validation tasks."""
    return by_setting(study, CHANGES, [(effects.at, model, "relative_within", 5_000) for model in MODELS],
                      [(effects.at, "meta", "ncc_accuracy", 5_000), (effects.at, "finetuned", "accuracy", 5_000)])


def difficulty(study: Study) -> Figure:
    """One inner loop on images whose classes are easy or hard to tell apart, on test tasks."""
    return by_setting(study, DIFFICULTY, SHARES, ACCURACIES)


def length(study: Study) -> Figure:
    """The paper's recipe to its end: collapse on training and held-out classes, and accuracy."""
    groups = study.groups(LONG)
    legend = keys(groups, key("training classes"), key("held-out classes", linestyle=":"))
    figure, (panels,) = frame(1, 3, 2.6, legend)
    titles = "relative within trace, adapted", LABELS["nc1"], "accuracy, adapted, %"
    for axes, metric, title in zip(panels, ("relative_within", "nc1", "accuracy"), titles):
        curves(axes, groups, [(of_metric(split, "finetuned", metric), style) for split, style in SPLITS.items()])
        axes.set_title(title)
        fit(axes, metric in LOGARITHMIC)
    zoom_on_accuracy(panels[2])
    return figure


def all_figures(study: Study) -> dict[str, Figure]:
    """Every figure of README.md and study/README.md whose runs are there, by its file."""
    every = {"result.png": (MAIN, result),
             "res/metrics.png": (MAIN, lambda study: metrics(study.groups(MAIN))),
             "res/learners.png": (LEARNERS, learners), "res/changes.png": (CHANGES["1 x 1"], changes),
             "res/difficulty.png": (DIFFICULTY["photographs"], difficulty), "res/length.png": (LONG, length)}
    drawn = {path: draw(study) for path, (names, draw) in every.items() if study.groups(names)}
    if not drawn:
        raise UserError(f"no run of the study in {study.folder}; run python -m study.run, and then with --collect")
    return drawn
