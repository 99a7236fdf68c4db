"""The figures of README.md and study/*.md: groups of seeds in, matplotlib figures out."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from files import UserError
from study import effects, figures, tables
from study.design import DIFFICULTY, LEARNERS, LONG_LEARNERS, MAIN, label
from study.figures import Group
from study.logs import Run, Study

POINTS = [figures.key(name, figures.GREY, marker="o", linestyle="", **style)
          for name, style in (("before adaptation", {"markerfacecolor": "white"}), ("adapted", {}))]


def one_row(height: float, **pads: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of three panels in one row, without a legend below it."""
    figure = Figure(figsize=(figures.WIDTH, height))
    figure.set_layout_engine("constrained", **pads)
    return figure, figure.subplots(1, 3)


def result(groups: Sequence[Group]) -> Figure:
    """The original's recipe: the share within classes, the two traces, the share by layer."""
    run = groups[0][0]
    figure, (first, second, third) = one_row(3.1, w_pad=0.04, h_pad=0.03)
    figures.curves(first, groups, [(figures.of_metric("train", model, "relative_within"), style)
                                   for model, style in figures.STYLES.items()])
    figures.curves(second, groups, [(functools.partial(relative_to_start, trace=trace), style)
                                    for trace, style in (("between", "-"), ("within", ":"))])
    lines = [(group, effects.end, colour) for group, colour, _ in figures.colours(groups)]
    lines.append((groups[0], functools.partial(effects.at, step=0), figures.GREY))  # untrained
    places = range(1, len(run.layers) + 1)
    for group, value, colour in lines:
        for model, style in figures.STYLES.items():
            shares = [[value(run, model, "relative_within", layer=name) for name in run.layers] for run in group]
            third.plot(places, np.mean(shares, 0), "o", color=colour, linestyle=style, markersize=3)
    figures.reference(first, effects.noise_share(run), "permuted labels")
    if math.isfinite(pixels := effects.measured(run, "meta", "relative_within", "pixels")):
        figures.reference(first, pixels, "raw pixels")
    first.legend(handles=figures.keys(groups, models=True), loc="lower left", fontsize=7.5, handlelength=1.8,
                 labelspacing=0.25, borderaxespad=0.1)
    second.legend(handles=[figures.key("between classes"), figures.key("within classes", linestyle=":")],
                  loc="upper left")
    third.text(3, 0.9, "untrained (1-shot)", ha="center", fontsize=8, color=figures.GREY)
    first.set(title="A  Last hidden layer, training tasks", ylabel="within / (within + between)", ylim=(0, 1.02))
    second.set(title="B  Same layer, adapted", ylabel="trace / within trace at step 0", ylim=(0, None))
    third.set(title="C  By layer, held-out classes, end", ylim=(0, 1.02), xticks=places,
              xticklabels=["block 1", *map(str, places[1:-1]), "logits"])
    return figure


def relative_to_start(run: Run, trace: str) -> tuple[np.ndarray, np.ndarray]:
    """A trace of the adapted model on training tasks as a multiple of the within trace at the first step."""
    steps, values, _ = figures.of_metric("train", "finetuned", trace)(run)
    return steps, values / effects.at(run, "finetuned", "within", 0, split="train")


def learners(groups: Sequence[Group]) -> Figure:
    """What adaptation does to each learner: share within classes and accuracy, before it and after, and by block."""
    figure, (share, right, by_block) = one_row(3.0, w_pad=0.04)
    lines, untrained = figures.colours(groups), tables.references_of(groups)["untrained"]
    before_and_after(share, right, [*lines, (untrained, figures.GREY, "untrained")])
    for group, colour, _ in reversed(lines):  # the first on top
        blocks = range(-len(group[0].layers), -1)
        values = [[100 * effects.measured(run, "meta", "ncc_accuracy", layer=i) for i in blocks] for run in group]
        by_block.plot(group[0].layers[:-1], np.mean(values, 0), "o-", color=colour, markersize=3)
    by_block.set(title="C  Before adaptation, by block", ylabel="nearest support mean, %")
    share.legend(handles=POINTS, loc="center right", bbox_to_anchor=(1.03, 0.58), fontsize=7.5)
    return figure


def before_and_after(left: Axes, right: Axes, groups: Sequence[tuple[Group, str, str]]) -> None:
    """Share and test accuracy, as the tables have them; a row per group, with its name.

    Open points before adaptation, filled ones after, a line between their means.
    """
    accuracies = (effects.tested, "nearest_mean", 0), (effects.tested, "accuracy", -1)
    for axes, columns, scale in (left, tables.SHARES.values(), 1), (right, accuracies, 100):
        for row, (group, colour, _) in enumerate(groups):
            values = scale * np.array([[value(run, *arguments) for value, *arguments in columns] for run in group])
            axes.plot(values.mean(0), [row, row], color=colour, linewidth=1.2)
            for column, fill in enumerate(("white", colour)):
                axes.scatter(values[:, column], [row] * len(group), s=26, edgecolors=colour, color=fill, zorder=3)
        axes.set(yticks=range(len(groups)), ylim=(len(groups) - 0.5, -0.5), yticklabels=[])
    left.set(title="A  Within / (within + between)", xlim=(0, 0.9), yticklabels=[name for _, _, name in groups])
    right.set(title="B  Test accuracy, %")


def difficulty(*kinds: Sequence[Group]) -> Figure:
    """Hard and easy tasks: a row per setting, a colour per kind; share and accuracy before and after adaptation."""
    groups = [(group, colour, label(group[0]).replace(" of 32 x 32", ""))
              for kind, colour in zip(kinds, figures.PALETTE) for group in kind]
    legend = [figures.key(kind, colour, linewidth=2.2) for kind, colour in zip(DIFFICULTY, figures.PALETTE)]
    figure, ((left, right),) = figures.frame(1, 2, 0.5 + 0.27 * max(len(groups), 3), [*legend, *POINTS])
    before_and_after(left, right, groups)
    return figure


def similarity(groups: Sequence[Group]) -> Figure:
    """Which layers the inner loop changes, and the norm of the gradient that reaches each block."""
    lines = [*(("final", *group) for group in figures.colours(groups)),
             ("untrained", groups[0], figures.GREY, "untrained")]
    legend = [figures.key(name, colour, linewidth=2.2) for *_, colour, name in lines]
    figure, ((left, right),) = figures.frame(1, 2, 2.9, legend)
    for kind, group, colour, _ in lines:
        for axes, control, key, shown in ((left, "similarity", "cka", group[0].layers),
                                          (right, "gradients", "gradient", group[0].layers[:-1])):
            values = [[effects.in_control(run, f"{control}, {kind}", key, i) for i in range(len(shown))]
                      for run in group]
            axes.plot(shown, np.mean(values, 0), "o-", color=colour, markersize=3)
    left.set(title="A  CKA, before and after the inner loop", ylim=(0, 1.03))
    right.set(title="B  Gradient of the support loss, norm")
    figures.fit(right, log=True)
    return figure


def length(groups: Sequence[Group]) -> Figure:
    """The paper's recipe to its end, by learner: collapse on training and held-out classes, and accuracy."""
    legend = figures.keys(groups, figures.key("training classes"), figures.key("held-out classes", linestyle=":"))
    for line in legend[1:]:  # the first has the recipe and the tasks of all
        line.set_label(line.get_label().removeprefix("paper's recipe, 5-way 1-shot, "))
    figure, (panels,) = figures.frame(1, 3, 2.6, legend)
    titles = "relative within trace", figures.LABELS["nc1"], "accuracy, %"
    for axes, metric, title in zip(panels, ("relative_within", "nc1", "accuracy"), titles):
        figures.curves(axes, groups, [(functools.partial(curve_as_used, split=split, metric=metric), style)
                                      for split, style in figures.SPLITS.items()])
        axes.set_title(title)
        figures.fit(axes, metric in figures.LOGARITHMIC)
    figures.zoom_on_accuracy(panels[2])
    return figure


def curve_as_used(run: Run, split: str, metric: str) -> tuple:
    """A logged metric of the features that the run's learner classifies by."""
    return effects.as_used(run, lambda run, *names: figures.of_metric(split, *names)(run), metric)


def all_figures(study: Study) -> dict[str, Figure]:
    """Every figure of README.md and study/*.md whose runs are there, by its file."""
    every = {"result.png": (result, MAIN), "res/metrics.png": (figures.metrics, MAIN),
             "res/learners.png": (learners, LEARNERS), "res/difficulty.png": (difficulty, *DIFFICULTY.values()),
             "res/similarity.png": (similarity, LEARNERS), "res/length.png": (length, LONG_LEARNERS)}
    drawn = {path: draw(*map(study.groups, names)) for path, (draw, *names) in every.items() if study.groups(names[0])}
    if not drawn:
        raise UserError(f"no run of the study in {study.folder}; run python -m study.run, and then with --collect")
    return drawn
