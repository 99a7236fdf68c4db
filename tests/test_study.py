"""The study's script: what it starts, skips, resumes and collects, with a stand-in for the training scripts."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import files
import miniimagenet_train
import omniglot_train
import runs
import settings
import study

PROJECT = Path(study.__file__).parent
SETTING = runs.STUDY[0].name

# Takes the flags that the study gives; a run with the seed 2 waits to be stopped until it is resumed, seed 3 fails.
STAND_IN = '''
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
resumed = "--resume" in flags
folder = pathlib.Path(flags.get("--resume") or flags["--out"])
folder.mkdir(parents=True, exist_ok=True)
seed = json.loads((folder / "args.json").read_text())["settings"]["seed"] if resumed else int(flags["--seed"])
(folder / "args.json").write_text(json.dumps({"settings": {"seed": seed, "root": flags["--root"], "out": str(folder)}}))
with open(folder / "log.jsonl", "a") as log:
    log.write("resumed\\n" if resumed else "begun\\n")
def stop(*_):
    (folder / "checkpoint.pt").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if seed == 2 and not resumed:
    time.sleep(60)
if seed == 3:
    sys.exit("no luck")
for name in ("timing.json", "result.json"):
    (folder / name).write_text("{}")
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project with the stand-in for its training script."""
    (tmp_path / "omniglot_train.py").write_text(STAND_IN)
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(home: Path, seed: int) -> list[str]:
    return (home / "runs" / "study" / f"{SETTING}-seed{seed}" / "log.jsonl").read_text().split()


def test_finished_runs_are_skipped_and_failures_named(home, capsys):
    study.main([SETTING, "--seeds", "1"])
    assert "0 of 1 runs are finished" in capsys.readouterr().out
    with pytest.raises(files.UserError, match=f"failed: {SETTING}-seed3; .*seed3.txt says why"):
        study.main([SETTING, "--seeds", "1", "3", "4", "--jobs", "2"])
    assert "1 of 3 runs are finished" in capsys.readouterr().out
    assert log_of(home, 1) == log_of(home, 4) == ["begun"], "one run is skipped, and one goes on after the failure"
    assert "no luck" in (home / "runs" / "study" / f"{SETTING}-seed3.txt").read_text()


def test_stopped_it_stops_its_runs_and_then_resumes_them(home, capsys):
    code = f"import study, pathlib; study.HERE = pathlib.Path({str(home)!r}); study.main(['{SETTING}', '--seeds', '2'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=home, env={"PYTHONPATH": str(PROJECT)})
    folder = home / "runs" / "study" / f"{SETTING}-seed2"
    deadline = time.monotonic() + 30
    while not (folder / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # until the stand-in has its handler
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    study.main([SETTING, "--seeds", "2"])
    assert "--resume" in capsys.readouterr().out
    assert log_of(home, 2) == ["begun", "resumed"]


def test_collected_files_name_no_place_and_no_time(home, capsys):
    study.main([SETTING, "--seeds", "1", "--omniglot", "/somewhere"])
    for _ in range(2):
        study.main([SETTING, "--seeds", "1", "2", "--collect"])
        collected = {path.name: path.read_bytes() for path in (home / "res" / f"{SETTING}-seed1").iterdir()}
        assert collected.keys() == {"log.jsonl.gz", "args.json", "result.json", "timing.json"}
        assert gzip.decompress(collected["log.jsonl.gz"]) == b"begun\n" and collected["log.jsonl.gz"][4:8] == bytes(4)
        assert json.loads(collected["args.json"])["settings"] == {
            "seed": 1, "root": "omniglot/", "cache": None, "out": None
        }  # fmt: skip
    assert f"{SETTING}-seed2: not finished, left out" in capsys.readouterr().out
    assert not (home / "res" / f"{SETTING}-seed2").exists()


def test_every_command_of_the_study_is_one_that_its_script_takes(tmp_path):
    scripts = {"omniglot_train.py": omniglot_train, "miniimagenet_train.py": miniimagenet_train}
    for job in study.jobs_of([], None, tmp_path):
        script, *flags = job.command("data")
        args = settings.parse_args("", scripts[script].DEFAULTS, flags, "")
        assert args.out == str(job.folder) and args.root == "data" and job.name.endswith(f"-seed{args.seed}")
    first_order = [job for job in study.jobs_of(["omniglot-5w1s-first-order-original"], [1], tmp_path)]
    args = settings.parse_args("", omniglot_train.DEFAULTS, first_order[0].command("data")[1:], "")
    assert (args.first_order, args.net, args.epoch, args.task_num) == (True, "original", 6000, 8)


def test_refusals(home, capsys):
    with pytest.raises(files.UserError, match="no setting 'omniglot' in the study; there are: omniglot-5w1s, "):
        study.main(["omniglot"])
    with pytest.raises(files.UserError, match="--jobs 0: must be at least 1"):
        study.main(["--jobs", "0"])
    study.main([SETTING, "--dry_run"])
    assert capsys.readouterr().out.count("python omniglot_train.py") == 3 and not (home / "runs").exists()
