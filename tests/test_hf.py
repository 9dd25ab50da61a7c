"""Gated LoRA in transformers models: nothing changes but the gated rows, and taken out, nothing has changed at all."""

import copy
import hashlib
import json
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, randomise_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from mtp_kernels.testing import assert_within_budget
from mtp_model import MTPConfig, load_adapter, load_model, save_adapter
from mtp_model.cache import KVCache
from mtp_model.checkpoint import export_adapter
from mtp_model.hf import (
    PROJECTIONS,
    add_gated_lora,
    gate,
    gated_lora_state_dict,
    load_gated_lora,
    load_gated_lora_state_dict,
    remove_gated_lora,
)
from mtp_model.layout import prefill_layout, training_layout

SMALL = TOY | dict(vocab_size=40)
FAMILIES = {
    "llama": LlamaConfig(**SMALL | dict(mlp_bias=True)),
    "mistral": MistralConfig(**SMALL | dict(sliding_window=4)),
    "qwen2": Qwen2Config(**SMALL),  # biases on q, k and v
    "qwen3": Qwen3Config(**SMALL | dict(tie_word_embeddings=True)),  # norms on q and k
}


def plain(family="llama", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def with_adapter(model, rank=4, **options):
    """An adapter whose B is not zero."""
    add_gated_lora(model, rank, **options)
    generator = torch.Generator().manual_seed(1)
    tensors = gated_lora_state_dict(model)
    load_gated_lora_state_dict(model, {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()})
    return model


def tokens(*shape, seed=2):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


def ragged(batch, sequence):
    """Row b is on from column 3 + b to one before the end."""
    column = torch.arange(sequence)
    return (column >= 3 + torch.arange(batch).unsqueeze(1)) & (column < sequence - 1)


def digest(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(directory).iterdir())}


def greedy(model, ids):
    out = model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_off_is_the_model_as_it_was(family, dtype, tmp_path):
    model = plain(family, dtype)
    inputs = [tokens(1, 1), tokens(1, 2), tokens(2, 9), tokens(1, 33), tokens(3, 1)]
    before = [model(ids).logits for ids in inputs]
    last = model(inputs[2], logits_to_keep=2).logits  # a strided input of lm_head
    with torch.enable_grad():
        assert torch.equal(model(inputs[2]).logits, before[2])
    text = greedy(model, inputs[2])
    model.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    keys = list(model.state_dict())
    with_adapter(model)
    for ids, logits in zip(inputs, before, strict=True):
        assert torch.equal(model(ids).logits, logits)
        assert not torch.equal(model(ids, gate=torch.ones(ids.shape, dtype=torch.bool)).logits, logits)
        assert torch.equal(model(ids, gate=None).logits, logits)
    assert torch.equal(model(inputs[2], logits_to_keep=2).logits, last)
    with torch.enable_grad():
        assert torch.equal(model(inputs[2]).logits, before[2])
    assert all(torch.equal(got, wanted) for got, wanted in zip(greedy(model, inputs[2]), text, strict=True))
    assert [key for key in model.state_dict() if "lora_" not in key] == keys
    model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "with-shards", max_shard_size="20KB")
    assert digest(tmp_path / "with") == digest(tmp_path / "before")
    index = "model.safetensors.index.json"
    written, wanted = digest(tmp_path / "with-shards"), digest(tmp_path / "shards")
    assert len(written) > 4 and {**written, index: None} == {**wanted, index: None}
    written, wanted = (json.loads((tmp_path / name / index).read_text()) for name in ("with-shards", "shards"))
    assert written.pop("metadata") == wanted.pop("metadata") | {"total_parameters": model.num_parameters()} and written == wanted
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "with", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    model.model.save_pretrained(tmp_path / "decoder")
    assert not [key for key in load_file(tmp_path / "decoder" / "model.safetensors") if "lora_" in key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gated_rows_are_the_formula(family, dtype):
    """Every projection of a gated pass, on the input it got: on rows within the budget, off rows the linear's own bits."""
    model, ids = with_adapter(plain(family, dtype), rank=3, alpha=4.5), tokens(2, 9)
    on = ragged(2, 9)
    seen = {}
    for name in gated_lora_state_dict(model):
        _, i, projection, _ = name.split(".")
        linear = getattr(getattr(model.model.layers[int(i)], PROJECTIONS[projection]), projection)
        linear.register_forward_hook(lambda module, args, out, key=(i, projection): seen.update({key: (module, args[0], out)}))
    model(ids, gate=on)
    assert len(seen) == 2 * len(PROJECTIONS)
    for linear, x, out in seen.values():

        def formula(x, w, a, b, bias):
            y = x @ w.T if bias is None else x @ w.T + bias
            return y + 1.5 * ((x @ a.T) @ b.T) * on.unsqueeze(-1).to(x.dtype)

        given_ = (x, linear.weight, linear.lora_A, linear.lora_B, linear.bias)
        exact = formula(*(None if t is None else t.double() for t in given_))
        assert_within_budget(out, exact, formula(*given_))
        base = F.linear(x, linear.weight, linear.bias)
        assert torch.equal(out[~on], base[~on]) and not torch.equal(out[on], base[on])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_only_gated_rows_and_later_ones_change(family):
    model, ids = with_adapter(plain(family)), tokens(1, 9)
    off, on = model(ids).logits, model(ids, gate=5).logits
    assert torch.equal(on[:, :5], off[:, :5])
    assert (on[:, 5:] != off[:, 5:]).any(-1).all()
    assert torch.equal(model(ids, gate=9).logits, off)
    assert torch.equal(model(tokens(1, 1), gate=1).logits, model(tokens(1, 1)).logits)


@torch.no_grad()
def test_an_adapter_of_the_package_gives_what_it_gives_there(shared):
    """A prompt and a block of masks behind it, through the package's model and through transformers' with the same adapter."""
    model, masks, n = copy.deepcopy(shared.hf), shared.model.masks, 7
    ids = torch.randint(0, 6, (1, n), generator=torch.Generator().manual_seed(4))
    layout = training_layout(n, torch.tensor([[n - 1]]), 8)
    expected = shared.model(layout.at(ids.t(), [0]), KVCache(shared.model.config, 1, n + 8)).transpose(0, 1)
    tensors = {name: tensor for name, tensor in export_adapter(shared.model).items() if "lora_" in name}
    load_gated_lora_state_dict(add_gated_lora(model, 4), tensors)
    rows = torch.cat([model.get_input_embeddings()(ids), masks.unsqueeze(0)], dim=1)
    with gate(model, n):
        got = model.model(inputs_embeds=rows).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.model(inputs_embeds=rows).last_hidden_state, expected, atol=1e-2)


@torch.no_grad()
def test_ways_to_give_the_gate():
    model, other, ids = with_adapter(plain()), with_adapter(plain()), tokens(1, 9)
    off, on, two = model(ids).logits, model(ids, gate=5).logits, model(ids, gate=2).logits
    mask = torch.arange(9).unsqueeze(0) >= 5
    with gate(model, mask):
        assert torch.equal(model(ids).logits, on)
        assert torch.equal(model(ids, output_hidden_states=True).logits, on)
        assert torch.equal(model.model(ids).last_hidden_state, model.model(ids, gate=5).last_hidden_state)
        assert torch.equal(other(ids).logits, off)  # another model's gate is off
        assert torch.equal(model(ids, gate=2).logits, two) and torch.equal(model(ids, gate=None).logits, off)
        with gate(model, 2), gate(other, 5):
            assert torch.equal(model(ids).logits, two) and torch.equal(other(ids).logits, on)
        with gate(model, None):
            assert torch.equal(model(ids).logits, off)
        with pytest.raises(KeyError), gate(model, 2):
            raise KeyError
        with pytest.raises(ValueError), gate(model, 2):
            model(tokens(2, 9))
        assert torch.equal(model(ids).logits, on)
    assert torch.equal(model(ids).logits, off)
    with gate(model, 5):  # rows of one pass: behind a cache, the new ones
        first = model(ids[:, :8], use_cache=True)
    assert torch.equal(first.logits, model(ids[:, :8], gate=5).logits)
    last = model(ids[:, 8:], past_key_values=first.past_key_values, gate=0)
    torch.testing.assert_close(last.logits, on[:, 8:], atol=1e-4, rtol=1e-4)


def test_threads_do_not_see_each_other():
    model, ids = with_adapter(plain()), tokens(1, 9)
    gates = [None, 0, 3, 6]
    with torch.no_grad():
        expected = [model(ids, gate=m).logits for m in gates]
    wrong, start = [], threading.Barrier(4)

    def run(m, wanted):
        start.wait()
        for _ in range(10):
            with torch.no_grad(), gate(model, m):
                if not torch.equal(model(ids).logits, wanted):
                    wrong.append(m)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(gates, expected, strict=True)]
    with gate(model, 1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@torch.no_grad()
def test_a_gate_that_does_not_fit():
    model, ids = with_adapter(plain()), tokens(2, 9)
    off = model(ids).logits
    on = torch.ones(2, 9, dtype=torch.bool)
    misfits = {
        r"shape \(2, 8\).*\(2, 9\)": on[:, :8], r"shape \(9,\)": on[0], r"gate is 3 and the pass has 2 sequences": 3,
    }  # fmt: skip
    kinds = {"torch.int64": on.long(), "False": False, "-1": -1, "1.5": 1.5, r"\[1, 2\]": [1, 2], "'on'": "'on'"}
    for match, value in misfits.items():
        with pytest.raises(ValueError, match=match), gate(model, value):
            model(ids)
    for match, value in (misfits | kinds).items():
        with pytest.raises(ValueError, match=match):
            model(ids, gate=value)
    for match, value in kinds.items():
        with pytest.raises(ValueError, match=f"gate is .*{match}.*boolean tensor"), gate(model, value):
            pytest.fail("entered")
    with pytest.raises(ValueError, match="gate is 10 and the pass has 1 sequences of 9 rows"):
        model(ids[:1], gate=10)
    with pytest.raises(ValueError, match=r"shape \(1, 9\).*\(1, 1\)"), gate(model, on[:1]):
        model.generate(ids[:1], max_new_tokens=3, do_sample=False)  # its second pass has one row
    assert torch.equal(model(ids).logits, off)


def test_models_that_are_refused():
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5))
    for model, match in (gpt, "GPT2LMHeadModel with model_type 'gpt2'"), (nn.Linear(2, 2), "Linear with model_type None"):
        for call in (add_gated_lora, remove_gated_lora, gated_lora_state_dict):
            with pytest.raises(ValueError, match=match + ".*llama, mistral, qwen2, qwen3"):
                call(model)

    class Linear4bit(nn.Linear):
        pass

    def quantise(model):
        model.model.layers[1].mlp.up_proj = Linear4bit(32, 48)

    def offload(model):
        linear = model.model.layers[0].self_attn.k_proj
        linear.forward = linear.forward

    refused = [
        (quantise, {}, "layers.1.mlp.up_proj is a test_hf.Linear4bit"), (offload, {}, "layers.0.self_attn.k_proj has a forward of its own"),
        (None, dict(rank=0), "rank is 0"), (None, dict(rank=True), "rank is True"), (None, dict(rank=513), "1 to 512"),
        (None, dict(alpha=float("inf")), "alpha is inf"), (None, dict(seed="a"), "seed is 'a'"),
        (None, dict(alpha=0), "alpha is 0"), (None, dict(targets=("q_proj", "lm_head")), "lm_head.*down_proj"),
        (None, dict(targets=[["q_proj"]]), "targets are"), (None, dict(targets=()), "targets are"), (None, dict(dtype=torch.int8), "dtype is torch.int8"),
    ]  # fmt: skip
    for change, options, match in refused:
        model = plain()
        if change:
            change(model)
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=match):
            add_gated_lora(model, **options)
        assert [type(module) for module in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
        assert not any(module._forward_pre_hooks for module in model.modules())

    model = add_gated_lora(plain(), 2)
    with pytest.raises(ValueError, match="already"):
        add_gated_lora(model)
    remove_gated_lora(model)
    for call in (remove_gated_lora, gated_lora_state_dict, lambda m: load_gated_lora_state_dict(m, {}), lambda m: gate(m, 0).__enter__()):
        with pytest.raises(ValueError, match="no gated LoRA"):
            call(model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removed_without_a_trace(family):
    model, ids = plain(family), tokens(2, 9)
    logits = model(ids).logits
    model.model.norm.weight.requires_grad_(False)
    calls = []
    linear = model.model.layers[0].self_attn.q_proj
    linear.register_forward_hook(lambda *_: calls.append("linear"))
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("layer"))

    def trace():
        """Every module with its type, attributes and hooks, and every parameter."""
        hooks = {name for name in vars(model) if "_hooks" in name}
        ignored = "_keys_to_ignore_on_save"  # None or an empty set
        modules = [(id(m), type(m), {k: dict(v) if k in hooks else id(v) for k, v in vars(m).items() if k != ignored}) for m in model.modules()]
        return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()], set(model._keys_to_ignore_on_save or ())

    before = trace()
    assert remove_gated_lora(with_adapter(model)) is model
    assert trace() == before
    assert torch.equal(model(ids).logits, logits) and calls == ["layer", "linear"]
    assert model.model.layers[0].self_attn.q_proj is linear and type(linear) is nn.Linear
    assert torch.equal(with_adapter(model)(ids).logits, logits)  # and it may come back


def test_parameters_replaced_meanwhile_are_trained_again_too():
    model = with_adapter(plain())
    model.lm_head.weight.requires_grad_(True)
    model.load_state_dict(dict(model.state_dict()), assign=True)
    model.resize_token_embeddings(50, mean_resizing=False)
    remove_gated_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_made_under_inference_mode_or_other_defaults():
    expected = gated_lora_state_dict(add_gated_lora(plain(), 4))
    models = [plain(), plain()]
    with torch.inference_mode():
        add_gated_lora(models[0], 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            add_gated_lora(models[1], 4)
    finally:
        torch.set_default_dtype(torch.float32)
    for model in models:
        tensors = gated_lora_state_dict(model)
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
        model(tokens(1, 5), gate=2).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_reaches_the_adapter_alone():
    model, ids = add_gated_lora(plain(), 4, seed=5).train(), tokens(2, 12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in model.state_dict() if name.endswith(("lora_A", "lora_B"))} and len(trained) == 28
    base = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        with gate(model, ragged(2, 12)):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)
    assert not model(ids, labels=ids).loss.requires_grad

    same = [gated_lora_state_dict(add_gated_lora(plain(), 4, seed=seed)) for seed in (5, 5, 6)]
    first = "layers.0.q_proj.lora_A"
    assert torch.equal(same[0][first], same[1][first]) and not torch.equal(same[0][first], same[2][first])

    model = add_gated_lora(plain(dtype=torch.bfloat16), 4, targets="o_proj", dtype=torch.float32, freeze=False)
    assert all(p.requires_grad for p in model.parameters())
    assert {n.split(".")[2] for n in gated_lora_state_dict(model)} == {"o_proj"}
    assert model.model.layers[0].self_attn.o_proj.lora_A.dtype == torch.float32 and model(ids[:1], gate=4).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_after_the_context(reentrant):
    """A layer is run again in the backward pass, where no context is open: it must find the gate it had."""
    model, ids, on = with_adapter(plain()).train(), tokens(2, 9), ragged(2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with gate(model, on):
            loss = model(ids, labels=ids, use_cache=False).loss
        thread = threading.Thread(target=loss.backward)  # as on a GPU, where autograd has threads of its own
        thread.start()
        thread.join()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 28 and gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted)


@torch.no_grad()
def test_adapter_files(tmp_path):
    model, ids = with_adapter(plain()), tokens(1, 9)
    expected = model(ids, gate=3).logits
    save_file(gated_lora_state_dict(model), tmp_path / "adapter.safetensors")
    other = add_gated_lora(plain(), 4)
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert tensors["layers.1.down_proj.lora_A"].shape == (4, 48) and tensors["layers.1.down_proj.lora_B"].shape == (32, 4)
    assert torch.equal(other(ids, gate=3).logits, other(ids).logits)  # B is zero
    load_gated_lora_state_dict(other, tensors)
    assert torch.equal(other(ids, gate=3).logits, expected)
    name = "layers.0.q_proj.lora_A"
    misfits = {
        "missing.*layers.0.q_proj.lora_A": {n: t for n, t in tensors.items() if n != name}, "unknown.*masks": tensors | {"masks": ids},
        r"lora_A has shape \(3, 32\).*\(4, 32\)": {n: torch.zeros_like(t) for n, t in tensors.items()} | {name: tensors[name][:3]},
    }  # fmt: skip
    for match, wrong in misfits.items():
        with pytest.raises(ValueError, match=match):
            load_gated_lora_state_dict(other, wrong)
    assert torch.equal(other(ids, gate=3).logits, expected)


@torch.no_grad()
def test_copies():
    model, ids = with_adapter(plain()), tokens(1, 9)
    off, on = model(ids).logits, model(ids, gate=3).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids, gate=3).logits, on) and torch.equal(twin(ids).logits, off)
        with gate(model, 3):
            assert torch.equal(twin(ids).logits, off)
        remove_gated_lora(twin)
        assert type(twin.model.layers[0].mlp.up_proj) is nn.Linear and all(p.requires_grad for p in twin.parameters())
        assert torch.equal(twin(ids).logits, off) and torch.equal(model(ids, gate=3).logits, on)


@torch.no_grad()
def test_other_heads_and_none():
    for kind in (LlamaModel, LlamaForSequenceClassification):
        torch.manual_seed(0)
        model = kind(copy.deepcopy(FAMILIES["llama"])).eval()
        ids = tokens(1, 9)
        off = model(ids)[0]
        with_adapter(model)
        assert torch.equal(model(ids)[0], off) and not torch.equal(model(ids, gate=3)[0], off)
        assert torch.equal(remove_gated_lora(model)(ids)[0], off)


@torch.no_grad()
def test_autocast():
    model, ids = plain(), tokens(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        off = model(ids).logits
        with_adapter(model)
        on = model(ids, gate=5).logits
        assert torch.equal(model(ids).logits, off) and on.dtype == off.dtype == torch.bfloat16
        assert torch.equal(on[:, :5], off[:, :5])
    torch.testing.assert_close(on.float(), model(ids, gate=5).logits, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_compiled_whole():
    """The gate of a context and of an argument are seen by a compiled model, with no graph break."""
    torch.manual_seed(0)
    model, ids = with_adapter(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | dict(num_hidden_layers=1))).eval()), tokens(1, 9)
    off, on = model(ids).logits, model(ids, gate=5).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(ids).logits, off)
        with gate(model, 5):
            torch.testing.assert_close(compiled(ids).logits, on)
        torch.testing.assert_close(compiled(ids, gate=5).logits, on)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("whole, kind", [(True, "rows"), (False, "number")])
def test_compiled_in_parts(whole, kind):
    """A graph that breaks, at a boolean gate's rows or at a hook of the user's, and layers compiled by themselves, see the gate as well."""
    torch.manual_seed(0)
    model, ids = with_adapter(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | dict(num_hidden_layers=1))).eval()), tokens(1, 9)
    on = torch.arange(9).unsqueeze(0) % 3 == 1 if kind == "rows" else 5
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    expected, off = model(ids, gate=on).logits, model(ids).logits
    if whole:
        model.compile(backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model(ids, gate=on).logits, expected)
        torch.testing.assert_close(model(ids).logits, off)
        with gate(model, on):
            torch.testing.assert_close(model(ids).logits, expected)
    torch.compiler.reset()


@torch.no_grad()
def test_all_rows():
    """True is every row of every pass, of any batch: text is written with the adapter, as with its product added to the weights."""
    model, ids = with_adapter(plain()), tokens(3, 7)
    merged = plain()
    for name, tensor in gated_lora_state_dict(model).items():
        if name.endswith("lora_A"):
            _, number, projection, _ = name.split(".")
            part = merged.model.layers[int(number)].get_submodule(f"{PROJECTIONS[projection]}.{projection}")
            part.weight += gated_lora_state_dict(model)[name.replace("lora_A", "lora_B")] @ tensor
    with gate(model, True):
        torch.testing.assert_close(model(ids).logits, merged(ids).logits)
        for options in (dict(), dict(num_beams=2)):
            options |= dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
            assert torch.equal(model.generate(ids, **options), merged.generate(ids, **options))


def test_an_adapter_directory(make_hf_dir, tmp_path):
    """What `mtp_model train` writes, in a transformers model: the same product on every row as the package's own model with all rows gated."""
    directory = make_hf_dir(num_hidden_layers=1)
    ours = load_model(directory)
    ours.add_adapter(MTPConfig(2, 3, alpha=12.0, target_modules=("q_proj", "down_proj"), gated=False))
    save_adapter(randomise_adapter(ours), tmp_path / "adapter")
    ours = load_adapter(tmp_path / "adapter").apply(load_model(directory))
    theirs = load_gated_lora(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad(), gate(theirs, True):
        cache = KVCache(ours.config, 1, 5)
        expected = ours.logits(ours(prefill_layout([5], 0).at(ids.t(), [0]), cache))
        torch.testing.assert_close(theirs(ids).logits[0], expected[:, 0])
    other = AutoModelForCausalLM.from_pretrained(make_hf_dir("other"))
    with pytest.raises(ValueError, match="missing"):
        load_gated_lora(other, tmp_path / "adapter")
    assert not hasattr(other.model, "_gated_lora")


@torch.no_grad()
def test_an_error_in_a_pass_leaves_no_gate():
    """Between attention, which takes the gate, and the MLP's end."""
    model, ids = with_adapter(plain()), tokens(1, 5)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, 32)

    def fail(*_):
        raise RuntimeError("in between")

    handle = attention.o_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in between"):
        model(ids, gate=2)
    handle.remove()
    assert torch.equal(attention.q_proj(x), F.linear(x, attention.q_proj.weight, attention.q_proj.bias))


@torch.no_grad()
def test_contexts_left_in_another_order():
    model, ids = with_adapter(plain()), tokens(1, 5)
    off, two = model(ids).logits, model(ids, gate=2).logits
    outer, inner = gate(model, 2), gate(model, 0)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, model(ids, gate=0).logits)
    inner.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, off) and not torch.equal(off, two)


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda model: model.double(), "is torch.float64; accepted"),
        (lambda model: setattr(model.model.layers[1], "mlp", model.model.layers[0].mlp), "share a projection"),
    ],
)
def test_models_that_cannot_have_one(damage, word):
    model = plain()
    damage(model)
    with pytest.raises(ValueError, match=word):
        add_gated_lora(model, 4)
    assert not hasattr(model.model, "_gated_lora") and type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_the_readme_examples_run(make_hf_dir):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## In a model you already have")[1].split("\n## ")[0]
    code, layers = re.findall(r"```python\n(.*?)```", section, re.S)
    assert code.count('"my-llama"') == 1 and len([line for line in code.splitlines() if line.strip()]) <= 9
    space = {}
    exec(code.replace('"my-llama"', repr(str(make_hf_dir()))), space)
    assert space["adapted"].shape == (1, 5, 6) and not hasattr(space["model"].model, "_gated_lora")
    exec(layers, space)
    assert space["y"].shape == (2, 5, 64 + 16 + 16) and space["qkv"].rank == 16
