"""Independent oracles for the tests: torch.nn layers, MAML as the plain loop over tasks, and the metrics by loops.

Nothing here is fast, or shared with the project: native layers and autograd, or numpy; one task at a time.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LAYERS = {  # layers that need no more than their params
    "conv2d": lambda out, ins, kernel, _, stride, padding: nn.Conv2d(ins, out, kernel, stride, padding),
    "convt2d": lambda ins, out, kernel, _, stride, padding: nn.ConvTranspose2d(ins, out, kernel, stride, padding),
    "linear": lambda out, ins: nn.Linear(ins, out),
    "bn": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "mean": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "relu": lambda inplace: nn.ReLU(),
    "leakyrelu": lambda slope, inplace: nn.LeakyReLU(slope),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "upsample": lambda scale: nn.Upsample(scale_factor=scale),
    "max_pool2d": nn.MaxPool2d,
    "avg_pool2d": nn.AvgPool2d,
    "flatten": nn.Flatten,
    "reshape": lambda *shape: nn.Sequential(nn.Flatten(), nn.Unflatten(1, shape)),
}


def module(name, params, x):
    """The torch.nn layer of one entry of a layer list, for an input x."""
    if name == "conv2d" and params[5] == "same":  # with 3x3 and stride 2; TensorFlow pads an even side after it alone
        before = x.shape[-1] % 2
        return nn.Sequential(nn.ZeroPad2d((before, 1, before, 1)), nn.Conv2d(params[1], params[0], 3, 2))
    if name == "bn" and x.dim() == 2:
        return nn.BatchNorm1d(*params, track_running_stats=False)
    if name == "bn_shift":
        layer = nn.BatchNorm2d(*params, eps=1e-3, track_running_stats=False)
        layer.weight = None
        return layer
    return LAYERS[name](*params)


def forward(config, weights, x):
    """Logits of one task's images, and its features: what enters the next conv or linear layer; logits."""
    features, values = [], iter(weights.values())
    for i, (name, params) in enumerate(config):
        if name in ("conv2d", "linear") and i > 0:
            features.append(x.flatten(1))
        with torch.device("meta"):
            layer = module(name, params, x)
        x = torch.func.functional_call(layer, {own: next(values) for own, _ in layer.named_parameters()}, x)
    assert next(values, None) is None
    return x, features + [x]


def adapt(config, theta, x, y, lr, steps, second_order=False, changes=bool):
    """One task's weights before the inner loop and after each step, which changes those that `changes` takes."""
    trajectory = [dict(theta)]
    for _ in range(steps):
        weights = trajectory[-1]
        names = list(filter(changes, weights))
        loss = F.cross_entropy(forward(config, weights, x)[0], y)
        gradients = torch.autograd.grad(loss, [weights[name] for name in names], create_graph=second_order)
        rates = [lr(name) if callable(lr) else lr for name in names]
        trajectory.append(weights | {name: weights[name] - rate * g for name, rate, g in zip(names, rates, gradients)})
    return trajectory


def meta_loss(config, theta, tasks, lr, steps, second_order=False, changes=bool):
    """Mean over tasks of the query loss of the adapted weights."""
    losses = []
    for x_spt, y_spt, x_qry, y_qry in zip(*tasks):
        adapted = adapt(config, theta, x_spt, y_spt, lr, steps, second_order, changes)[-1]
        losses.append(F.cross_entropy(forward(config, adapted, x_qry)[0], y_qry))
    return sum(losses) / len(losses)


def meta_gradient(config, theta, tasks, lr, steps, second_order, changes=bool):
    """The loss and its gradient with respect to theta; first order takes the inner gradients as constants."""
    theta = {name: w.detach().clone().requires_grad_() for name, w in theta.items()}
    loss = meta_loss(config, theta, tasks, lr, steps, second_order, changes)
    return loss.detach(), dict(zip(theta, torch.autograd.grad(loss, list(theta.values()))))


def relative_error(got, expected):
    """|| got - expected || / || expected || of two dicts of tensors, each taken as one vector."""
    assert got.keys() == expected.keys()
    difference = sum((got[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(e.square().sum() for e in expected.values())).sqrt().item()


def metrics(h, y, c, weight, logits, means):
    """Metrics of one task: numpy h [N, D], y [N], classes of any size; means of the support set, for NC4."""
    rows = [[row for row, label in zip(h, y) if label == k] for k in range(c)]
    n, mu, pairs = [len(own) for own in rows], np.array([sum(own) / len(own) for own in rows]), {}
    m = mu - mu.mean(0)
    s_w = sum(np.outer(row - mu[k], row - mu[k]) / n[k] for k in range(c) for row in rows[k]) / c
    s_b = sum(np.outer(row, row) for row in m) / c
    v = [sum(np.sum((row - mu[k]) ** 2) for row in rows[k]) / n[k] for k in range(c)]
    true = [v[k] * n[k] / (n[k] - 1) for k in range(c)]
    for i, j in itertools.permutations(range(c), 2):
        between = mu[i] - mu[j]
        distance = np.sum(between ** 2)
        corrected = distance - true[i] / n[i] - true[j] / n[j]
        a_ij, a_ji = (np.mean([((row - mu[k]) @ between / np.sqrt(distance)) ** 2 for row in rows[k]]) for k in (i, j))
        pairs[i, j] = ((v[i] + v[j]) / (2 * distance), (a_ij + a_ji) / (2 * distance),
                       (true[i] + true[j]) / (2 * corrected) if corrected > 0 else math.nan,
                       abs(m[i] @ m[j] / (np.linalg.norm(m[i]) * np.linalg.norm(m[j])) + 1 / (c - 1)))
    cdnv, directional, unbiased_cdnv, equiangularity = np.mean(list(pairs.values()), axis=0)
    within, between, norms, gram = np.trace(s_w), np.trace(s_b), np.linalg.norm(m, axis=1), m @ m.T
    unbiased = np.mean(true), between - (c - 1) / c * np.mean([true[k] / n[k] for k in range(c)])
    nearest = np.array([np.argmin([np.sum((row - mean) ** 2) for mean in means]) for row in h])
    return {
        "within": within, "between": between, "relative_within": within / (within + between),
        "within_unbiased": unbiased[0], "between_unbiased": unbiased[1],
        "relative_within_unbiased": unbiased[0] / sum(unbiased),
        "nc1": np.trace(s_w @ np.linalg.pinv(s_b, rcond=1e-10, hermitian=True)) / c,
        "cdnv": cdnv, "cdnv_unbiased": unbiased_cdnv, "directional_cdnv": directional,
        "equinorm": np.std(norms) / np.mean(norms), "equiangularity": equiangularity,
        "etf_error": np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(c) - np.ones((c, c)) / c) / math.sqrt(c - 1)),
        "self_duality": np.sum((weight / np.linalg.norm(weight) - m / np.linalg.norm(m)) ** 2),
        "ncc_accuracy": np.mean(nearest == y), "ncc_mismatch": np.mean(np.argmax(logits, axis=1) != nearest)}
