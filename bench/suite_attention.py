"""Attention's suite: decoding steps over a cache, and training's mask rows, as `mtp_model.layout` makes them."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import counts
from bench.cases import FLEX, OURS, SDPA, Case, Model, Provider, Scope, Setting, random_tensors
from mtp_kernels import AttentionRule, ops, reference
from mtp_model.layout import Rows, decoding_layout, training_layout

BATCHES = (1, 4, 16)
TOKENS = {8192: (4096, 8192)}  # of training's text, by the setting's rows; 4096 would be one more case of everything for other operations
KV_BYTES = 16 * 2**30  # no cache larger than this, at two bytes an element: the check makes it four times as large in float64
ALIGNED = 64  # columns of the cache: scaled_dot_product_attention would pad an odd mask at every call


# ---- the competitors


def plain(i: dict) -> Tensor:
    """The formula in the dtype of its arguments, one head at a time: memory for 1 / (B H) of the scores."""
    q, k, v, mask = i["q"], i["k"], i["v"], i["mask"]
    groups = q.shape[2] // k.shape[1]

    def head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.t() * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v

    def one(b: int, h: int) -> Tensor:
        arguments = q[:, b, h], k[b, h // groups], v[b, h // groups], mask[b, 0]
        return checkpoint(head, *arguments, use_reentrant=False) if q.requires_grad else head(*arguments)  # autograd would keep all scores

    return torch.stack([torch.stack([one(b, h) for h in range(q.shape[2])], 1) for b in range(q.shape[1])], 1)


def sdpa(i: dict) -> Tensor:
    q = i["q"].permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, i["k"], i["v"], attn_mask=i["mask"], enable_gqa=True).permute(2, 0, 1, 3)


def flex(i: dict) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(i["q"].permute(1, 2, 0, 3), i["k"], i["v"], block_mask=i["block_mask"], enable_gqa=True).permute(2, 0, 1, 3)


class CompiledFlex:
    """Compiled for one case's shapes at its first call: with dynamic ones TorchInductor gives up on FlexAttention (2.13, on a CPU)."""

    compiled = None

    def __call__(self, i: dict) -> Tensor:
        if self.compiled is None:
            torch.compiler.reset()  # earlier cases' compilations count towards the limit, past which it would be eager by another name
            self.compiled = torch.compile(flex, dynamic=False, fullgraph=True)
        return self.compiled(i)


def ours(i: dict) -> Tensor:
    return ops.attention(i["q"], i["k"], i["v"], i["rule"], implementation="triton")


def mask_mod(rule: AttentionRule, columns: int):
    """The rule as FlexAttention takes it, a column at a time."""
    t, b = rule.visible.shape
    first, device = t - rule.num_masks, rule.visible.device
    column_block = torch.full((b, columns), -2, device=device)  # no row's: NTP rows have -1
    column_slot = torch.zeros((b, columns), dtype=torch.int64, device=device)
    own = rule.mask_start.unsqueeze(1) + torch.arange(rule.num_masks, device=device)
    column_block.scatter_(1, own, rule.block[first:].expand(b, -1))
    column_slot.scatter_(1, own, rule.slot[first:].expand(b, -1))
    visible, block, slot = rule.visible.t().contiguous(), rule.block, rule.slot

    def allowed(b, h, row, column):
        return (column < visible[b, row]) | ((column_block[b, column] == block[row]) & (column_slot[b, column] <= slot[row]))

    return allowed


# ---- the cases


def decoding_rows(mode: str, k: int, context: int, batch: int, device: torch.device) -> Rows:
    layout = decoding_layout(mode, k, (k,) * batch, str(device))
    return layout.at(torch.zeros(layout.num_ntp, batch, dtype=torch.int64, device=device), [context] * batch)


def training_rows(tokens: int, k: int, device: torch.device) -> Rows:
    """The mask rows alone, as training runs them: a block after every k-th token, so about as many rows as tokens."""
    anchors = torch.arange(k - 1, tokens, k, device=device).unsqueeze(1)
    return training_layout(tokens, anchors, k).at(torch.zeros(tokens, 1, dtype=torch.int64, device=device), [0]).mask_rows()


def texts(setting: Setting) -> tuple[int, ...]:
    """Lengths of text that are measured for a setting of training."""
    return TOKENS.get(setting.rows, (setting.rows,))


def attended(rows: Rows) -> tuple[int, int]:
    """(keys, pairs) that `counts.attention` takes, from the rule: NTP keys before a row's anchor, and masks of its block up to itself."""
    keys = int(rows.visible.amax(0).sum()) + rows.num_masks * rows.visible.shape[1]
    return keys, int((rows.visible + rows.slot.unsqueeze(1)).sum())


def _make(rows_on, heads, kv_heads, d, backward, device, dtype) -> dict:
    randn, rows = random_tensors(device, dtype), rows_on(device=device)
    rule, (t, b) = rows.rule, rows.visible.shape
    columns = -(-rule.num_keys // ALIGNED) * ALIGNED
    inputs = dict(
        q=randn(t, b, heads, d, grad=backward), k=randn(b, kv_heads, columns, d, grad=backward), v=randn(b, kv_heads, columns, d, grad=backward),
        mask=reference.allowed_keys(rule, columns).unsqueeze(1), rule=rule,
    )  # fmt: skip
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        inputs["block_mask"] = create_block_mask(mask_mod(rule, columns), b, None, t, columns, device=device)
    return inputs | (dict(dy=randn(t, b, heads, d)) if backward else {})


def _count(t, b, heads, kv_heads, d, rows_on, backward, itemsize, adapter) -> counts.Count:
    return counts.attention(t, b, heads, kv_heads, d, *attended(rows_on(device=torch.device("cpu"))), itemsize, backward)


def attention(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """Decoding: rows, contexts, batches. Training: tokens, masks."""
    heads, kv_heads, d = model.heads, model.kv_heads, model.head_dim
    on_gpu = torch.cuda.is_available()

    def case(setting: Setting, shape: str, batch: int, rows_on, backward: bool = False) -> Case:
        others = [Provider(SDPA, sdpa, plain)] + ([Provider(FLEX, CompiledFlex(), plain)] if on_gpu else [])
        return Case(
            "attention", model.name, "attention", f"{heads} / {kv_heads} heads x {d}, {shape}", setting, 0, backward,
            partial(_count, setting.rows, batch, heads, kv_heads, d, rows_on, backward),
            partial(_make, rows_on, heads, kv_heads, d, backward), (*others, Provider(OURS, ours, plain)), ("dy",), ("q", "k", "v"),
        )  # fmt: skip

    settings = list(settings)
    training = [s for s in settings if s.mode == "training"]
    for s in scope.decoding(settings):
        for context in scope.lengths(model.contexts):
            for batch in BATCHES[:1] if scope.short else BATCHES:
                if 2 * batch * kv_heads * (context + s.rows) * d * 2 <= KV_BYTES:
                    yield case(s, f"context {context}, batch {batch}", batch, partial(decoding_rows, s.mode, s.k, context, batch))
    for s in training[:1] if scope.short else training:
        for tokens in scope.lengths(texts(s)):
            for k in (8,) if scope.short else (4, 8):
                rows = tokens // k * k
                for backward in (False, True):
                    masks = Setting(s.name, rows, rows, True, s.mode, k)
                    yield case(masks, f"{tokens} tokens, k = {k}", 1, partial(training_rows, tokens, k), backward)
