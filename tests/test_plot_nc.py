"""The figure, from logs that the tests write: what it shows, what it says, one line for each thing wrong."""

import copy
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import files
import plot_nc

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


def write_run(folder: Path, log: list[dict] | None = None, name: str = "Omniglot", **settings) -> Path:
    """A run's folder as the training scripts write it."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"n_way": 5, "k_spt": 1, "k_qry": 15, "seed": 222, "nc_every": 100, "out": str(folder)}
    (folder / "args.json").write_text(json.dumps({"settings": usual | settings, "data": {"name": name}}))
    lines = [json.dumps(row) for row in (rows() if log is None else log)]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


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
    written = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert written == ["args.json", "log.jsonl", "result.png"]


def test_three_seeds_twice_give_the_same_bytes(tmp_path):
    runs = [write_run(tmp_path / str(seed), rows(0.3 * seed), seed=seed) for seed in range(3)]
    for name in ("a.png", "b.png"):
        plot_nc.main([*map(str, runs), "-o", str(tmp_path / name)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_argument_draws_the_committed_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot_nc, "HERE", tmp_path)
    assert "res/omniglot-5w1s" in refused()
    for seed in (1, 2):
        write_run(tmp_path / "res" / f"{plot_nc.DEFAULT_RUNS}-seed{seed}", rows(seed), seed=seed)
    write_run(tmp_path / "res" / "another-setting", n_way=20)
    plot_nc.main([])
    assert (tmp_path / "result.png").is_file()
    assert "2 run(s), Omniglot" in capsys.readouterr().out


def test_torch_and_windows_stay_out(tmp_path):
    run = write_run(tmp_path / "run")
    code = (
        "import sys, plot_nc; plot_nc.main([sys.argv[1]]); "
        "print(sorted({'torch', 'torchvision', 'tkinter', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_panels_axes_and_captions(tmp_path):
    figure = plot_nc.figure([plot_nc.read_run(write_run(tmp_path / "run", first_order=False, net="paper"))])
    words = texts(figure)
    assert len(figure.axes) == 6
    assert all(axes.get_xlabel() == "meta-step" for axes in figure.axes)
    assert "squared feature units" in words and "share of total trace" in words
    assert "Omniglot" in words and "5-way 1-shot, 15 queries a class, second order, paper network" in words
    assert "layer block2 (last hidden layer)" in words
    assert "8 training tasks or 100 held-out tasks; 1 seed" in words
    assert "within, pure noise: 0.946" in words
    assert "95% band over tasks" in words and "synthetic" not in words


def test_synthetic_runs_say_so_in_the_title(tmp_path):
    run = plot_nc.read_run(write_run(tmp_path / "run", name="synthetic characters"))
    title, _ = plot_nc.captions([run], "block2")
    assert "synthetic characters" in title
    assert title in [text.get_text() for text in plot_nc.figure([run]).texts]


def test_drawn_values_are_those_of_the_chosen_layer(tmp_path):
    figure = plot_nc.figure([plot_nc.read_run(write_run(tmp_path / "run"))], "logits")
    assert "layer logits" in texts(figure)
    drawn = {}
    for line in figure.axes[2].get_lines():  # the meta model's traces over the whole run
        drawn[line.get_color(), line.get_linestyle()] = line.get_ydata().tolist()
    assert drawn[plot_nc.WITHIN, "-"] == [27, 24, 21]
    assert drawn[plot_nc.BETWEEN, "-"] == [3, 6, 9]
    assert drawn[plot_nc.DARKER[plot_nc.WITHIN], "--"] == [25.5]
    lines = [line for line in figure.axes[3].get_lines() if len(line.get_xdata()) == 3]
    shares = {line.get_color(): line.get_ydata() for line in lines}
    assert shares[plot_nc.WITHIN] == pytest.approx([0.9, 0.8, 0.7])
    assert shares[plot_nc.BETWEEN] == pytest.approx([0.1, 0.2, 0.3])


def test_the_first_panels_stop_at_the_early_steps(tmp_path):
    log = [nc_row(step, within=9 + step / 1e4) for step in range(500, 12_001, 500)]
    figure = plot_nc.figure([plot_nc.read_run(write_run(tmp_path / "run", log))])
    assert max(figure.axes[0].get_lines()[0].get_xdata()) == 7500
    assert max(figure.axes[2].get_lines()[0].get_xdata()) == 12_000
    assert "first 7,500 meta-steps" in texts(figure) and "held-out" not in texts(figure)


def test_traces_of_very_different_size_get_a_logarithmic_axis(tmp_path):
    log = [nc_row(step, within=90, between=0.5) for step in (100, 200)]
    figure = plot_nc.figure([plot_nc.read_run(write_run(tmp_path / "run", log))])
    assert figure.axes[0].get_yscale() == "log" and "log scale" in texts(figure)
    assert figure.axes[1].get_yscale() == "linear"


# ---- the numbers


def test_band_over_tasks_for_one_run(tmp_path):
    found = plot_nc.curve([plot_nc.read_run(write_run(tmp_path / "run"))], "meta", "within", "block2")
    assert found.steps.tolist() == [100, 200, 300]
    assert found.mean.tolist() == [18, 16, 14]
    assert found.high - found.mean == pytest.approx([0.196] * 3)
    assert found.mean - found.low == pytest.approx([0.196] * 3)


def test_band_over_seeds_for_several(tmp_path):
    runs = [write_run(tmp_path / str(seed), rows(seed), seed=seed) for seed in (0, 1, 2)]
    found = plot_nc.curve(plot_nc.read_runs(runs), "finetuned", "within", "block1")
    assert found.mean == pytest.approx([10, 9, 8])
    assert found.high - found.mean == pytest.approx([4.303 / math.sqrt(3)] * 3)  # t(2), deviation 1, 3 seeds


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (9, 2.262), (11, 2.201), (20, 2.086)])
def test_student_t(freedom, t):  # from a printed table
    assert plot_nc.student_t(freedom) == pytest.approx(t, abs=1.1e-3)


def test_noise_share():
    assert plot_nc.noise_share(5, 15) == pytest.approx(14 / 14.8)


def test_runs_of_unequal_length_are_drawn_as_far_as_all_go(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", rows()[:-1], seed=2)]
    assert plot_nc.curve(plot_nc.read_runs(runs), "meta", "within", "block1").steps.tolist() == [100, 200]
    plot_nc.main([*map(str, runs), "-o", str(tmp_path / "both.png")])
    assert "up to meta-step 200" in capsys.readouterr().err


def test_missing_values_are_gaps_and_a_repeated_step_counts_once(tmp_path):
    gap = nc_row(200)
    gap["meta"]["within"]["mean"][1] = None
    log = [nc_row(100, within=1), nc_row(100, within=5), gap]
    run = plot_nc.read_run(write_run(tmp_path / "run", log))
    found = plot_nc.curve([run], "meta", "within", "block2")
    assert found.mean[0] == 10 and math.isnan(found.mean[1])
    plot_nc.figure([run])


# ---- reading


def test_a_log_itself_and_a_gzipped_one_are_accepted(tmp_path):
    run = write_run(tmp_path / "run")
    plain = plot_nc.read_run(run / "log.jsonl")
    (run / "log.jsonl.gz").write_bytes(gzip.compress((run / "log.jsonl").read_bytes()))
    (run / "log.jsonl").unlink()
    assert plot_nc.read_run(run / "log.jsonl.gz").rows == plot_nc.read_run(run).rows == plain.rows == rows()


@pytest.mark.parametrize("tail", ['{"kind": "nc", "step": 4', '{"kind": "tr\n'])
def test_a_half_written_last_line_is_ignored_with_a_note(tmp_path, capsys, tail):
    run = write_run(tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write(tail)
    assert plot_nc.read_log(run / "log.jsonl") == rows()
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
    plot_nc.read_runs([first, write_run(tmp_path / "f", seed=2, device="cuda", root="elsewhere")])


def test_wrong_options(tmp_path):
    run = write_run(tmp_path / "run")
    assert "block1, block2, logits" in refused(run, "--layer", "block9")
    assert "ends in .png" in refused(run, "-o", tmp_path / "figure.pdf")
    (tmp_path / "folder.png").mkdir()
    assert "can't write" in refused(run, "-o", tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "run"]


# ---- accuracy


def test_accuracy_draws_a_line_for_each_setting(tmp_path):
    runs = []
    for name, first_order in (("second", False), ("first", True)):
        log = [{"kind": "val", "step": step, "acc": [0.2, 0.5 + first_order / 4], "ci95": [0.01, 0.02], "tasks": 100}
               for step in (0, 500)]
        runs.append(write_run(tmp_path / name, log, first_order=first_order))
    (axes,) = plot_nc.accuracy_figure([plot_nc.read_run(run) for run in runs]).axes
    assert [line.get_label() for line in axes.get_lines()] == ["second order", "first order"]
    assert axes.get_lines()[1].get_ydata()[-1] == 75
    plot_nc.main([*map(str, runs), "--accuracy", "-o", str(tmp_path / "accuracy.png")])
    assert (tmp_path / "accuracy.png").exists()
    unvalidated = write_run(tmp_path / "unvalidated", [nc_row(0)])
    assert "holds no validation accuracy" in refused(unvalidated, "--accuracy", "-o", tmp_path / "x.png")
