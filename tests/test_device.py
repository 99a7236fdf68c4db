"""device.py without a GPU: torch.cuda and torch.distributed are replaced by fakes that fail as the real ones do."""

import contextlib
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from data_files import refused, sampler
from test_cuda import steps_of, take_steps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import device as devices
import miniimagenet_train
import omniglot_train
from device import GraphedStep, Stopped, select_device
from files import UserError
from meta import Meta
from tasks import tree_map

CPU, ONES = torch.device("cpu"), torch.ones


# ---- the device


@pytest.fixture
def gpus(monkeypatch) -> list:
    """Two GPUs that compute on the CPU; returns the devices that were made current."""
    chosen = []

    def set_device(device: torch.device) -> None:
        if device.index >= 2:
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")
        chosen.append(str(device))

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ONES(*shape))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return chosen


@pytest.mark.parametrize("name", ["", "cpu:1", "meta", "mps", "gpu", "cuda:01", "cuda:2", "cuda:256"])
def test_any_other_name_is_refused_in_one_line(gpus, name):
    with refused(f"--device {name}: ", "take cpu", "float64" if name == "mps" else ""):
        select_device(name)
    assert not gpus and str(select_device("cpu:0")) == "cpu"


def test_the_gpu_becomes_the_current_one(gpus, monkeypatch):
    assert str(select_device("cuda")) == "cuda:0"
    assert str(select_device("cuda:1")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(select_device("cuda")) == "cuda:1"
    assert gpus == ["cuda:0", "cuda:1", "cuda:1"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with refused("--device cuda:1: several processes would share this GPU"):
        select_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with refused("--device cuda: each process takes a GPU of its own; start at most 2 here, not 3"):
        select_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_cuda_is_refused():
    with refused("--device cuda: "):
        select_device("cuda")


def test_a_gpu_without_kernels_is_refused(gpus, monkeypatch):
    """It allocates, and launches fail; a failure may be reported only when the result is read."""
    unread = Mock()
    unread.add.return_value.item.side_effect = RuntimeError("CUDA error: no kernel image is available\nCUDA kernel ...")
    monkeypatch.setattr(torch, "ones", lambda *shape, device: unread)
    with refused("--device cuda: CUDA error: no kernel image is available; take cpu"):
        select_device("cuda")


def test_arithmetic():
    for precision in ("tf32", "float32"):  # the last is what the other tests have
        devices.set_arithmetic(precision, deterministic=False)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")


@pytest.mark.parametrize("error", [MemoryError(), ValueError("layer 0: can't allocate memory"),
                                   torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\n..."),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 2 bytes")])
def test_out_of_memory_is_one_line(error):
    with pytest.raises(UserError, match="^out of memory; buy some$"), devices.memory_runs_out("buy some"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), devices.memory_runs_out(""):
        raise RuntimeError("shapes differ")


# ---- several processes


def test_only_tensors_on_the_cpu_are_sent_and_lists_come_back_in_order(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Tensor, "cpu", lambda values: -values)  # tells which tensors were copied
    monkeypatch.setattr(dist, "all_gather_object", lambda lists, own: lists.__setitem__(slice(None), [own, [1]]))
    zero, *others = devices.gather_lists([(torch.ones(3), {"meta": {"nc1": torch.ones(3)}}, None), 2])
    assert zero[0].tolist() == zero[1]["meta"]["nc1"].tolist() == [-1] * 3 and zero[2] is None
    assert others == [1, 2]  # each second item is the other process's


@pytest.mark.parametrize("device, error, calls", [
    (torch.device("cuda:1"), None, [("nccl", torch.device("cuda:1")), "left"]),
    (CPU, Stopped(143), [("gloo", None), "left"]),  # all processes stop together
    (CPU, UserError(), [("gloo", None)])])
def test_the_group_is_left_together_and_not_after_an_error(device, error, calls, monkeypatch):
    called = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, timeout, device_id: called.append((backend, device_id)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("left"))
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), devices.processes(device):
        if error:
            raise error
    assert called == calls


# ---- a CUDA graph


class FakeGraphs:
    """torch.cuda's graphs on a CPU. A capture runs the step, and a replay runs it again into the captured tensors."""

    def __init__(self, monkeypatch):
        self.captures, self.fails = 0, None  # fails: what the end of a capture raises
        fake = self

        class Graph(Mock):
            def replay(self):
                graphed, step = fake.latest, fake.latest.maml.step
                tree_map(Tensor.copy_, graphed.result, graphed.step())
                graphed.maml.step = step  # a replay runs no Python

        @contextlib.contextmanager
        def graph(_):
            fake.captures += 1
            yield
            if fake.fails:
                raise fake.fails

        for name, value in {"CUDAGraph": Graph, "graph": graph, "Stream": Mock, "current_stream": Mock,
                            "stream": contextlib.nullcontext, "synchronize": Mock()}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def graphed(self, *args, **options) -> GraphedStep:
        self.latest = GraphedStep(*args, **options)
        return self.latest


@pytest.mark.parametrize("in_step, error, reason", [  # the end of a capture raises an error, perhaps after the step's
    (None, RuntimeError("CUDA error: stream is capturing\nCUDA kernel errors"), "CUDA error: stream is capturing"),
    (RuntimeError("not permitted"), RuntimeError("CUDA error: previous error during capture"), "not permitted"),
    (None, MemoryError(), "out of memory")])
def test_a_failed_capture_is_one_line_and_leaves_the_run_as_it_was(in_step, error, reason, monkeypatch, capsys):
    """A step whose accuracy is asked for after every inner step is not captured."""
    error.__context__ = in_step
    (maml, sample, step), cuda = steps_of("cpu"), FakeGraphs(monkeypatch)
    graphed, cuda.fails = cuda.graphed(maml, step, sample.generator), error
    assert graphed(every_step=True).accuracy.shape == (2, 3)
    before = [tensor.clone() for tensor in (*maml.state(), sample.generator.get_state())]
    with refused(f"--cuda_graph: the step can't be captured here ({reason}); give --no-cuda_graph"):
        graphed()
    assert maml.step == 1
    after = *maml.state(), sample.generator.get_state()
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))
    for cuda.fails, failures in ((error, lambda own: own), (None, lambda own: [*own, reason])):  # here, or elsewhere
        monkeypatch.setattr(devices, "gather_lists", failures)
        graphed = cuda.graphed(maml, step, sample.generator, required=False)  # steps are taken without a graph
        captures, first = cuda.captures, maml.step
        assert all(graphed().accuracy.shape == (2, 1) for _ in range(2))
        assert (maml.step, cuda.captures, graphed.graph) == (first + 2, captures + 1, None)
        assert capsys.readouterr().err.count(f"can't be captured as a CUDA graph here ({reason})") == 1
    graphed = GraphedStep(maml, Mock(side_effect=error), sample.generator, required=False)
    with pytest.raises(type(error)):  # a step that fails before the capture would fail without a graph too
        graphed()


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_takes_the_same_steps_with_a_graph(first_order, monkeypatch):
    """test_cuda.py's steps, bit for bit."""
    cuda = FakeGraphs(monkeypatch)
    monkeypatch.setattr("test_cuda.GraphedStep", cuda.graphed)
    (losses, state), (replayed, after) = (take_steps("cpu", graphed, first_order) for graphed in (False, True))
    assert losses == replayed and cuda.captures == 1
    assert all(one.equal(other) for one, other in zip(state, after, strict=True))


# ---- what a capture forbids

WAIT = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "allclose", "masked_select", "bincount",
        "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}


class OnDeviceOnly(TorchDispatchMode):
    """Fails on an operation that waits for the device or touches a host tensor; meta tensors stand for a GPU's."""

    operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        assert name not in WAIT, f"{operation} waits for the device"
        assert "linalg" not in name or "norm" in name, f"{operation} may wait for the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tree_leaves(args[1])), operation
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in (*inputs, *tree_leaves(result)) if isinstance(leaf, Tensor)]
        assert all(tensor.is_meta for tensor in tensors), f"{operation} touches a host tensor"
        self.operations += 1
        return result


class NoHostNumbers(TorchFunctionMode):
    """Fails where Python numbers become a tensor, which copies them to the device; dispatch modes don't see that."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor):
            assert isinstance(args[0], Tensor), f"{function.__name__} copies from the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script, recipe, options", [
    (omniglot_train, "original", {}), (omniglot_train, "original", {"first_order": True}),
    (omniglot_train, "paper", {"first_order": True, "adapt_blocks": (4, 5)}),
    (omniglot_train, "paper", {"freeze_head": True, "keep_norms": True}),
    (omniglot_train, "original", {"clip": 1.0, "skip_nonfinite": True, "task_chunk": 3}),
    (omniglot_train, "paper", {"learner": "protonet"}), (omniglot_train, "paper", {"learner": "classifier"}),
    (miniimagenet_train, "original", {}), (miniimagenet_train, "paper", {"task_chunk": 1})])
def test_a_meta_step_stays_on_the_device(script, recipe, options, monkeypatch):
    """A step that measures is never captured."""
    args = script.arguments(["--recipe", recipe])
    net = script.network(args)
    if options.get("learner") == "classifier":
        net.classes = nn.Linear(net.weights[net.classifier].shape[1], 16)
    maml = Meta(net.to("meta"), update_step=2, **options)
    # Adam takes the path that it takes on CUDA
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_, **__: ["meta"])
    maml.optimizer.param_groups[0] |= {"capturable": True, "lr": torch.zeros((), device="meta")}
    maml.outer.cosine_steps = 5
    sample = sampler(torch.zeros(16, 6, args.imgc, args.imgsz, args.imgsz, dtype=torch.uint8, device="meta"),
                     turns=2, counts=[4, 5, *[6] * 6])
    sample.counts = sample.counts.to("meta")
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.empty(*shape, device="meta"))  # there is no generator
    monkeypatch.setattr(torch, "randint", lambda _, shape, **__: torch.empty(shape, dtype=torch.long, device="meta"))
    with OnDeviceOnly() as mode, NoHostNumbers():
        index = sample.draw(4)
        maml(sample.gather(index), classes=index[0][..., 0])
    assert mode.operations > (500 if options.get("learner") == "classifier" else 1000)
