"""Training an adapter for a frozen base model. Interrupt it at any moment and resume to the same result, bit for bit.

What a step does depends only on the settings and its number, and everything that a step changes (adapter, AdamW's
moments) is in the checkpoint. On a CPU in float32, with the same number of threads, a resumed run is the uninterrupted
one; on a GPU the result is as reproducible as PyTorch's kernels.
"""

import dataclasses
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from mtp_model.checkpoint import save_adapter
from mtp_model.config import MTPConfig
from mtp_model.data import Example, batch_indices, collate
from mtp_model.loss import mtp_loss
from mtp_model.model import MTPModel

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the paper's recipe (arXiv 2507.11851, section 3), where it states one.

    steps: optimizer steps. batch_size: sequences per pass. accumulate: passes per step. lr: AdamW's, flat after
    `warmup` steps. decay: share of the steps, at the end, over which lr falls linearly to zero (paper: 0).
    weight_decay, clip: AdamW's, and the gradient norm's bound. anchors_per_sequence: masks after a random subset of that
    many positions (default: all). lcm_weight: of the consistency loss. mask_decay: weight of mask j is mask_decay ** (j-1).
    train_masks: learn the masks' embeddings too. seed: of the adapter's start, the order of data, the anchors.
    save_every, log_every: in steps; neither changes the result.
    """

    steps: int = 50_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 5_000
    decay: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    anchors_per_sequence: int | None = None
    lcm_weight: float = 1.0
    mask_decay: float = 1.0
    train_masks: bool = False
    seed: int = 0
    save_every: int = 200
    log_every: int = 10

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; accepted is 0 or more")
        if self.anchors_per_sequence is not None and self.anchors_per_sequence < 1:
            raise ValueError(f"anchors_per_sequence is {self.anchors_per_sequence}; accepted is 1 or more, or None")
        for name, low, high in (("lr", 0, math.inf), ("clip", 0, math.inf), ("mask_decay", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is above {low}" + (f", at most {high}" if high < math.inf else ""))
        for name, high in (("warmup", math.inf), ("decay", 1), ("weight_decay", math.inf), ("lcm_weight", math.inf)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is 0 or more" + (", at most 1" if high == 1 else ""))

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step` (from 0)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.steps * self.decay
        return self.lr * min(warm, (self.steps - step) / falling if falling else 1.0)


class Trainer:
    """A training run in the directory `out`: adapter, checkpoint and log. `run()` trains to the end or to an interruption.

    model: with or without an adapter; a fresh one of `mtp` is put on. resume: continue the run that `out` holds.
    Raises ValueError if `out` holds a run and `resume` is False, or one with other settings.
    """

    def __init__(self, model: MTPModel, examples: list[Example], mtp: MTPConfig, config: TrainConfig, out: str | Path,
                 *, resume: bool = False, notes: dict | None = None):  # fmt: skip
        self.model, self.examples, self.config, self.out = model, examples, config, Path(out)
        self.notes = notes or {}
        if model.mtp is not None:
            model.remove_adapter()
        model.add_adapter(mtp, seed=config.seed, dtype=torch.float32, train_masks=config.train_masks)
        self.parameters = {n: p for n, p in model.adapter_parameters().items() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )  # fmt: skip
        self.step, self.seconds, self.mask_rows = 0, 0.0, 0
        # What decides the result; a run resumed under other settings would be neither run.
        free = {"save_every", "log_every"}
        self.identity = {k: v for k, v in asdict(config).items() if k not in free} | {
            "mtp": asdict(mtp), "base": model.fingerprint, "examples": len(examples),
            "tokens": int(sum(len(e.ids) for e in examples)),
        }  # fmt: skip
        checkpoint = self.out / CHECKPOINT
        if checkpoint.exists():
            if not resume:
                raise ValueError(f"{self.out} holds a run already; resume it, or choose another directory")
            self._load(checkpoint)
        self.out.mkdir(parents=True, exist_ok=True)
        self._trim_log()

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            before = state["identity"]
            changed = [f"{k}: {before.get(k)!r}, now {v!r}" for k, v in self.identity.items() if before.get(k) != v]
            if changed:
                raise ValueError(f"{path} is of a run with other settings ({'; '.join(changed)}); accepted are the same ones")
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(file.get_tensor(f"parameter/{name}"))
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(state["step"])),
                        "exp_avg": file.get_tensor(f"exp_avg/{name}").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(parameter.device),
                    }
        self.step, self.seconds, self.mask_rows = state["step"], state["seconds"], state["mask_rows"]

    def save(self) -> None:
        """Write the checkpoint, then the adapter as it stands. Each file is replaced whole."""
        tensors = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter) or {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}
            tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
            tensors[f"exp_avg/{name}"] = moments["exp_avg"].cpu().contiguous()
            tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"].cpu().contiguous()
        state = {"step": self.step, "seconds": self.seconds, "mask_rows": self.mask_rows, "identity": self.identity}
        temporary = self.out / (CHECKPOINT + ".tmp")
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})
        os.replace(temporary, self.out / CHECKPOINT)
        training = asdict(self.config) | {"steps_done": self.step, "mask_rows": self.mask_rows}
        save_adapter(self.model, self.out, self.notes | {"training": training})

    def _trim_log(self) -> None:
        """Drop log lines of steps after the checkpoint: they will be made again."""
        path = self.out / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= self.step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in lines))
            os.replace(temporary, path)

    def train_step(self) -> dict:
        """One optimizer step; returns the log record."""
        config = self.config
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        records = []
        for micro in range(config.accumulate):
            number = self.step * config.accumulate + micro
            picked = batch_indices(len(self.examples), config.batch_size, number, config.seed)
            batch = collate([self.examples[i] for i in picked], self.model.device)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            losses = mtp_loss(
                self.model, batch, anchors_per_sequence=config.anchors_per_sequence, generator=generator,
                lcm_weight=config.lcm_weight, mask_decay=config.mask_decay,
            )  # fmt: skip
            (losses.total / config.accumulate).backward()
            records.append(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - began
        self.mask_rows += sum(r.rows for r in records)

        def mean(values):
            return sum(values) / len(values)

        record = {"step": self.step, "loss": mean([float(r.total.detach()) for r in records])}
        record |= {name: mean([getattr(r, name) for r in records]) for name in ("ntp", "base", "sampler", "lcm")}
        for name in ("right_base", "right_sampler"):
            record[name] = [round(mean(column), 4) for column in zip(*(getattr(r, name) for r in records), strict=True)]
        record |= {"lr": config.lr_at(self.step - 1), "grad_norm": float(norm), "mask_rows": self.mask_rows}
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss is {record['loss']} at step {self.step}; the last checkpoint is kept")
        return record | {"seconds": round(self.seconds, 2)}

    def run(self) -> bool:
        """Train; returns whether the last step was reached. Ctrl-C or SIGTERM ends it after the step under way, saved."""
        stop: list[int] = []
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                handlers[number] = signal.signal(number, lambda n, _: stop.append(n))
            except ValueError:  # not in the main thread: the caller keeps the signals
                break
        try:
            with open(self.out / LOG, "a", buffering=1, encoding="utf-8") as log:
                bar = tqdm(total=self.config.steps, initial=self.step, desc="train", unit="step", mininterval=2)
                while self.step < self.config.steps and not stop:
                    record = self.train_step()
                    bar.update()
                    if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                        log.write(json.dumps(record) + "\n")
                        right = record["right_sampler"] or record["right_base"]
                        bar.set_postfix(
                            loss=f"{record['loss']:.3f}", base=f"{record['base']:.2f}", sampler=f"{record['sampler']:.2f}",
                            lcm=f"{record['lcm']:.2f}", right=" ".join(f"{100 * r:.0f}" for r in right) + " %",
                        )  # fmt: skip
                    if self.step % self.config.save_every == 0:
                        self.save()
                bar.close()
            self.save()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.step >= self.config.steps


def field_defaults() -> dict:
    """TrainConfig's defaults by name."""
    return {f.name: f.default for f in dataclasses.fields(TrainConfig)}
