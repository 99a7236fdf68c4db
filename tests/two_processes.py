"""Three meta-steps in float64; the process of rank 0 saves the weights. Started by test_distributed.py, or by torchrun.

With several processes it also checks what each function of device.py exchanges between them.
"""

import sys

import torch
from data_files import sampler

import device as devices
import omniglot_train
import synthetic
from meta import Meta


def main(path: str) -> None:
    torch.manual_seed(0)
    net = omniglot_train.network(omniglot_train.arguments([])).double()
    maml = Meta(net, nc_every=2)
    sample, steps = sampler(synthetic.generate(synthetic.CHARACTERS, 0, 8, 6, 28, seed=0)), []
    with devices.processes(torch.device("cpu")):
        check_exchanges()
        for _ in range(3):
            tasks = sample(4)
            step = maml(tasks._replace(x_spt=tasks.x_spt.double(), x_qry=tasks.x_qry.double()), every_step=True)
            steps.append({"losses": step.losses, "accuracy": step.accuracy, "metrics": step.metrics or {}})
        if devices.rank() == 0:
            torch.save({"weights": net.state_dict(), "steps": steps}, path)


def check_exchanges() -> None:
    """Tasks and lists come back whole and in order; sums are over all processes."""
    rank, size = devices.rank(), devices.size()
    values = torch.arange(24.0).view(4, 3, 2).transpose(1, 2)  # 4 tasks, not contiguous
    assert len(devices.local_tasks(values)) == 4 // size
    assert devices.gather(devices.local_tasks(values)).equal(values)
    one, two = devices.all_reduce([torch.ones(2, 3), torch.tensor(float(rank))])
    assert one.equal(torch.full((2, 3), float(size))) and two.item() == sum(range(size))
    items = [(torch.full((2,), i), {"a": [torch.tensor(i)]}) for i in range(3)]
    gathered = devices.gather_lists(items[rank::size])
    assert len(gathered) == len(items)
    for i, (first, second) in enumerate(gathered):
        assert first.equal(items[i][0]) and second["a"][0].item() == i
    devices.wait()


if __name__ == "__main__":
    main(sys.argv[1])
