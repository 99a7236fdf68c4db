"""--tensorboard, with the package and without; it is not among the requirements, so the tests bring a small writer."""

import json
import sys
import types

import pytest
from test_resume import TINY, resume, small, train  # noqa: F401

WRITERS = []


class Writer:
    """What SummaryWriter is asked."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False
        WRITERS.append(self)

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def close(self):
        self.closed = True


def test_scalars_are_those_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run = train(tmp_path / "run", "--tensorboard")
    resume(run, "--epoch", "9")
    resume(run, "--epoch", "10", "--no-tensorboard")
    writer, second = WRITERS
    assert (writer.folder, writer.purge_step, writer.closed) == (str(run / "tensorboard"), 0, True)
    assert second.purge_step == 8
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if row["step"] < 8 and row["kind"] == "train":
            assert writer.scalars["train/loss", row["step"]] == row["loss"]
            assert writer.scalars["train/accuracy", row["step"]] == row["acc"][-1]
        if row["step"] < 8 and row["kind"] == "val":
            assert writer.scalars["val/accuracy", row["step"]] == row["acc"][-1]
        for model in ("meta", "finetuned") if row["step"] < 8 and row["kind"] == "nc" else ():
            value = row[model]["relative_within"]["mean"][-2]
            assert writer.scalars.get((f"{row['classes']}/relative within trace, {model}", row["step"])) == value


@pytest.mark.parametrize("flag", ["--tensorboard", "--no-tensorboard"])
def test_without_the_package(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert (train(tmp_path / "run", "--epoch", "1", flag) / "result.json").exists()
    assert capsys.readouterr().out.count("pip install tensorboard") == (flag == "--tensorboard")
