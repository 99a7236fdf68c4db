"""A run can be stopped at any moment and continues as if nothing had happened; what prevents it is one line."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill
import pytest
import torch

import checkpoint
import meta
import omniglot_train
import record
import synthetic
import training
from device import Signals, Stopped
from files import UserError, locked
from meta import Meta
from tasks import Sampler, Tasks

TINY = ("--synthetic --device cpu --task_num 2 --n_way 2 --k_qry 2 --update_step 1 --update_step_test 1 --epoch 8 "
        "--eval_every 3 --eval_tasks 6 --test_tasks 6 --nc_every 2 --save_every 2").split()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def make_small(monkeypatch) -> None:
    """Few characters, drawn in no time; an evaluation still takes three batches."""
    monkeypatch.setattr(training, "DRAWN", 4)
    monkeypatch.setattr(synthetic, "CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 3), "test": (7, 3)})
    monkeypatch.setattr(synthetic, "CHARACTER_IMAGES", 4)


def train(out: Path, *flags: str) -> Path:
    omniglot_train.main([*TINY, "--out", str(out), *flags])
    return out


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        omniglot_train.main(list(arguments))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500
    return str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return stop_at(patch, tmp_path_factory.mktemp("stopped") / "run", "forward", 5)


@pytest.fixture
def stopped(tmp_path, stopped_once) -> Path:
    """A run that was stopped at the top of step 5; its last regular checkpoint was of step 4. A copy for each test."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def stop_at(monkeypatch, out: Path, method: str, call: int, number: int = signal.SIGTERM,
            flags: list[str] = TINY) -> Path:
    """Train, or resume, with a signal in the given call of one of Meta's methods."""
    calls, original = iter(range(1, 1000)), getattr(Meta, method)

    def signalled(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Meta, method, signalled)
        omniglot_train.main([*flags, *(["--out", str(out)] if "--resume" not in flags else [])])
    assert ended.value.code == 128 + number
    return out


def same(one: Path, two: Path) -> None:
    assert not kill.differences(kill.state(one), kill.state(two))


def resume(run: Path, *flags: str) -> None:
    omniglot_train.main(["--resume", str(run), *flags])


# ---- stopped and resumed


@pytest.mark.slow
def test_thirty_kills_lose_nothing():
    done = subprocess.run([sys.executable, Path(kill.__file__), "--kills", "30"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 30, done.stdout


@pytest.mark.parametrize("method, call, step, number", [
    ("forward", 5, 5, signal.SIGTERM),  # within a step: at the next one's top
    ("finetune", 5, 3, signal.SIGINT),  # in a validation: as at that step's top
    *(pytest.param(*case, signal.SIGTERM, marks=pytest.mark.slow) for case in [
        ("forward", 8, 8), ("finetune", 1, 0),
        ("finetune", 13, 8)]),  # in the test: the last checkpoint is there already
])
def test_a_signal_anywhere_and_resumed(method, call, step, number, whole, tmp_path, monkeypatch, capsys):
    run = stop_at(monkeypatch, tmp_path / "run", method, call, number)
    assert checkpoint.read(run / "checkpoint.pt", CPU, "")["step"] == step
    said = f"stopped at step {step}; resume with: python omniglot_train.py --resume {run}\n"
    assert capsys.readouterr().out.endswith(said)
    assert not (run / "result.json").exists()
    resume(run)
    same(run, whole)


def test_a_signal_waits_for_the_check_and_a_second_one_does_not():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Signals() as signals:
        signals.check(CPU)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped) as stopped:
            signals.check(CPU)
    assert stopped.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


@pytest.mark.parametrize("begun", [False, True])
def test_killed_before_its_first_step(begun, whole, tmp_path, monkeypatch):
    """Before args.json there is no run, and the same command starts it; with it --resume does."""
    def killed(*_):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*(training, "Log") if begun else (record, "write_args"), killed)
        train(run)
    (run / ".checkpoint.pt.abcd1234.tmp").write_bytes(b"half")
    if begun:
        (run / "log.jsonl").write_bytes(b'{"kind": "run", "st')
        resume(run)
    else:
        train(run)
    same(run, whole)


@pytest.mark.slow
def test_a_longer_run_is_the_longer_run(whole, tmp_path, monkeypatch, capsys):
    run = train(tmp_path / "run", "--epoch", "4")
    short = (run / "result.json").read_bytes()
    resume(run)
    assert f"{run} is complete" in capsys.readouterr().out
    assert (run / "result.json").read_bytes() == short
    stop_at(monkeypatch, run, "forward", 2, flags=["--resume", str(run), "--epoch", "8"])
    assert not (run / "result.json").exists()
    resume(run)
    same(run, whole)
    one, two = (json.loads((folder / "args.json").read_text()) for folder in (run, whole))
    assert one["meta_steps"] == 8 and one["settings"] == two["settings"] | {"out": str(run)}
    assert "--epoch 4: the run has 8; that may only grow" in refused("--resume", str(run), "--epoch", "4")


def test_resuming_takes_the_runs_own_flags_and_where_it_happens(stopped, whole, tmp_path):
    """A half-written line of the log is cut off; minutes add up."""
    found = checkpoint.read(stopped / "checkpoint.pt", CPU, "")
    checkpoint.write(stopped / "checkpoint.pt", found | {"minutes": 60.0})
    with (stopped / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 5, "lo')
    resume(stopped, *TINY, "--save_every", "3", "--cuda_graph", "--root", "x", "--cache", str(tmp_path / "cache"))
    same(stopped, whole)
    assert json.loads((stopped / "timing.json").read_text())["training_minutes"] >= 60


# ---- the settings of a run again


@pytest.mark.parametrize("flags", [["--update_lr", "0.3"], ["--clip", "1"], ["--no-synthetic"], ["--out", "elsewhere"]])
def test_resuming_refuses_what_changes_the_experiment(flags, stopped):
    before = (stopped / "log.jsonl").read_bytes()
    said = refused("--resume", str(stopped), *flags)
    assert said.startswith(f"{flags[0].replace('no-', '')} can't be set with --resume")
    assert (stopped / "log.jsonl").read_bytes() == before


def rewrite(run: Path, **settings) -> str:
    """Change settings in args.json, or take away those that are "away"."""
    recorded = json.loads((run / "args.json").read_text())
    recorded["settings"] = {name: value for name, value in (recorded["settings"] | settings).items() if value != "away"}
    (run / "args.json").write_text(json.dumps(recorded))
    return str(run / "args.json")


@pytest.mark.slow
def test_from_args_repeats_a_run_and_so_does_a_file_of_an_older_version(whole, tmp_path):
    """Whose "paper" network is today's conv_bn_relu."""
    old = shutil.copytree(whole, tmp_path / "old")
    newer = ("recipe", "learner", "pixels", "nc_qry", "k_qry_test", "test_weights", "transductive", "lr_schedule",
             "keep_every", "clip", "skip_nonfinite", "save_every", "deterministic")
    path = rewrite(old, net="paper", **dict.fromkeys(newer, "away"))
    for source, out in ((whole / "args.json", "run"), (path, "again")):
        omniglot_train.main(["--from_args", str(source), "--out", str(tmp_path / out)])
        assert (tmp_path / out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    same(tmp_path / "run", whole)
    assert "not of this script and version (clip, deterministic" in refused("--resume", str(old), "--epoch", "9")
    omniglot_train.main(["--test", str(old)])
    assert (old / "test-6tasks-2qry-1steps.json").exists()
    changed = ["--from_args", path, "--epoch", "2", "--first_order", "--out", str(tmp_path / "changed")]
    omniglot_train.main(changed)
    settings = json.loads((tmp_path / "changed/args.json").read_text())["settings"]
    assert settings["first_order"] and settings["epoch"] == 2 and settings["n_way"] == 2


@pytest.mark.parametrize("mode, settings, line", [
    ("resume", {"colour": 1}, "not of this script and version (colour)"),
    ("test", {"script": "miniimagenet_train"}, "not of this script and version (script miniimagenet_train)"),
    ("from_args", {"net": "resnet"}, "argument --net: invalid choice"),
    ("resume", {"epoch": None}, "argument --epoch: invalid int value"),
    ("test", {"seed": [1]}, "argument --seed: invalid int value"),
    ("from_args", {"synthetic": "yes"}, "ignored explicit argument"),
])
def test_a_file_that_is_wrong(mode, settings, line, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    path = rewrite(run, **settings)
    assert line in refused(f"--{mode}", path if mode == "from_args" else str(run))


def test_modes_exclude_each_other(whole):
    assert refused("--test", str(whole), "--resume", str(whole)) == "--resume and --test exclude each other; give one"


# ---- a checkpoint that is wrong


def test_every_damage_to_a_checkpoint_is_refused(stopped):
    """Cut anywhere, one byte changed anywhere: never a run that continues from something else."""
    path = stopped / "checkpoint.pt"
    good = path.read_bytes()
    sound = checkpoint.read(path, CPU, "")
    path.write_bytes(good[:-1])
    assert ("checkpoint.pt is damaged, or not of this program, run or network; put it back, or start again: python "
            f"omniglot_train.py --from_args {stopped / 'args.json'}") in refused("--resume", str(stopped))
    accepted = 0
    for place in range(7, len(good), len(good) // 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        with contextlib.suppress(UserError):
            assert not kill.differences(checkpoint.read(path, CPU, ""), sound)
            accepted += 1  # padding, or a byte that zip holds twice
    assert accepted < 20


class Code:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


@pytest.mark.parametrize("change, line", [
    (lambda found: {"weights": found["weights"], "step": 3, "val_accuracy": 0.5}, "is damaged, or not of this program"),
    (lambda found: found | {"best": Code()}, "is damaged, or not of this program"),
    (lambda found: found | {"step": -1}, "is damaged, or not of this program"),
    (lambda found: found | {"of": found["of"] | {"update_lr": 0.1}}, "is of a run with update_lr 0.1, and here it is"),
    (lambda found: found | {"of": found["of"] | {"device": "cuda"}}, "is of a run with device cuda, and here it is"),
    (lambda found: found | {"weights": {name: weight[:1] for name, weight in found["weights"].items()}}, "is damaged"),
    (lambda found: found | {"adam": {"state": {i: values | {"exp_avg": torch.zeros(3)} for i, values in
                                               found["adam"]["state"].items()}}}, "is damaged"),
    (lambda found: found | {"tasks": torch.zeros(3)}, "is damaged"),
    (lambda found: found | {"log_bytes": 10**9}, "log.jsonl is missing or cut"),
])
def test_a_foreign_checkpoint_is_refused(change, line, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, log = stopped / "checkpoint.pt", (stopped / "log.jsonl").read_bytes()
    torch.save(change(checkpoint.read(path, CPU, "")), path)
    assert line in refused("--resume", str(stopped))
    assert not (tmp_path / "made by a checkpoint").exists()
    assert (stopped / "log.jsonl").read_bytes() == log


def test_a_run_without_its_checkpoint_or_log_is_refused(stopped):
    log = (stopped / "log.jsonl").read_bytes()
    (stopped / "log.jsonl").write_bytes(log[:-1])
    assert f"log.jsonl is missing or cut: {len(log) - 1:,} of the {len(log):,} bytes" in refused(
        "--resume", str(stopped))
    (stopped / "checkpoint.pt").unlink()
    assert "checkpoint.pt is missing; put it back, or start again" in refused("--resume", str(stopped))
    assert (stopped / "log.jsonl").read_bytes() == log[:-1]


# ---- two at once


def test_a_folder_in_use_is_refused(stopped, tmp_path, monkeypatch):
    """A run holds its folder from before its first byte to its end."""
    new = tmp_path / "new"
    for run, flags in ((new, [*TINY, "--out", str(new)]), (stopped, ["--resume", str(stopped)])):
        with locked(run / ".run.lock"):
            assert refused(*flags) == f"{run} is in use by another process; name another folder"
    monkeypatch.setattr(Meta, "forward", lambda *_, **__: "in use" in refused("--resume", str(new)) and sys.exit(7))
    with pytest.raises(SystemExit) as ended:
        train(new)
    assert ended.value.code == 7
    assert sorted(path.name for path in new.iterdir()) == ["args.json", "best.pt", "checkpoint.pt", "log.jsonl"]


# ---- no space, no right, no memory


@contextlib.contextmanager
def limit(kind: str, bound: int):
    """A soft limit of this process."""
    resource = pytest.importorskip("resource")
    kind = getattr(resource, f"RLIMIT_{kind}")
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, whole):
    size = (whole / "checkpoint.pt").stat().st_size
    run = train(tmp_path / "run", "--epoch", "2")
    good = (run / "checkpoint.pt").read_bytes()
    with limit("FSIZE", size - 1000):
        assert "checkpoint.pt: File too large; free some space" in refused("--resume", str(run), "--epoch", "8")
    assert (run / "checkpoint.pt").read_bytes() == good
    assert not list(run.glob(".*"))
    resume(run)
    same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("call, name", [(0, "checkpoint.pt"), (1, "args.json"), (2, "log.jsonl"), (4, "best.pt")])
def test_a_disk_that_is_full_only_when_it_is_flushed(call, name, tmp_path, monkeypatch, whole):
    """As over a network and with quotas: fsync fails once."""
    calls, original, run = iter(range(1000)), os.fsync, tmp_path / "run"

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(*TINY, "--out", str(run))
    assert said.startswith(f"can't write {run / name}: {os.strerror(errno.EDQUOT)}; free some space")
    assert not run.exists() or not list(run.glob(".*"))
    if call > 1:
        resume(run)
        same(run, whole)


@pytest.mark.parametrize("out", ["file/run", "file", "a\0b", "x" * 300])
def test_folders_that_can_be_none(out, tmp_path):
    (tmp_path / "file").write_text("here")
    assert "name another" in refused(*TINY, "--out", str(tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_out_of_memory_names_the_flag(tmp_path):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with limit("AS", used + 2**28):
        large = ["--task_num", "50", "--n_way", "3", "--k_spt", "2", "--update_step", "50"]
        said = refused(*TINY, *large, "--out", str(tmp_path / "big"))
    assert said == ("out of memory; lower --task_chunk (now as fits the device) to hold fewer tasks at once, "
                    "or take another --device than cpu")


# ---- numbers


def break_tasks(monkeypatch, step: int, task: int) -> None:
    """One pixel of one task isn't a number; its loss isn't, then."""
    calls, original = iter(range(1000)), Sampler.gather

    def broken(sampler, *args, **options) -> Tasks:
        tasks = original(sampler, *args, **options)
        if sampler.turns > 1 and not options and drawn.setdefault(tasks.x_qry.sum().item(), next(calls)) == step:
            tasks.x_qry[task, 0] = float("nan")
        return tasks

    drawn = {}  # tasks drawn again are the same ones
    monkeypatch.setattr(Sampler, "gather", broken)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, stopped):
    run = tmp_path / "new"
    with monkeypatch.context() as patch:
        break_tasks(patch, 5, 1)
        said = refused(*TINY, "--out", str(run))
    assert said.startswith(f"step 5: the loss of task 1 is not finite; its weights and tasks are in {run}/nonfinite.pt")
    for flag in ("--update_lr (0.4)", "--meta_lr (0.001)", "--clip", "--skip_nonfinite", f"_args {run}/args.json"):
        assert flag in said
    found, reached = (checkpoint.read(path, CPU, "") for path in (run / "nonfinite.pt", stopped / "checkpoint.pt"))
    assert found["step"] == 5 and found["losses"].isfinite().tolist() == [True, False]
    assert found["tasks"]["x_qry"].isnan().any()
    for part in ("weights", "adam"):
        assert not kill.differences(found[part], reached[part])
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 4  # nothing of the step that failed


@pytest.mark.slow
def test_skipping_continues_and_counts(tmp_path, monkeypatch):
    run = tmp_path / "run"
    break_tasks(monkeypatch, 5, 1)
    train(run, "--skip_nonfinite")
    assert json.loads((run / "result.json").read_text())["skipped_updates"] == 1
    found = checkpoint.read(run / "checkpoint.pt", CPU, "")
    assert (found["step"], found["updates"]) == (8, 7)


def test_a_learning_rate_that_is_too_high(tmp_path):
    said = refused(*TINY, "--update_lr", "1e38", "--out", str(tmp_path / "run"))
    assert said.startswith("step 0: ") and "is not finite" in said and "--update_lr (1e+38)" in said
    assert said in refused("--resume", str(tmp_path / "run"))  # again and again


@pytest.mark.slow
def test_flags_reach_meta_and_torch(tmp_path, monkeypatch, whole):
    """--clip, --deterministic, --nc_every_late."""
    monkeypatch.setattr(meta, "LATE", 4)
    train(tmp_path / "clipped", "--clip", "1e-4")
    run = train(tmp_path / "run", "--clip", "1e4", "--deterministic", "--nc_every", "1", "--nc_every_late", "3")
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    one, two, none = (kill.state(folder)["weights"] for folder in (tmp_path / "clipped", run, whole))
    assert kill.differences(one, none) and not kill.differences(two, none)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("classes") == "train"] == [0, 1, 2, 3, 6]
    train(tmp_path / "other", "--epoch", "1")
    assert not torch.are_deterministic_algorithms_enabled()
