"""The training losses (arXiv 2507.11851, section 2.5), on a frozen prefill and mask rows with gradients.

    loss = mean over NTP and MTP rows of (CE(base logits) + CE(sampler logits)) + mean over NTP rows of LCM

NTP rows see neither masks nor adapter, so they are a pass of their own without gradients that fills the cache; only the
mask rows keep activations.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_kernels import linear_cross_entropy
from mtp_model.cache import KVCache
from mtp_model.data import Batch
from mtp_model.layout import training_layout
from mtp_model.model import MTPModel

IGNORE = -100


@dataclass
class Losses:
    """total: what is minimised, with a graph. The rest are plain numbers for the log: the NTP rows' and the masks' mean
    cross entropies in nats, the LCM term, the share of right guesses by mask (k entries each; nan where a mask had no
    label), and how many mask rows had a label."""

    total: Tensor
    ntp: float
    base: float
    sampler: float
    lcm: float
    right_base: list[float]
    right_sampler: list[float]
    rows: int


def choose_anchors(batch: Batch, limit: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Anchors (A, B) and which of them are real: the answer positions and each last prompt token, where at least the
    first mask has a label. `limit` keeps a random subset of that many per sequence."""
    answer = batch.answer
    length = answer.shape[0]
    bears = answer.clone()
    bears[:-1] |= answer[1:]
    has_label = torch.zeros_like(answer)
    has_label[:-2] = answer[2:]
    candidates = bears & has_label
    count = int(candidates.sum(0).max())
    if count == 0:
        raise ValueError("the batch has no position to put masks after; every sequence needs an answer of a token or more")
    if limit is not None:
        count = min(count, limit)
        keys = torch.rand(candidates.shape, generator=generator).to(answer.device)
        keys = keys.masked_fill(~candidates, -1)
        chosen = keys.topk(count, dim=0).indices.sort(0).values
    else:
        order = torch.arange(length, device=answer.device).unsqueeze(1)
        keys = torch.where(candidates, order, length)
        chosen = keys.sort(0).values[:count].clamp(max=length - 1)
    real = candidates.gather(0, chosen)
    if limit is None:  # a sequence with fewer anchors repeats its last row as padding
        rank = torch.arange(count, device=answer.device).unsqueeze(1)
        real &= rank < candidates.sum(0)
    return chosen, real


def mtp_loss(
    model: MTPModel,
    batch: Batch,
    *,
    anchors_per_sequence: int | None = None,
    generator: torch.Generator | None = None,
    lcm_weight: float = 1.0,
    mask_decay: float = 1.0,
) -> Losses:
    """All losses of a batch. `mask_decay` weighs mask j by mask_decay ** (j - 1) (1: the paper's plain mean).

    In the sampler's term the previous token is the true one; at an NTP row it is that row's own token.
    """
    k, device = model.mtp.num_masks, batch.ids.device
    length, size = batch.ids.shape
    anchors, real = choose_anchors(batch, anchors_per_sequence, generator)
    rows = training_layout(length, anchors, k).at(batch.ids, [0] * size, model.config.vocab_size)
    cache = KVCache(model.config, size, length, device, model.dtype)
    with torch.no_grad():
        z_ntp = model(rows.ntp_rows(), cache)  # (L, B, d)
    z = model(rows.mask_rows(), cache)  # (A * k, B, d)

    # Labels: a mask at position p predicts the token at p + 1, if that is an answer of its sequence.
    positions = rows.positions[length:]
    target = (positions + 1).clamp(max=length - 1)
    labelled = (positions + 1 < length) & batch.answer.gather(0, target) & real.repeat_interleave(k, dim=0)
    picked = labelled.flatten().nonzero().squeeze(1)
    labels = batch.ids.gather(0, target).flatten()[picked]
    previous = batch.ids.gather(0, positions.clamp(max=length - 1)).flatten()[picked]
    slot = rows.slot[length:].unsqueeze(1).expand(-1, size).flatten()[picked]
    states = z.flatten(0, 1)[picked]
    weight = mask_decay ** (slot - 1).to(torch.float32)

    ntp_picked = batch.answer[1:].flatten().nonzero().squeeze(1)
    ntp_labels = batch.ids[1:].flatten()[ntp_picked]
    ntp_states = z_ntp[:-1].flatten(0, 1)[ntp_picked]
    with torch.no_grad():
        ntp_ce, _ = linear_cross_entropy(ntp_states, model.lm_head, ntp_labels)
    base_ce, base_guess = linear_cross_entropy(states, model.lm_head, labels)
    divisor = weight.sum() + len(ntp_picked)
    total = ((base_ce * weight).sum() + ntp_ce.sum()) / divisor

    sampler_value, right_sampler = float("nan"), []
    if model.sampler is not None:
        hidden = model.sampler(F.embedding(previous, model.embed), states)
        ce, guess = linear_cross_entropy(hidden, model.lm_head, labels)
        ntp_previous = batch.ids[:-1].flatten()[ntp_picked]
        ntp_hidden = model.sampler(F.embedding(ntp_previous, model.embed), ntp_states)
        ntp_sampler_ce, _ = linear_cross_entropy(ntp_hidden, model.lm_head, ntp_labels)
        total = total + ((ce * weight).sum() + ntp_sampler_ce.sum()) / divisor
        sampler_value = float(ce.detach().mean())
        right_sampler = _share_right(guess == labels, slot, k)

    lcm = latent_consistency(z, z_ntp, positions, labelled, length)
    total = total + lcm_weight * lcm
    return Losses(
        total, float(ntp_ce.mean()), float(base_ce.detach().mean()), sampler_value, float(lcm.detach()),
        _share_right(base_guess == labels, slot, k), right_sampler, len(picked),
    )  # fmt: skip


def latent_consistency(z: Tensor, z_ntp: Tensor, positions: Tensor, labelled: Tensor, length: int) -> Tensor:
    """LCM: at each NTP row t, the mean over the masks that stand at t's position of mean((z_t - z)^2), z_t detached;
    averaged over the NTP rows that have such a mask."""
    size, d = z.shape[1], z.shape[2]
    at = positions.clamp(max=length - 1)
    counts = torch.zeros(length, size, device=z.device).scatter_add_(0, at, labelled.float())
    weight = labelled / counts.gather(0, at).clamp(min=1)  # (A * k, B)
    anchor_states = z_ntp.detach().gather(0, at.unsqueeze(-1).expand(-1, -1, d))
    error = (z.float() - anchor_states.float()).pow(2).mean(-1)
    return (error * weight).sum() / (counts > 0).sum().clamp(min=1)


def _share_right(right: Tensor, slot: Tensor, k: int) -> list[float]:
    totals = torch.bincount(slot, minlength=k + 1)[1:]
    rights = torch.bincount(slot, weights=right.float(), minlength=k + 1)[1:]
    return [round(v, 4) for v in (rights / totals).tolist()]
