"""Reads what the training scripts left: logs, settings, results.

curves.py and effects.py compute from them, figures.py draws them, study.py makes them. Runs that differ only in their
seed belong together; STUDY names the settings that the README's figures and tables are made from, so that a further
run under res/ never slips into an average.
"""

import gzip
import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Sequence

import files

HERE = Path(__file__).resolve().parent

# Settings that leave the measured numbers' meaning alone: runs that differ in these are seeds of one setting.
NOT_COMPARED = {"seed", "out", "root", "cache", "device", "task_chunk", "cuda_graph", "print_every", "test_tasks",
                "resume", "save_every", "from_args", "test", "deterministic"}  # fmt: skip


class Setting(NamedTuple):
    """One setting of the study: the start of its runs' folders' names, and the command that trains them."""

    name: str  # its runs are res/NAME-seed1, res/NAME-seed2, ...
    script: str
    flags: str
    seeds: tuple[int, ...]


_OMNIGLOT = "--task_num 8 --epoch 6000 --nc_every 30 --eval_every 250"
_PHOTOGRAPHS = "--task_num 2 --epoch 1200 --nc_every 30 --eval_every 150 --eval_tasks 50"
STUDY = (
    Setting("omniglot-5w1s", "omniglot_train.py", _OMNIGLOT, (1, 2, 3)),
    Setting("omniglot-5w5s", "omniglot_train.py", f"{_OMNIGLOT} --k_spt 5", (1, 2, 3)),
    Setting("omniglot-5w1s-first-order-original", "omniglot_train.py",
            f"{_OMNIGLOT} --first_order --net original", (1, 2, 3)),
    Setting("tinyimagenet-in-miniimagenet-layout-5w5s", "miniimagenet_train.py",
            f"{_PHOTOGRAPHS} --data_name 'Tiny ImageNet in the miniImageNet layout'", (1,)),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run: its folder, its args.json (settings and data apart), and its log's rows in order."""

    path: Path
    settings: dict
    data: dict
    rows: list[dict]


# ---- reading


def read_log(path: Path) -> list[dict]:
    """The rows of a log, one JSON object a line, plain or gzipped (.gz).

    A run that was stopped while writing leaves half a last line: it is ignored, with a note on stderr.

    Raises:
        UserError: the file is missing or unreadable, or another line isn't a JSON object.
    """
    path = Path(path)
    remedy = "name a run folder or its log"
    try:
        data = files.contents(path, remedy)
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise files.UserError(f"can't read {path}: {reason}; {remedy}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        raise files.UserError(f"no run at {path}; name a run folder or its log")
    if os.path.isdir(path):
        logs = [log for log in (path / "log.jsonl", path / "log.jsonl.gz") if os.path.isfile(log)]
        if not logs:
            raise files.UserError(f"no log.jsonl in {path}; name the folder that a training script wrote")
        path = logs[0]
    settings_path = path.parent / "args.json"
    try:
        arguments = json.loads(files.contents(settings_path, "keep the run's own beside its log"))
        settings, data = dict(arguments["settings"]), dict(arguments["data"])
        for value, kind in ((data["name"], str), *((settings[name], int) for name in ("n_way", "k_spt", "k_qry"))):
            if type(value) is not kind:
                raise TypeError(f"{value!r} should be of type {kind.__name__}")
        for name, value in settings.items():
            if not isinstance(value, str | int | float | None):
                raise TypeError(f"{name} can't be {value!r}")
        if not data["name"].isprintable() or not _is_label(settings.get("net", "paper")):
            raise ValueError("a name that can't be printed")
    except OSError as error:
        raise files.UserError(
            f"can't read {settings_path}, which says what data and settings the run had: {error.strerror}; "
            f"keep it beside the log"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise files.UserError(
            f"{settings_path} isn't a run's args.json (settings, data): {type(error).__name__}: {error}; "
            f"take it from the run's folder again"
        ) from error
    return Run(path.parent, settings, data, read_log(path))


def read_json(run: Run, name: str, key: str) -> Any:
    """What `key` has in a JSON file of the run's folder: args.json, result.json or timing.json.

    Raises:
        UserError: the file is missing, or isn't what a run writes.
    """
    path = run.path / name
    try:
        return json.loads(files.contents(path, "let the run finish first"))[key]
    except OSError as error:
        raise files.UserError(f"can't read {path}: {error.strerror}; let the run finish first") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise files.UserError(f"{path} has no {key}; take it from the run's folder again") from error


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs to be averaged: different seeds of one setting on one data set.

    Raises:
        UserError: a run can't be read, settings differ, or a seed comes twice.
    """
    runs = [read_run(path) for path in paths]
    for run in runs:
        refuse_differing([runs[0], run])
    _refuse_same_seed(runs)
    return runs


def grouped(paths: Sequence[Path]) -> list[list[Run]]:
    """Runs put together by setting and data set: each group holds the seeds of one setting, in the order named.

    Raises:
        UserError: a run can't be read, or a seed comes twice in a setting.
    """
    groups: list[list[Run]] = []
    for run in map(read_run, paths):
        group = next((group for group in groups if not differing_settings([group[0], run])), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    for group in groups:
        _refuse_same_seed(group)
    return groups


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which the runs differ, apart from what doesn't change the experiment."""
    names = set().union(*(run.settings for run in runs)) - NOT_COMPARED
    differing = sorted(name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1)
    return ["the data set"] * (len({run.data["name"] for run in runs}) > 1) + differing


def refuse_differing(runs: Sequence[Run]) -> None:
    """Refuse runs that aren't seeds of one setting.

    Raises:
        UserError: it names the first two, and what differs.
    """
    differing = differing_settings(runs)
    if differing:
        raise files.UserError(
            f"{runs[0].path} and {runs[1].path} differ in {', '.join(differing)}; only seeds of one setting "
            f"are averaged: draw them apart"
        )


def _refuse_same_seed(runs: Sequence[Run]) -> None:
    seen: dict = {}
    for run in runs:
        other = seen.setdefault(run.settings.get("seed"), run)
        if other is not run:
            raise files.UserError(
                f"{other.path} and {run.path} have the same seed, {run.settings.get('seed')}; name one of them"
            )


def committed(name: str, folder: Path) -> list[Path]:
    """The run folders of the study's setting `name` in `folder`, in order of name; none of a setting not run yet."""
    return sorted({log.parent for log in folder.glob(f"{name}-seed[0-9]*/log.jsonl*")})


def describe(run: Run, data: bool = False) -> str:
    """What a run's setting is called in figures and tables: "5-way 1-shot, first order, original network"."""
    settings = run.settings
    words = [f"{settings['n_way']}-way {settings['k_spt']}-shot"]
    if "first_order" in settings:
        words.append("first order" if settings["first_order"] else "second order")
    if settings.get("net", "paper") != "paper":
        words.append(f"{settings['net']} network")
    return (f"{run.data['name']}, " if data else "") + ", ".join(words)


# ---- measured rows


def measurements(run: Run, classes: str) -> dict[int, dict]:
    """Measured rows of a run by meta-step; `classes` is "train" or "heldout"; of a repeated step the last."""
    return _by_step(run, "measurement", kind="nc", classes=classes)


def validations(run: Run) -> dict[int, dict]:
    """The same of its validations."""
    return _by_step(run, "validation", kind="val")


def common_steps(runs: Sequence[Run], classes: str) -> list[int]:
    """The meta-steps at which all of the runs have a measurement, in order."""
    return in_all(measurements(run, classes) for run in runs)


def in_all(many: Iterable[Iterable[int]]) -> list[int]:
    """The steps that stand in every one of them, in order."""
    return sorted(set.intersection(*map(set, many)))


def _by_step(run: Run, what: str, **wanted: str) -> dict[int, dict]:
    rows = (row for row in run.rows if all(row.get(name) == value for name, value in wanted.items()))
    try:
        return {_count(row["step"]): row for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise files.UserError(f"{run.path}: a {what} has no step; its log is broken") from error


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no count")
    return value


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
    if not isinstance(layers, list) or not layers or not all(map(_is_label, layers)):
        raise files.UserError(f"{run.path}: a measurement names no layers; its log is broken")
    return layers


def _is_label(name: object) -> bool:
    """Whether a figure can show it: text without what matplotlib takes for mathematics."""
    return isinstance(name, str) and name.isprintable() and "$" not in name


def last_hidden(run: Run) -> str:
    """The layer before the logits: the classifier's input."""
    layers = layers_of(run)
    return layers[max(len(layers) - 2, 0)]


def task_counts(runs: Sequence[Run], classes: str) -> set[int]:
    """How many tasks the measurements of these runs have; more than one number where they differ.

    Raises:
        UserError: a measurement doesn't say.
    """
    return _task_counts("measurement", {run.path: measurements(run, classes) for run in runs})


def validation_task_counts(runs: Sequence[Run]) -> set[int]:
    """The same of their validations."""
    return _task_counts("validation", {run.path: validations(run) for run in runs})


def _task_counts(what: str, found: dict[Path, dict[int, dict]]) -> set[int]:
    counts = set()
    for path, rows in found.items():
        try:
            counts |= {_count(row["tasks"]) for row in rows.values()}
        except (KeyError, TypeError, ValueError) as error:
            raise files.UserError(f"{path}: a {what} doesn't say of how many tasks; it is broken") from error
    return counts


def is_logged(runs: Sequence[Run], model: str, metric: str, classes: str = "train") -> bool:
    """Whether every measurement of every run has `metric`: logs from before it existed don't."""
    rows = [row for run in runs for row in measurements(run, classes).values()]
    return bool(rows) and all(metric in row.get(model, {}) for row in rows)


def nearest(steps: Sequence[int], wanted: int) -> int:
    """The step nearest to the wanted one; of two as near, the earlier."""
    return min(steps, key=lambda step: (abs(step - wanted), step))


def either(values: set) -> str:
    """What all agree on; else all of it, joined by "or"."""
    return " or ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sorted(values))
