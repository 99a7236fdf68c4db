"""--tensorboard, with the package and without; it is not among the requirements, so the tests bring a small writer."""

import json
import sys
from unittest.mock import Mock, call

import pytest
from test_resume import TINY, resume, small, train  # noqa: F401


@pytest.mark.slow
def test_scalars_are_those_of_the_log(tmp_path, monkeypatch):
    made = Mock()
    writer = made.SummaryWriter.return_value
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    run = train(tmp_path / "run", "--tensorboard")
    scalars = {(name, step): value for (name, value, step), _ in writer.add_scalar.call_args_list}
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if row["kind"] == "train":
            assert scalars["train/loss", row["step"]] == row["loss"]
        if row["kind"] in ("train", "val"):
            assert scalars[f"{row['kind']}/accuracy", row["step"]] == row["acc"][-1]
        for model in ("meta", "finetuned") if row["kind"] == "nc" else ():
            value = row[model]["relative_within"]["mean"][-2]
            assert scalars.get((f"{row['classes']}/relative within trace, {model}", row["step"])) == value
    assert writer.close.called
    resume(run, "--epoch", "9")
    resume(run, "--epoch", "10", "--no-tensorboard")
    folder = str(run / "tensorboard")
    assert made.SummaryWriter.call_args_list == [call(folder, purge_step=0), call(folder, purge_step=8)]


@pytest.mark.parametrize("flag", ["--tensorboard", "--no-tensorboard"])
def test_without_the_package(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert (train(tmp_path / "run", "--epoch", "1", flag) / "result.json").exists()
    assert capsys.readouterr().out.count("pip install tensorboard") == (flag == "--tensorboard")
