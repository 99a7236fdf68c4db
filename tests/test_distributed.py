"""Two processes on a CPU take the steps that one process takes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import kill
import pytest
import torch
import two_processes

import omniglot_train
from files import UserError

HERE = Path(__file__).parent


def start(*command: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


def torchrun(*command: str) -> subprocess.CompletedProcess:
    process = start(*command)
    said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


@pytest.mark.slow
def test_weights_and_what_was_seen(tmp_path):
    two_processes.main(str(tmp_path / "one.pt"))
    done = torchrun(str(HERE / "two_processes.py"), str(tmp_path / "two.pt"))
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for name, weight in one["weights"].items():
        assert name.endswith("conv2d_bias") or torch.allclose(weight, two["weights"][name], rtol=1e-7, atol=1e-10), name
    torch.testing.assert_close(one["seen"], two["seen"], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.slow
def test_only_the_first_process_writes_and_speaks(tmp_path):
    done = torchrun(str(HERE.parent / "omniglot_train.py"), *"--synthetic --device cpu --epoch 3 --task_num 2 --k_qry "
                    "3 --update_step 1 --update_step_test 1 --eval_tasks 55 --test_tasks 55 --nc_every 2".split(),
                    "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Total trainable parameters") == 1
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("run", 0), ("val", 0), ("nc", 0), ("train", 0), ("nc", 0), ("nc", 2), ("val", 3), ("nc", 3)]
    assert rows[1]["tasks"] == 55
    assert json.loads((tmp_path / "run/result.json").read_text())["test"]["tasks"] == 55


@pytest.mark.slow
def test_stopped_together_and_resumed_together(tmp_path):
    """The launcher passes SIGTERM on; both processes stop at one step, and the run goes on bit for bit."""
    program, run = str(HERE.parent / "omniglot_train.py"), tmp_path / "run"
    flags = ("--synthetic --device cpu --task_num 2 --k_qry 2 --n_way 2 --update_step 1 --update_step_test 1 "
             "--eval_tasks 2 --test_tasks 2 --nc_every 0").split()
    process = start(program, *flags, "--out", str(run))  # 40,000 steps: it can't end by itself
    while not (run / "log.jsonl").exists() or '"train", "step": 50,' not in (run / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    said = process.communicate()[0]
    assert said.count("go on with: python omniglot_train.py --resume") == 1
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step > 50
    recorded = json.loads((run / "args.json").read_text())
    recorded["settings"]["epoch"] = step + 3  # an end in sight; --epoch may only grow
    (run / "args.json").write_text(json.dumps(recorded))
    assert torchrun(program, "--resume", str(run)).returncode == 0
    assert torchrun(program, *flags, "--epoch", str(step + 3), "--out", str(tmp_path / "whole")).returncode == 0
    assert not kill.differences(kill.state(run), kill.state(tmp_path / "whole"))


def test_tasks_must_divide(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as the launcher does
    with pytest.raises(UserError, match="--task_num 3: 2 processes need a multiple of 2"):
        omniglot_train.main(["--synthetic", "--device", "cpu", "--task_num", "3", "--out", str(tmp_path / "run")])
