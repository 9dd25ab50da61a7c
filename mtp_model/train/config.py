"""The settings of a training run: the paper's recipe, and what can be done better, each one field."""

import math
import sys
from dataclasses import dataclass

LARGEST = sys.float_info.max
SEEDS = 2**40  # a pass's generator has a seed made of the run's and its own number


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the paper's recipe (arXiv 2507.11851, section 3), where it states one.

    steps: optimizer steps. batch_size: sequences per pass, of all processes together. accumulate: passes per step. lr: AdamW's,
    flat after `warmup` steps (default: a tenth of the steps, the paper's 5,000 of 50,000). decay: share of the steps, at the end,
    over which lr falls linearly to zero (paper: 0; linear decay as in Defazio et al. 2023, arXiv 2310.07831).
    weight_decay, clip: AdamW's, and the gradient norm's bound.
    anchors_per_sequence: masks after a random subset of that many positions (default: all, the paper's; PARD, An et al. 2025,
    arXiv 2504.18583, drops draft tokens in training alike).
    drop_masks: share of the passes that train only the first j masks, j uniform from 1 to k - 1 (nested dropout, Rippel et al. 2014,
    arXiv 1402.0915): early masks decide how often a draft's prefix holds. lcm_weight: of the consistency loss.
    mask_decay: mask j weighs mask_decay ** (j - 1), as Medusa weighs its heads (Cai et al. 2024, arXiv 2401.10774, section 2.2.1).
    soft_targets: share of the frozen model's own next-token distribution in the targets, the rest is the token of the data
    (distillation, Hinton et al. 2015, arXiv 1503.02531; the distribution comes from the same pass).
    train_masks: learn the masks' embeddings too (prompt tuning, Lester et al. 2021, arXiv 2104.08691; the paper freezes them).
    pack_length: put documents together into sequences of up to that many tokens; they do not see each other (default: one each).
    buckets: make batches of sequences of like length.
    recompute: activation checkpointing, see `MTPModel.recompute_activations`. seed: of the adapter's start, the order of data, the anchors.
    save_every, log_every: in steps; neither changes the result.
    """

    steps: int = 50_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int | None = None
    decay: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    anchors_per_sequence: int | None = None
    drop_masks: float = 0.0
    lcm_weight: float = 1.0
    mask_decay: float = 1.0
    soft_targets: float = 0.0
    train_masks: bool = False
    pack_length: int | None = None
    buckets: bool = False
    recompute: bool = False
    seed: int = 0
    save_every: int = 200
    log_every: int = 10

    def __post_init__(self):
        if self.warmup is None:
            object.__setattr__(self, "warmup", int(self.steps) // 10)
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every", "seed", "warmup", "anchors_per_sequence", "pack_length"):
            if type(getattr(self, name)) not in (int, type(self.__dataclass_fields__[name].default)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is an integer")
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is 1 or more")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed is {self.seed}; accepted are 0 to {SEEDS - 1}")
        for name, least in (("anchors_per_sequence", 1), ("pack_length", 3)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is {least} or more, or None")
        for name, high in (("lr", LARGEST), ("clip", math.inf), ("mask_decay", 1)):
            if not 0 < getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is above 0, at most {high}")
        for name, high in (
            ("warmup", LARGEST), ("decay", 1), ("weight_decay", LARGEST), ("lcm_weight", LARGEST), ("soft_targets", 1), ("drop_masks", 1),
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted are 0 to {high}")

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step` (from 0)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.steps * self.decay
        return self.lr * min(warm, (self.steps - step) / falling if falling else 1.0)
