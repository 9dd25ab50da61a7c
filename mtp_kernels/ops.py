"""The contract: what each operation computes, on which shapes and dtypes, and how it fails.

Every function checks its arguments and raises ValueError saying what was passed and what is accepted, then calls an
implementation: `reference` (plain PyTorch, any device) or `triton` (fused kernels on a GPU; on a CPU only in Triton's
interpreter). The default is Triton for tensors on a GPU where Triton is installed and has the operation, else the
reference. `implementation=` names one explicitly, and raises ValueError if that one cannot run.

Dimensions: T rows of each of B sequences (NTP rows first, masks after), H query heads, H_kv key heads (H a multiple of
H_kv), D head size, S columns of the K/V cache, d hidden size, V vocabulary, R LoRA rank, k masks per block.
Floating dtypes: float32, float16, bfloat16; all floating arguments of a call share one dtype and one device.
"""

import torch
from torch import Tensor

from mtp_kernels import _sampling, reference
from mtp_kernels._checks import check_exactly, check_floating, check_integer, check_shape, shape_of
from mtp_kernels._choice import choose
from mtp_kernels._choice import unchecked as unchecked
from mtp_kernels.types import AttentionRule, SamplerWeights, Sampling

MAX_RANK = 512
ROPE_TYPES = {  # and what each needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _check_gated_lora(x, weight, lora_a, lora_b, gate, splits, bias) -> None:
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or not x.shape[-1]:
        raise ValueError(f"x has shape {shape_of(x)} and weight {shape_of(weight)}; accepted are x (..., K) and weight (N, K), K from 1")
    n, k = weight.shape
    check_floating("x weight lora_a lora_b bias", x, weight, lora_a, lora_b, bias)
    if bias is not None:
        check_shape("bias", bias, (n,), "(N,)")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("one of lora_a and lora_b is None; accepted are both or neither")
    if gate is not None and lora_a is None:
        raise ValueError("a gate was passed without lora_a and lora_b; accepted is a gate together with an adapter")
    if lora_a is not None:
        groups = 1 if splits is None else len(splits)
        if splits is not None and (sum(splits) != n or min(splits, default=0) < 1):
            raise ValueError(f"splits is {splits}; accepted are positive sizes that add up to N = {n}")
        rank = lora_b.shape[-1] if lora_b.ndim == 2 else 0
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"lora_b has shape {shape_of(lora_b)}; accepted is (N, R) with R from 1 to {MAX_RANK}")
        check_shape("lora_b", lora_b, (n, rank), "(N, R)")
        check_shape("lora_a", lora_a, (groups * rank, k), "(G * R, K)")
    if isinstance(gate, Tensor):
        number = gate.numel() == 1 and gate.dtype in (torch.int32, torch.int64)
        if gate.device != x.device or not number and (gate.dtype != torch.bool or gate.shape != x.shape[:-1]):
            raise ValueError(
                f"gate has shape {shape_of(gate)}, dtype {gate.dtype} on {gate.device}; accepted are a boolean tensor of "
                f"x's leading shape {shape_of(x)[:-1]} or one integer, on {x.device}, an int, or None"
            )
    elif gate is not None:
        rows = x.numel() // k
        if isinstance(gate, bool) or not isinstance(gate, int) or not 0 <= gate <= rows:
            raise ValueError(f"gate is {gate!r}; accepted is an int from 0 to the number of rows ({rows}), a tensor, or None")


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    gate: int | Tensor | None = None,
    *,
    scale: float = 1.0,
    splits: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """y = x W^T (+ b) (+ residual) + gate * scale * (x A^T) B^T (arXiv 2507.11851, section 2.2).

    A row whose gate is off *skips* the adapter: its bits are those of the layer without one. Row independence: a row's
    bits do not depend on the other rows, nor on how many there are. The Triton kernels keep this for any number of rows
    that they are given; the reference where `mtp_kernels.reference` says so.

    x: (..., K). weight: (N, K). bias: (N,). residual: (..., N). Returns (..., N).
    splits: sizes (N_1, ..., N_G) of G projections stacked in `weight`, each with an adapter of its own; default (N,).
    lora_a: (G * R, K), the projections' A one below the other. lora_b: (N, R), likewise. R from 1 to 512.
    gate: None: off everywhere. int m: with the leading dimensions flattened, rows [0, m) are off and rows [m, M) on. One
        integer on x's device: the same m, read by the kernel. Boolean tensor of x's leading shape: on where True.

    Differentiable in x, weight, lora_a, lora_b, bias, residual. Raises ValueError for shapes, dtypes, devices, ranks or
    gates other than these.
    """
    compute = choose(implementation, "gated_lora_linear", x.device)
    _check_gated_lora(x, weight, lora_a, lora_b, gate, splits, bias)
    if residual is not None:
        check_floating("x residual", x, residual)
        check_shape("residual", residual, (*x.shape[:-1], weight.shape[0]), "x's leading shape with N")
    return compute(
        x, weight, lora_a, lora_b, gate, scale=scale, splits=splits, bias=bias, residual=residual
    )  # fmt: skip


def gated_lora_swiglu(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    gate: int | Tensor | None = None,
    *,
    scale: float = 1.0,
    splits: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """silu(g) * u for [g, u] = gated_lora_linear(x, weight, ...), two projections of F features stacked in `weight`.

    x: (..., K). weight: (2 F, K). bias: (2 F,). lora_a, lora_b, gate, scale, splits: see `gated_lora_linear`; splits is by
    default (F, F), an adapter for each projection. Returns (..., F). Differentiable in x, weight, lora_a, lora_b, bias.
    Raises ValueError for other shapes, dtypes, devices, ranks or gates.
    """
    compute = choose(implementation, "gated_lora_swiglu", x.device)
    if weight.ndim != 2 or weight.shape[0] % 2:
        raise ValueError(f"weight has shape {shape_of(weight)}; accepted is (2 F, K)")
    splits = (weight.shape[0] // 2,) * 2 if splits is None else splits
    _check_gated_lora(x, weight, lora_a, lora_b, gate, splits, bias)
    return compute(x, weight, lora_a, lora_b, gate, scale=scale, splits=splits, bias=bias)


def _check_rule(rule: AttentionRule, t: int, b: int, device: torch.device) -> None:
    check_shape("rule.visible", rule.visible, (t, b), "(T, B)")
    check_shape("rule.block", rule.block, (t,), "(T,)")
    check_shape("rule.slot", rule.slot, (t,), "(T,)")
    check_shape("rule.mask_start", rule.mask_start, (b,), "(B,)")
    if rule.first is not None:
        check_shape("rule.first", rule.first, (t, b), "(T, B)")
        check_integer("rule.first", rule.first, device)
    for name in ("visible", "block", "slot", "mask_start"):
        check_integer(f"rule.{name}", getattr(rule, name), device)
    if not 0 <= rule.num_masks <= t:
        raise ValueError(f"rule.num_masks is {rule.num_masks}; accepted is 0 to T = {t}")
    if rule.causal and (rule.num_masks or rule.first is not None or rule.num_keys < t):
        first = "no first" if rule.first is None else "a first"
        raise ValueError(
            f"rule.causal is set with num_masks {rule.num_masks}, {first} and num_keys {rule.num_keys}; accepted are 0, no first and T = {t} or more"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: AttentionRule,
    *,
    scale: float | None = None,
    ntp_key_gradients: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """softmax(scale * q K^T) V over the keys that `rule` allows each row (arXiv 2507.11851, Fig. 4).

    q: (T, B, H, D), NTP rows first, then the rule's masks. k, v: (B, H_kv, S, D): column i holds the key of NTP token
    i, columns `rule.mask_start[b] + j` the keys of this pass's mask rows. scale: default D ** -0.5. Returns (T, B, H, D).
    Query head h reads key head h // (H / H_kv). Softmax and sums are in float32. Every row must be allowed a key.
    ntp_key_gradients: False: the gradients of k and v are left zero at NTP columns, for a caller whose NTP keys come from
        a frozen pass.

    Differentiable in q, k, v. Raises ValueError for shapes, dtypes or devices other than these; the *values* in the rule
    are not checked.
    """
    compute = choose(implementation, "attention", q.device)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q has shape {shape_of(q)} and k {shape_of(k)}; accepted are q (T, B, H, D) and k (B, H_kv, S, D)")
    t, b, h, d = q.shape
    check_shape("k", k, (b, k.shape[1], k.shape[2], d), "(B, H_kv, S, D)")
    check_shape("v", v, tuple(k.shape), "k's shape")
    if not k.shape[1] or h % k.shape[1]:
        raise ValueError(f"q has {h} heads and k {k.shape[1]}; accepted is a number of query heads that is a multiple of the key heads")
    check_floating("q k v", q, k, v)
    if rule._cache.get("checked") != (t, b, q.device):  # a rule serves every layer of a pass
        _check_rule(rule, t, b, q.device)
        rule._cache["checked"] = (t, b, q.device)
    if not 1 <= rule.num_keys <= k.shape[2]:
        raise ValueError(f"rule.num_keys is {rule.num_keys}; accepted is 1 to S = {k.shape[2]}")
    return compute(q, k, v, rule, scale=scale, ntp_key_gradients=ntp_key_gradients)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, *, implementation: str | None = None
):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; with `residual`, x is `x + residual` throughout.

    x, residual: (..., d). weight: (d,). Returns y (..., d), or the pair (y, x + residual) when a residual is passed.
    The mean is taken in float32. Differentiable in x, weight, residual. Raises ValueError for other shapes, dtypes, devices.
    """
    compute = choose(implementation, "rms_norm", x.device)
    check_shape("weight", weight, tuple(x.shape[-1:]), "(d,), x's last dimension,")
    check_floating("x weight residual", x, weight, residual)
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), "x's shape")
    return compute(x, weight, eps, residual)


def rotary_frequencies(head_dim: int, theta: float = 10000.0, scaling: dict | None = None) -> Tensor:
    """Rotary frequencies, (D / 2,) float32: theta ** (-2 i / D), then scaled (Su et al. 2021; Llama 3.1 for "llama3"; Peng et al. 2023,
    arXiv 2309.00071, for "yarn").

    scaling: None or a Hugging Face `rope_scaling` / `rope_parameters` dict whose `rope_type` is "default", "linear" (needs `factor`), "llama3"
    (needs `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`) or "yarn" (needs `factor`,
    `original_max_position_embeddings`, and heeds `beta_fast`, `beta_slow`, `truncate`; its tables are larger, see `rotary_scale`).
    Raises ValueError for an odd head size, another type, or a missing key.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; accepted is a positive even number")
    _check_rope(scaling)
    return reference.rotary_frequencies(head_dim, theta, scaling)


def _check_rope(scaling: dict | None) -> None:
    kind = reference.rope_type(scaling)
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type is {kind!r}; accepted are {', '.join(ROPE_TYPES)}")
    missing = [key for key in ROPE_TYPES[kind] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)}; passed were {sorted(scaling)}")


def rotary_scale(scaling: dict | None = None) -> float:
    """What the tables of this `scaling` (see `rotary_frequencies`) are multiplied by: 1, but for "yarn" its `attention_factor`, or what
    follows from `factor`, `mscale` and `mscale_all_dim`, by default 0.1 ln(factor) + 1. Raises ValueError for another type, or a missing key."""
    _check_rope(scaling)
    return reference.rotary_scale(scaling)


def rotary_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The factors of `rotary_embedding`: c = scale [cos a, cos a] and s = scale [-sin a, sin a], a = position * frequency.

    positions: (...) integer. frequencies: (D / 2,) float32. scale: see `rotary_scale`. Returns two (..., D), computed in float32, in `dtype`.
    Raises ValueError for positions that are no integers or elsewhere, and for frequencies of another shape.
    """
    check_integer("positions", positions, frequencies.device)
    if frequencies.ndim != 1:
        raise ValueError(f"frequencies has shape {shape_of(frequencies)}; accepted is (D / 2,)")
    return reference.rotary_tables(positions, frequencies, dtype, scale)


def _check_norm(norm: Tensor | None, heads: int, d: int, form: str) -> None:
    if norm is None:
        return
    check_shape("norm", norm, (heads, d), form)
    if torch.is_grad_enabled() and norm.requires_grad:
        raise ValueError("norm requires gradients; accepted is a tensor that does not, or any under torch.no_grad()")


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 1e-6, *, implementation: str | None = None
) -> Tensor:
    """Rotate each head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of D (Llama's layout).

    x: (..., H, D). cos, sin: (..., D), see `rotary_tables` (sin's first half is negated, so y = x cos + swap(x) sin).
    norm: (H, D), constant: before that each head x_h becomes x_h / sqrt(mean(x_h^2) + eps) * norm[h], with a weight for each
        head (q's and k's in Qwen 3, arXiv 2505.09388; Henry et al. 2020, arXiv 2010.04245). eps counts for nothing without it.
    Returns x's shape. Differentiable in x. Raises ValueError for other shapes, dtypes or devices, and for a norm that requires gradients.
    """
    compute = choose(implementation, "rotary_embedding", x.device)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {shape_of(x)}; accepted is (..., H, D) with even D")
    expected = (*x.shape[:-2], x.shape[-1])
    check_shape("cos", cos, expected, "(..., D)")
    check_shape("sin", sin, expected, "(..., D)")
    _check_norm(norm, *x.shape[-2:], "(H, D)")
    check_floating("x cos sin norm", x, cos, sin, norm)
    return compute(x, cos, sin, norm, eps)


def rotary_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Rotate q and k of a fused projection's result (see `rotary_embedding`), write k and v into a cache *in place*, return q.

    qkv: (T, B, H + 2 H_kv, D), heads of q, then k, then v. cos, sin: (T, B, D). keys, values: (S, B, H_kv, D), one layer's cache by
    column, of unit stride along D. start: (B,) integer: row t of sequence b goes to column start[b] + t. norm: (H + H_kv, D), for q's
    heads and k's, and eps: see `rotary_embedding`. Returns (T, B, H, D), contiguous; a rotated row has the bits that `rotary_embedding` gives it.

    A number that is not finite, as float16 overflows to, is written as zero: a row that may not attend a column still multiplies it by a
    probability of 0, and 0 * NaN is NaN.

    start is read where it lies, without waiting for the device, so that its values are not checked: the caller guarantees that
    0 <= start[b] and start[b] + T <= S. The Triton kernel leaves other columns' rows out, the reference raises IndexError past the end.
    Not differentiable. Raises ValueError for other shapes, dtypes, devices or strides, and for arguments that require gradients.
    """
    compute = choose(implementation, "rotary_write", qkv.device)
    if qkv.ndim != 4 or keys.ndim != 4 or not 0 < 2 * keys.shape[2] < qkv.shape[2] or qkv.shape[3] % 2:
        raise ValueError(
            f"qkv has shape {shape_of(qkv)} and keys {shape_of(keys)}; accepted are (T, B, H + 2 H_kv, D) and (S, B, H_kv, D) with even D"
        )
    t, b, _, d = qkv.shape
    check_shape("keys", keys, (keys.shape[0], b, keys.shape[2], d), "(S, B, H_kv, D)")
    check_shape("values", values, tuple(keys.shape), "keys' shape")
    check_shape("cos", cos, (t, b, d), "(T, B, D)")
    check_shape("sin", sin, (t, b, d), "(T, B, D)")
    check_shape("start", start, (b,), "(B,)")
    _check_norm(norm, qkv.shape[2] - keys.shape[2], d, "(H + H_kv, D)")
    check_floating("qkv cos sin keys values norm", qkv, cos, sin, keys, values, norm)
    check_integer("start", start, qkv.device)
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.stride(3) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(3)} along D; accepted is 1")
    if torch.is_grad_enabled() and (qkv.requires_grad or keys.requires_grad or values.requires_grad):
        raise ValueError("qkv, keys or values requires gradients; accepted are tensors that do not, or any under torch.no_grad()")
    return compute(qkv, cos, sin, keys, values, start, norm, eps)


def swiglu(x: Tensor, *, implementation: str | None = None) -> Tensor:
    """silu(g) * u for x = [g, u] side by side (Shazeer 2020).

    x: (..., 2 F). Returns (..., F). Differentiable in x. Raises ValueError for an odd last dimension or another dtype.
    """
    compute = choose(implementation, "swiglu", x.device)
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {shape_of(x)}; accepted is (..., 2 F)")
    check_floating("x", x)
    return compute(x)


_SAMPLER_NAMES = " ".join(f"weights.{name}" for name in SamplerWeights._fields)


def _check_sampler(weights: SamplerWeights, d: int) -> None:
    for name, tensor, expected in zip(
        SamplerWeights._fields, weights, ((d, 2 * d), (d,), (d,), (d,), (d, d), (d,), (d,), (d,)), strict=True
    ):
        check_shape(f"weights.{name}", tensor, expected, "its shape for this d")


def sampler_hidden(
    previous: Tensor, z: Tensor, weights: SamplerWeights, *, implementation: str | None = None
) -> Tensor:
    """LN(silu(W2 LN(silu(W1 [previous; z] + b1)) + b2)) (arXiv 2507.11851, section 2.3).

    previous: (..., d), input embedding of the token before the predicted one. z: (..., d), the row's hidden state after
    the final norm. Returns (..., d); its product with lm_head are the sampler's logits. Differentiable in everything.
    Raises ValueError for other shapes, dtypes or devices.
    """
    compute = choose(implementation, "sampler_hidden", z.device)
    check_shape("previous", previous, tuple(z.shape), "z's shape")
    _check_sampler(weights, z.shape[-1])
    check_floating("z previous " + _SAMPLER_NAMES, z, previous, *weights)
    return compute(previous, z, weights)


def sampler_draft(
    z: Tensor,
    first: Tensor,
    embedding: Tensor,
    weights: SamplerWeights,
    lm_head: Tensor,
    *,
    candidates: int | Tensor | None = None,
    keys: Tensor | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> Tensor:
    """Draft k tokens: token_0 = first; token_i = argmax(W_lm[C_i] sampler_hidden(E[token_{i-1}], z_i)), i = 1..k.

    C_i, the tokens that mask i may become, is the vocabulary; or, given a number of candidates, that many tokens with the
    highest logits W_lm z_i (of equal ones at the end of the list any). One product finds all k lists, and the k steps, one after
    another, then read `candidates` rows of lm_head each instead of all of it. Drafts need not be exact: they are verified. The lists
    themselves may be given too, where the logits W_lm z_i are known already.

    z: (B, k, d), hidden states of one block's masks. first: (B,) integer, the verified token before them.
    embedding, lm_head: (V, d). candidates: 1 to V; V is the vocabulary, as is None; or (B, k, C) int64, C from 1, tokens' ids in any order.
    keys: (B, k) int64, of the drafts' positions: draft for text that `linear_sample` draws, by temperature times the same noise on the
        logits. Where sampler and model agree they then draw the same token (Daliri, Musco and Suresh 2024, arXiv 2408.07978).
    Returns (B, k) int64; the lowest id wins a tie. Not differentiable. Raises ValueError for other shapes, dtypes, devices,
    candidates or temperatures.
    """
    compute = choose(implementation, "sampler_draft", z.device)
    if z.ndim != 3:
        raise ValueError(f"z has shape {shape_of(z)}; accepted is (B, k, d)")
    b, _, d = z.shape
    check_shape("first", first, (b,), "(B,)")
    check_integer("first", first, z.device)
    check_shape("embedding", embedding, (embedding.shape[0], d), "(V, d)")
    check_shape("lm_head", lm_head, (lm_head.shape[0], d), "(V, d)")
    _check_sampler(weights, d)
    check_floating("z embedding lm_head " + _SAMPLER_NAMES, z, embedding, lm_head, *weights)
    if isinstance(candidates, Tensor):
        if candidates.ndim != 3 or candidates.shape[:2] != z.shape[:2] or not candidates.shape[2]:
            raise ValueError(f"candidates has shape {shape_of(candidates)}; accepted is (B, k, C) = ({b}, {z.shape[1]}, C) with C from 1")
        check_exactly("candidates", candidates, torch.int64, z.device)
    elif candidates is not None and (type(candidates) is not int or not 1 <= candidates <= lm_head.shape[0]):
        raise ValueError(f"candidates is {candidates!r}; accepted are an int from 1 to V = {lm_head.shape[0]}, or None")
    if keys is not None:
        _check_keys(keys, tuple(z.shape[:2]), z.device)
        temperature = Sampling(temperature).temperature
    return compute(z, first, embedding, weights, lm_head, candidates=candidates, keys=keys, temperature=temperature)


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None = None,
    soft: float = 1.0,
    ignore_index: int = -100,
    chunk: int = 2048,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy -sum_v q_v log p_v of p = softmax(hidden W_lm^T), `chunk` rows of logits alive at a time, in the backward too.

    q is onehot(label); or, given a teacher, (1 - soft) * onehot(label) + soft * softmax(teacher W_lm^T): distillation (Hinton et
    al. 2015, arXiv 1503.02531) from the frozen model, whose states come free from the pass that fills the cache.

    hidden: (..., d). lm_head: (V, d). teacher: hidden's shape, constant. soft: 0 to 1.
    labels: (...) int64, `ignore_index` where a row has none (loss and gradient are 0), else 0 to V - 1; *values* are not checked.
    Returns (loss, guess): loss (...) float32 per row; guess (...) int64, the most likely token (lowest id on a tie).

    Differentiable, once, in hidden and lm_head. The forward of a hidden that requires a gradient also makes its rows' gradients, in
    hidden's dtype, so that the backward makes no logits; a gradient of lm_head makes them again. Raises ValueError for other
    shapes, dtypes, devices, a soft outside 0 to 1 or a chunk below 1.
    """
    compute = choose(implementation, "linear_cross_entropy", hidden.device)
    if lm_head.ndim != 2 or hidden.shape[-1:] != lm_head.shape[1:]:
        raise ValueError(f"hidden has shape {shape_of(hidden)} and lm_head {shape_of(lm_head)}; accepted are (..., d) and (V, d)")
    check_shape("labels", labels, tuple(hidden.shape[:-1]), "hidden's leading shape")
    if labels.dtype != torch.int64 or labels.device != hidden.device:
        raise ValueError(f"labels are {labels.dtype} on {labels.device}; accepted is torch.int64 on {hidden.device}")
    check_floating("hidden lm_head teacher", hidden, lm_head, teacher)
    if teacher is not None:
        check_shape("teacher", teacher, shape_of(hidden), "hidden's shape")
    if not 0 <= soft <= 1:
        raise ValueError(f"soft is {soft}; accepted is 0 to 1")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; accepted is 1 or more")
    return compute(hidden, lm_head, labels, teacher=teacher, soft=soft, ignore_index=ignore_index, chunk=chunk)


def latent_consistency(z: Tensor, target: Tensor, index: Tensor, weight: Tensor, *, implementation: str | None = None) -> Tensor:
    """sum_m weight_m * mean over d of (z_m - target_{index_m})^2: masks' states drawn to those of ordinary rows (arXiv 2507.11851, section 2.5).

    z: (M, d), d at least 1. target: (N, d), constant. index: (M,) int64, 0 to N - 1; its *values* are not checked.
    weight: (M,) float32, constant; where it is 0, z may be any finite number. Returns one float32 number.
    Differentiable, in z alone. Raises ValueError for other shapes, dtypes or devices.
    """
    compute = choose(implementation, "latent_consistency", z.device)
    if z.ndim != 2 or target.ndim != 2 or not z.shape[1] or z.shape[1] != target.shape[1]:
        raise ValueError(f"z has shape {shape_of(z)} and target {shape_of(target)}; accepted are (M, d) and (N, d) with d of 1 or more")
    check_floating("z target", z, target)
    for name, tensor, dtype in (("index", index, torch.int64), ("weight", weight, torch.float32)):
        check_shape(name, tensor, (z.shape[0],), "(M,)")
        if tensor.dtype != dtype or tensor.device != z.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; accepted is {dtype} on {z.device}")
    return compute(z, target, index, weight)


def _check_vocabulary(hidden: Tensor, weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.shape[0] or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {shape_of(hidden)} and weight {shape_of(weight)}; accepted are (..., d) and (V, d) with V from 1")
    check_floating("hidden weight", hidden, weight)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim < 1 or not logits.shape[-1]:
        raise ValueError(f"logits has shape {shape_of(logits)}; accepted is (..., V) with V from 1")
    check_floating("logits", logits)


def argmax(logits: Tensor, *, implementation: str | None = None) -> Tensor:
    """argmax over v of logits_v, the lowest id on a tie: greedy tokens.

    logits: (..., V). Returns (...) int64. They are compared in their dtype; a row with a NaN among them gets some id from 0 to V - 1.
    Not differentiable. Raises ValueError for other shapes or dtypes, and for an empty vocabulary.
    """
    compute = choose(implementation, "argmax", logits.device)
    _check_logits(logits)
    return compute(logits)


def linear_argmax(hidden: Tensor, weight: Tensor, *, implementation: str | None = None) -> Tensor:
    """`argmax` of the logits hidden W^T, the lowest id on a tie: greedy tokens.

    hidden: (..., d). weight: (V, d). Returns (...) int64. The logits are those of `gated_lora_linear` without an adapter,
    so a row's id does not depend on the rows beside it. A row with a NaN among its logits gets some id from 0 to V - 1.
    Not differentiable. Raises ValueError for other shapes, dtypes or devices, and for an empty vocabulary.
    """
    compute = choose(implementation, "linear_argmax", hidden.device)
    _check_vocabulary(hidden, weight)
    return compute(hidden, weight)


def sampling_keys(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Keys of the noise by which tokens are drawn: one for each seed and each position in a text, any shapes that broadcast together, int64.

    The noise of a key are vocab_size outputs of SplitMix64, those from number position * vocab_size of the generator begun at the seed.
    Raises ValueError for tensors that are not int64, or on different devices, and for a vocabulary below 1.
    """
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        check_exactly(name, tensor, torch.int64, seeds.device)
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; accepted is 1 or more")
    return _sampling.sampling_keys(seeds, positions, vocab_size)


def _check_keys(keys: Tensor, expected: tuple[int, ...], device: torch.device) -> None:
    check_shape("keys", keys, expected, "a key for each token")
    check_exactly("keys", keys, torch.int64, device)


def _check_sampling(sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling is {sampling!r}; accepted is a Sampling")


def sample(logits: Tensor, keys: Tensor, sampling: Sampling, *, implementation: str | None = None) -> Tensor:
    """argmax over v of l_v + temperature * G_v(key), l = logits: tokens drawn from softmax(l / temperature) (Gumbel 1954).

    Left out are tokens that top_k, top_p and min_p leave out. G is standard Gumbel noise, made of the key and of v alone, so that a token
    follows from its logits and its key, whatever was drawn before, elsewhere or in which order: drawn text can be verified as
    greedy text can, and is the same for any drafts (Daliri, Musco and Suresh 2024, arXiv 2408.07978).

    logits: (..., V). keys: (...) int64, see `sampling_keys`. Returns (...) int64. Ties and NaN as in `argmax`; noise and comparison in float32.
    Not differentiable. Raises ValueError for other shapes, dtypes or devices.
    """
    compute = choose(implementation, "sample", logits.device)
    _check_logits(logits)
    _check_keys(keys, tuple(logits.shape[:-1]), logits.device)
    _check_sampling(sampling)
    return compute(logits, keys, sampling)


def linear_sample(hidden: Tensor, weight: Tensor, keys: Tensor, sampling: Sampling, *, implementation: str | None = None) -> Tensor:
    """`sample` of the logits hidden W^T.

    hidden: (..., d). weight: (V, d). keys: (...) int64, see `sampling_keys`. Returns (...) int64. Logits and row independence as in
    `linear_argmax`. Not differentiable. Raises ValueError for other shapes, dtypes or devices.
    """
    compute = choose(implementation, "linear_sample", hidden.device)
    _check_vocabulary(hidden, weight)
    _check_keys(keys, tuple(hidden.shape[:-1]), hidden.device)
    _check_sampling(sampling)
    return compute(hidden, weight, keys, sampling)


def accept(
    drafts: Tensor, predictions: Tensor, counts: Tensor | None = None, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The longest prefix of the drafts that the model itself would have written, and the token it writes next.

    drafts: (B, k) integer, d_1..d_k. predictions: (B, k + 1) integer, y_0..y_k: what the model writes after the last
    verified token and after each draft. counts: (B,) integer, how many of a sequence's drafts are real; default all.
    Returns (a, next), (B,) each: a = the largest count such that d_i == y_{i-1} for *all* i <= a (a match after a
    mismatch counts for nothing), next = y_a. Raises ValueError for other shapes or dtypes.
    """
    compute = choose(implementation, "accept", drafts.device)
    if drafts.ndim != 2:
        raise ValueError(f"drafts has shape {shape_of(drafts)}; accepted is (B, k)")
    b, k = drafts.shape
    check_shape("predictions", predictions, (b, k + 1), "(B, k + 1)")
    check_integer("drafts", drafts, predictions.device)
    check_integer("predictions", predictions, drafts.device)
    if counts is not None:
        check_shape("counts", counts, (b,), "(B,)")
        check_integer("counts", counts, drafts.device)
    return compute(drafts, predictions, counts)


def accept_and_commit(
    drafts: Tensor,
    predictions: Tensor,
    counts: Tensor,
    lengths: Tensor,
    room: Tensor,
    finished: Tensor,
    eos: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`accept`, and what follows for the state of each sequence, *in place* and without the host: one launch for the batch.

    A sequence writes y_0..y_a, cut behind the first of them that is in eos and at `room` tokens; a finished one writes nothing.
    room -= what it wrote. finished becomes true with an end-of-text, or without room. lengths += a + 1 if it is not finished.

    drafts, predictions, counts: see `accept`, int64. lengths, room: (B,) int64, committed tokens in the cache, and how many
    may still be written (1 or more, 0 for a finished sequence). finished: (B,) bool. These three are contiguous. eos: (E,) int64, E may be 0.
    Returns (a, next, written), (B,) int64 each, a and next as `accept` has them. Raises ValueError for other shapes, dtypes or strides.
    """
    compute = choose(implementation, "accept_and_commit", drafts.device)
    if drafts.ndim != 2:
        raise ValueError(f"drafts has shape {shape_of(drafts)}; accepted is (B, k)")
    b, k = drafts.shape
    check_shape("predictions", predictions, (b, k + 1), "(B, k + 1)")
    if eos.ndim != 1:
        raise ValueError(f"eos has shape {shape_of(eos)}; accepted is (E,)")
    each = {"counts": counts, "lengths": lengths, "room": room, "finished": finished}
    for name, tensor in each.items():
        check_shape(name, tensor, (b,), "(B,)")
        if name != "counts" and not tensor.is_contiguous():
            raise ValueError(f"{name} has stride {tensor.stride(0)}; accepted is contiguous memory, for it is written in place")
    for name, tensor in (each | {"drafts": drafts, "predictions": predictions, "eos": eos}).items():
        check_exactly(name, tensor, torch.bool if name == "finished" else torch.int64, drafts.device)
    return compute(drafts, predictions, counts, lengths, room, finished, eos)


def drafting_states(
    z: Tensor, anchors: Tensor, accepted: Tensor, k: int, without: Tensor | None = None, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The states of the first block of masks that stands behind each sequence's last accepted row, from which the next drafts are made.

    z: (T, B, d), T = N + A k: N rows of tokens, then A blocks of k masks. anchors: (A, B) int64, the row that each block stands behind, in any
    order. accepted: (B,) int64. without: (B,) bool, sequences that are to have no drafts; default none.
    Returns (states (B, k, d), counts (B,) int64): counts is k, or 0 where no block stands behind the row or none is wanted, and the
    states are then those of some block. Not differentiable. Raises ValueError for other shapes, dtypes or devices, and for a z that requires gradients.
    """
    compute = choose(implementation, "drafting_states", z.device)
    check_floating("z", z)
    if torch.is_grad_enabled() and z.requires_grad:
        raise ValueError("z requires gradients; accepted is a tensor that does not, or any under torch.no_grad()")
    if type(k) is not int or k < 1:
        raise ValueError(f"k is {k!r}; accepted is an int from 1")
    fits = z.ndim == 3 and anchors.ndim == 2 and anchors.shape[1] == z.shape[1] and z.shape[0] >= anchors.shape[0] * k
    if not fits or not anchors.shape[0] or not z.shape[2]:
        raise ValueError(f"z has shape {shape_of(z)} and anchors {shape_of(anchors)}; accepted are (N + A k, B, d) and (A, B), A and d from 1, k = {k}")
    each = {"anchors": anchors, "accepted": accepted} | ({} if without is None else {"without": without})
    for name, tensor in each.items():
        if name != "anchors":
            check_shape(name, tensor, (z.shape[1],), "(B,)")
        check_exactly(name, tensor, torch.bool if name == "without" else torch.int64, z.device)
    return compute(z, anchors, accepted, k, without)


def lookup_drafts(text: Tensor, newest: Tensor, tokens: int, match: int = 2, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Drafts copied from each text itself: what followed the last place at which its newest `match` tokens stood before (Saxena 2023).

    text: (B, S) int64, tokens at their positions. newest: (B,) int64, the position of each text's newest token, 0 to S - 1 (not checked, for it is
    read where it lies); what stands behind it is not looked at. tokens, match: 1 to 16. Returns (drafts (B, tokens) int64, found (B,) bool).
    A copy that comes to the newest token goes on where it began, for a text that repeats itself with this period. Where nothing was found the
    drafts are some tokens of the text.
    Raises ValueError for other shapes, dtypes, devices or numbers.
    """
    compute = choose(implementation, "lookup_drafts", text.device)
    for name, value in (("tokens", tokens), ("match", match)):
        if type(value) is not int or not 1 <= value <= 16:
            raise ValueError(f"{name} is {value!r}; accepted are 1 to 16")
    if text.ndim != 2 or not text.shape[1]:
        raise ValueError(f"text has shape {shape_of(text)}; accepted is (B, S) with S from 1")
    check_shape("newest", newest, (text.shape[0],), "(B,)")
    for name, tensor in (("text", text), ("newest", newest)):
        check_exactly(name, tensor, torch.int64, text.device)
    return compute(text, newest, tokens, match)
