"""What MAML is compared with: ANIL, BOIL, a prototypical network and an ordinary classifier, trained by the same loop.

ANIL and BOIL are MAML whose inner loop adapts some of the weights (`inner_rates`). The other two have no inner loop in
training. Their functions return the first three values that `meta.meta_gradient` returns. T tasks.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from learner import Learner
from measuring import accuracy, cross_entropy, scores
from tasks import Tasks


def protonet_gradient(net: Learner, tasks: Tasks, classes: Tensor | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    """A prototypical network (Snell, Swersky, Zemel 2017): logits are minus the squared distances to support means.

    Features are the input of the net's last linear layer, which gets no gradient. `classes` is not used.

    Returns:
        The gradient of the sum of the tasks' losses per parameter of `net`, losses [T], accuracies [T].
    """
    _, similarity, _ = scores(net, tasks, net.weights, transductive=True)
    return _gradient(net, similarity, tasks.y_qry)


def classifier_gradient(net: Learner, tasks: Tasks, classes: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """An ordinary classifier over all training classes, `net.classes`, on the images of all tasks as one batch.

    Batch norm is over the whole batch, so all tasks of a meta-step must be passed together.

    Args:
        classes: [T, n_way], the training class of each label of a task.
    Returns:
        As `protonet_gradient`; a task's loss and accuracy are the means over its images.
    Raises:
        ValueError: `net.classes` is not set, or `classes` is None.
    """
    if net.classes is None or classes is None:
        raise ValueError("set net.classes before Meta takes the net, a linear layer over all training classes, and "
                         "give each step the tasks' classes")
    images, labels = torch.cat([tasks.x_spt, tasks.x_qry], 1), torch.cat([tasks.y_spt, tasks.y_qry], 1)
    _, features = net(images.flatten(0, 1), features=True)
    logits = net.classes(features[-2]).unflatten(0, labels.shape)
    return _gradient(net, logits, classes.gather(1, labels))


def _gradient(net: Learner, logits: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    losses = cross_entropy(logits, labels)
    gradient = torch.autograd.grad(losses.sum(), list(net.parameters()), materialize_grads=True)
    return list(gradient), losses.detach(), accuracy(logits, labels)


BASELINES = {"protonet": protonet_gradient, "classifier": classifier_gradient}


def inner_rates(net: Learner, learner: str, lr: float, head_lr: float | None = None,
                blocks: Collection[int] | None = None) -> dict[str, float]:
    """Inner learning rate of each weight that the learner's inner loop adapts; `head_lr` is for the last layer.

    ANIL (Raghu et al. 2020) adapts the last layer alone, BOIL (Oh et al. 2021) all but the last. MAML adapts the blocks
    with these numbers (`Learner.block`), or all if None.

    Raises:
        ValueError: an unknown learner, a block that `net` doesn't have, or nothing to adapt.
    """
    if not set(blocks or ()) <= set(range(1, len(net.blocks) + 1)):
        raise ValueError(f"adapt_blocks {' '.join(map(str, blocks))}: the blocks are 1 to {len(net.blocks)} "
                         f"({len(net.blocks)}: the last layer)")
    head = dict.fromkeys(net.head, lr if head_lr is None else head_lr)
    body = {name: lr for name in net.adaptable if name not in head}
    chosen = {name: rate for name, rate in (body | head).items() if blocks is None or net.block(name) in blocks}
    rates = {"maml": chosen, "anil": head, "boil": body} | dict.fromkeys(BASELINES, body | head)
    if learner not in rates:
        raise ValueError(f"learner {learner!r}: must be one of {', '.join(rates)}")
    if not rates[learner]:
        raise ValueError(f"learner {learner}: there are no weights that its inner loop adapts; change the layers"
                         f"{'' if blocks is None else ' or adapt_blocks'}")
    return rates[learner]
