"""The model on the Triton kernels: the same text as on the specification, in every mode, and the same gradients."""

import numpy as np
import pytest
import torch

from mtp_model import MTPConfig, generate, load_adapter, load_model
from mtp_model.checkpoint import save_adapter
from mtp_model.data import Example, collate
from mtp_model.loss import mtp_loss

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[1, 2, 3, 4, 5], [3, 1, 2]]


@pytest.fixture(params=["llama"])
def both(request, make_hf_dir, toy_adapter_model, tmp_path):
    """The same model and adapter on either implementation. mistral's layer sees four tokens."""
    settings = {"sliding_window": 4} if request.param == "mistral" else {}
    save_adapter(toy_adapter_model(k=2, rank=4, num_hidden_layers=1, family=request.param, **settings), tmp_path / "adapter", {})

    def load(implementation, dtype=torch.float32):
        model = load_model(tmp_path / "base", device=DEVICE, dtype=dtype, implementation=implementation)
        return load_adapter(tmp_path / "adapter").apply(model, dtype)

    return load


@pytest.mark.parametrize(
    "both, mode", [("qwen2", "linear"), ("qwen3", "quadratic"), ("llama", "quadratic-printed"), ("mistral", "quadratic")], indirect=["both"]
)
def test_the_same_text(both, mode):
    """`test_static` has all modes, of a Llama."""
    fused, plain = both("triton"), both("reference")
    expected = generate(plain, PROMPTS, mode="autoregressive", max_new_tokens=5, eos=()).tokens
    result = generate(fused, PROMPTS, mode=mode, max_new_tokens=5, eos=())
    reference = generate(plain, PROMPTS, mode=mode, max_new_tokens=5, eos=())
    assert result.tokens == expected and result.stats.passes == reference.stats.passes


def test_autoregressive_text(both):
    expected = generate(both("reference"), PROMPTS, mode="autoregressive", max_new_tokens=5, eos=()).tokens
    assert generate(both("triton"), PROMPTS, mode="autoregressive", max_new_tokens=5, eos=()).tokens == expected


@pytest.mark.parametrize(
    "both, dtype", [("llama", torch.float16), ("llama", torch.bfloat16), ("qwen3", torch.bfloat16), ("mistral", torch.bfloat16)],
    indirect=["both"], ids=str,
)  # fmt: skip
def test_half_precision_text_is_autoregressive_text(both, dtype):
    """What the specification cannot promise: a row's bits do not depend on its neighbours in 16 bits either."""
    model = both("triton", dtype)
    expected = generate(model, PROMPTS[:1], mode="autoregressive", max_new_tokens=5, eos=()).tokens
    assert generate(model, PROMPTS[:1], mode="quadratic", max_new_tokens=5, eos=()).tokens == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drawn_text_is_autoregressive_text(both, dtype):
    model = both("triton", dtype)
    options = dict(max_new_tokens=4, eos=(), temperature=1.2, top_k=5, top_p=0.95, seed=4)
    expected = generate(model, PROMPTS[:1], mode="autoregressive", **options).tokens
    assert generate(model, PROMPTS[:1], mode="quadratic", static=dtype == torch.float32, **options).tokens == expected
    if dtype == torch.float32:
        assert generate(both("reference"), PROMPTS[:1], mode="linear", **options).tokens == expected


@pytest.mark.parametrize("both", ["llama", "qwen3", "mistral"], indirect=True)
def test_the_same_gradients(both):
    batch = collate([Example(np.array([1, 2, 3, 4, 5, 0, 1]), np.array([False] * 3 + [True] * 4))] * 2, torch.device(DEVICE))
    losses, gradients = [], []
    for implementation in ("triton", "reference"):
        model = both(implementation)
        model.train()
        loss = mtp_loss(model, batch)
        loss.total.backward()
        losses.append(float(loss.total.detach()))
        gradients.append({n: p.grad for n, p in model.adapter_parameters().items() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-4, rtol=1e-3), name


def test_an_implementation_that_cannot_run_is_refused(make_hf_dir, monkeypatch):
    directory = make_hf_dir()
    with pytest.raises(ValueError, match="accepted are 'reference', 'triton' or None"):
        load_model(directory, implementation="cuda")
    if DEVICE == "cpu":
        monkeypatch.setattr("mtp_kernels.triton.INTERPRETED", False)
        with pytest.raises(ValueError, match="accepted are a GPU, or TRITON_INTERPRET=1"):
            load_model(directory, implementation="triton")


def test_a_fresh_adapter_changes_nothing(make_hf_dir):
    model = load_model(make_hf_dir(num_hidden_layers=1), device=DEVICE, implementation="triton")
    expected = generate(model, PROMPTS, mode="autoregressive", max_new_tokens=4, eos=()).tokens
    model.add_adapter(MTPConfig(2, 4))
    assert generate(model, PROMPTS, mode="quadratic", max_new_tokens=4, eos=()).tokens == expected
