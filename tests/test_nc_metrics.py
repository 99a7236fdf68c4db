"""nc_metrics against a brute-force oracle, and each of its traps.

The oracle is numpy, one task at a time, with loops and D x D matrices. It shares nothing with the module.
"""

import itertools
import math
import textwrap

import numpy as np
import pytest
import torch

import nc_metrics as nc

LEADING = [(), (4,), (2, 3)]
DTYPES = [torch.float32, torch.float64]
KEYS = ["within", "between", "relative_within", "within_unbiased", "between_unbiased", "relative_within_unbiased",
        "nc1", "cdnv", "cdnv_unbiased", "directional_cdnv", "equinorm", "equiangularity", "etf_error", "self_duality",
        "ncc_accuracy", "ncc_mismatch"]


# ---- the oracle: one task, h [N, D], y [N] ----

def oracle(h, y, c, weight=None, logits=None, means=None):
    """Every metric by name, classes of any size; means, for NC4, of the support set."""
    rows = [[row for row, label in zip(h, y) if label == k] for k in range(c)]
    n, mu, pairs = [len(own) for own in rows], np.array([sum(own) / len(own) for own in rows]), {}
    m = mu - mu.mean(0)
    s_w = sum(np.outer(row - mu[k], row - mu[k]) / n[k] for k in range(c) for row in rows[k]) / c
    s_b = sum(np.outer(row, row) for row in m) / c
    v = [sum(np.sum((row - mu[k]) ** 2) for row in rows[k]) / n[k] for k in range(c)]
    true = [v[k] * n[k] / (n[k] - 1) if n[k] > 1 else math.nan for k in range(c)]
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
    found = {
        "means": mu, "within": within, "between": between, "relative_within": within / (within + between),
        "within_unbiased": unbiased[0], "between_unbiased": unbiased[1],
        "relative_within_unbiased": unbiased[0] / sum(unbiased),
        "nc1": np.trace(s_w @ np.linalg.pinv(s_b, rcond=1e-10, hermitian=True)) / c,
        "cdnv": cdnv, "cdnv_unbiased": unbiased_cdnv, "directional_cdnv": directional,
        "equinorm": np.std(norms) / np.mean(norms), "equiangularity": equiangularity,
        "etf_error": np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(c) - np.ones((c, c)) / c) / math.sqrt(c - 1))}
    if weight is not None:
        nearest = np.array([np.argmin([np.sum((row - mean) ** 2) for mean in means]) for row in h])
        found |= {"self_duality": np.sum((weight / np.linalg.norm(weight) - m / np.linalg.norm(m)) ** 2),
                  "ncc_accuracy": np.mean(nearest == y), "ncc_mismatch": np.mean(np.argmax(logits, axis=1) != nearest)}
    return found


def picked(*names):
    return lambda h, y, c: tuple(oracle(h, y, c)[name] for name in names)


SINGLE = [   # metrics of (features, labels, n_way)
    (nc.class_means, picked("means")), (nc.covariance_traces, picked("within", "between")),
    (nc.unbiased_traces, picked("within_unbiased", "between_unbiased")), (nc.nc1, picked("nc1")),
    (nc.cdnv, picked("cdnv")), (nc.unbiased_cdnv, picked("cdnv_unbiased")),
    (nc.directional_cdnv, picked("directional_cdnv")), (nc.equinorm, picked("equinorm")),
    (nc.equiangularity, picked("equiangularity")), (nc.etf_error, picked("etf_error")),
]
SPREAD = [nc.nc1, nc.cdnv, nc.unbiased_cdnv, nc.directional_cdnv]   # 0 at full collapse, nan for one sample per class
single = pytest.mark.parametrize("metric, oracle", SINGLE, ids=[metric.__name__ for metric, _ in SINGLE])


# ---- material ----

def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_labels(leading, n_way, n, seed=0):
    """Each class n times, in an order of its own in every task."""
    rows = torch.arange(n_way).repeat_interleave(n).expand(*leading, n_way * n)
    return nc.permuted(rows.contiguous(), generator(seed + 1000))


def random_features(labels, n_way, n_features, seed=0, spread=1.0, dtype=torch.float64):
    """Classes around random means, off the origin, more spread in some directions than in others."""
    g = generator(seed)
    leading = labels.shape[:-1]
    means = 3 + torch.randn(*leading, n_way, n_features, generator=g, dtype=torch.float64)
    noise = torch.randn(*labels.shape, n_features, generator=g, dtype=torch.float64)
    noise = noise * torch.linspace(0.2, 2, n_features, dtype=torch.float64)
    own = means.gather(-2, labels.unsqueeze(-1).expand(*labels.shape, n_features))
    return (own + spread * noise).to(dtype)


def simplex(n_way, n_features, seed=0):
    """A simplex ETF around the origin, in a random direction: [C, D]."""
    g = generator(seed)
    basis, _ = torch.linalg.qr(torch.randn(n_features, n_way, generator=g, dtype=torch.float64))
    return (torch.eye(n_way, dtype=torch.float64) - 1 / n_way) @ basis.T


def assert_like(values, leading, expected, rtol=1e-9, atol=1e-11):
    """`expected(index)` is what the task at `index` should give; values may be a tuple, as traces are."""
    for task in itertools.product(*map(range, leading)):
        for value, want in zip(as_tuple(values), as_tuple(expected(task)), strict=True):
            assert value.dtype == torch.float64
            assert value.shape[:len(leading)] == leading
            np.testing.assert_allclose(value[task].numpy(), want, rtol=rtol, atol=atol)


def as_tuple(values):
    return values if isinstance(values, tuple) else (values,)


def array(tensor):
    return tensor.double().numpy()


# ---- every function against the oracle ----

@pytest.mark.parametrize("n_way, n, n_features", [(5, 4, 9), (3, 6, 12), (5, 3, 3), (2, 5, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
@single
def test_oracle(metric, oracle, leading, dtype, n_way, n, n_features):
    labels = random_labels(leading, n_way, n)
    features = random_features(labels, n_way, n_features, dtype=dtype)
    assert_like(metric(features, labels, n_way), leading,
                lambda task: oracle(array(features[task]), labels[task].numpy(), n_way))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
def test_oracle_nc3_and_nc4(leading, dtype):
    n_way, n, d = 5, 4, 9
    labels, support_labels = random_labels(leading, n_way, n), random_labels(leading, n_way, 2, seed=1)
    features = random_features(labels, n_way, d, spread=2, dtype=dtype)
    # With the seed of the features, so that support and query share their class means.
    support = random_features(support_labels, n_way, d, spread=2, dtype=dtype)
    g = generator(3)
    weight = torch.randn(*leading, n_way, d, generator=g).to(dtype)
    logits = torch.randn(*leading, n_way * n, n_way, generator=g).to(dtype)
    means = nc.class_means(support, support_labels, n_way)

    shared = weight[(0,) * len(leading)]   # one classifier for all tasks, as the meta model has it

    def expected(name, w=weight):
        return lambda t: oracle(array(features[t]), labels[t].numpy(), n_way, array(w.expand(*leading, n_way, d)[t]),
                                array(logits[t]), array(means[t]))[name]
    for name, value in {"self_duality": nc.self_duality(weight, features, labels, n_way),
                        "ncc_accuracy": nc.ncc_accuracy(features, labels, means),
                        "ncc_mismatch": nc.ncc_mismatch(logits, features, labels, n_way, means),
                        "relative_within": nc.relative_within(*nc.covariance_traces(features, labels, n_way))}.items():
        assert_like(value, leading, expected(name))
    assert_like(nc.self_duality(shared, features, labels, n_way), leading, expected("self_duality", shared))
    assert 0.2 < nc.ncc_accuracy(features, labels, means).mean() < 1   # neither trivially right nor wrong


# ---- precision ----

def test_within_is_not_a_difference_of_squares():
    """Spread of 1e-6 around means of size 1e3: squared, 1e-12 next to 1e6 is lost in float64."""
    labels = random_labels((2,), 5, 15)
    noise = 1e-6 * torch.randn(2, 75, 30, generator=generator(), dtype=torch.float64)
    means = 1e3 * torch.randn(5, 30, generator=generator(1), dtype=torch.float64)
    features = means[labels] + noise
    noise = features - means[labels]   # what is left of it after rounding
    within, _ = nc.covariance_traces(features, labels, 5)
    assert_like(within, (2,), lambda t: oracle(array(noise[t]), labels[t].numpy(), 5)["within"], rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_is_accumulated_in_float64(dtype):
    """A large offset that all samples share, exact in both dtypes, changes nothing."""
    labels = random_labels((), 5, 15)
    features = (random_features(labels, 5, 40) * 64).round() / 64   # offset and features fit into 24 bits
    offset = 2.0 ** 14
    for metric, _ in SINGLE[1:]:
        for near, far in zip(as_tuple(metric(features.to(dtype), labels, 5)),
                             as_tuple(metric((features + offset).to(dtype), labels, 5))):
            torch.testing.assert_close(near, far, rtol=1e-8, atol=0)


def test_close_means_far_from_a_third():
    """Means a million times closer in one direction than in another: M M^T would keep 4 digits, not 9."""
    labels = random_labels((), 3, 6)
    means = torch.zeros(3, 8, dtype=torch.float64)
    means[0, 0], means[1, 1] = 1, 1e-6
    noise = 1e-6 * torch.randn(18, 8, generator=generator(), dtype=torch.float64)
    noise -= nc.class_means(noise, labels, 3)[labels]
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator(1), dtype=torch.float64))
    features = (means[labels] + noise) @ rotation
    expected = np.sum((array(noise) @ np.linalg.pinv(array(means - means.mean(0)))) ** 2) / 18
    np.testing.assert_allclose(nc.nc1(features, labels, 3), expected, rtol=1e-7)
    for metric, same in SINGLE[4:7]:
        assert_like(metric(features, labels, 3), (), lambda _, f=same: f(array(features), labels.numpy(), 3), rtol=1e-8)


@pytest.mark.parametrize("directions", [1, 2, 3])
def test_nc1_of_means_that_span_fewer_directions_is_that_of_pinv(directions):
    labels = random_labels((2,), 5, 6)
    coordinates = torch.randn(2, 5, directions, generator=generator(), dtype=torch.float64)
    basis = torch.randn(directions, 9, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(2, 30, 9, generator=generator(2), dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    noise = noise - one_hot @ (one_hot.mT @ noise) / 6
    features = one_hot @ (7 + coordinates @ basis) + noise
    assert_like(nc.nc1(features, labels, 5), (2,),
                lambda t: oracle(array(features[t]), labels[t].numpy(), 5)["nc1"], rtol=1e-8)


def test_wide_features_need_no_square_matrix():
    """At D = 53,792, the first miniImageNet layer, D x D would be 23 GB."""
    labels = random_labels((), 5, 2)
    features = torch.randn(10, 53792, generator=generator())
    values = [as_tuple(metric(features, labels, 5)) for metric, _ in SINGLE]
    assert sum(not value.isfinite() for value in itertools.chain(*values) if value.ndim == 0) <= 1   # unbiased_cdnv


# ---- traps ----

def test_noise_looks_collapsed_to_three_of_them():
    n_way, n, n_tasks = 5, 15, 40
    labels = random_labels((n_tasks,), n_way, n)
    features = torch.randn(n_tasks, 75, 800, generator=generator())
    within, between = nc.covariance_traces(features, labels, n_way)
    own_means = nc.class_means(features, labels, n_way)
    other_means = nc.class_means(torch.randn(n_tasks, 75, 800, generator=generator(1)), labels, n_way)

    assert nc.relative_within(within, between).mean().item() == pytest.approx(14 / 14.8, abs=0.001)   # 0.946
    assert (within / between).mean().item() == pytest.approx(17.5, abs=0.2)
    assert nc.cdnv(features, labels, n_way).mean().item() == pytest.approx(7, abs=0.1)
    assert nc.directional_cdnv(features, labels, n_way).mean().item() == pytest.approx(14 / (2 * 798), rel=0.05)
    assert nc.unbiased_cdnv(features, labels, n_way).isnan().double().mean() > 0.9   # means nearer than by chance
    assert nc.nc1(features, labels, n_way).mean().item() == pytest.approx(0.07, abs=0.005)
    assert nc.etf_error(features, labels, n_way).mean().item() == pytest.approx(0.07, abs=0.01)
    assert nc.ncc_accuracy(features, labels, own_means).mean().item() == pytest.approx(1, abs=0.002)
    weight = torch.randn(n_tasks, 5, 800, generator=generator(5))
    assert nc.self_duality(weight, features, labels, n_way).mean().item() == pytest.approx(2, abs=0.02)
    unbiased = nc.unbiased_traces(features, labels, n_way)[1]   # 0 on average; what is negative is kept
    assert 0.2 < (unbiased < 0).double().mean() < 0.8 and abs(unbiased.mean()) < 1
    # Which is why the means come from other rows, and why there is a null.
    assert nc.ncc_accuracy(features, labels, other_means).mean().item() == pytest.approx(0.2, abs=0.03)
    null = nc.permuted(labels, generator(2))
    assert nc.nc1(features, null, n_way).mean().item() == pytest.approx(0.07, abs=0.005)
    assert nc.etf_error(features, null, n_way).mean().item() == pytest.approx(0.07, abs=0.01)


@pytest.mark.parametrize("leading", LEADING)
def test_one_sample_a_class_has_no_spread(leading):
    labels = random_labels(leading, 5, 1)
    features = random_features(labels, 5, 9)
    within, between = nc.covariance_traces(features, labels, 5)
    unbiased_within, unbiased_between = nc.unbiased_traces(features, labels, 5)
    for value in (within, unbiased_within, unbiased_between, nc.relative_within(within, between),
                  *(metric(features, labels, 5) for metric in SPREAD)):
        assert value.shape == leading and value.isnan().all()
    for value in (between, nc.equinorm(features, labels, 5), nc.equiangularity(features, labels, 5),
                  nc.etf_error(features, labels, 5)):
        assert value.shape == leading and value.isfinite().all()
    assert_like(between, leading, lambda t: oracle(array(features[t]), labels[t].numpy(), 5)["between"])


def test_unbiased_traces_are_unbiased():
    n_way, n, d, n_tasks = 5, 3, 6, 20_000
    labels = random_labels((n_tasks,), n_way, n)
    means = torch.randn(n_way, d, generator=generator(), dtype=torch.float64)
    noise = torch.randn(n_tasks, n_way * n, d, generator=generator(1), dtype=torch.float64)
    features = means[labels] + 1.5 * noise
    true_within = d * 1.5 ** 2
    true_between = (means - means.mean(0)).square().sum(-1).mean().item()
    for value, truth, is_biased in zip(
            nc.unbiased_traces(features, labels, n_way) + nc.covariance_traces(features, labels, n_way),
            (true_within, true_between) * 2, (False, False, True, True)):
        mean, error = nc.mean_and_se(value)
        assert (abs(mean - truth) > 4 * error).item() == is_biased


def test_unbiased_cdnv_is_less_biased():
    """Of many samples cdnv is right; of 4 it is half of that, and the corrected one is not."""
    labels, few = random_labels((1,), 3, 3000), random_labels((3000,), 3, 4)
    features, small = (m + torch.randn(*y.shape, 300, generator=generator()) for y, m in (
        (y, (0.9 * simplex(3, 300))[y] * 16) for y in (labels, few)))
    truth = nc.cdnv(features, labels, 3).item()
    assert nc.unbiased_cdnv(features, labels, 3).item() == pytest.approx(truth, rel=0.01)
    assert nc.unbiased_cdnv(small, few, 3).mean().item() == pytest.approx(truth, rel=0.05)
    assert nc.cdnv(small, few, 3).mean().item() < 0.6 * truth


@pytest.mark.parametrize("leading", LEADING)
def test_effective_dimension(leading):
    means = 3 + torch.randn(*leading, 12, 7, generator=generator()) * torch.linspace(0.1, 2, 7)

    def oracle(task):
        eigenvalues = np.linalg.eigvalsh(np.cov(array(means[task]).T))
        return eigenvalues.sum() ** 2 / (eigenvalues ** 2).sum()
    assert_like(nc.effective_dimension(means), leading, oracle)
    order = torch.randperm(12, generator=generator(1))
    torch.testing.assert_close(nc.effective_dimension(means[..., order, :]), nc.effective_dimension(means))


def test_effective_dimension_of_known_means():
    assert nc.effective_dimension(2 + simplex(5, 40)).item() == pytest.approx(4)   # a simplex fills C-1 directions
    assert nc.effective_dimension(torch.arange(5.0)[:, None].expand(5, 3)).item() == pytest.approx(1)   # a line
    random = torch.randn(3000, 20, generator=generator())
    assert nc.effective_dimension(random).item() == pytest.approx(20, rel=0.02)
    assert nc.effective_dimension(torch.full((2, 7, 3), 0.1)).isnan().all()   # a dead layer
    wide = torch.randn(5, 500_000, generator=generator())   # D x D would be 2 TB
    assert nc.effective_dimension(wide).item() == pytest.approx(4, abs=0.01)


def test_full_collapse():
    """On a simplex, off the origin, its classes interleaved, in float32: the values of the table."""
    n_way, d = 5, 40
    labels = torch.arange(n_way).repeat(15)[None]
    m = simplex(n_way, d)
    features = (2 + m)[labels].float()
    within, between = nc.covariance_traces(features, labels, n_way)
    unbiased_within, unbiased_between = nc.unbiased_traces(features, labels, n_way)
    means = nc.class_means(features, labels, n_way)
    assert within == 0 and unbiased_within == 0
    torch.testing.assert_close(between, m.square().sum(-1).mean()[None], rtol=1e-6, atol=0)
    assert torch.equal(between, unbiased_between)
    for value in (nc.relative_within(within, between), nc.relative_within(unbiased_within, unbiased_between),
                  *(metric(features, labels, n_way) for metric in SPREAD)):
        assert 0 <= value < 1e-20
    for value in (nc.equinorm(features, labels, n_way), nc.equiangularity(features, labels, n_way),
                  nc.etf_error(features, labels, n_way), nc.self_duality(3 * m, features, labels, n_way)):
        assert 0 <= value < 1e-5   # the simplex itself is rounded to float32
    assert nc.ncc_accuracy(features, labels, means) == 1
    logits = (features - 2) @ m.T.float()
    assert nc.ncc_mismatch(logits, features, labels, n_way, means) == 0


def original_traces(features):
    """What the original computes: means of consecutive groups of five rows, as many as there are features,
    and class k is compared with the k-th of them, whatever the labels. Rows lie class after class."""
    n_samples, c = len(features), len(features[0])   # C is taken to be the feature dimension
    means = [sum(features[5 * k:5 * k + 5]) / 5 for k in range(c)]
    grand = sum(features) / n_samples
    n = n_samples // c
    within = sum(np.sum((row - means[i // n]) ** 2) for i, row in enumerate(features)) / n_samples
    between = sum(np.sum((mean - grand) ** 2) for mean in means) / c
    return within, between


def test_the_original_s_traces():
    logits = torch.randn(3, 4, 75, 5, generator=generator())
    flat = [original_traces(array(task)) for task in logits.flatten(0, 1)]
    for value, expected in zip(nc.original_traces(logits), zip(*flat), strict=True):
        np.testing.assert_allclose(array(value).flatten(), expected, rtol=1e-12)
    assert all(value.isnan().all() and value.shape == (3, 4) for value in nc.original_traces(logits[..., :20, :]))
    a = measure_arguments((4,), n=15)
    table = nc.measure(**a)
    for name, value in zip(("within_original", "between_original"), nc.original_traces(a["features"][-1])):
        assert torch.equal(table[name][-1], value) and table[name][:-1].isnan().all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5 / 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dead_layer_has_no_quotients(dtype, value):
    """All rows the same; not only zeros, whose sums are exact."""
    labels = random_labels((3,), 5, 15)
    features = torch.full((3, 75, 11), value, dtype=dtype)
    within, between = nc.covariance_traces(features, labels, 5)
    assert (within == 0).all() and (between == 0).all()
    unbiased = nc.unbiased_traces(features, labels, 5)
    assert all((trace == 0).all() for trace in unbiased)
    for quotient in (nc.relative_within(within, between), nc.relative_within(*unbiased),
                     *(metric(features, labels, 5) for metric, _ in SINGLE[3:]),
                     nc.self_duality(torch.ones(5, 11), features, labels, 5)):
        assert quotient.shape == (3,) and quotient.isnan().all()


def test_collapsed_means_have_no_quotients():
    """Spread within the classes, but all classes have the same mean: each sample has its opposite."""
    labels = torch.arange(5).repeat(14)
    half = torch.randn(35, 11, generator=generator(), dtype=torch.float64) / 3
    features = torch.cat([0.3 + half, 0.3 - half])
    within, between = nc.covariance_traces(features, labels, 5)
    assert between == 0 and within > 0 and nc.relative_within(within, between) == 1
    for metric, _ in SINGLE[3:]:
        assert metric(features, labels, 5).isnan()
    assert nc.self_duality(torch.ones(5, 11), features, labels, 5).isnan()


def test_two_equal_class_means():
    """Equal but for the rounding of their sums: cdnv has no distance to divide by, the others do."""
    labels = torch.arange(5).repeat(6)
    means = torch.randn(5, 9, generator=generator(), dtype=torch.float64)
    means[1] = means[0]
    noise = torch.randn(15, 9, generator=generator(1), dtype=torch.float64)
    features = means[labels] + torch.cat([noise, -noise])
    assert all(metric(features, labels, 5).isnan() == (metric in SPREAD[1:]) for metric, _ in SINGLE[3:])
    assert_like(nc.nc1(features, labels, 5), (), lambda t: oracle(array(features), labels.numpy(), 5)["nc1"])


def test_other_zero_denominators():
    zero, one = torch.zeros(2), torch.ones(2)
    assert nc.relative_within(zero, zero).isnan().all()
    assert nc.relative_within(one, -one).isnan().all()   # an unbiased between can be minus the within
    labels = random_labels((), 5, 4)
    assert nc.self_duality(torch.zeros(5, 9), random_features(labels, 5, 9), labels, 5).isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_spoil_their_task_alone(bad):
    labels = random_labels((3,), 5, 4)
    features = random_features(labels, 5, 9, spread=0.5, dtype=torch.float32)
    spoilt = features.clone()
    spoilt[1, 2, 3] = bad
    means = nc.class_means(features, labels, 5)
    calls = [lambda h, metric=metric: metric(h, labels, 5) for metric, _ in SINGLE] + [
        lambda h: nc.ncc_accuracy(h, labels, means),
        lambda h: nc.ncc_accuracy(features, labels, nc.class_means(h, labels, 5)),
        lambda h: nc.ncc_mismatch(features[..., :5], h, labels, 5, means),
        lambda h: nc.ncc_mismatch(h[..., :5], features, labels, 5, means),
        lambda h: nc.self_duality(torch.ones(5, 9), h, labels, 5),
    ]
    for call in calls:
        for value, sound in zip(as_tuple(call(spoilt)), as_tuple(call(features))):
            assert value[1].isnan().any()
            assert torch.equal(value[::2], sound[::2])


def test_labels_that_break_the_contract():
    features = torch.randn(2, 20, 9, generator=generator())
    labels = random_labels((2,), 5, 4)
    unbalanced = labels.clone()
    unbalanced[1, 0] = (labels[1, 0] + 1) % 5
    outside = labels.clone()
    outside[1, labels[1] == 4] = 5
    for broken in (unbalanced, outside):
        within, between = nc.covariance_traces(features, broken, 5)
        assert within.isnan().tolist() == between.isnan().tolist() == [False, True]
    for n_way in (3, 1):
        with pytest.raises(ValueError):
            nc.covariance_traces(features, labels, n_way)
    with pytest.raises(ValueError):
        nc.ncc_mismatch(torch.zeros(2, 20, 4), features, labels, 5, nc.class_means(features, labels, 5))


# ---- the whole ----

def measure_arguments(leading, n=4, n_support=2, widths=(30, 9, 5), dtype=torch.float32, n_way=5):
    labels = random_labels(leading, n_way, n)
    support_labels = random_labels(leading, n_way, n_support, seed=1)
    return dict(
        features=[random_features(labels, n_way, d, d, 2, dtype) for d in widths],
        labels=labels,
        support_features=[random_features(support_labels, n_way, d, d, 2, dtype) for d in widths],
        support_labels=support_labels,
        n_way=n_way,
        classifier_weight=torch.randn(*leading, n_way, widths[-2], generator=generator(9)).to(dtype),
        null_labels=nc.permuted(labels, generator(10)),
        null_support_labels=nc.permuted(support_labels, generator(11)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
def test_measure_is_the_single_functions_layer_by_layer(leading, dtype):
    a = measure_arguments(leading, dtype=dtype)
    a["features"][0] = 9 * a["features"][0].sign() + a["features"][0]   # classes far apart: unbiased cdnv is a number
    table = nc.measure(**a)
    assert set(table) == {*KEYS, *(key + "_null" for key in KEYS), "within_original", "between_original"}
    assert all(value.shape == (3, *leading) and value.dtype == torch.float64 for value in table.values())
    logits, n_way = a["features"][-1], a["n_way"]
    for layer, (h, support) in enumerate(zip(a["features"], a["support_features"])):
        for suffix, y, support_y in (("", a["labels"], a["support_labels"]),
                                     ("_null", a["null_labels"], a["null_support_labels"])):
            means = nc.class_means(support, support_y, n_way)
            traces, unbiased = nc.covariance_traces(h, y, n_way), nc.unbiased_traces(h, y, n_way)
            expected = {
                "within": traces[0], "between": traces[1], "relative_within": nc.relative_within(*traces),
                "within_unbiased": unbiased[0], "between_unbiased": unbiased[1],
                "relative_within_unbiased": nc.relative_within(*unbiased),
                **dict(zip(KEYS[6:13], (metric(h, y, n_way) for metric, _ in SINGLE[3:]))),
                "self_duality": (nc.self_duality(a["classifier_weight"], h, y, n_way) if layer == 1
                                 else torch.full(leading, math.nan, dtype=torch.float64)),
                "ncc_accuracy": nc.ncc_accuracy(h, y, means),
                "ncc_mismatch": nc.ncc_mismatch(logits, h, y, n_way, means),
            }
            assert list(expected) == KEYS
            for key, value in expected.items():
                torch.testing.assert_close(
                    table[key + suffix][layer], value, rtol=1e-12, atol=1e-14, equal_nan=True,
                    msg=lambda text, key=key + suffix: f"{key}, layer {layer}: {text}")


@pytest.mark.parametrize("chunk, calls", [(1, 12), (2 * 20 * 30, 4), (2**20, 3)])
def test_measure_projects_a_few_tasks_at_a_time(monkeypatch, chunk, calls):
    a, seen = measure_arguments((4,)), []
    together = {key: value[:, :, 0] for key, value in nc.measure(**{   # more leading dimensions: no chunks
        k: [h[:, None] for h in v] if isinstance(v, list) else v if k == "n_way" else v[:, None]
        for k, v in a.items()}).items()}
    project = nc._project
    monkeypatch.setattr(nc, "CHUNK", chunk)
    monkeypatch.setattr(nc, "_project", lambda n_way, h, *rest: seen.append(h.numel()) or project(n_way, h, *rest))
    apart = nc.measure(**a)
    assert len(seen) == calls and max(seen) <= max(chunk, 20 * 30) and sum(seen) == 4 * 20 * (30 + 9 + 5)
    for key, value in together.items():
        torch.testing.assert_close(apart[key], value, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_measure_nulls_are_of_the_permuted_labels():
    """On collapsed features the metrics see collapse, and their nulls don't."""
    leading, n_way = (6,), 5
    a = measure_arguments(leading, n=15, n_support=3, widths=(30, 9, 5))
    a["features"] = [random_features(a["labels"], n_way, d, spread=1e-3) for d in (30, 9, 5)]
    a["support_features"] = [random_features(a["support_labels"], n_way, d, spread=1e-3) for d in (30, 9, 5)]
    a["features"][-1] = torch.nn.functional.one_hot(a["labels"], n_way).double()
    table = {key: value.mean(-1) for key, value in nc.measure(**a).items()}
    assert (table["nc1"][:2] < 1e-3).all() and (table["nc1_null"] > 1).all()
    assert (table["ncc_accuracy"][:2] == 1).all() and (table["ncc_accuracy_null"] < 0.5).all()
    assert (table["ncc_mismatch"][:2] == 0).all() and (table["ncc_mismatch_null"] > 0.5).all()


def test_measure_of_one_shot_and_of_the_logits_alone():
    table = nc.measure(**measure_arguments((2,), n_support=1))   # 1-shot support still gives means
    assert table["ncc_accuracy"].isfinite().all() and table["within"].isfinite().all()
    table = nc.measure(**measure_arguments((2,), n=1))
    assert table["within"].isnan().all() and table["between"].isfinite().all()
    assert all(value.shape == (3, 2) for value in table.values()) and table["nc1"].isnan().all()
    a = measure_arguments((2,))
    a["features"], a["support_features"] = a["features"][-1:], a["support_features"][-1:]
    assert nc.measure(**a)["self_duality"].isnan().all()   # no hidden layer, no input to be dual to


def test_measure_leaves_no_trace():
    a = measure_arguments((2,), dtype=torch.float64)
    copies = [h.clone() for h in a["features"] + a["support_features"]]
    a["features"][0].requires_grad_()
    state = torch.get_rng_state()
    table = nc.measure(**a)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, a["features"] + a["support_features"], copies))
    assert not any(value.requires_grad for value in table.values())


def test_measure_reads_no_value_on_the_host():
    """On the meta device there are shapes and no values: an .item() or a shape made from data raises."""
    a = measure_arguments((2, 3))
    meta = {key: [h.to("meta") for h in value] if isinstance(value, list) else
            value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in a.items()}
    assert all(value.shape == (3, 2, 3) for value in nc.measure(**meta).values())


# ---- features of one's own ----

def own(sizes=(4, 4, 4), support=(2, 2, 2), d=6):
    """(features, labels, keyword arguments) as numpy arrays, rows in random order."""
    rng = np.random.default_rng(0)
    y, support_y = (rng.permutation(np.repeat(np.arange(len(n)), n)) for n in (sizes, support))
    means = 3 * rng.standard_normal((len(sizes), d))
    return means[y] + rng.standard_normal((len(y), d)), y, {
        "classifier_weight": rng.standard_normal(means.shape), "logits": rng.standard_normal((len(y), len(sizes))),
        "support_features": means[support_y] + rng.standard_normal((len(support_y), d)), "support_labels": support_y}


@pytest.mark.parametrize("sizes, support", [((4, 4, 4), (2, 2, 2)), ((3, 7, 2), (1, 4, 2)), ((2, 9), (5, 1))])
def test_measure_features_is_the_oracle(sizes, support):
    h, y, more = own(sizes, support)
    values, c = nc.measure_features(h, y, **more), len(sizes)
    means = oracle(more["support_features"], more["support_labels"], c)["means"]
    expected = oracle(h, y, c, more["classifier_weight"], more["logits"], means)
    assert list(values) == KEYS and all(type(value) is float for value in values.values())
    np.testing.assert_allclose(list(values.values()), [expected[key] for key in KEYS], rtol=1e-9, atol=1e-12)
    assert list(nc.measure_features(h, y)) == KEYS[:13]   # what was not asked for is absent
    if len(set(sizes)) == 1:   # and what `measure` says of equal classes
        h, y, *more = (torch.from_numpy(x) for x in (h, y, *more.values()))
        table = nc.measure([h, more[1]], y, [more[2], more[2][:, :c]], more[3], c, more[0], y, more[3])
        for key, value in values.items():
            assert value == pytest.approx(table[key][0].item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("form", [
    lambda y: y.tolist(), torch.from_numpy, lambda y: y.astype(float), lambda y: y[:, None], lambda y: np.eye(3)[y],
    lambda y: np.array(["bee", "cat", "dog"])[y], lambda y: [("a", "b", "c")[k] for k in y], lambda y: 10 * y - 7,
    lambda y: [("greek", f"letter {k}") for k in y], lambda y: np.array([2, 9, 10], dtype=object)[y],
    lambda y: np.array([("greek", k) for k in y], dtype=object)])
def test_measure_features_takes_labels_and_features_of_any_form(form):
    h, y, more = own()
    expected = nc.measure_features(h, y, **more)
    for same in (torch.from_numpy(h).requires_grad_(), h.tolist(), h.reshape(12, 2, 3, 1), h[::-1].copy()[::-1]):
        assert nc.measure_features(same, y, **more) == expected
    assert nc.measure_features(h, form(y), **more | {"support_labels": form(more["support_labels"])}) == expected


def changed(array, value, index=0):
    return np.where(np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) == index, value, array)


@pytest.mark.parametrize("change, message", [
    (lambda h, y: {"features": h[:-1]}, "12 .*11|11 samples"), (lambda h, y: {"features": h[:, 0]}, "must be .N, D."),
    (lambda h, y: {"features": changed(h, math.nan, 4)}, "row 4"), (lambda h, y: {"labels": 0 * y}, "single class"),
    (lambda h, y: {"features": changed(h, math.inf)}, "finite"), (lambda h, y: {"labels": changed(y, 9)}, "one sample"),
    (lambda h, y: {"labels": np.arange(12)}, "one sample"), (lambda h, y: {"labels": changed(y, math.nan)}, "nan"),
    (lambda h, y: {"labels": 3}, "samples"), (lambda h, y: {"labels": [None, *y[1:]]}, "None"),
    (lambda h, y: {"features": h[:0], "labels": y[:0]}, "must be"), (lambda h, y: {"support_features": None}, "need"),
    (lambda h, y: {"logits": np.ones((12, 4))}, "logits must be .12, 3."),
    (lambda h, y: {"support_features": None, "support_labels": None}, "support set"),
    (lambda h, y: {"support_features": h[:6, :5]}, "must be .6, 6."), (lambda h, y: {"features": 0 * h}, "nc1.*zero"),
    (lambda h, y: {"support_labels": np.arange(6)}, "other classes"), (lambda h, y: {"features": h * 1e200}, "square"),
    (lambda h, y: {"classifier_weight": np.ones((2, 6))}, "must be .3, 6."),
    (lambda h, y: {"classifier_weight": np.zeros((3, 6))}, "self_duality")])
def test_measure_features_says_what_it_cannot_measure(change, message):
    h, y, more = own()
    with pytest.raises(ValueError, match=message):
        nc.measure_features(**{"features": h, "labels": y} | more | change(h, y))


def test_measure_features_on_noise_warns_and_its_example_runs(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="cdnv_unbiased is nan"):
        values = nc.measure_features(rng.standard_normal((75, 800)), np.repeat(np.arange(5), 15))
    assert [name for name, value in values.items() if math.isnan(value)] == ["cdnv_unbiased"]
    monkeypatch.chdir(tmp_path)
    np.save("features.npy", own()[0])
    np.save("labels.npy", own()[1])
    exec(textwrap.dedent("\n".join(nc.measure_features.__doc__.splitlines()[2:6])), {})
    assert len(capsys.readouterr().out.split()) == 3


# ---- permuted, mean_and_se ----

def test_permuted():
    labels = torch.arange(5).repeat(2, 50, 15)   # [2, 50, 75]
    state = torch.get_rng_state()
    first, again, other = (nc.permuted(labels, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == labels.dtype and first.shape == labels.shape
    assert torch.equal(first.sort(-1).values, labels.sort(-1).values)   # each class as often as before
    assert len({tuple(row.tolist()) for row in first.flatten(0, 1)}) == 100   # each task in its own order
    assert (first == labels).double().mean().item() == pytest.approx(0.2, abs=0.02)   # unrelated to them
    g = generator(0)
    assert not torch.equal(nc.permuted(labels, g), nc.permuted(labels, g))   # the generator moves on


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_se(dtype, recwarn):
    values = torch.randn(9, 4, 2, generator=generator(), dtype=dtype)
    mean, error = nc.mean_and_se(values)
    assert mean.dtype == error.dtype == torch.float64 and mean.shape == error.shape == (4, 2)
    np.testing.assert_allclose(mean, array(values).mean(0))
    np.testing.assert_allclose(error, array(values).std(0, ddof=1) / 3)
    mean, error = nc.mean_and_se(torch.tensor([[2.0, 3.0]]))
    assert mean.tolist() == [2, 3] and error.isnan().all()
    mean, error = nc.mean_and_se(torch.tensor([[1.0, 1.0], [math.nan, 2.0], [3.0, 3.0]]))
    assert mean.isnan().tolist() == error.isnan().tolist() == [True, False]
    assert not recwarn.list
