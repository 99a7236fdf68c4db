"""Draws how within- and between-class traces move while MAML trains, from the training scripts' logs.

    python plot_nc.py                          rewrite result.png from the logs committed under res/
    python plot_nc.py RUN                      draw another run into RUN/result.png
    python plot_nc.py RUN RUN RUN -o FILE.png  several seeds of one setting: their mean with a 95% band
    python plot_nc.py RUN --layer block2       another layer than the last hidden one
    python plot_nc.py RUN RUN --accuracy -o FILE.png    validation accuracy of different settings, a line each

A RUN is a run's folder (log.jsonl or log.jsonl.gz, and args.json) or the log itself with args.json beside it.

The panels are those of the original: the meta model's traces and its relative within trace over the first
7,500 meta-steps, then traces and relative traces over the whole run, for the meta model (before adaptation)
and the finetuned model (after the inner steps). Traces are those of the within- and between-class covariance
of query features, task by task (Rangamani, Lindegaard, Galanti and Poggio, 2023). The band is a t interval
over seeds; for a single run it is the mean over tasks and 1.96 standard errors to each side.
"""

import gzip
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

import files

HERE = Path(__file__).resolve().parent
DEFAULT_RUNS = "omniglot-5w1s"  # run folders under res/ whose names start so make result.png
EARLY_STEPS = 7_500  # the original's first figure: 3 epochs of 2,500 meta-steps

# Settings that leave the measured numbers' meaning alone: runs that differ in these are seeds of one setting.
NOT_COMPARED = {"seed", "out", "root", "cache", "device", "task_chunk", "cuda_graph", "print_every", "test_tasks"}

LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, of --accuracy
WITHIN, BETWEEN, NOISE = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's blue and vermilion; grey
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
WIDTH, HEIGHT, DPI = 9.0, 12.8, 200  # inches; 1,800 pixels wide, shown at about 900 in a README

_DASHED = {"linestyle": (0, (4, 2)), "linewidth": 1.1}

# 97.5% points of Student's t for 1..10 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Run:
    """One training run: where it is, what it was asked for, on which data, and its log's rows in order."""

    path: Path
    settings: dict
    data: dict
    rows: list[dict]


class Curve(NamedTuple):
    """A quantity against meta-steps: steps, mean and its 95% band's edges, each [S]; nan where missing."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


# ---- reading


def read_log(path: Path) -> list[dict]:
    """The rows of a log, one JSON object a line, plain or gzipped (.gz).

    A run that was stopped while writing leaves half a last line: it is ignored, with a note on stderr.

    Raises:
        UserError: the file is missing or unreadable, or another line isn't a JSON object.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = file.read().split(b"\n")
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise files.UserError(f"can't read {path}: {reason}; name a run folder or its log") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == numbered[-1][0]:
                print(f"note: {path}, line {number}: half-written, ignored", file=sys.stderr)
                break
            raise files.UserError(f"{path}, line {number}: not JSON; mend or remove that line") from error
        if not isinstance(row, dict):
            raise files.UserError(f"{path}, line {number}: not a JSON object; mend or remove that line")
        rows.append(row)
    return rows


def read_run(path: Path) -> Run:
    """The run at `path`: a folder with log.jsonl or log.jsonl.gz, or such a log, with args.json beside it.

    Raises:
        UserError: the folder, the log or args.json is missing or broken.
    """
    path = Path(path)
    if not path.exists():
        raise files.UserError(f"no run at {path}; name a run folder or its log")
    if path.is_dir():
        logs = [log for log in (path / "log.jsonl", path / "log.jsonl.gz") if log.is_file()]
        if not logs:
            raise files.UserError(f"no log.jsonl in {path}; name the folder that a training script wrote")
        path = logs[0]
    settings_path = path.parent / "args.json"
    try:
        arguments = json.loads(settings_path.read_bytes())
        settings, data = dict(arguments["settings"]), dict(arguments["data"])
        str(data["name"]), int(settings["n_way"]), int(settings["k_spt"]), int(settings["k_qry"])
    except OSError as error:
        raise files.UserError(
            f"can't read {settings_path}, which says what data and settings the run had: {error.strerror}; "
            f"keep it beside the log"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise files.UserError(
            f"{settings_path} isn't a run's args.json (settings, data): {type(error).__name__}: {error}; "
            f"take it from the run's folder again"
        ) from error
    return Run(path.parent, settings, data, read_log(path))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs to be averaged: different seeds of one setting on one data set.

    Raises:
        UserError: a run can't be read, settings differ, or a seed comes twice.
    """
    runs = [read_run(path) for path in paths]
    first = runs[0]
    for index, run in enumerate(runs):
        differing = differing_settings([first, run])
        if first.data["name"] != run.data["name"]:
            differing.insert(0, "the data set")
        if differing:
            raise files.UserError(
                f"{first.path} and {run.path} differ in {', '.join(differing)}; only seeds of one setting "
                f"are averaged: draw them apart"
            )
        for other in runs[:index]:
            if other.settings.get("seed") == run.settings.get("seed"):
                raise files.UserError(
                    f"{other.path} and {run.path} have the same seed, {run.settings.get('seed')}; "
                    f"name one of them"
                )
    return runs


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which the runs differ, apart from what doesn't change the experiment."""
    names = set().union(*(run.settings for run in runs)) - NOT_COMPARED
    return sorted(name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1)


def committed_runs() -> list[Path]:
    """The run folders under res/ that result.png is made from, in order of name.

    Raises:
        UserError: there are none.
    """
    folders = sorted({log.parent for log in (HERE / "res").glob(f"{DEFAULT_RUNS}*/log.jsonl*")})
    if not folders:
        raise files.UserError(
            f"no log at res/{DEFAULT_RUNS}*/log.jsonl*; name runs instead: python plot_nc.py RUN..."
        )
    return folders


# ---- from rows to curves


def measurements(run: Run, classes: str) -> dict[int, dict]:
    """Measured rows of a run by meta-step; `classes` is "train" or "heldout"; of a repeated step the last."""
    rows = (row for row in run.rows if row.get("kind") == "nc" and row.get("classes") == classes)
    try:
        return {int(row["step"]): row for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise files.UserError(f"{run.path}: a measurement has no step; its log is broken") from error


def layers_of(run: Run) -> list[str]:
    """Names of the measured layers, first to last.

    Raises:
        UserError: the run has no measurements of training tasks.
    """
    measured = measurements(run, "train")
    if not measured:
        off = run.settings.get("nc_every") == 0
        why = "it ran with --nc_every 0" if off else "it stopped before the first"
        raise files.UserError(
            f"{run.path} holds no neural-collapse measurements ({why}); train it with --nc_every 100, say"
        )
    layers = next(iter(measured.values())).get("layers")
    if not isinstance(layers, list) or not layers:
        raise files.UserError(f"{run.path}: a measurement names no layers; its log is broken")
    return layers


def curve(runs: Sequence[Run], model: str, metric: str, layer: str, classes: str = "train") -> Curve | None:
    """`metric` of `layer` against meta-steps, for `model` "meta" or "finetuned"; None if never measured.

    Several runs: mean over runs at the steps that all of them have, with its t interval. One run: mean over
    the tasks of a measurement and 1.96 standard errors to each side.

    Raises:
        UserError: a measurement lacks the metric or the layer.
    """
    measured = [measurements(run, classes) for run in runs]
    steps = sorted(set.intersection(*(set(rows) for rows in measured)))
    if not steps:
        return None
    mean = np.empty((len(runs), len(steps)))  # [R, S]
    error = np.empty_like(mean)
    for r, rows in enumerate(measured):
        for s, step in enumerate(steps):
            try:
                index = rows[step]["layers"].index(layer)
                values = rows[step][model][metric]
                mean[r, s] = _number(values["mean"][index])
                error[r, s] = _number(values["se"][index])
            except (KeyError, IndexError, TypeError, ValueError) as failure:
                raise files.UserError(
                    f"{runs[r].path}: the {classes} measurement at step {step} lacks {model} {metric} of "
                    f"{layer}; its log is broken"
                ) from failure
    steps = np.array(steps)
    if len(runs) == 1:
        centre, half = mean[0], 1.96 * error[0]
    else:
        centre = mean.mean(0)
        half = student_t(len(runs) - 1) * mean.std(0, ddof=1) / math.sqrt(len(runs))
    return Curve(steps, centre, centre - half, centre + half)


def student_t(freedom: int) -> float:
    """97.5% point of Student's t distribution, to 0.001; Cornish and Fisher's expansion beyond the table."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def noise_share(n_way: int, k_qry: int) -> float:
    """Relative within trace of pure noise: (n-1)/(n-1 + (C-1)/C), n queries in each of C classes."""
    return (k_qry - 1) / (k_qry - 1 + (n_way - 1) / n_way)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# ---- drawing


def figure(runs: Sequence[Run], layer: str | None = None) -> Figure:
    """The seed's panels for `runs` (seeds of one setting), for one layer; default the last hidden layer.

    Raises:
        UserError: no measurements, no such layer, or no value at it.
    """
    layers = [layers_of(run) for run in runs][0]
    layer = layers[max(len(layers) - 2, 0)] if layer is None else layer
    if layer not in layers:
        raise files.UserError(
            f"no layer {layer!r} in {runs[0].path}; --layer takes one of: {', '.join(layers)}"
        )

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
    figure.set_layout_engine("constrained", rect=(0.005, 0.078, 0.985, 0.838), h_pad=0.09, w_pad=0.08)
    grid = figure.add_gridspec(4, 2, height_ratios=[1.1, 0.9, 1, 1])
    early, early_share = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, :])
    panels = {
        model: (figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1]))
        for row, model in enumerate(("meta", "finetuned"), start=2)
    }

    curves = _curves(runs, layer)
    if not any(np.isfinite(c.mean).any() for (_, _, classes), c in curves.items() if classes == "train"):
        raise files.UserError(
            f"{runs[0].path}: no finite trace at layer {layer}; traces need two queries a class or more"
        )
    last = max(int(c.steps[-1]) for c in curves.values())
    first_steps = min(EARLY_STEPS, last)
    wide = _spans_decades([c for (_, metric, _), c in curves.items() if metric in ("within", "between")])
    noise = noise_share(int(runs[0].settings["n_way"]), int(runs[0].settings["k_qry"]))

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

    title, subtitle = captions(runs, layer)
    figure.text(0.5, 0.987, title, ha="center", va="top", fontsize=14, weight="bold", linespacing=1.3)
    figure.text(0.5, 0.948, subtitle, ha="center", va="top", fontsize=10.5, linespacing=1.35)
    _legend(figure, any(classes == "heldout" for _, _, classes in curves), noise, len(runs))
    return figure


def accuracy_figure(runs: Sequence[Run]) -> Figure:
    """Validation accuracy against meta-steps, one line a run, named by what the runs differ in.

    Raises:
        UserError: a run was never validated.
    """
    figure = Figure(figsize=(WIDTH, 5.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    names = differing_settings(runs) or ["seed"]
    for run, colour in zip(runs, itertools.cycle(LINES)):
        rows = [row for row in run.rows if row.get("kind") == "val"]
        if not rows:
            raise files.UserError(f"{run.path} holds no validation accuracy; let it run to its first validation")
        steps = [row["step"] for row in rows]
        mean, half = (100 * np.array([row[key][-1] for row in rows], float) for key in ("acc", "ci95"))
        label = ", ".join(_phrase(name, run.settings.get(name)) for name in names)
        axes.plot(steps, mean, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
        axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    settings, tasks = runs[0].settings, rows[0]["tasks"]
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("meta-step")
    axes.set_ylabel("accuracy on held-out classes (%)")
    axes.set_title(f"{', '.join(sorted({run.data['name'] for run in runs}))}: {settings['n_way']}-way "
                   f"{settings['k_spt']}-shot, {settings['k_qry']} queries a class\n"
                   f"after {settings.get('update_step_test', 'all')} inner steps, {tasks} validation tasks; band: 95% over tasks")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _phrase(name: str, value) -> str:
    if name == "first_order":
        return "first order" if value else "second order"
    return f"{name} {value}"


def captions(runs: Sequence[Run], layer: str) -> tuple[str, str]:
    """Title and subtitle: data set ("synthetic" if it is), layer, task shape, tasks a measurement, seeds."""
    settings = runs[0].settings
    layers = layers_of(runs[0])
    place = " (last hidden layer)" if layer == layers[max(len(layers) - 2, 0)] else ""
    title = f"Class traces while MAML trains on {runs[0].data['name']}\nlayer {layer}{place}"
    order = {True: ", first order", False: ", second order"}.get(settings.get("first_order"), "")
    net = f", {settings['net']} network" if "net" in settings else ""
    shape = f"{settings['n_way']}-way {settings['k_spt']}-shot, {settings['k_qry']} queries a class"
    tasks = f"{_tasks(runs, 'train')} training tasks"
    if measurements(runs[0], "heldout"):
        tasks += f" or {_tasks(runs, 'heldout')} held-out tasks"
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return title, f"{shape}{order}{net}\neach measurement: query sets of {tasks}; {seeds}"


def _tasks(runs: Sequence[Run], classes: str) -> str:
    counts = {str(row.get("tasks", "?")) for run in runs for row in measurements(run, classes).values()}
    return " or ".join(sorted(counts))


def _curves(runs: Sequence[Run], layer: str) -> dict[tuple[str, str, str], Curve]:
    """The figure's curves by (model, metric, classes); the relative between trace is 1 - the within one."""
    curves = {}
    for classes in ("train", "heldout"):
        for model in ("meta", "finetuned"):
            for metric in ("within", "between", "relative_within"):
                found = curve(runs, model, metric, layer, classes)
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
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for metric, colour in (("within", WITHIN), ("between", BETWEEN)):
        _draw(axes, curves, model, metric, colour, until)
    # From zero where that is possible; else a band that reaches toward zero must not stretch the axis.
    means = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    axes.set_ylim(bottom=0.6 * np.nanmin(means) if wide else 0)
    axes.set_ylabel("trace" + (", log scale" if wide else "") + "\n(squared feature units)")


def _draw_shares(
    axes: Axes, curves: dict, model: str, noise: float, parts: Sequence[str], until: int
) -> None:
    axes.axhline(noise, color=NOISE, linestyle=":", linewidth=1.6)
    for part in parts:
        _draw(axes, curves, model, f"relative_{part}", WITHIN if part == "within" else BETWEEN, until)
    axes.set_ylabel("share of total trace")


def _draw(axes: Axes, curves: dict, model: str, metric: str, colour: str, until: int) -> None:
    """One quantity up to step `until`: training tasks solid; held-out ones thin, dashed, darker, on top."""
    solid, dashed = {"color": colour, "linewidth": 1.5}, {"color": DARKER[colour], **_DASHED}
    for classes, line, shade in (("train", solid, 0.25), ("heldout", dashed, 0.12)):
        found = curves.get((model, metric, classes))
        if found is None:
            continue
        steps, mean, low, high = (part[found.steps <= until] for part in found)
        marker = "o" if len(steps) < 12 else None  # few points: a line alone would hide where they are
        axes.fill_between(steps, low, high, color=colour, alpha=shade, linewidth=0)
        axes.plot(steps, mean, marker=marker, markersize=3.5, **line)
    axes.set_xlim(0, until * 1.02)
    axes.set_xlabel("meta-step")
    axes.xaxis.set_major_locator(MaxNLocator(5 if axes.get_subplotspec().colspan.stop - axes.get_subplotspec().colspan.start == 1 else 8))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _legend(figure: Figure, heldout: bool, noise: float, n_runs: int) -> None:
    """Below all panels, where it covers nothing."""
    handles = [
        Line2D([], [], color=WITHIN, linewidth=2.5, label="within classes"),
        Line2D([], [], color=BETWEEN, linewidth=2.5, label="between classes"),
        Line2D([], [], color=NOISE, linestyle=":", linewidth=1.6, label=f"within, pure noise: {noise:.3f}"),
        Patch(color=NOISE, alpha=0.4, linewidth=0, label="95% band"),
    ]
    if heldout:
        handles[2:2] = [
            Line2D([], [], color="#222222", linewidth=1.5, label="training tasks"),
            Line2D([], [], color="#222222", label="held-out tasks (darker)", **_DASHED),
        ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.022))
    over = (
        "95% band over tasks: mean \u00b1 1.96 standard errors of a measurement's tasks"
        if n_runs == 1
        else f"95% band over seeds: t interval of the mean of {n_runs} seeds"
    )
    figure.text(0.5, 0.01, over, ha="center", va="bottom", fontsize=10.5)


# ---- the program


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs that the command line names, draw them, write the picture, say where it is."""
    parser = files.Parser(
        description="Draw within- and between-class traces against meta-steps from training logs.",
        epilog="With no RUN: rewrite result.png from the logs committed under res/.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder or log; several: seeds")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="PNG to write (default: result.png in the RUN)"
    )
    parser.add_argument("--layer", metavar="NAME", help="layer to draw (default: the last hidden layer)")
    parser.add_argument("--accuracy", action="store_true", help="draw validation accuracy, one line a RUN")
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.suffix.lower() != ".png":
        raise files.UserError(f"{options.output}: pictures are PNG files; name one that ends in .png")

    paths = options.runs or committed_runs()
    runs = [read_run(path) for path in paths] if options.accuracy else read_runs(paths)
    if not options.accuracy:
        _note_unequal(runs)
    output = options.output or (runs[0].path if options.runs else HERE) / (
        "accuracy.png" if options.accuracy else "result.png")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same picture whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        picture = accuracy_figure(runs) if options.accuracy else figure(runs, options.layer)
        with files.atomic(output) as file:
            picture.savefig(file, format="png", metadata={"Software": None})  # same input, same bytes
    print(f"wrote {output}: {len(runs)} run(s), {runs[0].data['name']}")


def _note_unequal(runs: Sequence[Run]) -> None:
    ends = [max(measurements(run, "train"), default=0) for run in runs]
    if min(ends) < max(ends):
        shortest = runs[ends.index(min(ends))].path
        print(f"note: drawn up to meta-step {min(ends):,}, where {shortest} ends", file=sys.stderr)


if __name__ == "__main__":
    files.run(main)
