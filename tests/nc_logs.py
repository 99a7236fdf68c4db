"""Runs as the training scripts leave them, with curves that the tests choose: no training, no torch."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

LAYERS = ["block1", "block2", "block3", "block4", "logits"]
INNER_STEPS = 5
PER_TASK = {"within": 0.1, "between": -0.1}  # the largest relative deviation of a task from the mean

# At the last hidden layer: with permuted labels, before training, at the end.
METRICS = {
    "within": (20.0, 19.0, 30.0), "between": (1.0, 2.6, 60.0),
    "relative_within": (0.946, 0.88, 0.34), "nc1": (6.9, 0.63, 0.15), "cdnv": (7.0, 3.2, 0.31),
    "etf_error": (0.58, 0.38, 0.46), "self_duality": (2.0, 1.33, 0.97),
    "ncc_accuracy": (0.2, 0.478, 0.90), "ncc_mismatch": (0.75, 0.22, 0.06), "cdnv_unbiased": (12.0, 5.0, 0.33),
    "directional_cdnv": (0.3, 0.09, 0.02),
}


def usual(model: str, metric: str, layer: int, step: int, classes: str) -> float:
    """A plausible value: metrics move from start to end, deeper layers and the adapted model further."""
    null, start, end = METRICS[metric.removesuffix("_null")]
    if metric.endswith("_null"):
        return null
    moved = (1 - math.exp(-step / 400)) * (layer + 1) / 4 * (1.0 if model == "finetuned" else 0.9)
    moved = min(moved, 1.1) * (0.97 if classes == "heldout" else 1.0)
    return start * (end / start) ** moved


def nc_row(step: int, classes: str = "train", value: Callable = usual, tasks: int = 8,
           noise: Callable[[], float] = lambda: 0.0) -> dict:
    """A measurement; `value(model, metric, layer, step, classes)` gives the means, `noise` their relative errors."""

    def summary(mean: list) -> dict:
        return {"mean": mean, "se": [None if m is None else 0.02 * abs(m) for m in mean]}

    def metric(model: str, name: str) -> dict:
        means = [value(model, name, layer, step, classes) * (1 + noise()) for layer in range(len(LAYERS))]
        if name.startswith("self_duality"):  # defined at the classifier's input alone
            means = [None, None, None, means[3], None]
        return summary(means)

    names = [name + suffix for name in METRICS for suffix in ("", "_null")]
    models = {model: {name: metric(model, name) for name in names} for model in ("meta", "finetuned")}
    for values in models.values():  # the original mistook part of the spread between classes for spread within
        mixed = values["between"]["mean"][-1] / 2
        for name, sign in (("within", 1), ("between", -1)):
            values[f"{name}_original"] = summary([None] * 4 + [values[name]["mean"][-1] + sign * mixed])
    best = models["finetuned"]["ncc_accuracy"]["mean"][-2]
    inner = {"accuracy": [best / 4] + [best * (1 - 0.1 / k) for k in range(1, INNER_STEPS + 1)]}
    for name in ("within", "between"):
        before, after = (np.array(models[model][name]["mean"]) for model in ("meta", "finetuned"))
        inner[name] = [list(before + share * (after - before)) for share in np.linspace(0, 1, INNER_STEPS + 1)]
    spread = np.linspace(-1, 1, tasks)
    per_task = {model: {name: list(values[name]["mean"][-2] * (1 + part * spread)) for name, part in PER_TASK.items()}
                for model, values in models.items()}
    return {
        "kind": "nc", "step": step, "classes": classes, "tasks": tasks, "layers": LAYERS, **models,
        "per_task": per_task,
        "inner": {name: {"mean": means, "se": (0.02 * np.array(means)).tolist()} for name, means in inner.items()},
    }


def log(steps: int = 120, every: int = 30, eval_every: int = 250, **options) -> list[dict]:
    """The log of a run, measured as in the study."""
    rows = []
    for step in range(steps + 1):
        if step % eval_every == 0 or step == steps:
            rows.append(nc_row(step, "heldout", tasks=100, **options))
        if step % every == 0 and step < steps:
            rows.append(nc_row(step, **options))
    return rows


def write_run(folder: Path, rows: list[dict] | None = None, name: str = "Omniglot", accuracy: float = 0.9,
              **settings) -> Path:
    """A finished run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"n_way": 5, "k_spt": 1, "k_qry": 15, "task_num": 8, "epoch": 600, "first_order": False, "net": "paper",
                "update_step_test": 10, "seed": 1, "nc_every": 30, "out": str(folder)} | settings
    args = {"settings": settings, "meta_steps": settings["epoch"], "data": {"name": name},
            "device": {"type": "cpu", "name": "a processor", "threads": 1}}
    test = {"accuracy": [0.2] + [accuracy] * 10, "ci95": [0.01] + [0.006] * 10, "inner_steps": list(range(11)),
            "nearest_mean": [accuracy + 0.02] * 11, "tasks": 600, "n_way": settings["n_way"],
            "k_spt": settings["k_spt"], "k_qry": settings["k_qry"]}
    one_by_one = test | {"accuracy": [0.2] + [accuracy - 0.05] * 10, "nearest_mean": [accuracy - 0.04] * 11}
    for file, content in {
        "args.json": args, "timing.json": {"training_minutes": 50.5, "meta_steps": settings["epoch"]},
        "result.json": {"data": name, "test": test, "test_nontransductive": one_by_one, "best_step": settings["epoch"]},
    }.items():
        (folder / file).write_text(json.dumps(content))
    rows = log() if rows is None else rows
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_controls(folder: Path, scale: float = 1.0) -> None:
    """controls.json of a run: the trained weights, the untrained network and raw pixels, which have one layer."""
    def control(step: int, layers: int) -> dict:
        row = nc_row(step, "heldout")
        metrics = {model: {name: {"mean": [x and scale * x for x in values["mean"][:layers]]}
                           for name, values in row[model].items()} for model in ("meta", "finetuned")}
        return metrics | {"accuracy": [0.2, 0.5], "nearest_mean": [0.4, 0.5], "effective_dimension": {"meta": 17.5}}

    kinds = {"final": (600, 5), "untrained": (0, 5), "pixels": (0, 1)}
    (folder / "controls.json").write_text(json.dumps({kind: control(*sizes) for kind, sizes in kinds.items()}))


STUDY = {"omniglot-5w1s": {}, "omniglot-5w5s": {"k_spt": 5},
         "omniglot-5w1s-first-order-original": {"first_order": True, "net": "original"}}
LEARNERS = {f"contrast-{learner}": {"learner": learner, "recipe": "paper", "nc_qry": 15, "k_qry": 1}
            for learner in ("maml", "anil", "boil", "protonet", "classifier")}
LONG = {"paper-omniglot-5w1s": {"recipe": "paper", "nc_qry": 15, "k_qry": 1}}


def write_study(folder: Path, settings: dict[str, dict] = STUDY, seeds: int = 3) -> None:
    """Seeds of some settings, with relative errors of 3%."""
    for index, (name, options) in enumerate(settings.items()):
        for seed in range(1, seeds + 1):
            generator = np.random.default_rng(10 * index + seed)
            rows = log(noise=lambda: 0.03 * generator.standard_normal())
            write_run(folder / f"{name}-seed{seed}", rows, seed=seed, accuracy=0.9 + index / 100 + seed / 1000,
                      **options)
