"""The study's numbers (effects.py) and their tables: known effects come out as they were put in, and the committed
tables are what the logs give.

The recomputation here shares nothing with the project: it reads JSON lines and uses numpy's polyfit and Python's
statistics module.
"""

import functools
import gzip
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import effects
import files
import nc_logs
import nc_statistics
import runs as logs

PROJECT = Path(nc_statistics.__file__).parent
README = """Before.

<!-- statistics -->
stale
<!-- /statistics -->

Between.
<!-- accuracies -->
<!-- /accuracies -->
After.
"""
T = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # by number of runs: 97.5% points, from a printed table
MINUS = "\N{MINUS SIGN}"


# ---- an independent recomputation


def rows_of(folder: Path, kind: str, classes: str | None = None) -> list[dict]:
    return [row for row in rows_in(folder) if row["kind"] == kind and row.get("classes") == classes]


@functools.cache
def rows_in(folder: Path) -> list[dict]:
    compressed = folder / "log.jsonl.gz"
    lines = gzip.open(compressed) if compressed.exists() else open(folder / "log.jsonl", "rb")
    with lines:
        return [json.loads(line) for line in lines]


def points(folder: Path, model: str, metric: str, layer: int, classes: str) -> list[tuple[int, float]]:
    return [(row["step"], row[model][metric]["mean"][layer]) for row in rows_of(folder, "nc", classes)]


def end(folder: Path, model: str, metric: str, layer: int, classes: str) -> float:
    last = max(row["step"] for kind in ("train", "heldout") for row in rows_of(folder, "nc", kind))
    found = points(folder, model, metric, layer, classes)
    return statistics.fmean(value for step, value in found if step >= 0.9 * last)


def change(folder: Path, model: str, layer: int = -2) -> float:
    found = points(folder, model, "relative_within", layer, "train")
    start = min(found, key=lambda point: abs(point[0] - 100))[1]
    return end(folder, model, "relative_within", layer, "train") - start


def original_change(folder: Path, model: str, suffix: str) -> float:
    """Of the logits' within / (within + between), from the step nearest to 100 to the last tenth."""
    traces = []
    for name in ("within", "between"):
        found = points(folder, model, name + suffix, -1, "train")
        start = min(found, key=lambda point: abs(point[0] - 100))[1]
        traces.append((start, end(folder, model, name + suffix, -1, "train")))
    (within, within_end), (between, between_end) = traces
    return within_end / (within_end + between_end) - within / (within + between)


def accuracy(folder: Path, model: str, classes: str) -> float:
    """In percent, over the last tenth."""
    rows = rows_of(folder, "nc", classes)
    last = max(row["step"] for kind in ("train", "heldout") for row in rows_of(folder, "nc", kind))
    place = 0 if model == "meta" else -1
    return 100 * statistics.fmean(row["inner"]["accuracy"]["mean"][place] for row in rows if row["step"] >= 0.9 * last)


def slope(folder: Path, model: str, first: int) -> float:
    steps, values = zip(*(p for p in points(folder, model, "relative_within", -2, "train") if p[0] >= first))
    return np.polyfit(np.log10(steps), values, 1)[0]


def late_pair(folder: Path, first: int, detrended: bool) -> tuple[list[float], list[float]]:
    """Log CDNV and log held-out error of the checkpoints from `first` on, or what a fitted line leaves of them."""
    rows = [row for row in rows_of(folder, "nc", "heldout") if row["step"] >= first]
    cdnv = [math.log(row["finetuned"]["cdnv"]["mean"][-2]) for row in rows]
    error = [math.log(1 - row["inner"]["accuracy"]["mean"][-1]) for row in rows]
    if detrended:
        x = np.log10([row["step"] for row in rows])
        cdnv, error = (list(y - np.polyval(np.polyfit(x, y, 1), x)) for y in (cdnv, error))
    return cdnv, error


def z_of_correlation(folder: Path, first: int, detrended: bool, of_ranks: bool) -> float:
    pair = late_pair(folder, first, detrended)
    if of_ranks:  # of these numbers no two are equal
        pair = [[sorted(values).index(value) for value in values] for values in pair]
    return math.atanh(statistics.correlation(*pair))


def over(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% t interval."""
    if len(values) == 1:
        return values[0], math.nan
    return statistics.fmean(values), T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


# ---- reading the tables


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    """The claims' table by (heading, label)."""
    heading, found = "", {}
    for line in text[: text.index("\n\n±")].splitlines():
        label, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        if label.startswith("**"):
            heading = label.strip("*")
        found[heading, label] = rest
    return found


def parse(cell: str) -> list[float]:
    """The numbers of "a ± b", "a [b, c]" or "a"."""
    for mark in ("±", "[", "]", ",", "→", ";"):
        cell = cell.replace(mark, " ")
    return [float(word.replace(MINUS, "-")) for word in cell.split()]


def agrees(cell: str, mean: float, half: float) -> None:
    """Within half a unit of the last digit that is written."""
    numbers = parse(cell)
    decimals = len(cell.split()[0].partition(".")[2])
    assert numbers[0] == pytest.approx(mean, abs=0.51 * 10**-decimals), cell
    if math.isnan(half):
        assert "±" not in cell
    else:
        assert numbers[1] == pytest.approx(half, abs=0.51 * 10**-decimals), cell


def study_folders(folder: Path) -> list[list[Path]]:
    """The study's runs by setting, in the table's order, found by their folders' names."""
    found = [sorted(path for path in folder.iterdir() if path.name.rpartition("-seed")[0] == setting.name)
             for setting in logs.STUDY]  # fmt: skip
    return [paths for paths in found if paths]


def check_claims(folder: Path, text: str) -> None:
    table = cells(text)
    headings = dict.fromkeys(heading for heading, _ in table if heading)
    traces, apart, logits, by_layer, original, nulls, right, together = headings
    assert "training tasks" in traces and "block4 at the end" in apart and "logits" in logits
    assert "by layer" in by_layer and "accuracy" in right
    assert nulls.startswith("Finetuned") and together.startswith("Correlation")
    for column, paths in enumerate(study_folders(folder)):
        assert table["", "seeds"][column] == str(len(paths))
        for model in ("meta", "finetuned"):
            agrees(table[traces, f"{model}, change"][column], *over([change(path, model) for path in paths]))
            agrees(table[traces, f"{model}, slope per tenfold of steps, from step 30"][column],
                   *over([slope(path, model, 30) for path in paths]))  # fmt: skip
            for (classes, label), (heading, layer) in itertools.product(
                (("train", "training tasks"), ("heldout", "held-out tasks")), ((apart, -2), (logits, -1))
            ):
                ends = [[end(path, model, "relative_within", layer, classes) for model in ("meta", "finetuned")]
                        for path in paths]  # fmt: skip
                agrees(table[heading, f"finetuned {MINUS} meta, {label}"][column], *over([b - a for a, b in ends]))
            for layer, name in enumerate(("block1", "block2", "block3", "block4", "logits")):
                changes = [change(path, model, layer) for path in paths]
                way, moved = table[by_layer, f"{model}, {name}"][column].split("; ")
                agrees(moved, *over(changes))
                untrained = [points(path, model, "relative_within", layer, "train")[0][1] for path in paths]
                assert parse(way)[0] == pytest.approx(statistics.fmean(untrained), rel=0.006)
            for classes, label in (("train", "training tasks"), ("heldout", "held-out tasks")):
                percent = [accuracy(path, model, classes) for path in paths]
                agrees(table[right, f"{model}, {label}"][column], *over(percent))
            nearest = [100 * end(path, model, "ncc_accuracy", -2, "heldout") for path in paths]
            agrees(table[right, f"by the nearest support mean, {model}, held-out tasks"][column], *over(nearest))
            if model == "meta":
                apart_by = [a - accuracy(path, "finetuned", "heldout") for a, path in zip(nearest, paths)]
                label = f"meta by the nearest support mean {MINUS} finetuned by the classifier, held-out tasks"
                agrees(table[right, label][column], *over(apart_by))
        for model in ("meta", "finetuned"):
            changes = {label: [original_change(path, model, suffix) for path in paths]
                       for label, suffix in (("as the original measured", "_original"), ("by label", ""))}  # fmt: skip
            for label, values in changes.items():
                ((key, row),) = [(key, row) for key, row in table.items() if key[1].startswith(f"{model}, {label}")]
                assert key[0] == original and "mean traces" in original
                agrees(row[column].split("; ")[1], *over(values))
            differences = [by_label - as_original for as_original, by_label in zip(*changes.values())]
            label = f"{model}, change by label {MINUS} change as the original measured"
            agrees(table[original, label][column], *over(differences))
        way, learned, nothing = table[nulls, "CDNV"][column].split("; ")
        first = [points(path, "finetuned", "cdnv", -2, "heldout")[0][1] for path in paths]
        ends = [end(path, "finetuned", "cdnv", -2, "heldout") for path in paths]
        assert parse(way) == pytest.approx([statistics.fmean(first), statistics.fmean(ends)], rel=0.006)
        agrees(learned, *over([b - a for a, b in zip(first, ends)]))
        if nothing != "null not logged":
            nulls_at_end = [end(path, "finetuned", "cdnv_null", -2, "heldout") for path in paths]
            agrees(nothing, *over([a - b for a, b in zip(ends, nulls_at_end)]))
        late = f"from step {effects.LATE:,}"
        beside = f"{late}, beside their trend in log step"
        for label, *how in (
            ("all checkpoints", 0, False, False),
            (late, effects.LATE, False, False),
            (beside, effects.LATE, True, False),
            (f"{beside}, of ranks", effects.LATE, True, True),
        ):
            row = table[together, label][column]
            if row != "undefined":
                mean, half = over([z_of_correlation(path, *how) for path in paths])
                edges = [] if math.isnan(half) else [mean - half, mean + half]
                assert parse(row) == pytest.approx([math.tanh(z) for z in (mean, *edges)], abs=0.006)
        row = table[together, f"standard deviation of log error beside its trend, {late}"][column]
        if row != "undefined":
            left = [late_pair(path, effects.LATE, True)[1] for path in paths]
            agrees(row, *over([math.hypot(*errors) / math.sqrt(len(errors) - 2) for errors in left]))
            errors = [[math.exp(e) for e in late_pair(path, effects.LATE, False)[1]] for path in paths]
            falls = [100 * max(b - a for a, b in itertools.pairwise(one)) for one in errors]
            label = f"largest fall of held-out accuracy from one checkpoint to the next, {late}, points"
            agrees(table[together, label][column], *over(falls))


# ---- the committed numbers


def test_the_committed_tables_are_what_the_logs_give():
    done = subprocess.run([sys.executable, PROJECT / "nc_statistics.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_committed_claims_recomputed():
    readme = (PROJECT / "README.md").read_text()
    body = readme.split("<!-- statistics -->\n")[1].split("\n<!-- /statistics -->")[0]
    check_claims(PROJECT / "res", body)
    assert body in (PROJECT / "res" / "statistics.md").read_text()


# ---- on runs with noise


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A project of which only README.md and res/ exist, with three seeds of each Omniglot setting."""
    folder = tmp_path_factory.mktemp("home")
    nc_logs.write_study(folder / "res", steps=600, every=60)
    (folder / "README.md").write_text(README)
    for path, text in nc_statistics.documents(folder).items():
        path.write_text(text)
    return folder


def test_claims_agree_with_an_independent_recomputation(home):
    text = (home / "README.md").read_text()
    check_claims(home / "res", text.split("<!-- statistics -->\n")[1].split("\n<!-- /statistics -->")[0])
    assert text.startswith("Before.\n") and "\nBetween.\n" in text and text.endswith("After.\n") and "stale" not in text


def test_check_passes_only_on_what_the_logs_give(home, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    monkeypatch.setattr(nc_statistics, "HERE", copy)
    nc_statistics.main(["--check"])
    assert capsys.readouterr().out.count("as the logs give it") == 2
    for path in (copy / "README.md", copy / "res" / "statistics.md"):
        text = path.read_text()
        path.write_text(text.replace("0.9", "0.8", 1))
        with pytest.raises(files.UserError, match="isn't what the logs"):
            nc_statistics.main(["--check"])
        assert path.read_text() != text, "--check writes nothing"
        path.write_text(text)
    log = copy / "res" / "omniglot-5w5s-seed2" / "log.jsonl"
    with gzip.open(log.with_suffix(".jsonl.gz"), "wb") as file:
        file.write(log.read_bytes())
    log.unlink()
    nc_statistics.main(["--check"])  # a compressed log is the same log
    shutil.rmtree(log.parent)
    with pytest.raises(files.UserError, match="isn't what the logs"):
        nc_statistics.main(["--check"])
    nc_statistics.main([])
    nc_statistics.main(["--check"])


def test_without_torch():
    code = "import sys, nc_statistics, plot_nc; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout == "False\n", done.stderr


# ---- on runs with known effects


def exact(seed: int):
    """Values with effects that can be worked out by hand; they differ between seeds as `seed` does."""

    def value(model: str, metric: str, layer: int, step: int, classes: str) -> float:
        shift = 0.01 * seed * (layer + 1)
        if metric == "relative_within":
            return (0.9 - 0.1 * math.log10(max(step, 1)) - (0.05 + shift) * (model == "finetuned")
                    + 0.02 * (classes == "heldout"))  # fmt: skip
        if metric == "ncc_accuracy":
            return 0.9 - 0.5 / (1 + step / 100)
        if metric == "cdnv":
            return (1 - 0.98 * (0.9 - 0.5 / (1 + step / 100))) ** 2  # the error, squared
        if metric == "cdnv_null":
            return 7.0
        return nc_logs.usual(model, metric, layer, step, classes)

    return value


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    paths = [nc_logs.write_run(folder / str(seed), nc_logs.log(1_200, value=exact(seed)), seed=seed, epoch=1_200,
                               accuracy=0.9 + seed / 100) for seed in (1, 2, 3)]  # fmt: skip
    return logs.read_runs(paths)


def test_slope_and_change_of_a_straight_line(known):
    for run in known:
        for first in (30, 600):
            assert effects.slope(run, "meta", "relative_within", "block4", first) == pytest.approx(-0.1)
        assert effects.first_step(run) == 90
        ends = [math.log10(step) for step in range(1_080, 1_200, 30)]  # the last tenth of 1,200
        expected = -0.1 * (sum(ends) / len(ends) - math.log10(90))
        assert effects.change(run, "meta", "relative_within", "block4") == pytest.approx(expected)
        assert math.isnan(effects.slope(run, "meta", "relative_within", "block4", 1_150))


def test_differences_between_models_classes_and_the_null(known):
    apart = [effects.models_apart(run, "relative_within", "block4", "train") for run in known]
    assert apart == pytest.approx([-0.09, -0.13, -0.17])
    assert effects.over_seeds(apart) == pytest.approx((-0.13, -0.13 - 0.0994, -0.13 + 0.0994), abs=1e-4)
    found = effects.classes_apart(known[0], "meta", "relative_within", "block1")
    steps = range(1_080, 1_200, 30)
    later = math.log10(1_200) - sum(map(math.log10, steps)) / len(steps)  # held-out tasks: at step 1,200 alone
    assert found == pytest.approx(0.02 - 0.1 * later)
    end = (1 - 0.98 * (0.9 - 0.5 / 13)) ** 2
    assert effects.from_null(known[0], "meta", "cdnv", "block1") == pytest.approx(end - 7)
    assert effects.learned(known[0], "meta", "cdnv", "block1") == pytest.approx(end - (1 - 0.98 * 0.4) ** 2)


def test_the_originals_measurement_stands_beside_the_right_one(known):
    run = known[0]
    right, original = (effects.share_of_means(run, "meta", suffix, "logits", 90) for suffix in ("", "_original"))
    within, between = (effects.at(run, "meta", name, "logits", "train", 90) for name in ("within", "between"))
    assert right == pytest.approx(within / (within + between))
    assert original == pytest.approx((within + between / 2) / (within + between))


def test_correlations_go_through_fishers_z(known):
    assert effects.correlation(known[0], "block4") == pytest.approx(1)
    assert effects.correlation(known[0], "block4", 1_000) != effects.correlation(known[0], "block4", 1_000)
    mean, low, high = effects.correlations_over_seeds([0.5, 0.6, 0.7])
    z = [math.atanh(r) for r in (0.5, 0.6, 0.7)]
    half = 4.303 * statistics.stdev(z) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx([math.tanh(statistics.fmean(z) + h) for h in (0, -half, half)])


def test_a_correlation_that_is_nothing_but_the_trend_of_both(tmp_path):
    def value(model: str, metric: str, layer: int, step: int, classes: str) -> float:
        size = max(step, 1)
        wiggle = math.exp(0.1 if step // 250 % 2 else -0.1)
        if metric == "cdnv":
            return 100 / size * wiggle
        if metric == "ncc_accuracy":  # the error is 2 / step ** 0.5, and high where CDNV is low
            return (1 - 2 / size**0.5 / wiggle) / 0.98
        return nc_logs.usual(model, metric, layer, step, classes)

    run = logs.read_run(nc_logs.write_run(tmp_path / "run", nc_logs.log(3_000, 500, value=value)))
    assert effects.correlation(run, "block4", 500) > 0.8
    assert effects.correlation(run, "block4", 500, detrended=True) == pytest.approx(-1)
    assert math.isfinite(effects.correlation(run, "block4", 2_500))
    assert math.isnan(effects.correlation(run, "block4", 2_500, detrended=True)), "a line fits two of three points"


def run_of(folder: Path, points: dict[int, tuple[float, float]]) -> logs.Run:
    """A run of which each step's CDNV and held-out error at the last hidden layer are given."""

    def value(model: str, metric: str, layer: int, step: int, classes: str) -> float:
        if metric in ("cdnv", "ncc_accuracy"):
            cdnv, error = points[step]
            return cdnv if metric == "cdnv" else (1 - error) / 0.98
        return nc_logs.usual(model, metric, layer, step, classes)

    rows = [nc_logs.nc_row(step, classes, value=value) for step in points for classes in ("train", "heldout")]
    return logs.read_run(nc_logs.write_run(folder, rows))


def test_ranks_don_t_follow_one_checkpoint_far_off(tmp_path):
    run = run_of(tmp_path / "run", {1_000: (0.2, 0.04), 2_000: (0.21, 0.03), 3_000: (0.22, 0.02), 4_000: (9, 0.9)})
    assert effects.correlation(run, "block4") > 0.95
    assert effects.correlation(run, "block4", of_ranks=True) == pytest.approx(0.2)  # ranks 0 1 2 3 and 2 1 0 3
    points = {1_000: (0.2, 0.02), 2_000: (0.3, 0.03), 3_000: (0.4, 0.03), 4_000: (0.5, 0.04)}
    tied = run_of(tmp_path / "tied", points)
    assert effects.correlation(tied, "block4", of_ranks=True) == pytest.approx(0.9**0.5)  # 0 1 2 3 and 0 1.5 1.5 3
    perfect = run_of(tmp_path / "perfect", {1_000: (0.2, 0.0), 2_000: (0.3, 0.1), 3_000: (0.4, 0.2)})
    assert math.isnan(effects.correlation(perfect, "block4", of_ranks=True)), "no error, no logarithm"
    for cdnv in (0.0, math.nan):
        odd = run_of(tmp_path / str(cdnv), {1_000: (cdnv, 0.02), 2_000: (0.3, 0.1), 3_000: (0.4, 0.2)})
        assert math.isnan(effects.correlation(odd, "block4", of_ranks=True))


def test_spread_beside_the_trend_and_the_largest_fall(tmp_path):
    points = {100: (0.5, 0.3), 1_000: (0.5, 0.05), 2_000: (0.5, 0.06), 4_000: (0.5, 0.01)}
    run = run_of(tmp_path / "run", points)
    _, (squares,), *_ = np.polyfit(np.log(list(points)), np.log([error for _, error in points.values()]), 1, full=True)
    assert effects.error_spread(run, "block4", 0) == pytest.approx(math.sqrt(squares / 2))
    assert math.isnan(effects.error_spread(run, "block4", 200)), "three checkpoints"
    errors = {0: 0.5, 250: 0.1, 500: 0.14, 750: 0.12, 1_000: 0.13}
    falling = run_of(tmp_path / "falling", {step: (1, error) for step, error in errors.items()})
    assert effects.largest_fall(falling, "block4", 0) == pytest.approx(0.04)
    assert effects.largest_fall(falling, "block4", 500) == pytest.approx(0.01)
    assert math.isnan(effects.largest_fall(falling, "block4", 1_000))


@pytest.mark.parametrize(
    "estimate, text",
    [
        ((0.3812, 0.3612, 0.4012), "0.381 ± 0.020"),
        ((-12.3, -15.7, -8.9), f"{MINUS}12.3 ± 3.4"),
        ((0.97, 0.93, 0.99), "0.970 [0.930, 0.990]"),
        ((-0.001, -0.2, 0.198), "0.00 ± 0.20"),
        ((0.34, math.nan, math.nan), "0.340"),
        ((6.9, 6.9, 6.9), "6.90"),
        ((math.nan, math.nan, math.nan), "undefined"),
    ],
)
def test_how_numbers_are_written(estimate, text):
    assert nc_statistics.written(effects.Estimate(*estimate)) == text


def test_accuracies(known):
    row = nc_statistics.accuracies([known]).splitlines()[2]
    assert row == (
        "| Omniglot, 5-way 1-shot, second order | 1,200 x 8 | 92.0 ± 2.5 | 1: 91.00 ± 0.60<br>2: 92.00 ± 0.60"
        "<br>3: 93.00 ± 0.60 | 50; a processor, 1 thread | 98.7 ± 0.4 / 98.3 ± 0.5 |"
    )
    assert "On 600 tasks of the test classes, 15 queries a class" in nc_statistics.accuracies([known])


def test_a_single_seed_has_no_interval_and_a_log_without_nulls_says_so(tmp_path):
    run = logs.read_run(nc_logs.write_run(tmp_path / "run", nc_logs.log(600, null=False)))
    text = nc_statistics.claims([[run]]).split("\n\n")[0]
    assert "±" not in text.replace("[", "±") and "null not logged" in text
    nc_statistics.details([run])


def test_refusals(tmp_path):
    with pytest.raises(files.UserError, match="no run of the study"):
        nc_statistics.documents(tmp_path)
    nc_logs.write_run(tmp_path / "res" / "omniglot-5w1s-seed1", nc_logs.log(300))
    (tmp_path / "README.md").write_text("<!-- accuracies -->\n<!-- /accuracies -->\n")
    with pytest.raises(files.UserError, match="README.md needs one <!-- statistics -->"):
        nc_statistics.documents(tmp_path)
    (tmp_path / "README.md").write_text(README)
    late = nc_logs.write_run(tmp_path / "late", [row for row in nc_logs.log(300) if row["step"] > 0])
    with pytest.raises(files.UserError, match="no train measurement at step 0"):
        nc_statistics.claims([[logs.read_run(late)]])
    result = tmp_path / "res" / "omniglot-5w1s-seed1" / "timing.json"
    result.unlink()
    with pytest.raises(files.UserError, match="timing.json"):
        nc_statistics.documents(tmp_path)
    result.write_text("[]")
    with pytest.raises(files.UserError, match="has no training_minutes"):
        nc_statistics.documents(tmp_path)
