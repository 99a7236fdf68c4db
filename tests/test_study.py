"""The study's numbers against a plain recomputation from JSON lines, its tables, the program that trains its runs."""

import gzip
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nc_logs
import numpy as np
import pytest
from data_files import refused

from checkpoint import load_weights
from record import check_network
from settings import recorded_settings
from study import effects, run, tables
from study.design import MAIN, SETTINGS
from study.logs import HOME, Run, Study, differing, read_groups, read_run
from study.markdown import over, written


def mean(rows: list[dict], model: str, metric: str, layer: int) -> float:
    return statistics.fmean(row[model][metric]["mean"][layer] for row in rows)


@pytest.mark.parametrize("setting", MAIN)
def test_numbers_of_the_committed_runs_recomputed(setting):
    changes = []
    for one in Study(HOME / "res")[setting]:
        with gzip.open(one.path / "log.jsonl.gz") as lines:
            rows = [row for row in map(json.loads, lines) if row["kind"] == "nc"]
        heldout, train = ([row for row in rows if row["classes"] == split] for split in ("heldout", "train"))
        late_heldout, late_train = ([row for row in part if row["step"] >= 0.9 * heldout[-1]["step"]]
                                    for part in (heldout, train))
        growth = mean(late_heldout, "finetuned", "within", -2) / mean(heldout[:1], "finetuned", "within", -2)
        value, *arguments = tables.GROWTH["within trace, adapted, end / untrained"]
        assert value(one, *arguments) == pytest.approx(growth)
        for model in ("meta", "finetuned"):
            assert effects.end(one, model, "nc1", 1) == pytest.approx(mean(late_heldout, model, "nc1", 1))
        share = mean(late_train, "meta", "relative_within", -2)
        assert effects.end(one, "meta", "relative_within", split="train") == pytest.approx(share)
        accuracy = statistics.fmean(row["inner"]["accuracy"]["mean"][-1] for row in late_train)
        assert effects.end(one, "finetuned", "accuracy", split="train") == pytest.approx(accuracy)
        first, last = ([mean(part, "meta", f"{trace}_original", -1) for trace in ("within", "between")]
                       for part in (train[:1], late_train))
        changes.append(last[0] / sum(last) - first[0] / sum(first))
        assert effects.logit_share_change(one, "meta", "_original") == pytest.approx(changes[-1])
    half = 4.303 * statistics.stdev(changes) / math.sqrt(3)  # of three seeds; t's 97.5% point from a printed table
    assert effects.over_seeds(changes) == pytest.approx((statistics.fmean(changes), half), rel=1e-3)


# ---- statistics


def test_the_interval_over_tasks(tmp_path):
    log = nc_logs.log()
    traces = log[-1]["per_task"]["finetuned"]
    shares = [within / (within + between) for within, between in zip(traces["within"], traces["between"])]
    expected = 1.96 * statistics.stdev(shares) / math.sqrt(len(shares))
    assert effects.share_over_tasks(read_run(nc_logs.write_run(tmp_path, log))) == pytest.approx(expected)


def test_how_far_the_inner_loop_lowers_the_share(tmp_path):
    shares = {"meta": 0.7, "finetuned": 0.4}
    final = {model: {"relative_within": {"mean": [0.9, share, 0.8]}} for model, share in shares.items()}
    (nc_logs.write_run(tmp_path) / "controls.json").write_text(json.dumps({"final": final}))
    value, *arguments = tables.FALL
    assert value(read_run(tmp_path), *arguments) == pytest.approx(0.7 - 0.4)


def test_the_etf_error_of_random_directions_and_the_dimension_that_matches_it(tmp_path):
    means = np.random.default_rng(3).standard_normal((4_000, 5, 16))
    means -= means.mean(1, keepdims=True)
    gram = means @ means.transpose(0, 2, 1)
    gram /= np.linalg.norm(gram, axis=(1, 2), keepdims=True)
    errors = np.linalg.norm(gram - (np.eye(5) - 0.2) / 2, axis=(1, 2))
    for error, dimension in ((errors.mean(), 16), (0.01, math.nan)):  # a simplex, nearly: in more than 64 dimensions
        run = read_run(nc_logs.write_run(tmp_path, nc_logs.log(value=lambda *_, error=error: float(error))))
        assert effects.matching_dimension(run) == pytest.approx(dimension, rel=0.03, nan_ok=True)


@pytest.mark.parametrize("x, y, expected", [
    ([1, 2, 3, 4], [10, 20, 30, 4000], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([0, 1.5, 1.5, 3], [0, 1, 2, 3], 0.9**0.5),
    ([1, 1, 1], [1, 2, 3], math.nan), ([1, 2], [1, 2], math.nan), ([1, 2, math.nan], [1, 2, 3], math.nan)])
def test_spearman(x, y, expected):
    assert effects.spearman(x, y) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("mean, half, text", [
    (0.3812, 0.02, "0.381 ± 0.020"), (0.3812, 0.06, "0.38 ± 0.06"), (-12.3, 3.4, "−12.3 ± 3.4"), (93.1, 4.1, "93 ± 4"),
    (-0.001, 0.199, "0.00 ± 0.20"), (0.34, math.nan, "0.34"), (7.0, 0.0, "7.0"), (48.2, math.nan, "48.2"),
    (math.nan, math.nan, "–")])
def test_a_number_has_the_digits_that_its_interval_carries(mean, half, text):
    assert written(mean, half) == text


def test_a_cell_has_both_values_of_two_seeds_and_the_interval_of_three():
    cell = over(lambda seed: 10.0 * seed, 0.1)
    assert [cell(seeds) for seeds in ([2], [2, 3], [2, math.nan], [1, 2, 3])] == ["2.0", "2.0, 3.0", "–", "2.0 ± 2.5"]


# ---- tables


@pytest.mark.slow
def test_the_tables_of_all_pages_are_what_the_logs_give():
    tables.main(["--check"])


def rows_of_table(table: str) -> list[dict[str, str]]:
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n"))
    return [dict(zip(header, row)) for row in rows]


@pytest.fixture
def home(tmp_path):
    """A project of which only the pages with tables and res/ exist."""
    nc_logs.write_study(tmp_path / "res", nc_logs.STUDY | nc_logs.LEARNERS | nc_logs.LONG)
    (tmp_path / "study").mkdir()
    for page, names in zip(tables.PAGES, (["collapse"], tables.TABLES, ["layers"], ["cells"])):
        (tmp_path / page).write_text("Before.\n" + "".join(
            f"<!-- table: {name} -->\n<!-- /table -->\nAfter.\n" for name in names))
    tables.main([], tmp_path)
    return tmp_path


def test_check_names_the_first_row_that_differs_and_writes_nothing(home):
    tables.main(["--check"], home)
    page = home / "study" / "README.md"
    text = page.read_text()
    page.write_text(changed := text.replace("| seeds | 3 |", "| seeds | 4 |", 1))
    with refused("study/README.md, table collapse: '| seeds | 4 | 3 ", "', and the logs give '| seeds | 3 | 3 "):
        tables.main(["--check"], home)
    assert page.read_text() == changed
    page.write_text(text.replace("table: runs", "table: none"))
    with refused("there is no table 'none'"):
        tables.main([], home)
    page.write_text(text)
    shutil.rmtree(home / "res" / "omniglot-5w5s-seed2")
    with refused("README.md, table collapse: '", " 3 | 3 | 3 |', and the logs give '", " 3 | 2 | 3 |'; run python"):
        tables.main(["--check"], home)


def test_learners_are_compared_by_their_controls(home):
    study = Study(home / "res")
    collapse, (_, share, *_) = tables.collapse(study), rows_of_table(tables.learners(study))
    columns = ["raw pixels", "untrained", "MAML, second order", "ANIL", "BOIL", "ProtoNet", "classifier"]
    assert share == {"": "relative within trace"} | dict.fromkeys(columns, "–")  # not yet measured
    assert [row["meta-step"] for row in rows_of_table(tables.length(study))] == ["120"]  # a long run at its end
    ((protonet,),) = read_groups([home / "res" / "contrast-protonet-seed1"])
    assert effects.own_accuracy(protonet) == protonet.file("result.json")["test"]["nearest_mean"][0]
    for folder in (*(home / "res").glob("contrast-*"), home / "res" / "omniglot-5w1s-seed1"):
        nc_logs.write_controls(folder, 1 + 0.01 * len(folder.name))
    study = Study(home / "res")
    rows = {row[""]: row for row in rows_of_table(tables.learners(study))}
    assert rows["seeds"]["raw pixels"] == "1" and rows["dimension"]["raw pixels"] == "17.5"
    assert "–" not in [row["MAML, second order"] for row in rows.values()]
    assert tables.collapse(study) == collapse, "a table of the log takes nothing from the controls"
    for i, name in enumerate(nc_logs.LEARNERS):  # accuracies before adaptation 0, 0.1, ..., after it 0, -0.1, ...
        for path in home.glob(f"res/{name}-seed*/controls.json"):
            kinds = json.loads(path.read_text())
            for model, sign in (("meta", 1), ("finetuned", -1)):
                kinds["final"][model]["ncc_accuracy"]["mean"][-2] = 0.1 * i * sign
            path.write_text(json.dumps(kinds))
    (_, before, used, _), *_ = (row.values() for row in rows_of_table(tables.ranking(Study(home / "res"))))
    groups = Study(home / "res").groups(nc_logs.LEARNERS)
    for found, models, accuracies in ((before, ["meta"] * 5, range(5)),
                                      (used, ["finetuned"] * 3 + ["meta"] * 2, (0, -1, -2, 3, 4))):
        shares = [-effects.measured(runs[0], model, "relative_within") for runs, model in zip(groups, models)]
        assert float(found.replace("−", "-")) == pytest.approx(effects.spearman(shares, accuracies), abs=0.006)


def test_one_change_is_compared_after_equally_many_meta_steps(tmp_path):
    log = nc_logs.log(6_000, every=1_000, eval_every=1_000, value=lambda *place: place[3] / 7_000)
    nc_logs.write_run(tmp_path / "small-step-seed1", log)
    (row,) = rows_of_table(tables.changes(Study(tmp_path)))
    assert float(row["relative within trace, adapted"]) == pytest.approx(5 / 7, rel=0.05)
    for name in ("nearest support mean before adaptation, %", "classifier, adapted, %"):
        assert float(row[name]) == pytest.approx(500 / 7, rel=0.05)


def test_the_unbiased_cdnv_of_a_control_knows_its_queries(tmp_path):
    one = read_run(nc_logs.write_run(tmp_path, k_qry=15))
    kinds, measured = ("final", "queries 5", "queries 1"), {"meta": {"cdnv": {"mean": [None, 0.4, 1.0]}}}
    (tmp_path / "controls.json").write_text(json.dumps(dict.fromkeys(kinds, measured)))
    unbiased = [effects.measured(one, "meta", "cdnv_unbiased", kind) for kind in kinds]
    assert unbiased == pytest.approx([15 * 0.4 / (14 - 0.8), 5 * 0.4 / (4 - 0.8), math.nan], nan_ok=True)


def test_the_error_of_the_unbiased_cdnv_is_that_of_cdnv_times_its_slope(tmp_path):
    one = read_run(nc_logs.write_run(tmp_path, k_qry=15))
    _, cdnv, se = effects.series(one, "heldout", "meta", "cdnv")
    _, _, found = effects.series(one, "heldout", "meta", "cdnv_unbiased")
    above, below = (effects.unbiased_cdnv(cdnv + step, 15) for step in (1e-6, -1e-6))
    assert found == pytest.approx(se * (above - below) / 2e-6, rel=1e-5) and found.min() > 0


# ---- the program that trains the runs, with a stand-in for the training scripts

# A run with the seed 2 waits to be stopped until it is resumed; seed 3 fails.
STAND_IN = '''
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
resumed = "--resume" in flags
folder = pathlib.Path(flags.get("--resume") or flags["--out"])
folder.mkdir(parents=True, exist_ok=True)
seed = json.loads((folder / "args.json").read_text())["settings"]["seed"] if resumed else int(flags["--seed"])
settings = {"seed": seed, "epoch": 6000, "task_num": 8, "out": str(folder)}
(folder / "args.json").write_text(json.dumps({"settings": settings}))
def stop(*_):
    (folder / "checkpoint.pt").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with open(folder / "log.jsonl", "a") as log:
    log.write("resumed\\n" if resumed else "begun\\n")
if seed == 2 and not resumed:
    time.sleep(60)
if seed == 3:
    sys.exit("no luck")
for name in ("timing.json", "result.json", "last.pt"):
    (folder / name).write_text("{}")
'''
SETTING = "omniglot-5w1s"


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "omniglot_train.py").write_text(STAND_IN)
    monkeypatch.setattr(run, "HOME", tmp_path)
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(place: Path, seed: int) -> list[str]:
    return (place / "runs" / "study" / f"{SETTING}-seed{seed}" / "log.jsonl").read_text().split()


def test_finished_runs_are_skipped_and_failures_named(place, capsys):
    run.main([SETTING, "--seeds", "1"])
    assert "0 of 1 runs are finished" in capsys.readouterr().out
    with refused(f"failed: {SETTING}-seed3; ", "seed3.txt says why"):
        run.main([SETTING, "--seeds", "1", "3", "4", "--jobs", "2"])
    assert "1 of 3 runs are finished" in capsys.readouterr().out
    assert log_of(place, 1) == log_of(place, 4) == ["begun"]
    assert "no luck" in (place / "runs" / "study" / f"{SETTING}-seed3.txt").read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (1, 129), (signal.SIGINT, -2)])  # 1: SIGHUP
def test_stopped_it_stops_its_runs_and_then_resumes_them(number, status, place, capsys):
    """By SIGTERM, by a terminal that is closed, or by Ctrl-C, which a terminal sends to the whole group."""
    code = ("import pathlib, signal; from study import run; "  # the tests may have been started with signals ignored
            "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"run.HOME = pathlib.Path({str(place)!r}); run.main(['{SETTING}', '--seeds', '2'])")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=place, env={"PYTHONPATH": str(HOME)},
                               start_new_session=True)
    folder = place / "runs" / "study" / f"{SETTING}-seed2"
    log = folder / "log.jsonl"  # written once the stand-in has its handler
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait() == status
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    run.main([SETTING, "--seeds", "2"])
    assert "--resume" in capsys.readouterr().out and log_of(place, 2) == ["begun", "resumed"]


def test_collected_files_name_no_place_and_no_time(place, capsys):
    run.main([SETTING, "--seeds", "1"])
    for _ in range(2):
        run.main([SETTING, "--seeds", "1", "2", "--collect"])
        collected = {path.name: path.read_bytes() for path in (place / "res" / f"{SETTING}-seed1").iterdir()}
        assert collected.keys() == {"log.jsonl.gz", "args.json", "result.json", "timing.json", "last.pt"}
        assert gzip.decompress(collected["log.jsonl.gz"]) == b"begun\n" and collected["log.jsonl.gz"][4:8] == bytes(4)
        assert json.loads(collected["args.json"])["settings"] == {"seed": 1, "epoch": 6000, "task_num": 8, "out": None}
    assert f"{SETTING}-seed2: not finished, left out" in capsys.readouterr().out
    folder, results = (place / parent / f"{SETTING}-seed1" for parent in ("runs/study", "res"))
    settings = {"seed": 1, "epoch": 6000, "task_num": 8}

    def collect(arguments: dict, name: str = SETTING) -> None:
        (folder.with_name(f"{name}-seed1") / "args.json").write_text(json.dumps(arguments))
        run.main([name, "--seeds", "1", "--collect"])

    (folder / "best.pt").write_text("weights")
    shutil.copytree(folder, folder.with_name("small-step-seed1"))
    for name, tested in ((SETTING, "best"), ("small-step", "last")):  # the best weights where they were tested
        collect({"settings": {"test_weights": tested}}, name)
        assert (results.with_name(f"{name}-seed1") / "best.pt").exists() == (tested == "best")
    (results / "controls.json").write_text("{}")
    collect({"settings": settings})
    assert (results / "controls.json").exists()
    (folder / "last.pt").write_text("other weights")
    collect({"settings": settings})
    assert not (results / "controls.json").exists()
    with refused("seed1 is damaged", "; let it train again"):
        collect({})


@pytest.mark.parametrize("name", SETTINGS)
def test_every_command_is_one_that_its_script_takes(name):
    (job, *_) = run.jobs_of([name], None)
    script, *flags = job.command()
    module = importlib.import_module(Path(script).stem)
    args = module.arguments(flags)
    net = module.network(args)
    assert args.out == str(job.folder) and args.seed == 1
    for path in (HOME / "res").glob(f"{name}-seed*/args.json"):  # a seed that is trained today is of the same setting
        then = json.loads(path.read_bytes())
        now = then | {"settings": recorded_settings(args) | {"nc_qry": then["settings"]["nc_qry"]}}
        assert not differing(*(Run(path.parent, arguments, {}) for arguments in (then, now)))
        check_network(path.parent, net)  # of runs that recorded it
        load_weights(path.parent, args.test_weights, net)


@pytest.mark.parametrize("arguments, words", [("omniglot", "no setting 'omniglot'"), ("--jobs 0", "at least 1")])
def test_refusals(arguments, words, place):
    with refused(words):
        run.main(arguments.split())
    assert not (place / "runs").exists()
