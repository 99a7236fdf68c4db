"""A run can be stopped at any moment and continues as if nothing had happened; what prevents it is one line."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import kill
import pytest
import torch
from data_files import Call, read_json, refusal

import checkpoint
import omniglot_train
import predict
import training
from device import Signals, Stopped
from files import UserError, locked, quoted
from meta import Meta

TINY = ("--synthetic --device cpu --task_num 2 --n_way 2 --k_qry 2 --update_step 1 --update_step_test 1 --epoch 8 "
        "--eval_every 3 --eval_tasks 6 --test_tasks 6 --nc_every 2 --save_every 2").split()
CPU = torch.device("cpu")
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
refused = partial(refusal, omniglot_train.main)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few characters, drawn in no time; an evaluation still takes three batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "DRAWN", 4)
        patch.setattr("synthetic.CHARACTER_SPLITS", {"train": (0, 4), "val": (4, 3), "test": (7, 3)})
        patch.setattr("synthetic.CHARACTER_IMAGES", 4)
        yield


def train(out: Path, *flags: str) -> Path:
    omniglot_train.main([*TINY, "--out", str(out), *flags])
    return out


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped_once(small, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return stop_at(patch, tmp_path_factory.mktemp("stopped") / "run", "__call__", 5)


@pytest.fixture
def stopped(tmp_path, stopped_once) -> Path:
    """A run that was stopped at the top of step 5; its last regular checkpoint was of step 4. A copy for each test."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def stop_at(monkeypatch, out: Path, method: str, call: int, number: int = signal.SIGTERM,
            flags: list[str] = TINY) -> Path:
    """Train, or resume, with a signal in the given call of one of Meta's methods."""
    calls, original, trained, runs = iter(range(1, 1000)), getattr(Meta, method), training._Run.train, []
    handler = signal.signal(number, signal.SIG_DFL)  # nohup, and a shell's &, may have it ignored

    def signalled(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Meta, method, signalled)
        patch.setattr(training._Run, "train", lambda run: runs.append(run) or trained(run))
        omniglot_train.main([*flags, *(["--out", str(out)] if "--resume" not in flags else [])])
    signal.signal(number, handler)
    assert ended.value.code == 128 + number
    assert [run.meta_step for run in runs] == [None], "NCCL would wait for the step's graph"
    return out


def same(one: Path, two: Path) -> None:
    assert not kill.differences(kill.state(one), kill.state(two))


def resume(run: Path, *flags: str) -> None:
    omniglot_train.main(["--resume", str(run), *flags])


# ---- stopped and resumed


@pytest.mark.slow
def test_thirty_kills_lose_nothing():
    done = subprocess.run([sys.executable, Path(kill.__file__), "--kills", "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 30, done.stdout


@pytest.mark.parametrize("method, call, step, number", [
    ("__call__", 5, 5, signal.SIGTERM),  # within a step: at the next one's top
    ("finetune", 5, 3, signal.SIGINT),  # in a validation: as at that step's top
    pytest.param("__call__", 8, 8, signal.SIGTERM, marks=pytest.mark.slow),  # in the last step
    pytest.param("finetune", 13, 8, HANGUP, marks=pytest.mark.slow)])  # in the test
def test_a_signal_anywhere_and_resumed(method, call, step, number, whole, tmp_path, monkeypatch, capsys):
    run = stop_at(monkeypatch, tmp_path / "a run", method, call, number)
    assert checkpoint.read(run / "checkpoint.pt", "")["step"] == step
    said, _, command = capsys.readouterr().out.rpartition("; resume with: ")
    assert said.endswith(f"stopped at step {step}")
    assert command == f"python omniglot_train.py --resume {quoted(run)}\n"
    assert not (run / "result.json").exists()
    resume(run)
    same(run, whole)


def test_a_signal_waits_for_the_check_and_a_second_one_does_not():
    """A hangup that is ignored, as with nohup, stays ignored."""
    before, hangup = signal.getsignal(signal.SIGINT), signal.signal(HANGUP, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), HANGUP)
        signals.check(CPU)
        signal.signal(HANGUP, hangup)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="130"):
            signals.check(CPU)
    assert signal.getsignal(signal.SIGINT) == before
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_killed_before_its_first_step(whole, tmp_path, monkeypatch):
    """Before args.json there is no run, and the same command starts it."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("record.write_args", Mock(side_effect=KeyboardInterrupt))
        train(run)
    (run / ".checkpoint.pt.abcd1234.tmp").write_bytes(b"half")
    train(run)
    same(run, whole)


def test_a_longer_run_is_the_longer_run(whole, tmp_path, monkeypatch, capsys):
    """A run at its end keeps its results; one that continues has none, and no last weights."""
    run = stop_at(monkeypatch, tmp_path / "run", "finetune", 8, flags=[*TINY, "--epoch", "2"])  # in the test
    results = "result.json", "timing.json", "last.pt", "controls.json", "test-2tasks-2qry-1steps.json"
    for name in results[3:]:
        (run / name).write_text("{}")
    resume(run)
    short = kill.state(run)
    resume(run)
    said = capsys.readouterr().out
    assert f"{run} is complete" in said and "removed" not in said
    assert not kill.differences(kill.state(run), short) and {*results} < {*short["files"]}
    stop_at(monkeypatch, run, "__call__", 2, flags=["--resume", str(run), "--epoch", "8"])
    assert f"removed from {run}, as the run continues: {', '.join(results)}\n" in capsys.readouterr().out
    assert not any((run / name).exists() for name in results)
    words = "last.pt: No such file or directory; the weights here are best;"
    assert words in refused("--test", str(run), "--test_weights", "last")
    with pytest.raises(UserError, match=words):
        predict.load(run, "last")
    resume(run)
    same(run, whole)
    one, two = (read_json(folder, "args.json") for folder in (run, whole))
    assert one["meta_steps"] == 8 and one["settings"] == two["settings"] | {"out": str(run)}
    before = kill.state(run)
    said = refused("--resume", str(run), "--epoch", "4")
    assert "--epoch 4 ends the run after 4 meta-steps, and it has taken 8 already" in said
    assert not kill.differences(kill.state(run), before)


def test_resuming_takes_the_runs_own_flags_and_where_it_happens(stopped, whole, tmp_path, capsys):
    """A half-written line of the log is cut off; minutes add up."""
    saved = checkpoint.read(stopped / "checkpoint.pt", "")
    checkpoint.write(stopped / "checkpoint.pt", saved | {"minutes": 60.0})
    with (stopped / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 5, "lo')
    resume(stopped, *TINY, "--save_every", "3", "--cuda_graph", "--root", "x", "--cache", str(tmp_path / "cache"))
    assert "note: --cuda_graph has no effect on a CPU\n" in capsys.readouterr().out
    same(stopped, whole)
    assert read_json(stopped, "timing.json")["training_minutes"] >= 60


# ---- the settings of a run again


@pytest.mark.parametrize("flags", [["--update_lr", "0.3"], ["--clip", "1"], ["--no-synthetic"], ["--out", "elsewhere"]])
def test_resuming_refuses_what_changes_the_experiment(flags, stopped):
    before = (stopped / "log.jsonl").read_bytes()
    said = refused("--resume", str(stopped), *flags)
    assert said.startswith(f"{flags[0].replace('no-', '')} can't be set with --resume")
    assert (stopped / "log.jsonl").read_bytes() == before


def rewrite(run: Path, **settings) -> None:
    """Change settings in args.json, or take away those that are "away"."""
    recorded = read_json(run, "args.json")
    recorded["settings"] = {name: value for name, value in (recorded["settings"] | settings).items() if value != "away"}
    (run / "args.json").write_text(json.dumps(recorded))


@pytest.mark.slow
def test_from_args_repeats_a_run_and_so_does_a_file_of_an_older_version(whole, tmp_path, capsys):
    old = shutil.copytree(whole, tmp_path / "old")
    rewrite(old, adapt_blocks="away", clip="away", nc_qry="away")
    omniglot_train.main(["--from_args", str(old), "--out", str(tmp_path / "again")])
    same(tmp_path / "again", whole)
    assert "not of this script and version (adapt_blocks, clip, n" in refused("--resume", str(old), "--epoch", "9")
    omniglot_train.main(["--test", str(old)])
    assert (old / "test-6tasks-2qry-1steps.json").exists()
    assert "note: " not in capsys.readouterr().out
    flags = "--epoch 2 --first_order --net original".split()
    omniglot_train.main(["--from_args", str(old), *flags, "--out", str(tmp_path / "changed")])
    settings = read_json(tmp_path / "changed", "args.json")["settings"]
    assert settings["first_order"] and settings["epoch"] == 2 and settings["n_way"] == 2


@pytest.mark.parametrize("mode, settings, line", [
    ("resume", {"colour": 1}, "not of this script and version (colour)"),
    ("test", {"script": "miniimagenet_train", "colour": 1}, "and version (script miniimagenet_train); use that script"),
    ("from_args", {"net": "resnet"}, "argument --net: invalid choice"),
    ("test", {"seed": [1]}, "argument --seed: invalid int value"),
    ("from_args", {"synthetic": "yes"}, "ignored explicit argument")])
def test_a_file_that_is_wrong(mode, settings, line, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    rewrite(run, **settings)
    assert line in refused(f"--{mode}", str(run))


# ---- a checkpoint that is wrong


def test_every_damage_to_a_checkpoint_is_refused(stopped):
    """Cut anywhere, one byte changed anywhere: never a run that continues from something else."""
    path = stopped / "checkpoint.pt"
    good = path.read_bytes()
    sound = checkpoint.read(path, "")
    path.write_bytes(good[:-1])
    said = refused("--resume", str(stopped))
    assert "checkpoint.pt is damaged, or belongs to another program, run or network (" in said
    assert said.endswith(f"; put it back, or start again: python omniglot_train.py --from_args {stopped}")
    accepted = 0
    for place in range(7, len(good), len(good) // 60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        with contextlib.suppress(UserError):
            assert not kill.differences(checkpoint.read(path, ""), sound)
            accepted += 1  # padding, or a byte that zip holds twice
    assert accepted < 20


@pytest.mark.parametrize("change, line", [
    (lambda saved: {"weights": saved["weights"], "step": 3, "val_accuracy": 0.5}, "is damaged, or belongs to another"),
    (lambda saved: saved | {"best": Call(os.mkdir, ("made by a checkpoint",))}, "is damaged, or belongs to another"),
    (lambda saved: saved | {"step": -1}, "is damaged, or belongs to another"),
    (lambda saved: saved | {"experiment": saved["experiment"] | {"device": "cuda"}},
     f"with device cuda, and here it is cpu; restore that, or start again: python {quoted(omniglot_train.__file__)}"),
    (lambda saved: saved | {"weights": {name: weight[:1] for name, weight in saved["weights"].items()}},
     "program, run or network (Error(s) in loading state_dict for Learner: size mismatch for "),
    (lambda saved: saved | {"adam": {"state": {i: values | {"exp_avg": torch.zeros(3)} for i, values in
                                               saved["adam"]["state"].items()}}}, "is damaged"),
    (lambda saved: saved | {"tasks": torch.zeros(3)}, "is damaged")])
def test_a_foreign_checkpoint_is_refused(change, line, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, log = stopped / "checkpoint.pt", (stopped / "log.jsonl").read_bytes()
    torch.save(change(checkpoint.read(path, "")), path)
    assert line in refused("--resume", str(stopped))
    assert not (tmp_path / "made by a checkpoint").exists()
    assert (stopped / "log.jsonl").read_bytes() == log


def test_a_complete_run_is_named_without_its_data_and_not_overwritten(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    rewrite(run, synthetic=False)
    resume(run, "--root", str(tmp_path / "absent"))
    assert "is complete; a larger --epoch adds steps" in capsys.readouterr().out
    before = kill.state(run)
    assert "there is a run already" in refused(*TINY, "--out", str(run))
    assert not kill.differences(kill.state(run), before)


def test_a_run_without_its_log_checkpoint_or_weights_stays_as_it_is(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    length = checkpoint.read(run / "checkpoint.pt", "")["log_bytes"]
    os.truncate(run / "log.jsonl", length - 1)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    said = refused("--resume", str(run), "--epoch", "99")
    assert f"log.jsonl is missing or cut: {length - 1:,} of the {length:,} bytes" in said
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (run / "checkpoint.pt").unlink()
    said = refused("--resume", str(run), "--epoch", "99")
    assert "checkpoint.pt: No such file or directory; put it back, or start again" in said
    (run / "best.pt").unlink()
    assert "best.pt: No such file or directory; the weights here are " in refused("--test", str(run))


def test_a_folder_in_use_is_refused(stopped, tmp_path, monkeypatch):
    """A run holds its folder from before its first byte to its end."""
    new = tmp_path / "new"
    for run, flags in ((new, [*TINY, "--out", str(new)]), (stopped, ["--resume", str(stopped)])):
        with locked(run / ".run.lock"):
            assert refused(*flags) == f"{run} is in use by another process; wait until it ends, or name another folder"
    monkeypatch.setattr(Meta, "__call__", lambda *_, **__: "in use" in refused("--resume", str(new)) and sys.exit(7))
    with pytest.raises(SystemExit) as ended:
        train(new)
    assert ended.value.code == 7
    assert sorted(path.name for path in new.iterdir()) == [
        ".run.lock", "args.json", "best.pt", "checkpoint.pt", "log.jsonl"]
