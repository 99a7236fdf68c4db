"""The study's numbers, from the logs under res/, in Markdown tables.

    python -m study.tables             rewrite the tables of study/README.md and README.md
    python -m study.tables --check     exit with status 1, naming the first number that is not what the logs give
    python -m study.tables collapse    print one table

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. A table of runs that are not in res/ yet says so.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from study import effects
from study.effects import MISSING, Estimate, correlated, fixed, written
from study.logs import HOME, Parser, Run, Study, UserError, describe, number, run_program, write_bytes
from study.run import SETTINGS

MAIN = ("omniglot-5w1s", "omniglot-5w5s", "omniglot-5w1s-first-order-original")
PHOTOGRAPHS = ("tinyimagenet-in-miniimagenet-layout-5w5s",
               "tinyimagenet-in-miniimagenet-layout-5w5s-first-order-original")  # fmt: skip
CELLS = ("omniglot-5w1s", "omniglot-5w1s-first-order", "omniglot-5w1s-original", "omniglot-5w1s-first-order-original")
LEARNERS = tuple(name for name in SETTINGS if name.startswith("contrast-"))
RANDOM = "random-labels"
LONG = tuple(name for name in SETTINGS if name.startswith("paper-"))
MODELS = {"meta": "before adaptation", "finetuned": "adapted"}
METRICS = {"relative_within": "relative within trace", "nc1": "tr(S_W S_B⁺)/C", "cdnv_unbiased": "CDNV, unbiased",
           "directional_cdnv": "directional CDNV", "etf_error": "ETF error"}  # fmt: skip
NAMED_LAYERS = tuple(zip(range(-5, 0), ("block 1", "block 2", "block 3", "block 4", "logits")))

# In percent, MAML / first-order MAML: Finn, Abbeel, Levine 2017; first order on Omniglot: Nichol et al. 2018.
PUBLISHED = {("Omniglot", 5, 1): "98.7 ± 0.4 / 98.3 ± 0.5", ("Omniglot", 5, 5): "99.9 ± 0.1 / 99.2 ± 0.2",
             ("Omniglot", 20, 1): "95.8 ± 0.3 / 89.4 ± 0.5", ("Omniglot", 20, 5): "98.9 ± 0.2 / 97.9 ± 0.1",
             ("miniImageNet", 5, 1): "48.70 ± 1.84 / 48.07 ± 1.75",
             ("miniImageNet", 5, 5): "63.11 ± 0.92 / 63.15 ± 0.91"}  # fmt: skip
BY = {"nearest support mean": ("nearest_mean", 0), "nearest support mean, adapted": ("nearest_mean", -1),
      "classifier, adapted": ("accuracy", -1)}  # key and inner step in results  # fmt: skip
LENGTHS = (0, 1_000, 6_000, 20_000, 40_000, 60_000)  # meta-steps, of the table over a long run

Cell = Callable[[list[Run]], str]


# ---- cells and tables


def over(value: Callable[..., float], scale: float = 1, **options) -> Cell:
    """A cell: a number of each run, over the seeds."""
    return lambda runs: written(effects.over_seeds([scale * value(run, **options) for run in runs]))


def from_untrained(model: str, metric: str, layer: int = -2) -> Cell:
    """ "untrained → end" on held-out tasks, at a layer counted as in a list."""
    def cell(runs: list[Run]) -> str:
        if not all(effects.logged(run, model, metric) for run in runs):
            return MISSING
        what = {"model": model, "metric": metric, "layer": layer}
        start, stop = (over(value, **what)(runs) for value in (effects.untrained, effects.end))
        return f"{re.split(r' [±[]', start)[0]} → {stop}"

    return cell


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def compared(study: Study, names: Sequence[str], rows: Sequence[tuple[str, Cell]]) -> str:
    """A table with a column per setting."""
    columns = {SETTINGS[name].label: study[name] for name in names if study[name]}
    if not columns:
        return ""
    rows = [("seeds", lambda runs: str(len(runs))), *rows]
    return table(["", *columns], [[label, *(cell(runs) for runs in columns.values())] for label, cell in rows])


# ---- the seed's recipe: collapse, layers, adaptation, correlation, the original's measure


def at_input(value: Callable[..., float], metric: str, scale: float = 1) -> Cell:
    """A number of the adapted model at the classifier's input, held-out tasks."""
    return over(value, scale, model="finetuned", metric=metric)


def heldout_gap(runs: list[Run]) -> str:
    """Held-out minus training tasks; the interval over seeds, over tasks, and both together."""
    what = "finetuned", "relative_within"
    mean, low, high = effects.over_seeds([effects.heldout_minus_train(run, *what) for run in runs])
    tasks = float(np.mean([effects.over_tasks(run, *what) for run in runs]))
    halves = {"seeds": (high - low) / 2, "tasks": tasks, "both": math.hypot((high - low) / 2, tasks)}
    halves = [f"{name} ± {fixed(half, 3)}" for name, half in halves.items() if half > 0]
    return f"{fixed(mean, 3)}; {', '.join(halves)}" if math.isfinite(mean) else MISSING


SUMMARY = [
    ("relative within trace, adapted", from_untrained("finetuned", "relative_within")),
    ("between trace, end / untrained", at_input(effects.growth, "between")),
    ("within trace, end / untrained", at_input(effects.growth, "within")),
    ("CDNV, unbiased, adapted", from_untrained("finetuned", "cdnv_unbiased")),
    ("NC2: ETF error, adapted", from_untrained("finetuned", "etf_error")),
    ("dimension of random directions with that error", over(effects.matched_dimension, model="finetuned")),
    ("nearest support mean before adaptation, %", over(effects.nearest_mean, 100, model="meta")),
    ("classifier, adapted, %", over(effects.accuracy_at_end, 100, inner_step=-1)),
    ("difference, points", over(lambda run: effects.nearest_mean(run, "meta") - effects.accuracy_at_end(run, -1), 100)),
]  # fmt: skip


def collapse(study: Study) -> str:
    return compared(study, (*MAIN, *PHOTOGRAPHS), [
        ("relative within trace, before adaptation", from_untrained("meta", "relative_within")), SUMMARY[0],
        ("of the support set, adapted", from_untrained("support", "relative_within")),
        ("held-out minus training tasks, adapted, end", heldout_gap),
        *SUMMARY[1:3], ("within trace, lowest / untrained", at_input(effects.lowest, "within")),
        ("tr(S_W S_B⁺)/C, adapted", from_untrained("finetuned", "nc1")), SUMMARY[3],
        ("CDNV, unbiased, untrained / end",
         at_input(lambda run, **what: 1 / effects.growth(run, **what), "cdnv_unbiased")),
        ("directional CDNV, adapted", from_untrained("finetuned", "directional_cdnv")), *SUMMARY[4:6],
        ("NC2 before adaptation: ETF error", from_untrained("meta", "etf_error")),
        ("dimension of random directions with that error", over(effects.matched_dimension, model="meta")),
        ("NC3: self-duality, adapted", from_untrained("finetuned", "self_duality")),
        ("NC4: mismatch with the nearest support mean, adapted", from_untrained("finetuned", "ncc_mismatch")),
    ])  # fmt: skip


def accuracy(study: Study) -> str:
    return compared(study, (*MAIN, *PHOTOGRAPHS), [
        ("nearest support mean, untrained, %", over(effects.untrained, 100, model="meta", metric="ncc_accuracy")),
        SUMMARY[6], ("nearest support mean, adapted, %", over(effects.nearest_mean, 100, model="finetuned")),
        *SUMMARY[7:],
        ("classifier, adapted, training tasks, %", over(effects.accuracy_at_end, 100, inner_step=-1, split="train")),
        ("largest drop between checkpoints from step 1,000, points", over(effects.largest_drop, 100)),
        ("deviation of log error from its trend, from step 1,000", over(effects.error_spread)),
    ])  # fmt: skip


def layers(study: Study) -> str:
    rows = [(f"{name}, {layer_name}", from_untrained(model, "relative_within", layer))
            for model, name in MODELS.items() for layer, layer_name in NAMED_LAYERS]  # fmt: skip
    return compared(study, MAIN, rows + [
        (f"adapted minus before, {name}", over(effects.adapted_minus_meta, metric="relative_within", layer=layer))
        for layer, name in NAMED_LAYERS])  # fmt: skip


def inner_steps(study: Study) -> str:
    """Accuracy and relative within trace (of the mean traces) along the inner loop, held-out tasks, the end."""
    def share(run: Run, layer: int, inner_step: int) -> float:
        (steps, within), (_, between) = (run.along_inner_loop("heldout", trace, run.layers[layer])
                                         for trace in ("within", "between"))  # fmt: skip
        return float((within / (within + between))[steps >= effects.end_from(run), inner_step].mean())

    quantities = {"accuracy, %": functools.partial(over, effects.accuracy_at_end, 100, split="heldout"),
                  "relative within trace, classifier's input": functools.partial(over, share, layer=-2),
                  "relative within trace, logits": functools.partial(over, share, layer=-1)}  # fmt: skip
    moments = {"before adaptation": 0, "after 1 inner step": 1, "after the last": -1}
    return compared(study, MAIN, [
        (f"{quantity}: {when}", cell(inner_step=step))
        for quantity, cell in quantities.items() for when, step in moments.items()])  # fmt: skip


def correlation(study: Study) -> str:
    """Every layer, metric and model: detrended log metric with detrended log held-out error, from step 1,000."""
    rows = []
    for name in MAIN:
        for metric in ("relative_within", "cdnv", "nc1") if study[name] else ():
            for model, model_name in MODELS.items():
                coefficients = np.array([[effects.correlation(run, model, metric, layer) for layer in run.layers[:-1]]
                                  for run in study[name]])  # [seeds, layers]
                z = np.tanh(np.arctanh(coefficients).mean(1))
                cells = [correlated(effects.correlations_over_seeds(values)) for values in (*coefficients.T, z)]
                rows.append([SETTINGS[name].label, METRICS.get(metric, "CDNV"), model_name, *cells])
    if not rows:
        return ""
    return table(["", "metric", "model", *study[MAIN[0]][0].layers[:-1], "mean over layers"], rows)


def original(study: Study) -> str:
    """Change of the relative within trace of the logits, training tasks: by label and as the original took it."""
    def change(run: Run, model: str, suffix: str, start: int) -> float:
        first = min(run.rows["train"], key=lambda step: abs(step - start))
        return effects.logit_share(run, model, suffix, None) - effects.logit_share(run, model, suffix, first)

    return compared(study, (*MAIN, *PHOTOGRAPHS), [
        (f"{name}, from {since}, {how}", over(change, model=model, suffix=suffix, start=start))
        for model, name in MODELS.items() for start, since in ((0, "untrained"), (100, "about step 100"))
        for suffix, how in (("", "by label"), ("_original", "as the original"))])  # fmt: skip


def cells(study: Study) -> str:
    """Order by network, the seed's recipe."""
    return compared(study, CELLS, [("test accuracy, %", over(effects.own_accuracy, 100)), *SUMMARY[:4],
                                   ("tr(S_W S_B⁺)/C, adapted", from_untrained("finetuned", "nc1")), SUMMARY[6]])


# ---- learners, long runs, controls


def of_control(runs: list[Run], kind: str) -> list[str]:
    """What every table of learners and controls begins with: the metrics before adaptation and the dimension."""
    metrics = [over(effects.measured, model="meta", metric=metric, kind=kind)(runs) for metric in METRICS]
    return [str(len(runs)), *metrics, over(effects.dimension, model="meta", kind=kind)(runs)]


def learner_cells(runs: list[Run], kind: str) -> list[str]:
    def ratio(run: Run, trace: str) -> float:
        return effects.measured(run, "meta", trace, kind) / effects.measured(run, "meta", trace, "untrained")

    ratios = [over(ratio, trace=trace)(runs) if kind == "final" else MISSING for trace in ("between", "within")]
    adapted = over(effects.measured, model="finetuned", metric="relative_within", kind=kind)(runs)
    accuracies = [over(effects.tested(*by, transductive, kind), 100)(runs)
                  for transductive in (True, False) for by in BY.values()]  # fmt: skip
    return [*of_control(runs, kind), adapted, *ratios, *accuracies]


def learners(study: Study) -> str:
    """Raw pixels, the untrained network and every learner, before adaptation if nothing else is said."""
    groups = {SETTINGS[name].label: study[name] for name in LEARNERS if study[name]}
    if not groups:
        return ""
    with_pixels = [run for name in (*LEARNERS, *LONG) for run in study[name] if "pixels" in run.controls()][:1]
    rows = [["raw pixels", *learner_cells(with_pixels, "pixels")]] if with_pixels else []
    rows += [["untrained", *learner_cells(next(iter(groups.values())), "untrained")]]
    rows += [[SETTINGS[RANDOM].label, *learner_cells(study[RANDOM], "final")]] if study[RANDOM] else []
    rows += [[label, *learner_cells(runs, "final")] for label, runs in groups.items()]
    accuracies = [f"{name}, %{how}" for how in ("", ", not transductive") for name in BY]
    return table(["", "seeds", *METRICS.values(), "dimension", "relative within trace, adapted",
                  "between trace / untrained", "within trace / untrained", *accuracies], rows)  # fmt: skip


def contrast(study: Study) -> str:
    """The learners, narrower, for README.md."""
    share = functools.partial(over, effects.measured, metric="relative_within")
    columns = {"relative within trace": share(model="meta"), "adapted": share(model="finetuned"),
               METRICS["nc1"]: over(effects.measured, model="meta", metric="nc1"),
               "nearest support mean, %": over(effects.tested("nearest_mean", 0), 100),
               "adapted classifier, %": over(effects.tested("accuracy", -1), 100),
               "by its own rule, not transductive, %": over(effects.own_accuracy, 100, transductive=False)}  # fmt: skip
    rows = [[SETTINGS[name].label, str(len(study[name])), *(cell(study[name]) for cell in columns.values())]
            for name in LEARNERS if study[name]]  # fmt: skip
    return table(["trained as", "seeds", *columns], rows) if rows else ""


def ranking(study: Study) -> str:
    """Spearman correlation of each metric before adaptation with accuracy, over runs, and over learners' means."""
    groups = [study[name] for name in LEARNERS if study[name]]
    if len(groups) < 3:
        return ""
    smaller = {name: functools.partial(effects.measured, model="meta", metric=metric)
               for metric, name in METRICS.items()}  # fmt: skip
    larger = {"dimension of all class means": functools.partial(effects.dimension, model="meta")}
    rows = []
    for sign, values in ((-1, smaller), (1, larger)):
        for name, value in values.items():
            row = [f"{'smaller' if sign < 0 else 'larger'} {name}"]
            for accuracy_of in (effects.tested("nearest_mean", 0), effects.own_accuracy):
                pairs = [[(sign * value(run), accuracy_of(run)) for run in runs] for runs in groups]
                for points in (sum(pairs, []), [np.mean(group, 0) for group in pairs]):
                    row.append(correlated(Estimate(effects.spearman(*zip(*points)), math.nan, math.nan)))
            rows.append(row)
    counts = f"{sum(map(len, groups))} runs", f"{len(groups)} learners"
    rules = "nearest support mean before adaptation", "the learner's own rule"
    header = ["Spearman correlation with higher accuracy by",
              *(f"{rule}, over {count}" for rule in rules for count in counts)]  # fmt: skip
    return table(header, rows)


def length(study: Study) -> str:
    """The long runs at a few meta-steps, adapted."""
    def near(run: Run, split: str, metric: str, step: int) -> float:
        if metric == "accuracy":
            steps, values = run.along_inner_loop(split, "accuracy")
            values = 100 * values[:, -1]
        else:
            steps, values, _ = effects.series(run, split, "finetuned", metric, run.hidden)
        return float(values[np.abs(steps - step).argmin()])

    names = {name: METRICS.get(name, "accuracy, %") for name in (*METRICS, "accuracy") if name != "directional_cdnv"}
    rows = []
    for name in LONG:
        last = min((run.last_step for run in study[name]), default=-1)
        for step in [step for step in LENGTHS if step <= last]:
            cells = [over(near, split=split, metric=metric, step=step)(study[name])
                     for metric in names for split in ("train", "heldout")]  # fmt: skip
            rows.append([SETTINGS[name].label, f"{step:,}", *cells])
    header = ["", "meta-step", *(f"{label}, {split}" for label in names.values() for split in ("training", "held-out"))]
    picture = "![Collapse and accuracy over a long run, training and held-out classes](../res/length.png)\n\n"
    return picture + table(header, rows) if rows else ""


def controls(study: Study) -> str:
    """Every control of the long runs that have controls.json, before adaptation, over their seeds."""
    rows = []
    for name in LONG:
        having = [run for run in study[name] if run.controls()]
        for kind in dict.fromkeys(kind for run in having for kind in run.controls()):
            runs = [run for run in having if kind in run.controls()]
            accuracies = [over(effects.tested(*by, kind=kind, control=True), 100)(runs) for by in BY.values()]
            rows.append([SETTINGS[name].label, kind, *of_control(runs, kind), *accuracies])
    header = ["", "control", "seeds", *METRICS.values(), "dimension", *(f"{name}, %" for name in BY)]
    return table(header, rows) if rows else ""


def tests(study: Study) -> str:
    """Every test of the paper's recipe, by queries and batch norm, after a few inner steps."""
    rows, inner = [], (0, 1, 3, 5, 10)
    for name in LONG:
        results: dict[tuple, dict[Path, dict]] = {}  # queries, transductive -> run -> inner step -> accuracy, interval
        for run in study[name]:
            for file in ("result.json", *(path.name for path in sorted(run.path.glob("test-*.json")))):
                for key in ("test", "test_nontransductive"):
                    if test := run.file(file).get(key):
                        after = results.setdefault((test["k_qry"], key == "test"), {}).setdefault(run.path, {})
                        after |= zip(test["inner_steps"], zip(test["accuracy"], test["ci95"]))
        for (queries, transductive), group in sorted(results.items()):
            runs = list(group.values())
            cells = [over(lambda after, k=k: number(after.get(k, (None,))[0]), 100)(runs) for k in inner]
            spread = fixed(max(100 * after[max(after)][1] for after in runs), 2)
            first = study[name][0]
            kind = [str(len(runs)), f"{first.arguments['meta_steps']:,}", str(queries), "yes" if transductive else "no"]
            rows.append([SETTINGS[name].label, *kind, *cells, spread, published(first)])
    header = ["", "seeds", "meta-steps", "queries per class", "transductive", *(f"inner steps: {k}, %" for k in inner)]
    return table([*header, "± over tasks", "published"], rows) if rows else ""


def published(run: Run) -> str:
    """MAML's published accuracy on the run's tasks; "" if there is none, or if MAML did not train on the true labels."""
    settings = run.settings
    if settings["learner"] != "maml" or settings["random_labels"]:
        return ""
    return PUBLISHED.get((run.data, settings["n_way"], settings["k_spt"]), "")


def machine(run: Run) -> str:
    device = run.arguments["device"]
    return device["name"] + f", {device['threads']} thread{'s' * (device['threads'] > 1)}" * (device["type"] == "cpu")


def runs(study: Study, columns: Sequence[str] = ()) -> str:
    """Every run: what was trained, how long it took, what it reached; some columns or all."""
    rows = []
    others = () if columns else sorted(study.paths.keys() - SETTINGS.keys())
    for name in filter(study.__getitem__, (*SETTINGS, *others)):
        group = study[name]
        run, tests = group[0], [run.file("result.json")["test"] for run in group]
        test = tests[0]
        minutes = sorted(round(run.file("timing.json")["training_minutes"]) for run in group)
        rows.append({
            "": SETTINGS[name].label if name in SETTINGS else f"{run.data}, {describe(run)}",
            "recipe": run.settings["recipe"],
            "meta-steps x tasks": f"{run.arguments['meta_steps']:,} x {run.settings['task_num']}",
            "queries per class; inner steps": f"{test['k_qry']}; {test['inner_steps'][-1]}",
            "test accuracy, %": over(effects.own_accuracy, 100)(group),
            "not transductive, %": over(effects.own_accuracy, 100, transductive=False)(group),
            "each seed, classifier, ± over tasks": "<br>".join(
                f"{run.settings['seed']}: {fixed(100 * test['accuracy'][-1], 2)} ± {fixed(100 * test['ci95'][-1], 2)}"
                for run, test in zip(group, tests)),
            "published": published(run),
            "minutes": " to ".join(map(str, dict.fromkeys((minutes[0], minutes[-1])))),
            "machine": "; ".join(dict.fromkeys(map(machine, group))),
        })  # fmt: skip
    columns = columns or list(*rows[:1])
    return table(columns, [[row[column] for column in columns] for row in rows]) if rows else ""


def accuracies(study: Study) -> str:
    """The same of the study's settings, narrower, for README.md."""
    return runs(study, ("", "recipe", "meta-steps x tasks", "queries per class; inner steps", "test accuracy, %",
                        "not transductive, %", "published"))  # fmt: skip


TABLES: dict[str, Callable[[Study], str]] = {function.__name__: function for function in (
    contrast, accuracies, collapse, accuracy, layers, inner_steps, correlation, original, cells, learners,
    ranking, length, tests, controls, runs)}


# ---- the program

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(\n?<!-- /table -->)", re.DOTALL)


def body_of(study: Study, name: str, place: str) -> str:
    if name not in TABLES:
        raise UserError(f"{place}: there is no table {name!r}; there are: {', '.join(TABLES)}")
    return TABLES[name](study) or "*No run of this kind is in res/ yet.*"


def difference(written_table: str, expected: str) -> str:
    """The first cell in which two tables differ, by its row and column."""
    split = [[[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
             for text in (written_table, expected)]  # fmt: skip
    header = dict(enumerate(split[1][0]))
    for row_found, row in zip(*split):
        for i, (cell_found, cell) in enumerate(zip(row_found, row)):
            if cell_found != cell:
                return f"row {row[0]!r}, column {header.get(i)!r}: {cell_found!r}, and the logs give {cell!r}"
    return f"{len(split[0])} lines, and the logs give {len(split[1])}"


def main(arguments: Sequence[str] | None = None, home: Path = HOME) -> None:
    parser = Parser(prog="python -m study.tables", description="Write the study's tables, from the logs in res/.")
    parser.add_argument("names", nargs="*", metavar="TABLE", help=f"print these tables instead: {', '.join(TABLES)}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 at the first number that differs")
    options = parser.parse_args(arguments)
    study = Study(home / "res")
    for name in options.names:
        print(body_of(study, name, "command line"))
    for path in [] if options.names else (home / "README.md", home / "study" / "README.md"):
        text = path.read_text(encoding="utf-8")
        for _, name, body, _ in _MARKED.findall(text) if options.check else ():
            if body != (expected := body_of(study, name, str(path))):
                where = f"{path.relative_to(home)}, table {name}"
                raise UserError(f"{where}, {difference(body, expected)}; run python -m study.tables")
        if not options.check:
            changed = _MARKED.sub(lambda m, place=str(path): f"{m[1]}{body_of(study, m[2], place)}\n<!-- /table -->",
                                  text)
            if changed != text:
                write_bytes(path, changed.encode())
        print(f"{path.relative_to(home)}: {len(_MARKED.findall(text))} tables")


if __name__ == "__main__":
    run_program(main, status=1)
