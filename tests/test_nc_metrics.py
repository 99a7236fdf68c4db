"""nc_metrics against a brute-force oracle, which shares nothing with it, and each of its traps."""

import itertools
import math
import textwrap

import numpy as np
import oracle
import pytest
import torch

import nc_metrics as nc

LEADING = pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SPREAD = ["nc1", "cdnv", "cdnv_unbiased", "directional_cdnv"]   # 0 at full collapse, nan for one sample per class
QUOTIENTS = [*SPREAD, "equinorm", "equiangularity", "etf_error", "self_duality"]   # nan where all means are equal
KEYS = ["within", "between", "relative_within", "within_unbiased", "between_unbiased", "relative_within_unbiased",
        *nc.METRICS, "self_duality", "ncc_accuracy", "ncc_mismatch"]


# ---- every metric ----

def functions(h, y, c, weight=None, logits=None, means=None):
    """Every metric by name, by the module's single functions."""
    weight = torch.ones(c, h.shape[-1]) if weight is None else weight
    traces, unbiased = nc.covariance_traces(h, y, c), nc.unbiased_traces(h, y, c)
    means = nc.class_means(h, y, c) if means is None else means
    values = [*traces, nc.relative_within(*traces), *unbiased, nc.relative_within(*unbiased),
              *(metric(h, y, c) for metric in nc.METRICS.values()), nc.self_duality(weight, h, y, c),
              nc.ncc_accuracy(h, y, means), nc.ncc_mismatch(h[..., :c] if logits is None else logits, h, y, c, means)]
    return dict(zip(KEYS, values, strict=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def random_labels(leading, n_way, n, seed=0):
    """Each class n times, in an order of its own in every task."""
    rows = torch.arange(n_way).repeat_interleave(n).expand(*leading, n_way * n)
    return nc.permuted(rows.contiguous(), generator(seed + 1000))


def random_features(labels, n_way, d, seed=0, spread=1.0, dtype=torch.float64):
    """Classes around random means, off the origin, more spread in some directions than in others."""
    means = 3 + random(*labels.shape[:-1], n_way, d, seed=seed)
    noise = random(*labels.shape, d, seed=seed + 1) * torch.linspace(0.2, 2, d, dtype=torch.float64)
    return (means.gather(-2, labels.unsqueeze(-1).expand(*labels.shape, d)) + spread * noise).to(dtype)


def simplex(n_way, d):
    """A simplex ETF around the origin, in a random direction: [C, D]."""
    basis, _ = torch.linalg.qr(random(d, n_way))
    return (torch.eye(n_way, dtype=torch.float64) - 1 / n_way) @ basis.T


def arguments(leading, n=4, n_support=2, widths=(30, 9, 5), dtype=torch.float32, n_way=5):
    """What `measure` takes."""
    labels, support_labels = random_labels(leading, n_way, n), random_labels(leading, n_way, n_support, seed=1)
    return dict(
        features=[random_features(labels, n_way, d, d, 2, dtype) for d in widths], labels=labels,
        support_features=[random_features(support_labels, n_way, d, d, 2, dtype) for d in widths],
        support_labels=support_labels, n_way=n_way,
        classifier_weight=random(*leading, n_way, widths[-2], seed=9).to(dtype),
        null_labels=nc.permuted(labels, generator(10)), null_support_labels=nc.permuted(support_labels, generator(11)))


@pytest.mark.parametrize("n_way, n, d", [(5, 4, 9), (3, 6, 12), (5, 3, 3), (2, 5, 4)])
@DTYPES
@LEADING
def test_every_function_is_the_oracle(leading, dtype, n_way, n, d):
    labels, support_labels = random_labels(leading, n_way, n), random_labels(leading, n_way, 2, seed=1)
    h = random_features(labels, n_way, d, spread=0.8, dtype=dtype)
    means = nc.class_means(random_features(support_labels, n_way, d, dtype=dtype), support_labels, n_way)
    weight, logits = random(n_way, d, seed=3).to(dtype), random(*labels.shape, n_way, seed=4).to(dtype)
    values = functions(h, labels, n_way, weight, logits, means)
    assert all(value.shape == leading and value.dtype == torch.float64 for value in values.values())
    for task in itertools.product(*map(range, leading)):
        own_h, *rest = (x.double().numpy() for x in (h[task], weight, logits[task], means[task]))
        expected = oracle.metrics(own_h, labels[task].numpy(), n_way, *rest)
        for key in KEYS:
            np.testing.assert_allclose(values[key][task], expected[key], rtol=1e-9, atol=1e-11, err_msg=key)


@DTYPES
@LEADING
@pytest.mark.parametrize("n", [5, 1])
def test_measure_is_the_functions_layer_by_layer_for_labels_and_permuted_labels(n, leading, dtype):
    a = arguments(leading, n, n_support=min(n, 2), dtype=dtype)
    a["features"][0] = 9 * a["features"][0].sign() + a["features"][0]   # classes far apart: unbiased cdnv is a number
    given = a["features"] + a["support_features"]
    copies = [h.clone() for h in given]
    given[1].requires_grad_()
    table = nc.measure(**a)
    assert all(map(torch.equal, given, copies)) and not any(value.requires_grad for value in table.values())
    assert set(table) == {*KEYS, *(key + "_null" for key in KEYS), "within_original", "between_original"}
    logits, nan = a["features"][-1], torch.full(leading, math.nan, dtype=torch.float64)
    for layer, (h, support) in enumerate(zip(a["features"], a["support_features"])):
        for suffix, y, support_y in (("", a["labels"], a["support_labels"]),
                                     ("_null", a["null_labels"], a["null_support_labels"])):
            weight, means = a["classifier_weight"] if layer == 1 else None, nc.class_means(support, support_y, 5)
            expected = functions(h.detach(), y, 5, weight, logits, means)
            expected["self_duality"] = expected["self_duality"] if layer == 1 else nan
            torch.testing.assert_close({key: table[key + suffix][layer] for key in KEYS}, expected, rtol=1e-12,
                                       atol=1e-14, equal_nan=True)
        traces = nc.original_traces(logits) if layer == 2 else (nan, nan)
        torch.testing.assert_close((table["within_original"][layer], table["between_original"][layer]), traces,
                                   equal_nan=True)
    alone = nc.measure(**a | {name: a[name][-1:] for name in ("features", "support_features")})  # the logits
    assert alone["self_duality"].isnan().all()


# ---- precision ----

def test_small_spread_and_close_means_keep_their_digits():
    """Spread of 1e-6 around means of size 1e3, and two means a million times closer than a third: squares lose both."""
    labels = random_labels((2,), 5, 15)
    means = 1e3 * random(5, 30)
    features = means[labels] + 1e-6 * random(2, 75, 30, seed=1)
    noise = features - means[labels]   # what is left of it after rounding
    torch.testing.assert_close(nc.covariance_traces(features, labels, 5)[0], nc.covariance_traces(noise, labels, 5)[0],
                               rtol=1e-5, atol=0)
    labels, means = random_labels((), 3, 6), torch.zeros(3, 8, dtype=torch.float64)
    means[0, 0], means[1, 1] = 1, 1e-6
    noise = 1e-6 * random(18, 8)
    noise -= nc.class_means(noise, labels, 3)[labels]
    rotation, _ = torch.linalg.qr(random(8, 8, seed=1))
    features = (means[labels] + noise) @ rotation
    expected = np.sum((noise.numpy() @ np.linalg.pinv((means - means.mean(0)).numpy())) ** 2) / 18
    np.testing.assert_allclose(nc.nc1(features, labels, 3), expected, rtol=1e-7)
    values = functions(features, labels, 3)
    expected = oracle.metrics(features.numpy(), labels.numpy(), 3, np.ones((3, 8)), features.numpy(), means.numpy())
    for key in SPREAD[1:]:
        np.testing.assert_allclose(values[key], expected[key], rtol=1e-8, err_msg=key)


def test_the_nearest_mean_is_the_same_far_from_the_origin():
    labels = random_labels((), 5, 15)
    h = (random_features(labels, 5, 40, spread=3) * 64).round() / 64   # exact with the offset too
    means = torch.stack([h[labels == c][0] for c in range(5)])
    near, far = (nc.ncc_accuracy(h + offset, labels, means + offset).item() for offset in (0, 2.0**40))
    assert near == far and 0.2 < near < 0.9


@pytest.mark.parametrize("directions", [1, 2, 3])
def test_nc1_of_means_that_span_fewer_directions_is_that_of_pinv(directions):
    labels = random_labels((), 5, 6)
    noise = random(30, 9, seed=2)
    features = (7 + random(5, directions) @ random(directions, 9, seed=1))[labels]
    features += noise - nc.class_means(noise, labels, 5)[labels]
    h, y = features.numpy(), labels.numpy()
    np.testing.assert_allclose(nc.nc1(features, labels, 5), oracle.metrics(h, y, 5, h[:5], h, h[:5])["nc1"],
                               rtol=1e-8)


# ---- traps ----

def test_full_collapse():
    """On a simplex, off the origin, its classes interleaved, in float32: the values of the table."""
    labels, m = torch.arange(5).repeat(15)[None], simplex(5, 40)
    features = (2 + m)[labels].float()
    values = functions(features, labels, 5, 3 * m, (features - 2) @ m.T.float())
    assert values["within"] == values["within_unbiased"] == values["ncc_mismatch"] == 0 and values["ncc_accuracy"] == 1
    torch.testing.assert_close(values["between"], m.square().sum(-1).mean()[None], rtol=1e-6, atol=0)
    for key in ("relative_within", "relative_within_unbiased", *SPREAD):
        assert 0 <= values[key] < 1e-20, key
    for key in QUOTIENTS[4:]:   # the simplex itself is rounded to float32
        assert 0 <= values[key] < 1e-5, key


@LEADING
def test_one_sample_per_class_has_no_spread(leading):
    labels = random_labels(leading, 5, 1)
    values = functions(random_features(labels, 5, 9), labels, 5)
    spread = {"within", "relative_within", "within_unbiased", "between_unbiased", "relative_within_unbiased", *SPREAD}
    for key, value in values.items():
        assert value.isnan().all() if key in spread else value.isfinite().all(), key


@DTYPES
@pytest.mark.parametrize("value", [0.0, 0.1, 1e5 / 3])
def test_a_dead_layer_has_no_quotients(dtype, value):
    """All rows the same; not only zeros, whose sums are exact."""
    labels = random_labels((3,), 5, 15)
    for key, found in functions(torch.full((3, 75, 11), value, dtype=dtype), labels, 5).items():
        if key in ("within", "between", "within_unbiased", "between_unbiased"):
            assert (found == 0).all(), key
        elif not key.startswith("ncc"):
            assert found.isnan().all(), key


@pytest.mark.parametrize("equal", [2, 5])
def test_equal_class_means(equal):
    """Equal but for the rounding of their sums: cdnv has no distance to divide by, and no metric if all are equal."""
    labels, means, noise = torch.arange(5).repeat(14), random(5, 11), random(35, 11, seed=1) / 3
    means[:equal] = means[0].clone()
    values = functions(means[labels] + torch.cat([noise, -noise]), labels, 5)
    assert (values["between"] == 0).item() == (equal == 5) and values["within"] > 0
    assert all(values[key].isnan() == (equal == 5 or key in SPREAD[1:]) for key in QUOTIENTS)
    assert nc.relative_within(torch.ones(1), -torch.ones(1)).isnan()   # an unbiased between can be minus the within


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_spoil_their_task_alone(bad):
    labels = random_labels((3,), 5, 4)
    h = random_features(labels, 5, 9, spread=0.5)
    means, logits, spoilt = nc.class_means(h, labels, 5), h[..., :5], h.clone()
    spoilt[1, 2, 3] = bad
    sound = functions(h, labels, 5, None, logits, means)
    for key, value in functions(spoilt, labels, 5, None, logits, means).items():
        assert value[1].isnan() and torch.equal(value[::2], sound[key][::2]), key
    for mu, answers in ((nc.class_means(spoilt, labels, 5), logits), (means, spoilt[..., :5])):
        assert nc.ncc_mismatch(answers, h, labels, 5, mu).isnan().tolist() == [False, True, False]


def test_labels_that_break_the_contract():
    labels = random_labels((2,), 5, 4)
    features, unbalanced, outside = random(2, 20, 9), labels.clone(), labels.clone()
    unbalanced[1, 0] = (labels[1, 0] + 1) % 5
    outside[1, labels[1] == 4] = 5
    for broken in (unbalanced, outside):
        within, between = nc.covariance_traces(features, broken, 5)
        assert within.isnan().tolist() == between.isnan().tolist() == [False, True]
    for n_way in (3, 1):
        with pytest.raises(ValueError):
            nc.covariance_traces(features, labels, n_way)
    with pytest.raises(ValueError):
        nc.ncc_mismatch(torch.zeros(2, 20, 4), features, labels, 5, nc.class_means(features, labels, 5))


# ---- the other functions ----

@LEADING
def test_effective_dimension(leading):
    means = 3 + random(*leading, 12, 7) * torch.linspace(0.1, 2, 7)
    eigenvalues = torch.stack([torch.linalg.eigvalsh(m.T.cov()) for m in means.view(-1, 12, 7)])
    expected = eigenvalues.sum(-1) ** 2 / eigenvalues.square().sum(-1)
    torch.testing.assert_close(nc.effective_dimension(means).flatten(), expected)
    assert nc.effective_dimension(2 + simplex(5, 40)).item() == pytest.approx(4)   # a simplex fills C-1 directions
    assert nc.effective_dimension(torch.full((2, 7, 3), 0.1)).isnan().all()   # a dead layer
    wide = torch.randn(5, 500_000, generator=generator())   # D x D would be 2 TB
    assert nc.effective_dimension(wide).item() == pytest.approx(4, abs=0.01)


def test_the_original_s_traces():
    """Means of consecutive groups of five rows, class k compared with the k-th of them. Rows lie class after class."""
    logits = random(3, 4, 75, 5)
    means = torch.stack([logits[..., 5 * k:5 * k + 5, :].mean(-2) for k in range(5)], -2)
    within = torch.stack([(logits[..., i, :] - means[..., i // 15, :]).square().sum(-1) for i in range(75)]).mean(0)
    between = (means - logits.mean(-2, keepdim=True)).square().sum(-1).mean(-1)
    torch.testing.assert_close(nc.original_traces(logits), (within, between))
    assert all(value.isnan().all() and value.shape == (3, 4) for value in nc.original_traces(logits[..., :20, :]))


def test_permuted():
    labels = torch.arange(5).repeat(2, 50, 15)   # [2, 50, 75]
    first, again, other = (nc.permuted(labels, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort(-1).values, labels.sort(-1).values)   # each class as often as before
    assert len({tuple(row.tolist()) for row in first.flatten(0, 1)}) == 100   # each task in its own order
    assert (first == labels).double().mean().item() == pytest.approx(0.2, abs=0.02)   # unrelated to them


@DTYPES
def test_mean_and_se(dtype, recwarn):
    values = random(9, 4, 2).to(dtype)
    mean, error = nc.mean_and_se(values)
    assert mean.dtype == error.dtype == torch.float64
    np.testing.assert_allclose(mean, values.double().numpy().mean(0))
    np.testing.assert_allclose(error, values.double().numpy().std(0, ddof=1) / 3)
    values[1, 0, 0] = math.nan
    assert nc.mean_and_se(values)[1].isnan().sum() == nc.mean_and_se(values)[0].isnan().sum() == 1
    mean, error = nc.mean_and_se(torch.tensor([[2.0, 3.0]]))
    assert mean.tolist() == [2, 3] and error.isnan().all() and not recwarn.list


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
    means = [more["support_features"][more["support_labels"] == k].mean(0) for k in range(c)]
    expected = oracle.metrics(h, y, c, more["classifier_weight"], more["logits"], means)
    assert list(values) == KEYS and all(type(value) is float for value in values.values())
    np.testing.assert_allclose(list(values.values()), [expected[key] for key in KEYS], rtol=1e-9, atol=1e-12)
    assert list(nc.measure_features(h, y)) == KEYS[:-3]   # what was not asked for is absent


@pytest.mark.parametrize("form", [
    lambda y: y.tolist(), torch.from_numpy, lambda y: y.astype(float), lambda y: y[:, None], lambda y: np.eye(3)[y],
    lambda y: np.array(["bee", "cat", "dog"])[y], lambda y: [("greek", f"letter {k}") for k in y],
    lambda y: np.array([2, 9, 10], dtype=object)[y], lambda y: np.array(["2", "9", f"{10**20}"])[y],
    lambda y: np.array(["01", "1", "9"])[y], lambda y: np.array([("greek", k) for k in y], dtype=object)])
def test_measure_features_takes_labels_and_features_of_any_form(form):
    h, y, more = own()
    expected = nc.measure_features(h, y, **more)
    for same in (torch.from_numpy(h).requires_grad_(), h.tolist(), h.reshape(12, 2, 3, 1), h[::-1].copy()[::-1]):
        assert nc.measure_features(same, y, **more) == expected
    assert nc.measure_features(h, form(y), **more | {"support_labels": form(more["support_labels"])}) == expected


@pytest.mark.parametrize("change, message", [
    (lambda h, y: {"features": h[:-1]}, "12.* for 11 samples"), (lambda h, y: {"features": h[:, 0]}, "must be .N, D."),
    (lambda h, y: {"features": np.where(h == h[4, 2], math.nan, h)}, "finite; row 4"),
    (lambda h, y: {"labels": 0 * y}, "single class"), (lambda h, y: {"labels": np.arange(12)}, "one sample"),
    (lambda h, y: {"labels": np.array(["a", *y[1:]], object)}, "labels can't be sorted"),
    (lambda h, y: {"labels": [None, *y[1:]]}, "None"), (lambda h, y: {"support_features": None}, "need"),
    (lambda h, y: {"logits": np.ones((12, 4))}, "logits must be .12, 3."),
    (lambda h, y: {"support_features": None, "support_labels": None}, "support set"),
    (lambda h, y: {"support_labels": np.arange(6)}, "other classes"), (lambda h, y: {"features": 0 * h}, "nc1.*zero"),
    (lambda h, y: {"classifier_weight": np.zeros((3, 6))}, "self_duality")])
def test_measure_features_says_what_it_cannot_measure(change, message):
    h, y, more = own()
    with pytest.raises(ValueError, match=message):
        nc.measure_features(**{"features": h, "labels": y} | more | change(h, y))


def test_measure_features_on_noise_warns_and_its_example_runs(tmp_path, monkeypatch, capsys):
    for low in (0.1, 0.3):  # the unbiased distance is 0, or 1e-17 by rounding
        with pytest.warns(UserWarning, match="cdnv_unbiased is nan"):
            nc.measure_features([[low], [low + 0.3], [low + 0.3], [low + 0.3]], [0, 0, 1, 1])
    with pytest.warns(UserWarning, match="cdnv_unbiased is nan") as warned:
        values = nc.measure_features(random(75, 800), np.repeat(np.arange(5), 15))
    assert warned[0].filename == __file__
    assert [name for name, value in values.items() if math.isnan(value)] == ["cdnv_unbiased"]
    monkeypatch.chdir(tmp_path)
    np.save("features.npy", own()[0])
    np.save("labels.npy", own()[1])
    exec(textwrap.dedent("\n".join(nc.measure_features.__doc__.splitlines()[2:6])), {})
    assert len(capsys.readouterr().out.split()) == 3
