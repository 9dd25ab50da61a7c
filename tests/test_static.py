"""Steps of fixed shape write the same text as steps laid out by the host, with the same counts, and never wait for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_model import Decoding, generate, load_adapter, load_model, save_adapter
from mtp_model.layout import MODES
from mtp_model.static import KEPT, StaticStep

PROMPTS = [[1, 2, 3, 4, 5], [0], [5, 5, 1], [2, 0, 4, 1, 3, 3, 2, 5, 0]]


def both_ways(model, prompts=PROMPTS, **options):
    return generate(model, prompts, static=True, **options), generate(model, prompts, static=False, **options)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_text_and_counts(shared, mode, k, batch):
    static, host = both_ways(shared.model, PROMPTS[-batch:], mode=mode, k=k, max_new_tokens=24)
    assert static.tokens == host.tokens
    for name in ("passes", "tokens", "offered", "accepted"):
        assert getattr(static.stats, name) == getattr(host.stats, name), name
    assert mode == "autoregressive" or batch == 1 or sum(host.stats.accepted) > 0


@pytest.mark.parametrize("options", [dict(use_sampler=False), dict(draft_candidates=2), dict(max_new_tokens=1), dict(max_new_tokens=7)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_options(shared, mode, options):
    static, host = both_ways(shared.model, mode=mode, k=3, **{"max_new_tokens": 15} | options)
    assert static.tokens == host.tokens and static.stats.accepted == host.stats.accepted and static.stats.passes == host.stats.passes


@pytest.mark.parametrize("mode", MODES)
def test_end_of_text(shared, mode):
    text = generate(shared.model, PROMPTS, mode="autoregressive", max_new_tokens=24).tokens
    static, host = both_ways(shared.model, mode=mode, k=4, max_new_tokens=24, eos=[text[0][4], text[1][9]])
    assert static.tokens == host.tokens and len({len(t) for t in host.tokens}) > 1
    assert static.stats.tokens == host.stats.tokens and static.stats.passes == host.stats.passes


def test_a_step_serves_again(shared, monkeypatch):
    """A kept step is taken for the next text of its shape, whatever the last one left in its cache."""
    made = []
    original = StaticStep.__init__
    monkeypatch.setattr(StaticStep, "__init__", lambda self, *a, **o: made.append(a) or original(self, *a, **o))
    model = shared.model
    model.kept_steps.clear()
    for prompt in PROMPTS[::-1]:
        static, host = both_ways(model, [prompt], mode="linear", k=2, max_new_tokens=11)
        assert static.tokens == host.tokens
    assert len(made) == 1
    for k in (1, 3, 4):
        generate(model, PROMPTS[:1], mode="linear", k=k, max_new_tokens=3, static=True)
    assert len(made) == 4 and len(model.kept_steps) == KEPT
    generate(model, [PROMPTS[0] * 200], mode="linear", k=4, max_new_tokens=3, static=True)  # longer than the kept step's cache
    assert len(made) == 5


def test_a_changed_adapter_needs_a_new_step(toy_adapter_model):
    model = toy_adapter_model(k=2)
    generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True)
    (before,) = model.kept_steps
    with torch.no_grad():
        model.layers[0].o_proj.lora_B.add_(1)
    generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True)
    assert len(model.kept_steps) == 2 and list(model.kept_steps)[1] != before


def test_streaming_and_a_loop_that_was_left(shared):
    decoding = Decoding(shared.model, PROMPTS, mode="quadratic", k=3, max_new_tokens=20, static=True)
    seen = [[] for _ in PROMPTS]
    for i, new in enumerate(decoding):
        for b, tokens in enumerate(new):
            seen[b] += tokens
        if i == 2:
            break
    for new in decoding:
        for b, tokens in enumerate(new):
            seen[b] += tokens
    assert seen == decoding.tokens == generate(shared.model, PROMPTS, mode="quadratic", k=3, max_new_tokens=20, static=False).tokens


@pytest.mark.parametrize("mode", MODES)
def test_with_the_kernels(toy_adapter_model, make_hf_dir, tmp_path, device, mode):
    pytest.importorskip("triton")
    save_adapter(toy_adapter_model(k=2, rank=4, num_hidden_layers=1), tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter").apply(load_model(tmp_path / "base", device=device, implementation="triton"))
    static, host = both_ways(model, PROMPTS[1:3], mode=mode, max_new_tokens=4, eos=())
    assert static.tokens == host.tokens and static.stats.passes == host.stats.passes
    plain = load_model(tmp_path / "base", device=device, implementation="reference")
    assert static.tokens == generate(plain, PROMPTS[1:3], mode="autoregressive", max_new_tokens=4, eos=()).tokens


class _NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: reading a value, data-dependent shapes, tensors from the host. Counts the package's operators."""

    operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::is_nonzero"), name
        self.operators += name.startswith("mtp_kernels::")
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor) and x.ndim]  # a number is no transfer
        assert all(x.device.type == "meta" for x in tensors), f"{name} leaves the device"
        return out


@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(toy_adapter_model, monkeypatch, mode, candidates):
    """A step on tensors without values: whatever would read one fails."""
    pytest.importorskip("triton")
    from mtp_kernels.triton import _device

    model = toy_adapter_model(k=2)
    model.implementation = "triton"
    model.to("meta")
    launches = []  # attention's, which is not called through its operator without gradients
    monkeypatch.setattr(_device, "launch", lambda kernel, grid, *args, **options: launches.append(kernel))
    step = StaticStep(model, 2, 300, mode, 0 if mode == "autoregressive" else 2, draft_candidates=candidates, eos=frozenset({1}))
    with torch.inference_mode(), _NoWaiting() as mode_of_calls:
        step._step()
        step._step()
    layers = model.config.num_hidden_layers
    assert len(launches) == 2 * 2 * layers  # pieces and merge
    assert mode_of_calls.operators >= 2 * (6 * layers + 3)
    with pytest.raises((RuntimeError, NotImplementedError)), _NoWaiting():  # the check does see a value that is read
        int(step.lengths[0])
