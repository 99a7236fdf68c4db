"""How programs end: an old Python, an error, a pipe without a reader, networks of one's own that can't be trained."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import refused

import omniglot_train
import training

PROJECT = Path(training.__file__).parent
SCRIPTS = ("omniglot_train", "miniimagenet_train", "plot_nc", "predict")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_gets_one_line(script):
    """Python compiles a script whole, so it must parse there too, and import the check before all else."""
    for name in (script, "files"):
        tree = ast.parse((PROJECT / f"{name}.py").read_text(), feature_version=(3, 7))
    tree = ast.parse((PROJECT / f"{script}.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert getattr(first, "module", first.names[0].name) == "files"


def test_what_it_says():
    code = "import sys; sys.version_info = (3, 9, 18, 'final', 0); import omniglot_train"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    said = "error: this is Python 3.9, and 3.10 or later is needed; install that\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_is_one_line_and_status_2(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "nothing"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(PROJECT / f"{script}.py"), run_name="__main__")
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1


def test_a_pipe_whose_reader_has_ended_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", "import files; files.run(lambda: print(1))"], cwd=PROJECT,
                          stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("change, flags, line", [
    (lambda layers: [*layers, ("relu", [True])], [], "layers: the last layer is relu[True]; with --n_way 5 it must be"),
    (lambda layers: layers[:-1], ["--head_std", "1"], "layers at --imgsz 28: head_std: the last layer is not linear"),
    (lambda layers: [*layers[:-1], ("linear", [8, 64])], [], "is linear[8, 64]; with --n_way 5 it must be linear[5, "),
    (lambda layers: [("flatten", []), ("linear", [5, 784])], ["--learner", "protonet"],
     "layers: --learner protonet trains the layers before the last, and none of them has weights"),
    (lambda layers: [("swish", []), *layers], [],
     "layers at --imgsz 28: layer 0, swish(), after (1, 28, 28): unknown layer 'swish'"),
])
def test_layers_that_can_not_be_trained(change, flags, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    layers = omniglot_train.layers
    monkeypatch.setattr(omniglot_train, "layers", lambda args: change(layers(args)))
    with refused(line) as caught:
        omniglot_train.main([*"--synthetic --device cpu --epoch 1 --eval_tasks 2".split(), *flags])
    assert "a larger --imgsz" not in str(caught.value) and not list(tmp_path.iterdir())
