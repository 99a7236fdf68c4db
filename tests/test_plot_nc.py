"""The figure, from logs that the tests write: what it shows, what it says, one line for each thing wrong."""

import copy
import gzip
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import curves
import drawing
import figures
import files
import nc_logs
import nc_statistics
import plot_nc
import runs as logs
from curves import Curve

PROJECT = Path(plot_nc.__file__).parent
LAYERS = ["block1", "block2", "logits"]


def nc_row(step: int, classes: str = "train", within: float = 9.0, between: float = 1.0) -> dict:
    """A measurement whose traces at layer l are l + 1 times those given, with a standard error of 0.1."""
    scale = np.arange(1, len(LAYERS) + 1)
    means = {
        "within": within * scale,
        "between": between * scale,
        "relative_within": within * scale / ((within + between) * scale),
    }
    model = {name: {"mean": mean.tolist(), "se": [0.1] * 3} for name, mean in means.items()}
    model["nc1"] = {"mean": [None] * 3, "se": [None] * 3}
    return {
        "kind": "nc", "step": step, "classes": classes, "tasks": 8 if classes == "train" else 100,
        "layers": LAYERS, "meta": model, "finetuned": copy.deepcopy(model),
    }  # fmt: skip


def rows(shift: float = 0.0) -> list[dict]:
    return [
        {"kind": "train", "step": 50, "loss": 0.9, "acc": [0.2, 0.5]},
        nc_row(100, within=9 + shift),
        nc_row(200, within=8 + shift, between=2),
        nc_row(200, "heldout", within=8.5 + shift),
        {"kind": "val", "step": 200, "acc": [0.2, 0.6], "ci95": [0.01, 0.01], "tasks": 100},
        nc_row(300, within=7 + shift, between=3),
    ]


def write_run(folder: Path, log: list[dict] | None = None, **settings) -> Path:
    """A run's folder as the training scripts write it, with two hidden layers and three measurements."""
    return nc_logs.write_run(folder, rows() if log is None else log, **settings)


def program(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "plot_nc.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def texts(figure) -> str:
    """Every word in the figure's own texts, its legend and its panels' titles and axes."""
    words = [text.get_text() for text in figure.texts]
    words += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        words += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
    return "\n".join(words)


def refused(*arguments: object) -> str:
    """The line a refusal prints, through the same door as the program, without starting one."""
    with pytest.raises(files.UserError) as caught:
        plot_nc.main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what it draws


def test_one_run_is_drawn_into_its_folder(tmp_path):
    done = program(write_run(tmp_path / "run"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "result.png" in done.stdout
    with Image.open(tmp_path / "run" / "result.png") as picture:
        assert picture.format == "PNG" and picture.width == 1800 and picture.height > 1800
        assert np.asarray(picture.convert("L")).std() > 10, "an empty picture"
    assert [path.name for path in (tmp_path / "run").glob("*.png")] == ["result.png"]


def test_three_seeds_twice_give_the_same_bytes(tmp_path):
    runs = [write_run(tmp_path / str(seed), rows(0.3 * seed), seed=seed) for seed in range(3)]
    for name in ("a.png", "b.png"):
        plot_nc.main([*map(str, runs), "-o", str(tmp_path / name)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_argument_draws_every_figure_of_the_committed_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot_nc, "HERE", tmp_path)
    assert "no run of the study" in refused()
    nc_logs.write_study(tmp_path / "res", steps=300, seeds=2)
    longer = nc_logs.log(300)
    nc_logs.write_run(tmp_path / "res" / "omniglot-5w1s-32-tasks-seed1", longer, task_num=32)
    nc_logs.write_run(tmp_path / "res" / f"{logs.STUDY[-1].name}-seed1", longer, name="photographs", k_spt=5)
    plot_nc.main([])
    pictures = {path.name for path in tmp_path.rglob("*.png")}
    assert pictures == {file for _, file in plot_nc.FIGURES.values()} | {"photographs.png"}
    said = dict(re.findall(r"wrote .*/(\S+): (\d+) run", capsys.readouterr().out))
    assert said["result.png"] == "2" and said["nc.png"] == said["layers.png"] == "6"
    assert said["accuracy.png"] == "7", "the other number of tasks is compared, and in no other figure"
    assert "-o takes one picture" in refused("-o", tmp_path / "x.png")


def test_the_study_takes_only_its_own_runs(tmp_path):
    """omniglot-5w1s must not take the runs of omniglot-5w1s-first-order-original."""
    for name in ("omniglot-5w1s-seed2", "omniglot-5w1s-seed1", "omniglot-5w1s-first-order-original-seed1",
                 "omniglot-5w1s-seeds", "omniglot-5w1s-32-tasks-seed1"):  # fmt: skip
        write_run(tmp_path / name)
    found = [path.name for path in logs.committed("omniglot-5w1s", tmp_path)]
    assert found == ["omniglot-5w1s-seed1", "omniglot-5w1s-seed2"]


def test_torch_and_windows_stay_out(tmp_path):
    run = write_run(tmp_path / "run")
    code = (
        "import sys, plot_nc; plot_nc.main([sys.argv[1]]); "
        "print(sorted({'torch', 'torchvision', 'tkinter', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_panels_axes_and_captions(tmp_path):
    figure = figures.traces_figure([[logs.read_run(write_run(tmp_path / "run", first_order=False, net="conv_bn_relu"))]])
    words = texts(figure)
    assert len(figure.axes) == 6
    assert all(axes.get_xlabel() == "meta-step" for axes in figure.axes)
    assert "squared feature units" in words and "share of total trace" in words
    assert "Omniglot" in words and "5-way 1-shot, second order, paper network, 15 queries a class" in words
    assert "layer block2 (last hidden layer)" in words
    assert "8 training tasks or 100 held-out tasks; 1 seed" in words
    assert "within, pure noise: 0.946" in words
    assert "95% band: 1.96 standard errors over its tasks" in words and "synthetic" not in words
    assert "mean of the measurements within 10% of its step" in words


def test_synthetic_runs_say_so_in_the_title(tmp_path):
    run = logs.read_run(write_run(tmp_path / "run", name="synthetic characters"))
    title, _ = figures.captions([run], "block2")
    assert "synthetic characters" in title
    assert title in [text.get_text() for text in figures.traces_figure([[run]]).texts]


def test_drawn_values_are_those_of_the_chosen_layer(tmp_path):
    figure = figures.traces_figure([[logs.read_run(write_run(tmp_path / "run"))]], "logits")
    assert "layer logits" in texts(figure)
    drawn = {}
    for line in figure.axes[2].get_lines():  # the meta model's traces over the whole run
        drawn[line.get_color(), line.get_linestyle()] = line.get_ydata().tolist()
    assert drawn[drawing.WITHIN, "-"] == [27, 24, 21]
    assert drawn[drawing.BETWEEN, "-"] == [3, 6, 9]
    assert drawn[drawing.DARKER[drawing.WITHIN], "--"] == [25.5]
    lines = [line for line in figure.axes[3].get_lines() if len(line.get_xdata()) == 3]
    shares = {line.get_color(): line.get_ydata() for line in lines}
    assert shares[drawing.WITHIN] == pytest.approx([0.9, 0.8, 0.7])
    assert shares[drawing.BETWEEN] == pytest.approx([0.1, 0.2, 0.3])


def test_the_first_panels_stop_at_the_early_steps(tmp_path):
    log = [nc_row(step, within=9 + step / 1e4) for step in range(500, 12_001, 500)]
    figure = figures.traces_figure([[logs.read_run(write_run(tmp_path / "run", log))]])
    assert max(figure.axes[0].get_lines()[0].get_xdata()) == 7500
    assert max(figure.axes[2].get_lines()[0].get_xdata()) == 12_000
    assert "first 7,500 meta-steps" in texts(figure) and "held-out" not in texts(figure)


def test_traces_of_very_different_size_get_a_logarithmic_axis(tmp_path):
    log = [nc_row(step, within=90, between=0.5) for step in (100, 200)]
    figure = figures.traces_figure([[logs.read_run(write_run(tmp_path / "run", log))]])
    assert figure.axes[0].get_yscale() == "log" and "log scale" in texts(figure)
    assert figure.axes[1].get_yscale() == "linear"


# ---- the numbers


def test_band_over_tasks_for_one_run(tmp_path):
    found = curves.metric_curve([logs.read_run(write_run(tmp_path / "run"))], "meta", "within", "block2")
    assert found.steps.tolist() == [100, 200, 300]
    assert found.mean.tolist() == [18, 16, 14]
    assert found.high - found.mean == pytest.approx([0.196] * 3)
    assert found.mean - found.low == pytest.approx([0.196] * 3)


def test_band_over_seeds_for_several(tmp_path):
    runs = [write_run(tmp_path / str(seed), rows(seed), seed=seed) for seed in (0, 1, 2)]
    found = curves.metric_curve(logs.read_runs(runs), "finetuned", "within", "block1")
    assert found.mean == pytest.approx([10, 9, 8])
    assert found.high - found.mean == pytest.approx([4.303 / math.sqrt(3)] * 3)  # t(2), deviation 1, 3 seeds


def test_smoothing_averages_the_measurements_within_a_tenth_of_each_step():
    steps = np.arange(1, 1_201, 31)
    generator = np.random.default_rng(0)
    mean, half = generator.normal(5, 1, len(steps)), generator.uniform(0.1, 0.2, len(steps))
    mean[20] = np.nan
    found = curves.smoothed(Curve(steps, mean, mean - half, mean + half))
    for i, step in enumerate(steps):
        near = [j for j, other in enumerate(steps) if 0.9 * step <= other <= 1.1 * step and j != 20]
        if i == 20:
            assert math.isnan(found.mean[i]), "a gap stays a gap"
            continue
        assert found.mean[i] == pytest.approx(sum(mean[j] for j in near) / len(near))
        error = math.sqrt(sum(half[j] ** 2 for j in near)) / len(near)
        assert (found.mean[i] - found.low[i], found.high[i] - found.mean[i]) == pytest.approx((error, error))
    assert found.mean[:10].tolist() == mean[:10].tolist(), "the steep beginning is left as it is"


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (9, 2.262), (11, 2.201), (20, 2.086)])
def test_student_t(freedom, t):  # from a printed table
    assert curves.student_t(freedom) == pytest.approx(t, abs=1.1e-3)


def test_noise_share():
    assert curves.noise_share(5, 15) == pytest.approx(14 / 14.8)


def test_runs_of_unequal_length_are_drawn_as_far_as_all_go(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", rows()[:-1], seed=2)]
    assert curves.metric_curve(logs.read_runs(runs), "meta", "within", "block1").steps.tolist() == [100, 200]
    plot_nc.main([*map(str, runs), "-o", str(tmp_path / "both.png")])
    assert "up to meta-step 200" in capsys.readouterr().err


def test_missing_values_are_gaps_and_a_repeated_step_counts_once(tmp_path):
    gap = nc_row(200)
    gap["meta"]["within"]["mean"][1] = None
    log = [nc_row(100, within=1), nc_row(100, within=5), gap]
    run = logs.read_run(write_run(tmp_path / "run", log))
    found = curves.metric_curve([run], "meta", "within", "block2")
    assert found.mean[0] == 10 and math.isnan(found.mean[1])
    figures.traces_figure([[run]])


# ---- reading


def test_a_log_itself_and_a_gzipped_one_are_accepted(tmp_path):
    run = write_run(tmp_path / "run")
    plain = logs.read_run(run / "log.jsonl")
    (run / "log.jsonl.gz").write_bytes(gzip.compress((run / "log.jsonl").read_bytes()))
    (run / "log.jsonl").unlink()
    assert logs.read_run(run / "log.jsonl.gz").rows == logs.read_run(run).rows == plain.rows == rows()


@pytest.mark.parametrize("tail", ['{"kind": "nc", "step": 4', '{"kind": "tr\n'])
def test_a_half_written_last_line_is_ignored_with_a_note(tmp_path, capsys, tail):
    run = write_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write(tail)
    assert logs.read_log(run / "log.jsonl") == rows()
    assert capsys.readouterr().err == f"note: {run / 'log.jsonl'}, line 7: half-written, ignored\n"


# ---- refusals


def test_a_refusal_is_one_line_and_status_2(tmp_path):
    run = write_run(tmp_path / "run", [{"kind": "train", "step": 50, "loss": 1.0, "acc": [0.2]}], nc_every=0)
    for arguments, words in (([run], "--nc_every 0"), ([tmp_path / "nowhere"], "no run at")):
        done = program(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert not (run / "result.png").exists()


def test_broken_json_in_the_middle_is_named_by_line(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    assert f"{run / 'log.jsonl'}, line 2: not JSON" in refused(run)
    (run / "log.jsonl").write_text("\n".join([lines[0], "[1]", *lines[2:]]) + "\n")
    assert "line 2: not a JSON object" in refused(run)


def test_other_broken_runs(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no log.jsonl" in refused(empty)

    assert "stopped before the first" in refused(write_run(tmp_path / "early", []))
    hollow = nc_row(100, within=math.nan, between=math.nan)
    assert "no finite trace" in refused(write_run(tmp_path / "hollow", [hollow]))

    lacking = nc_row(100)
    del lacking["finetuned"]["within"]
    assert "step 100 lacks finetuned within of block2" in refused(write_run(tmp_path / "lacking", [lacking]))
    nameless = nc_row(100) | {"layers": None}
    assert "names no layers" in refused(write_run(tmp_path / "nameless", [nameless]))

    run = write_run(tmp_path / "run")
    (run / "log.jsonl").unlink()
    (run / "log.jsonl.gz").write_bytes(gzip.compress(b'{"kind": "train"}\n' * 99)[:-12])
    assert "can't read" in refused(run)


def test_args_json_must_be_there_and_whole(tmp_path):
    run = write_run(tmp_path / "run")
    few = '{"settings": {"n_way": 5}, "data": {"name": "Omniglot"}}'
    for text in ("{", "[]", "{}", '{"settings": 1, "data": 2}', few):
        (run / "args.json").write_text(text)
        assert "args.json isn't a run's args.json" in refused(run)
    (run / "args.json").unlink()
    assert "what data and settings" in refused(run)


def test_runs_that_are_not_seeds_of_one_setting_are_refused(tmp_path):
    first = write_run(tmp_path / "a", seed=1, device="cpu")
    assert "differ in n_way" in refused(first, write_run(tmp_path / "b", seed=2, n_way=20))
    assert "differ in first_order" in refused(first, write_run(tmp_path / "c", seed=2, first_order=True))
    generated = write_run(tmp_path / "d", name="synthetic characters", seed=2)
    assert "differ in the data set" in refused(first, generated)
    assert "same seed, 1" in refused(first, write_run(tmp_path / "e", seed=1))
    logs.read_runs([first, write_run(tmp_path / "f", seed=2, device="cuda", root="elsewhere")])


def test_wrong_options(tmp_path):
    run = write_run(tmp_path / "run")
    assert "block1, block2, logits" in refused(run, "--layer", "block9")
    assert "ends in .png" in refused(run, "-o", tmp_path / "figure.pdf")
    (tmp_path / "folder.png").mkdir()
    assert "can't write" in refused(run, "-o", tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "run"]


# ---- the other figures


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds of each Omniglot setting."""
    folder = tmp_path_factory.mktemp("study")
    nc_logs.write_study(folder, steps=300, seeds=2)
    return nc_statistics.committed_study(folder)


def drawn_alike(axes, **wanted) -> list[np.ndarray]:
    """The y values of the panel's lines with such properties."""
    return [line.get_ydata() for line in axes.get_lines()
            if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())]  # fmt: skip


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", plot_nc.FIGURES)
def test_nothing_overlaps_and_nothing_is_cut_off(study, name, alone):
    with matplotlib.rc_context():
        matplotlib.rcParams.update(drawing.STYLE)
        figure = plot_nc.FIGURES[name][0](study[:1] if alone or name == "traces" else study, None)
        figure.draw_without_rendering()
        boxes = {text.get_text()[:30]: text.get_window_extent() for text in figure.texts}
        boxes |= {f"legend {i}": legend.get_window_extent() for i, legend in enumerate(figure.legends)}
        boxes |= {f"panel {i}": axes.get_tightbbox() for i, axes in enumerate(figure.axes)}
    assert len(figure.texts) == 3 and len(figure.legends) == 1
    for one, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"{one} is cut off"
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, f"{one} is cut off"
    for (one, box), (other, box2) in itertools.combinations(boxes.items(), 2):
        width = min(box.x1, box2.x1) - max(box.x0, box2.x0)
        height = min(box.y1, box2.y1) - max(box.y0, box2.y0)
        assert min(width, height) < 3, f"{one} overlaps {other}"  # pixels of 1,800


def test_nc_draws_each_metric_with_its_null(study):
    figure = figures.nc_figure(study)
    assert len(figure.axes) == len(figures.NC_PANELS) * 3
    words = "\n".join(text.get_text() for text in figure.texts)
    assert "8 training tasks or 100 held-out tasks" in words and "transductive" in words and "2 seeds" in words
    runs, panel = study[1], figure.axes[2 * 3 + 1]  # the third metric of the second setting
    rows = [[row for row in run.rows if row["kind"] == "nc"] for run in runs]

    def expected(metric: str, classes: str) -> list[float]:
        return [(a["meta"][metric]["mean"][3] + b["meta"][metric]["mean"][3]) / 2
                for a, b in zip(*rows) if a["classes"] == classes]  # fmt: skip

    lines = [line.tolist() for line in drawn_alike(panel, color=drawing.META)]
    assert lines[0] == pytest.approx(expected("cdnv", "train"))
    assert lines[1] == pytest.approx(expected("cdnv_null", "heldout"))
    assert drawn_alike(panel, color=drawing.DARKER[drawing.META])[0] == pytest.approx(expected("cdnv", "heldout"))


def test_a_wide_band_is_cut_and_not_the_lines(study):
    panel = figures.nc_figure(study).axes[3]  # nc1, on a logarithmic axis
    values = np.concatenate([line.get_ydata() for line in panel.get_lines()])
    low, high = panel.get_ylim()
    assert values.min() / 2 < low < values.min() and values.max() < high < values.max() * 2


def test_a_panel_without_a_value_is_left_empty(study, tmp_path):
    figure = figures.nc_figure(study[:1], "block1")
    (panel,) = [axes for axes in figure.axes if "NC3" in axes.get_ylabel()]  # defined at the last hidden layer alone
    assert np.isnan(np.concatenate([line.get_ydata() for line in panel.get_lines()])).all()
    log = [nc_logs.nc_row(step) for step in (0, 30)]
    for row, name in itertools.product(log, ("within", "between", "relative_within")):
        row["meta"][name]["mean"] = [None] * len(nc_logs.LAYERS)
    figures.traces_figure([[logs.read_run(nc_logs.write_run(tmp_path / "run", log))]])


def test_a_log_without_nulls_is_drawn_and_said_to_have_none(tmp_path):
    runs = [logs.read_run(nc_logs.write_run(tmp_path / "run", nc_logs.log(60, null=False)))]
    for draw in (figures.nc_figure, figures.layers_figure):
        assert "no null is drawn where the log has none" in draw([runs]).texts[-1].get_text()
    assert len(figures.nc_figure([runs]).axes[0].get_lines()) == 4  # two models on two kinds of tasks


def test_layers_draws_a_line_a_checkpoint_of_either_model(study):
    figure = figures.layers_figure(study)
    relative = figure.axes[0]
    assert len(relative.get_lines()) == 2 * 3 + 1  # steps 0, 250, 300; the null
    rows = [row for run in study[0] for row in run.rows if row["kind"] == "nc" and row["classes"] == "heldout"]
    last = np.mean([row["finetuned"]["relative_within"]["mean"] for row in rows if row["step"] == 300], axis=0)
    assert relative.get_lines()[2].get_ydata() == pytest.approx(last)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == nc_logs.LAYERS
    assert "--layer doesn't go" in refused(study[0][0].path, "--figure", "layers", "--layer", "block1")


def test_original_draws_both_measures_of_the_same_logits(study):
    figure = figures.original_figure(study)
    assert len(figure.axes) == 2 * len(study)
    original, by_label, _ = figure.axes[0].get_lines()  # the meta model of the first setting; the line of pure noise
    for line, suffix in ((original, "_original"), (by_label, "")):
        shares = []
        for run in study[0]:
            rows = [row["meta"] for row in run.rows if row["kind"] == "nc" and row["classes"] == "train"]
            within, between = (np.array([row[name + suffix]["mean"][-1] for row in rows])
                               for name in ("within", "between"))  # fmt: skip
            shares.append(within / (within + between))
        # measured every 30 steps and not up to 300: nothing is smoothed
        assert line.get_ydata() == pytest.approx(np.mean(shares, axis=0))
    assert "--layer doesn't go" in refused(study[0][0].path, "--figure", "original", "--layer", "block1")
    trained = [row for row in nc_logs.log(60) if row["kind"] == "nc" and row["classes"] == "train"]
    folder = Path(study[0][0].path).parent
    apart = [nc_logs.write_run(folder / f"apart {i}", [trained[i]], seed=i) for i in range(2)]
    assert "no measured step in common" in refused(*apart, "--figure", "original")


def test_inner_steps_draws_before_early_and_late(study):
    figure = figures.inner_steps_figure(study)
    traces, relative = figure.axes[0], figure.axes[3]
    assert len(traces.get_lines()) == 6 and len(relative.get_lines()) == 3
    rows = [row for run in study[0] for row in run.rows if row["kind"] == "nc" and row["classes"] == "heldout"]
    ends = [row["inner"] for row in rows if row["step"] == 300]
    within, between = (np.array([end[name]["mean"] for end in ends])[:, :, 3] for name in ("within", "between"))
    assert relative.get_lines()[-1].get_ydata() == pytest.approx((within / (within + between)).mean(0))
    assert figure.axes[9].get_lines()[-1].get_ydata() == pytest.approx(
        np.mean([end["accuracy"]["mean"] for end in ends], axis=0)
    )


def test_collapse_vs_accuracy_draws_every_checkpoint_and_says_the_correlation(study):
    figure = figures.collapse_figure(study)
    points = np.concatenate([drawn.get_offsets() for drawn in figure.axes[0].collections])
    rows = [row for group in study for run in group for row in run.rows if row.get("classes") == "heldout"]
    expected = [[row["finetuned"]["cdnv"]["mean"][3], 100 * (1 - row["inner"]["accuracy"]["mean"][-1])] for row in rows]
    np.testing.assert_allclose(sorted(points.tolist()), sorted(expected))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    setting, correlations, *_ = (text.get_text() for text in figure.legends[0].get_texts())
    assert setting == "5-way 1-shot, second order, 2 seeds"
    assert correlations.startswith("r = 1.00 [")
    assert correlations.endswith("from step 1,000: undefined, beside the trend: undefined")
    without = [row for row in nc_logs.log(60) if row.get("classes") != "heldout"]
    run = nc_logs.write_run(Path(study[0][0].path).parent / "trained", without)
    assert "no measurement on held-out tasks" in refused(run, "--figure", "collapse_vs_accuracy")


def test_seeds_are_averaged_and_settings_kept_apart(tmp_path):
    for name, seed, first_order in (("a", 1, False), ("b", 2, False), ("c", 1, True)):
        write_run(tmp_path / name, seed=seed, first_order=first_order)
    groups = logs.grouped([tmp_path / name for name in "acb"])
    assert [[run.path.name for run in runs] for runs in groups] == [["a", "b"], ["c"]]


# ---- accuracy


def test_accuracy_draws_a_line_for_each_setting(tmp_path):
    runs = []
    for name, first_order in (("second", False), ("first", True)):
        log = [{"kind": "val", "step": step, "acc": [0.2, 0.5 + first_order / 4], "ci95": [0.01, 0.02], "tasks": 100}
               for step in (0, 500)]
        runs.append(write_run(tmp_path / name, log, first_order=first_order))
    figure = figures.accuracy_figure(logs.grouped(runs))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split(", ")[1] for label in labels] == ["second order", "first order"]
    assert [line.get_ydata().tolist() for line in figure.axes[0].get_lines()] == [[50, 50], [75, 75]]
    plot_nc.main([*map(str, runs), "--figure", "accuracy"])
    assert (runs[0] / "accuracy.png").exists()
    seeds = [write_run(tmp_path / str(seed), [nc_logs.val_row(0, 0.5 + seed / 10)], seed=seed) for seed in (1, 2, 3)]
    found = curves.validation_curve(logs.read_runs(seeds))
    assert found.mean == pytest.approx([0.7]) and found.high == pytest.approx([0.7 + 4.303 * 0.1 / math.sqrt(3)])
    unvalidated = write_run(tmp_path / "unvalidated", [nc_row(0)])
    assert "holds no validation accuracy" in refused(unvalidated, "--figure", "accuracy")
    for name, message in (("step", "a validation has no step"), ("acc", "a validation lacks its accuracy"),
                          ("tasks", "a validation doesn't say of how many tasks")):
        row = nc_logs.val_row(0, 0.5)
        del row[name]
        broken = write_run(tmp_path / f"no-{name}", [row], seed=4)
        said = refused(seeds[0], broken, "--figure", "accuracy")
        assert f"no-{name}: {message}" in said  # of two runs, the one that is broken


def test_names_that_a_figure_cannot_show(tmp_path):
    run = write_run(tmp_path / "run")
    for change in ({"net": "$x^$"}, {"seed": [["a"]]}, {"net": "\ud800"}):
        arguments = json.loads((run / "args.json").read_text())
        other = write_run(tmp_path / f"run {len(list(tmp_path.iterdir()))}")
        (other / "args.json").write_text(json.dumps(arguments | {"settings": arguments["settings"] | change}))
        assert "isn't a run's args.json" in refused(other)
    arguments = json.loads((run / "args.json").read_text())
    arguments["data"]["name"] = "$x^$"  # --data_name may say that
    (run / "args.json").write_text(json.dumps(arguments))
    plot_nc.main([str(run)])
