"""Runs as the training scripts leave them, with curves that the tests choose: no training, no torch."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

LAYERS = ["block1", "block2", "block3", "block4", "logits"]
METRICS = {  # before training and at the end, at the last hidden layer
    "within": (19.0, 30.0), "between": (2.6, 60.0), "relative_within": (0.88, 0.34), "nc1": (0.63, 0.15),
    "cdnv": (3.2, 0.31), "cdnv_unbiased": (5.0, 0.33), "directional_cdnv": (0.09, 0.02), "etf_error": (0.38, 0.46),
    "self_duality": (1.33, 0.97), "ncc_accuracy": (0.478, 0.90), "ncc_mismatch": (0.22, 0.06),
    "within_original": (20.3, 60.0), "between_original": (1.3, 30.0),
}


def usual(model: str, metric: str, layer: int, step: int, classes: str) -> float:
    """A plausible value: metrics move from start to end, deeper layers and the adapted model further."""
    start, end = METRICS[metric.removesuffix("_null")]
    if metric.endswith("_null"):
        return start
    moved = (1 - math.exp(-step / 400)) * (layer + 1) / 4 * (1.0 if model == "finetuned" else 0.9)
    moved = min(moved, 1.1) * (0.97 if classes == "heldout" else 1.0)
    return start * (end / start) ** moved


def nc_row(step: int, classes: str = "train", value: Callable = usual, tasks: int = 8,
           noise: Callable[[], float] = lambda: 0.0) -> dict:
    """A measurement; `value(model, metric, layer, step, classes)` gives the means, `noise` their relative errors."""
    def summary(means: list[float]) -> dict:
        return {"mean": means, "se": [0.02 * abs(mean) for mean in means]}

    models = {model: {name: summary([value(model, name, layer, step, classes) * (1 + noise())
                                     for layer in range(len(LAYERS))])
                      for metric in METRICS for name in (metric, f"{metric}_null")}
              for model in ("meta", "finetuned")}
    accuracy = models["finetuned"]["ncc_accuracy"]["mean"][-2]
    spread = np.linspace(-0.1, 0.1, tasks)  # of the tasks around their mean
    per_task = {model: {"within": list(values["within"]["mean"][-2] * (1 + spread)),
                        "between": list(values["between"]["mean"][-2] * (1 - spread))}
                for model, values in models.items()}
    return {"kind": "nc", "step": step, "classes": classes, "tasks": tasks, "layers": LAYERS, **models,
            "per_task": per_task, "inner": {"accuracy": summary([accuracy / 4, 0.9 * accuracy, 0.98 * accuracy])}}


def log(steps: int = 120, every: int = 30, eval_every: int = 250, **options) -> list[dict]:
    """The log of a run, measured as in the study."""
    heldout = [nc_row(step, "heldout", tasks=100, **options) for step in sorted({*range(0, steps, eval_every), steps})]
    train = [nc_row(step, **options) for step in range(0, steps, every)]
    return sorted(heldout + train, key=lambda row: row["step"])


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
    def control(step: int, layers: int = len(LAYERS)) -> dict:
        row = nc_row(step, "heldout", lambda *place: scale * usual(*place))
        metrics = {model: {name: {"mean": values["mean"][:layers]} for name, values in row[model].items()}
                   for model in ("meta", "finetuned")}
        return metrics | {"accuracy": [0.2, 0.5], "nearest_mean": [0.4, 0.5], "effective_dimension": {"meta": 17.5}}

    kinds = {"final": control(600), "untrained": control(0), "pixels": control(0, 1)}
    (folder / "controls.json").write_text(json.dumps(kinds))


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
