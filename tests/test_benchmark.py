"""The benchmark: everyone computes the same gradient, a wrong one is named, rows and chart are written."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import speed
from files import UserError

CPU = torch.device("cpu")
PACKAGES = ("higher", "torchopt")
SMALL = {
    "omniglot": speed.TRIAL,
    "miniimagenet": speed.CASES["miniimagenet-5w5s"]._replace(imgsz=48, n_way=2, k_spt=1, k_qry=2, steps=2, tasks=2),
}


@pytest.fixture
def installed(monkeypatch):
    """Leave out of the benchmark what is not installed."""
    there = {name: make for name, make in speed.OTHERS.items() if name not in PACKAGES or find_spec(name)}
    monkeypatch.setattr(speed, "OTHERS", there)


@pytest.mark.parametrize("name", PACKAGES)
def test_package_is_there(name):
    pytest.importorskip(name, reason=f"{name} is not compared here: pip install -r benchmarks/requirements.txt")


@pytest.mark.parametrize("case", SMALL)
def test_gradients_agree(case, installed):
    errors = speed.check(SMALL[case], CPU)
    assert set(errors) == {speed.THIS, *speed.OTHERS} and max(errors.values()) < 1e-9


def test_wrong_gradient_is_named(installed, monkeypatch):
    right = speed.elementary_batch_norm
    monkeypatch.setattr(speed, "elementary_batch_norm", lambda x, weight, bias: right(x, weight, 1.001 * bias + 0.001))
    with pytest.raises(UserError, match=r"trial: gradients differ in float64, relative: vmap by \S+; nothing"):
        speed.check(speed.TRIAL, CPU)


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "higher", None)
    monkeypatch.setattr(speed, "OTHERS", {"higher": speed.Higher})
    with pytest.raises(UserError, match="no module higher: pip install -r benchmarks/requirements.txt"):
        speed.check(speed.TRIAL, CPU)


@pytest.mark.parametrize("flags, complaint", [
    ("--repeats 0", "--repeats 0"), ("--only omniglot", "--only"), ("--chart speed.jpg", "speed.jpg"),
    ("--device nowhere", "--device nowhere"), ("--threads -1", "--threads -1"),
])
def test_bad_flags(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        speed.main(flags.split())


def test_rows_and_chart(tmp_path, capsys):
    for name in PACKAGES:
        pytest.importorskip(name)
    rows, chart = tmp_path / "rows.json", tmp_path / "chart.png"
    speed.main(f"--only trial --repeats 1 --threads 1 --allocator kept --json {rows} --chart {chart}".split())
    found = json.loads(rows.read_text())
    assert [row["implementation"] for row in found] == [speed.THIS, *speed.OTHERS]
    for row in found:
        assert row["case"] == "trial" and row["allocator"] == "kept" and row["device"] == "cpu"
        assert row["repeats"] == row["threads"] == 1 and row["tasks"] == row["steps"] == 2
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["tasks_per_s"] == pytest.approx(row["tasks"] / row["median_s"])
    with Image.open(chart) as image:
        assert image.width == 1800
    printed = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in printed and "as fast as the best other" in printed
