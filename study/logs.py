"""Reads what training runs leave: args.json, log.jsonl or log.jsonl.gz, result.json, timing.json, controls.json.

Except in controls.py, `study` imports only files.py of the tool, and no torch: a log can be analysed where torch is
not installed.
"""

import functools
import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from files import UserError, listed, note, one_line, reading

HOME = Path(__file__).resolve().parent.parent
BASELINES = "protonet", "classifier"  # learners that train without an inner loop and classify by the nearest mean

# Settings that do not change the experiment: runs that differ in these alone are seeds of one setting.
NOT_COMPARED = {"seed", "out", "root", "data", "cache", "device", "deterministic", "task_chunk", "cuda_graph",
                "print_every", "save_every", "keep_every", "nc_every", "nc_every_late", "eval_every", "test_tasks",
                "tensorboard"}


@dataclass(eq=False)
class Run:
    """A training run: its folder, args.json, and the log's measurements by split ("train", "heldout") and step.

    Methods raise UserError if the log lacks what they are asked for.
    """

    path: Path
    arguments: dict
    rows: dict[str, dict[int, dict]]

    @functools.cached_property
    def settings(self) -> dict:
        """The settings, with defaults for those that older runs lack."""
        older = {"learner": "maml", "recipe": "original", "first_order": False, "nc_qry": None, "split": "shuffled",
                 "random_labels": False, "freeze_head": False, "keep_norms": False}
        return older | self.arguments["settings"]

    @property
    def data(self) -> str:
        return one_line(str(self.arguments["data"]["name"]))[:100]

    @property
    def recorded(self) -> dict:
        """The network's layers and a digest of each split's classes; None where an older run lacks them."""
        splits = self.arguments["data"].get("splits", {})
        return {"layers": self.arguments.get("layers")} | {
            f"classes of {split}": about.get("classes_digest") for split, about in splits.items()}

    @property
    def queries(self) -> int:
        """Queries per class in a measurement."""
        return self.settings["nc_qry"] or self.settings["k_qry"]

    @property
    def last_step(self) -> int:
        return max([0, *self.rows["train"], *self.rows["heldout"]])

    @property
    def end_from(self) -> float:
        """The meta-step at which the last tenth of training begins; "the end" is the mean over that tenth."""
        return 0.9 * self.last_step

    @functools.cached_property
    def layers(self) -> list[str]:
        """Names of the measured layers, first to last."""
        rows = self.rows["train"] or self.rows["heldout"]
        if not rows:
            why = ("it stopped before the first; continue it with --resume" if self.settings.get("nc_every")
                   else "it ran with --nc_every 0; train it with --nc_every 100")
            raise UserError(f"{self.path} holds no neural-collapse measurement: {why}")
        return list(map(str, next(iter(rows.values()))["layers"]))

    @property
    def hidden(self) -> str:
        """The classifier's input: the layer before the logits."""
        return self.layers[-2:][0]

    @functools.cache
    def file(self, name: str) -> dict:
        """result.json, timing.json or another JSON file of the run."""
        path = self.path / name
        with reading(path, "let the run finish, or take the file from its folder again", "is damaged"):
            return dict(json.loads(path.read_bytes()))

    @functools.cached_property
    def controls(self) -> dict:
        """What controls.json measured, by control; empty without that file."""
        return self.file("controls.json") if (self.path / "controls.json").exists() else {}

    @functools.cached_property
    def result(self) -> dict:
        """The run's test."""
        return self.file("result.json")

    def with_weights_of(self, control: str) -> "Run":
        """The run with the weights of a control, "untrained" or "pixels", and with what was measured of these."""
        other = Run(self.path, self.arguments, self.rows)
        other.controls = {kind.removesuffix(control) + "final": measured for kind, measured in self.controls.items()
                          if kind.endswith(control)}
        other.result = {"test": other.controls.get("final", {})}
        return other


def read_run(path: Path) -> Run:
    """The run at `path`: its folder, or its log next to args.json.

    Raises:
        UserError: the folder, the log or args.json is missing or broken.
    """
    if os.path.isdir(path):
        log = next((path / name for name in ("log.jsonl", "log.jsonl.gz") if (path / name).exists()), None)
        inside = [] if log else sorted({str(log.parent) for log in path.glob("*/log.jsonl*")})
        listed(inside, f"no run at {path}, but there are some in it", "name one or several of them")
        path = log or path
    if not os.path.isfile(path) or ".jsonl" not in path.name:
        raise UserError(f"no run at {path}; name the folder that a training script wrote, or its log")
    args_path = path.parent / "args.json"
    remedy = "keep the run's own next to its log: it says what data and settings the run had"
    with reading(args_path, remedy, "isn't a run's args.json"):
        arguments = json.loads(args_path.read_bytes())
        str(arguments["data"]["name"]), [arguments["settings"][name] + 0 for name in ("n_way", "k_spt", "k_qry")]
        [dict(split) for split in arguments["data"].get("splits", {}).values()]  # values of other types raise errors
    return Run(path.parent, arguments, read_log(path))


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """The measurements of a log by split and step; of a repeated step the last.

    A half-written last line, which a stopped run may leave, is ignored with a note.

    Raises:
        UserError: the log can't be read, another line isn't a JSON object, or a measurement lacks step or layers.
    """
    with reading(path, "copy it again, or name another run"):
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
    rows: dict[str, dict[int, dict]] = {"train": {}, "heldout": {}}
    for line_number, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            if line_number < len(lines):
                raise UserError(f"{path}, line {line_number}: not a JSON object; correct or remove that line") from None
            note(f"note: {one_line(str(path))}, line {line_number}: half-written, ignored")
            break
        split, step, layers = row.get("classes"), row.get("step"), row.get("layers")
        if row.get("kind") == "nc" and split in ("train", "heldout"):
            if type(step) is not int or not 0 <= step < 2**31 or not isinstance(layers, list) or not layers:
                raise UserError(f"{path}, line {line_number}: a measurement lacks its step or its layers; the log is "
                                "broken")
            rows[split][step] = row
    return rows


def read_groups(paths: Sequence[Path]) -> list[list[Run]]:
    """Runs grouped by setting and data set: each group holds the seeds of one setting, in the given order.

    Raises:
        UserError: a run can't be read, or a seed comes twice in a setting.
    """
    groups: list[list[Run]] = []
    for run in map(read_run, paths):
        group = next((group for group in groups if not any(differing(other, run) for other in group)), None)
        if group is None:
            groups.append(group := [])
        for other in group:
            if run.settings.get("seed") == other.settings.get("seed"):
                raise UserError(f"{run.path} has the same settings and seed as {other.path}; give only one")
        group.append(run)
    return groups


def differing(run: Run, other: Run) -> list[str]:
    """What makes two runs different experiments: data, settings, and any other records that both have."""
    names = sorted({*run.settings, *other.settings} - NOT_COMPARED)
    different = [name for name in names if run.settings.get(name) != other.settings.get(name)]
    one, two = run.recorded, other.recorded
    different += [name for name in one if None not in (one[name], two.get(name)) and one[name] != two[name]]
    return ["data"] * (run.data != other.data) + different


class Study:
    """The runs under a folder by setting: res/NAME-seed1, res/NAME-seed2, ... are the seeds of NAME."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cache
    def __getitem__(self, name: str) -> list[Run]:
        """The seeds of a setting; none if it has no run yet.

        Raises:
            UserError: a run is broken, or they are not of one setting.
        """
        paths = {log.parent for log in self.folder.glob(f"{name}-seed*/log.jsonl*")}
        groups = read_groups(sorted(path for path in paths if path.name.removeprefix(f"{name}-seed").isdigit()))
        if len(groups) > 1:
            other = groups[1][0]
            one = next(run for run in groups[0] if differing(run, other))
            what = ", ".join(differing(one, other))
            raise UserError(f"{one.path} and {other.path} differ in {what}; rename one: -seedN is for seeds")
        return groups[0] if groups else []

    def groups(self, names: Iterable[str]) -> list[list[Run]]:
        """The seeds of each of these settings that has a run; a name that comes twice counts once."""
        return [self[name] for name in dict.fromkeys(names) if self[name]]


def describe(run: Run) -> str:
    """A name for the run's setting: "5-way 1-shot, second order", with learner and network if not the default."""
    settings = run.settings
    words = [f"{settings['n_way']}-way {settings['k_spt']}-shot"]
    if settings["learner"] != "maml":
        words.append(str(settings["learner"]))
    if settings["learner"] not in BASELINES:
        words.append("first order" if settings["first_order"] else "second order")
    if settings.get("net") == "original":
        words.append("original network")
    return one_line(", ".join(words))[:100]
