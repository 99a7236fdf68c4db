"""--tensorboard, with the package and without; it is not among the requirements, so the tests bring a small writer."""

import json
import sys
import types

import pytest

import omniglot_train

TINY = ("--synthetic --device cpu --task_num 2 --epoch 2 --n_way 2 --k_qry 2 --update_step 1 --update_step_test 1 "
        "--eval_every 2 --eval_tasks 2 --test_tasks 2 --nc_every 2 --tensorboard").split()  # fmt: skip


class Writer:
    """What SummaryWriter is asked."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def close(self):
        self.closed = True


def test_scalars_are_those_of_the_log(tmp_path, monkeypatch):
    Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    omniglot_train.main([*TINY, "--out", str(tmp_path / "run")])
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "run" / "tensorboard"), 0, True)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    keys = ("train", 0, ""), ("val", 0, ""), ("nc", 2, "heldout")
    train, first, last = (next(row for row in rows if (row["kind"], row["step"], row.get("classes", "")) == key)
                          for key in keys)
    assert writer.scalars["train/loss", 0] == train["loss"] and writer.scalars["train/accuracy", 0] == train["acc"][-1]
    assert writer.scalars["val/accuracy", 0] == first["acc"][-1] and ("val/accuracy", 2) in writer.scalars
    for model in ("meta", "finetuned"):
        expected = last[model]["relative_within"]["mean"][-2]
        assert writer.scalars[f"heldout/relative within trace, {model}", 2] == expected
    omniglot_train.main(["--resume", str(tmp_path / "run"), "--epoch", "3"])
    assert Writer.made[1].purge_step == 2
    omniglot_train.main(["--resume", str(tmp_path / "run"), "--epoch", "4", "--no-tensorboard"])
    assert len(Writer.made) == 2


@pytest.mark.parametrize("flag", ["--tensorboard", "--no-tensorboard"])
def test_without_the_package(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    omniglot_train.main([*TINY, flag, "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/result.json").exists()
    assert capsys.readouterr().out.count("pip install tensorboard") == (flag == "--tensorboard")
