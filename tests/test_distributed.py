"""Two processes on a CPU take the steps that one process takes. torchrun starts this file as a program (`main`)."""

import os
import subprocess
import sys
import time
from pathlib import Path

import kill
import pytest
import torch
from data_files import log_rows, read_json, refused, sampler

import device as devices
import omniglot_train
import synthetic
from meta import Meta

HERE = Path(__file__).parent
PROGRAM = str(HERE.parent / "omniglot_train.py")
TINY = ("--synthetic --device cpu --task_num 2 --k_qry 2 --n_way 2 --update_step 1 --update_step_test 1 "
        "--eval_tasks 5 --test_tasks 5 --nc_every 50").split()


def main(path: str) -> None:
    """Three meta-steps in float64; the process of rank 0 saves the weights."""
    torch.manual_seed(0)
    net = omniglot_train.network(omniglot_train.arguments([])).double()
    maml = Meta(net, nc_every=2)
    sample, steps = sampler(synthetic.generate(synthetic.CHARACTERS, 0, 8, 6, 28, seed=0)), []
    with devices.processes(torch.device("cpu")):
        for _ in range(3):
            tasks = sample(4)
            step = maml(tasks._replace(x_spt=tasks.x_spt.double(), x_qry=tasks.x_qry.double()), every_step=True)
            steps.append({"losses": step.losses, "accuracy": step.accuracy, "metrics": step.metrics or {}})
        if devices.rank() == 0:
            torch.save({"weights": net.state_dict(), "steps": steps}, path)


def start(*command: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


def torchrun(*command: str) -> str:
    """What the processes print; they must succeed."""
    process = start(*command)
    said, complaint = process.communicate()
    assert process.returncode == 0, complaint
    return said


@pytest.mark.slow
def test_weights_and_results_of_each_step(tmp_path):
    main(str(tmp_path / "one.pt"))
    torchrun(__file__, str(tmp_path / "two.pt"))
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for name, weight in one["weights"].items():
        assert name.endswith("conv2d_bias") or torch.allclose(weight, two["weights"][name], rtol=1e-7, atol=1e-10), name
    torch.testing.assert_close(one["steps"], two["steps"], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.slow
def test_stopped_together_and_resumed_together(tmp_path):
    """SIGTERM stops both at one step, and the run continues bit for bit. Only the first process writes and speaks."""
    run = tmp_path / "run"
    process = start(PROGRAM, *TINY, "--out", str(run))  # 40,000 steps: it can't end by itself
    while not (run / "log.jsonl").exists() or '"train", "step": 50,' not in (run / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    said = process.communicate()[0]
    assert said.count("resume with: python omniglot_train.py --resume") == 1
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step > 50
    torchrun(PROGRAM, "--resume", str(run), "--epoch", str(step + 3))  # ends it earlier
    said = torchrun(PROGRAM, *TINY, "--epoch", str(step + 3), "--out", str(tmp_path / "whole"))
    assert not kill.differences(kill.state(run), kill.state(tmp_path / "whole"))
    assert said.count("Total trainable parameters") == 1
    rows = log_rows(run)
    assert [(row["kind"], row["step"]) for row in rows if row["step"] in (0, step + 3)] == [
        ("run", 0), ("val", 0), ("nc", 0), ("train", 0), ("nc", 0), ("val", step + 3), ("nc", step + 3)]
    assert rows[1]["tasks"] == read_json(run)["test"]["tasks"] == 5


def test_tasks_must_divide(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as the launcher does
    with refused("--task_num 3: 2 processes need a multiple of 2"):
        omniglot_train.main(["--synthetic", "--device", "cpu", "--task_num", "3", "--out", str(tmp_path / "run")])


if __name__ == "__main__":
    main(sys.argv[1])
