"""The study's numbers, from the logs under res/, in Markdown tables.

    python -m study.tables             rewrite the tables of README.md and study/*.md
    python -m study.tables --check     fail, naming the first row that differs from the logs

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. A table whose runs are not in res/ says so.

A table is described by its columns: name -> (function of study/effects.py, *its arguments after the run).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import sub, truediv
from pathlib import Path

import numpy as np

import files
from files import Parser, atomic
from study import design, effects
from study.design import CHANGED_AT, DIFFICULTY, LEARNERS, LONG, MAIN, METRICS, MODELS, OTHER_LOOPS, label
from study.effects import HIDDEN, as_used, at, end, in_control, measured, own_accuracy, tested
from study.logs import HOME, Run, Study
from study.markdown import Cell, Columns, fixed, over, row, table, with_tables

NAMED_LAYERS = {-5: "block 1", -4: "block 2", -3: "block 3", -2: "block 4", -1: "logits"}
NAME: Columns = {"": lambda runs: label(runs[0])}
SEEDS: Columns = {"seeds": lambda runs: str(len(runs))}
HEAD = NAME | SEEDS
REFERENCES = "raw pixels", "untrained"


def compared(study: Study, names: Sequence[str], columns: Columns, transposed: bool = False, head: Columns = HEAD,
             references: Sequence[str] = ()) -> str:
    """A row, or a column if `transposed`, for each of these settings that has runs; first these of `references_of`."""
    groups = study.groups(names)
    rows = [row(runs, HEAD | {"": name} | columns)
            for name, runs in references_of(groups).items() if name in references]
    return table(rows + [row(runs, head | columns) for runs in groups], transposed)


def references_of(groups: Sequence[list[Run]]) -> dict[str, list[Run]]:
    """Each of REFERENCES, as the controls of the first group have it; {} without a group."""
    return {"raw pixels": [run.with_weights_of("pixels") for run in groups[0][:1]],
            "untrained": [run.with_weights_of("untrained") for run in groups[0]]} if groups else {}


def from_untrained(metric: str, layer: int = HIDDEN, model: str = "finetuned") -> Cell:
    """ "untrained → end" on held-out tasks."""
    untrained, trained = over(at, 1, model, metric, 0, layer), over(end, 1, model, metric, layer)
    return lambda runs: f"{untrained(runs).split(' ±')[0]} → {trained(runs)}"


def of_two(run: Run, operation: Callable[[float, float], float], one: tuple, other: tuple) -> float:
    """The difference (`sub`) or ratio (`truediv`) of two columns."""
    return operation(*(value(run, *arguments) for value, *arguments in (one, other)))


def heldout_gap(runs: list[Run]) -> str:
    """Held-out minus training tasks; the interval over seeds, over tasks, and both together."""
    share = end, "finetuned", "relative_within", HIDDEN
    mean, seeds = effects.over_seeds([of_two(run, sub, share, (*share, "train")) for run in runs])
    tasks = float(np.mean([effects.share_over_tasks(run) for run in runs]))
    halves = {"seeds": seeds, "tasks": tasks, "both": math.hypot(seeds, tasks)}
    intervals = ", ".join(f"{name} ± {fixed(half, 3)}" for name, half in halves.items() if half > 0)
    return f"{fixed(mean, 3)}; {intervals}"


GROWTH: Columns = {f"{trace} trace, adapted, end / untrained":
                   (of_two, truediv, (end, "finetuned", trace), (at, "finetuned", trace, 0))
                   for trace in ("between", "within")}

collapse = partial(compared, names=MAIN, transposed=True, columns={
    "relative within trace, before adaptation": from_untrained("relative_within", model="meta"),
    "relative within trace, adapted": from_untrained("relative_within"),
    "held-out minus training tasks, adapted, end": heldout_gap,
} | GROWTH | {
    "tr(S_W S_B⁺)/C, adapted": from_untrained("nc1"),
    "CDNV, unbiased, adapted": from_untrained("cdnv_unbiased"),
    "directional CDNV, adapted": from_untrained("directional_cdnv"),
    "NC2: ETF error, adapted": from_untrained("etf_error"),
    "dimension of random directions with that error": (effects.matching_dimension,),
    "NC3: self-duality, adapted": from_untrained("self_duality"),
    "NC4: mismatch with the nearest support mean, adapted": from_untrained("ncc_mismatch")})

accuracy = partial(compared, names=MAIN, transposed=True, columns={
    "nearest support mean, untrained, %": (at, "meta", "ncc_accuracy", 0),
    "nearest support mean before adaptation, %": (end, "meta", "ncc_accuracy"),
    "nearest support mean, adapted, %": (end, "finetuned", "ncc_accuracy"),
    "classifier, adapted, %": (end, "finetuned", "accuracy"),
    "difference, points": (of_two, sub, (end, "meta", "ncc_accuracy"), (end, "finetuned", "accuracy")),
    "classifier, adapted, training tasks, %": (end, "finetuned", "accuracy", HIDDEN, "train")})

layers = partial(compared, names=MAIN, transposed=True, columns={
    f"adapted, {name}": from_untrained("relative_within", layer) for layer, name in NAMED_LAYERS.items()} | {
    f"adapted minus before, {name}":
    (of_two, sub, (end, "finetuned", "relative_within", layer), (end, "meta", "relative_within", layer))
    for layer, name in NAMED_LAYERS.items()})

# Change of the relative within trace of the logits on training tasks: by label and as the original took it.
original = partial(compared, names=(*MAIN, *design.PHOTOGRAPHS), transposed=True, columns={
    f"{when}, {how}": (effects.logit_share_change, model, suffix)
    for model, when in MODELS.items() for suffix, how in (("", "by label"), ("_original", "as the original"))})

# Inner gradient (first or second order) by network.
cells = partial(compared, names=design.CELLS, transposed=True, columns={
    "test accuracy, %": (own_accuracy,),
    "relative within trace, adapted": from_untrained("relative_within"),
    "the same minus before adaptation":
    (of_two, sub, (end, "finetuned", "relative_within"), (end, "meta", "relative_within")),
} | GROWTH | {
    "CDNV, unbiased, adapted": from_untrained("cdnv_unbiased"),
    "tr(S_W S_B⁺)/C, adapted": from_untrained("nc1"),
    "dimension of random directions with the adapted ETF error": (effects.matching_dimension,),
    "nearest support mean before adaptation, %": (end, "meta", "ncc_accuracy")})

RELATIVE = f"relative {METRICS['nc1']}"  # divided by its value for permuted labels
RULES = {"nearest support mean": ("nearest_mean", 0), "nearest support mean, adapted": ("nearest_mean", -1),
         "classifier, adapted": ("accuracy", -1)}  # key and inner step in a test's results
OWN_RULE: Columns = {"own rule, not transductive, %": (own_accuracy, False)}
TRACES: Columns = {f"{trace} trace, adapted / before":
                   (of_two, truediv, (measured, "finetuned", trace), (measured, "meta", trace))
                   for trace in ("between", "within")}


def metrics_of(model: str = "meta") -> Columns:
    """Metrics of the trained weights on the test tasks."""
    return {name: (measured, model, metric) for metric, name in METRICS.items()} | {
        RELATIVE: (effects.relative, model, "nc1")}


# Raw pixels, the untrained network and every learner, before adaptation if nothing else is said.
learners = partial(compared, names=(*LEARNERS, "anil-small-step", "random-labels"), references=REFERENCES,
                   transposed=True, columns=metrics_of() | {
    "dimension": (in_control, "final", "effective_dimension", "meta")} | {
    f"{name}, adapted": column for name, column in metrics_of("finetuned").items()} | {
    f"{trace} trace": (measured, "meta", trace) for trace in ("between", "within")} | TRACES | {
    "NC3: self-duality, adapted": (measured, "finetuned", "self_duality"),
    "NC4: mismatch with the nearest support mean, adapted": (measured, "finetuned", "ncc_mismatch")} | {
    f"{name}, %": (tested, *place) for name, place in RULES.items()} | {
    f"{name}, %, not transductive": (tested, *place, False) for name, place in RULES.items()})

# Fewer columns of the same settings, for README.md.
SHARES: Columns = {"share within classes": (measured, "meta", "relative_within"),
                   "share, adapted": (measured, "finetuned", "relative_within")}
FALL = of_two, sub, *SHARES.values()  # how far the inner loop lowers the share
ADAPTED: Columns = {"adapted classifier, %": (tested, "accuracy", -1)}
NARROW = SHARES | {"nearest support mean, %": (tested, "nearest_mean", 0)} | ADAPTED | OWN_RULE
contrast = partial(compared, names=LEARNERS, references=REFERENCES, columns=NARROW)

# How well blocks 3 and 4 separate a task's classes before adaptation.
separation = partial(compared, names=(*LEARNERS, "paper-omniglot-5w1s"), references=("untrained",), columns={
    f"{METRICS['nc1']}, {NAMED_LAYERS[layer]}": (measured, "meta", "nc1", "final", layer)
    for layer in (-3, HIDDEN)} | {
    f"nearest support mean, {NAMED_LAYERS[layer]}, %": (measured, "meta", "ncc_accuracy", "final", layer)
    for layer in (-3, HIDDEN)} | {
    "the same, adapted, %": (measured, "finetuned", "ncc_accuracy")})

# `contrast`'s columns for section 5's settings.
photographs = partial(compared, names=design.SMALL_PHOTOGRAPHS, references=REFERENCES, columns=NARROW)

# One inner loop on images whose classes are hard or easy to tell apart.
difficulty = partial(compared, names=tuple(itertools.chain(*DIFFICULTY.values())), columns=SHARES | {
    "fall": FALL} | TRACES | ADAPTED)

# How similar features are before and after the inner loop, layer by layer.
similarity = partial(compared, names=(*LEARNERS, "kept-norms", "blocks-4-5", "photographs-maml"),
                     references=("untrained",), columns={
    name: (in_control, "similarity, final", "cka", layer) for layer, name in NAMED_LAYERS.items()})

# Similarity of block 3 and accuracy if this inner loop adapts some blocks.
PARTS = {"all": "", "1-2": " of blocks 1-2", "3-5": " of blocks 3-5"}  # adapted blocks: the control's name
blocks = partial(compared, names=(*LEARNERS, "blocks-4-5"), columns={
    f"block 3, {part} adapted": (in_control, f"similarity{PARTS[part]}, final", "cka", -3) for part in PARTS} | {
    f"accuracy, %, {part} adapted": (in_control, f"similarity{PARTS[part]}, final", "accuracy", 0)
    for part in ("all", "3-5")})  # without the classifier near chance

# How fast MAML with each of these inner loops trains, and what it reaches.
pace = partial(compared, names=(*OTHER_LOOPS, *design.TWENTY_WAY), columns={
    "validation after 1,000, %": (at, "finetuned", "accuracy", 1_000),
    "test after": lambda runs: f"{runs[0].last_step:,}", "test, %": (own_accuracy,)} | OWN_RULE)

# How far MAML's inner loop moves the kernels of each block; similarity after steps as large as MAML's.
EQUAL = "similarity at equal steps, final"
moved = partial(compared, names=(*LEARNERS, "kept-norms", "blocks-4-5", "paper-omniglot-5w1s"),
                references=("untrained",))
steps = partial(moved, columns={
    f"{NAMED_LAYERS[layer]}, step": (in_control, "similarity, final", "step", layer) for layer in range(-5, -1)} | {
    f"{NAMED_LAYERS[layer]}, CKA after equal steps": (in_control, EQUAL, "cka", layer) for layer in (-3, HIDDEN)})

# What makes these steps small: each block's kernel norm, gradient and variance of the convolution.
gradients = partial(moved, columns={
    f"{NAMED_LAYERS[layer]}, {name}": (in_control, control, key, layer)
    for name, control, key in (("kernel's norm", "similarity, final", "norm"),
                               ("gradient", "gradients, final", "gradient"))
    for layer in range(-5, -1)} | {"block 4, variance ratio": (in_control, "gradients, final", "variance", 3)})

# What a step of MAML's size in each block does to features.
moving = [name for name in LEARNERS if name != "contrast-zero-head"]
equal = partial(compared, names=moving, references=("untrained",), columns={
    name: (*column, EQUAL) for name, column in SHARES.items()} | {
    "nearest support mean, %": (measured, "meta", "ncc_accuracy", EQUAL),
    "nearest support mean, adapted, %": (measured, "finetuned", "ncc_accuracy", EQUAL)})


def means(groups: Sequence[list[Run]], value: Callable[..., float], *arguments) -> list[float]:
    """Of value(run, *arguments) over the seeds of each group."""
    return [np.mean([value(run, *arguments) for run in runs]) for runs in groups]


def ranking(study: Study) -> str:
    """Spearman correlation of each metric with the accuracy of the nearest support mean of the same features."""
    learners, photographs = study.groups(LEARNERS), study.groups(design.SMALL_PHOTOGRAPHS)
    before, nearest = (lambda run, value, metric: value(run, "meta", metric)), (measured, "ncc_accuracy")
    points = {"learners, before adaptation": (learners, before), "learners, as they are used": (learners, as_used),
              f"{len(photographs)} settings of section 5, before adaptation": (photographs, before)}
    return table([{"": f"smaller {name}"} | {
        kind: fixed(-effects.spearman(means(groups, features, value, metric), means(groups, features, *nearest)), 2)
        for kind, (groups, features) in points.items()}
        for name, (value, _, metric) in metrics_of().items()] if learners else [])


def correlations(study: Study) -> str:
    """Spearman correlation of the fall in the share with test accuracy, over section 5's kinds of images."""
    images = [*itertools.chain(*DIFFICULTY.values())]
    points = {"all rows": images,
              "all but 20 photographs per class": [name for name in images if name != "photographs-20-images"]}
    return table([{"": kind, "Spearman correlation": fixed(
        effects.spearman(means(groups, *FALL), means(groups, own_accuracy)), 2)}
        for kind, names in points.items() if (groups := study.groups(names))])


def controls(study: Study) -> str:
    """Other queries, support images and statistics of batch norm, for the long 5-way 1-shot runs, before adaptation."""
    runs = study["paper-omniglot-5w1s"]
    kinds = dict.fromkeys(kind for run in runs for kind in run.controls
                          if kind.startswith(("final", "queries", "batch")))
    return table([row(runs, {"control": kind} | SEEDS | {
        METRICS[metric]: (measured, "meta", metric, kind) for metric in ("relative_within", "cdnv_unbiased")} | {
        f"{name}, %": (in_control, kind, *place) for name, place in RULES.items()}) for kind in kinds])


# What MAML's inner loop does from a random classifier, and to query and support features.
adaptation = partial(compared, names=("contrast-maml",), transposed=True, columns={
    f"nearest support mean, {when}, from a random classifier, %":
    (measured, model, "ncc_accuracy", "classifier at random") for model, when in MODELS.items()} | {
    f"5-shot, unbiased: share of {samples} features, {when}": (effects.five_shot_share, samples, inner_step)
    for samples in ("query", "support") for inner_step, when in ((0, "before adaptation"), (-1, "adapted"))})


def length(study: Study) -> str:
    """The long runs at a few meta-steps: held-out tasks, and the share and accuracy on training tasks too."""
    rows = []
    for runs in study.groups((*LONG, *design.LONG_LEARNERS)):
        last = min(run.last_step for run in runs)
        for step in (*(step for step in (1_000, 10_000, 20_000, 40_000, 60_000) if step < last), last):
            rows.append(row(runs, NAME | {"meta-step": f"{step:,}"} | {
                name: (as_used, at, metric, step) for metric, name in METRICS.items()} | {
                "accuracy, %": (as_used, at, "accuracy", step),
                "relative within trace, training tasks": (as_used, at, "relative_within", step, HIDDEN, "train"),
                "accuracy, training tasks, %": (as_used, at, "accuracy", step, HIDDEN, "train")}))
    return table(rows)


# The paper's recipe, and the same with settings changed.
changes = partial(compared, names=design.CHANGED, columns={
    f"relative within trace, {when}": (at, model, "relative_within", CHANGED_AT) for model, when in MODELS.items()} | {
    "nearest support mean before adaptation, %": (at, "meta", "ncc_accuracy", CHANGED_AT),
    "classifier, adapted, %": (at, "finetuned", "accuracy", CHANGED_AT),
    "test: nearest support mean, %": (tested, "nearest_mean", 0),
    "test: classifier, adapted, %": (tested, "accuracy", -1)})


def minutes(runs: list[Run]) -> str:
    times = {round(run.file("timing.json")["training_minutes"]) for run in runs}
    return " to ".join(map(str, sorted({min(times), max(times)})))


def machine(run: Run) -> str:
    device = run.arguments["device"]
    if device["type"] != "cpu":
        return device["name"]
    return f"{device['name']}, {device['threads']} thread{'s' if device['threads'] > 1 else ''}"


RUNS: Columns = {
    "recipe": lambda runs: runs[0].settings["recipe"],
    "seeds": lambda runs: ", ".join(str(run.settings["seed"]) for run in runs),
    "meta-steps x tasks": lambda runs: f"{runs[0].arguments['meta_steps']:,} x {runs[0].settings['task_num']}",
    "queries per class; inner steps":
    lambda runs: f"{runs[0].result['test']['k_qry']}; {runs[0].result['test']['inner_steps'][-1]}",
    "test accuracy, %": (own_accuracy,),
    "not transductive, %": (own_accuracy, False),
    "± over tasks": lambda runs: fixed(100 * max(own_accuracy(run, interval=True) for run in runs), 2),
    "minutes": minutes,
    "machine": lambda runs: "; ".join(dict.fromkeys(map(machine, runs)))}


# What was trained, how long it took, what it reached.
runs = partial(compared, names=design.SETTINGS, head=NAME, columns={
    "name": lambda runs: runs[0].path.name.rpartition("-seed")[0]} | RUNS)

# Fewer of these columns: the recipes' own runs, for README.md.
accuracies = partial(compared, names=(*LONG, *MAIN), head=NAME, columns={
    name: column for name, column in RUNS.items() if name not in ("seeds", "± over tasks", "minutes", "machine")
} | {"published": lambda runs: design.PUBLISHED[runs[0].settings["n_way"], runs[0].settings["k_spt"]]})

TABLES: dict[str, Callable[[Study], str]] = dict(
    contrast=contrast, accuracies=accuracies, collapse=collapse, accuracy=accuracy, layers=layers, original=original,
    cells=cells, learners=learners, separation=separation, photographs=photographs, difficulty=difficulty,
    ranking=ranking, similarity=similarity, blocks=blocks, pace=pace, steps=steps, equal=equal,
    gradients=gradients, adaptation=adaptation, changes=changes, correlations=correlations, length=length,
    controls=controls, runs=runs)

PAGES = "README.md", "study/README.md", "study/TABLES.md", "study/ORIGINAL.md"


def main(arguments: Sequence[str] | None = None, home: Path = HOME) -> None:
    parser = Parser(prog="python -m study.tables", description="Write the study's tables, from the logs in res/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail at the first row that differs")
    check = parser.parse_args(arguments).check
    study = Study(home / "res")
    for page in PAGES:
        text = (home / page).read_text(encoding="utf-8")
        new_text, tables = with_tables(text, {name: partial(make, study) for name, make in TABLES.items()}, page, check)
        if new_text != text and not check:
            with atomic(home / page) as file:
                file.write(new_text.encode())
        print(f"{page}: {tables} tables")


if __name__ == "__main__":
    files.run(main)
