"""The suites of a decoding step's small operations: rotation into the cache, greedy tokens, what becomes of drafts and what the next come from."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import counts
from bench.cases import COMPILED, EAGER, OURS, Case, Model, Provider, Scope, Setting, compiled, random_tensors
from mtp_kernels import Sampling, ops, reference
from mtp_kernels._sampling import gumbel
from mtp_model.layout import decoding_layout

COLUMNS = 2048  # of the cache, which begins to be written in its middle
DRAFTS, VOCABULARY, ENDS = 8, 128_256, (128_001, 128_009)  # Llama 3's; what accepting takes does not depend on them


def _competitors(eager, ours, plain=None) -> tuple[Provider, ...]:
    """plain: the formula they are held against; default eager's."""
    plain = plain or eager
    return Provider(EAGER, eager, plain), Provider(COMPILED, compiled(eager), plain), Provider(OURS, ours, plain)


# ---- rotation into the cache


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in x's dtype: the specification works in float32, so float64 needs a formula of its own."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary_formula(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None) -> Tensor:
    """`rotary_embedding`, in float64 too."""
    if norm is None or x.dtype != torch.float64:
        return reference.rotary_embedding(x, cos, sin, norm)
    return reference.rotary_embedding(norm_formula(x, norm, 1e-6), cos, sin)


def write_eager(i: dict, rotate=reference.rotary_embedding) -> Tensor:
    """One sequence: a rotation of q and k together, and two copies by column."""
    keys, values = i["keys"], i["values"]
    kv_heads = keys.shape[2]
    heads = i["qkv"].shape[2] - kv_heads
    qk, v = i["qkv"].split([heads, kv_heads], 2)
    q, k = rotate(qk, i["cos"], i["sin"], i["norm"]).split([heads - kv_heads, kv_heads], 2)
    columns = i["start"] + i["offsets"]
    keys.index_copy_(0, columns, k)
    values.index_copy_(0, columns, v)
    return q.contiguous()


def write_plain(i: dict) -> Tensor:
    return write_eager(i, rotary_formula)


def write_ours(i: dict) -> Tensor:
    return ops.rotary_write(i["qkv"], i["cos"], i["sin"], i["keys"], i["values"], i["start"], i["norm"], implementation="triton")


def _make_write(m: int, model: Model, device: torch.device, dtype: torch.dtype) -> dict:
    randn, d, kv_heads = random_tensors(device, dtype), model.head_dim, model.kv_heads
    start, offsets = torch.tensor([COLUMNS // 2], device=device), torch.arange(m, device=device)
    cos, sin = reference.rotary_tables((start + offsets).unsqueeze(1), reference.rotary_frequencies(d).to(device), dtype)
    return dict(
        qkv=randn(m, 1, model.heads + 2 * kv_heads, d), cos=cos, sin=sin, keys=randn(COLUMNS, 1, kv_heads, d), values=randn(COLUMNS, 1, kv_heads, d),
        start=start, offsets=offsets, norm=randn(model.heads + kv_heads, d) if model.qk_norm else None,
    )  # fmt: skip


def rotary_write(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    heads, kv_heads, d = model.heads, model.kv_heads, model.head_dim
    shape = f"{heads} / {kv_heads} heads x {d}{', normed' if model.qk_norm else ''}"
    for s in scope.decoding(settings):

        def count(itemsize, adapter, m=s.rows):
            return counts.rotary_write(m, heads, kv_heads, d, itemsize, model.qk_norm)

        yield Case(
            "rotary_write", model.name, "rotary_write", shape, Setting("rows", s.rows, 0), 0, False, count,
            partial(_make_write, s.rows, model), _competitors(write_eager, write_ours, write_plain), (), (), mutates=("keys", "values"),
        )  # fmt: skip


# ---- greedy tokens


def argmax_eager(i: dict) -> Tensor:
    return F.linear(i["hidden"], i["weight"]).argmax(-1)


def argmax_ours(i: dict) -> Tensor:
    return ops.linear_argmax(i["hidden"], i["weight"], implementation="triton")


def _share_of_largest(i: dict, ids: Tensor) -> Tensor:
    """Of each row's largest logit what the chosen token has, in float64: near-ties make another token right too."""
    logits = F.linear(i["hidden"].double(), i["weight"].double())
    return (logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) / logits.amax(-1)).to(i["hidden"].dtype)


def _make_argmax(m: int, model: Model, device: torch.device, dtype: torch.dtype) -> dict:
    randn, d = random_tensors(device, dtype), model.hidden
    return dict(hidden=randn(m, d), weight=randn(model.vocab, d, scale=d**-0.5))


def linear_argmax(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    d, vocab = model.hidden, model.vocab
    for s in scope.decoding(settings):

        def count(itemsize, adapter, m=s.rows):
            return counts.linear_argmax(m, vocab, d, itemsize)

        yield Case(
            "linear_argmax", model.name, "linear_argmax", f"{d} -> {vocab}", Setting("rows", s.rows, 0), 0, False, count,
            partial(_make_argmax, s.rows, model), _competitors(argmax_eager, argmax_ours), (), (), judge=_share_of_largest,
        )  # fmt: skip


# ---- drawn tokens

SAMPLING = Sampling(0.7)


def sample_eager(i: dict) -> Tensor:
    return reference.linear_sample(i["hidden"], i["weight"], i["keys"], SAMPLING)


def sample_ours(i: dict) -> Tensor:
    return ops.linear_sample(i["hidden"], i["weight"], i["keys"], SAMPLING, implementation="triton")


def _share_of_best(i: dict, ids: Tensor) -> Tensor:
    """Of each row's largest logit with its noise what the chosen token has, in float64."""
    noise = gumbel(i["keys"].unsqueeze(-1), torch.arange(i["weight"].shape[0], device=ids.device))
    scores = F.linear(i["hidden"].double(), i["weight"].double()) + SAMPLING.temperature * noise.double()
    return (scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1) / scores.amax(-1)).to(i["hidden"].dtype)


def _make_sample(m: int, model: Model, device: torch.device, dtype: torch.dtype) -> dict:
    keys = ops.sampling_keys(torch.tensor(0, device=device), torch.arange(m, device=device), model.vocab)
    return _make_argmax(m, model, device, dtype) | dict(keys=keys)


def linear_sample(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """The noise is made on the chip: the bytes are greedy tokens' and the keys."""
    d, vocab = model.hidden, model.vocab
    for s in scope.decoding(settings):

        def count(itemsize, adapter, m=s.rows):
            return counts.linear_argmax(m, vocab, d, itemsize, drawn=True)

        yield Case(
            "linear_sample", model.name, "linear_sample", f"{d} -> {vocab}", Setting("rows", s.rows, 0), 0, False, count,
            partial(_make_sample, s.rows, model), _competitors(sample_eager, sample_ours), (), (), judge=_share_of_best,
        )  # fmt: skip


# ---- accepted drafts


def accept_eager(i: dict) -> tuple[Tensor, ...]:
    return reference.accept_and_commit(i["drafts"], i["predictions"], i["counts"], i["lengths"], i["room"], i["finished"], i["eos"])


def accept_ours(i: dict) -> tuple[Tensor, ...]:
    arguments = i["drafts"], i["predictions"], i["counts"], i["lengths"], i["room"], i["finished"], i["eos"]
    return ops.accept_and_commit(*arguments, implementation="triton")


def _make_accept(b: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Three of four drafts are right, some predictions are ends of text, some sequences are finished."""
    generator = torch.Generator(device).manual_seed(0)

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    predictions, finished = randint(0, VOCABULARY, b, DRAFTS + 1), randint(0, 8, b) == 0
    drafts = torch.where(randint(0, 4, b, DRAFTS) > 0, predictions[:, :-1], randint(0, VOCABULARY, b, DRAFTS))
    predictions = torch.where(randint(0, 32, b, DRAFTS + 1) == 0, ENDS[1], predictions)
    return dict(
        drafts=drafts, predictions=predictions, counts=randint(0, DRAFTS + 1, b), lengths=randint(1, COLUMNS, b),
        room=randint(1, 2 * DRAFTS, b).masked_fill(finished, 0), finished=finished, eos=torch.tensor(ENDS, device=device),
    )  # fmt: skip


def accept_and_commit(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """A row is a sequence with its drafts; no model's shapes matter."""
    for s in scope.decoding(settings):

        def count(itemsize, adapter, b=s.rows):
            return counts.accept_and_commit(b, DRAFTS, len(ENDS))

        yield Case(
            "accept_and_commit", "any model", "accept_and_commit", f"{DRAFTS} drafts", Setting("sequences", s.rows, 0), 0, False, count,
            partial(_make_accept, s.rows), _competitors(accept_eager, accept_ours), (), (), mutates=("lengths", "room", "finished"),
        )  # fmt: skip


# ---- what the next drafts come from


def states_eager(i: dict) -> tuple[Tensor, ...]:
    return reference.drafting_states(i["z"], i["anchors"], i["accepted"], i["k"])


def states_ours(i: dict) -> tuple[Tensor, ...]:
    return ops.drafting_states(i["z"], i["anchors"], i["accepted"], i["k"], implementation="triton")


def _make_states(s: Setting, d: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The states of a step of one sequence, all of whose drafts are accepted."""
    anchors = decoding_layout(s.mode, s.k, (s.k,), str(device)).anchors
    return dict(z=random_tensors(device, dtype)(s.rows, 1, d), anchors=anchors, accepted=torch.tensor([s.k], device=device), k=s.k)


def drafting_states(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    for s in scope.decoding(settings):
        if not s.k:
            continue

        def count(itemsize, adapter, s=s):
            return counts.drafting_states(s.k, (s.rows - s.k - 1) // s.k, model.hidden, itemsize)

        yield Case(
            "drafting_states", model.name, "drafting_states", f"{s.k} x {model.hidden}", Setting("rows", s.rows, 0), 0, False, count,
            partial(_make_states, s, model.hidden), _competitors(states_eager, states_ours), (), (),
        )  # fmt: skip


COPIED, MATCH = 10, 2


def lookup_eager(i: dict) -> tuple[Tensor, ...]:
    return reference.lookup_drafts(i["text"], i["newest"], COPIED, MATCH)


def lookup_ours(i: dict) -> tuple[Tensor, ...]:
    return ops.lookup_drafts(i["text"], i["newest"], COPIED, MATCH, implementation="triton")


def _make_lookup(tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The longest search: the newest tokens stood nowhere but at the beginning."""
    text = torch.arange(tokens, device=device)
    text[-MATCH:] = text[:MATCH]
    return dict(text=text.unsqueeze(0), newest=torch.tensor([tokens - 1], device=device))


def lookup_drafts(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """No model's shapes matter but the lengths that it is measured with."""
    for s in scope.decoding(settings)[:1]:
        for tokens in scope.lengths(model.contexts):

            def count(itemsize, adapter, tokens=tokens):
                return counts.lookup_drafts(1, COPIED, tokens, MATCH)

            yield Case(
                "lookup_drafts", "any model", "lookup_drafts", f"{COPIED} of {tokens} tokens", Setting("sequences", s.rows, 0), 0, False, count,
                partial(_make_lookup, tokens), _competitors(lookup_eager, lookup_ours), (), (),
            )  # fmt: skip
