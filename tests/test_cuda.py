"""On CUDA: the graph and the eager step train the same, and both as the CPU does. Skipped where there is no GPU."""

import json

import pytest
import torch

import omniglot_train
import synthetic
from device import GraphedStep
from learner import Learner
from meta import Meta
from tasks import Tasks, sample_tasks, with_rotations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
TINY = ("--synthetic --task_num 4 --k_qry 3 --update_step 2 --update_step_test 3 --eval_every 8 --eval_tasks 4 "
        "--test_tasks 4 --nc_every 5 --epoch 16").split()


def maml_on(device: str, first_order: bool = False) -> Meta:
    torch.manual_seed(0)
    args = omniglot_train.argparse.Namespace(net="paper", imgc=1, imgsz=28, n_way=5)
    net = Learner(omniglot_train.layers(args), 1, 28).to(device)
    return Meta(net, update_step=2, first_order=first_order)


@pytest.mark.parametrize("first_order", [False, True])
def test_graph_and_eager_take_the_same_steps(first_order):
    images = with_rotations(synthetic.characters(8, 6, 28, seed=0).cuda())
    seen = {}
    for name in ("eager", "graph"):
        maml = maml_on("cuda", first_order)
        generator = torch.Generator("cuda").manual_seed(1)

        def step():
            return maml(sample_tasks(images, 4, 5, 1, 3, generator))

        losses = [step().losses.mean().item()]  # Adam's state is there after one step
        again = GraphedStep(maml, step, generator) if name == "graph" else step
        losses += [again().losses.mean().item() for _ in range(8)]
        seen[name] = losses, maml.step
    assert seen["graph"][1] == seen["eager"][1] == 9
    assert seen["graph"][0] == pytest.approx(seen["eager"][0], rel=2e-2)  # atomics may reorder sums


def test_gradient_is_the_cpus():
    gradients = []
    images = synthetic.characters(8, 6, 28, seed=0)
    tasks = sample_tasks(images, 4, 5, 1, 3, torch.Generator().manual_seed(1))
    tasks = tasks._replace(x_spt=tasks.x_spt.double(), x_qry=tasks.x_qry.double())
    for device in ("cpu", "cuda"):
        maml = maml_on(device)
        maml.net.double()
        maml(Tasks(*(field.to(device) for field in tasks)))
        gradients.append(torch.cat([w.grad.flatten().cpu() for w in maml.net.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[0].norm()


@pytest.mark.parametrize("flags", [[], ["--no-cuda_graph"], ["--precision", "tf32"],
                                   ["--task_chunk", "2"]])
def test_script(flags, tmp_path):
    omniglot_train.main([*TINY, *flags, "--device", "cuda", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text())["test"]["tasks"] == 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 16
