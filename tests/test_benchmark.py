"""The benchmark: every implementation computes the same gradient, a wrong one is named, the table shows the report."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count
from types import SimpleNamespace

import implementations
import pytest
import speed
import torch
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
TORCH_ONLY = {name: make for name, make in speed.OTHERS.items() if name not in implementations.PACKAGES}

# Every kind of layer that the benchmark's networks have, few channels.
TINY_LAYERS = [("conv2d", [4, 2, 3, 3, 2, 1]), ("bn", [4]), ("relu", [True]), ("max_pool2d", [2, 1, 0]),
               ("conv2d", [3, 4, 2, 2, 1, 0]), ("bn", [3]), ("relu", [True]), ("flatten", []),
               ("linear", [3, 3 * 3 * 3])]
TINY = speed.Case("tiny", TINY_LAYERS, imgc=2, imgsz=9, lr=0.1, n_way=3, k_spt=2, tasks=3, steps=2, k_qry=2)


def test_gradients_agree():
    errors = speed.check(TINY, CPU)  # as the program does before it times a case
    assert errors.keys() >= {speed.THIS, *TORCH_ONLY} and max(errors.values()) < 1e-9


def test_wrong_gradient_is_named(monkeypatch):
    monkeypatch.setattr(implementations, "OTHERS", TORCH_ONLY)
    monkeypatch.setattr(implementations, "elementary_batch_norm", torch.nn.functional.batch_norm)  # as #534 says
    with pytest.raises(SystemExit, match=r"tiny: gradients differ in float64, relative: vmap by \S+; nothing"):
        speed.check(TINY, CPU)


def test_report_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(implementations, "find_spec", lambda package: None)
    monkeypatch.setattr(speed, "start", lambda args: CPU)  # the settings of the tests' own process stay
    monkeypatch.setattr(speed, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setitem(speed.CASES, "tiny", TINY)
    ticks = accumulate(count())  # the steps take 1, 3, 5, ... seconds, in the order in which they are timed
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(speed, "gc", SimpleNamespace(collect=lambda: None))  # slow in a large process
    monkeypatch.setattr(speed, "HERE", tmp_path)
    path = tmp_path / "speed-tiny.json"  # not that of all cases
    speed.main("--only tiny --repeats 2".split())
    printed = capsys.readouterr().out
    assert "left out: higher, torchopt, JAX" in printed
    times = json.loads(path.read_text())["cases"]["tiny"]["times"]
    assert list(times) == [speed.THIS, *TORCH_ONLY, speed.PRODUCT]
    assert times[speed.THIS] == {"s": 13, "min_s": 9, "first_s": 1}
    assert times["plain loop"] == {"s": 15, "min_s": 11, "first_s": 3}
    assert speed.table(json.loads(path.read_text())) in printed
    assert f"PyTorch {torch.__version__}; medians of 2 rounds" in printed
    assert "| plain loop | 15 s (1.15x) | - |" in printed


def test_matrix_product_has_the_flops_of_the_plain_loop():
    _, net, tasks = speed.prepare(TINY, CPU, torch.float32)
    with FlopCounterMode(display=False) as loop:
        implementations.PlainLoop(TINY, net, tasks).backward()
    product = implementations.MatrixProduct(TINY._replace(tasks=10_000 * TINY.tasks), net, tasks)
    with FlopCounterMode(display=False) as counter:
        product.step()
    assert product.flops == 10_000 * loop.get_total_flops()
    assert counter.get_total_flops() == pytest.approx(product.flops, rel=0.01)  # it has whole rows
