"""The network: a list of layers, with explicit weights.

MAML's inner loop runs the same layers with theta and with the fast weights of every inner step of every task.
`Learner` owns theta and runs with it, or with weights that it is given: one set for all images, or one set per task.

    net = Learner([("conv2d", [64, 1, 3, 3, 2, 0]), ("bn", [64]), ("relu", [True]),
                   ("flatten", []), ("linear", [5, 64 * 13 * 13])], imgc=1, imgsz=28)
    logits = net(images)                            # [N, 5], with theta
    logits = net(images_of_tasks, fast_weights)     # [T, N, 5], task t with its own weights

Inside, images are channels last, [T, N, h, w, c]: there a convolution is a matrix product.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskwise
from taskwise import Patches

Config = Sequence[tuple[str, Sequence]]
Weights = Mapping[str, Tensor]

# name: what its params mean
LAYERS = {
    "conv2d": ["out", "in", "kernel", "kernel", "stride", "padding"],  # zeros on each side, or "same" (TensorFlow's)
    "convt2d": ["in", "out", "kernel", "kernel", "stride", "padding"],
    "linear": ["out", "in"],
    "bn": ["channels"],
    "bn_shift": ["channels"],  # batch norm without a scale, whose shift the inner loop doesn't adapt
    "relu": ["inplace"],
    "leakyrelu": ["slope", "inplace"],
    "tanh": [],
    "sigmoid": [],
    "upsample": ["scale"],
    "max_pool2d": ["kernel", "stride", "padding"],
    "avg_pool2d": ["kernel", "stride", "padding"],
    "flatten": [],
    "mean": [],  # over height and width
    "reshape": ["shape without the batch"],
}
LEAST = {"in": 1, "out": 1, "channels": 1, "kernel": 1, "stride": 1, "padding": 0}  # of params, all whole numbers
SHIFT_EPS = 1e-3  # of bn_shift, added to the variance
BLOCK_STARTS = ("conv2d", "convt2d", "linear")
CONV_INIT = {"kaiming": nn.init.kaiming_normal_, "xavier": nn.init.xavier_uniform_}  # --conv_init


class Learner(nn.Module):
    """A network whose weights can be passed in.

    Conv and linear weights start Kaiming-normal (He et al. 2015: variance 2 / fan in; convt2d's fan is torch's, its out
    * kernel^2), biases 0, batch norm's scale 1 and shift 0. Batch norm always uses the statistics of the batch it is
    given, task by task (transductive, as in MAML); it keeps no running average. A weight is named after the number and
    name of its layer: 0_conv2d_weight.

    Args:
        config: the layers in order, as (name, params); LAYERS says what the params of each mean.
        imgc: channels of an image.
        imgsz: height and width of an image, in pixels.
        initial: layer name -> function that fills a weight tensor in place and returns it, as those of torch.nn.init.
        head_std: if given, the last linear layer's weights start from N(0, head_std^2) instead.
    Raises:
        ValueError: a layer is not a pair (name, params), is unknown, has too few or many params or one out of range, or
            doesn't fit its input (an image too small for the kernel, other channels); the text names the layer. Or
            head_std is given without a linear layer at the end.
    """

    def __init__(self, config: Config, imgc: int, imgsz: int, initial: Mapping[str, Callable] | None = None,
                 head_std: float | None = None):
        super().__init__()
        if not config:
            raise ValueError("there are no layers")
        self.config = [_name_and_params(i, layer) for i, layer in enumerate(config)]
        self.order = _pools_before_relus(self.config)
        self.input_shape = (imgc, imgsz, imgsz)
        self.shapes: list[list[int]] = []  # [c, h, w] or [features] after each layer
        self.keys: list[list[str]] = []  # names of each layer's weights
        self.weights = nn.ParameterDict()
        self.classes: nn.Linear | None = None  # features -> all training classes, for `baselines.classifier_gradient`
        shape = list(self.input_shape)
        for i, (name, params) in enumerate(self.config):
            try:
                _check(name, params, shape)
                own = _initial_weights(name, params, (initial or {}).get(name, nn.init.kaiming_normal_))
                shape = _output_shape(name, params, shape, own.values())
            except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
                reason, *_ = str(error).split("\n")
                raise ValueError(f"layer {i}, {name}{tuple(params)}, after {tuple(shape)}: {reason}") from error
            for kind, weight in own.items():
                self.weights[f"{i}_{name}_{kind}"] = nn.Parameter(weight)
            self.keys.append([f"{i}_{name}_{kind}" for kind in own])
            self.shapes.append(shape)
        if head_std is not None:
            if self.config[-1][0] != "linear":
                raise ValueError("head_std: the last layer is not linear")
            nn.init.normal_(self.weights[self.classifier], std=head_std)

    @property
    def blocks(self) -> list[str]:
        """Names of what `forward(..., features=True)` returns: block1, block2, ..., logits."""
        ends = sum(name in BLOCK_STARTS for name, _ in self.config[1:])
        return [f"block{i}" for i in range(1, ends + 1)] + ["logits"]

    def block(self, weight: str) -> int:
        """Number of the block that this weight belongs to: 1, 2, ..., in the order of `blocks`."""
        index = int(weight.partition("_")[0])
        return 1 + sum(name in BLOCK_STARTS for name, _ in self.config[1:index + 1])

    @property
    def head(self) -> list[str]:
        """Names of the last layer's weights."""
        return self.keys[-1]

    @property
    def classifier(self) -> str:
        """Name of the last linear layer's weight, [n_way, features]."""
        return self.head[0]

    @property
    def adaptable(self) -> list[str]:
        """Names of the weights that an inner loop may adapt."""
        return [name for name in self.weights if "_bn_shift_" not in name]

    def patches(self, x: Tensor, groups: int = 1) -> Tensor | Patches:
        """The part of `forward` that needs no weights, of images of tasks [T, N, c, h, w]: pass the result as x.

        It is `Patches` if x needs no gradient, and the network starts with batch norm after a convolution that has at
        least as many kernels as a patch has values; otherwise x itself.
        """
        match self.config:
            case [("conv2d", [out, channels, kernel, _, stride, padding]), ("bn" | "bn_shift", _), *_]:
                if channels * kernel**2 <= out and not x.requires_grad:
                    padding = before_and_after(x.shape[-1], kernel, stride, padding)
                    return taskwise.patches(x, kernel, stride, padding, groups)
        return x

    def forward(self, x: Tensor | Patches, weights: Weights | None = None, features: bool = False, groups: int = 1):
        """Logits of a batch of images, or of a batch of tasks.

        Args:
            x: [N, c, h, w], or [T, N, c, h, w] for T tasks, or their `patches`, made with the same groups.
            weights: as `self.weights`, or each with a leading task axis [T, ...] (needs x of T tasks); theta if None.
            features: also return the features of every block, i.e. what enters the next convolution or linear layer,
                and last the logits: a list of [N, D] or [T, N, D], in the order of `blocks`. D is in memory order
                (channels last), not the order of torch's flatten.
            groups: batch norm's statistics are of N / groups consecutive images instead of all N of a task.
        Returns:
            Logits [N, n_way] or [T, N, n_way]; with features, (logits, list).
        """
        one_set = isinstance(x, Tensor) and x.dim() == 4
        layers = [h.flatten(2) for h in self.outputs(x[None] if one_set else x, weights, groups)]
        if one_set:
            layers = [values[0] for values in layers]
        return (layers[-1], layers) if features else layers[-1]

    def outputs(self, x: Tensor | Patches, weights: Weights | None = None, groups: int = 1) -> list[Tensor]:
        """What `forward` returns as features of tasks, before it is flattened: [T, N, h, w, c] or [T, N, features]."""
        weights = self.per_task(self.weights if weights is None else weights, len(x))
        if any(len(weight) != len(x) for weight in weights.values()):
            raise ValueError(f"x is of {len(x)} tasks, and the weights are of another number")
        own = [[weights[key] for key in keys] for keys in self.keys]
        x = self.patches(x, groups) if isinstance(x, Tensor) else x
        if isinstance(x, Patches):
            h = taskwise.conv_bn(x, *own[0], *_scale_shift_eps(self.config[1][0], own[1]))
            order = self.order[2:]
        else:  # a copy: torch can't tell the layout of a one-channel view, and the layers need channels last
            h = x.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format)  # [T, N, h, w, c]
            order = self.order
        outputs = []
        for i, name, params in order:
            if name in BLOCK_STARTS and i > 0:
                outputs.append(h)
            h = apply_layer(name, params, h, own[i], groups)
        return [*outputs, h]

    def per_task(self, weights: Weights, tasks: int) -> dict[str, Tensor]:
        """The weights with a leading task axis [T, ...]: one set is shared by all tasks, without a copy."""
        return {name: w if w.dim() > self.weights[name].dim() else w.expand(tasks, *w.shape)
                for name, w in weights.items()}

    def __repr__(self) -> str:
        """The layers, and the shape of one image after each."""
        lines = [f"  {name}{params} -> {shape}" for (name, params), shape in zip(self.config, self.shapes)]
        return "\n".join(["Learner(", f"  {list(self.input_shape)}", *lines, ")"])


def leaves(weights: Weights) -> dict[str, Tensor]:
    """The same values, as leaves of a new graph."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def output_shape(config: Config, imgc: int, imgsz: int) -> list[int]:
    """Shape [c, h, w] or [features] of one image after the layers, computed without allocating memory.

    Raises:
        ValueError: as `Learner`.
    """
    with torch.device("meta"):
        return Learner(config, imgc, imgsz).shapes[-1]


def _name_and_params(i: int, layer: Sequence) -> tuple[str, list]:
    try:
        name, params = () if isinstance(layer, str) else layer
    except (TypeError, ValueError):
        raise ValueError(f"layer {i}, {layer!r}: must be a pair (name, params), such as ('relu', [True])") from None
    return name, list(params) if isinstance(params, Iterable) else [params]


def _pools_before_relus(config: Config) -> list[tuple[int, str, Sequence]]:
    """The layers with their numbers, in the order of `forward`: a relu after the max pooling that follows it.

    It has fewer values there. The output is the same, and so is the gradient: in either order it goes to the first
    largest value of a window if that is positive, else nowhere.
    """
    order = [(i, *layer) for i, layer in enumerate(config)]
    for i in range(1, len(order)):
        if (order[i - 1][1], order[i][1]) == ("relu", "max_pool2d"):
            order[i - 1:i + 1] = order[i], order[i - 1]
    return order


def _check(name: str, params: Sequence, shape: list[int]) -> None:
    """Raise a ValueError for mistakes that torch accepts, or reports unhelpfully."""
    if name not in LAYERS:
        raise ValueError(f"unknown layer {name!r}; there are {', '.join(LAYERS)}")
    if name != "reshape" and len(params) != len(LAYERS[name]):
        raise ValueError(f"params must be [{', '.join(LAYERS[name])}]")
    for what, value in zip(LAYERS[name], params):
        least, choice = LEAST.get(what), ', or "same"' if (name, what) == ("conv2d", "padding") else ""
        if least is not None and not (isinstance(value, int) and value >= least) and not (choice and value == "same"):
            raise ValueError(f"{what} must be an integer >= {least}{choice}, not {value!r}")
    if name == "reshape" and len(params) not in (1, 3):
        raise ValueError("takes [features] or [c, h, w]")
    if name in ("conv2d", "convt2d", "max_pool2d", "avg_pool2d", "upsample", "mean") and len(shape) != 3:
        raise ValueError("takes an image [c, h, w]")
    if name in ("conv2d", "convt2d") and params[2] != params[3]:
        raise ValueError("kernels are square here")
    if name == "conv2d" and params[5] == "same" and shape[1] != shape[2]:
        raise ValueError('padding "same" takes square images')
    if name == "linear" and shape != [params[1]]:
        raise ValueError(f"takes [{params[1]}], not {shape}")
    takes = dict(zip(LAYERS[name], params))
    channels = takes.get("in", takes.get("channels", shape[0]))
    if channels != shape[0]:
        raise ValueError(f"takes {channels} channels, not {shape[0]}")


def _output_shape(name: str, params: Sequence, shape: list[int], own: Iterable[Tensor]) -> list[int]:
    """The output shape for one image, found by running the layer on the meta device."""
    h = torch.empty(1, 2, *shape[1:], shape[0], device="meta")
    *sides, channels = apply_layer(name, params, h, [w[None].to("meta") for w in own]).shape[2:]
    if 0 in sides:  # older versions of torch don't refuse it on the meta device
        raise ValueError("Kernel size can't be greater than the image")
    return [channels, *sides]


def _initial_weights(name: str, params: Sequence, fill: Callable) -> dict[str, Tensor]:
    """A layer's weights at the start, in the order in which `apply_layer` takes them."""
    if name in ("conv2d", "convt2d"):
        # stored as [out, kernel, kernel, in], so that taskwise sees each task's kernel as a matrix without a copy
        weight = fill(torch.empty(params[:4])).contiguous(memory_format=torch.channels_last)
        return {"weight": weight, "bias": torch.zeros(params[0] if name == "conv2d" else params[1])}
    if name == "linear":
        return {"weight": fill(torch.empty(params)), "bias": torch.zeros(params[0])}
    if name == "bn":
        return {"weight": torch.ones(params[0]), "bias": torch.zeros(params[0])}
    return {"bias": torch.zeros(params[0])} if name == "bn_shift" else {}


def apply_layer(name: str, params: Sequence, h: Tensor, own: list[Tensor], groups: int = 1) -> Tensor:
    """One layer on all tasks: h is [T, N, h, w, c] or [T, N, features], `own` its weights, each [T, ...].

    A layer with statistics of a batch takes them of `groups` parts of the N images, as in `Learner.forward`.
    """
    match name:
        case "conv2d":
            return taskwise.conv2d(h, *own, params[4], before_and_after(h.shape[2], *params[3:]))
        case "convt2d":  # tasks as groups of one native call
            weight, bias = own  # [T, in, out, k, k], [T, out]
            x = h.permute(1, 0, 4, 2, 3).flatten(1, 2)  # [N, T*in, h, w]
            y = F.conv_transpose2d(x, weight.flatten(0, 1), bias.flatten(), *params[4:], groups=len(h))
            return y.unflatten(1, (len(h), -1)).permute(1, 0, 3, 4, 2)
        case "linear":
            weight, bias = own
            return torch.baddbmm(bias[:, None], h, weight.transpose(1, 2))
        case "bn" | "bn_shift":
            own = [weight.repeat_interleave(groups, 0) for weight in own] if groups > 1 else own
            grouped = h.reshape(len(h) * groups, -1, *h.shape[2:])
            return taskwise.batch_norm(grouped, *_scale_shift_eps(name, own)).view(h.shape)
        case "relu":
            return F.relu(h)  # in place, autograd would refuse views
        case "leakyrelu":
            return F.leaky_relu(h, params[0])
        case "tanh" | "sigmoid":
            return getattr(torch, name)(h)
        case "upsample":
            return _per_image(h, lambda x: F.interpolate(x, scale_factor=params[0]))
        case "max_pool2d":
            return taskwise.max_pool2d(h, *params)
        case "avg_pool2d":
            return _per_image(h, lambda x: F.avg_pool2d(x, *params))
        case "mean":
            return h.mean((2, 3))
        case "flatten" | "reshape":  # in torch's order, c h w
            h = h.permute(0, 1, 4, 2, 3) if h.dim() == 5 else h
            h = h.flatten(2) if name == "flatten" else h.reshape(*h.shape[:2], *params)
            return h.permute(0, 1, 3, 4, 2) if h.dim() == 5 else h
        case _:
            raise ValueError("it is in LAYERS, and apply_layer has no case for it")


def _scale_shift_eps(name: str, own: list[Tensor]) -> tuple[Tensor | None, Tensor, float]:
    return (*own, taskwise.EPS) if name == "bn" else (None, *own, SHIFT_EPS)


def before_and_after(size: int, kernel: int, stride: int, padding: int | str) -> tuple[int, int]:
    """Padding before and after. "same" is TensorFlow's: ceil(size / stride) outputs, the larger half comes after."""
    if padding != "same":
        return padding, padding
    total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def _per_image(h: Tensor, layer: Callable) -> Tensor:
    """Apply a layer without weights, which takes [images, c, h, w]."""
    return layer(h.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, h.shape[:2])
