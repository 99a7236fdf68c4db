"""Convolution and batch norm for many tasks at once, each task with weights of its own.

MAML's inner loop gives every task its own fast weights, and its outer gradient differentiates through the inner
gradients. These layers have a leading task axis T on inputs and weights, channels last, and a closed form for the
second derivative: the double backward is a few matrix products and a few passes over memory instead of a graph of
small operations. A second derivative with create_graph raises an error, except of `conv_bn`: a network's first
convolution with its batch norm.

`torch.vmap` over `F.conv2d` is a grouped convolution, which is slow for small maps, and over `F.batch_norm` its double
backward is wrong (pytorch/functorch#534).

Letters: T tasks, N samples, h w c height, width, channels in, o channels out, k kernel, R = N*h*w values per channel.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from device import device_name

EPS = 1e-5  # batch norm's, as torch.nn.BatchNorm2d
LARGE = 2**15  # values of a task's im2col, above which oneDNN's kernel is faster than a product on most CPUs
LONG = 2**14  # rows above which a GPU sums in two stages: cuBLAS uses few threads for a small product with a long sum


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Convolve every task's images with that task's kernels.

    Args:
        x: [T, N, h, w, c], channels last.
        weight: [T, o, c, k, k]; fastest where each task's kernel is stored [o, k, k, c].
        bias: [T, o].
        padding: rows and columns of zeros before the first ones of the image, and after the last.
    Returns:
        [T, N, h', w', o].
    """
    before, after = padding
    if (before or after) and (before != after or len(x) > 1):  # else the native kernel pads
        x, before = F.pad(x, (0, 0, before, after, before, after)), 0
    return _Conv.apply(x, weight, bias, stride, before)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor, eps: float = EPS) -> Tensor:
    """Normalise by the batch's own statistics, task by task (transductive, as in MAML).

    Args:
        x: [T, N, ..., c], channels last, as the result; statistics are over all axes but T and c.
        weight: the scale, [T, c]; None: no scale.
        bias: [T, c].
        eps: added to the variance.
    """
    return _BatchNorm.apply(x, torch.ones_like(bias) if weight is None else weight, bias, eps)


@dataclass(frozen=True)
class Patches:
    """What `conv_bn` needs of the images, the same for all weights. Each of G groups has its own statistics.

    A patch is p = c + c*k*k values: its middle pixel, and all its pixels minus the middle one. From the plain pixels,
    the small variance of an edge filter's output would be lost to float32's rounding.
    """

    rows: Tensor  # [T, G, N/G, 1 + p, h'*w']: a row of ones, and a patch per column
    mean: Tensor  # [T, G, 1, p] of the patches, in float64
    covariance: Tensor  # [T, G, p, p] of the patches, in float64
    sides: list[int]  # h', w'

    def __len__(self) -> int:
        return len(self.rows)


def patches(x: Tensor, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0), groups: int = 1) -> Patches:
    """The patches of images [T, N, c, h, w], which get no gradient, with padding as in `conv2d`.

    Mean and covariance are of each group of N / groups images.
    """
    x = F.pad(x, (*padding, *padding))
    x = x - x.mean((1, 3, 4), keepdim=True)  # else the covariance would be a difference of large numbers
    windows = x.unfold(3, kernel, stride).unfold(4, kernel, stride).permute(0, 1, 2, 5, 6, 3, 4)
    tasks, samples, c, *_, h, w = windows.shape  # [T, N, c, k, k, h', w']
    rows = x.new_ones(tasks, samples, 1 + c + c * kernel**2, h, w)
    middle = rows[:, :, 1:1 + c] = windows[:, :, :, kernel // 2, kernel // 2]
    torch.sub(windows, middle[:, :, :, None, None], out=rows[:, :, 1 + c:].unflatten(2, windows.shape[2:5]))
    rows = rows.flatten(3).unflatten(1, (groups, -1))
    moments = (rows @ rows.mT).mean(2, dtype=torch.float64) / (h * w)
    mean, square = moments[..., :1, 1:], moments[..., 1:, 1:]
    return Patches(rows, mean, square - mean.mT @ mean, [h, w])


def conv_bn(x: Patches, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor, eps: float = EPS) -> Tensor:
    """`batch_norm(conv2d(images, weight, bias), scale, shift)` as one product: [T, N, h', w', o].

    With the kernels as the rows of W, the convolution's channels have the variances diag(W covariance W^T). So batch
    norm takes passes over W, which is small, and none over the output or its gradient. The bias cancels.
    """
    matrix = torch.cat([weight.sum((3, 4)), weight.flatten(2)], -1).double()[:, None]  # [T, 1, o, p]
    variance = ((matrix @ x.covariance) * matrix).sum(-1, keepdim=True)  # [T, G, o, 1]
    factor = (variance.clamp_min(0) + eps).rsqrt()  # rounding may leave it below 0
    if scale is not None:
        factor = factor * scale[:, None, :, None]
    matrix = matrix * factor
    shift = (shift + 0 * bias)[:, None, :, None] - (matrix * x.mean).sum(-1, keepdim=True)  # the bias's gradient is 0
    matrix = torch.cat([shift, matrix], -1).to(weight.dtype)[:, :, None]
    return (x.rows.mT @ matrix.mT).flatten(1, 2).unflatten(2, x.sides)


def max_pool2d(x: Tensor, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """The largest value under a sliding window: [T, N, h, w, c] -> [T, N, h', w', c]."""
    return _MaxPool.apply(x.flatten(0, 1), kernel, stride, padding).unflatten(0, x.shape[:2])


def _refuse_a_third_derivative() -> None:
    """For the backward of a first derivative: with create_graph its result would have to be differentiable.

    `once_differentiable` is not enough: its error is skipped by `torch.autograd.grad`, whose result is then wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("taskwise has no third derivatives; take the second without create_graph")


# A convolution is bilinear in image and kernel. Its gradients are its two adjoints, and the gradients of those are
# the same three maps again. Each map is computed in one of two ways: by torch's kernel, with the tasks as its groups,
# or by im2col and one batched matrix product.


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.geometry, ctx.operand = (stride, padding), _operand(x, weight, stride)
        ctx.save_for_backward(x, weight)
        return _convolve(x, ctx.operand, weight, bias, *ctx.geometry)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        gradients = _ConvGradients.apply(x, weight, g, ctx.operand, ctx.geometry, ctx.needs_input_grad[0])
        return *gradients, None, None


class _ConvGradients(torch.autograd.Function):
    """(x, weight, g) -> gradients for (x, weight, bias)."""

    @staticmethod
    def forward(ctx, x, weight, g, operand, geometry, for_x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, g)
        ctx.operand, ctx.geometry = operand, geometry
        return _adjoints(x, operand, weight, g, *geometry, [for_x, True, True])

    @staticmethod
    def backward(ctx, vx, vw, vb):
        _refuse_a_third_derivative()
        # Differentiate <vx, for x> + <vw, for weight> + <vb, for bias> = <g, conv(vx, weight) + conv(x, vw) + vb>.
        x, weight, g = ctx.saved_tensors
        to_x = to_weight = to_g = None
        if vw is not None:
            to_g = _convolve(x, ctx.operand, vw, vb, *ctx.geometry)
            if ctx.needs_input_grad[0]:
                to_x, _, _ = _adjoints(x, ctx.operand, vw, g, *ctx.geometry, [True, False, False])
        elif vb is not None:
            to_g = vb[:, None, None, None].expand_as(g)
        if vx is not None:
            operand = _operand(vx, weight, ctx.geometry[0])
            through_x = _convolve(vx, operand, weight, None, *ctx.geometry)
            to_g = through_x if to_g is None else to_g + through_x
            _, to_weight, _ = _adjoints(vx, operand, weight, g, *ctx.geometry, [False, True, False])
        return to_x, to_weight, to_g, None, None, None


def _operand(x, weight, stride):
    """x as the kernel takes it: with the tasks as groups of channels (4 dimensions), or as im2col's columns (3)."""
    return _as_groups(x) if _native(x, weight, stride) else _im2col(x, weight.shape[-1], stride)


def _convolve(x, operand, weight, bias, stride, padding):
    """[T, N, h, w, c], its operand, [T, o, c, k, k], [T, o] -> [T, N, h', w', o]."""
    tasks, o, _, k, _ = weight.shape
    if operand.dim() == 4:
        bias = None if bias is None else bias.flatten()
        return _from_groups(F.conv2d(operand, _kernels(weight), bias, stride, padding, groups=tasks), tasks)
    matrix = _matrix(weight).transpose(1, 2)
    y = torch.bmm(operand, matrix) if bias is None else torch.baddbmm(bias[:, None], operand, matrix)
    return y.view(*x.shape[:2], *_output_sides(x.shape, k, stride), o)


def _adjoints(x, operand, weight, g, stride, padding, wanted):
    """Gradients of <g, conv(x, weight) + bias> with respect to x, weight and bias; None where not wanted."""
    for_x, for_weight, for_bias = wanted
    tasks, o, c, k, _ = weight.shape
    if operand.dim() == 4:
        gx, gw, gb = torch.ops.aten.convolution_backward(
            _as_groups(g), operand, _kernels(weight), [tasks * o], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0],
            tasks, wanted)
        return (_from_groups(gx, tasks) if for_x else None, gw.unflatten(0, (tasks, o)) if for_weight else None,
                gb.view(tasks, o) if for_bias else None)
    rows = g.reshape(tasks, -1, o)
    gx = _col2im(torch.bmm(rows, _matrix(weight)), x.shape, k, stride) if for_x else None
    gw = None
    if for_weight:
        parts = g.shape[1] if g.is_cuda and rows.shape[1] > LONG else 1  # images: else one block sums all
        gw = torch.bmm(rows.reshape(tasks * parts, -1, o).mT, operand.reshape(tasks * parts, -1, k * k * c))
        gw = gw if parts == 1 else gw.view(tasks, parts, o, -1).sum(1)
        gw = gw.view(tasks, o, k, k, c).permute(0, 1, 4, 2, 3)
    return gx, gw, rows.sum(1) if for_bias else None


def _native(x, weight, stride):
    """Whether torch's kernel is faster than im2col and a batched product, as measured for 1, 3, 32 and 64 channels."""
    if len(x) == 1:
        return True
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or _fast_products():
        return False
    k, c = weight.shape[-1], x.shape[-1]
    sides = _output_sides(x.shape, k, stride)
    return c >= 16 and min(sides) >= 4 and x.shape[1] * math.prod(sides) * k * k * c > LARGE


@functools.cache
def _fast_products():
    """Whether products are by MKL on a processor of Intel's: on others MKL has about half of oneDNN's speed."""
    return torch.backends.mkl.is_available() and "Intel" in device_name(torch.device("cpu"))


def _output_sides(shape, k, stride):  # of a padded [T, N, h, w, c]
    return [(side - k) // stride + 1 for side in shape[2:4]]


def _as_groups(x):  # [T, N, h, w, c] -> [N, T*c, h, w], in channels-last memory; of one task without a copy
    return x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _from_groups(y, tasks):  # the inverse
    return y.permute(0, 2, 3, 1).unflatten(3, (tasks, -1)).permute(3, 0, 1, 2, 4)


def _kernels(weight):  # [T, o, c, k, k] -> [T*o, c, k, k], in channels-last memory
    return weight.permute(0, 1, 3, 4, 2).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


def _matrix(weight):  # [T, o, c, k, k] -> [T, o, k*k*c], a view where the memory is [o, k, k, c]
    return weight.permute(0, 1, 3, 4, 2).reshape(*weight.shape[:2], -1)


def _im2col(x, k, stride):
    """[T, N, h, w, c] -> [T, N*h'*w', k*k*c], each row the patch under one output pixel."""
    windows = x.unfold(2, k, stride).unfold(3, k, stride).permute(0, 1, 2, 3, 5, 6, 4)  # [T, N, h', w', k, k, c]
    return windows.reshape(len(x), -1, k * k * x.shape[-1])


def _col2im(columns, shape, k, stride):
    """The adjoint of _im2col: add every patch back where it was taken from."""
    rows, cols = _output_sides(shape, k, stride)
    patches = columns.view(*shape[:2], rows, cols, k, k, shape[-1])
    x = columns.new_zeros(shape)
    for i in range(k):
        for j in range(k):
            x[:, :, i:i + stride * rows:stride, j:j + stride * cols:stride].add_(patches[:, :, :, :, i, j])
    return x


class _BatchNorm(torch.autograd.Function):
    """y = weight * xhat + bias, xhat = (x - mean) * r, r = 1 / sqrt(variance + eps)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight)
        rows, weight = _rows(x), weight[:, None]  # [T, R, c], [T, 1, c]
        xhat = rows - rows.mean(1, keepdim=True)  # a CPU's native kernel has up to 2,000 times the rounding errors
        r = xhat.square().mean(1, keepdim=True).add_(eps).rsqrt_()
        ctx.statistics = xhat.mul_(r), r
        return torch.addcmul(bias[:, None], xhat, weight).view(x.shape)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return *_BatchNormGradients.apply(g, x, weight, ctx.statistics), None


class _BatchNormGradients(torch.autograd.Function):
    """(g, x, weight) -> gradients for (x, weight, bias); x is an input only so that it gets a gradient itself.

    With the means over rows s1 = <g>, s2 = <g xhat> and scale = weight * r:
        for x: scale (g - s1 - xhat s2);  for weight: R s2;  for bias: R s1.
    """

    @staticmethod
    def forward(ctx, g, x, weight, statistics):
        ctx.save_for_backward(g, weight)
        (xhat, r), rows = statistics, _rows(g)
        s1, s2, scale = rows.mean(1, keepdim=True), (rows * xhat).mean(1, keepdim=True), weight[:, None] * r
        ctx.statistics = xhat, r, s1, s2
        gx = torch.addcmul(-scale * s1, rows, scale).addcmul_(xhat, -scale * s2)
        return gx.view(g.shape), s2[:, 0] * rows.shape[1], s1[:, 0] * rows.shape[1]

    @staticmethod
    def backward(ctx, v, vw, vb):
        _refuse_a_third_derivative()
        # Differentiate L = <v, for x> + <vw, for weight> + <vb, for bias>. xhat depends on x through the mean and r,
        # and dr/dx = -r^2 xhat / R. With a = dL/dxhat = -scale s2 v + e g, and q = mean of v (g - s1 - xhat s2):
        #   for x: r (a - <a> - xhat <a xhat>) - scale r q xhat
        (g, weight), (xhat, r, s1, s2), shape = ctx.saved_tensors, ctx.statistics, v.shape
        g, v, weight, vw, vb = _rows(g), _rows(v), weight[:, None], vw[:, None], vb[:, None]
        t1, t2 = v.mean(1, keepdim=True), (v * xhat).mean(1, keepdim=True)
        q = (v * g).mean(1, keepdim=True) - t1 * s1 - t2 * s2
        scale = weight * r
        e = vw - scale * t2
        to_g = torch.addcmul(vb - scale * t1, v, scale).addcmul_(xhat, e)
        d = -scale * s2
        mean_a, mean_a_xhat = d * t1 + e * s1, d * t2 + e * s2
        to_x = torch.addcmul(-r * mean_a, v, r * d).addcmul_(g, r * e).addcmul_(xhat, -r * (mean_a_xhat + scale * q))
        return to_g.view(shape), to_x.view(shape), (r * q)[:, 0] * g.shape[1], None


class _MaxPool(torch.autograd.Function):
    """[N, h, w, c] -> [N, h', w', c]. torch's own double backward gathers in another memory order, and is slow here."""

    @staticmethod
    def forward(ctx, x, kernel, stride, padding):
        geometry = [kernel] * 2, [stride] * 2, [padding] * 2
        y, indices = torch.ops.aten.max_pool2d_with_indices(x.permute(0, 3, 1, 2), *geometry)
        ctx.forward_values = (x.shape, x.stride()), indices, geometry
        return y.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx, g):
        return _MaxPoolGradient.apply(g, *ctx.forward_values), None, None, None


class _MaxPoolGradient(torch.autograd.Function):
    """Put each gradient where the largest value was; linear, and its adjoint picks from there."""

    @staticmethod
    def forward(ctx, g, layout, indices, geometry):
        ctx.indices = indices
        x = g.new_empty_strided(*layout)  # its values are not read; to keep the real x takes a sixth more memory
        gx = torch.ops.aten.max_pool2d_with_indices_backward(
            g.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), *geometry, [1, 1], False, indices)
        return gx.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx, v):
        _refuse_a_third_derivative()
        picked = v.flatten(1, 2).gather(1, ctx.indices.permute(0, 2, 3, 1).flatten(1, 2))  # [N, h'*w', c]
        return picked.unflatten(1, ctx.indices.shape[2:]), None, None, None


def _rows(x):  # [T, ..., c] -> [T, R, c]
    return x.reshape(len(x), -1, x.shape[-1])
