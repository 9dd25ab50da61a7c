"""The sampler's suite: drafting a block's tokens from the whole vocabulary, and from a shortlist per mask."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import sampler_counts
from bench.cases import COMPILED, EAGER, OURS, Case, Model, Provider, Scope, Setting, compiled, random_tensors
from mtp_kernels import SamplerWeights, ops, reference

BATCHES, CANDIDATES = (1, 4), (64, None)


def _weights(i: dict) -> SamplerWeights:
    return SamplerWeights(*(i[name] for name in SamplerWeights._fields))


def draft_eager(i: dict) -> Tensor:
    return reference.sampler_draft(i["z"], i["first"], i["embedding"], _weights(i), i["lm_head"], candidates=i["candidates"])


def draft_ours(i: dict) -> Tensor:
    arguments = i["z"], i["first"], i["embedding"], _weights(i), i["lm_head"]
    return ops.sampler_draft(*arguments, candidates=i["candidates"], implementation="triton")


def _share_of_best(i: dict, drafts: Tensor) -> Tensor:
    """Of each step's largest logit what the drafted token has, in float64 and behind the tokens that were drafted before it.

    So a near-tie decided otherwise is no error, nor what follows from it. Nor is another end of a shortlist: its last eighth are
    not held against the draft, and an eighth behind them may be drafted; other tokens have nothing.
    """
    c, dtype = i["candidates"], i["z"].dtype
    i = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in i.items()}
    previous = F.embedding(torch.cat([i["first"].unsqueeze(1), drafts[:, :-1]], 1), i["embedding"])
    logits = F.linear(reference.sampler_hidden(previous, i["z"], _weights(i)), i["lm_head"])
    chosen = logits.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    if c is not None:
        listed = F.linear(i["z"], i["lm_head"]).topk(c + c // 8, dim=-1).indices
        chosen = chosen.masked_fill((listed != drafts.unsqueeze(-1)).all(-1), 0)
        logits = logits.gather(-1, listed[..., : c - c // 8])
    return (chosen / logits.amax(-1)).clamp(max=1).to(dtype)


def _make(b: int, k: int, model: Model, candidates: int | None, device: torch.device, dtype: torch.dtype) -> dict:
    randn, d, v = random_tensors(device, dtype), model.hidden, model.vocab
    weights = SamplerWeights(
        randn(d, 2 * d, scale=d**-0.5), randn(d, scale=0.1), 1 + randn(d, scale=0.1), randn(d, scale=0.1),
        randn(d, d, scale=d**-0.5), randn(d, scale=0.1), 1 + randn(d, scale=0.1), randn(d, scale=0.1),
    )  # fmt: skip
    first = torch.randint(v, (b,), generator=torch.Generator(device).manual_seed(1), device=device)
    return dict(z=randn(b, k, d), first=first, embedding=randn(v, d), lm_head=randn(v, d, scale=d**-0.5), candidates=candidates) | weights._asdict()


def sampler_draft(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """For the numbers of masks that the settings of decoding have."""
    d, vocab = model.hidden, model.vocab
    providers = Provider(EAGER, draft_eager, draft_eager), Provider(COMPILED, compiled(draft_eager), draft_eager), Provider(OURS, draft_ours, draft_eager)
    for k in scope.masks(settings):
        for b in BATCHES[:1] if scope.short else BATCHES:
            for candidates in CANDIDATES:

                def count(itemsize, adapter, k=k, b=b, candidates=candidates):
                    return sampler_counts.least(d, vocab, k, candidates, b, itemsize)

                shape = f"{d} -> {vocab}, k = {k}, batch {b}, {'all tokens' if candidates is None else f'{candidates} candidates'}"
                yield Case(
                    "sampler_draft", model.name, "sampler_draft", shape, Setting("masks", b * k, 0), 0, False, count,
                    partial(_make, b, k, model, candidates), providers, (), (), judge=_share_of_best,
                )  # fmt: skip
