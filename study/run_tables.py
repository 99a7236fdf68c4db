"""The tables of what was trained and what it reached: long runs, single changes, all runs."""

import functools
from collections.abc import Sequence

from study import effects
from study.design import CHANGES, LONG, MAIN, METRICS, MODELS, SETTINGS, label
from study.logs import Run, Study
from study.markdown import fixed, over, row_of, table

# In percent, MAML / first-order MAML: Finn, Abbeel, Levine 2017; first order on Omniglot: Nichol et al. 2018.
PUBLISHED = {("Omniglot", 5, 1): "98.7 ± 0.4 / 98.3 ± 0.5", ("Omniglot", 5, 5): "99.9 ± 0.1 / 99.2 ± 0.2",
             ("Omniglot", 20, 1): "95.8 ± 0.3 / 89.4 ± 0.5", ("Omniglot", 20, 5): "98.9 ± 0.2 / 97.9 ± 0.1",
             ("miniImageNet", 5, 1): "48.70 ± 1.84 / 48.07 ± 1.75",
             ("miniImageNet", 5, 5): "63.11 ± 0.92 / 63.15 ± 0.91"}
PARTS = {name: functools.partial(effects.in_control, kind=kind, key=key, place=place) for name, kind, key, place in (
    ("spread of the classifier's rows, untrained", "first step by parts, untrained", "rows", 0),
    ("the same, trained", "first step by parts", "rows", 0),
    ("body's step, relative", "first step by parts", "body", 0),
    ("slope in the rows' scale, untrained", "scale of the rows, untrained", "slope", 0),
    ("the same, body fixed", "scale of the rows, untrained", "slope", 1))}
LENGTHS = (1_000, 6_000, 20_000, 40_000, 60_000)  # meta-steps shown of a long run


def published(run: Run) -> str:
    """MAML's published accuracy on the run's tasks; "" for other data, other learners and labels at random."""
    settings = run.settings
    if settings["learner"] != "maml" or settings["random_labels"]:
        return ""
    return PUBLISHED.get((run.data, settings["n_way"], settings["k_spt"]), "")


def length(study: Study) -> str:
    """The long runs at a few meta-steps, adapted: held-out tasks, and the share and accuracy on training tasks too."""
    heldout, train = (functools.partial(effects.nearest, split=split) for split in ("heldout", "train"))
    columns = {name: functools.partial(heldout, metric=metric) for metric, name in METRICS.items()}
    columns |= {"accuracy, %": functools.partial(heldout, metric="accuracy"),
                "relative within trace, training tasks": functools.partial(train, metric="relative_within"),
                "accuracy, training tasks, %": functools.partial(train, metric="accuracy")}
    rows = []
    for group in study.groups(LONG):
        last = min(run.last_step for run in group)
        for step in sorted({last, *(step for step in LENGTHS if step < last)}):
            rows.append([label(group[0]), f"{step:,}", *row_of(group, columns, step=step)])
    return table(["", "meta-step", *columns], rows)


def changes(study: Study) -> str:
    """The paper's recipe, and the same with one thing changed: a row per setting."""
    at = functools.partial(effects.nearest, split="heldout", step=5_000)
    columns = PARTS | {f"relative within trace, {when}": functools.partial(at, metric="relative_within", model=model)
                       for model, when in MODELS.items()}
    columns |= {"nearest support mean before adaptation, %": functools.partial(at, metric="ncc_accuracy", model="meta"),
                "classifier, adapted, %": functools.partial(at, metric="accuracy"),
                "test: nearest support mean, %": functools.partial(effects.tested, key="nearest_mean", place=0),
                "test: classifier, adapted, %": functools.partial(effects.tested, key="accuracy", place=-1)}
    rows = [[label(runs[0]), size, str(len(runs)), *row_of(runs, columns)]
            for size, names in CHANGES.items() for runs in study.groups(names)]
    return table(["", "the classifier takes", "seeds", *columns], rows)


def machine(run: Run) -> str:
    device = run.arguments["device"]
    if device["type"] != "cpu":
        return device["name"]
    return f"{device['name']}, {device['threads']} thread{'s' if device['threads'] > 1 else ''}"


def runs(study: Study, names: Sequence[str] = (), columns: Sequence[str] = ()) -> str:
    """What was trained, how long it took, what it reached: all runs and columns, or those named."""
    rows = []
    for group in study.groups(names or SETTINGS):
        run, tests = group[0], [run.file("result.json")["test"] for run in group]
        minutes = sorted(round(run.file("timing.json")["training_minutes"]) for run in group)
        rows.append({
            "": label(run),
            "recipe": run.settings["recipe"],
            "seeds": ", ".join(str(one.settings["seed"]) for one in group),
            "meta-steps x tasks": f"{run.arguments['meta_steps']:,} x {run.settings['task_num']}",
            "queries per class; inner steps": f"{tests[0]['k_qry']}; {tests[0]['inner_steps'][-1]}",
            "test accuracy, %": over(effects.own_accuracy, 100)(group),
            "not transductive, %": over(effects.own_accuracy, 100, transductive=False)(group),
            "± over tasks": fixed(100 * max(effects.own_accuracy(run, interval=True) for run in group), 2),
            "published": published(run),
            "minutes": " to ".join(map(str, dict.fromkeys((minutes[0], minutes[-1])))),
            "machine": "; ".join(dict.fromkeys(map(machine, group))),
        })
    columns = columns or [name for name in (rows or [{}])[0] if name != "published"]
    return table(columns, [[row[column] for column in columns] for row in rows])


def accuracies(study: Study) -> str:
    """The same, narrower, of the recipes' own runs, for README.md."""
    return runs(study, (*LONG, *MAIN), (
        "", "recipe", "meta-steps x tasks", "queries per class; inner steps", "test accuracy, %", "not transductive, %",
        "published"))
