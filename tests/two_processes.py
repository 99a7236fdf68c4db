"""Three meta-steps in float64; the first process saves the weights. Started by test_distributed.py, or by torchrun."""

import sys
from argparse import Namespace

import torch

import device as devices
import omniglot_train
import synthetic
from learner import Learner
from meta import Meta
from tasks import sample_tasks


def main(path: str) -> None:
    torch.manual_seed(0)
    net = Learner(omniglot_train.layers(Namespace(net="paper", imgc=1, imgsz=28, n_way=5)), 1, 28).double()
    maml = Meta(net, nc_every=2)
    devices.start(torch.device("cpu"))
    images = synthetic.characters(8, 6, 28, seed=0)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(3):
        tasks = sample_tasks(images, 4, 5, 1, 3, generator)
        step = maml(tasks._replace(x_spt=tasks.x_spt.double(), x_qry=tasks.x_qry.double()), every_step=True)
        seen.append({"losses": step.losses, "accuracy": step.accuracy, "metrics": step.metrics})
    if devices.rank() == 0:
        torch.save({"weights": net.state_dict(), "seen": seen}, path)
    devices.stop()


if __name__ == "__main__":
    main(sys.argv[1])
