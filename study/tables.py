"""The study's numbers, from the logs under res/, in Markdown tables.

    python -m study.tables             rewrite the tables of README.md, study/README.md and study/TABLES.md
    python -m study.tables --check     fail, naming the first row that differs from the logs

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. A table whose runs are not in res/ says so.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import files
from files import Parser, UserError, atomic
from study import effects
from study.design import CELLS, DIFFICULTY, LEARNERS, LONG, MAIN, METRICS, MODELS, PHOTOGRAPHS, SMALL_PHOTOGRAPHS, label
from study.logs import HOME, Run, Study
from study.markdown import MISSING, Cell, fixed, over, row_of, table
from study.run_tables import PARTS, accuracies, changes, length, runs

NAMED_LAYERS = tuple(zip(range(-5, 0), ("block 1", "block 2", "block 3", "block 4", "logits")))
RULES = {"nearest support mean": ("nearest_mean", 0), "nearest support mean, adapted": ("nearest_mean", -1),
         "classifier, adapted": ("accuracy", -1)}  # key and inner step in a test's results
OTHER_CLASSIFIERS = {", from a random classifier": "classifier at random",
                     ", from a zero classifier": "classifier at zero"}  # the controls that inner loops start from


def compared(study: Study, names: Sequence[str], rows: Sequence[tuple[str, Cell]]) -> str:
    """A table with a column per setting; "" without runs."""
    groups = study.groups(names)
    if not groups:
        return ""
    return table(["", *(label(runs[0]) for runs in groups)],
                 [[name, *(cell(runs) for runs in groups)]
                  for name, cell in [("seeds", lambda runs: str(len(runs))), *rows]])


# ---- the original's recipe: collapse, layers, adaptation, the original's measure


def from_untrained(model: str, metric: str, layer: int = effects.HIDDEN) -> Cell:
    """ "untrained → end" on held-out tasks."""
    def cell(runs: list[Run]) -> str:
        start, stop = (over(value, model=model, metric=metric, layer=layer)(runs)
                       for value in (effects.untrained, effects.end))
        return f"{start.split(' ±')[0]} → {stop}"

    return cell


def heldout_gap(runs: list[Run]) -> str:
    """Held-out minus training tasks; the interval over seeds, over tasks, and both together."""
    share = functools.partial(effects.end, model="finetuned", metric="relative_within")
    gaps = [share(run) - share(run, split="train") for run in runs]
    mean, seeds = effects.over_seeds(gaps)
    if not math.isfinite(mean):
        return MISSING
    tasks = float(np.mean([effects.share_over_tasks(run) for run in runs]))
    halves = {"seeds": seeds, "tasks": tasks, "both": math.hypot(seeds, tasks)}
    intervals = ", ".join(f"{name} ± {fixed(half, 3)}" for name, half in halves.items() if half > 0)
    return f"{fixed(mean, 3)}; {intervals}"


SHARE = ("relative within trace, adapted", from_untrained("finetuned", "relative_within"))
TRACES = [(f"{trace} trace, adapted, end / untrained", over(effects.growth, model="finetuned", metric=trace))
          for trace in ("between", "within")]
NC1 = ("tr(S_W S_B⁺)/C, adapted", from_untrained("finetuned", "nc1"))
CDNV = ("CDNV, unbiased, adapted", from_untrained("finetuned", "cdnv_unbiased"))
NEAREST_MEAN = ("nearest support mean before adaptation, %",
                over(effects.end, 100, model="meta", metric="ncc_accuracy"))


def collapse(study: Study) -> str:
    def matched_dimension(run: Run) -> float:
        return effects.matching_dimension(effects.end(run, "finetuned", "etf_error"), run.settings["n_way"])

    return compared(study, MAIN, [
        ("relative within trace, before adaptation", from_untrained("meta", "relative_within")),
        SHARE,
        ("held-out minus training tasks, adapted, end", heldout_gap),
        *TRACES,
        NC1,
        CDNV,
        ("directional CDNV, adapted", from_untrained("finetuned", "directional_cdnv")),
        ("NC2: ETF error, adapted", from_untrained("finetuned", "etf_error")),
        ("dimension of random directions with that error", over(matched_dimension)),
        ("NC3: self-duality, adapted", from_untrained("finetuned", "self_duality")),
        ("NC4: mismatch with the nearest support mean, adapted", from_untrained("finetuned", "ncc_mismatch")),
    ])


def accuracy(study: Study) -> str:
    adapted = functools.partial(effects.end, model="finetuned", metric="accuracy")

    def difference(run: Run) -> float:
        return effects.end(run, "meta", "ncc_accuracy") - adapted(run)

    return compared(study, MAIN, [
        ("nearest support mean, untrained, %", over(effects.untrained, 100, model="meta", metric="ncc_accuracy")),
        NEAREST_MEAN,
        ("nearest support mean, adapted, %", over(effects.end, 100, model="finetuned", metric="ncc_accuracy")),
        ("classifier, adapted, %", over(adapted, 100)),
        ("difference, points", over(difference, 100)),
        ("classifier, adapted, training tasks, %", over(adapted, 100, split="train")),
    ])


def change(run: Run, layer: int = effects.HIDDEN) -> float:
    """Of the relative within trace by adaptation, at the end."""
    adapted, before = (effects.end(run, model, "relative_within", layer) for model in ("finetuned", "meta"))
    return adapted - before


def layers(study: Study) -> str:
    shares = [(f"adapted, {layer_name}", from_untrained("finetuned", "relative_within", layer))
              for layer, layer_name in NAMED_LAYERS]
    changes = [(f"adapted minus before, {layer_name}", over(change, layer=layer))
               for layer, layer_name in NAMED_LAYERS]
    return compared(study, MAIN, shares + changes)


def original(study: Study) -> str:
    """Change of the relative within trace of the logits on training tasks: by label and as the original took it."""
    return compared(study, (*MAIN, *PHOTOGRAPHS), [
        (f"{when}, {how}", over(effects.logit_share_change, model=model, suffix=suffix))
        for model, when in MODELS.items() for suffix, how in (("", "by label"), ("_original", "as the original"))])


def cells(study: Study) -> str:
    """Inner gradient (first or second order) by network, the original's recipe."""
    return compared(study, CELLS, [
        ("test accuracy, %", over(effects.own_accuracy, 100)), SHARE,
        ("the same minus before adaptation", over(change)), *TRACES, CDNV, NC1, NEAREST_MEAN])


# ---- learners, long runs, controls

Value = Callable[[Run, str], float]  # of a run, as the control of this name measured it; "final": the trained weights


def of_metric(model: str, metric: str) -> Value:
    return lambda run, kind: effects.measured(run, model, metric, kind)


def of_rule(key: str, place: int, transductive: bool = True) -> Value:
    """Accuracy in the run's test; of other weights than "final" on the tasks of the control, which are transductive."""
    def value(run: Run, kind: str) -> float:
        if kind == "final":
            return effects.tested(run, key, place, transductive)
        return effects.in_control(run, kind, key, place) if transductive else math.nan

    return value


def of_trained(value: Callable[[Run], float]) -> Value:
    """Of the trained weights alone."""
    return lambda run, kind: value(run) if kind == "final" else math.nan


BEFORE = {name: of_metric("meta", metric) for metric, name in METRICS.items()} | {"dimension": effects.dimension}
LEARNER = BEFORE | {f"{name}, adapted": of_metric("finetuned", metric) for metric, name in METRICS.items()}
LEARNER |= {f"{name}, %{how}": of_rule(key, place, not how)
            for how in ("", ", not transductive") for name, (key, place) in RULES.items()}
CONTRAST = {"relative within trace": of_metric("meta", "relative_within"),
            "the same, adapted": of_metric("finetuned", "relative_within"),
            "tr(S_W S_B⁺)/C": of_metric("meta", "nc1"), "adapted": of_metric("finetuned", "nc1"),
            "nearest support mean, %": of_rule("nearest_mean", 0), "adapted classifier, %": of_rule("accuracy", -1),
            "by its own rule, not transductive, %":
            of_trained(functools.partial(effects.own_accuracy, transductive=False))}

ROWS = {name: of_trained(value) for name, value in PARTS.items()}


def references(groups: list[list[Run]]) -> list[tuple[str, list[Run], str]]:
    """What every learner is compared with: its name, runs, and the control of theirs that measured it."""
    return [("raw pixels", groups[0][:1], "pixels"), ("untrained", groups[0], "untrained")]


def with_references(study: Study, names: Sequence[str], columns: dict[str, Value]) -> list[list[str]]:
    """A row for the columns' names, for raw pixels, for the untrained network and for every setting with runs."""
    groups = study.groups(names)
    shown = [*references(groups), *((label(runs[0]), runs, "final") for runs in groups)] if groups else []
    return [["", "seeds", *columns],
            *([name, str(len(runs)), *row_of(runs, columns, kind=kind)] for name, runs, kind in shown)]


def learners(study: Study) -> str:
    """Raw pixels, the untrained network and every learner, before adaptation if nothing else is said."""
    header, *rows = zip(*with_references(study, (*LEARNERS, "random-labels"), LEARNER))
    return table(header, rows) if header[1:] else ""


def contrast(study: Study) -> str:
    """The same, narrower, for README.md."""
    header, *rows = with_references(study, LEARNERS, CONTRAST)
    return table(header, rows)


def photographs(study: Study) -> str:
    """The same of what was trained on photographs, and what the inner loop finds and changes there."""
    header, *rows = with_references(study, SMALL_PHOTOGRAPHS, CONTRAST | ROWS)
    return table(header, rows)


def difficulty(study: Study) -> str:
    """The same, narrower, of one inner loop on images whose classes are hard or easy to tell apart."""
    left_out = "tr(S_W S_B⁺)/C", "adapted", "nearest support mean, %", "by its own rule, not transductive, %"
    columns = {name: value for name, value in (CONTRAST | ROWS).items() if name not in left_out}
    return table(["", "seeds", *columns], [[label(runs[0]), str(len(runs)), *row_of(runs, columns, kind="final")]
                                           for names in DIFFICULTY.values() for runs in study.groups(names)])


def ranking(study: Study) -> str:
    """Spearman correlation of each metric before adaptation with accuracy, over learners (means over seeds).

    In the last column with raw pixels and the untrained network, all with the accuracy of the control's 15 queries.
    """
    groups = study.groups(LEARNERS)
    if len(groups) < 3:
        return ""
    trained = [(runs, "final") for runs in groups]
    with_others = trained + [(runs, kind) for _, runs, kind in references(groups)]
    by_mean = "nearest support mean before adaptation"
    columns = {by_mean: (of_rule("nearest_mean", 0), trained),
               "the learner's own rule, transductive": (of_trained(effects.own_accuracy), trained),
               f"{by_mean}, 15 queries, with pixels and the untrained network":
               (functools.partial(effects.in_control, key="nearest_mean", place=0), with_others)}
    rows = []
    for name, value in BEFORE.items():
        sign, row = (1, [f"larger {name}"]) if name == "dimension" else (-1, [f"smaller {name}"])
        for accuracy_of, shown in columns.values():
            means = [np.mean([(sign * value(run, kind), accuracy_of(run, kind)) for run in runs], 0)
                     for runs, kind in shown]
            row.append(fixed(effects.spearman(*zip(*means)), 2))
        rows.append(row)
    return table(["Spearman correlation with higher accuracy by", *columns], rows)


def controls(study: Study) -> str:
    """Other queries, support images and statistics of batch norm, for the long 5-way 1-shot runs, before adaptation."""
    columns = BEFORE | {f"{name}, %": functools.partial(effects.in_control, key=key, place=place)
                        for name, (key, place) in RULES.items()}
    runs = study["paper-omniglot-5w1s"]
    kinds = dict.fromkeys(kind for run in runs for kind in run.controls()
                          if kind.split()[0] in ("final", "queries", "5-shot", "batch"))
    return table(["control", "seeds", *columns],
                 [[kind, str(len(runs)), *row_of(runs, columns, kind=kind)] for kind in kinds])


def adaptation(study: Study) -> str:
    """What the inner loop does to query and support features, and what it does from other classifiers."""
    share = functools.partial(over, effects.measured, metric="relative_within")
    kinds = {"": "final"} | OTHER_CLASSIFIERS
    rows = [("relative within trace, before adaptation", share(model="meta")),
            *((f"adapted{start}", share(model="finetuned", kind=kind)) for start, kind in kinds.items()),
            *((f"classifier, adapted{start}, %", over(effects.in_control, 100, kind=kind, key="accuracy", place=-1))
              for start, kind in kinds.items())]
    rows += [(f"5-shot, unbiased: {samples} features, {when}",
              over(effects.five_shot_share, samples=samples, inner_step=inner_step))
             for samples in ("query", "support") for inner_step, when in ((0, "before adaptation"), (-1, "adapted"))]
    names = [name for name in (*LEARNERS, *LONG)
             if all(kind in run.controls() for run in study[name] for kind in OTHER_CLASSIFIERS.values())]
    return compared(study, names, rows)


TABLES: dict[str, Callable[[Study], str]] = {function.__name__: function for function in (
    contrast, accuracies, collapse, accuracy, layers, original, cells, learners,
    photographs, difficulty, ranking, adaptation, changes, length, controls, runs)}


# ---- the program

PAGES = "README.md", "study/README.md", "study/TABLES.md"
TABLE_IN_PAGE = re.compile(r"<!-- table: (\w+) -->\n(.*?)\n?<!-- /table -->", re.DOTALL)


def with_tables(text: str, study: Study, page: str, check: bool) -> tuple[str, int]:
    """The text of a page with its tables from the logs, and their number.

    Raises:
        UserError: a table is not one of the study's or, with `check`, differs.
    """
    def replace(match: re.Match) -> str:
        name, body = match.groups()
        if name not in TABLES:
            raise UserError(f"{page}: there is no table {name!r}; there are: {', '.join(TABLES)}")
        expected = TABLES[name](study) or "*No run of this kind is in res/ yet.*"
        if check and body != expected:
            pairs = itertools.zip_longest(body.split("\n"), expected.split("\n"), fillvalue="")
            row, logged = next((row, logged) for row, logged in pairs if row != logged)
            raise UserError(f"{page}, table {name}: {row!r}, and the logs give {logged!r}; run python -m study.tables")
        return f"<!-- table: {name} -->\n{expected}\n<!-- /table -->"

    return TABLE_IN_PAGE.subn(replace, text)


def main(arguments: Sequence[str] | None = None, home: Path = HOME) -> None:
    parser = Parser(prog="python -m study.tables", description="Write the study's tables, from the logs in res/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail at the first row that differs")
    check = parser.parse_args(arguments).check
    study = Study(home / "res")
    for page in PAGES:
        text = (home / page).read_text(encoding="utf-8")
        new_text, tables = with_tables(text, study, page, check)
        if new_text != text and not check:
            with atomic(home / page) as file:
                file.write(new_text.encode())
        print(f"{page}: {tables} tables")


if __name__ == "__main__":
    files.run(main)
