"""The rows of a pass: what each row is, where it stands, and what it sees.

A pass has T rows for each of B sequences; row order is free because positions and the attention rule are explicit, so all
NTP rows come first and all masks after: the gate is one number. Every kind of pass is the same construction, NTP rows
x_0, x_1, ... of a sequence that already has n tokens in the cache, and blocks of k masks, each after an *anchor*, one of
those NTP rows (arXiv 2507.11851, Fig. 4). Only the anchors differ:

    pass              NTP rows         anchors
    autoregressive    t                none
    linear            t, d_1..d_k      the last draft
    quadratic         t, d_1..d_k      every NTP row
    quadratic-printed t, d_1..d_k      every draft (as the paper prints it; none after t)
    prefill           the prompt       its last token
    training          the whole text   every position that bears a loss

Drafts copied from the text (see `lookup`) may be more or fewer than k, and autoregressive decoding may have them too. Behind
copied drafts a linear step has no block: few of them are all accepted, and then the text can mostly be copied again.

In the pictures k = 2, 0 = may attend, columns in the order NTP keys | masks of each block; n = 0.

autoregressive          linear                            prefill of x0 x1 x2
    row  pos | t            row  pos | t  d1 d2 | m1 m2       row  pos | x0 x1 x2 | m1 m2
    t     0  | 0            t     0  | 0        |             x0    0  | 0        |
                            d1    1  | 0  0     |             x1    1  | 0  0     |
                            d2    2  | 0  0  0  |             x2    2  | 0  0  0  |
                            m1    3  | 0  0  0  | 0           m1    3  | 0  0  0  | 0
                            m2    4  | 0  0  0  | 0  0        m2    4  | 0  0  0  | 0  0

quadratic, and training with three anchors (x0 x1 x2 for t d1 d2)
    row  pos | t  d1 d2 | m1 m2 of t | of d1 | of d2
    t     0  | 0        |            |       |
    d1    1  | 0  0     |            |       |
    d2    2  | 0  0  0  |            |       |
    t:m1  1  | 0        | 0          |       |
    t:m2  2  | 0        | 0  0       |       |
    1:m1  2  | 0  0     |            | 0     |
    1:m2  3  | 0  0     |            | 0  0  |
    2:m1  3  | 0  0  0  |            |       | 0
    2:m2  4  | 0  0  0  |            |       | 0  0

quadratic-printed: the same without the rows and columns of t's block.

A step without drafts has the NTP row t and one block after it. In a batch where some sequences have fewer drafts than others,
their last NTP rows are padding that nobody's result depends on, and blocks that would stand after those stand after the last draft,
or after t where there is none.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mtp_kernels import AttentionRule

MODES = ("autoregressive", "linear", "quadratic", "quadratic-printed")


@dataclass(frozen=True, eq=False)
class Layout:
    """Structure of a pass, relative to each sequence's committed length n. Build one with the functions below.

    num_ntp, k: NTP rows and masks per block. anchors: (A, B) int64, the NTP row each block follows. first: (num_ntp, B) int64,
    the row at which each NTP row's document begins; None: all at row 0.
    """

    num_ntp: int
    k: int
    anchors: Tensor
    first: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return int(self.anchors.shape[0])

    @property
    def num_masks(self) -> int:
        return self.num_blocks * self.k

    @property
    def batch(self) -> int:
        return int(self.anchors.shape[1])

    @property
    def num_rows(self) -> int:
        return self.num_ntp + self.num_masks

    @cached_property
    def block(self) -> Tensor:
        """(T,) the block of a mask row, -1 for NTP rows."""
        blocks = torch.arange(self.num_blocks, device=self.anchors.device).repeat_interleave(self.k)
        return torch.cat([blocks.new_full((self.num_ntp,), -1), blocks])

    @cached_property
    def slot(self) -> Tensor:
        """(T,) 1..k for mask rows, 0 for NTP rows."""
        slots = torch.arange(1, self.k + 1, device=self.anchors.device).repeat(self.num_blocks)
        return torch.cat([slots.new_zeros(self.num_ntp), slots])

    @cached_property
    def ntp_row(self) -> Tensor:
        """(num_ntp, B) the NTP rows' own numbers."""
        return torch.arange(self.num_ntp, device=self.anchors.device).unsqueeze(1).expand(-1, self.batch)

    @cached_property
    def row_of(self) -> Tensor:
        """(T, B) the NTP row that a row is or whose block it is in."""
        return torch.cat([self.ntp_row, self.anchors.repeat_interleave(self.k, dim=0)])

    @cached_property
    def document(self) -> Tensor | None:
        """(T, B) the row at which the row's document begins, None if all begin at row 0."""
        return None if self.first is None else self.first.gather(0, self.row_of)

    @cached_property
    def ahead(self) -> Tensor:
        """(T, 1) position minus the number of visible NTP keys: -1 for NTP rows, 0 for first masks."""
        return (self.slot - 1).unsqueeze(1)

    def anchored(self, anchors: Tensor) -> "Layout":
        """The same rows with the blocks after other anchors, (A, B)."""
        other = replace(self, anchors=anchors)
        other.__dict__.update(block=self.block, slot=self.slot, ntp_row=self.ntp_row, ahead=self.ahead)
        return other

    def at(self, ids: Tensor, start: list[int] | Tensor, num_keys: int | None = None) -> "Rows":
        """The rows of this layout for NTP tokens `ids` (num_ntp, B) after `start[b]` committed tokens of sequence b.

        A `start` that is a tensor (B,) stays on its device, unread; then num_keys says below which column all keys will be, whatever it holds.
        """
        if tuple(ids.shape) != (self.num_ntp, self.batch):
            raise ValueError(f"ids have shape {tuple(ids.shape)}; accepted is (num_ntp, B) = {(self.num_ntp, self.batch)}")
        if len(start) != self.batch:
            raise ValueError(f"start has {len(start)} lengths; accepted is one for each of {self.batch} sequences")
        on_device = isinstance(start, Tensor)
        if on_device == (num_keys is None):
            raise ValueError(f"num_keys is {num_keys}; accepted is a number with a start on the device, None with lengths that are known")
        if on_device:
            n = start
        else:
            n = start[0] if len(set(start)) == 1 else torch.tensor(start, device=self.anchors.device)
            start, mask_start = tuple(start), tuple(s + self.num_ntp for s in start)
            num_keys = max(mask_start) + self.num_masks
        visible = self.row_of + (n + 1)
        positions = visible + self.ahead
        if on_device:
            mask_start = visible[self.num_ntp - 1]  # as many as the last NTP row sees
        return Rows(
            ids=ids,
            positions=positions if self.document is None else positions - self.document,
            visible=visible,
            first=self.document,
            block=self.block,
            slot=self.slot,
            num_ntp=self.num_ntp,
            k=self.k,
            start=start,
            mask_start=mask_start,
            num_keys=num_keys,
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one pass, NTP rows first. T = num_ntp + masks.

    ids: (num_ntp, B), of the tokens; a mask is known by its slot. positions: (T, B). visible, first: (T, B), a row sees the NTP keys at
    columns first to visible - 1 (first None: from 0). block, slot: (T,), see `mtp_kernels.AttentionRule`. start: committed tokens
    of each sequence, where this pass's K/V are written. mask_start: the cache column of each sequence's first mask. Both are numbers
    that the host knows, or tensors (B,) on the device. num_keys: every key's column is below it. gated: False puts the adapter on every row.
    causal: see `mtp_kernels.AttentionRule`.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    first: Tensor | None
    block: Tensor
    slot: Tensor
    num_ntp: int
    k: int
    start: tuple[int, ...] | Tensor
    mask_start: tuple[int, ...] | Tensor
    num_keys: int
    gated: bool = True
    causal: bool = False

    @property
    def num_masks(self) -> int:
        return int(self.positions.shape[0]) - self.num_ntp

    @property
    def gate(self) -> int | None:
        """First gate-on row of the flattened (T * B) rows: the gate that `gated_lora_linear` takes."""
        if not self.gated:
            return 0
        return self.num_ntp * int(self.ids.shape[1]) if self.num_masks else None

    @cached_property
    def rule(self) -> AttentionRule:
        known = isinstance(self.mask_start, tuple)
        return AttentionRule(
            visible=self.visible,
            block=self.block,
            slot=self.slot,
            mask_start=torch.tensor(self.mask_start, device=self.ids.device) if known else self.mask_start,
            num_masks=self.num_masks,
            num_keys=self.num_keys,
            block_size=self.k if self.num_masks else 0,
            first=self.first,
            causal=self.causal,
        )

    def rule_within(self, window: int | None) -> AttentionRule:
        """The rule of a layer whose rows see only the newest `window` positions, their own among them (None: all); a mask its block too."""
        if window is None or self.num_keys <= window:
            return self.rule
        rules = self.__dict__.setdefault("_windowed", {})  # once per pass, for all layers
        if window not in rules:
            first = (self.visible + (self.slot - window).unsqueeze(1)).clamp(min=0)
            rules[window] = replace(self.rule, first=first if self.first is None else torch.maximum(first, self.first), causal=False)
        return rules[window]

    def ntp_rows(self) -> "Rows":
        """The NTP rows alone: a pass of its own, since they never see a mask."""
        rows = self._part(slice(0, self.num_ntp), self.num_ntp, self.start, self.num_keys - self.num_masks)
        return replace(rows, causal=self.first is None and not any(self.start)) if isinstance(self.start, tuple) else rows

    def mask_rows(self) -> "Rows":
        """The mask rows alone, for a cache that already holds the NTP rows' keys."""
        return self._part(slice(self.num_ntp, None), 0, self.mask_start, self.num_keys)

    def _part(self, rows: slice, num_ntp: int, start: tuple[int, ...] | Tensor, num_keys: int) -> "Rows":
        return replace(
            self, ids=self.ids[:num_ntp], positions=self.positions[rows], visible=self.visible[rows],
            first=None if self.first is None else self.first[rows], block=self.block[rows], slot=self.slot[rows],
            num_ntp=num_ntp, start=start, num_keys=num_keys,
        )  # fmt: skip


def _check_k(k: int) -> None:
    if not isinstance(k, int) or not 1 <= k <= 16:
        raise ValueError(f"k is {k!r}; accepted are 1 to 16 masks per block")


@lru_cache(maxsize=256)
def decoding_layout(mode: str, k: int, drafts: tuple[int, ...], device: str = "cpu") -> Layout:
    """The layout of a decoding step. drafts[b]: how many drafts sequence b has to verify, 0 or more; k counts for nothing without masks."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; accepted are {', '.join(MODES)}")
    batch, most = len(drafts), max(drafts)
    if mode == "autoregressive":
        return Layout(most + 1, 1, torch.zeros(0, batch, dtype=torch.int64, device=device))
    _check_k(k)
    anchors = {"linear": [most], "quadratic": range(most + 1), "quadratic-printed": range(1, most + 1) if most else [0]}[mode]
    table = [[min(anchor, count) for count in drafts] for anchor in anchors]
    return Layout(most + 1, k, torch.tensor(table, dtype=torch.int64, device=device))


def prefill_layout(lengths: list[int], k: int, device: str | torch.device = "cpu") -> Layout:
    """Prompts of the given lengths, padded on the right, and a block after each one's last token (none if k is 0)."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompt lengths are {lengths}; accepted are one or more prompts of at least one token")
    if k == 0:
        return Layout(max(lengths), 1, torch.zeros(0, len(lengths), dtype=torch.int64, device=device))
    _check_k(k)
    return Layout(max(lengths), k, torch.tensor([[n - 1 for n in lengths]], device=device))


def training_layout(length: int, anchors: Tensor, k: int, first: Tensor | None = None) -> Layout:
    """Texts padded to `length` NTP rows and a block after each anchor; anchors: (A, B) int64, row numbers below length.

    first: (length, B) int64, where several documents stand in one sequence: the row at which each row's document begins.
    Documents do not see each other, and positions begin anew in each.
    """
    _check_k(k)
    if anchors.ndim != 2 or anchors.dtype != torch.int64:
        raise ValueError(f"anchors have shape {tuple(anchors.shape)}, {anchors.dtype}; accepted is (A, B) torch.int64")
    if anchors.numel() and not (0 <= int(anchors.min()) and int(anchors.max()) < length):
        raise ValueError(f"anchors lie in [{int(anchors.min())}, {int(anchors.max())}]; accepted are rows 0 to {length - 1}")
    if first is not None:
        rows = torch.arange(length, device=anchors.device).unsqueeze(1)
        if first.shape != (length, anchors.shape[1]) or first.dtype != torch.int64 or not bool(((first >= 0) & (first <= rows)).all()):
            raise ValueError(
                f"first has shape {tuple(first.shape)}, {first.dtype}; accepted is (length, B) = {(length, anchors.shape[1])} torch.int64, "
                "each entry from 0 to its own row"
            )
    return Layout(length, k, anchors, first)
