"""The program that trains the study's runs, with a stand-in for the training scripts."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import miniimagenet_train
import omniglot_train
from files import UserError
from study import run
from study.design import SETTINGS
from study.logs import HOME

# A run with the seed 2 waits to be stopped until it is resumed; seed 3 fails.
STAND_IN = '''
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
resumed = "--resume" in flags
folder = pathlib.Path(flags.get("--resume") or flags["--out"])
folder.mkdir(parents=True, exist_ok=True)
seed = json.loads((folder / "args.json").read_text())["settings"]["seed"] if resumed else int(flags["--seed"])
settings = {"seed": seed, "epoch": 6000, "task_num": 8, "root": flags["--root"], "out": str(folder)}
(folder / "args.json").write_text(json.dumps({"settings": settings}))
def stop(*_):
    (folder / "checkpoint.pt").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with open(folder / "log.jsonl", "a") as log:
    log.write("resumed\\n" if resumed else "begun\\n")
if seed == 2 and not resumed:
    time.sleep(60)
if seed == 3:
    sys.exit("no luck")
for name in ("timing.json", "result.json", "last.pt"):
    (folder / name).write_text("{}")
'''
SETTING = "omniglot-5w1s"


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "omniglot_train.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "HOME", tmp_path)
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(place: Path, seed: int) -> list[str]:
    return (place / "runs" / "study" / f"{SETTING}-seed{seed}" / "log.jsonl").read_text().split()


def test_finished_runs_are_skipped_and_failures_named(place, capsys):
    run.main([SETTING, "--seeds", "1"])
    assert "0 of 1 runs are finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"failed: {SETTING}-seed3; .*seed3.txt says why"):
        run.main([SETTING, "--seeds", "1", "3", "4", "--jobs", "2"])
    assert "1 of 3 runs are finished" in capsys.readouterr().out
    assert log_of(place, 1) == log_of(place, 4) == ["begun"]
    assert "no luck" in (place / "runs" / "study" / f"{SETTING}-seed3.txt").read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)])
def test_stopped_it_stops_its_runs_and_then_resumes_them(number, status, place, capsys):
    """By SIGTERM, by a terminal that is closed, or by Ctrl-C, which a terminal sends to the whole group."""
    code = ("import pathlib, signal; from study import run; "  # the tests may have been started with signals ignored
            "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"run.HOME = pathlib.Path({str(place)!r}); run.main(['{SETTING}', '--seeds', '2'])")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=place, env={"PYTHONPATH": str(HOME)},
                               start_new_session=True)
    folder = place / "runs" / "study" / f"{SETTING}-seed2"
    log = folder / "log.jsonl"  # written once the stand-in has its handler
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait() == status
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    run.main([SETTING, "--seeds", "2"])
    assert "--resume" in capsys.readouterr().out and log_of(place, 2) == ["begun", "resumed"]


def test_collected_files_name_no_place_and_no_time(place, capsys):
    run.main([SETTING, "--seeds", "1", "--omniglot", "/somewhere"])
    for _ in range(2):
        run.main([SETTING, "--seeds", "1", "2", "--collect"])
        collected = {path.name: path.read_bytes() for path in (place / "res" / f"{SETTING}-seed1").iterdir()}
        assert collected.keys() == {"log.jsonl.gz", "args.json", "result.json", "timing.json", "last.pt"}
        assert gzip.decompress(collected["log.jsonl.gz"]) == b"begun\n" and collected["log.jsonl.gz"][4:8] == bytes(4)
        assert json.loads(collected["args.json"])["settings"] == {
            "seed": 1, "epoch": 6000, "task_num": 8, "root": "omniglot/", "cache": None, "out": None}
    assert f"{SETTING}-seed2: not finished, left out" in capsys.readouterr().out
    folder, results = (place / parent / f"{SETTING}-seed1" for parent in ("runs/study", "res"))
    settings = {"seed": 1, "epoch": 6000, "task_num": 8}

    def collect(arguments: dict) -> None:
        (folder / "args.json").write_text(json.dumps(arguments))
        run.main([SETTING, "--seeds", "1", "--collect"])

    (folder / "best.pt").write_text("weights")
    for tested in ("last", "best"):  # the best weights where they were tested
        collect({"settings": settings | {"test_weights": tested}})
        assert (results / "best.pt").exists() == (tested == "best")
    (results / "controls.json").write_text("{}")
    collect({"settings": settings})
    assert (results / "controls.json").exists()
    (folder / "last.pt").write_text("other weights")
    collect({"settings": settings})
    assert not (results / "controls.json").exists()
    with pytest.raises(UserError, match="seed1 has another epoch, seed than the study; rename it"):
        collect({"settings": settings | {"epoch": 20, "seed": 4}})
    with pytest.raises(UserError, match="seed1 is damaged .*; let it train again"):
        collect({})


@pytest.mark.parametrize("name", SETTINGS)
def test_every_command_is_one_that_its_script_takes(name):
    (job, *_) = run.jobs_of([name], None)
    script, *flags = job.command("data")
    module = {"omniglot_train.py": omniglot_train, "miniimagenet_train.py": miniimagenet_train}[script]
    args = module.arguments(flags)
    assert args.out == str(job.folder) and args.root == "data" and args.seed == 1


def test_flags_that_a_run_does_not_have():
    settings = {"update_lr": 2.0, "adapt_blocks": [4, 5], "spatial_mean": False, "freeze_head": True, "learner": "anil"}
    flags = "--update_lr 2 --adapt_blocks 4 5 --no-spatial_mean --freeze_head --learner anil --nc_every 9".split()
    assert run.differing(flags, settings) == []
    for name, other in (("update_lr", 0.4), ("adapt_blocks", None), ("spatial_mean", True), ("freeze_head", False),
                        ("learner", "boil")):
        assert run.differing(flags, settings | {name: other}) == [name]


def test_refusals(place):
    for arguments, words in ((["omniglot"], "no setting 'omniglot' in the study"), (["--jobs", "0"], "at least 1")):
        with pytest.raises(UserError, match=words):
            run.main(arguments)
    assert not (place / "runs").exists()
