"""The figures, from logs that the tests write: they hold the numbers of the logs; what can't be drawn gets one line."""

import gzip
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import data_files
import nc_logs
import numpy as np
import pytest
from nc_logs import write_run
from PIL import Image

import plot_nc
from study import effects, figures, logs, report
from study.design import label

PROJECT = Path(plot_nc.__file__).parent
refused = partial(data_files.refusal, plot_nc.main)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 20)  # drawn in no time


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(axes) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


# ---- the program


def test_a_run_is_drawn_into_its_folder_without_torch_or_a_window(tmp_path):
    code = ("import sys, plot_nc; plot_nc.main([sys.argv[1]]); "
            "print(sorted({'torch', 'tkinter', 'matplotlib.pyplot'} & set(sys.modules)))")
    run = write_run(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout.splitlines() == [f"wrote {run / 'result.png'}", "[]"], done.stdout + done.stderr
    with Image.open(run / "result.png") as picture:
        assert picture.format == "PNG" and 1300 < picture.width < 2000
        assert np.asarray(picture.convert("L")).std() > 10, "an empty picture"


@pytest.mark.parametrize("name", figures.ANY)
def test_every_figure_of_any_run_is_small_and_the_same_twice(name, tmp_path, monkeypatch):
    monkeypatch.undo()  # at its own size
    runs = [str(write_run(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    for file in ("a.png", "b.png"):
        plot_nc.main([*runs, "--figure", name, "-o", str(tmp_path / file)])
    for kind in ("pdf", "svg"):
        plot_nc.main([*runs, "--figure", name, "-o", str(tmp_path / f"a.{kind}")])
        assert kind.upper().encode() in (tmp_path / f"a.{kind}").read_bytes().upper()[:200]
    picture = (tmp_path / "a.png").read_bytes()
    assert picture == (tmp_path / "b.png").read_bytes() and 5_000 < len(picture) < 60_000


def test_the_figures_name_the_data_the_tasks_and_the_layer(tmp_path):
    whole = write_run(tmp_path / "whole", k_spt=5)
    part = write_run(tmp_path / "part", [row for row in nc_logs.log() if row["classes"] == "train"], name="$x^$")

    def heading(name, *runs, layer=None):
        return figures.ANY[name](logs.read_groups(runs), layer).get_suptitle()

    assert heading("traces", whole) == "Omniglot, 5-way 5-shot, second order"
    assert heading("metrics", part, layer="block2") == "$x^$, training tasks, block2"
    assert heading("layers", part, whole) == "$x^$ and Omniglot, training tasks"
    assert heading("accuracy", whole) == "Omniglot, held-out tasks, 15 queries per class"
    assert f"{part} has no measurement on held-out tasks" in refused(whole, part, "--figure", "accuracy")
    keys = legend(figures.accuracy(logs.read_groups([whole]), "block2"))
    assert keys[-1] == "nearest support mean at block2, before adaptation"
    names = [name for _, _, name in figures.colours(logs.read_groups([whole, part]))]
    assert names == ["Omniglot, 5-way 5-shot, second order", r"\$x^\$, 5-way 1-shot, second order"]
    plot_nc.main([str(whole), str(part), "--figure", "layers"])
    plot_nc.main([str(whole), "--layer", "block2"])
    assert sorted(path.name for path in whole.glob("*.png")) == ["layers.png", "traces-block2.png"]


def test_many_settings_have_panels_that_can_be_read_or_are_refused(tmp_path):
    runs = [write_run(tmp_path / str(ways), nc_logs.log(30), n_way=ways, first_order=True, net="original")
            for ways in range(2, 10)]
    groups = logs.read_groups(runs)
    figure = figures.layers(groups)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 8
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    for name in ("metrics", "accuracy"):
        figures.ANY[name](groups[:7])
        assert "8 settings, and there are 7 colours; name runs of fewer" in refused(*runs[:8], "--figure", name)


@pytest.mark.slow
def test_no_argument_redraws_the_figures_of_the_runs_that_are_there(tmp_path):
    with data_files.refused("no run of the study"):
        plot_nc.main([], home=tmp_path)
    nc_logs.write_study(tmp_path / "res", seeds=2)
    plot_nc.main([], home=tmp_path)
    first = {path.name for path in tmp_path.rglob("*.png")}
    others = nc_logs.LEARNERS | nc_logs.LONG | {"anil-300": {"learner": "anil"}}
    del others["contrast-maml"]  # not there yet
    nc_logs.write_study(tmp_path / "res", others, seeds=2)
    plot_nc.main([], home=tmp_path)
    then = {path.name for path in tmp_path.rglob("*.png")}
    assert "result.png" in first and then - first == {"learners.png", "similarity.png", "length.png"}
    shown = "".join(page.read_text() for page in (PROJECT / "study").glob("*.md"))
    assert all(name in shown for name in then), "a figure that no page shows"


def test_other_settings_are_not_averaged(tmp_path):
    runs = [write_run(tmp_path / "a", seed=1, data="birds"), write_run(tmp_path / "b", seed=2, data="birds/"),
            write_run(tmp_path / "c", first_order=True)]
    assert list(map(len, logs.read_groups(runs))) == [2, 1]
    said = refused(*runs)
    assert "the seeds of one setting; " in said and f"compare settings ({runs[0]} and {runs[2]}: first_order)" in said
    again = write_run(tmp_path / "again", seed=1)
    assert refused(runs[0], again) == f"{again} has the same settings and seed as {runs[0]}; give only one"


def test_runs_on_other_images_or_networks_are_not_seeds_of_one_setting(tmp_path):
    """What an older run did not record is taken as equal."""
    def run(seed, digest=None, **recorded):
        folder = write_run(tmp_path / f"birds-seed{seed}", seed=seed)
        args = json.loads((folder / "args.json").read_text())
        args["data"]["splits"] = {"train": {"classes": 9, "classes_digest": digest}, "val": {"classes": 9}}
        (folder / "args.json").write_text(json.dumps(args | recorded))
        return folder

    older, same, images = run(0), run(1, "a1", layers=[["flatten"]]), run(2, "b2")
    with data_files.refused(f"{same} and {images} differ in classes of train; rename one"):
        logs.Study(tmp_path)["birds"]
    network = run(3, layers=[["flatten"], ["linear"]])
    assert list(map(len, logs.read_groups([older, same, images, network]))) == [2, 2]
    assert logs.differing(*map(logs.read_run, (same, network))) == ["layers"]


def test_a_run_of_the_study_has_its_label_and_another_of_that_name_has_not(tmp_path):
    for parent, name in (("res", "ANIL"), ("runs/study", "ANIL"), ("mine", "5-way 1-shot, second order")):
        assert label(logs.read_run(write_run(tmp_path / parent / "contrast-anil-seed7"))) == name


# ---- the numbers in the figures


def test_lines_of_a_single_run_are_its_log(tmp_path):
    groups = logs.read_groups([write_run(tmp_path, nc_logs.log(300))])
    rows = groups[0][0].rows["heldout"].values()
    nc1 = drawn(figures.metrics(groups, "block2").axes[1])
    for model in ("finetuned", "meta"):
        assert ([row["step"] for row in rows], [row[model]["nc1"]["mean"][1] for row in rows]) in nc1
    accuracies = [row["inner"]["accuracy"]["mean"][-1] * 100 for row in rows]
    assert any(values == pytest.approx(accuracies) for _, values in drawn(figures.accuracy(groups).axes[0]))


def test_a_zoom_on_accuracy_leaves_out_no_line():
    for last, end, left, bottom in ((50, 99.5, 0, 0), (6000, 99.5, 100, 88), (6000, 60, 0, 0)):
        axes = figures.Figure().subplots()
        axes.plot([0, last], [20, end])
        axes.set(xlim=(0, last), ylim=(0, 107))
        figures.zoom_on_accuracy(axes)
        assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (left, bottom)


def test_each_setting_has_a_reference_of_its_own_and_each_number_of_ways_random_directions(tmp_path):
    one, two, three = (write_run(tmp_path / str(i), n_way=5 + i // 2, first_order=i > 0) for i in range(3))
    first, second, third, *_ = figures.PALETTE
    for runs, null, directions in (([one], [figures.GREY], [figures.GREY]),
                                   ([one, two], [first, second], [figures.GREY]),
                                   ([one, two, three], [first, second, third], [second, third])):
        _, nc1, _, etf_error, *_ = figures.metrics(logs.read_groups(runs)).axes
        dotted = [[line.get_color() for line in axes.get_lines() if line.get_linestyle() == ":"]
                  for axes in (nc1, etf_error)]
        assert dotted == [null, [colour for colour in directions for _ in (16, 64)]]


def test_the_thick_line_is_the_mean_at_the_steps_that_all_seeds_have(tmp_path):
    (group,) = logs.read_groups([write_run(tmp_path / "a", nc_logs.log(300), seed=1),
                                 write_run(tmp_path / "b", nc_logs.log(120), seed=2)])
    axes = figures.Figure().subplots()
    figures.draw(axes, group, lambda run: (
        np.array(sorted(run.rows["train"])), np.full(len(run.rows["train"]), run.settings["seed"])), "k")
    *seeds, (steps, mean) = drawn(axes)
    assert [len(x) for x, _ in seeds] == [10, 4]
    assert steps == [0, 30, 60, 90] and mean == [1.5] * 4
    axes.clear()
    figures.draw(axes, group, lambda run: ([], []) if run is group[0] else ([0, 1], [2, 3]), "k")
    assert drawn(axes)[-1] == ([0, 1], [2, 3])  # of the seeds that have it
    steps = [name for name in legend(figures.layers([group])) if "step" in name]  # held-out tasks: 0, 250, 300; 0, 120
    assert steps == ["meta-step 0"]


def test_smoothing_averages_the_measurements_within_a_tenth_of_each_step():
    steps = np.array([0, 90, 95, 100, 110, 112, 1_000])
    values = np.array([7, 2, math.nan, 4, 9, 100, math.nan])
    assert effects.smoothed(steps, values).tolist() == pytest.approx(
        [7, 2, math.nan, 5, 113 / 3, 109 / 2, math.nan], nan_ok=True)


def test_the_figure_of_the_original_s_recipe_shows_what_its_panels_say(tmp_path):
    nc_logs.write_study(tmp_path)
    share, traces, by_layer = report.result(logs.Study(tmp_path).groups(nc_logs.STUDY)).axes
    rows = [row for row in nc_logs.log() if row["classes"] == "train"]
    ratio = rows[-1]["finetuned"]["between"]["mean"][-2] / rows[0]["finetuned"]["within"]["mean"][-2]
    assert any(values[-1] == pytest.approx(ratio, rel=0.1) for _, values in drawn(traces))
    assert any(values == pytest.approx([14 / 14.8] * 2) for _, values in drawn(share)), "the permuted labels"
    assert not any("raw pixels" in text.get_text() for text in share.texts)
    assert {len(values) for _, values in drawn(by_layer)} == {5}
    nc_logs.write_controls(tmp_path / "omniglot-5w1s-seed1")
    share, *_ = report.result(logs.Study(tmp_path).groups(nc_logs.STUDY)).axes
    assert any("raw pixels" in text.get_text() for text in share.texts)


def test_older_runs_are_drawn_without_newer_metrics(tmp_path, monkeypatch):
    monkeypatch.setitem(figures.LABELS, "newer", "newer metric")
    figure = figures.metrics(logs.read_groups([write_run(tmp_path / "run", nc_logs.log())]))
    logged = [title for metric, title in figures.LABELS.items() if metric in nc_logs.METRICS]
    assert [axes.get_title() for axes in figure.axes] == logged != list(figures.LABELS.values())


# ---- what can't be drawn


@pytest.mark.parametrize("name", figures.ANY)
def test_metrics_that_are_undefined_everywhere(name, tmp_path):
    """With one query per class nothing has a spread."""
    log = nc_logs.log(value=lambda model, metric, *_: 0.5 if metric.startswith("ncc") else math.nan)
    log = json.loads(json.dumps(log).replace("NaN", "null"))
    plot_nc.main([str(write_run(tmp_path / "run", log, k_qry=1)), "--figure", name])
    figure = figures.ANY[name](logs.read_groups([tmp_path / "run"]))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert ("undefined" in texts) == (name in ("traces", "metrics"))


@pytest.mark.parametrize("name", figures.ANY)
def test_a_run_without_a_measurement(name, tmp_path):
    for nc_every, words in ((0, "it ran with --nc_every 0"), (30, "it stopped before the first")):
        run = write_run(tmp_path / "run", [{"kind": "val", "step": 0}], nc_every=nc_every)
        assert words in refused(run, "--figure", name)


def test_settings_of_one_name_have_their_folders_in_a_legend_that_fits(tmp_path):
    runs = [write_run(tmp_path / name / "run $", recipe=name, net="original", first_order=True, learner="boil")
            for name in ("one", "two")]
    figure = figures.metrics(logs.read_groups(runs))
    assert legend(figure)[:2] == [rf"5-way 1-shot, boil, first order, original network ({name}/run \$)"
                                  for name in ("one", "two")]
    assert figure.legends[0].get_window_extent().width <= figure.bbox.width


@pytest.mark.parametrize("change, words", [
    (lambda row: row.pop("layers"), "lacks its step or its layers"),
    (lambda row: row["meta"].pop("within"), "lacks meta within"),
    (lambda row: row.update(step="soon"), "lacks its step or its layers"),
    (lambda row: row["finetuned"]["between"]["mean"].pop(), "lacks finetuned between")])
def test_an_incomplete_measurement_is_named(change, words, tmp_path):
    log = nc_logs.log(60)
    for row in log:
        change(row)
    assert words in refused(write_run(tmp_path / "run", log), "--layer", "logits")


def test_a_log_itself_compressed_or_half_written(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    whole = logs.read_run(run).rows
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "nc", "step": 4')
    assert logs.read_run(run / "log.jsonl").rows == whole
    assert "half-written, ignored" in capsys.readouterr().err
    (run / "log.jsonl.gz").write_bytes(gzip.compress((run / "log.jsonl").read_bytes()))
    (run / "log.jsonl").unlink()
    assert logs.read_run(run).rows == whole
    (run / "log.jsonl.gz").write_bytes((run / "log.jsonl.gz").read_bytes()[:-9])
    assert "can't be read" in refused(run)
    for content in ('{"kind"\n{"kind": "val", "step": 1}\n', "[1]\n{}\n"):
        (run / "log.jsonl").write_text(content)
        assert "line 1: not a JSON object" in refused(run)


def test_other_refusals(tmp_path):
    run = write_run(tmp_path / "run")
    assert refused(tmp_path) == f"no run at {tmp_path}, but there are some in it: {run}; name one or several of them"
    for arguments, words in (((tmp_path / "nowhere",), "; name the folder that a training script wrote"),
                             ((run / "args.json",), "no run at"), ((PROJECT / "tests",), "no run at"),
                             ((run, "--layer", "block9"), "no layer 'block9'"), (("--layer", "block1"), "name a RUN"),
                             ((run, "-o", "x.jpg"), "ends in .png"), (("-o", "x.png"), "name a RUN"),
                             ((run, "--figure", "none"), "--help"), (("--figure", "layers"), "name a RUN"),
                             ((run, "--figure", "layers", "--layer", "block1"), "draws all layers; leave --layer out")):
        assert words in refused(*arguments)
    for text in ("{", "[]", '{"settings": {"n_way": 5}, "data": {"name": "Omniglot"}}'):
        (run / "args.json").write_text(text)
        assert "isn't a run's args.json" in refused(run)
