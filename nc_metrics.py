"""Neural collapse of features, measured task by task.

How far the features of a network have collapsed onto their class means, for
any layer, as pure functions of tensors: features `[..., N, D]`, labels
`[..., N]`, any leading batch dimensions (tasks, models), which are never
pooled, because class c of one task has nothing to do with class c of another.
`measure` gives everything for all layers in one call.

    Papyan, Han, Donoho 2020: Prevalence of neural collapse during the terminal
        phase of deep learning training, PNAS 117(40) (NC1 to NC4).
    Galanti, György, Hutter 2021: On the role of neural collapse in transfer
        learning, arXiv:2112.15121 (CDNV).
    Zhu, Ding, Zhou, Li, You, Sulam, Qu 2021: A geometric analysis of neural
        collapse with unconstrained features, NeurIPS 34 (the ETF's error).
    Rangamani, Lindegaard, Galanti, Poggio 2023: Feature learning in deep
        classifiers through intermediate neural collapse, ICML, PMLR 202 (the
        traces, and the nearest class mean, layer by layer).

Notation: C classes (`n_way`), n = N/C samples a class, mu_c the mean of class
c, mu_G the mean of the mu_c, M the C x D matrix of rows mu_c - mu_G,
S_W = 1/N sum (h - mu_c)(h - mu_c)^T, S_B = 1/C sum (mu_c - mu_G)(mu_c - mu_G)^T.

What to beware of when reading the values:
- With D much larger than N, pure noise looks collapsed to `nc1`, to `etf_error`
  and to nearest means taken from the same rows. Read them beside the same
  metric of permuted labels (`permuted`), and take the means for
  `ncc_accuracy` and `ncc_mismatch` from the support set.
- One sample a class has no spread: what is built on it is nan, not 0.
- The unbiased between trace can be negative. It is kept.
- A zero denominator gives nan. Whatever is zero but for the rounding of a mean
  of N rows in float64 counts as zero, or a dead layer, whose rows are all the
  same, would report the quotient of two rounding errors.
- Labels are 0..C-1 in any order, each equally often; a task whose labels are
  not, and a task with a feature that is not finite, has nan for its values.

Everything is accumulated and returned in float64, whatever the dtype that
comes in. No D x D matrix is formed, and but for the svd of a C x C matrix in
`nc1`, nothing waits for a device.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


# ---- the public functions, one metric each ----

def class_means(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """mu_c, the mean of each class: features [..., N, D], labels [..., N] -> [..., C, D]."""
    return _means(features.double(), _one_hot(labels, n_way))


def covariance_traces(features: Tensor, labels: Tensor, n_way: int) -> tuple[Tensor, Tensor]:
    """tr S_W and tr S_B (Rangamani et al. 2023): [..., N, D], [..., N] -> (within [...], between [...]).

    Within is summed over centred residuals: a difference of squares would lose it when it is small.
    At full collapse within is 0. Within is nan for one sample a class; between is not.
    """
    group = _group(features, _one_hot(labels, n_way))
    return group.variances.mean(-1), _between(group)


def unbiased_traces(features: Tensor, labels: Tensor, n_way: int) -> tuple[Tensor, Tensor]:
    """The traces without the bias of few samples: [..., N, D], [..., N] -> (within [...], between [...]).

    Means of n samples swallow 1/n of the spread within and show it as spread between:
    E tr S_W = t_W (n-1)/n and E tr S_B = t_B + t_W (C-1)/(C n), solved for t_W and t_B.
    At full collapse within is 0. Between can come out negative and is left so. Both are nan for
    one sample a class.
    """
    group = _group(features, _one_hot(labels, n_way))
    return _unbiased(group.variances.mean(-1), _between(group), group)


def relative_within(within: Tensor, between: Tensor) -> Tensor:
    """within / (within + between), of either pair of traces: [...], [...] -> [...].

    At full collapse 0; (n-1) / (n-1 + (C-1)/C) on noise (biased traces). Nan when the traces add up to 0.
    """
    return _ratio(within.double(), within.double() + between.double())


def nc1(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """tr(S_W pinv(S_B)) / C, NC1 of Papyan, Han, Donoho 2020: [..., N, D], [..., N] -> [...].

    At full collapse 0, and near 0 on noise too when D >> N. Nan for one sample a class and when
    all class means are equal.
    """
    return _nc1(_group(features, _one_hot(labels, n_way)))


def cdnv(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """Class-distance normalized variance of Galanti, György, Hutter 2021: [..., N, D], [..., N] -> [...].

    Mean over pairs i != j of (v_i + v_j) / (2 ||mu_i - mu_j||^2), v_i the mean of ||h - mu_i||^2 in class i.
    At full collapse 0; (n-1)/2 on noise. Nan for one sample a class and when two class means are equal.
    """
    return _cdnv(_group(features, _one_hot(labels, n_way)))


def equinorm(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """How unequal the centred means are in length: [..., N, D], [..., N] -> [...].

    Population standard deviation over mean of ||M_c||, NC2 of Papyan, Han, Donoho 2020. At full collapse 0.
    Nan when all class means are equal.
    """
    return _equinorm(_group(features, _one_hot(labels, n_way)))


def equiangularity(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """How far the angles between centred means are from a simplex's: [..., N, D], [..., N] -> [...].

    Mean over pairs i != j of |cos(M_i, M_j) + 1/(C-1)|, NC2 of Papyan, Han, Donoho 2020. At full collapse 0.
    Nan when a class mean is the mean of all, so that it has no angle.
    """
    return _equiangularity(_group(features, _one_hot(labels, n_way)))


def etf_error(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """|| M M^T/||M M^T||_F - (I - 11^T/C)/sqrt(C-1) ||_F: [..., N, D], [..., N] -> [...].

    NC2 as one number: the distance to a simplex equiangular tight frame, the measure of Zhu et al. 2021
    for a classifier's weights, here of the class means. At full collapse 0, and near 0 on noise too
    when D >> N. Nan when all class means are equal.
    """
    return _etf_error(_group(features, _one_hot(labels, n_way)))


def self_duality(weight: Tensor, features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """|| W/||W||_F - M/||M||_F ||_F^2, NC3 of Papyan, Han, Donoho 2020.

    weight [..., C, D] are the classifier's rows, features [..., N, D] its input, labels [..., N]; -> [...].
    At full collapse 0; 2 when weight and means have nothing to do with each other. Nan when all class
    means are equal or the weight is 0.
    """
    return _self_duality(weight, _group(features, _one_hot(labels, n_way)))


def ncc_mismatch(logits: Tensor, features: Tensor, labels: Tensor, n_way: int, means: Tensor) -> Tensor:
    """Share of samples that the classifier puts elsewhere than the nearest class mean does.

    NC4 of Papyan, Han, Donoho 2020: logits [..., N, C], features [..., N, D], means [..., C, D] (the support
    set's, from `class_means`); -> [...]. The two are compared with each other, right or wrong, so the
    labels [..., N] don't enter; they are taken so that all metrics of features are called alike.
    At full collapse 0. Nan when a logit, feature or mean is not finite.
    """
    if not logits.shape[-1] == means.shape[-2] == n_way:
        raise ValueError(f"{logits.shape[-1]} logits and {means.shape[-2]} means for {n_way} classes")
    return _mismatch(_best(logits), _nearest(features.double(), means.double()))


def ncc_accuracy(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Share of samples nearest to the mean of their own class, NC4 layer by layer in Rangamani et al. 2023.

    features [..., N, D], labels [..., N], means [..., C, D] (the support set's, by `class_means`); -> [...].
    By Euclidean distance. At full collapse 1. Nan when a feature or mean is not finite.
    """
    return _agreement(labels, _nearest(features.double(), means.double()))


def original_traces(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the code that this is a port of took for the traces: logits [..., N, C] -> (within [...], between [...]).

    Not a metric of anything: it stands here so that its figure can be set beside the right one, of the same logits.
    Its class means are those of consecutive groups of five rows, whatever the labels; it compares the rows of class k,
    which lie class after class, with the mean of group k. Nan with fewer than five rows a class.
    """
    n_samples, n_way = logits.shape[-2:]
    x = logits.double()
    if n_samples < 5 * n_way:
        return (torch.full_like(x[..., 0, 0], math.nan),) * 2
    means = x[..., :5 * n_way, :].unflatten(-2, (n_way, 5)).mean(-2)                        # [..., C, C]
    residual = x.unflatten(-2, (n_way, n_samples // n_way)) - means.unsqueeze(-2)           # [..., C, n, C]
    within = _square_length(residual).mean((-2, -1))
    return within, _square_length(means - x.mean(-2, keepdim=True)).mean(-1)


def permuted(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The labels [..., N] of each task in a random order of its own: what a metric makes of them is its null.

    The generator may be on the CPU or on the labels' device; only the latter needs no copy between them.
    """
    order = torch.rand(labels.shape, generator=generator, device=generator.device).argsort(-1)
    return labels.gather(-1, order.to(labels.device))


def mean_and_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tasks and its standard error: values [L, T] -> (mean [L], error [L]).

    The error is the sample standard deviation (ddof 1) over sqrt(T), nan for a single task. A task
    that is nan makes both nan: leaving it out would change which tasks are averaged.
    """
    values = values.double()
    n_tasks = values.shape[-1]
    mean = values.mean(-1)
    if n_tasks < 2:
        return mean, torch.full_like(mean, math.nan)
    return mean, values.std(-1, correction=1) / math.sqrt(n_tasks)


@torch.no_grad()
def measure(
    features: list[Tensor],
    labels: Tensor,
    support_features: list[Tensor],
    support_labels: Tensor,
    n_way: int,
    classifier_weight: Tensor,
    null_labels: Tensor,
    null_support_labels: Tensor,
) -> dict[str, Tensor]:
    """All metrics of all L layers at once: each entry is [L, ...], float64, one row a layer.

    Args:
        features: of the query set, one [..., N, D_l] a layer; the last are the logits [..., N, C].
        labels: of the query set, [..., N].
        support_features, support_labels: the same of the support set, [..., N_s, D_l] and [..., N_s]; the
            class means of the ncc metrics are taken from it.
        n_way: C.
        classifier_weight: [..., C, D] for the D of the last hidden layer, the classifier's input.
        null_labels, null_support_labels: `permuted` labels, for the null of each metric, NAME_null.

    ncc_mismatch compares each layer's nearest mean with the logits of the whole network. self_duality
    is defined on the last hidden layer (row L-2); its other rows are nan. within_original and between_original
    are `original_traces` of the logits (row L-1).
    """
    reduced = [reduce(query, labels, support, support_labels, n_way, null_labels, null_support_labels,
                      classifier_weight if layer == len(features) - 2 else None)
               for layer, (query, support) in enumerate(zip(features, support_features, strict=True))]
    return metrics(reduced, features[-1], labels, null_labels)


@torch.no_grad()
def reduce(
    features: Tensor,
    labels: Tensor,
    support_features: Tensor,
    support_labels: Tensor,
    n_way: int,
    null_labels: Tensor,
    null_support_labels: Tensor,
    classifier_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The half of `measure` that reads a layer's features, and leaves 5 C coordinates of a sample for `metrics`.

    A metric knows samples, class means and classifier only by their distances and angles, which are the same in any
    orthonormal basis of the span of these means and rows, if what lies beside that span is kept as a squared length.

    Takes what `measure` takes, of one layer; the classifier only if this is its input. Each entry keeps the leading
    dimensions, so that tasks reduced apart, while their features lie in a cache, can be put side by side again.
    """
    one_hot, null_one_hot = _one_hot(labels, n_way), _one_hot(null_labels, n_way)
    group, support = _group(features, one_hot), support_features.double()
    # from the mean of all: the class means, the null's, those of the support set, its null's, the classifier
    null_means = _means(group.residual, null_one_hot) + _means(one_hot, null_one_hot) @ group.centred
    origin = group.means.mean(-2, keepdim=True)
    anchors = [group.centred, null_means,
               *(_means(support, _one_hot(y, n_way)) - origin for y in (support_labels, null_support_labels))]
    if classifier_weight is not None:
        anchors.append(classifier_weight.double())
    basis, anchors = torch.linalg.qr(torch.cat(anchors, -2).mT)            # [..., D, A], [..., A, 4 or 5 C]
    within = group.residual @ basis                                        # [..., N, A]
    anchors = anchors.mT
    missing = 5 * n_way - anchors.shape[-1]                                # zeros make all layers the same size
    return {
        "samples": F.pad(within + one_hot @ anchors[..., :n_way, :], (0, missing)),
        "beside": (group.spread - _square_length(within)).clamp_min(0),
        "anchors": F.pad(F.pad(anchors, (0, missing)), (0, 0, 0, 5 * n_way - anchors.shape[-2]), value=math.nan),
        "floor": group.floor,
    }


@torch.no_grad()
def metrics(layers: list[dict[str, Tensor]], logits: Tensor, labels: Tensor, null_labels: Tensor) -> dict[str, Tensor]:
    """The other half: what `reduce` returns of each layer, and the query set's logits and labels -> as `measure`."""
    reduced = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    n_way = logits.shape[-1]
    labels = torch.stack([labels, null_labels]).unsqueeze(1)               # [2, 1, ..., N]: both kinds, every layer
    samples = reduced["samples"].expand(2, *reduced["samples"].shape)      # [2, L, ..., N, 5 C]
    one_hot = _one_hot(labels, n_way).expand(*samples.shape[:-1], n_way)
    group = _group(samples, one_hot, reduced["beside"], reduced["floor"])
    _, _, support_means, null_support_means, weight = reduced["anchors"].split(n_way, -2)
    nearest = _nearest(samples, torch.stack([support_means, null_support_means]))
    within, between = group.variances.mean(-1), _between(group)
    unbiased_within, unbiased_between = _unbiased(within, between, group)
    values = {
        "within": within,
        "between": between,
        "relative_within": relative_within(within, between),
        "within_unbiased": unbiased_within,
        "between_unbiased": unbiased_between,
        "relative_within_unbiased": relative_within(unbiased_within, unbiased_between),
        "nc1": _nc1(group),
        "cdnv": _cdnv(group),
        "equinorm": _equinorm(group),
        "equiangularity": _equiangularity(group),
        "etf_error": _etf_error(group),
        "self_duality": _self_duality(weight, group),
        "ncc_accuracy": _agreement(labels, nearest),
        "ncc_mismatch": _mismatch(_best(logits), nearest),
    }
    table = {name + suffix: value[kind] for name, value in values.items() for kind, suffix in enumerate(("", "_null"))}
    for name, trace in zip(("within_original", "between_original"), original_traces(logits)):
        table[name] = torch.full_like(table["within"], math.nan)
        table[name][-1] = trace
    return table


# ---- what they share ----

class _Group(NamedTuple):
    """Features sorted into classes."""

    residual: Tensor   # [..., N, D] h - mu_c, float64
    means: Tensor      # [..., C, D]
    centred: Tensor    # [..., C, D] M; a row that is zero but for rounding is zero
    spread: Tensor     # [..., N] ||h - mu_c||^2
    variances: Tensor  # [..., C] v_c, the mean of the spread in class c; their mean over classes is tr S_W
    floor: Tensor      # [...] a squared length up to this is zero but for rounding

    @property
    def n(self) -> int:
        """Samples a class."""
        return self.residual.shape[-2] // self.means.shape[-2]


def _one_hot(labels: Tensor, n_way: int) -> Tensor:
    """[..., N] -> [..., N, C] float64; nan for a task that doesn't have each class equally often."""
    n_samples = labels.shape[-1]
    if n_way < 2 or n_samples == 0 or n_samples % n_way:
        raise ValueError(f"{n_samples} samples can't be {n_way} classes (2 or more) of equal size")
    one_hot = (labels.unsqueeze(-1) == torch.arange(n_way, device=labels.device)).double()
    # An assertion on the values would have to wait for the device: spoil the task's values instead.
    balanced = (one_hot.sum(-2) == n_samples // n_way).all(-1)
    return one_hot.where(balanced[..., None, None], math.nan)


def _means(x: Tensor, one_hot: Tensor) -> Tensor:
    """[..., N, D] float64, [..., N, C] -> [..., C, D]."""
    n_samples, n_way = one_hot.shape[-2:]
    return one_hot.mT @ x / (n_samples // n_way)


def _group(features: Tensor, one_hot: Tensor, beside: Tensor | float = 0.0, floor: Tensor | None = None) -> _Group:
    """Sort features [..., N, D] by labels [..., N, C], in few passes: reading N x D numbers is what takes the time.

    Args:
        beside: [..., N], the squared length of what the features leave out of ||h - mu_c||.
        floor: of the features that these are coordinates of; their own if None.
    """
    n_samples, n_way = one_hot.shape[-2:]
    residual = features.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    means = _means(residual, one_hot)
    residual.view(-1, *residual.shape[-2:]).baddbmm_(one_hot.reshape(-1, n_samples, n_way),
                                                     means.reshape(-1, *means.shape[-2:]), alpha=-1)
    spread = _square_length(residual) + beside
    if floor is None:  # a sum of N rows in float64 is off by at most about N eps times their size
        floor = (n_samples * EPS) ** 2 * (spread.mean(-1) + _square_length(means).mean(-1))
    centred = means - means.mean(-2, keepdim=True)
    centred = centred.masked_fill((_square_length(centred) <= floor.unsqueeze(-1)).unsqueeze(-1), 0)
    if n_samples == n_way:
        variances = torch.full_like(centred[..., 0], math.nan)
    else:
        variances = (spread.unsqueeze(-2) @ one_hot).squeeze(-2) * (n_way / n_samples)
        variances = variances.masked_fill(variances <= floor.unsqueeze(-1), 0)
    return _Group(residual, means, centred, spread, variances, floor)


def _square_length(rows: Tensor) -> Tensor:
    """[..., D] -> [...], without a second tensor of the size of `rows`."""
    return torch.linalg.vector_norm(rows, dim=-1).square()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; nan, and not infinity, where the denominator is zero."""
    return numerator / denominator.where(denominator != 0, math.nan)


def _off_diagonal_mean(pairs: Tensor) -> Tensor:
    """Mean of what is beside the diagonal: [..., C, C] -> [...]."""
    n_way = pairs.shape[-1]
    diagonal = torch.eye(n_way, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(diagonal, 0).sum((-2, -1)) / (n_way * (n_way - 1))


def _between(group: _Group) -> Tensor:
    return _square_length(group.centred).mean(-1)


def _unbiased(within: Tensor, between: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
    n, n_way = group.n, group.centred.shape[-2]
    freedom = n - 1 if n > 1 else math.nan
    return within * n / freedom, between - within * (n_way - 1) / (n_way * freedom)


def _nc1(group: _Group) -> Tensor:
    """sum_k mean_i ((h_i - mu_i) . v_k)^2 / s_k^2: M = U diag(s) V^T makes pinv(S_B) = C V diag(1/s^2) V^T.

    V comes from M itself: M M^T would square its condition number. Rows that sum to zero have rank C-1 at
    most, and a further singular value that is zero but for rounding is left out, as pinv does.
    """
    if group.n == 1:
        return torch.full_like(group.centred[..., 0, 0], math.nan)
    n_way, n_features = group.centred.shape[-2:]
    rank = min(n_way - 1, n_features)
    finite = group.centred.isfinite().all(-1).all(-1)
    # svd raises on nan, and is fast only on a small matrix: M^T = Q R, R = U' diag(s) V'^T, V = Q U'.
    q, r = torch.linalg.qr(group.centred.where(finite[..., None, None], 0).mT)   # [..., D, C], [..., C, C]
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    directions, s = q @ u[..., :rank], s[..., :rank]                             # [..., D, C-1], [..., C-1]
    spread = (group.residual @ directions).square().mean(-2)                     # [..., C-1]
    rounding = torch.maximum(EPS * max(n_way, n_features) * s[..., :1],
                             (n_way * group.floor).sqrt().unsqueeze(-1))
    kept = s > rounding
    value = (spread / s.where(kept, math.inf).square()).sum(-1)
    return value.where(finite & kept.any(-1), math.nan)


def _cdnv(group: _Group) -> Tensor:
    # Of the differences, not from M M^T, which would lose two close means far from a third.
    distances = torch.cdist(group.centred, group.centred,
                            compute_mode="donot_use_mm_for_euclid_dist").square()               # [..., C, C]
    distances = distances.masked_fill(distances <= group.floor[..., None, None], 0)
    variances = group.variances
    return _off_diagonal_mean(_ratio(variances.unsqueeze(-1) + variances.unsqueeze(-2), 2 * distances))


def _equinorm(group: _Group) -> Tensor:
    norms = torch.linalg.vector_norm(group.centred, dim=-1)   # [..., C]
    return _ratio(norms.std(-1, correction=0), norms.mean(-1))


def _equiangularity(group: _Group) -> Tensor:
    n_way = group.centred.shape[-2]
    unit = _ratio(group.centred, torch.linalg.vector_norm(group.centred, dim=-1, keepdim=True))
    return _off_diagonal_mean((unit @ unit.mT + 1 / (n_way - 1)).abs())


def _etf_error(group: _Group) -> Tensor:
    n_way = group.centred.shape[-2]
    gram = group.centred @ group.centred.mT                   # [..., C, C]
    etf = (torch.eye(n_way, dtype=gram.dtype, device=gram.device) - 1 / n_way) / math.sqrt(n_way - 1)
    return torch.linalg.matrix_norm(_ratio(gram, torch.linalg.matrix_norm(gram, keepdim=True)) - etf)


def _self_duality(weight: Tensor, group: _Group) -> Tensor:
    weight = weight.double()
    weight = _ratio(weight, torch.linalg.matrix_norm(weight, keepdim=True))
    means = _ratio(group.centred, torch.linalg.matrix_norm(group.centred, keepdim=True))
    return torch.linalg.matrix_norm(weight - means).square()


def _nearest(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest mean if there is one: [..., N, D], [..., C, D] float64 -> (class, finite), both [..., N].

    ||h - mu_c||^2 is least where (h - g) . (mu_c - g) - ||mu_c - g||^2 / 2 is greatest, for any g. With
    the mean of the means as g, a large common offset costs no digits.
    """
    origin = means.mean(-2, keepdim=True)                     # [..., 1, D]
    centred = means - origin
    offset = origin @ centred.mT + _square_length(centred).unsqueeze(-2) / 2   # [..., 1, C]
    return _best(x @ centred.mT - offset)


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """[..., C] -> (argmax [...], whether all scores are finite [...])."""
    return scores.argmax(-1), scores.isfinite().all(-1)


def _agreement(labels: Tensor, nearest: tuple[Tensor, Tensor]) -> Tensor:
    index, finite = nearest
    return (index == labels).double().where(finite, math.nan).mean(-1)


def _mismatch(predicted: tuple[Tensor, Tensor], nearest: tuple[Tensor, Tensor]) -> Tensor:
    (predicted, predicted_finite), (nearest, nearest_finite) = predicted, nearest
    return (predicted != nearest).double().where(predicted_finite & nearest_finite, math.nan).mean(-1)
