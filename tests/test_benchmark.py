"""The benchmark: every implementation computes the same gradient, a wrong one is named, the table shows the report."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import implementations
import speed

CPU = torch.device("cpu")
TORCH_ONLY = {name: make for name, make in speed.OTHERS.items() if name not in implementations.PACKAGES}


def tiny_layers(args):
    """Every kind of layer that the benchmark's networks have, few channels."""
    return [("conv2d", [4, args.imgc, 3, 3, 2, 1]), ("bn", [4]), ("relu", [True]), ("max_pool2d", [2, 1, 0]),
            ("conv2d", [3, 4, 2, 2, 1, 0]), ("bn", [3]), ("relu", [True]), ("flatten", []),
            ("linear", [args.n_way, 3 * 3 * 3])]


TINY = speed.Case("tiny", tiny_layers, imgc=2, imgsz=9, lr=0.1, n_way=3, k_spt=2, tasks=2, steps=2, k_qry=2)


@pytest.mark.parametrize("package", implementations.PACKAGES.values())
def test_package_is_there(package):
    pytest.importorskip(package, reason=f"{package} is not compared here: pip install -r benchmarks/requirements.txt")


def test_gradients_agree():
    errors = speed.check(TINY, CPU)
    assert set(errors) == set(implementations.implementations_on(CPU)) and max(errors.values()) < 1e-9


def test_gradients_of_the_real_networks_agree(monkeypatch):
    monkeypatch.setattr(implementations, "OTHERS", TORCH_ONLY)
    for name in ("omniglot-paper", "miniimagenet-5w1s"):
        case = speed.CASES[name]._replace(n_way=2, tasks=2, steps=1, k_qry=1)
        errors = speed.check(case, CPU)
        assert set(errors) == {speed.THIS, *TORCH_ONLY} and max(errors.values()) < 1e-9


def test_wrong_gradient_is_named(monkeypatch):
    right = implementations.elementary_batch_norm
    monkeypatch.setattr(implementations, "OTHERS", TORCH_ONLY)
    monkeypatch.setattr(implementations, "elementary_batch_norm", lambda x, w, b: right(x, w, 1.001 * b + 0.001))
    with pytest.raises(SystemExit, match=r"tiny: gradients differ in float64, relative: vmap by \S+; nothing"):
        speed.check(TINY, CPU)


def test_a_package_that_is_absent_is_left_out(monkeypatch):
    monkeypatch.setattr(implementations, "find_spec", lambda name: None if name == "jax" else find_spec(name))
    assert "JAX" not in implementations.implementations_on(CPU)


def test_matrix_product_has_the_flops_of_the_plain_loop():
    case = TINY._replace(tasks=3)
    _, net, tasks = speed.prepare(case, CPU, torch.float32)
    product, loop = implementations.MatrixProduct(case, net, tasks), implementations.PlainLoop(case, net, tasks)
    with FlopCounterMode(display=False) as counter:
        loop.backward()
    assert product.flops == counter.get_total_flops()


@pytest.mark.parametrize("flags", ["--repeats 0", "--only omniglot", "--threads -1"])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit):
        speed.main(flags.split())
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.slow
def test_report_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(implementations, "OTHERS", TORCH_ONLY)
    monkeypatch.setattr(speed, "start", lambda args: CPU)  # the settings of the tests' own process stay

    class InThisProcess:
        def __init__(self, *_, **__): ...
        def __enter__(self): return self
        def __exit__(self, *_): ...

        def submit(self, function, *arguments):
            self.result = lambda: function(*arguments)
            return self

    monkeypatch.setattr(speed, "ProcessPoolExecutor", InThisProcess)
    path = tmp_path / "speed.json"
    speed.main(f"--only trial --repeats 2 --json {path}".split())
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    times = report["cases"]["trial"]["times"]
    assert list(times) == [speed.THIS, *TORCH_ONLY, speed.PRODUCT]
    assert all(0 < row["min_s"] <= row["s"] for row in times.values())
    speed.main(f"--table --json {path}".split())
    table = capsys.readouterr().out
    assert table.strip() in printed and f"PyTorch {torch.__version__}" in table
    assert f"| {speed.THIS} | {times[speed.THIS]['s']:.3g} s (1.00x) |" in table
