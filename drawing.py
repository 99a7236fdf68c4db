"""What the figures of plot_nc.py share: colours, axes, curves, the frame of title, legend and notes, and its words.

Everything is laid out for a picture 1,800 pixels wide that a README shows at about 900. No window is opened.
"""

import itertools
import math
from typing import NamedTuple, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

import curves
import files
import runs as logs
from curves import Curve
from runs import Run

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
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
}
WIDTH, DPI = 9.0, 200  # inches; 1,800 pixels wide, shown at about 900 in a README
TRANSDUCTIVE = "features of query sets, batch norm by the query batch's own statistics (transductive)"
SMOOTH_NOTE = f"training tasks: a point is the mean of the measurements within {curves.WINDOW:.0%} of its step"

DASHED = {"linestyle": (0, (4, 2)), "linewidth": 1.1}
DOTTED = {"linestyle": (0, (1, 1.6)), "linewidth": 1.8}
BAND = Patch(color=NOISE, alpha=0.4, linewidth=0, label="95% band")
NULL = Line2D([], [], color=NOISE, label="null: permuted labels", **DOTTED)

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


def chosen_layer(runs: Sequence[Run], layer: str | None) -> str:
    """The layer to draw: the last hidden one unless one is named.

    Raises:
        UserError: there is no such layer, or no measurement.
    """
    layers = logs.layers_of(runs[0])
    if layer is not None and layer not in layers:
        raise files.UserError(f"no layer {layer!r} in {runs[0].path}; --layer takes one of: {', '.join(layers)}")
    return layer or logs.last_hidden(runs[0])


def panel_grid(panels: Sequence[Panel], groups: Sequence[Sequence[Run]], columns_alone: int, row_height: float):
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
            axes.set_title("\n".join([*logs.describe(runs[0]).split(", ", 1), seed_words(runs)]), fontsize=10.5)
    return figure, cells


def frame(figure: Figure, title: str, subtitle: str, handles: Sequence, columns: int, *notes: str) -> None:
    """Enlarge the figure by a title above, and a legend and notes below its panels, where they cover nothing."""
    above = 0.3 + 0.28 * (1 + title.count("\n")) + 0.19 * (1 + subtitle.count("\n"))  # inches
    below = 0.35 + 0.215 * math.ceil(len(handles) / columns) + 0.19 * len(notes)
    height = above + figure.get_figheight() + below
    figure.set_size_inches(WIDTH, height)
    rect = (0.005, below / height, 0.985, 1 - (above + below) / height)
    figure.set_layout_engine("constrained", rect=rect, h_pad=0.07, w_pad=0.07)
    centred = {"ha": "center", "linespacing": 1.3, "parse_math": False}  # the data's name may hold dollars
    figure.text(0.5, 1 - 0.14 / height, title, va="top", fontsize=14, weight="bold", **centred)
    lines = 1 + title.count("\n")
    figure.text(0.5, 1 - (0.16 + 0.28 * lines) / height, subtitle, va="top", fontsize=10, **centred)
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=10,
                  bbox_to_anchor=(0.5, (0.04 + 0.19 * len(notes)) / height))  # fmt: skip
    figure.text(0.5, 0.08 / height, "\n".join(notes), va="bottom", fontsize=10, **centred)


def draw_curve(axes: Axes, found: Curve, colour: str, classes: str) -> None:
    """A curve with its band: training tasks solid; held-out ones thin, dashed, darker, on top."""
    line = {"color": colour, "linewidth": 1.5} if classes == "train" else {"color": DARKER[colour], **DASHED}
    few = len(found.steps) < 12
    marker = "o" if few or classes == "heldout" else None  # a line alone would hide how far apart the points are
    shade = 0.25 if classes == "train" else 0.12
    axes.fill_between(found.steps, found.low, found.high, color=colour, alpha=shade, linewidth=0)
    axes.plot(found.steps, found.mean, marker=marker, markersize=3.5 if few else 2, **line)


def step_axis(axes: Axes, last: int) -> None:
    columns = axes.get_subplotspec().get_gridspec().ncols
    span = axes.get_subplotspec().colspan
    axes.set_xlim(0, last * 1.02)
    axes.set_xlabel("meta-step")
    axes.xaxis.set_major_locator(MaxNLocator({1: 8, 2: 5}.get(columns // (span.stop - span.start), 3)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def log_step_axis(axes: Axes, last: int) -> None:
    """Meta-steps, logarithmic from 100 on and linear before, so that step 0 has its place."""
    step_axis(axes, last)
    if last > 300:
        axes.set_xscale("symlog", linthresh=100, linscale=0.4)
        axes.set_xlim(0, last * 1.05)
        axes.set_xticks([0, *(step for step in (100, 300, 1_000, 3_000, 10_000, 30_000) if step <= last)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if not is_at_bottom(axes):
        axes.set_xlabel("")


def is_at_bottom(axes: Axes) -> bool:
    return axes.get_subplotspec().is_last_row()


def log_axis(axes: Axes, which: str = "y") -> None:
    """Logarithmic, with ticks at 1, 2 and 5 in plain figures."""
    getattr(axes, f"set_{which}scale")("log", nonpositive="clip")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def fit_to_lines(panels: Sequence[Axes], log: bool) -> None:
    """One vertical range for the panels, around their lines: a wide band mustn't squeeze them. From 0 if not `log`.

    Panels without a value that such an axis can show (self-duality is defined at one layer alone) stay as they are.
    """
    values = np.concatenate([np.asarray(line.get_ydata()) for axes in panels for line in axes.get_lines()])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        for axes in panels:
            axes.set_ylim((values.min() / 1.6, values.max() * 1.6) if log else (0, values.max() * 1.15))


def class_handles(heldout: bool) -> list[Line2D]:
    if not heldout:
        return []
    return [
        Line2D([], [], color="#222222", linewidth=1.5, label="training tasks"),
        Line2D([], [], color="#222222", label="held-out tasks (darker)", **DASHED),
    ]


def band_note(groups: Sequence[Sequence[Run]], of_one: str = "1.96 standard errors over its tasks") -> str:
    """What the band is: of seeds, and `of_one` where there is a single run."""
    counts = {len(runs) for runs in groups}
    if counts == {1}:
        return f"95% band: {of_one}"
    seeds = f"95% band: t interval over {logs.either(counts - {1})} seeds"
    return seeds + (f"; of a single seed, {of_one}" if 1 in counts else "")


def lacking(panels: Sequence[Panel], groups: Sequence[Sequence[Run]]) -> str:
    """What a note says of nulls that aren't in the logs."""
    nulls = [logs.is_logged(runs, "finetuned", f"{panel.metric}_null") for panel in panels for runs in groups]
    return "" if all(nulls) else "; no null is drawn where the log has none"


def has_heldout(groups: Sequence[Sequence[Run]]) -> bool:
    return all(logs.common_steps(runs, "heldout") for runs in groups)


def last_step(runs: Sequence[Run]) -> int:
    return max(step for classes in ("train", "heldout") for step in [0, *logs.common_steps(runs, classes)])


def layer_words(runs: Sequence[Run], layer: str) -> str:
    return f"layer {layer}" + (" (last hidden layer)" if layer == logs.last_hidden(runs[0]) else "")


def data_names(groups: Sequence[Sequence[Run]]) -> str:
    return logs.either({runs[0].data["name"] for runs in groups})


def setting_words(runs: Sequence[Run]) -> str:
    return f"{logs.describe(runs[0])}, {seed_words(runs)}"


def seed_words(runs: Sequence[Run]) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def setting_and_queries(groups: Sequence[Sequence[Run]]) -> str:
    """The setting, if there is one alone, and the queries."""
    queries = f"{logs.either({runs[0].settings['k_qry'] for runs in groups})} queries a class"
    return f"{setting_words(groups[0])}; {queries}" if len(groups) == 1 else queries


def measurement_words(groups: Sequence[Sequence[Run]], *classes: str) -> str:
    return f"{setting_and_queries(groups)}; each measurement: {task_words(groups, *classes)}\n{TRANSDUCTIVE}"


def task_words(groups: Sequence[Sequence[Run]], *classes: str) -> str:
    """How many tasks a measurement has: "8 training tasks or 100 held-out tasks"."""
    names = {"train": "training tasks", "heldout": "held-out tasks"}
    chosen = [one for one in classes or names if one == "train" or has_heldout(groups)]
    every = [run for runs in groups for run in runs]
    return " or ".join(f"{logs.either(logs.task_counts(every, one))} {names[one]}" for one in chosen)


