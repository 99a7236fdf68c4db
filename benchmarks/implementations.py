"""Second-order MAML in the ways in which people write it; benchmarks/speed.py times them."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import device as devices
from learner import Config, Learner
from meta import Meta
from tasks import Tasks

META_LR = 1e-3
THIS, EAGER, PRODUCT = "this project", "this project, no graph", "matrix product"


class Case(NamedTuple):
    """A setting of MAML."""

    title: str
    config: Config
    imgc: int
    imgsz: int
    lr: float  # of the inner loop
    n_way: int
    k_spt: int
    tasks: int
    steps: int = 5
    k_qry: int = 15


class Implementation:
    """One way to take a meta-step: step() takes the gradient of the mean query loss and then a step of Adam."""

    weights: Sequence[nn.Parameter]  # in the order of the layers

    def gradient(self) -> list[Tensor]:
        """What the last step computed, in torch's layouts."""
        return [w.grad for w in self.weights]


class ThisProject(Implementation):
    def __init__(self, case: Case, net: Learner, tasks: Tasks, graphed: bool = False):
        meta = Meta(copy.deepcopy(net), update_lr=case.lr, meta_lr=META_LR, update_step=case.steps)
        self.weights = list(meta.net.weights.values())
        self.step = partial(meta, tasks)
        if graphed:  # captured at the first step (the warm-up) and replayed; the generator draws nothing
            self.step = devices.GraphedStep(meta, self.step, torch.Generator(tasks.y_spt.device))


class _WithAdam(Implementation):
    """A subclass has query_loss(x_spt, y_spt, x_qry, y_qry): that of one task's adapted weights, differentiable."""

    def __init__(self, case: Case, net: Learner, tasks: Tasks):
        self.case, self.tasks = case, tasks
        self.net = Network(case.config, net.weights.values())
        self.weights = list(self.net.parameters())
        self.optimizer = torch.optim.Adam(self.weights, lr=META_LR)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        """One backward pass per task: faster than one over the sum of the losses, and it takes less memory."""
        for task in zip(*self.tasks):
            (self.query_loss(*task) / len(self.tasks.y_qry)).backward()


class PlainLoop(_WithAdam):
    def query_loss(self, x_spt, y_spt, x_qry, y_qry):
        fast = self.weights
        for _ in range(self.case.steps):
            fast = [w - self.case.lr * g for w, g in zip(fast, self.inner_gradient(fast, x_spt, y_spt))]
        return self.loss(fast, x_qry, y_qry)

    def inner_gradient(self, weights: list[Tensor], x: Tensor, y: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(self.loss(weights, x, y), weights, create_graph=True)

    def loss(self, weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits(self.net.config, weights, x), y)


class Vmap(PlainLoop):
    """The same loop under vmap, with torch.func.grad."""

    def backward(self) -> None:
        torch.func.vmap(self.query_loss)(*self.tasks).mean().backward()

    def inner_gradient(self, weights, x, y):
        return torch.func.grad(self.loss)(weights, x, y)

    def loss(self, weights, x, y):
        return F.cross_entropy(logits(self.net.config, weights, x, elementary_batch_norm), y)


class Higher(_WithAdam):
    def __init__(self, case: Case, net: Learner, tasks: Tasks):
        super().__init__(case, net, tasks)
        self.sgd = torch.optim.SGD(self.weights, lr=case.lr)

    def query_loss(self, x_spt, y_spt, x_qry, y_qry):
        import higher

        with higher.innerloop_ctx(self.net, self.sgd, copy_initial_weights=False) as (net, inner):
            for _ in range(self.case.steps):
                inner.step(F.cross_entropy(net(x_spt), y_spt))
            return F.cross_entropy(net(x_qry), y_qry)


class TorchOpt(_WithAdam):
    def __init__(self, case: Case, net: Learner, tasks: Tasks):
        import torchopt

        super().__init__(case, net, tasks)
        self.inner, self.recover = torchopt.MetaSGD(self.net, lr=case.lr), torchopt.recover_state_dict
        self.states = [(part, torchopt.extract_state_dict(part, by="reference")) for part in (self.net, self.inner)]

    def query_loss(self, x_spt, y_spt, x_qry, y_qry):
        for _ in range(self.case.steps):
            self.inner.step(F.cross_entropy(self.net(x_spt), y_spt))
        loss = F.cross_entropy(self.net(x_qry), y_qry)
        for part, state in self.states:  # back to theta for the next task
            self.recover(part, state)
        return loss


class Jax(Implementation):
    """jit of vmap over tasks. Images are [N, h, w, c] and kernels [k, k, c, o], so that im2col is a concatenation."""

    def __init__(self, case: Case, net: Learner, tasks: Tasks):
        import jax

        jax.config.update("jax_enable_x64", tasks.x_spt.dtype == torch.float64)
        self.jax, self.case, self.config = jax, case, case.config
        self.weights = list(net.weights.values())
        self.theta = [jax.numpy.asarray((w.permute(2, 3, 1, 0) if w.dim() == 4 else w).detach().cpu().numpy())
                      for w in self.weights]
        self.moments = [[jax.numpy.zeros_like(w) for w in self.theta] for _ in range(2)]
        x_spt, y_spt, x_qry, y_qry = (jax.numpy.asarray(values.cpu().numpy()) for values in tasks)
        self.tasks = x_spt.transpose(0, 1, 3, 4, 2), y_spt, x_qry.transpose(0, 1, 3, 4, 2), y_qry
        self.compiled, self.count = jax.jit(self.update), 0

    def step(self) -> None:
        self.count += 1
        self.theta, self.moments, self.last_gradient = self.jax.block_until_ready(
            self.compiled(self.theta, self.moments, self.count, *self.tasks))

    def gradient(self) -> list[Tensor]:
        arrays = [torch.tensor(self.jax.device_get(g)) for g in self.last_gradient]
        return [(g.permute(3, 2, 0, 1) if g.dim() == 4 else g).to(w) for g, w in zip(arrays, self.weights)]

    def update(self, theta, moments, count, *tasks):
        """One meta-step -> theta, Adam's moments, the gradient."""
        def mean_loss(theta):
            return self.jax.vmap(self.query_loss, (None, 0, 0, 0, 0))(theta, *tasks).mean()

        gradient = self.jax.grad(mean_loss)(theta)
        first = [0.9 * m + 0.1 * g for m, g in zip(moments[0], gradient)]
        second = [0.999 * m + 0.001 * g * g for m, g in zip(moments[1], gradient)]
        theta = [w - META_LR * m / (1 - 0.9**count) / ((v / (1 - 0.999**count))**0.5 + 1e-8)
                 for w, m, v in zip(theta, first, second)]
        return theta, [first, second], gradient

    def query_loss(self, weights, x_spt, y_spt, x_qry, y_qry):
        def loss(weights, x, y):
            log_p = self.jax.nn.log_softmax(self.logits(weights, x))
            return -self.jax.numpy.take_along_axis(log_p, y[:, None], 1).mean()

        for _ in range(self.case.steps):
            gradients = self.jax.grad(loss)(weights, x_spt, y_spt)
            weights = [w - self.case.lr * g for w, g in zip(weights, gradients)]
        return loss(weights, x_qry, y_qry)

    def logits(self, weights, x):
        jnp, weights = self.jax.numpy, iter(weights)

        def windows(x, kernel, stride):
            rows, cols = ((size - kernel) // stride + 1 for size in x.shape[1:3])
            return [x[:, i:i + stride * rows:stride, j:j + stride * cols:stride][:, :rows, :cols]
                    for i in range(kernel) for j in range(kernel)]

        for name, params in self.config:
            match name:
                case "conv2d":
                    kernel, bias = next(weights), next(weights)
                    pad = params[5], params[5]
                    x = jnp.concatenate(windows(jnp.pad(x, ((0, 0), pad, pad, (0, 0))), *params[3:5]), -1)
                    x = (x.reshape(-1, x.shape[-1]) @ kernel.reshape(x.shape[-1], -1) + bias).reshape(*x.shape[:3], -1)
                case "bn":
                    centred = x - x.mean((0, 1, 2))
                    r = self.jax.lax.rsqrt((centred * centred).mean((0, 1, 2)) + 1e-5)
                    x = centred * (r * next(weights)) + next(weights)
                case "relu":
                    x = self.jax.nn.relu(x)
                case "max_pool2d":
                    x, *others = windows(x, *params[:2])
                    for other in others:
                        x = jnp.maximum(x, other)
                case "flatten":
                    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch's order: the linear layer is torch's
                case "linear":
                    x = x @ next(weights).T + next(weights)
        return x


class MatrixProduct(Implementation):
    """One torch.mm with the FLOPs of the plain loop's meta-step: about as fast as this arithmetic could be."""

    def __init__(self, case: Case, net: Learner, tasks: Tasks):
        with FlopCounterMode(display=False) as counter:
            PlainLoop(case, net, Tasks(*(values[:1] for values in tasks))).backward()
        self.flops = case.tasks * counter.get_total_flops()
        rows = max(1, self.flops // (2 * 2048**2))
        self.factors = [tasks.x_spt.new_ones(n, 2048) for n in (rows, 2048)]

    def step(self) -> None:
        torch.mm(*self.factors)


PACKAGES = {"higher": "higher", "torchopt": "torchopt", "JAX": "jax"}
OTHERS = {"plain loop": PlainLoop, "higher": Higher, "torchopt": TorchOpt, "vmap": Vmap, "JAX": Jax}


def implementations_on(device: torch.device) -> dict[str, Callable[..., Implementation]]:
    """This project's, and those of `OTHERS` whose package is installed."""
    graphed = partial(ThisProject, graphed=True)
    own = {THIS: graphed, EAGER: ThisProject} if device.type == "cuda" else {THIS: ThisProject}
    return own | {name: make for name, make in OTHERS.items() if name not in PACKAGES or find_spec(PACKAGES[name])}


class Network(nn.Module):
    """The network as a module that owns a copy of the weights, in the memory layout of torch's own layers."""

    def __init__(self, config: Config, weights: Iterable[Tensor]):
        super().__init__()
        self.config = config
        for i, weight in enumerate(weights):
            copied = weight.detach().clone(memory_format=torch.contiguous_format)
            self.register_parameter(f"w{i}", nn.Parameter(copied))
        self.names = list(self._parameters)

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.config, [getattr(self, name) for name in self.names], x)


def logits(config: Config, weights: Sequence[Tensor], x: Tensor, batch_norm: Callable = F.batch_norm) -> Tensor:
    """The network as a function of its weights: images [N, c, h, w] of one task -> [N, n_way]."""
    weights = iter(weights)
    for name, params in config:
        match name:
            case "conv2d":
                x = F.conv2d(x, next(weights), next(weights), params[4], params[5])
            case "bn":
                x = batch_norm(x, None, None, next(weights), next(weights), training=True)
            case "relu":
                x = F.relu(x, inplace=True)
            case "max_pool2d":
                x = F.max_pool2d(x, *params)
            case "flatten":
                x = x.flatten(1)
            case "linear":
                x = F.linear(x, next(weights), next(weights))
    return x


def elementary_batch_norm(x: Tensor, _mean: None, _var: None, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    """As F.batch_norm, over which vmap gives a wrong second derivative (pytorch/functorch#534)."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    r = (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
    return centred * (r * weight[:, None, None]) + bias[:, None, None]
