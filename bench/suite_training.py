"""The losses' suites: cross entropy of a vocabulary's logits, and latent consistency, over the rows of many texts."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import counts
from bench.cases import CHUNKED, COMPILED, EAGER, LOSS, OURS, Case, Model, Provider, Scope, Setting, compiled, random_tensors
from mtp_kernels import ops, reference

PLAIN_ROWS = 1024  # of which the formula has the logits at a time: in float64 those of 16,384 rows would be 17 GB, several times over


# ---- cross entropy; ours and the reference give the most likely tokens too, which the others leave out


def _logits(hidden: Tensor, i: dict) -> Tensor:
    return F.linear(hidden, i["lm_head"]).to(torch.promote_types(hidden.dtype, torch.float32))


def _losses(hidden: Tensor, labels: Tensor, teacher: Tensor | None, i: dict) -> Tensor:
    targets = labels if teacher is None else _logits(teacher, i).softmax(-1)
    return F.cross_entropy(_logits(hidden, i), targets, reduction="none")


def entropy_eager(i: dict) -> Tensor:
    return _losses(i["hidden"], i["labels"], i.get("teacher"), i)


def entropy_plain(i: dict) -> Tensor:
    """The same, some rows at a time."""
    hidden, labels, teacher = (x if x is None else x.split(PLAIN_ROWS) for x in (i["hidden"], i["labels"], i.get("teacher")))
    parts = zip(hidden, labels, teacher or [None] * len(hidden), strict=True)
    return torch.cat([checkpoint(_losses, *part, i, use_reentrant=False) for part in parts])


def entropy_chunked(i: dict) -> Tensor:
    return reference.linear_cross_entropy(i["hidden"], i["lm_head"], i["labels"], teacher=i.get("teacher"))[0]


def entropy_ours(i: dict) -> Tensor:
    return ops.linear_cross_entropy(i["hidden"], i["lm_head"], i["labels"], teacher=i.get("teacher"), implementation="triton")[0]


def _make_entropy(m: int, model: Model, teacher: bool, device: torch.device, dtype: torch.dtype) -> dict:
    randn, d = random_tensors(device, dtype), model.hidden
    inputs = dict(
        hidden=randn(m, d, grad=True), lm_head=randn(model.vocab, d, scale=d**-0.5),
        labels=torch.randint(model.vocab, (m,), generator=torch.Generator(device).manual_seed(1), device=device),
        dy=random_tensors(device, torch.float32)(m),
    )  # fmt: skip
    return inputs | (dict(teacher=randn(m, d)) if teacher else {})


def linear_cross_entropy(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """Labels alone, and a teacher's distribution. No graph holds them: it would keep each competitor's logits while the others run."""
    competitors = (EAGER, entropy_eager), (COMPILED, compiled(entropy_eager)), (CHUNKED, entropy_chunked), (OURS, entropy_ours)
    providers = tuple(Provider(name, call, entropy_plain, captured=False) for name, call in competitors)
    d, vocab = model.hidden, model.vocab
    for s in (s for s in settings if s.mode == LOSS):
        for teacher in (False, True):

            def count(itemsize, adapter, m=s.rows, teacher=teacher):
                return counts.linear_cross_entropy(m, vocab, d, itemsize, teacher, backward=True)

            yield Case(
                "linear_cross_entropy", model.name, "linear_cross_entropy", f"{d} -> {vocab}, {'a teacher' if teacher else 'labels'}", s, 0, True,
                count, partial(_make_entropy, s.rows, model, teacher), providers, ("dy",), ("hidden",),
            )  # fmt: skip


# ---- latent consistency


def consistency_eager(i: dict) -> Tensor:
    wide = torch.promote_types(i["z"].dtype, torch.float32)
    difference = i["z"].to(wide) - i["target"][i["index"]].to(wide)
    return (difference.square().mean(-1) * i["weight"]).sum()


def consistency_ours(i: dict) -> Tensor:
    return ops.latent_consistency(i["z"], i["target"], i["index"], i["weight"], implementation="triton")


def _make_consistency(m: int, d: int, device: torch.device, dtype: torch.dtype) -> dict:
    randn, generator = random_tensors(device, dtype), torch.Generator(device).manual_seed(1)
    return dict(
        z=randn(m, d, grad=True), target=randn(m, d), index=torch.randperm(m, generator=generator, device=device),
        weight=torch.rand(m, generator=generator, device=device) / m, dy=torch.ones((), device=device),
    )  # fmt: skip


def latent_consistency(model: Model, settings: Iterable[Setting], scope: Scope) -> Iterator[Case]:
    """As many ordinary rows as masks, as a block of k after every k-th token has them."""
    competitors = (EAGER, consistency_eager), (COMPILED, compiled(consistency_eager)), (OURS, consistency_ours)
    providers = tuple(Provider(name, call, consistency_eager) for name, call in competitors)
    d = model.hidden
    for s in (s for s in settings if s.mode == LOSS):

        def count(itemsize, adapter, m=s.rows):
            return counts.latent_consistency(m, d, itemsize, backward=True)

        yield Case(
            "latent_consistency", model.name, "latent_consistency", str(d), s, 0, True,
            count, partial(_make_consistency, s.rows, d), providers, ("dy",), ("z",),
        )  # fmt: skip
