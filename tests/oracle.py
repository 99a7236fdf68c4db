"""Independent oracles for the tests: torch.nn layers, and MAML as the plain loop over tasks.

Nothing here is fast, or shared with the project: torch's native layers, one task at a time, and autograd.
"""

import torch
import torch.nn.functional as F
from torch import nn


def module(name, params, flat=False, size=0):
    """The torch.nn layer of one entry of a layer list, for images of this size."""
    match name:
        case "conv2d" if params[5] == "same":  # with 3x3 and stride 2; TensorFlow pads an even side after it alone
            return nn.Sequential(nn.ZeroPad2d((size % 2, 1, size % 2, 1)), nn.Conv2d(params[1], params[0], 3, 2))
        case "conv2d":
            return nn.Conv2d(params[1], params[0], params[2], params[4], params[5])
        case "convt2d":
            return nn.ConvTranspose2d(params[0], params[1], params[2], params[4], params[5])
        case "linear":
            return nn.Linear(params[1], params[0])
        case "bn":
            return (nn.BatchNorm1d if flat else nn.BatchNorm2d)(params[0], track_running_stats=False)
        case "bn_shift":
            layer = nn.BatchNorm2d(params[0], eps=1e-3, track_running_stats=False)
            layer.weight = None
            return layer
        case "mean":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case "relu":
            return nn.ReLU(inplace=params[0])
        case "leakyrelu":
            return nn.LeakyReLU(*params)
        case "tanh":
            return nn.Tanh()
        case "sigmoid":
            return nn.Sigmoid()
        case "upsample":
            return nn.Upsample(scale_factor=params[0])
        case "max_pool2d":
            return nn.MaxPool2d(*params)
        case "avg_pool2d":
            return nn.AvgPool2d(*params)
        case "flatten":
            return nn.Flatten()
        case "reshape":
            return nn.Sequential(nn.Flatten(), nn.Unflatten(1, params))


def network(config, weights):
    """The layer list as torch.nn layers, with a copy of the weights, given in the same order."""
    layers, flat = [], False
    for name, params in config:
        layers.append(module(name, params, flat))
        flat = name == "flatten" or flat and name != "reshape"
    net = nn.Sequential(*layers)
    assert len(list(net.parameters())) == len(weights)
    for parameter, weight in zip(net.parameters(), weights.values()):
        parameter.data = weight.detach().clone()
    return net


def forward(config, weights, x):
    """Logits of one task's images, and its features: what enters the next conv or linear layer; logits."""
    features, values = [], iter(weights.values())
    for i, (name, params) in enumerate(config):
        if name in ("conv2d", "linear") and i > 0:
            features.append(x.flatten(1))
        with torch.device("meta"):
            layer = module(name, [False] if name == "relu" else params, size=x.shape[-1])
        x = torch.func.functional_call(layer, {own: next(values) for own, _ in layer.named_parameters()}, x)
    return x, features + [x]


def adapt(config, theta, x, y, lr, steps, second_order=False):
    """The weights of one task before the inner loop and after each of its steps."""
    trajectory = [dict(theta)]
    for _ in range(steps):
        weights = trajectory[-1]
        loss = F.cross_entropy(forward(config, weights, x)[0], y)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
        trajectory.append({name: w - lr * g for (name, w), g in zip(weights.items(), gradients)})
    return trajectory


def meta_loss(config, theta, tasks, lr, steps, second_order=False):
    """Mean over tasks of the query loss of the adapted weights."""
    losses = []
    for x_spt, y_spt, x_qry, y_qry in zip(*tasks):
        adapted = adapt(config, theta, x_spt, y_spt, lr, steps, second_order)[-1]
        losses.append(F.cross_entropy(forward(config, adapted, x_qry)[0], y_qry))
    return sum(losses) / len(losses)


def meta_gradient(config, theta, tasks, lr, steps, second_order):
    """The loss and its gradient with respect to theta; first order takes the inner gradients as constants."""
    theta = {name: w.detach().clone().requires_grad_() for name, w in theta.items()}
    loss = meta_loss(config, theta, tasks, lr, steps, second_order)
    return loss.detach(), dict(zip(theta, torch.autograd.grad(loss, list(theta.values()))))


def relative_error(got, expected):
    """|| got - expected || / || expected || of two dicts of tensors, each taken as one vector."""
    assert got.keys() == expected.keys()
    difference = sum((got[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(e.square().sum() for e in expected.values())).sqrt().item()
