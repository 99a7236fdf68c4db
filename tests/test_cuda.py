"""On a GPU: replayed and eager steps train the same, and as on a CPU, where test_device.py runs a fake graph."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_files import log_rows, read_json, sampler

import miniimagenet_train
import omniglot_train
import synthetic
from device import GraphedStep
from meta import Meta
from tasks import Sampler, Tasks, with_rotations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
HERE = Path(__file__).parent
MINI = ["--epoch", "64"]  # tasks: 16 steps
TINY = ("--synthetic --task_num 4 --k_qry 3 --update_step 2 --update_step_test 3 --eval_every 8 --eval_tasks 4 "
        "--test_tasks 4 --nc_every 5 --epoch 16").split()


def steps_of(device: str, **options) -> tuple[Meta, Sampler, Callable]:
    """MAML, its sampler, and a meta-step of two tasks."""
    images = with_rotations(synthetic.generate(synthetic.CHARACTERS, 0, 8, 6, 28, seed=0))
    torch.manual_seed(0)
    net = omniglot_train.network(omniglot_train.arguments([])).to(device)
    maml, sample = Meta(net, update_step=2, **options), sampler(images.to(device))
    return maml, sample, lambda every_step=False: maml(sample(2), every_step)


def take_steps(device: str, graphed: bool, first_order: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Nine meta-steps, of which steps 0, 4 and 8 measure: the losses, and all that the steps changed."""
    maml, sample, step = steps_of(device, first_order=first_order, nc_every=4)
    take = GraphedStep(maml, step, sample.generator) if graphed else step
    losses = [take().losses.mean().item() for _ in range(9)]
    assert maml.step == 9
    return losses, [*maml.state(), sample.generator.get_state()]


@pytest.mark.parametrize("first_order", [False, True])
def test_graph_and_eager_take_the_same_steps(first_order):
    eager, _ = take_steps("cuda", False, first_order)
    graph, _ = take_steps("cuda", True, first_order)
    assert graph == pytest.approx(eager, rel=2e-2)  # atomics may reorder sums
    assert len(set(graph)) == 9  # each replay draws tasks of its own


@pytest.mark.parametrize("task_chunk", [0, 1])
@pytest.mark.parametrize("recipe", ["original", "paper"])
@pytest.mark.parametrize("script, kind", [(omniglot_train, synthetic.CHARACTERS),
                                          (miniimagenet_train, synthetic.PHOTOS)])
def test_gradient_is_the_cpus(script, kind, recipe, task_chunk):
    args, gradients = script.arguments(["--recipe", recipe]), []
    tasks = sampler(synthetic.generate(kind, 0, 8, 6, args.imgsz, seed=0))(2)
    tasks = tasks._replace(x_spt=tasks.x_spt.double(), x_qry=tasks.x_qry.double())
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        maml = Meta(script.network(args).to(device, torch.float64), update_step=2, task_chunk=task_chunk)
        maml(Tasks(*(field.to(device) for field in tasks)))
        gradients.append(torch.cat([w.grad.flatten().cpu() for w in maml.net.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[0].norm()


def train(out: Path, *flags: str, launcher: tuple[str, ...] = (), steps: int = 16,
          script: str = "omniglot_train") -> str:
    """A run, or its rest, in a process of its own, because cuBLAS reads its settings once; the log."""
    own = ["--resume", str(out)] if out.exists() else [*TINY, "--out", str(out)]
    command = [sys.executable, *launcher, str(HERE.parent / f"{script}.py"), *own, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_json(out)["test"]["tasks"] == 4
    assert max(row["step"] for row in log_rows(out)) == steps
    return (out / "log.jsonl").read_text()


@pytest.mark.parametrize("flags", [[], ["--no-cuda_graph"], ["--precision", "tf32"], ["--task_chunk", "2"],
                                   ["--clip", "10"], ["--freeze_head"], ["--lr_schedule", "cosine"], ["--keep_norms"],
                                   ["--learner", "anil"], ["--learner", "boil"], ["--k_spt", "5"],
                                   ["--learner", "protonet"], ["--learner", "classifier"],
                                   ["--recipe", "paper"], pytest.param(["--device", "cuda:1"], marks=two_gpus)])
def test_script(flags, tmp_path):
    train(tmp_path / "run", "--device", "cuda", "--cuda_graph", *flags)


@pytest.mark.parametrize("script, flags", [
    ("omniglot_train", []), ("omniglot_train", ["--first_order", "--net", "original", "--clip", "10"]),
    ("miniimagenet_train", MINI), ("miniimagenet_train", [*MINI, "--task_chunk", "1"])])
def test_graph_changes_no_byte_of_the_log(script, flags, tmp_path):
    logs = {train(tmp_path / f"run{graph}", "--device", "cuda", "--deterministic", *flags, graph, script=script)
            for graph in ("--cuda_graph", "--no-cuda_graph")}
    assert len(logs) == 1


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    flags = "--device", "cuda", "--deterministic", "--cuda_graph"
    train(tmp_path / "run", *flags, "--epoch", "8", steps=8)
    assert train(tmp_path / "run", "--epoch", "16") == train(tmp_path / "whole", *flags)


@two_gpus
def test_two_gpus_together(tmp_path):
    train(tmp_path / "run", "--device", "cuda", "--cuda_graph",
          launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))


def test_after_a_failed_capture_steps_are_eager():
    """The last test: before torch 2.14 no other capture succeeds in this process after it."""
    maml, sample, step = steps_of("cuda")

    def breaking(every_step: bool = False):
        result = step(every_step)
        if torch.cuda.is_current_stream_capturing():
            result.losses.sum().item()  # invalidates the capture
        return result

    take = GraphedStep(maml, breaking, sample.generator, required=False)
    losses = [take().losses.mean().item() for _ in range(3)]
    assert take.eager and maml.step == 3 and len(set(losses)) == 3
