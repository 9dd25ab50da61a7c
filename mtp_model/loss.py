"""The training losses (arXiv 2507.11851, section 2.5), on a frozen prefill and mask rows with gradients.

    loss = mean over NTP and MTP rows of (CE(base logits) + CE(sampler logits)) + mean over NTP rows of LCM

NTP rows see neither masks nor adapter, so they are a pass of their own without gradients that fills the cache; only the
mask rows keep activations. (With an ungated adapter, which changes NTP rows too, all rows are one pass with gradients.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_model.cache import KVCache
from mtp_model.data import Batch
from mtp_model.layout import Rows, training_layout
from mtp_model.model import MTPModel


@dataclass
class Losses:
    """What a pass gave. total: what is minimised, with a graph; of a batch in parts, this part's share of it.

    sums: float64 vector on the CPU, to be added over the parts of a batch; `report` reads it.
    """

    total: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Report:
    """Numbers for the log: the total, the NTP rows' and the masks' mean cross entropies in nats (`sampler` nan without one),
    the LCM term, the share of right guesses by mask (k entries each; nan where a mask had no label; right_sampler empty
    without a sampler), and how many mask rows had a label."""

    loss: float
    ntp: float
    base: float
    sampler: float
    lcm: float
    right_base: list[float]
    right_sampler: list[float]
    rows: int


def report(sums: Tensor, sampler: bool) -> Report:
    """The means of a batch from the sums of its parts."""
    (loss, ntp, base, sampled, lcm, ntp_rows), counts = sums[:6].tolist(), sums[6:].view(3, -1)
    rows = int(counts[0].sum())

    def share(right: Tensor) -> list[float]:
        return [round(value, 4) for value in (right / counts[0]).tolist()]

    return Report(
        loss, ntp / max(ntp_rows, 1), base / max(rows, 1), sampled / max(rows, 1) if sampler else float("nan"), lcm,
        share(counts[1]), share(counts[2]) if sampler else [], rows,
    )  # fmt: skip


def choose_anchors(batch: Batch, limit: int | None = None, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Anchors (A, B) and which of them are real: the answer positions and each last prompt token, where at least the
    first mask has a label. `limit` keeps a random subset of that many per sequence."""
    answer = batch.answer
    length = answer.shape[0]
    bears = answer.clone()
    bears[:-1] |= answer[1:]
    has_label = torch.zeros_like(answer)
    has_label[:-2] = answer[2:]
    if batch.first is not None:
        has_label[:-2] &= batch.first[2:] == batch.first[:-2]
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


@dataclass(frozen=True, eq=False)
class _Targets:
    """What the mask rows of a pass are to predict, picked: one entry per mask row that has a label.

    rows: their numbers in the flattened (A * k, B). slot: 1..k. at: the NTP row, in the flattened (L, B), that stands at the
    mask's position. previous, labels: the token there and the one after it.
    """

    rows: Tensor
    slot: Tensor
    at: Tensor
    previous: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batch: Batch, rows: Rows, real: Tensor) -> "_Targets":
        length, size = batch.ids.shape
        anchor, slot = rows.visible[length:] - 1, rows.slot[length:].unsqueeze(1)
        target = anchor + slot + 1
        inside = target < length
        target = target.clamp(max=length - 1)
        labelled = inside & batch.answer.gather(0, target) & real.repeat_interleave(rows.k, dim=0)
        if batch.first is not None:
            labelled &= batch.first.gather(0, target) == batch.first.gather(0, anchor)
        picked = labelled.flatten().nonzero().squeeze(1)
        at = ((target - 1) * size + torch.arange(size, device=target.device)).flatten()[picked]
        ids = batch.ids.flatten()
        return cls(picked, slot.expand(-1, size).flatten()[picked], at, ids[at], ids[at + size])


def mtp_loss(
    model: MTPModel,
    batch: Batch,
    *,
    anchors: tuple[Tensor, Tensor] | None = None,
    masks: int | None = None,
    lcm_weight: float = 1.0,
    mask_decay: float = 1.0,
    soft_targets: float = 0.0,
    all_sum=lambda tensor: tensor,
) -> Losses:
    """All losses of a batch, or of a part of it.

    anchors: what `choose_anchors` gave (default: all of the batch's). masks: how many of the adapter's k masks stand after an
    anchor (default all). mask_decay: mask j weighs mask_decay ** (j - 1) (1: the paper's plain mean). soft_targets: share, 0 to
    1, of the frozen model's own next-token distribution in the targets. all_sum: adds a tensor over all parts of the batch.
    In the sampler's term the previous token is the true one; at an NTP row it is that row's own token.
    """
    k = masks or model.mtp.num_masks
    length, size = batch.ids.shape
    chosen, real = choose_anchors(batch) if anchors is None else anchors
    rows = training_layout(length, chosen, k, batch.first).at(batch.ids, [0] * size)
    z_ntp, z = _states(model, rows)  # (L * B, d), (A * k * B, d)

    targets = _Targets.of(batch, rows, real)
    states, labels = z[targets.rows], targets.labels
    weight = mask_decay ** (targets.slot - 1).to(torch.float32)
    ntp = batch.answer[1:].flatten().nonzero().squeeze(1)
    ntp_labels, ntp_states = batch.ids[1:].flatten()[ntp], z_ntp[ntp]

    per_row = torch.bincount(targets.at, minlength=length * size)  # masks that stand at each NTP row's position
    counts = torch.tensor([float(weight.sum()) + len(ntp), int((per_row > 0).sum())], dtype=torch.float64)
    divisor, lcm_rows = all_sum(counts).tolist()

    operations = model.operations
    chunk = {"chunk": max(128, 2**20 // model.config.vocab_size)} if model.device.type == "cpu" else {}  # rows whose logits stay in its caches

    def cross_entropy(hidden: Tensor, labels: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        soft = {"teacher": teacher.detach(), "soft": soft_targets} if soft_targets else {}
        return operations.linear_cross_entropy(hidden, model.lm_head, labels, **soft, **chunk)

    teacher = z_ntp[targets.at] if soft_targets else z_ntp
    with torch.set_grad_enabled(not model.mtp.gated):
        ntp_ce, _ = operations.linear_cross_entropy(ntp_states, model.lm_head, ntp_labels, **chunk)
    base_ce, guess = cross_entropy(states, labels, teacher)
    total = (base_ce * weight).sum() + ntp_ce.sum()
    right, right_sampler, sampler_ce = guess == labels, None, None
    if model.sampler is not None:
        sampler_ce, guess = cross_entropy(model.sampler(F.embedding(targets.previous, model.embed), states), labels, teacher)
        ntp_hidden = model.sampler(F.embedding(batch.ids[:-1].flatten()[ntp], model.embed), ntp_states)
        total = total + (sampler_ce * weight).sum() + cross_entropy(ntp_hidden, ntp_labels, ntp_states)[0].sum()
        right_sampler = guess == labels
    consistency = operations.latent_consistency(z, z_ntp.detach(), *_consistency_weights(targets, per_row, z, lcm_rows))
    total = total / divisor + lcm_weight * consistency

    with torch.no_grad():
        means = [total, ntp_ce.sum(), base_ce.sum(), torch.zeros(()) if sampler_ce is None else sampler_ce.sum(), consistency]
        sums = torch.tensor([float(value) for value in means] + [len(ntp)], dtype=torch.float64)
        by_mask = [_by_mask(flags, targets.slot, model.mtp.num_masks) for flags in (torch.ones_like(right), right, right_sampler)]
    return Losses(total, torch.cat([sums, *by_mask]))


def _states(model: MTPModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """The NTP rows' and the masks' hidden states, (L * B, d) and (A * k * B, d)."""
    length, size = rows.num_ntp, rows.ids.shape[1]
    cache = KVCache(model.config, size, length if model.mtp.gated else rows.num_keys, model.device, model.dtype)
    if not model.mtp.gated:
        return model(rows, cache).flatten(0, 1).split([length * size, rows.num_masks * size])
    with torch.no_grad():
        z_ntp = model(rows.ntp_rows(), cache)
    return z_ntp.flatten(0, 1), model(rows.mask_rows(), cache).flatten(0, 1)


def _consistency_weights(targets: _Targets, per_row: Tensor, z: Tensor, rows: float) -> tuple[Tensor, Tensor]:
    """For each mask row, the NTP row at its position and its weight in LCM: at each NTP row t the mean over the masks that
    stand at t's position of mean((z_t - z)^2), z_t detached; averaged over the NTP rows that have such a mask."""
    index = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    weight = torch.zeros(z.shape[0], dtype=torch.float32, device=z.device)
    index[targets.rows] = targets.at
    weight[targets.rows] = 1 / (per_row[targets.at] * max(rows, 1.0))
    return index, weight


def _by_mask(flags: Tensor | None, slot: Tensor, k: int) -> Tensor:
    """How many of the flags are set, by mask."""
    if flags is None:
        return torch.zeros(k, dtype=torch.float64)
    return torch.bincount(slot, weights=flags.double(), minlength=k + 1)[1:].cpu()
