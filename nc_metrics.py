"""Neural-collapse metrics (NC1 to NC4): how far features have collapsed onto their class means.

Pure functions of tensors: features `[..., N, D]`, labels `[..., N]`, any leading dimensions (tasks, models). Tasks are
never pooled: class c of one task is unrelated to class c of another. `measure` returns all metrics of all layers in one
call. `measure_features` takes features of your own and returns plain numbers.

    Papyan, Han, Donoho 2020: Prevalence of neural collapse during the terminal phase of deep learning training (NC1-4).
    Galanti, György, Hutter 2021: On the role of neural collapse in transfer learning, arXiv:2112.15121 (CDNV).
    Zhu et al. 2021: A geometric analysis of neural collapse with unconstrained features, NeurIPS 34 (error of the ETF).
    Rangamani et al. 2023: Feature learning in deep classifiers through intermediate neural collapse, ICML (by layer).
    Luthra, Salunkhe, Galanti 2026: Directional neural collapse explains few-shot transfer, arXiv:2603.03530.

Notation: C classes (`n_way`), n = N/C samples per class, mu_c the mean of class c, mu_G the mean of the mu_c,
M the C x D matrix of rows mu_c - mu_G, v_c the mean of ||h - mu_c||^2 in class c,
S_W = 1/N sum (h - mu_c)(h - mu_c)^T, S_B = 1/C sum (mu_c - mu_G)(mu_c - mu_G)^T.

- If D is much larger than N, pure noise looks collapsed by `nc1`, by `etf_error` and by nearest means of the same
  samples. Compare with the same metric of permuted labels (`permuted`). Take the means for NC4 from the support set.
- What depends on spread is nan for one sample per class. A zero denominator gives nan, e.g. when class means are equal.
  A value within rounding error of zero counts as zero; otherwise a dead layer would report noise.
- Labels are 0..C-1 in any order, each equally often; a ValueError if C doesn't divide N. A task with other labels
  (except in the single functions for NC4) or a feature that is not finite gets nan.
- Everything is float64. No D x D matrix is formed. Nothing waits for a GPU, except the svd of a C x C matrix in `nc1`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = Tensor | np.ndarray | Sequence
EPS = torch.finfo(torch.float64).eps


class _Group(NamedTuple):
    """Features sorted into classes. In `measure` they are shifted and projected (`_project`).

    So residuals are complete only in `spread`, their squared length, and along the class means. Of `means` only the
    differences have a meaning.
    """

    residual: Tensor   # [..., N, D] h - mu_c, float64
    one_hot: Tensor    # [..., N, C]
    means: Tensor      # [..., C, D]
    centred: Tensor    # [..., C, D] M; a row that is zero up to rounding is zero
    spread: Tensor     # [..., N] ||h - mu_c||^2
    variances: Tensor  # [..., C] v_c, nan for a class of one sample; their mean over classes is tr S_W
    errors: Tensor     # [..., C] v_c/(n-1), the squared standard error of mu_c
    tolerance: Tensor  # [...] a squared length up to this is zero up to rounding

    @property
    def distances(self) -> Tensor:
        """||mu_i - mu_j||^2 [..., C, C], of the differences: M M^T would lose two close means far from a third."""
        distances = torch.cdist(self.centred, self.centred, compute_mode="donot_use_mm_for_euclid_dist").square()
        return distances.masked_fill(distances <= self.tolerance[..., None, None], 0)


def _one_hot(labels: Tensor, n_way: int) -> Tensor:
    """[..., N] -> [..., N, C] float64; nan for a task that does not have each class equally often."""
    n_samples = labels.shape[-1]
    _require(n_way > 1 and n_samples > 0 and n_samples % n_way == 0,
             f"{n_samples} samples can't be {n_way} classes (2 or more) of equal size")
    one_hot = (labels.unsqueeze(-1) == torch.arange(n_way, device=labels.device)).double()
    balanced = (one_hot.sum(-2) == n_samples // n_way).all(-1)    # an assertion would wait for the device
    return one_hot.where(balanced[..., None, None], math.nan)


def _means(x: Tensor, one_hot: Tensor) -> Tensor:
    """[..., N, D] float64, [..., N, C] -> [..., C, D]."""
    return one_hot.mT @ x / one_hot.sum(-2).unsqueeze(-1)


def _group(features: Tensor, one_hot: Tensor, off_span: Tensor | float = 0.0,
           tolerance: Tensor | None = None) -> _Group:
    """Sorts features [..., N, D] by classes [..., N, C], in few passes: reading N x D numbers is what takes the time.

    Of projected features, off_span [..., N] is the part of ||h - mu_c||^2 outside the projection, and tolerance that of
    the full features.
    """
    n_samples, n_way = one_hot.shape[-2:]
    residual = features.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    means = _means(residual, one_hot)
    residual.view(-1, *residual.shape[-2:]).baddbmm_(one_hot.reshape(-1, n_samples, n_way),
                                                     means.reshape(-1, *means.shape[-2:]), alpha=-1)
    spread = _square_length(residual) + off_span
    if tolerance is None:  # a sum of N rows in float64 is off by at most about N eps times their size
        tolerance = (n_samples * EPS) ** 2 * (spread.mean(-1) + _square_length(means).mean(-1))
    centred = means - means.mean(-2, keepdim=True)
    centred = centred.masked_fill((_square_length(centred) <= tolerance.unsqueeze(-1)).unsqueeze(-1), 0)
    sizes = one_hot.sum(-2)                                   # [..., C]
    variances = (spread.unsqueeze(-2) @ one_hot).squeeze(-2) / sizes
    variances = variances.masked_fill(variances <= tolerance.unsqueeze(-1), 0).where(sizes > 1, math.nan)
    return _Group(residual, one_hot, means, centred, spread, variances, variances / (sizes - 1), tolerance)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _square_length(rows: Tensor) -> Tensor:
    """[..., D] -> [...], without a second tensor of the size of `rows`."""
    return torch.linalg.vector_norm(rows, dim=-1).square()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; nan where the denominator is zero."""
    return numerator / denominator.where(denominator != 0, math.nan)


def _off_diagonal_mean(pairs: Tensor) -> Tensor:
    """Mean over ordered pairs i != j: [..., C, C] -> [...]."""
    n_way = pairs.shape[-1]
    diagonal = torch.eye(n_way, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(diagonal, 0).sum((-2, -1)) / (n_way * (n_way - 1))


def _of_features(metric: Callable) -> Callable:
    """Turns a function of a `_Group` into one of (features, labels, n_way); `measure` calls the former, `of_group`."""
    def of_features(features: Tensor, labels: Tensor, n_way: int) -> Tensor | tuple[Tensor, Tensor]:
        return metric(_group(features, _one_hot(labels, n_way)))
    of_features.__name__, of_features.__doc__, of_features.of_group = metric.__name__, metric.__doc__, metric
    return of_features


# Metrics. Those marked @_of_features are called with (features [..., N, D], labels [..., N], n_way) and return [...].


def class_means(features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """mu_c, the mean of each class: features [..., N, D], labels [..., N] -> [..., C, D]."""
    return _means(features.double(), _one_hot(labels, n_way))


@_of_features
def covariance_traces(group: _Group) -> tuple[Tensor, Tensor]:
    """(tr S_W, tr S_B) of Rangamani et al. 2023: tr S_W is 0 at full collapse, and nan for one sample per class."""
    return group.variances.mean(-1), _square_length(group.centred).mean(-1)


@_of_features
def unbiased_traces(group: _Group) -> tuple[Tensor, Tensor]:
    """The traces (within, between) without the bias of few samples. At full collapse within = 0.

    E tr S_W = t_W (n-1)/n and E tr S_B = t_B + t_W (C-1)/(C n), solved for t_W and t_B. Between can be negative.
    """
    (within, between), error, n_way = covariance_traces.of_group(group), group.errors.mean(-1), group.means.shape[-2]
    return within + error, between - error * (n_way - 1) / n_way   # v n/(n-1) = v + v/(n-1)


def relative_within(within: Tensor, between: Tensor) -> Tensor:
    """within / (within + between): 0 at full collapse; on noise (n-1)/(n-1 + (C-1)/C), of the unbiased traces 1."""
    return _ratio(within.double(), within.double() + between.double())


@_of_features
def nc1(group: _Group) -> Tensor:
    """tr(S_W pinv(S_B)) / C, NC1 of Papyan et al. 2020: 0 at full collapse, and near 0 on noise too if D >> N.

    M = U diag(s) V^T makes it sum_k mean ((h - mu_c) . v_k)^2 / s_k^2. V comes from M itself: M M^T would square its
    condition number. M has rank C-1 at most. Further singular values that are zero up to rounding are left out.
    """
    n_way, n_features = group.centred.shape[-2:]
    rank = min(n_way - 1, n_features)
    finite = group.centred.isfinite().all(-1).all(-1)
    # svd raises on nan, and is fast only on a small matrix: M^T = Q R, R = U' diag(s) V'^T, V = Q U'.
    q, r = torch.linalg.qr(group.centred.where(finite[..., None, None], 0).mT)         # [..., D, C], [..., C, C]
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    directions, s = q @ u[..., :rank], s[..., :rank]                                   # [..., D, C-1], [..., C-1]
    spread = _means((group.residual @ directions).square(), group.one_hot).mean(-2)    # [..., C-1]
    rounding = torch.maximum(EPS * max(n_way, n_features) * s[..., :1], (n_way * group.tolerance).sqrt().unsqueeze(-1))
    kept = s > rounding
    value = (spread / s.where(kept, math.inf).square()).sum(-1)
    return value.where(finite & kept.any(-1) & group.variances.isfinite().all(-1), math.nan)


@_of_features
def cdnv(group: _Group) -> Tensor:
    """Mean over i != j of (v_i + v_j)/(2 ||mu_i - mu_j||^2), Galanti et al. 2021: 0 if collapsed, (n-1)/2 on noise."""
    return _off_diagonal_mean(_ratio(group.variances.unsqueeze(-1), group.distances))


@_of_features
def unbiased_cdnv(group: _Group) -> Tensor:
    """`cdnv` without the bias of few samples, which shorten v and lengthen distances: 0 at full collapse.

    It takes v_i n/(n-1) for v_i and the squared distance minus (v_i + v_j)/(n-1). Nan when one of these is not
    positive, as about half are on noise.
    """
    distances = group.distances - group.errors.unsqueeze(-1) - group.errors.unsqueeze(-2)
    positive = distances > group.one_hot.shape[-2] * EPS * group.distances  # beyond rounding
    return _off_diagonal_mean((group.variances + group.errors).unsqueeze(-1) / distances.where(positive, math.nan))


@_of_features
def directional_cdnv(group: _Group) -> Tensor:
    """CDNV along the lines between means, Luthra et al. 2026: 0 at full collapse, (n-1)/(2(D-2)) on noise.

    Mean over i != j of (a_ij + a_ji) / (2 ||mu_i - mu_j||^2), a_ij the mean over class i of ((h - mu_i) . u_ij)^2,
    u_ij the unit vector from mu_j to mu_i; averaged over ordered pairs as in the authors' code.
    """
    along = group.residual @ group.centred.mT                              # [..., N, C] (h - mu_i) . M_j
    own = (along * group.one_hot).sum(-1, keepdim=True)                    # [..., N, 1] (h - mu_i) . M_i
    spread = _means((own - along).square(), group.one_hot)                 # [..., C, C] a_ij ||mu_i - mu_j||^2
    spread = spread.where(group.variances.isfinite().unsqueeze(-1), math.nan)
    return _off_diagonal_mean(_ratio(_ratio(spread, group.distances), group.distances))


def effective_dimension(means: Tensor) -> Tensor:
    """(tr S)^2 / tr S^2, S the covariance of class means [..., C, D]: participation ratio [...], 1 to min(C-1, D).

    For the means of a few hundred classes, not of one task. NC2 is compared with random directions in that dimension.
    """
    n_way = means.shape[-2]
    centred = _group(means, torch.eye(n_way, device=means.device).double().expand(*means.shape[:-1], n_way)).centred
    gram = centred @ centred.mT                               # [..., C, C], with the nonzero eigenvalues of C S
    return _ratio(gram.diagonal(dim1=-2, dim2=-1).sum(-1).square(), gram.square().sum((-2, -1)))


@_of_features
def equinorm(group: _Group) -> Tensor:
    """std_c ||M_c|| / mean_c ||M_c|| (population std), NC2 of Papyan et al. 2020: 0 at full collapse."""
    norms = torch.linalg.vector_norm(group.centred, dim=-1)   # [..., C]
    return _ratio(norms.std(-1, correction=0), norms.mean(-1))


@_of_features
def equiangularity(group: _Group) -> Tensor:
    """Mean over i != j of |cos(M_i, M_j) + 1/(C-1)|, NC2 of Papyan et al. 2020: 0 at full collapse."""
    unit = _ratio(group.centred, torch.linalg.vector_norm(group.centred, dim=-1, keepdim=True))
    return _off_diagonal_mean((unit @ unit.mT + 1 / (unit.shape[-2] - 1)).abs())


@_of_features
def etf_error(group: _Group) -> Tensor:
    """|| M M^T/||M M^T||_F - (I - 11^T/C)/sqrt(C-1) ||_F: 0 at full collapse, and near 0 on noise too if D >> N.

    NC2 as one number: the measure of Zhu et al. 2021 for the weights of a classifier, here of the class means.
    """
    n_way = group.centred.shape[-2]
    gram = group.centred @ group.centred.mT                   # [..., C, C]
    etf = (torch.eye(n_way, dtype=gram.dtype, device=gram.device) - 1 / n_way) / math.sqrt(n_way - 1)
    return torch.linalg.matrix_norm(_ratio(gram, torch.linalg.matrix_norm(gram, keepdim=True)) - etf)


def self_duality(weight: Tensor, features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """|| W/||W||_F - M/||M||_F ||_F^2, NC3 of Papyan et al. 2020: 0 at full collapse, 2 if unrelated.

    weight [..., C, D] are the rows of the classifier, features [..., N, D] its input, labels [..., N]; -> [...].
    """
    return _self_duality(weight.double(), _group(features, _one_hot(labels, n_way)).centred)


def _self_duality(weight: Tensor, centred: Tensor) -> Tensor:
    weight, means = (_ratio(x, torch.linalg.matrix_norm(x, keepdim=True)) for x in (weight, centred))
    return torch.linalg.matrix_norm(weight - means).square()


def ncc_mismatch(logits: Tensor, features: Tensor, labels: Tensor, n_way: int, means: Tensor) -> Tensor:
    """Share of samples whose largest logit is not that of the nearest class mean, NC4 of Papyan et al. 2020.

    logits [..., N, C], features [..., N, D], means [..., C, D] (of the support set); -> [...]. 0 at full collapse.
    The labels [..., N] have no effect.
    """
    _require(logits.shape[-1] == means.shape[-2] == n_way,
             f"{logits.shape[-1]} logits and {means.shape[-2]} means for {n_way} classes")
    nearest, finite = _nearest(features, means)
    return (logits.argmax(-1) != nearest).double().where(finite & logits.isfinite().all(-1), math.nan).mean(-1)


def ncc_accuracy(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Share of samples nearest to the mean of their own class, NC4 layer by layer in Rangamani et al. 2023.

    features [..., N, D], labels [..., N], means [..., C, D] (of the support set); -> [...]. 1 at full collapse.
    """
    nearest, finite = _nearest(features, means)
    return (nearest == labels).double().where(finite, math.nan).mean(-1)


def _nearest(features: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest mean: [..., N, D], [..., C, D] -> (class, whether distances are finite), both [..., N].

    ||h - mu_c||^2 is least where (h - g) . (mu_c - g) - ||mu_c - g||^2 / 2 is greatest, for any g.
    """
    origin = means.double().mean(-2, keepdim=True)            # [..., 1, D] g: a large common offset costs no digits
    centred = means - origin
    offset = origin @ centred.mT + _square_length(centred).unsqueeze(-2) / 2   # [..., 1, C]
    scores = features.double() @ centred.mT - offset
    return scores.argmax(-1), scores.isfinite().all(-1)


def original_traces(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The traces as the original code computed them, to compare: logits [..., N, C] -> (within [...], between [...]).

    It compares the rows of class k (rows are grouped by class) with the mean of the k-th five rows, ignoring the
    labels. Nan with fewer than five rows per class.
    """
    x, (n_samples, n_way) = logits.double(), logits.shape[-2:]
    if n_samples < 5 * n_way:
        return (torch.full_like(x[..., 0, 0], math.nan),) * 2
    means = x[..., :5 * n_way, :].unflatten(-2, (n_way, 5)).mean(-2)                        # [..., C, C]
    residual = x.unflatten(-2, (n_way, n_samples // n_way)) - means.unsqueeze(-2)           # [..., C, n, C]
    return _square_length(residual).mean((-2, -1)), _square_length(means - x.mean(-2, keepdim=True)).mean(-1)


def permuted(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The labels [..., N] of each task in a random order of its own, for the null. The generator may be on the CPU."""
    order = torch.rand(labels.shape, generator=generator, device=generator.device).argsort(-1)
    return labels.gather(-1, order.to(labels.device))


def mean_and_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tasks and its standard error: values [T, ...] -> (mean [...], error [...]). A nan makes both nan.

    The error is the sample standard deviation over sqrt(T), nan for a single task.
    """
    values = values.double()
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), error


METRICS = {"nc1": nc1, "cdnv": cdnv, "cdnv_unbiased": unbiased_cdnv, "directional_cdnv": directional_cdnv,
           "equinorm": equinorm, "equiangularity": equiangularity, "etf_error": etf_error}


def _metrics_of_group(group: _Group) -> dict[str, Tensor]:
    """All metrics of features and labels alone; `_Group` says what of a residual a metric may use."""
    values = {}
    for suffix, traces in ("", covariance_traces), ("_unbiased", unbiased_traces):
        within, between = traces.of_group(group)
        values |= {f"within{suffix}": within, f"between{suffix}": between,
                   f"relative_within{suffix}": relative_within(within, between)}
    return values | {name: metric.of_group(group) for name, metric in METRICS.items()}


@torch.no_grad()
def measure(features: list[Tensor], labels: Tensor, support_features: list[Tensor], support_labels: Tensor, n_way: int,
            classifier_weight: Tensor, null_labels: Tensor, null_support_labels: Tensor) -> dict[str, Tensor]:
    """All metrics of all L layers: each entry is [L, ...], float64, one row per layer.

    Args:
        features, labels: of the query set, one [..., N, D_l] per layer, the last the logits [..., N, C]; [..., N].
        support_features, support_labels: the same of the support set, which gives the class means for NC4.
        classifier_weight: [..., C, D] for the D of the last hidden layer, the input of the classifier.
        null_labels, null_support_labels: `permuted` labels, for the null of each metric, NAME_null.

    ncc_mismatch compares the nearest mean at each layer with the logits of the network. self_duality is nan except
    for the last hidden layer, within_original and between_original (`original_traces`) except for the logits.
    """
    weight = classifier_weight.expand(*labels.shape[:-1], *classifier_weight.shape[-2:])
    layers = [_project(n_way, query, labels, null_labels, support, support_labels, null_support_labels,
                       weight if layer == len(features) - 2 else None)
              for layer, (query, support) in enumerate(zip(features, support_features, strict=True))]
    samples, off_span, references, tolerance = map(torch.stack, zip(*layers))
    *_, support_means, null_support_means, weight = references.split(n_way, -2)
    means = torch.stack([support_means, null_support_means])
    samples = samples.expand(2, *samples.shape)                            # [2, L, ..., N, 5 C]: labels, then null
    labels = torch.stack([labels, null_labels]).unsqueeze(1)               # [2, 1, ..., N]
    group = _group(samples, _one_hot(labels, n_way).expand(*samples.shape[:-1], n_way), off_span, tolerance)
    values = {**_metrics_of_group(group), "self_duality": _self_duality(weight, group.centred),
              "ncc_accuracy": ncc_accuracy(samples, labels, means),
              "ncc_mismatch": ncc_mismatch(features[-1], samples, labels, n_way, means)}
    table = {name + suffix: value[kind] for name, value in values.items() for kind, suffix in enumerate(("", "_null"))}
    for name, trace in zip(("within_original", "between_original"), original_traces(features[-1])):
        table[name] = torch.full_like(table["within"], math.nan)
        table[name][-1] = trace
    return table


def _project(n_way: int, features: Tensor, labels: Tensor, null_labels: Tensor, support_features: Tensor,
             support_labels: Tensor, null_support_labels: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Projects a layer onto the span of all class means and classifier rows, in 5 C coordinates.

    This preserves distances and angles, hence all metrics. The part outside the span is kept as a squared length.

    Returns:
        Samples [..., N, 5 C]; their squared length outside the span [..., N]; five times C rows [..., 5 C, 5 C]: class
        means, null, support, its null, classifier (zeros if there is none: self_duality is nan); tolerance [...].
    """
    one_hot, null_one_hot = _one_hot(labels, n_way), _one_hot(null_labels, n_way)
    group, support = _group(features, one_hot), support_features.double()
    origin = group.means.mean(-2, keepdim=True)
    references = [group.centred, _means(group.residual, null_one_hot) + _means(one_hot, null_one_hot) @ group.centred,
                  *(_means(support, _one_hot(y, n_way)) - origin for y in (support_labels, null_support_labels)),
                  *([] if weight is None else [weight.double()])]
    basis, references = torch.linalg.qr(torch.cat(references, -2).mT)      # [..., D, R], [..., R, 4 or 5 C]
    residual, references = group.residual @ basis, references.mT           # [..., N, R]
    rows, columns = (5 * n_way - size for size in references.shape[-2:])     # missing: all layers get the same size
    samples = F.pad(residual + one_hot @ references[..., :n_way, :], (0, columns))
    off_span = (group.spread - _square_length(residual)).clamp_min(0)
    return samples, off_span, F.pad(references, (0, columns, 0, rows)), group.tolerance


@torch.no_grad()
def measure_features(features: Array, labels: Array, *, classifier_weight: Array = None, logits: Array = None,
                     support_features: Array = None, support_labels: Array = None) -> dict[str, float]:
    """All metrics of your own features, as plain numbers; ValueError for what cannot be measured.

        import numpy as np
        from nc_metrics import measure_features
        values = measure_features(np.load("features.npy"), np.load("labels.npy"))
        print(values["relative_within"], values["nc1"], values["directional_cdnv"])

    Args:
        features: [N, D] or [N, C, H, W], which is flattened.
        labels: one number, string or row (one-hot, or a tuple) per sample. Classes are in sorted order (strings of
            whole numbers from 0 as numbers), each of two samples or more: S_W and S_B are means over classes. Permuted
            labels give the null.
        classifier_weight: [C, D], the rows of the classifier that takes the features; adds self_duality (NC3).
        logits: [N, C], of the same samples; adds ncc_mismatch (NC4). Needs the support set.
        support_features, support_labels: other samples, e.g. the training set, of any number per class. They give the
            class means for NC4 and add ncc_accuracy.

    cdnv_unbiased alone can be nan, with a warning: near noise, two means may be no farther apart than by chance.
    """
    x = _rows("features", features)
    classes, index = _classes("labels", labels, len(x))
    n_way, sizes = len(classes), index.bincount()
    _require(n_way > 1, "labels hold a single class; at least two are needed")
    _require(sizes.min() > 1, f"class {classes[sizes.argmin()]} has one sample and thus no spread; leave it out")
    _require((support_features is None) == (support_labels is None), "support features and labels need each other")
    _require(logits is None or support_labels is not None, "logits need class means: give a support set")
    group = _group(x, F.one_hot(index, n_way).double())
    values = _metrics_of_group(group)
    if classifier_weight is not None:
        weight = _rows("classifier_weight", classifier_weight, n_way, x.shape[1])
        values["self_duality"] = _self_duality(weight, group.centred)
    if support_labels is not None:
        support = _rows("support_features", support_features, n_columns=x.shape[1])
        support_classes, support_index = _classes("support_labels", support_labels, len(support))
        _require(np.array_equal(classes, support_classes), "support_labels have other classes than labels")
        means = _means(support, F.one_hot(support_index, n_way).double())
        values["ncc_accuracy"] = ncc_accuracy(x, index, means)
        if logits is not None:
            values["ncc_mismatch"] = ncc_mismatch(_rows("logits", logits, len(x), n_way), x, index, n_way, means)
    undefined = {name for name, value in values.items() if not value.isfinite()}
    _require(undefined <= {"cdnv_unbiased"}, f"{', '.join(sorted(undefined))}: division by zero. Class means are equal "
             "to each other or to the mean of all, or the classifier is zero, or squares overflow or underflow")
    if undefined:
        warnings.warn("cdnv_unbiased is nan: two class means are no farther apart than by chance", stacklevel=3)
    return {name: value.item() for name, value in values.items()}


def _rows(name: str, x: Array, n_rows: int = 0, n_columns: int = 0) -> Tensor:
    """Any array of finite numbers -> [N, D] float64 on the CPU."""
    x = x.detach().cpu().double() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, np.float64, order="C"))
    _require(x.ndim > 1 and x.numel() > 0, f"{name} must be [N, D] or [N, C, H, W], not {list(x.shape)}")
    x = x.flatten(1)
    wanted = [n_rows or len(x), n_columns or x.shape[1]]
    _require(list(x.shape) == wanted, f"{name} must be {wanted}, not {list(x.shape)}")
    _require(x.isfinite().all(), f"{name} must be finite; row {x.isfinite().all(1).int().argmin()} is not")
    return x


def _classes(name: str, labels: Array, n_samples: int) -> tuple[np.ndarray, Tensor]:
    """The classes in sorted order, and the index of the class of each sample [N]."""
    y = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    _require(y.ndim > 0 and len(y) == n_samples, f"{name}: {y.shape[:1]} for {n_samples} samples")
    y = y.reshape(n_samples, -1)
    _require(all(value is not None and value == value for value in y.flat), f"{name} hold None or nan")
    if y.dtype.kind in "biuf" and y.shape[1] > 1 and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all():
        y = y.argmax(1)[:, None]   # one-hot: rows in sorted order would reverse the classes
    y = y[:, 0] if y.shape[1] == 1 else y.astype(str) if y.dtype == object else y
    if y.ndim == 1 and all(isinstance(value, str) and value.isdecimal() and value == str(int(value)) for value in y):
        y = np.array(list(map(int, y)), dtype=object)  # "10" comes after "2", as the classifier's rows do
    try:
        classes, index = np.unique(y, axis=None if y.ndim == 1 else 0, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"{name} can't be sorted: {error}") from error
    return classes, torch.from_numpy(index.reshape(-1))
