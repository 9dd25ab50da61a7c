"""Model and adapter directories: what is written comes back bit for bit, and what is wrong is named."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import save_hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_model import ModelConfig, MTPConfig, MTPModel, checkpoint, from_transformers, load_adapter, load_model, save_adapter
from mtp_model.cache import KVCache
from mtp_model.checkpoint import export_adapter, import_adapter
from mtp_model.hf import add_gated_lora
from mtp_model.layout import prefill_layout


def states(model, k):
    rows = prefill_layout([4], k).at(torch.tensor([[1], [3], [5], [2]]), [0])
    with torch.no_grad():
        return model(rows, KVCache(model.config, 1, 16))


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("sampler", [True, False])
def test_adapter_round_trip(toy_adapter_model, tmp_path, sampler):
    model = toy_adapter_model(k=3, rank=2, sampler=sampler)
    save_adapter(model, tmp_path / "adapter", {"from": "a test"})
    before, parameters = states(model, 3), {n: p.detach().clone() for n, p in model.adapter_parameters().items()}
    model.remove_adapter()
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.config == MTPConfig(3, 2, alpha=4.0, sampler=sampler) and adapter.notes == {"from": "a test"}
    assert adapter.apply(model) is model
    assert torch.equal(states(model, 3), before)
    assert all(torch.equal(p, parameters[n]) for n, p in model.adapter_parameters().items())
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


def test_names_and_shapes(toy_adapter_model, tmp_path):
    """One A and B per projection, as in PEFT, whatever the model stacks inside."""
    model = toy_adapter_model(k=3, rank=2)
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    d, f, q, kv = 32, 48, 64, 32
    sizes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q), "gate_proj": (f, d),
             "up_proj": (f, d), "down_proj": (d, f)}  # fmt: skip
    expected = {"masks": (3, d)}
    for i in range(2):
        for name, (out, size) in sizes.items():
            expected[f"layers.{i}.{name}.lora_A"], expected[f"layers.{i}.{name}.lora_B"] = (2, size), (out, 2)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith("sampler.")}
    assert got == expected
    assert tuple(tensors["sampler.linear1.weight"].shape) == (d, 2 * d)
    stacked = model.layers[1].qkv_proj
    assert torch.equal(stacked.lora_A[2:4], tensors["layers.1.k_proj.lora_A"])
    assert torch.equal(stacked.lora_B[q + kv :], tensors["layers.1.v_proj.lora_B"])


@pytest.mark.parametrize("targets", [("k_proj", "up_proj"), ("q_proj", "v_proj", "o_proj")])
def test_tensors_of_some_projections_come_back(toy_adapter_model, targets):
    model = toy_adapter_model(k=2, adapter=dict(target_modules=targets))
    tensors = export_adapter(model)
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter.zero_()
    import_adapter(model, tensors)
    again = export_adapter(model)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_an_interrupted_save_leaves_the_file_before(toy_adapter_model, tmp_path, monkeypatch):
    model = toy_adapter_model(k=2)
    save_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def interrupted(tensors, path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path / "adapter")
    assert {name: (tmp_path / "adapter" / name).read_bytes() for name in before} == before

    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="adapter_model.safetensors cannot be written: No space left"):
        save_adapter(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir() if path.name in before} == before
    assert not (tmp_path / "adapter" / "adapter_model.safetensors.tmp").exists()


def test_nothing_to_save(toy_model, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(toy_model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def adapter_dir(toy_adapter_model, tmp_path):
    save_adapter(toy_adapter_model(k=3, rank=2), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "config, word",
    [
        (dict(seed=8), "fingerprint"),
        (dict(tuned="model.layers.1.mlp.up_proj.weight"), "fingerprint"),
        (dict(intermediate_size=40), "intermediate_size"),
        (dict(num_hidden_layers=1), "num_hidden_layers"),
    ],
)
def test_wrong_base(adapter_dir, make_hf_dir, config, word):
    tuned = config.pop("tuned", None)
    directory = make_hf_dir("other", **config)
    if tuned:  # fine-tuned, with embeddings and norms as they were
        edit_tensors(directory / "model.safetensors", lambda tensors: tensors[tuned].mul_(1.01))
    other = load_model(directory)
    with pytest.raises(ValueError, match=f"another base model: .*{word}"):
        load_adapter(adapter_dir).apply(other)
    assert other.mtp is None


def test_right_base_opened_again(adapter_dir, tmp_path):
    model = load_adapter(adapter_dir).apply(load_model(tmp_path / "base"))
    with pytest.raises(ValueError, match="already"):
        load_adapter(adapter_dir).apply(model)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda t: t.pop("layers.1.up_proj.lora_A"), r"missing \['layers.1.up_proj.lora_A'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
        (lambda t: t.update(masks=torch.zeros(2, 32)), r"masks has shape \(2, 32\)"),
        (lambda t: t.update({"layers.0.q_proj.lora_B": torch.zeros(64, 3)}), "layers.0.q_proj.lora_B has shape"),
    ],
)
def test_tensors_that_do_not_fit(adapter_dir, tmp_path, change, word):
    edit_tensors(adapter_dir / "adapter_model.safetensors", change)
    model = load_model(tmp_path / "base")
    with pytest.raises(ValueError, match=word):
        load_adapter(adapter_dir).apply(model)
    assert model.mtp is None and model.adapter_parameters() == {}


@pytest.mark.parametrize("field, value", [("num_masks", 4), ("rank", 3), ("sampler", False)])
def test_config_that_does_not_fit(adapter_dir, tmp_path, field, value):
    adapter = load_adapter(adapter_dir)
    with pytest.raises(ValueError, match="adapter tensor"):
        replace(adapter, config=replace(adapter.config, **{field: value})).apply(load_model(tmp_path / "base"))


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[1]"), "holds a list"),
        (lambda d: edit_json(d / "adapter_config.json", format="other"), "format 'other'"),
        (lambda d: edit_json(d / "adapter_config.json", base=...), "lacks the object 'base'"),
        (lambda d: edit_json(d / "adapter_config.json", adapter={"colour": 1}), "colour"),
        (lambda d: edit_json(d / "adapter_config.json", adapter={"num_masks": 17}), "num_masks is 17"),
        (lambda d: edit_json(d / "adapter_config.json", adapter={"rank": 0}), "rank is 0"),
        (lambda d: edit_json(d / "adapter_config.json", adapter={"rank": "4"}), "rank is '4'"),
        (lambda d: edit_json(d / "adapter_config.json", adapter={"num_masks": 2.5}), "num_masks is 2.5"),
        (lambda d: edit_json(d / "adapter_config.json", adapter={"alpha": "x"}), "alpha is 'x'"),
        (lambda d: edit_json(d / "adapter_config.json", base=[1]), "lacks the object 'base'"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "cannot be read as safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"not tensors at all"), "cannot be read"),
    ],
)
def test_damaged_adapter(adapter_dir, damage, word):
    damage(adapter_dir)
    with pytest.raises(ValueError, match=word):
        load_adapter(adapter_dir)


def test_truncated_adapter(adapter_dir):
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_adapter(adapter_dir)


@pytest.mark.parametrize("load", [load_model, load_adapter])
def test_not_a_directory(tmp_path, load):
    with pytest.raises(ValueError, match="is not a directory"):
        load(tmp_path / "nowhere")


F8 = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda d: edit_json(d / "config.json", model_type="mamba"), "model_type is 'mamba'"),
        (lambda d: edit_json(d / "config.json", rope_parameters="yarn"), "rope_scaling is 'yarn'"),
        (lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "linear", "factor": None}), "lacks factor"),
        (lambda d: edit_json(d / "config.json", hidden_act="gelu"), "hidden_act"),
        (lambda d: edit_json(d / "config.json", vocab_size=...), "lacks vocab_size"),
        (lambda d: edit_json(d / "config.json", num_key_value_heads=3), "num_key_value_heads 3"),
        (lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
        (lambda d: edit_json(d / "config.json", rope_parameters=..., rope_scaling={"type": "dynamic"}), "'dynamic'"),
        (lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "linear"}), "lacks factor"),
        (lambda d: edit_json(d / "config.json", intermediate_size=40), "gate_proj.weight .* has shape"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'), "has no weight_map"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "has no weight_map"),
        (lambda d: edit_json(d / "config.json", model_type=["llama"]), r"model_type is \['llama'\]"),
        (lambda d: edit_json(d / "config.json", hidden_size="32"), "hidden_size is '32'; accepted is an integer from 1"),
        (lambda d: edit_json(d / "config.json", num_hidden_layers=0), "num_hidden_layers is 0; accepted is an integer from 1"),
        (lambda d: edit_json(d / "config.json", max_position_embeddings="a"), "max_position_embeddings is 'a'"),
        (lambda d: edit_json(d / "config.json", eos_token_id="x"), "eos_token_id is 'x'"),
        (lambda d: edit_json(d / "config.json", eos_token_id=[1, None]), "eos_token_id is "),
        (lambda d: edit_json(d / "config.json", vocab_size=7), "embed_tokens.weight .* has shape"),
        (lambda d: edit_json(d / "config.json", num_hidden_layers=3), "lacks the tensor model.layers.2"),
        (lambda d: edit_json(d / "config.json", attention_bias=True), "lacks the tensor .*q_proj.bias"),
        (lambda d: edit_tensors(d / "model.safetensors", lambda t: t.pop("lm_head.weight")), "lacks .*lm_head"),
        (lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "fp8"}), "quantised .*fp8"),
        (lambda d: edit_tensors(d / "model.safetensors", lambda t: t.update({F8: t[F8].to(torch.float8_e4m3fn)})), "is torch.float8_e4m3fn; accepted"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("nonsense"), "is not JSON"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 64), "cannot be read as safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    ],
)
def test_damaged_model(make_hf_dir, damage, word):
    directory = make_hf_dir()
    damage(directory)
    with pytest.raises(ValueError, match=word):
        load_model(directory)


def test_damaged_shards(make_hf_dir):
    directory = make_hf_dir(max_shard_size="10KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = directory / index["weight_map"][name]
    content = shard.read_bytes()
    edit_tensors(shard, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"lacks the tensor {name} that the index places there"):
        load_model(directory)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        load_model(directory)
    shard.write_bytes(content)
    assert load_model(directory).config.num_hidden_layers == 2


class Trap:
    """Unpickling this leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_never_opened(make_hf_dir, tmp_path, name):
    directory = make_hf_dir()
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    with pytest.raises(ValueError, match="neither model.safetensors" if name.endswith("bin") else "cannot be read"):
        load_model(directory)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((directory / name).read_bytes()).close()
    assert (tmp_path / "sprung").exists()  # the trap works


def test_dtype_is_the_checkpoints(make_hf_dir):
    directory = make_hf_dir()
    assert load_model(directory).dtype == torch.float32
    edit_tensors(directory / "model.safetensors", lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    assert load_model(directory).dtype == torch.bfloat16
    assert load_model(directory, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama", dict(tie_word_embeddings=True, attention_bias=True)),
        ("llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 64})),
        ("mistral", dict(sliding_window=5)),
        ("qwen2", dict()),
        ("qwen3", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ],
)  # fmt: skip
def test_a_model_that_is_loaded(tmp_path, family, config):
    """It is what its directory would give, adapters fit it, and it shares nothing with the model it was made from."""
    hf = save_hf(tmp_path / "model", family=family, **config)
    hf.generation_config.eos_token_id = 0
    hf.save_pretrained(tmp_path / "model")
    opened, mine = load_model(tmp_path / "model"), from_transformers(torch.compile(hf.train()))
    assert mine.config == opened.config and mine.config.eos_token_ids == (0,) and mine.fingerprint == opened.fingerprint
    assert torch.equal(states(mine, 0), states(opened, 0)) and not any(p.requires_grad for p in mine.parameters())
    for model in (opened, mine):
        assert not model.training
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
    assert torch.equal(states(mine, 0), states(opened, 0))


def test_options_of_a_model_that_is_loaded(tmp_path, device):
    hf = save_hf(tmp_path / "model", tie_word_embeddings=True)
    plain = from_transformers(hf)
    assert plain.lm_head is plain.embed and plain.device.type == "cpu" and not plain.fused
    rounded, unrounded = from_transformers(hf, dtype=torch.bfloat16), from_transformers(copy.deepcopy(hf).double())
    assert rounded.dtype == torch.bfloat16 and rounded.fingerprint == plain.fingerprint == unrounded.fingerprint
    pytest.importorskip("triton")
    options = {"device": device, "implementation": "triton"}
    assert from_transformers(hf, **options).fused and load_model(tmp_path / "model", **options).fused
    for make in (lambda **options: from_transformers(hf, **options), lambda **options: load_model(tmp_path / "model", **options)):
        with pytest.raises(ValueError, match="dtype is torch.int8; accepted are"):
            make(dtype=torch.int8)
        if not torch.cuda.is_available():
            with pytest.raises((AssertionError, RuntimeError)):  # torch's own, of a device that is not here
                make(device=0)


def test_tied_by_the_config_but_not_by_the_weights(tmp_path):
    """transformers 5 keeps an lm_head that differs, and so do we."""
    hf = save_hf(tmp_path / "model", tie_word_embeddings=True)
    edit_tensors(tmp_path / "model" / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_model(tmp_path / "model")
    assert model.lm_head is model.embed and model.config.tie_word_embeddings
    edit_tensors(tmp_path / "model" / "model.safetensors", lambda t: t["lm_head.weight"].mul_(2))
    hf = type(hf).from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 3, 5, 2]])
    with torch.no_grad():
        expected = hf(ids).logits[0]
    for model in (load_model(tmp_path / "model"), from_transformers(hf)):
        assert torch.allclose(model.logits(states(model, 0))[:, 0], expected, atol=1e-4)


@pytest.mark.parametrize("new", [True, False])
def test_made_in_inference_mode_it_can_be_trained(tmp_path, toy_adapter_model, new):
    hf = save_hf(tmp_path / "model")
    save_adapter(toy_adapter_model(k=1), tmp_path / "adapter")
    with torch.inference_mode():
        model = from_transformers(hf)
        if new:
            model.add_adapter(MTPConfig(1, 2))
        else:
            load_adapter(tmp_path / "adapter").apply(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    rows = prefill_layout([4], 1).at(torch.tensor([[1], [3], [5], [2]]), [0])
    model(rows, KVCache(model.config, 1, 16)).sum().backward()
    assert all(p.grad is not None for name, p in model.adapter_parameters().items() if "lora_" in name)
    with pytest.raises(ValueError, match="the model is a LlamaForCausalLM; accepted is what load_model"):
        load_adapter(tmp_path / "adapter").apply(hf)


@pytest.mark.parametrize(
    "make, options, word",
    [
        (lambda hf: hf.model, {}, "the LlamaModel lacks the tensor model.embed_tokens.weight"),
        (lambda hf: torch.nn.Linear(2, 2), {}, "the model is a Linear; accepted is a causal language model of transformers"),
        (lambda hf: hf.state_dict(), {}, "the model is a OrderedDict"),
        (lambda hf: hf.to("meta"), {}, "is not in memory"),
        (lambda hf: hf.half().to(torch.float8_e4m3fn), {}, "is torch.float8_e4m3fn; accepted"),
        (lambda hf: AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)), {}, "model_type is 'gpt2'"),
        (lambda hf: hf.model.layers[1].register_forward_hook(print) and hf, {}, r"has forward hooks \(model.layers.1\), which would be left behind"),
        (lambda hf: add_gated_lora(hf, 2), {}, r"has adapters \(.*lora_A.*remove_gated_lora"),
        (lambda hf: setattr(hf.lm_head, "bias", torch.nn.Parameter(torch.ones(6))) or hf, {}, r"has the tensors \['lm_head.bias'\], which would go unheeded"),
    ],
)
def test_a_loaded_model_that_is_not_accepted(tmp_path, make, options, word):
    with pytest.raises(ValueError, match=word):
        from_transformers(make(save_hf(tmp_path / "model")), **options)


def test_adapter_config_defaults():
    assert MTPConfig(rank=16).alpha == 16.0
    with pytest.raises(ValueError, match="num_masks is 0"):
        MTPConfig(0)
    with pytest.raises(ValueError, match="rank is 513"):
        MTPConfig(rank=513)


def test_a_model_without_a_checkpoint():
    model = MTPModel(ModelConfig(6, 32, 48, 1, 4, 2, 8, tie_word_embeddings=True))
    assert model.lm_head is model.embed and states(model, 0).shape == (4, 1, 32)
