"""What `bench.kernels` measures: per operation a suite, which yields cases with their competitors.

A new operation is one function from (model, settings, scope) to cases, and its line in SUITES.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import counts
from bench.cases import BASE, COMPILED, EAGER, FUSED, GATHER, LOSS, OURS, Case, Model, Provider, Scope, Setting, compiled, random_tensors
from bench.suite_attention import attention
from bench.suite_sampler import sampler_draft
from bench.suite_step import accept_and_commit, drafting_states, linear_argmax, linear_sample, lookup_drafts, norm_formula, rotary_formula, rotary_write
from bench.suite_training import latent_consistency, linear_cross_entropy
from mtp_kernels import ops, reference

SCALE = 2.0


# ---- gated LoRA


def _eager_parts(i: dict) -> list[Tensor]:
    """Base, adapter on all rows, times the gate (which holds the scale): as few kernels as eager PyTorch needs."""
    base, s = F.linear(i["x"], i["weight"]), F.linear(i["x"], i["lora_a"])
    parts = zip(base.split(i["splits"], -1), s.chunk(len(i["splits"]), -1), i["lora_b"].split(i["splits"]), strict=True)
    return [torch.addcmul(y, i["gate"], F.linear(shrunk, b)) for y, shrunk, b in parts]


def _gather_parts(i: dict) -> list[Tensor]:
    """The form of PEFT's activated LoRA, every projection by itself: rows picked by a boolean mask, which waits for the GPU."""
    x, mask, splits = i["x"], i["mask"], i["splits"]
    parts = []
    for w, a, b in zip(i["weight"].split(splits), i["lora_a"].chunk(len(splits)), i["lora_b"].split(splits), strict=True):
        y = F.linear(x, w)
        y[mask] += F.linear(F.linear(x[mask], a), b) * SCALE
        parts.append(y)
    return parts


def _silu_product(parts: list[Tensor]) -> Tensor:
    return F.silu(parts[0]) * parts[1]


def linear_eager(i: dict):
    return tuple(_eager_parts(i))


def linear_gather(i: dict):
    return tuple(_gather_parts(i))


def linear_base(i: dict):
    return F.linear(i["x"], i["weight"])


def linear_ours(i: dict):
    return ops.gated_lora_linear(
        i["x"], i["weight"], i["lora_a"], i["lora_b"], i["first_on"], scale=SCALE, splits=i["splits"], implementation="triton"
    )


def swiglu_eager(i: dict):
    return _silu_product(_eager_parts(i))


def swiglu_gather(i: dict):
    return _silu_product(_gather_parts(i))


def swiglu_base(i: dict):
    return reference.swiglu(linear_base(i))


def swiglu_ours(i: dict):
    return ops.gated_lora_swiglu(i["x"], i["weight"], i["lora_a"], i["lora_b"], i["first_on"], scale=SCALE, implementation="triton")


def _make_gated(k, splits, setting, rank, backward, features, device, dtype) -> dict:
    randn, m, n = random_tensors(device, dtype), setting.rows, sum(splits)
    mask = torch.arange(m, device=device) >= m - setting.on
    return dict(
        x=randn(m, k, grad=backward), weight=randn(n, k, scale=k**-0.5),
        lora_a=randn(len(splits) * rank, k, scale=k**-0.5, grad=backward), lora_b=randn(n, rank, scale=rank**-0.5, grad=backward),
        gate=(SCALE * mask.unsqueeze(1)).to(dtype), mask=mask, first_on=m - setting.on, splits=splits,
    ) | (dict(dy=randn(m, features)) if backward else {})  # fmt: skip


def gated_lora(operation: str, model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """Rank by rank; where every gate is off, at the largest rank alone. The base of SwiGLU has the SwiGLU behind it."""
    swiglu = operation == "gated_lora_swiglu"
    eager, gather, base, ours = (
        (swiglu_eager, swiglu_gather, swiglu_base, swiglu_ours) if swiglu else (linear_eager, linear_gather, linear_base, linear_ours)
    )
    providers = (
        Provider(EAGER, eager, eager), Provider(COMPILED, compiled(eager), eager), Provider(GATHER, gather, eager, captured=False),
        Provider(BASE, base, base, adapter=False), Provider(OURS, ours, eager),
    )  # fmt: skip
    ranks, settings = sorted(scope.ranks), [s for s in settings if s.mode != LOSS]
    for layer, (k, splits) in model.layers().items():
        if swiglu != (layer == "gate_up"):
            continue
        n = sum(splits)
        features = n // 2 if swiglu else n
        for s in settings:
            for rank in ranks if s.on else ranks[-1:]:
                for backward in (False, True) if s.train else (False,):
                    yield Case(
                        operation, model.name, layer, f"{k} -> {n}", s, rank, backward,
                        partial(_count_gated, s.rows, s.on, n, k, rank, len(splits), swiglu, backward),
                        partial(_make_gated, k, splits, s, rank, backward, features), providers, ("dy",), ("x", "lora_a", "lora_b"),
                        None if backward else partial(_plans, s.rows, s.on, n, k, rank, splits, swiglu),
                    )  # fmt: skip


def _count_gated(m, on, n, k, rank, groups, swiglu, backward, itemsize, adapter) -> counts.Count:
    return counts.gated_lora(m, on if adapter else 0, n, k, rank, groups, itemsize, swiglu, backward)


def _plans(m, on, n, k, rank, splits, swiglu, itemsize) -> list[counts.Plan]:
    return counts.plans(m, on, n, k, rank, splits, itemsize, swiglu)


# ---- norm, rotary, SwiGLU


def norm_eager(i: dict):
    return reference.rms_norm(i["x"], i["weight"], 1e-5, i["residual"])


def norm_plain(i: dict):
    total = i["x"] + i["residual"]
    return norm_eager(i) if total.dtype != torch.float64 else (norm_formula(total, i["weight"], 1e-5), total)


def norm_fused(i: dict):
    total = i["x"] + i["residual"]
    return F.rms_norm(total, i["weight"].shape, i["weight"], 1e-5), total


def norm_ours(i: dict):
    return ops.rms_norm(i["x"], i["weight"], 1e-5, i["residual"], implementation="triton")


def rotary_eager(i: dict):
    return reference.rotary_embedding(i["x"], i["cos"], i["sin"], i["norm"])


def rotary_plain(i: dict):
    return rotary_formula(i["x"], i["cos"], i["sin"], i["norm"])


def rotary_ours(i: dict):
    return ops.rotary_embedding(i["x"], i["cos"], i["sin"], i["norm"], implementation="triton")


def silu_eager(i: dict):
    return reference.swiglu(i["x"])


def silu_ours(i: dict):
    return ops.swiglu(i["x"], implementation="triton")


def _make_norm(m, d, backward, device, dtype) -> dict:
    randn = random_tensors(device, dtype)
    inputs = dict(x=randn(m, d, grad=backward), residual=randn(m, d, grad=backward), weight=randn(d))
    return inputs | (dict(dy=randn(m, d), dtotal=randn(m, d)) if backward else {})


def _make_rotary(m, heads, d, normed, backward, device, dtype) -> dict:
    randn = random_tensors(device, dtype)
    cos, sin = reference.rotary_tables(torch.arange(m, device=device), reference.rotary_frequencies(d).to(device), dtype)
    inputs = dict(x=randn(m, heads, d, grad=backward), cos=cos, sin=sin, norm=randn(heads, d) if normed else None)
    return inputs | (dict(dy=randn(m, heads, d)) if backward else {})


def _make_swiglu(m, f, backward, device, dtype) -> dict:
    randn = random_tensors(device, dtype)
    return dict(x=randn(m, 2 * f, grad=backward)) | (dict(dy=randn(m, f)) if backward else {})


def row_wise(operation: str, model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """The operations without weights to speak of: only the number of rows counts."""
    d, f, heads = model.hidden, model.intermediate, model.heads + model.kv_heads
    eager, plain, ours, shape, make, count, upstream, leaves = {
        "rms_norm": (norm_eager, norm_plain, norm_ours, f"{d}, with residual", partial(_make_norm, d=d), partial(counts.rms_norm, n=d),
                     ("dy", "dtotal"), ("x", "residual")),
        "rotary_embedding": (rotary_eager, rotary_plain, rotary_ours, f"{heads} x {model.head_dim}{', normed' if model.qk_norm else ''}",
                             partial(_make_rotary, heads=heads, d=model.head_dim, normed=model.qk_norm),
                             partial(counts.rotary_embedding, heads=heads, d=model.head_dim, normed=model.qk_norm), ("dy",), ("x",)),
        "swiglu": (silu_eager, silu_eager, silu_ours, f"2 x {f}", partial(_make_swiglu, f=f), partial(counts.swiglu, f=f), ("dy",), ("x",)),
    }[operation]  # fmt: skip
    providers = [Provider(EAGER, eager, plain), Provider(COMPILED, compiled(eager), plain), Provider(OURS, ours, plain)]
    if operation == "rms_norm":
        providers.insert(2, Provider(FUSED, norm_fused, plain))
    settings = [s for s in settings if s.mode != LOSS]
    trained = {s.rows for s in settings if s.train}
    for m in sorted({s.rows for s in settings}):
        for backward in (False, True) if m in trained else (False,):

            def tensors(device, dtype, m=m, backward=backward):
                return make(m=m, backward=backward, device=device, dtype=dtype)

            def counted(itemsize, adapter, m=m, backward=backward):
                return count(m=m, itemsize=itemsize, backward=backward)

            yield Case(
                operation, model.name, operation, shape, Setting("rows", m, 0, m in trained), 0, backward, counted, tensors,
                tuple(providers), upstream, leaves,
            )  # fmt: skip


Suite = Callable[[Model, Iterable[Setting], Scope], Iterator[Case]]
SUITES: dict[str, Suite] = {
    **{name: partial(gated_lora, name) for name in ("gated_lora_linear", "gated_lora_swiglu")},
    **{name: partial(row_wise, name) for name in ("rms_norm", "rotary_embedding", "swiglu")},
    "attention": attention,
    "rotary_write": rotary_write,
    "linear_argmax": linear_argmax,
    "linear_sample": linear_sample,
    "accept_and_commit": accept_and_commit,
    "drafting_states": drafting_states,
    "lookup_drafts": lookup_drafts,
    "sampler_draft": sampler_draft,
    "latent_consistency": latent_consistency,
    "linear_cross_entropy": linear_cross_entropy,
}
