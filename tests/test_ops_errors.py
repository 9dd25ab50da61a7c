"""Every operation refuses what it does not accept, and says which argument it was."""

import pytest
import torch

import mtp_kernels
from mtp_kernels import AttentionRule, SamplerWeights, Sampling

META = "meta"


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def integers(*shape, dtype=torch.int64, device="cpu"):
    return zeros(*shape, dtype=dtype, device=device)


def rule(**changes):
    values = dict(visible=integers(5, 2) + 3, block=integers(5), slot=integers(5), mask_start=integers(2) + 3)
    values |= dict(num_masks=2, num_keys=5)
    return AttentionRule(**values | changes)


def sampler(**changes):
    shapes = [(4, 8), (4,), (4,), (4,), (4, 4), (4,), (4,), (4,)]
    values = dict(zip(SamplerWeights._fields, (zeros(*s) for s in shapes), strict=True))
    return SamplerWeights(**values | changes)


def valid(name):
    return {
        "gated_lora_linear": lambda: dict(
            x=zeros(3, 2, 4), weight=zeros(6, 4), lora_a=zeros(4, 4), lora_b=zeros(6, 2), gate=1, splits=(2, 4),
            bias=zeros(6), residual=zeros(3, 2, 6),
        ),
        "attention": lambda: dict(q=zeros(5, 2, 4, 8), k=zeros(2, 2, 7, 8), v=zeros(2, 2, 7, 8), rule=rule()),
        "rms_norm": lambda: dict(x=zeros(3, 4), weight=zeros(4), residual=zeros(3, 4)),
        "rotary_frequencies": lambda: dict(head_dim=8, scaling=dict(rope_type="linear", factor=2.0)),
        "rotary_scale": lambda: dict(scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=9)),
        "rotary_tables": lambda: dict(positions=integers(3), frequencies=zeros(4)),
        "rotary_embedding": lambda: dict(x=zeros(3, 2, 8), cos=zeros(3, 8), sin=zeros(3, 8), norm=zeros(2, 8)),
        "rotary_write": lambda: dict(
            qkv=zeros(3, 2, 8, 4), cos=zeros(3, 2, 4), sin=zeros(3, 2, 4), keys=zeros(7, 2, 2, 4), values=zeros(7, 2, 2, 4), start=integers(2),
            norm=zeros(6, 4),
        ),
        "argmax": lambda: dict(logits=zeros(3, 5)),
        "sample": lambda: dict(logits=zeros(3, 5), keys=integers(3), sampling=Sampling(0.5, 2, 0.9)),
        "linear_argmax": lambda: dict(hidden=zeros(3, 4), weight=zeros(5, 4)),
        "linear_sample": lambda: dict(hidden=zeros(3, 4), weight=zeros(5, 4), keys=integers(3), sampling=Sampling(0.5, 2, 0.9)),
        "sampling_keys": lambda: dict(seeds=integers(2), positions=integers(3, 1), vocab_size=5),
        "swiglu": lambda: dict(x=zeros(3, 8)),
        "sampler_hidden": lambda: dict(previous=zeros(3, 4), z=zeros(3, 4), weights=sampler()),
        "sampler_draft": lambda: dict(
            z=zeros(2, 3, 4), first=integers(2), embedding=zeros(5, 4), weights=sampler(), lm_head=zeros(5, 4), keys=integers(2, 3)
        ),
        "linear_cross_entropy": lambda: dict(hidden=zeros(3, 4), lm_head=zeros(5, 4), labels=integers(3), teacher=zeros(3, 4), soft=0.5),
        "latent_consistency": lambda: dict(z=zeros(3, 4), target=zeros(5, 4), index=integers(3), weight=zeros(3)),
        "accept": lambda: dict(drafts=integers(2, 3), predictions=integers(2, 4), counts=integers(2)),
        "accept_and_commit": lambda: dict(
            drafts=integers(2, 3), predictions=integers(2, 4), counts=integers(2), lengths=integers(2), room=integers(2) + 5,
            finished=torch.zeros(2, dtype=torch.bool), eos=integers(1),
        ),
        "drafting_states": lambda: dict(
            z=zeros(7, 2, 4), anchors=integers(2, 2), accepted=integers(2), k=3, without=torch.zeros(2, dtype=torch.bool)
        ),
        "lookup_drafts": lambda: dict(text=integers(2, 5), newest=integers(2), tokens=3, match=2),
    }[name]()  # fmt: skip


OPS = ["gated_lora_linear", "attention", "rms_norm", "rotary_frequencies", "rotary_scale", "rotary_tables", "rotary_embedding",
       "rotary_write", "linear_argmax", "swiglu", "sampler_hidden", "sampler_draft", "linear_cross_entropy", "latent_consistency",
       "accept", "accept_and_commit", "drafting_states", "lookup_drafts", "linear_sample", "sampling_keys", "argmax", "sample"]  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_the_unchanged_call_is_accepted(name):
    getattr(mtp_kernels, name)(**valid(name))


@pytest.mark.parametrize("name", [n for n in OPS if n not in ("rotary_frequencies", "rotary_scale", "rotary_tables", "sampling_keys")])
def test_implementation(name):
    function = getattr(mtp_kernels, name)
    with pytest.raises(ValueError, match="implementation is 'cobol'; accepted are .*reference"):
        function(**valid(name), implementation="cobol")
    assert type(function(**valid(name), implementation="reference")) is type(function(**valid(name)))


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
DOUBLE, HALF = torch.float64, torch.bfloat16

CASES = [
    ("gated_lora_linear", dict(x=zeros(3, 2, 5)), "x has shape"),
    ("gated_lora_linear", dict(x=zeros(())), "x has shape"),
    ("gated_lora_linear", dict(x=zeros(3, 0), weight=zeros(4, 0)), "K from 1"),
    ("gated_lora_linear", dict(weight=zeros(4)), "weight"),
    ("gated_lora_linear", dict(x=zeros(3, 2, 4, dtype=DOUBLE)), "x has dtype torch.float64"),
    ("gated_lora_linear", dict(x=integers(3, 2, 4)), "x has dtype torch.int64"),
    ("gated_lora_linear", dict(weight=zeros(6, 4, dtype=HALF)), "weight .*bfloat16"),
    ("gated_lora_linear", dict(lora_a=zeros(4, 4, dtype=HALF)), "lora_a .*bfloat16"),
    ("gated_lora_linear", dict(lora_b=zeros(6, 2, dtype=HALF)), "lora_b .*bfloat16"),
    ("gated_lora_linear", dict(bias=zeros(6, dtype=HALF)), "bias .*bfloat16"),
    ("gated_lora_linear", dict(residual=zeros(3, 2, 6, dtype=HALF)), "residual .*bfloat16"),
    ("gated_lora_linear", dict(weight=zeros(6, 4, device=META)), "weight .* on meta"),
    ("gated_lora_linear", dict(residual=zeros(3, 2, 6, device=META)), "residual .* on meta"),
    ("gated_lora_linear", dict(bias=zeros(5)), "bias has shape"),
    ("gated_lora_linear", dict(residual=zeros(2, 3, 6)), "residual has shape"),
    ("gated_lora_linear", dict(lora_a=None), "accepted are both or neither"),
    ("gated_lora_linear", dict(lora_b=None), "accepted are both or neither"),
    ("gated_lora_linear", dict(lora_a=None, lora_b=None), "gate was passed without"),
    ("gated_lora_linear", dict(splits=(2, 3)), "splits"),
    ("gated_lora_linear", dict(splits=()), "splits"),
    ("gated_lora_linear", dict(splits=(6, 0)), "splits"),
    ("gated_lora_linear", dict(splits=None), "lora_a has shape"),
    ("gated_lora_linear", dict(lora_b=zeros(6, 0), lora_a=zeros(0, 4)), "R from 1 to 512"),
    ("gated_lora_linear", dict(lora_b=zeros(6, 513), lora_a=zeros(1026, 4)), "R from 1 to 512"),
    ("gated_lora_linear", dict(lora_b=zeros(6, 2, 1)), "lora_b has shape"),
    ("gated_lora_linear", dict(lora_b=torch.tensor(1.0)), "lora_b has shape"),
    ("gated_lora_linear", dict(lora_b=zeros(5, 2)), "lora_b has shape"),
    ("gated_lora_linear", dict(lora_a=zeros(4, 3)), "lora_a has shape"),
    ("gated_lora_linear", dict(gate=-1), "gate is -1"),
    ("gated_lora_linear", dict(gate=7), r"number of rows \(6\)"),
    ("gated_lora_linear", dict(gate=True), "gate is True"),
    ("gated_lora_linear", dict(gate=1.0), "gate is 1.0"),
    ("gated_lora_linear", dict(gate=zeros(3, 2)), "gate has shape"),
    ("gated_lora_linear", dict(gate=zeros(6, dtype=torch.bool)), "gate has shape"),
    ("gated_lora_linear", dict(gate=integers(3, 2)), "gate has shape"),
    ("gated_lora_linear", dict(gate=zeros(3, 2, dtype=torch.bool, device=META)), "gate .* on meta"),
    ("attention", dict(q=zeros(5, 2, 32)), "q has shape"),
    ("attention", dict(k=zeros(2, 7, 8)), "k "),
    ("attention", dict(k=zeros(3, 2, 7, 8)), "k has shape"),
    ("attention", dict(k=zeros(2, 2, 7, 4)), "k has shape"),
    ("attention", dict(v=zeros(2, 2, 6, 8)), "v has shape"),
    ("attention", dict(q=zeros(5, 2, 3, 8)), "3 heads"),
    ("attention", dict(k=zeros(2, 0, 7, 8), v=zeros(2, 0, 7, 8)), "heads"),
    ("attention", dict(k=zeros(2, 2, 7, 8, dtype=HALF)), "k .*bfloat16"),
    ("attention", dict(v=zeros(2, 2, 7, 8, dtype=HALF)), "v .*bfloat16"),
    ("attention", dict(v=zeros(2, 2, 7, 8, device=META)), "v .* on meta"),
    ("attention", dict(q=zeros(5, 2, 4, 8, dtype=DOUBLE)), "q has dtype"),
    ("attention", dict(rule=rule(visible=integers(5, 1))), "rule.visible has shape"),
    ("attention", dict(rule=rule(block=integers(4))), "rule.block has shape"),
    ("attention", dict(rule=rule(slot=integers(5, 2))), "rule.slot has shape"),
    ("attention", dict(rule=rule(mask_start=integers(5))), "rule.mask_start has shape"),
    ("attention", dict(rule=rule(visible=zeros(5, 2))), "rule.visible has dtype"),
    ("attention", dict(rule=rule(slot=integers(5, dtype=torch.int16))), "rule.slot has dtype"),
    ("attention", dict(rule=rule(block=integers(5, device=META))), "rule.block is on meta"),
    ("attention", dict(rule=rule(first=integers(2, 5))), "rule.first has shape"),
    ("attention", dict(rule=rule(first=zeros(5, 2))), "rule.first has dtype"),
    ("attention", dict(rule=rule(first=integers(5, 2, device=META))), "rule.first is on meta"),
    ("attention", dict(rule=rule(num_masks=6)), "num_masks is 6"),
    ("attention", dict(rule=rule(num_masks=-1)), "num_masks is -1"),
    ("attention", dict(rule=rule(causal=True)), "rule.causal is set"),
    ("attention", dict(rule=rule(num_masks=0, first=integers(5, 2), causal=True)), "rule.causal is set"),
    ("attention", dict(rule=rule(num_masks=0, num_keys=4, causal=True)), "num_keys 4; accepted"),
    ("attention", dict(rule=rule(num_keys=8)), "num_keys is 8"),
    ("attention", dict(rule=rule(num_keys=0)), "num_keys is 0"),
    ("rms_norm", dict(weight=zeros(3)), "weight has shape"),
    ("rms_norm", dict(residual=zeros(4)), "residual has shape"),
    ("rms_norm", dict(x=zeros(3, 4, dtype=DOUBLE)), "x has dtype"),
    ("rms_norm", dict(weight=zeros(4, dtype=HALF)), "weight .*bfloat16"),
    ("rms_norm", dict(residual=zeros(3, 4, device=META)), "residual .* on meta"),
    ("rotary_frequencies", dict(head_dim=7), "head_dim is 7"),
    ("rotary_frequencies", dict(head_dim=0), "head_dim is 0"),
    ("rotary_frequencies", dict(scaling=dict(rope_type="longrope")), "'longrope'; accepted are default, linear, llama3, yarn"),
    ("rotary_frequencies", dict(scaling=dict(rope_type="yarn")), "'yarn' lacks factor, original_max_position_embeddings"),
    ("rotary_scale", dict(scaling=dict(rope_type="yarn", factor=2.0)), "lacks original_max_position_embeddings"),
    ("rotary_scale", dict(scaling=dict(type="dynamic")), "'dynamic'"),
    ("rotary_frequencies", dict(scaling=dict(type="linear")), "lacks factor"),
    ("rotary_frequencies", dict(scaling=LLAMA3), "lacks original_max_position_embeddings"),
    ("rotary_tables", dict(positions=zeros(3)), "positions has dtype"),
    ("rotary_tables", dict(positions=integers(3, device=META)), "positions is on meta"),
    ("rotary_tables", dict(frequencies=zeros(4, 1)), "frequencies has shape"),
    ("rotary_embedding", dict(x=zeros(8)), "x has shape"),
    ("rotary_embedding", dict(x=zeros(3, 2, 7)), "even D"),
    ("rotary_embedding", dict(cos=zeros(3, 4)), "cos has shape"),
    ("rotary_embedding", dict(sin=zeros(2, 8)), "sin has shape"),
    ("rotary_embedding", dict(cos=zeros(3, 8, dtype=HALF)), "cos .*bfloat16"),
    ("rotary_embedding", dict(sin=zeros(3, 8, device=META)), "sin .* on meta"),
    ("rotary_embedding", dict(x=zeros(3, 2, 8, dtype=DOUBLE)), "x has dtype"),
    ("rotary_embedding", dict(norm=zeros(8)), r"norm has shape .*accepted is \(H, D\)"),
    ("rotary_embedding", dict(norm=zeros(2, 8, dtype=HALF)), "norm .*bfloat16"),
    ("rotary_embedding", dict(norm=zeros(2, 8).requires_grad_()), "norm requires gradients"),
    ("rotary_write", dict(qkv=zeros(3, 2, 8)), "qkv has shape"),
    ("rotary_write", dict(qkv=zeros(3, 2, 8, 5), keys=zeros(7, 2, 2, 5)), "even D"),
    ("rotary_write", dict(qkv=zeros(3, 2, 4, 4)), "qkv has shape"),
    ("rotary_write", dict(keys=zeros(7, 2, 0, 4)), "keys"),
    ("rotary_write", dict(keys=zeros(2, 2, 4)), "keys"),
    ("rotary_write", dict(keys=zeros(7, 3, 2, 4)), "keys has shape"),
    ("rotary_write", dict(keys=zeros(7, 2, 2, 6)), "keys has shape"),
    ("rotary_write", dict(values=zeros(8, 2, 2, 4)), "values has shape"),
    ("rotary_write", dict(cos=zeros(3, 4)), "cos has shape"),
    ("rotary_write", dict(sin=zeros(3, 1, 4)), "sin has shape"),
    ("rotary_write", dict(start=integers(3)), "start has shape"),
    ("rotary_write", dict(norm=zeros(4, 4)), "norm has shape"),
    ("rotary_write", dict(norm=zeros(6, 4, device=META)), "norm .* on meta"),
    ("rotary_write", dict(start=integers(())), "start has shape"),
    ("rotary_write", dict(start=zeros(2)), "start has dtype"),
    ("rotary_write", dict(start=integers(2, device=META)), "start is on meta"),
    ("rotary_write", dict(qkv=zeros(3, 2, 8, 4, dtype=DOUBLE)), "qkv has dtype"),
    ("rotary_write", dict(keys=zeros(7, 2, 2, 4, dtype=HALF)), "keys .*bfloat16"),
    ("rotary_write", dict(values=zeros(7, 2, 2, 4, device=META)), "values .* on meta"),
    ("rotary_write", dict(values=zeros(7, 2, 2, 8)[..., ::2]), "values has stride 2 along D; accepted is 1"),
    ("rotary_write", dict(qkv=zeros(3, 2, 8, 4).requires_grad_()), "requires gradients; accepted are"),
    ("rotary_write", dict(keys=zeros(7, 2, 2, 4).requires_grad_()), "requires gradients"),
    ("rotary_write", dict(values=zeros(7, 2, 2, 4).requires_grad_()), "requires gradients"),
    ("argmax", dict(logits=zeros(())), "logits has shape"),
    ("argmax", dict(logits=zeros(3, 0)), "V from 1"),
    ("argmax", dict(logits=integers(3, 5)), "logits has dtype"),
    ("sample", dict(logits=zeros(3, 0)), "V from 1"),
    ("sample", dict(keys=integers(2)), "keys has shape"),
    ("sample", dict(sampling=None), "sampling is None; accepted is a Sampling"),
    ("linear_argmax", dict(hidden=zeros(3, 5)), "hidden has shape"),
    ("linear_argmax", dict(hidden=zeros(())), "hidden has shape"),
    ("linear_argmax", dict(weight=zeros(4)), "weight"),
    ("linear_argmax", dict(weight=zeros(0, 4)), "V from 1"),
    ("linear_argmax", dict(hidden=zeros(3, 4, dtype=DOUBLE)), "hidden has dtype"),
    ("linear_argmax", dict(weight=zeros(5, 4, dtype=HALF)), "weight .*bfloat16"),
    ("linear_argmax", dict(weight=zeros(5, 4, device=META)), "weight .* on meta"),
    ("swiglu", dict(x=zeros(3, 7)), "x has shape"),
    ("swiglu", dict(x=zeros(())), "x has shape"),
    ("swiglu", dict(x=integers(3, 8)), "x has dtype"),
    ("sampler_hidden", dict(previous=zeros(2, 4)), "previous has shape"),
    ("sampler_hidden", dict(z=zeros(3, 4, dtype=DOUBLE)), "z has dtype"),
    ("sampler_hidden", dict(previous=zeros(3, 4, dtype=HALF)), "previous .*bfloat16"),
    ("sampler_hidden", dict(previous=zeros(3, 4, device=META)), "previous .* on meta"),
    ("linear_sample", dict(hidden=zeros(3, 5)), "hidden has shape"),
    ("linear_sample", dict(weight=zeros(0, 4)), "V from 1"),
    ("linear_sample", dict(weight=zeros(5, 4, dtype=HALF)), "weight .*bfloat16"),
    ("linear_sample", dict(keys=integers(2)), "keys has shape"),
    ("linear_sample", dict(keys=zeros(3)), "keys is torch.float32"),
    ("linear_sample", dict(keys=integers(3, dtype=torch.int32)), "keys is torch.int32"),
    ("linear_sample", dict(keys=integers(3, device=META)), "keys .* on meta"),
    ("linear_sample", dict(sampling=1.0), "sampling is 1.0; accepted is a Sampling"),
    ("sampling_keys", dict(seeds=integers(2, dtype=torch.int32)), "seeds is torch.int32"),
    ("sampling_keys", dict(positions=zeros(2)), "positions is torch.float32"),
    ("sampling_keys", dict(positions=integers(2, device=META)), "positions .* on meta"),
    ("sampling_keys", dict(vocab_size=0), "vocab_size is 0"),
    ("sampler_draft", dict(keys=integers(2, 4)), "keys has shape"),
    ("sampler_draft", dict(keys=zeros(2, 3)), "keys is torch.float32"),
    ("sampler_draft", dict(temperature=0.0), "temperature is 0.0"),
    ("sampler_draft", dict(z=zeros(2, 4)), "z has shape"),
    ("sampler_draft", dict(first=integers(3)), "first has shape"),
    ("sampler_draft", dict(first=zeros(2)), "first has dtype"),
    ("sampler_draft", dict(first=integers(2, device=META)), "first is on meta"),
    ("sampler_draft", dict(embedding=zeros(5, 3)), "embedding has shape"),
    ("sampler_draft", dict(lm_head=zeros(5, 3)), "lm_head has shape"),
    ("sampler_draft", dict(lm_head=zeros(5, 4, dtype=HALF)), "lm_head .*bfloat16"),
    ("sampler_draft", dict(embedding=zeros(5, 4, device=META)), "embedding .* on meta"),
    ("sampler_draft", dict(z=integers(2, 3, 4)), "z has dtype"),
    ("sampler_draft", dict(candidates=0), "candidates is 0; accepted .* V = 5"),
    ("sampler_draft", dict(candidates=6), "candidates is 6"),
    ("sampler_draft", dict(candidates=integers(2, 3)), r"candidates has shape \(2, 3\); accepted is \(B, k, C\)"),
    ("sampler_draft", dict(candidates=integers(2, 4, 2)), "candidates has shape"),
    ("sampler_draft", dict(candidates=integers(2, 3, 0)), "candidates has shape"),
    ("sampler_draft", dict(candidates=integers(2, 3, 2, dtype=torch.int32)), "candidates is torch.int32"),
    ("sampler_draft", dict(candidates=integers(2, 3, 2, device=META)), "candidates is torch.int64 on meta"),
    ("sampler_draft", dict(candidates=True), "candidates is True"),
    ("sampler_draft", dict(candidates=2.0), "candidates is 2.0"),
    ("linear_cross_entropy", dict(hidden=zeros(3, 5)), "hidden has shape"),
    ("linear_cross_entropy", dict(lm_head=zeros(4)), "lm_head"),
    ("linear_cross_entropy", dict(labels=integers(4)), "labels has shape"),
    ("linear_cross_entropy", dict(labels=integers(3, dtype=torch.int32)), "labels are torch.int32"),
    ("linear_cross_entropy", dict(labels=integers(3, device=META)), "labels are .* on meta"),
    ("linear_cross_entropy", dict(hidden=zeros(3, 4, dtype=DOUBLE)), "hidden has dtype"),
    ("linear_cross_entropy", dict(lm_head=zeros(5, 4, dtype=HALF)), "lm_head .*bfloat16"),
    ("linear_cross_entropy", dict(lm_head=zeros(5, 4, device=META)), "lm_head .* on meta"),
    ("linear_cross_entropy", dict(chunk=0), "chunk is 0"),
    ("linear_cross_entropy", dict(teacher=zeros(4, 4)), "teacher has shape"),
    ("linear_cross_entropy", dict(teacher=zeros(3, 4, dtype=HALF)), "teacher .*bfloat16"),
    ("linear_cross_entropy", dict(teacher=zeros(3, 4, device=META)), "teacher .* on meta"),
    ("linear_cross_entropy", dict(soft=-0.1), "soft is -0.1; accepted is 0 to 1"),
    ("linear_cross_entropy", dict(soft=1.5, teacher=None), "soft is 1.5"),
    ("linear_cross_entropy", dict(soft=float("nan")), "soft is nan"),
    ("latent_consistency", dict(z=zeros(3, 2, 4)), "z has shape"),
    ("latent_consistency", dict(target=zeros(4)), "target"),
    ("latent_consistency", dict(target=zeros(5, 3)), r"target \(5, 3\)"),
    ("latent_consistency", dict(z=zeros(3, 0), target=zeros(5, 0)), "d of 1 or more"),
    ("latent_consistency", dict(z=zeros(3, 4, dtype=DOUBLE)), "z has dtype"),
    ("latent_consistency", dict(target=zeros(5, 4, dtype=HALF)), "target .*bfloat16"),
    ("latent_consistency", dict(target=zeros(5, 4, device=META)), "target .* on meta"),
    ("latent_consistency", dict(index=integers(4)), "index has shape"),
    ("latent_consistency", dict(index=integers(3, dtype=torch.int32)), "index is torch.int32"),
    ("latent_consistency", dict(index=integers(3, device=META)), "index is .* on meta"),
    ("latent_consistency", dict(weight=zeros(3, 1)), "weight has shape"),
    ("latent_consistency", dict(weight=zeros(3, dtype=HALF)), "weight is torch.bfloat16"),
    ("latent_consistency", dict(weight=zeros(3, device=META)), "weight is .* on meta"),
    ("accept_and_commit", dict(drafts=integers(3)), "drafts has shape"),
    ("accept_and_commit", dict(predictions=integers(2, 3)), "predictions has shape"),
    ("accept_and_commit", dict(room=integers(3)), "room has shape"),
    ("accept_and_commit", dict(eos=integers(1, 1)), "eos has shape"),
    ("accept_and_commit", dict(finished=integers(2)), "finished is torch.int64 .* accepted is torch.bool"),
    ("accept_and_commit", dict(lengths=integers(2).int()), "lengths is torch.int32 .* accepted is torch.int64"),
    ("accept_and_commit", dict(eos=integers(1, device=META)), "eos is torch.int64 on meta"),
    ("drafting_states", dict(k=0), "k is 0"),
    ("drafting_states", dict(k=3.0), "k is 3.0"),
    ("drafting_states", dict(k=True), "k is True"),
    ("drafting_states", dict(z=zeros(7, 2, 0)), "d from 1"),
    ("drafting_states", dict(z=zeros(7, 2, 4).requires_grad_()), "z requires gradients"),
    ("drafting_states", dict(k=4), "z has shape .* accepted are"),
    ("drafting_states", dict(z=zeros(7, 4)), "z has shape"),
    ("drafting_states", dict(anchors=integers(2, 3)), "anchors"),
    ("drafting_states", dict(anchors=integers(0, 2)), "A and d from 1"),
    ("drafting_states", dict(accepted=integers(3)), "accepted has shape"),
    ("drafting_states", dict(without=torch.zeros(3, dtype=torch.bool)), "without has shape"),
    ("drafting_states", dict(without=integers(2)), "without is torch.int64 .* accepted is torch.bool"),
    ("drafting_states", dict(anchors=integers(2, 2).int()), "anchors is torch.int32 .* accepted is torch.int64"),
    ("drafting_states", dict(accepted=integers(2, device=META)), "accepted is torch.int64 on meta"),
    ("drafting_states", dict(z=integers(7, 2, 4)), "z has dtype"),
    ("lookup_drafts", dict(tokens=17), "tokens is 17"),
    ("lookup_drafts", dict(match=0), "match is 0"),
    ("lookup_drafts", dict(match=2.0), "match is 2.0"),
    ("lookup_drafts", dict(text=integers(2)), "text has shape"),
    ("lookup_drafts", dict(text=integers(2, 0)), "S from 1"),
    ("lookup_drafts", dict(newest=integers(3)), "newest has shape"),
    ("lookup_drafts", dict(text=integers(2, 5).int()), "text is torch.int32 .* accepted is torch.int64"),
    ("lookup_drafts", dict(newest=integers(2, device=META)), "newest is torch.int64 on meta"),
    ("accept", dict(drafts=integers(3)), "drafts has shape"),
    ("accept", dict(predictions=integers(2, 3)), "predictions has shape"),
    ("accept", dict(counts=integers(3)), "counts has shape"),
    ("accept", dict(drafts=zeros(2, 3)), "drafts has dtype"),
    ("accept", dict(predictions=zeros(2, 4)), "predictions has dtype"),
    ("accept", dict(counts=zeros(2)), "counts has dtype"),
    ("accept", dict(drafts=integers(2, 3, device=META)), "drafts is on meta"),
    ("accept", dict(counts=integers(2, device=META)), "counts is on meta"),
]
for _op in ("sampler_hidden", "sampler_draft"):
    for _field in SamplerWeights._fields:
        CASES.append((_op, dict(weights=sampler(**{_field: zeros(5)})), rf"weights.{_field} has shape"))
    CASES.append((_op, dict(weights=sampler(b2=zeros(4, dtype=HALF))), "b2 .*bfloat16"))
    CASES.append((_op, dict(weights=sampler(w2=zeros(4, 4, device=META))), "w2 .* on meta"))


@pytest.mark.parametrize("name, changes, word", CASES)
def test_refused(name, changes, word):
    with pytest.raises(ValueError, match=word):
        getattr(mtp_kernels, name)(**valid(name) | changes)


def test_a_frozen_pass_may_hold_tensors_that_require_gradients():
    with torch.no_grad():
        mtp_kernels.rotary_write(**valid("rotary_write") | dict(qkv=zeros(3, 2, 8, 4).requires_grad_()))


def test_a_rule_that_served_is_checked_for_another_pass():
    arguments = valid("attention")
    mtp_kernels.attention(**arguments)
    with pytest.raises(ValueError, match="rule.visible has shape"):
        mtp_kernels.attention(**arguments | dict(q=zeros(6, 2, 4, 8)))
