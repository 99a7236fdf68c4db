"""Both training scripts from the command line: what they refuse, write, say and repeat; how programs end."""

import ast
import contextlib
import errno
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from data_files import log_rows, read_json, refused

import files
import miniimagenet_train
import omniglot_train
import plot_nc
import record
import settings
import training
from record import draw_figure
from tasks import Dataset

PROJECT = Path(training.__file__).parent
FINISHED = PROJECT / "res/contrast-maml-seed1"
SCRIPTS = ("omniglot_train", "miniimagenet_train", "plot_nc", "predict")
TINY = ("--synthetic --device cpu --task_num 2 --k_qry 3 --update_step 2 --update_step_test 3 "
        "--eval_every 3 --eval_tasks 2 --test_tasks 3 --nc_every 2 --epoch 5").split()


@pytest.fixture(scope="module")
def omniglot_run(tmp_path_factory) -> Path:
    """With its figure; `said` next to it holds what it printed, to streams of ASCII."""
    out = tmp_path_factory.mktemp("runs") / "omniglot"
    with pytest.MonkeyPatch.context() as patch, (out.parent / "said").open("w", encoding="ascii") as stream, \
            contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        patch.setattr(record, "draw_figure", draw_figure)
        files.run(lambda: omniglot_train.main([*TINY, "--out", str(out)]))
    return out


# ---- a run


def test_a_run_says_what_the_original_says(omniglot_run):
    said = (omniglot_run.parent / "said").read_text()
    for part in ("n_way=5", "conv2d[64, 1, 3, 3, 2, 0] -> [64, 13, 13]", "Total trainable parameters: 91781",
                 "5 meta-steps", "training acc: [", "meta within", "validation acc, % after 0 to 3 inner steps: [",
                 "synthetic characters",
                 "5/5 steps, acc=", "(last ? "):  # a "±", on a stream of ASCII
        assert part in said, part


def test_a_run_ends_by_drawing_its_figure(omniglot_run, tmp_path, monkeypatch, capsys):
    assert f"wrote {omniglot_run / 'result.png'}" in (omniglot_run.parent / "said").read_text()
    plot_nc.main([str(omniglot_run), "-o", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes() == (omniglot_run / "result.png").read_bytes()
    (tmp_path / "run").mkdir()
    capsys.readouterr()
    draw_figure(tmp_path / "run")  # without a log
    assert capsys.readouterr().out.startswith("result.png was not drawn: no run at")


def test_what_a_run_records(omniglot_run):
    args = read_json(omniglot_run, "args.json")
    assert args["settings"]["update_lr"] == 0.4 and args["meta_steps"] == 5
    assert args["layers"][0] == ["conv2d", [64, 1, 3, 3, 2, 0]] and args["layers"][-1] == ["linear", [5, 64]]
    assert args["data"]["splits"]["train"] == {
        "classes": 200, "images_per_class": 20, "images": 4000, "classes_digest": None}
    assert args["versions"]["torch"] == torch.__version__ and args["device"]["type"] == "cpu"
    best = torch.load(omniglot_run / "best.pt", weights_only=True)
    scores = {row["step"]: row["acc"][-1] for row in log_rows(omniglot_run, "val")}
    assert scores[best["step"]] == max(scores.values())
    result = read_json(omniglot_run)
    assert (result["data"], result["best_step"]) == ("synthetic characters", best["step"])
    assert len(result["test"]["accuracy"]) == len(result["test"]["ci95"]) == 4
    assert (result["test"]["tasks"], result["test"]["k_qry"]) == (3, 3)
    assert read_json(omniglot_run, "timing.json")["meta_steps"] == 5


def test_log_has_every_measurement_once(omniglot_run):
    assert log_rows(omniglot_run, "run") == [{"kind": "run", "step": 0, "data": "synthetic characters"}]
    assert [row["step"] for row in log_rows(omniglot_run, "val")] == [0, 3, 5]
    assert [row["step"] for row in log_rows(omniglot_run, "train")] == [0]
    measured = log_rows(omniglot_run, "nc")
    assert [row["step"] for row in measured if row["classes"] == "train"] == [0, 2, 4]
    assert [row["step"] for row in measured if row["classes"] == "heldout"] == [0, 3, 5]
    row = measured[1]
    assert row["layers"] == ["block1", "block2", "block3", "block4", "logits"]
    for model in ("meta", "finetuned"):
        assert all(len(row[model][name]["mean"]) == len(row[model][name]["se"]) == 5 for name in row[model])
        assert {"nc1_null", "etf_error_null", "ncc_mismatch_null", "cdnv", "self_duality"} <= set(row[model])
    within = row["inner"]["within"]["mean"]
    assert len(within) == 3 and len(within[0]) == 5  # inner steps 0..2, layers
    assert within[0] == row["meta"]["within"]["mean"] and within[-1] == row["finetuned"]["within"]["mean"]
    assert len(row["inner"]["accuracy"]["mean"]) == 3


def test_testing_again(omniglot_run, monkeypatch, capsys):
    (omniglot_run / ".test-3tasks-3qry-3steps.json.abcd1234.tmp").write_text("half")  # a killed test's
    with monkeypatch.context() as patch:
        patch.setattr("tqdm.std.time", itertools.count(0, 15).__next__)
        omniglot_train.main(["--test", str(omniglot_run), "--task_chunk", "1"])
    assert "testing: 1/2 batches, " in capsys.readouterr().err
    assert not list(omniglot_run.glob("*.tmp"))
    assert read_json(omniglot_run, "test-3tasks-3qry-3steps.json") == read_json(omniglot_run)
    omniglot_train.main(["--test", str(omniglot_run), "--k_qry", "1", "--update_step_test", "1", "--test_tasks", "4"])
    other = read_json(omniglot_run, "test-4tasks-1qry-1steps.json")["test"]
    assert (other["tasks"], other["k_qry"], len(other["accuracy"])) == (4, 1, 2)
    omniglot_train.main(["--test", str(omniglot_run), "--k_spt", "3", "--synthetic"])
    assert read_json(omniglot_run, "test-3tasks-3qry-3steps-3shot.json")["test"]["k_spt"] == 3
    assert "5-way 3-shot, queries together" in capsys.readouterr().out


@pytest.mark.slow
def test_no_more_tasks_go_together_than_asked_for(tmp_path, largest):
    """--task_num, or --task_chunk, which a run that was out of memory is told to lower."""
    run = tmp_path / "run"
    flags = "--epoch 1 --task_num 4 --eval_tasks 10 --test_tasks 9 --nc_qry 3".split()
    omniglot_train.main([*TINY, *flags, "--out", str(run)])
    largest.append(0)
    omniglot_train.main(["--resume", str(run), "--epoch", "2", "--task_chunk", "2"])
    assert largest == [4, 2]
    assert [row["tasks"] for row in log_rows(run, "val")] == [10, 10]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="a system that doesn't tell which files are open")
def test_without_posix_and_without_removing_open_files(tmp_path, monkeypatch):
    """As on Windows: a run comes to its end, and a second process in its folder is refused."""
    fcntl = files.fcntl

    def locking(descriptor: int, *_) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None  # as Windows says it

    def refusing(function):
        def refused(*paths, **options):
            opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
            assert not opened & set(map(os.path.realpath, paths)), "another process uses the file"
            return function(*paths, **options)

        return refused

    monkeypatch.setattr(files, "fcntl", None)
    for name, module in (("resource", None), ("msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("unlink", "remove", "replace", "rename"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    run = tmp_path / "run"
    omniglot_train.main([*TINY, "--epoch", "1", "--out", str(run)])
    with files.locked(run / ".run.lock"), refused("in use by another process; wait until it"):
        omniglot_train.main(["--resume", str(run)])
    assert sorted(path.name for path in run.iterdir()) == [
        ".run.lock", "args.json", "best.pt", "checkpoint.pt", "last.pt", "log.jsonl", "result.json", "timing.json"]


# ---- what is refused, before any data is read


@pytest.mark.parametrize("script, flags, line", [
    (omniglot_train, "--k_qry 20", "--k_spt 1 --k_qry 20: Omniglot has 20 images per class"),
    (omniglot_train, "--k_qry_test 30", "--k_spt 1 --k_qry_test 30: Omniglot has 20 images per class in its val split"),
    (omniglot_train, "--nc_qry 20", "--k_spt 1 --nc_qry 20: Omniglot has 20 images"),
    (omniglot_train, "--n_way 101", "--n_way 101: Omniglot has 100 classes in its val split"),
    (omniglot_train, "--imgsz 14", "; a larger --imgsz or --net paper may fit"),
    (miniimagenet_train, f"--test {FINISHED}", "(script omniglot_train); use that script"),
    (omniglot_train, f"--test {FINISHED} --synthetic", "--synthetic can't be set with --test: the run's value is kept"),
    (omniglot_train, f"--from_args {FINISHED} --data x --root y", "--root y: the images are generated, or those of"),
    (omniglot_train, "--synthetic --root y", "--root y: the images are generated, or those of --data"),
    (omniglot_train, f"--from_args {FINISHED} --recipe original", "--recipe can't be set with --from_args"),
    (omniglot_train, "--test run --resume run", "--resume and --test exclude each other; give one"),
    (omniglot_train, "--imgc 3", "--imgc 3: Omniglot has 1; give --imgc 1"),
    (omniglot_train, "--imgc 2 --data mine", "--imgc 2: images are read as greyscale (1) or colour (3)"),
    *((omniglot_train, f"--{name} {value}", f"--{name} {value}: must be") for name, value in {
        "clip": -0.1, "meta_lr": "nan", "head_std": "inf", "epoch": 0, "n_way": 1, "nc_every": -1, "seed": 2**31
    }.items()),
    (omniglot_train, "--head_lr 0", "--head_lr 0.0: must be a number above 0"),
    (omniglot_train, "--synthetic --epoch 1 --nc_qry 1", "--nc_qry 1: within-class spread needs 2 query images"),
    (omniglot_train, "--synthetic --epoch 1 --data mine", "--data mine: with --synthetic the images are generated"),
    (omniglot_train, "--synthetic --epoch 1 --data_name mine", "--data_name mine: with --synthetic the images are"),
    (omniglot_train, "--synthetic --epoch 1 --split vinyals", "--split vinyals: these images are not Omniglot's"),
    (omniglot_train, "--learner protonet --first_order", "--learner protonet trains without an inner loop"),
    (omniglot_train, "--learner classifier --freeze_head", "--learner classifier trains without an inner loop"),
    (omniglot_train, "--synthetic --epoch 1 --adapt_blocks 1 4 --head_lr 1", "--head_lr: the inner loop does not ad"),
    (omniglot_train, "--learner boil --freeze_head --head_std 0", "--freeze_head: with --head_std 0 the last lay"),
    (omniglot_train, "--adapt_blocks 6", "--adapt_blocks 6: the blocks are 1 to 5 (5: the last layer)"),
    (omniglot_train, "--learner anil --adapt_blocks 5", "--adapt_blocks: --learner anil has its own inner loop"),
    (omniglot_train, "--epochs 3", "unrecognized arguments: --epochs"),
    (omniglot_train, "--learner classifier --task_chunk 1", "--learner classifier: batch norm is over all images"),
    (omniglot_train, "--recipe paper --n_way 7", "no 7-way 1-shot; there are 5-way 1-shot, 5-way 5-shot, 20-way 1-s"),
    (omniglot_train, "--test nowhere", "nowhere/args.json: No such file or directory; --test takes the folder"),
    (miniimagenet_train, "--synthetic --epoch 3", "--epoch 3: it counts tasks here, and a meta-step takes 4"),
    (miniimagenet_train, "--root nothing --update_lr -1", "--update_lr -1.0: must be")])  # before any data is read
def test_settings_that_are_refused(script, flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(line):
        script.main(flags.split())
    assert not list(tmp_path.iterdir())  # nothing read, downloaded or made


@pytest.mark.parametrize("mean, std", [((0.0,) * 3, (1.0,)), ((0.0,), (1.0,) * 2), ((0.0,), (0.0,))])
def test_a_mean_or_std_that_fits_no_image_is_refused(mean, std):
    with refused("mine: mean and std must have a value per channel (1)"):
        settings.check(omniglot_train.arguments([]), Dataset(lambda: "mine", 1, mean, std, dict, None), None)


def test_data_that_cannot_be_read_leaves_no_run(tmp_path, monkeypatch):
    read = training.Data.read

    def broken(data, split: str):
        if split == "test":
            raise files.UserError("one image is broken")
        return read(data, split)

    monkeypatch.setattr(training.Data, "read", broken)
    with refused("one image is broken"):
        omniglot_train.main([*TINY, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [omniglot_train, miniimagenet_train])
def test_help_tells_every_flag_and_default(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = capsys.readouterr().out
    flags = {name: value for name, value in vars(script.arguments([])).items() if name not in ("script", "print_every")}
    assert all(f"--{flag} " in said or f"--{flag}, " in said for flag in flags)
    assert ("--no-rotations" in said) == (script is omniglot_train)
    assert said.count("(default:") == sum(value is not None for value in flags.values()) and "None" not in said


def recorded(run: Path, script, flags: str, **changes) -> Path:
    """A run's folder with only args.json: the settings that `flags` give, `changes`, and 20 images per class."""
    own = settings.recorded_settings(script.arguments(["--device", "cpu", *flags.split()]))
    run.mkdir(exist_ok=True)
    data = {"splits": {"train": {"images_per_class": 30}, "test": {"images_per_class": 20}}}
    (run / "args.json").write_text(json.dumps({"settings": own | changes, "data": data}))
    return run


TURNED = "--rotations --rotate_heldout --split vinyals"
PAPER = "--recipe paper --adapt_blocks 4 5"


@pytest.mark.parametrize("own, changes, flags, expected", [
    ("--data mine --data_name x", {}, "", {"data": "mine", "data_name": "x"}),
    ("--data mine --data_name x", {}, "--data other", {"data": "other", "data_name": None}),
    ("--data mine --data_name x", {}, "--synthetic", {"data": None, "data_name": None, "synthetic": True}),
    ("", {"data_name": "x"}, "", {"data_name": None}),  # ROOT may hold other images here
    (TURNED, {}, "--data other", {"rotations": False, "rotate_heldout": False, "split": "shuffled"}),
    (TURNED, {}, "--data other --rotations", {"rotations": True, "rotate_heldout": False}),
    (TURNED, {}, "--synthetic", {"rotations": True, "rotate_heldout": True, "split": "shuffled"}),
    (TURNED, {"data": "run"}, "--data ./other/../run/", {"rotations": True, "split": "vinyals"}),  # the same folder
    ("", {"device": "cuda:0"}, "", {"device": "cpu"}),
    ("", {"nc_qry": 15}, "", {"nc_qry": None}),  # filled in by the run, and again for the next
    ("", {"nc_qry": 10}, "", {"nc_qry": 10}),
    ("", {"nc_qry": 10}, "--k_spt 2 --data other", {"nc_qry": 10}),
    ("--k_spt 10", {"nc_qry": 10}, "--k_spt 12", {"nc_qry": None}),  # 10 were left of the run's classes
    ("--k_spt 10", {"nc_qry": 10}, "--data other", {"nc_qry": None}),
    ("--synthetic", {}, "--synthetic --seed 3", {"eval_tasks": 50, "test_tasks": 100}),
    (PAPER, {}, "--adapt_blocks --learner anil", {"adapt_blocks": None}),
    (PAPER, {}, "--n_way 20", {"n_way": 20, "task_num": 32, "update_step": 1, "adapt_blocks": [4, 5]})])
def test_what_a_repeated_run_keeps(own, changes, flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recorded(tmp_path / "run", omniglot_train, own, **changes)
    again = vars(omniglot_train.arguments(["--from_args", "run", *flags.split()]))
    assert {name: again[name] for name in expected} == expected


def test_defaults_that_depend_on_other_flags():
    def parsed(flags: str, *names: str) -> tuple:
        return tuple(getattr(omniglot_train.arguments(flags.split()), name) for name in names)

    assert parsed("--data ~/mine", "data", "rotations") == (os.path.expanduser("~/mine"), False)
    assert parsed("--recipe paper --data mine", "rotations", "rotate_heldout") == (False, False)
    assert parsed("--data mine --rotations", "rotations") == parsed("", "rotations") == (True,)
    assert parsed("", "eval_tasks", "test_tasks") == (100, 600)
    assert parsed("--synthetic --recipe paper", "eval_tasks", "test_tasks") == (50, 100)


# ---- how programs end


def test_an_old_python_gets_one_line():
    """Python compiles a script whole, so it must parse there too, and import the check before all else."""
    for script in ("files", *SCRIPTS):
        tree = ast.parse((PROJECT / f"{script}.py").read_text(), feature_version=(3, 7))
        first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert script == "files" or getattr(first, "module", first.names[0].name) == "files"
    code = "import sys; sys.version_info = (3, 9, 18, 'final', 0); import omniglot_train"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    said = "error: this is Python 3.9, and 3.10 or later is needed; install that\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_is_one_line_and_status_2(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "a line end\nand \x1b[31m colour"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(PROJECT / f"{script}.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert r"a line end\nand \x1b[31m colour" in error or script == "predict"  # which takes no arguments


@pytest.mark.parametrize("number, kind", [
    (errno.EIO, contextlib.nullcontext()), (errno.EPIPE, contextlib.nullcontext()),
    (errno.ENOSPC, contextlib.nullcontext()), (errno.EBADF, pytest.raises(OSError, match="full"))])
def test_a_closed_terminal_or_pipe_is_no_error(number, kind, monkeypatch):
    """A run that stops then still writes its checkpoint; one whose output's disk is full continues."""
    monkeypatch.setattr("builtins.print", Mock(side_effect=OSError(number, "full")))
    with kind:
        record.say("stopped at step 1")


def test_a_pipe_whose_reader_has_ended_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", "import files; files.run(lambda: print(1))"], cwd=PROJECT,
                          stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_no_error():
    program = "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    code = "import files, record; files.run(lambda: (record.say('a'), files.note('b'), exit(3)))"
    assert subprocess.run([sys.executable, "-c", program, code], cwd=PROJECT).returncode == 3


@pytest.mark.parametrize("change, flags, line", [
    (lambda layers: [*layers, ("relu", [True])], [], "layers: the last layer is relu[True]; with --n_way 5 it must be"),
    (lambda layers: layers[:-1], ["--head_std", "1"], "layers at --imgsz 28: head_std: the last layer is not linear"),
    (lambda layers: [*layers[:-1], ("linear", [8, 64])], [], "is linear[8, 64]; with --n_way 5 it must be linear[5, "),
    (lambda layers: [("flatten", []), ("linear", [5, 784])], ["--learner", "protonet"],
     "layers: --learner protonet trains the layers before the last, and none of them has weights"),
    (lambda layers: [("swish", []), *layers], [],
     "layers at --imgsz 28: layer 0, swish(), after (1, 28, 28): unknown layer 'swish'")])
def test_layers_that_can_not_be_trained(change, flags, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    layers = omniglot_train.layers
    monkeypatch.setattr(omniglot_train, "layers", lambda args: change(layers(args)))
    with refused(line) as caught:
        omniglot_train.main([*"--synthetic --device cpu --epoch 1 --eval_tasks 2".split(), *flags])
    assert "a larger --imgsz" not in str(caught.value) and not list(tmp_path.iterdir())
