"""The model computes what transformers' Llama and its kin compute, and an adapter never touches an ordinary token's row."""

import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_kernels import rotary_tables
from mtp_model import MTPConfig, load_model
from mtp_model.cache import KVCache
from mtp_model.config import ModelConfig
from mtp_model.layers import remade
from mtp_model.layout import decoding_layout, prefill_layout, training_layout

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
    rope_theta=10000.0,
)  # fmt: skip
SHAPES = {
    "gqa": {},
    "tied": dict(tie_word_embeddings=True),
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1),
    "head_dim from hidden": dict(head_dim=None, num_attention_heads=2, num_key_value_heads=1),
    "wide heads": dict(hidden_size=48, head_dim=24, num_attention_heads=6, num_key_value_heads=3),
    "llama3 rope": dict(rope_parameters=LLAMA3),
    "yarn": dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=10000.0)),
    "qwen2, yarn": dict(family="qwen2", rope_parameters=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=24, rope_theta=1e6, beta_fast=4)),
    "linear rope": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "large theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "attention bias": dict(attention_bias=True),
    "mlp bias": dict(mlp_bias=True, rms_norm_eps=1e-6),
    "odd intermediate": dict(intermediate_size=37, vocab_size=61),
    "one layer": dict(num_hidden_layers=1, hidden_size=64),
    "sharded": dict(max_shard_size="10KB", vocab_size=97),
    "mistral": dict(family="mistral", sliding_window=None),
    "mistral, window": dict(family="mistral", sliding_window=7, head_dim=8),
    "qwen2, windows in the last layers": dict(family="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3, windows by name": dict(
        family="qwen3", use_sliding_window=True, sliding_window=1, num_hidden_layers=3, layer_types=["sliding_attention", *["full_attention"] * 2]
    ),
    "qwen2": dict(family="qwen2", tie_word_embeddings=True),
    "qwen3": dict(family="qwen3", num_key_value_heads=1),
    "qwen3, attention bias": dict(family="qwen3", attention_bias=True, head_dim=24),
}


def ntp_pass(model, ids, start, cache):
    """Logits of ordinary tokens (T, B) behind start[b] cached ones."""
    layout = training_layout(ids.shape[0], torch.zeros(0, ids.shape[1], dtype=torch.int64), 1)
    return model.logits(model(layout.at(ids, start), cache))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(make_hf_dir, name):
    directory = make_hf_dir(**SHAPES[name])
    assert (directory / "model.safetensors.index.json").exists() == (name == "sharded")
    model, hf = load_model(directory), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, model.config.vocab_size, (40, 2), generator=generator)
    expected = hf(ids.t()).logits.transpose(0, 1)
    assert expected.std() > 0.1
    cache = KVCache(model.config, 2, 40)
    torch.testing.assert_close(ntp_pass(model, ids, [0, 0], cache), expected, atol=1e-4, rtol=1e-4)

    # Again through the cache: prompts of 7 and 4 tokens, padded, then pieces behind different lengths.
    cache = KVCache(model.config, 2, 64)
    layout = prefill_layout([7, 4], 0)
    padded = ids[:7].clone()
    padded[4:, 1] = 0
    z = model(layout.at(padded, [0, 0]), cache)
    first = model.logits(z)
    torch.testing.assert_close(first[:7, 0], expected[:7, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first[:4, 1], expected[:4, 1], atol=1e-4, rtol=1e-4)
    cache.commit([7, 4])
    for size in (1, 2, 5, 1, 11):
        at = list(cache.lengths)
        piece = torch.stack([ids[n : n + size, b] for b, n in enumerate(at)], dim=1)
        wanted = torch.stack([expected[n : n + size, b] for b, n in enumerate(at)], dim=1)
        torch.testing.assert_close(ntp_pass(model, piece, at, cache), wanted, atol=1e-4, rtol=1e-4)
        cache.commit([size, size])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_transformers_default(family):
    sizes = dict(vocab_size=50, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32)
    config, theirs = ModelConfig.from_hf(sizes | {"model_type": family}), AutoConfig.for_model(family, **sizes)
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 256 // 32) and config.rope_theta == theirs.rope_parameters["rope_theta"]
    window = getattr(theirs, "sliding_window", None)
    assert config.max_position_embeddings == theirs.max_position_embeddings and config.windows == ((window,) * 2 if window else ())
    parameters = dict(AutoModelForCausalLM.from_config(theirs).named_parameters())
    for name, has in (("k_proj.bias", config.attention_bias), ("o_proj.bias", config.output_bias), ("q_norm.weight", config.qk_norm)):
        assert (f"model.layers.0.self_attn.{name}" in parameters) == has, name


def test_a_config_does_not_set_what_its_family_says():
    """Names of ours in it are as unknown here as to transformers."""
    sizes = dict(vocab_size=50, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32)
    others = dict(qk_norm=True, output_bias=True)
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        plain = sizes | {"model_type": family}
        assert ModelConfig.from_hf(plain | others) == ModelConfig.from_hf(plain | dict.fromkeys(others, False)) == ModelConfig.from_hf(plain), family


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "llama"])
def test_which_layers_have_a_window(family):
    """Qwen's configs name one that is not used; of its models the layers from max_window_layers on have it, or those that layer_types names."""
    sizes = dict(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    full, slides = "full_attention", "sliding_attention"
    for settings in (
        {}, dict(sliding_window=None), dict(use_sliding_window=True), dict(use_sliding_window=True, sliding_window=None),
        *(dict(use_sliding_window=True, sliding_window=9, max_window_layers=first) for first in range(4)),
        *(dict(use_sliding_window=True, layer_types=[first, full], max_window_layers=2) for first in (full, slides)),
        dict(use_sliding_window=False, sliding_window=9, max_window_layers=0),
    ):  # fmt: skip
        if family in ("mistral", "llama") and "layer_types" in settings:
            continue
        theirs = AutoConfig.for_model(family, **sizes, **settings)
        window = None if family == "llama" else theirs.sliding_window
        kinds = theirs.layer_types if family in ("qwen2", "qwen3") else [slides] * 2
        expected = tuple(window if kind == slides else None for kind in kinds)
        assert ModelConfig.from_hf(sizes | settings | {"model_type": family}).windows == (expected if any(expected) else ()), settings
    for wrong in ([full], [full, "chunked_attention"], [full, {}], 5):
        with pytest.raises(ValueError, match="layer_types is .* accepted are 'full_attention' or 'sliding_attention' for each of 2 layers"):
            ModelConfig.from_hf(sizes | dict(model_type=family, layer_types=wrong))


@torch.no_grad()
def test_older_config_form(make_hf_dir):
    """transformers 4 wrote `rope_theta` and `rope_scaling` side by side, with `type` in the oldest files."""
    directory = make_hf_dir(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5000.0))
    ids = torch.arange(24).remainder(6).unsqueeze(1)
    model = load_model(directory)
    new = ntp_pass(model, ids, [0], KVCache(model.config, 1, 24))
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    plain = config | {"rope_theta": 5000.0}
    config = plain | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    (directory / "config.json").write_text(json.dumps(config))
    model = load_model(directory)
    assert torch.equal(ntp_pass(model, ids, [0], KVCache(model.config, 1, 24)), new)
    (directory / "config.json").write_text(json.dumps(plain | {"rope_scaling": None}))
    model = load_model(directory)
    assert not torch.allclose(ntp_pass(model, ids, [0], KVCache(model.config, 1, 24)), new, atol=1e-3)


@torch.no_grad()
def test_adapter_leaves_ordinary_rows_alone(toy_model, toy_adapter_model):
    ids = torch.tensor([[1, 2], [3, 4], [5, 0], [2, 2], [1, 0]])
    base = ntp_pass(toy_model, ids, [0, 0], KVCache(toy_model.config, 2, 8))
    adapted = toy_adapter_model(k=3)
    assert torch.equal(ntp_pass(adapted, ids, [0, 0], KVCache(adapted.config, 2, 8)), base)
    adapted.remove_adapter()
    assert adapted.adapter_parameters() == {} and adapted.mtp is None
    assert torch.equal(ntp_pass(adapted, ids, [0, 0], KVCache(adapted.config, 2, 8)), base)


@pytest.mark.parametrize("mode, k", [("linear", 3), ("quadratic", 1), ("quadratic", 3), ("quadratic", 8)])
@pytest.mark.parametrize("committed", [[20, 20], [20, 17]])
@torch.no_grad()
def test_masks_do_not_change_ordinary_rows(toy_adapter_model, mode, k, committed):
    model = toy_adapter_model()
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, 6, (20 + k + 1, 2), generator=generator)
    logits = []
    for with_masks in (False, True):
        cache = KVCache(model.config, 2, 128)
        ntp_pass(model, ids[:20], [0, 0], cache)
        cache.commit(committed)
        if with_masks:
            rows = decoding_layout(mode, k, (k, k)).at(ids[20:], cache.lengths)
            logits.append(model.logits(model(rows, cache)[: k + 1]))
        else:
            logits.append(ntp_pass(model, ids[20:], cache.lengths, cache))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    if torch.backends.mkl.is_available():
        assert torch.equal(logits[0], logits[1])


@torch.no_grad()
def test_masks_see_their_adapter(toy_adapter_model):
    """Mask rows depend on LoRA, on their own embedding, and on nothing that stands in another block."""
    model = toy_adapter_model(k=2)
    rows = decoding_layout("quadratic", 2, (2,)).at(torch.tensor([[1], [2], [3]]), [0])
    before = model(rows, KVCache(model.config, 1, 16))
    model.masks[1] += 1.0
    after = model(rows, KVCache(model.config, 1, 16))
    changed = [bool((before[t] != after[t]).any()) for t in range(len(rows.positions))]
    assert changed == [False] * 3 + [False, True] * 3
    model.layers[0].o_proj.lora_B.zero_()
    assert not torch.equal(model(rows, KVCache(model.config, 1, 16))[3:], after[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_are_kept_and_grow(toy_adapter_model, dtype):
    """Of every position that a pass may have: behind long texts, of documents, with lengths on the device, in another dtype than before."""
    model = toy_adapter_model(k=3)
    first, anchors = torch.tensor([[0], [0], [2], [2]]), torch.tensor([[1], [3]])
    passes = [
        prefill_layout([5, 2], 3).at(torch.zeros(5, 2, dtype=torch.int64), [0, 0]),
        training_layout(4, anchors, 3, first).at(torch.zeros(4, 1, dtype=torch.int64), [0]),
        decoding_layout("quadratic", 3, (3, 1)).at(torch.zeros(4, 2, dtype=torch.int64), [1000, 7]),
        decoding_layout("linear", 2, (2,)).at(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([2043]), num_keys=2048),
        decoding_layout("autoregressive", 1, (0,)).at(torch.zeros(1, 1, dtype=torch.int64), [2048]),
    ]
    model.rotary(passes[0])
    assert model.rotations is not None and copy.deepcopy(model).rotations is None
    model.to(dtype)
    assert model.rotations is None and model.frequencies.dtype == torch.float32
    kept = []
    for rows in [*passes, *passes]:
        got = model.rotary(rows)
        assert all(map(torch.equal, got, rotary_tables(rows.positions, model.frequencies, dtype)))
        kept.append(model.rotations)
    assert all(one is other for one, other in zip(kept[4:], kept[5:], strict=False)) and len({len(x) for x in kept}) > 2


@torch.no_grad()
def test_a_pass_of_no_rows(toy_adapter_model):
    model = toy_adapter_model(k=3)
    rows = training_layout(4, torch.zeros(0, 2, dtype=torch.int64), 3).at(torch.ones(4, 2, dtype=torch.int64), [0, 0])
    cache = KVCache(model.config, 2, 8)
    assert model(rows.ntp_rows(), cache).shape == (4, 2, 32) and model(rows.mask_rows(), cache).shape == (0, 2, 32)


def test_adding_and_removing(toy_model):
    with pytest.raises(ValueError, match="no adapter"):
        toy_model(prefill_layout([2], 2).at(torch.tensor([[1], [2]]), [0]), KVCache(toy_model.config, 1, 8))
    toy_model.add_adapter(MTPConfig(2, 4))
    assert {p.requires_grad for n, p in toy_model.adapter_parameters().items() if n != "masks"} == {True}
    assert not toy_model.masks.requires_grad
    base = [p for n, p in toy_model.named_parameters() if n not in toy_model.adapter_parameters()]
    assert base and not any(p.requires_grad for p in base)
    with pytest.raises(ValueError, match="already"):
        toy_model.add_adapter(MTPConfig(2, 4))
    toy_model.remove_adapter()
    toy_model.add_adapter(MTPConfig(3, 2, sampler=False), train_masks=True)
    assert toy_model.masks.requires_grad and toy_model.masks.shape[0] == 3 and toy_model.sampler is None


def test_fresh_adapter_depends_on_its_seed_alone(toy_model):
    def fresh(seed):
        toy_model.add_adapter(MTPConfig(2, 4), seed=seed)
        out = {n: p.detach().clone() for n, p in toy_model.adapter_parameters().items()}
        toy_model.remove_adapter()
        return out

    first = fresh(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = fresh(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["masks"], fresh(2)["masks"])
    assert all(not p.any() for n, p in first.items() if n.endswith("lora_B"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(make_hf_dir, dtype):
    directory = make_hf_dir()
    model, exact = load_model(directory, dtype=dtype), load_model(directory)
    ids = torch.arange(12).remainder(6).unsqueeze(1)
    logits = ntp_pass(model, ids, [0], KVCache(model.config, 1, 12, dtype=dtype))
    assert logits.dtype == dtype
    expected = ntp_pass(exact, ids, [0], KVCache(model.config, 1, 12))
    torch.testing.assert_close(logits.float(), expected, atol=0.1 * float(expected.std()), rtol=0.1)
    model.add_adapter(MTPConfig(2, 4), dtype=torch.float32)
    rows = prefill_layout([12], 2).at(ids, [0])
    z = model(rows, KVCache(model.config, 1, 16, dtype=dtype))
    assert z.dtype == dtype and z.isfinite().all()
    assert model.draft(z[None, 12:, 0], torch.tensor([1])).shape == (1, 2)


def test_what_is_remade_is_not_kept():
    """Between forward and backward the graph holds no result of the function, which runs a second time; the gradients are the plain ones."""
    made = []

    def function(x):
        made.append(weakref.ref(y := x.sin()))
        return y

    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    z = remade(function, x, F.linear, w)
    assert len(made) == 1 and made[0]() is None
    found = torch.autograd.grad(z.square().sum(), (x, w))
    expected = torch.autograd.grad(F.linear(x.sin(), w).square().sum(), (x, w))
    assert len(made) == 2 and all(map(torch.equal, found, expected))
