"""What only runs on a GPU, on one that is not there (see `simulated_gpu`): in a process of its own, with TEST_GPU=simulated."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PTX, SIMULATED

from mtp_model import MTPConfig, TrainConfig, Trainer, generate, load_adapter, load_model, save_adapter
from mtp_model.data import Example
from mtp_model.static import StaticStep

if SIMULATED:
    import simulated_gpu
    from simulated_gpu import Refused

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [[1, 2, 3, 4, 5], [3, 1, 2]]
on_it = pytest.mark.skipif(not SIMULATED, reason="needs TEST_GPU=simulated")


@pytest.mark.skipif(bool(SIMULATED or PTX) or torch.cuda.is_available() or not importlib.util.find_spec("triton"), reason="no Triton, or such a process")
def test_on_a_gpu_that_is_not_there():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"TEST_GPU": "simulated"}, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def captured():
    """captured(function) -> a graph of what it does."""

    def capture(function):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph

    return capture


@on_it
def test_what_is_refused(captured):
    x, host = torch.arange(6.0, device="cuda"), torch.ones(6)
    assert x.is_cuda and x.device.type == "cuda" and (x[x > 2] + 1).device.type == "cuda"
    assert x[[1, 2]].tolist() == x[torch.tensor([1, 2])].tolist() == [1, 2] and float(x.cpu() @ host) == 15
    for mixed in (lambda: x + host, lambda: torch.cat([x, host]), lambda: torch.where(host > 0, x, x), lambda: host.scatter_(0, x.long(), x)):
        with pytest.raises(Refused, match="of the host among tensors of the device"):
            mixed()
    with pytest.raises(TypeError, match="Use Tensor.cpu"):
        np.asarray(x.numpy())
    for waiting in (lambda: int(x[0]), lambda: x.tolist(), lambda: x[x > 2], lambda: x.nonzero(), lambda: x.cpu(), torch.cuda.synchronize):
        before = len(simulated_gpu.waits)
        waiting()
        assert len(simulated_gpu.waits) > before
        with pytest.raises(Refused, match="waits for the device in a capture"):
            captured(waiting)
    for carried in (lambda: torch.tensor([1], device="cuda"), lambda: host.cuda(), lambda: x.copy_(host), lambda: x[torch.tensor([1])]):
        carried()
        with pytest.raises(Refused, match="from the host in a capture"):
            captured(carried)


@on_it
def test_a_graph_is_called_again_on_the_same_memory(captured):
    inputs, y = [torch.arange(4.0, device="cuda")], torch.zeros(4, device="cuda")
    factor = 2.0

    def work():
        z = inputs[0] * factor
        z[1:] += 1
        y.copy_(z.flip(0))

    graph = captured(work)
    factor = 5.0
    assert y.tolist() == [0] * 4  # nothing has run
    graph.replay()
    assert y.tolist() == [7, 5, 3, 0]
    inputs[0] += 10
    graph.replay()
    assert y.tolist() == [27, 25, 23, 20]
    inputs.clear()
    gc.collect()
    with pytest.raises(Refused, match="is free again"):
        graph.replay()


@on_it
def test_a_copy_is_there_when_it_was_waited_for():
    x, host, event = torch.arange(4, device="cuda"), torch.empty(4, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    event.record()
    x += 1
    assert host.tolist() != [0, 1, 2, 3]
    event.synchronize()
    assert host.tolist() == [0, 1, 2, 3]


@pytest.fixture
def both(toy_adapter_model, tmp_path):
    """The same model and adapter on the CPU, computed by the specification, and on the GPU."""
    save_adapter(toy_adapter_model(k=2, rank=4, num_hidden_layers=1), tmp_path / "adapter")
    return [load_adapter(tmp_path / "adapter").apply(load_model(tmp_path / "base", device=device)) for device in ("cpu", "cuda")]


@on_it
@pytest.mark.parametrize(
    "mode, options",
    [
        ("autoregressive", dict(lookup=2)),
        ("linear", dict(temperature=0.8, top_k=4, top_p=0.9, seed=3)),
        ("quadratic", dict(lookup=2, draft_candidates=3)),
    ],
    ids=str,
)  # fmt: skip
def test_texts(both, mode, options):
    """As on the CPU, by a captured step that is replayed, and serves the next text too; however long it is, the host waits for the outcomes alone."""
    plain, fused = both
    assert fused.fused and fused.device.type == "cuda" and not plain.fused
    waits = []
    for prompts, new in ((PROMPTS, 3), (PROMPTS[::-1], 6)):
        del simulated_gpu.waits[:]
        result = generate(fused, prompts, mode=mode, max_new_tokens=new, eos=(), **options)
        assert result.tokens == generate(plain, prompts, mode=mode, max_new_tokens=new, eos=(), **options).tokens
        waits.append(len(simulated_gpu.waits))
        (step,) = fused.kept_steps.values()
        assert len(step._recorded) == 1
    assert waits[0] == waits[1]


@on_it
def test_what_a_graph_needs_is_held(both, monkeypatch):
    """Rotary tables and the adapter's prepared form may be made anew while a step is kept."""
    _, fused = both
    steps, run = [], StaticStep.run
    monkeypatch.setattr(StaticStep, "run", lambda self: steps.append(self) or run(self))
    generate(fused, PROMPTS, mode="linear", max_new_tokens=3, eos=())
    fused.rotations = None
    for layer in fused.layers:
        for module in layer.adapted().values():
            module._prepared = None
    gc.collect()
    run(steps[-1])()


@on_it
def test_a_training_run(both, tmp_path):
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(0, 6, size).astype(np.int32), np.arange(size) >= 2) for size in (9, 7)]
    config = TrainConfig(steps=2, batch_size=2, lr=1e-3, warmup=1, soft_targets=0.5)
    for model in both:
        assert Trainer(model, examples, MTPConfig(2, 4), config, tmp_path / model.device.type).run()
    plain, fused = (load_adapter(tmp_path / kind).tensors for kind in ("cpu", "cuda"))
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
