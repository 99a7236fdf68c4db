"""The study's numbers, computed from the logs under res/ and written where the README shows them.

    python nc_statistics.py            rewrite res/statistics.md and the README's tables
    python nc_statistics.py --check    exit with status 2 if they aren't what the logs give

In README.md the tables stand between `<!-- statistics -->` and `<!-- /statistics -->` (the claims, short) and between
`<!-- accuracies -->` and `<!-- /accuracies -->`; res/statistics.md has both, and every metric, layer and model.

effects.py computes the numbers; here they are put into tables, whose rows are a label and what to compute.
"""

import math
from pathlib import Path
from typing import Callable, Sequence

import effects
import files
import runs as logs
from runs import Run

HERE = Path(__file__).resolve().parent

MODELS = ("meta", "finetuned")
NAMES = {  # of the logged metrics, in tables
    "relative_within": "NC1: relative within trace",
    "relative_within_unbiased": "NC1: relative within trace, unbiased",
    "nc1": "NC1: tr(S_W pinv S_B) / C",
    "cdnv": "CDNV",
    "equinorm": "NC2: equinorm",
    "equiangularity": "NC2: equiangularity",
    "etf_error": "NC2: ETF error",
    "self_duality": "NC3: self-duality",
    "ncc_mismatch": "NC4: mismatch with the nearest class mean",
    "ncc_accuracy": "NC4: nearest-class-mean accuracy",
}

# In percent, MAML / first order; as published (see accuracies).
PUBLISHED = {
    ("Omniglot", 5, 1): "98.7 ± 0.4 / 98.3 ± 0.5",
    ("Omniglot", 5, 5): "99.9 ± 0.1 / 99.2 ± 0.2",
    ("Omniglot", 20, 1): "95.8 ± 0.3 / 89.4 ± 0.5",
    ("Omniglot", 20, 5): "98.9 ± 0.2 / 97.9 ± 0.1",
    ("miniImageNet", 5, 1): "48.70 ± 1.84 / 48.07 ± 1.75",
    ("miniImageNet", 5, 5): "63.11 ± 0.92 / 63.15 ± 0.91",
}


def written(interval: effects.Estimate) -> str:
    """ "0.38 ± 0.02", or "0.97 [0.93, 0.99]" where the interval isn't symmetric; for a single run the mean alone."""
    mean, low, high = interval
    half = (high - low) / 2
    if not half > 0:  # a single run, or all runs equal
        return number(mean)
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 4)  # two digits of the half-width, four at most
    mean_text, low_text, high_text, half_text = (_fixed(value, decimals) for value in (mean, low, high, half))
    if math.isclose(mean - low, high - mean, rel_tol=1e-6):
        return f"{mean_text} ± {half_text}"
    return f"{mean_text} [{low_text}, {high_text}]"


def number(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "undefined"
    return _fixed(value, max(2 - math.floor(math.log10(abs(value))), 0) if value else 0)


def _fixed(value: float, decimals: int) -> str:
    """With a typographic minus sign, and none for zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


# ---- tables: a row is a label and a function of a setting's runs and a layer

Row = tuple[str, Callable[[Sequence[Run], str], str]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def filled(rows: Sequence[Row], columns: Sequence[tuple[Sequence[Run], str]]) -> list[list[str]]:
    """The rows' cells, one for each column's runs and layer."""
    return [[label, *(cell(runs, layer) for runs, layer in columns)] for label, cell in rows]


def estimate(runs: Sequence[Run], value: Callable[[Run], float]) -> str:
    """A number of each run, over the runs."""
    return written(effects.over_seeds([value(run) for run in runs]))


def moved(runs: Sequence[Run], *values: Callable[[Run], float]) -> str:
    """From where to where, as means over the runs."""
    return " → ".join(number(effects.over_seeds([value(run) for run in runs]).mean) for value in values)


def trace_rows(model: str, metric: str, step: str) -> list[Row]:
    """How a metric moves on training tasks: from step to end, the change, the slope."""

    def slope_row(first: int) -> Row:
        return (f"{model}, slope per tenfold of steps, from step {first:,}",
                lambda runs, layer: estimate(runs, lambda run: effects.slope(run, model, metric, layer, first)))

    return [
        (f"{model}, step {step} → end", lambda runs, layer: moved(
            runs,
            lambda run: effects.at(run, model, metric, layer, "train", effects.first_step(run)),
            lambda run: effects.at_end(run, model, metric, layer, "train"))),
        (f"{model}, change", lambda runs, layer: estimate(runs, lambda run: effects.change(run, model, metric, layer))),
        slope_row(effects.SLOPE_FROM),
        slope_row(effects.LATE),
    ]  # fmt: skip


def difference_rows(metric: str) -> list[Row]:
    """At the end: finetuned against meta on either classes, held-out against training for either model."""

    def of_models(classes: str, label: str) -> Row:
        return f"finetuned \N{MINUS SIGN} meta, {label}", lambda runs, layer: estimate(
            runs, lambda run: effects.models_apart(run, metric, layer, classes))

    def of_classes(model: str) -> Row:
        return f"held-out \N{MINUS SIGN} training tasks, {model}", lambda runs, layer: estimate(
            runs, lambda run: effects.classes_apart(run, model, metric, layer))

    return [of_models("train", "training tasks"), of_models("heldout", "held-out tasks"), *map(of_classes, MODELS)]


def correlation_rows() -> list[Row]:
    """CDNV of the finetuned model against held-out error: all checkpoints, the late ones, and these without a trend."""

    def row(name: str, first: int, **how: bool) -> Row:
        return name, lambda runs, layer: written(effects.correlations_over_seeds(
            [effects.correlation(run, layer, first, **how) for run in runs]))

    late = f"from step {effects.LATE:,}"
    beside = f"{late}, beside their trend in log step"
    return [
        row("all checkpoints", 0),
        row(late, effects.LATE),
        row(beside, effects.LATE, detrended=True),
        row(f"{beside}, of ranks", effects.LATE, detrended=True, of_ranks=True),
        (f"standard deviation of log error beside its trend, {late}",
         lambda runs, layer: estimate(runs, lambda run: effects.error_spread(run, layer, effects.LATE))),
        (f"largest fall of held-out accuracy from one checkpoint to the next, {late}, points",
         lambda runs, layer: estimate(runs, lambda run: 100 * effects.largest_fall(run, layer, effects.LATE))),
    ]  # fmt: skip


def original_rows(step: str) -> list[Row]:
    """The relative within trace by the original's class means, and by the labels, of the same features."""

    def row(model: str, label: str, suffix: str) -> Row:
        def cell(runs: Sequence[Run], layer: str) -> str:
            way = moved(
                runs,
                lambda run: effects.share_of_means(run, model, suffix, layer, effects.first_step(run)),
                lambda run: effects.share_of_means(run, model, suffix, layer),
            )
            return f"{way}; {estimate(runs, lambda run: effects.share_change(run, model, suffix, layer))}"

        return f"{model}, {label}: step {step} → end; change", cell

    def apart(model: str) -> Row:
        return f"{model}, change by label \N{MINUS SIGN} change as the original measured", lambda runs, layer: estimate(
            runs, lambda run: effects.share_change(run, model, "", layer)
            - effects.share_change(run, model, "_original", layer))

    return [one for model in MODELS for one in (
        row(model, "as the original measured", "_original"), row(model, "by label", ""), apart(model))]  # fmt: skip


def layer_rows(model: str, metric: str, layers: Sequence[str]) -> list[Row]:
    """How a metric moves on training tasks at each of these layers, not the column's; empty where there is none."""

    def row(layer: str) -> Row:
        def cell(runs: Sequence[Run], _: str) -> str:
            if layer not in logs.layers_of(runs[0]):
                return ""
            way = moved(
                runs,
                lambda run: effects.at(run, model, metric, layer, "train", 0),
                lambda run: effects.at(run, model, metric, layer, "train", effects.first_step(run)),
                lambda run: effects.at_end(run, model, metric, layer, "train"),
            )
            return f"{way}; {estimate(runs, lambda run: effects.change(run, model, metric, layer))}"

        return f"{model}, {layer}", cell

    return [row(layer) for layer in layers]


def accuracy_rows() -> list[Row]:
    """At the end, in percent: either model's classifier, and the nearest support mean in its place."""

    def row(model: str, classes: str, label: str) -> Row:
        return f"{model}, {label}", lambda runs, layer: estimate(
            runs, lambda run: 100 * effects.accuracy_at_end(run, model, classes))

    def nearest(run: Run, model: str, layer: str) -> float:
        return effects.at_end(run, model, "ncc_accuracy", layer, "heldout")

    def by_nearest(model: str) -> Row:
        return f"by the nearest support mean, {model}, held-out tasks", lambda runs, layer: estimate(
            runs, lambda run: 100 * nearest(run, model, layer))

    def apart(run: Run, layer: str) -> float:
        return 100 * (nearest(run, "meta", layer) - effects.accuracy_at_end(run, "finetuned", "heldout"))

    kinds = (("train", "training tasks"), ("heldout", "held-out tasks"))
    return [*(row(model, *kind) for model in MODELS for kind in kinds), *map(by_nearest, MODELS),
            ("meta by the nearest support mean \N{MINUS SIGN} finetuned by the classifier, held-out tasks",
             lambda runs, layer: estimate(runs, lambda run: apart(run, layer)))]  # fmt: skip


def null_rows(model: str) -> list[Row]:
    """Each metric before training and at the end, by how much it changed, and how far the end is from its null."""

    def row(metric: str, name: str) -> Row:
        return name, lambda runs, layer: "; ".join(
            cell(runs, model, metric, layer) for cell in (untrained_to_end, learned, end_from_null))

    return [row(metric, name) for metric, name in NAMES.items()]


def untrained_to_end(runs: Sequence[Run], model: str, metric: str, layer: str) -> str:
    return moved(
        runs,
        lambda run: effects.at(run, model, metric, layer, "heldout", 0),
        lambda run: effects.at_end(run, model, metric, layer, "heldout"),
    )


def learned(runs: Sequence[Run], model: str, metric: str, layer: str) -> str:
    return estimate(runs, lambda run: effects.learned(run, model, metric, layer))


def end_from_null(runs: Sequence[Run], model: str, metric: str, layer: str) -> str:
    if not logs.is_logged(runs, model, f"{metric}_null", "heldout"):
        return "null not logged"
    return estimate(runs, lambda run: effects.from_null(run, model, metric, layer))


def null_at_end(runs: Sequence[Run], model: str, metric: str, layer: str) -> str:
    if not logs.is_logged(runs, model, f"{metric}_null", "heldout"):
        return "not logged"
    return estimate(runs, lambda run: effects.at_end(run, model, f"{metric}_null", layer, "heldout"))


# ---- what is written


def claims(study: Sequence[Sequence[Run]]) -> str:
    """The README's table: a column a setting, a row a claim, at the last hidden layer."""
    step = _steps(study)
    hidden = [(runs, logs.last_hidden(runs[0])) for runs in study]
    logits = [(runs, logs.layers_of(runs[0])[-1]) for runs in study]
    layer = logs.either({layer for _, layer in hidden})
    layers = dict.fromkeys(layer for runs in study for layer in logs.layers_of(runs[0]))
    sections = [
        (f"Relative within trace of the last hidden layer ({layer}), training tasks",
         [row for model in MODELS for row in trace_rows(model, "relative_within", step)], hidden),
        (f"Relative within trace of {layer} at the end", difference_rows("relative_within"), hidden),
        ("Relative within trace of the logits at the end", difference_rows("relative_within"), logits),
        (f"Relative within trace by layer, training tasks: untrained → step {step} → end; change since step {step}",
         [row for model in MODELS for row in layer_rows(model, "relative_within", layers)], hidden),
        ("Relative within trace of the logits' mean traces, training tasks", original_rows(step), logits),
        (f"Finetuned, {layer}, held-out tasks: untrained → end; change; end \N{MINUS SIGN} null",
         null_rows("finetuned"), hidden),
        (f"Query accuracy at the end, %: by the classifier, and by the nearest support mean in {layer}",
         accuracy_rows(), hidden),
        (f"Correlation of log CDNV ({layer}, finetuned) with log held-out error", correlation_rows(), hidden),
    ]  # fmt: skip
    rows = [["seeds", *(str(len(runs)) for runs in study)]]
    for heading, section, columns in sections:
        rows += [[f"**{heading}**", *[""] * len(study)], *filled(section, columns)]
    return table(["", *(_heading(runs) for runs in study)], rows) + "\n\n" + notes(study)


def notes(study: Sequence[Sequence[Run]]) -> str:
    """What the tables' words mean, with the steps that these runs have."""
    everything = [run for runs in study for run in runs]
    tasks = {classes: logs.either(logs.task_counts(everything, classes)) for classes in ("train", "heldout")}
    ends = logs.either({math.ceil(effects.end_from(run)) for run in everything})
    return (
        "± and [ ] are 95% t intervals over seeds (of correlations through Fisher's z), one at a time, not corrected "
        "for their number; a single seed has none. The held-out tasks are the same for every seed: the intervals don't "
        f"cover their choice. Step {_steps(study)}: the measurement nearest to {effects.FROM_STEP}. The end: mean over "
        f"the measurements of the last tenth of training, from step {ends}. Slope: least squares on log10 of the step. "
        "As the original measured: class means over consecutive groups of five rows, whatever their labels. "
        f"Null: the same metric with permuted labels. A measurement: {tasks['train']} training tasks or "
        f"{tasks['heldout']} held-out tasks, features of their query sets, normalised by the query batch's own "
        "statistics. Query accuracy: meta before, finetuned after the inner steps of training. Held-out error: after "
        "the inner steps of training, on the same tasks as CDNV. Correlations are over the checkpoints of a run. Both "
        "quantities follow training, so the rows beside the trend correlate what is left of each beside its own "
        "straight line in log step: they say whether a checkpoint that is more collapsed than its neighbours is more "
        "accurate too. By ranks a few checkpoints far off weigh no more than the others."
    )


def details(runs: Sequence[Run]) -> str:
    """Every layer, model and metric of one setting."""
    last = logs.last_hidden(runs[0])
    columns = [(runs, layer) for layer in logs.layers_of(runs[0])]
    header = ["", *(layer for _, layer in columns)]
    step = _steps([runs])
    parts = [f"## {logs.describe(runs[0], data=True)}, {len(runs)} seed{'s' * (len(runs) > 1)}"]
    for metric in ("relative_within", "relative_within_unbiased"):
        rows = [row for model in MODELS for row in trace_rows(model, metric, step)]
        parts += [f"{NAMES[metric]}, training tasks:", table(header, filled(rows, columns))]
    for metric in ("relative_within", "cdnv"):
        parts += [f"{NAMES[metric]}, at the end:", table(header, filled(difference_rows(metric), columns))]
    parts += ["Correlation of log CDNV (finetuned) with log held-out error:",
              table(header, filled(correlation_rows(), columns))]  # fmt: skip
    rows = [
        [name, model, *(cell(runs, model, metric, last)
                        for cell in (untrained_to_end, learned, null_at_end, end_from_null))]
        for metric, name in NAMES.items()
        for model in MODELS
    ]
    header = ["", "model", "untrained → end", "change", "null at the end", "end \N{MINUS SIGN} null"]
    return "\n\n".join([*parts, f"Held-out tasks, {last}:", table(header, rows)])


def accuracies(groups: Sequence[Sequence[Run]]) -> str:
    """Test accuracy of every committed run, beside the published ones: a row a setting."""
    header = ["", "meta-steps x tasks", "test accuracy, %", "each seed ± over tasks", "minutes a run", "published, %"]
    rows = []
    for runs in groups:
        tests = [logs.read_json(run, "result.json", "test") for run in runs]
        percent = [100 * test["accuracy"][-1] for test in tests]
        seeds = (f"{run.settings['seed']}: {value:.2f} ± {100 * test['ci95'][-1]:.2f}"
                 for run, value, test in zip(runs, percent, tests))  # fmt: skip
        task = runs[0].data["name"], runs[0].settings["n_way"], runs[0].settings["k_spt"]
        steps = logs.either({logs.read_json(run, "args.json", "meta_steps") for run in runs})
        rows.append([
            _heading(runs, data=True), f"{steps} x {runs[0].settings['task_num']}",
            written(effects.over_seeds(percent)) if len(runs) > 1 else f"{percent[0]:.2f}", "<br>".join(seeds),
            _machine(runs), PUBLISHED.get(task, ""),
        ])  # fmt: skip
    return table(header, rows) + "\n\n" + _accuracy_notes(groups)


def _accuracy_notes(groups: Sequence[Sequence[Run]]) -> str:
    tests = [logs.read_json(run, "result.json", "test") for runs in groups for run in runs]
    tasks, queries, steps = (
        logs.either({pick(test) for test in tests})
        for pick in (lambda test: test["tasks"], lambda test: test["k_qry"], lambda test: test["inner_steps"][-1])
    )
    return (
        f"On {tasks} tasks of the test classes, {queries} queries a class, after {steps} inner steps, with the weights "
        "of the best validation accuracy. ±: 95%, a t interval over seeds, normal over tasks. Published: MAML / "
        "first-order MAML (Finn, Abbeel, Levine 2017; first order on Omniglot from Nichol, Achiam, Schulman 2018), "
        "after 60,000 meta-steps of 32 tasks (5-way Omniglot) and with as many queries a class as shots. With more "
        "queries the same model measures lower, because batch norm uses the query batch's own statistics, and these "
        "runs are shorter: the published numbers are for orientation."
    )


def _machine(runs: Sequence[Run]) -> str:
    """Minutes from the fastest run to the slowest, and what they ran on."""
    minutes = sorted({round(logs.read_json(run, "timing.json", "training_minutes")) for run in runs})
    devices = [logs.read_json(run, "args.json", "device") for run in runs]
    names = {
        f"{device['name']}, {device['threads']} thread{'s' * (device['threads'] > 1)}"
        if device["type"] == "cpu"
        else device["name"]
        for device in devices
    }
    return f"{' to '.join(str(value) for value in sorted({minutes[0], minutes[-1]}))}; {logs.either(names)}"


def _heading(runs: Sequence[Run], data: bool = False) -> str:
    """A setting's name; with its data set where that isn't Omniglot."""
    return logs.describe(runs[0], data=data or runs[0].data["name"] != "Omniglot")


def _steps(study: Sequence[Sequence[Run]]) -> str:
    return logs.either({effects.first_step(run) for runs in study for run in runs})


# ---- the program


def committed_study(folder: Path) -> list[list[Run]]:
    """The study's settings that have runs in `folder`, in the study's order.

    Raises:
        UserError: there are none.
    """
    found = [paths for setting in logs.STUDY if (paths := logs.committed(setting.name, folder))]
    if not found:
        raise files.UserError(f"no run of the study in {folder}; run it first: python study.py, and --collect")
    return [logs.read_runs(paths) for paths in found]


def documents(home: Path) -> dict[Path, str]:
    """The files that hold numbers, with the text that the logs under `home`/res give them.

    Raises:
        UserError: a log is missing or broken, or README.md has no place for the tables.
    """
    study = committed_study(home / "res")
    trained = sorted({path.parent for path in (home / "res").glob("*/result.json")})
    marked = {"statistics": claims(study), "accuracies": accuracies(logs.grouped(trained))}
    readme = home / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, body in marked.items():
        text = between_markers(text, name, body, readme)
    whole = ["# The study's numbers", "Written by `python nc_statistics.py` from the logs in this folder.",
             marked["statistics"], "## Accuracy", marked["accuracies"], *(details(runs) for runs in study)]
    return {home / "res" / "statistics.md": "\n\n".join(whole) + "\n", readme: text}


def between_markers(text: str, name: str, body: str, path: Path) -> str:
    """`text` with `body` between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        UserError: the markers aren't there, once each, in order.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise files.UserError(f"{path} needs one {start} and after it one {end}, where the numbers go")
    return f"{text[:text.index(start)]}{start}\n{body}\n{text[text.index(end):]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables, or with --check say which aren't what the logs give."""
    parser = files.Parser(description="Compute the study's numbers from the logs in res/; write them where they stand.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    options = parser.parse_args(arguments)
    for path, text in documents(HERE).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            print(f"{path.relative_to(HERE)}: as the logs give it")
        elif options.check:
            raise files.UserError(f"{path} isn't what the logs in res/ give; run python nc_statistics.py")
        else:
            with files.atomic(path, "w") as file:
                file.write(text)
            print(f"wrote {path.relative_to(HERE)}")


if __name__ == "__main__":
    files.run(main)
