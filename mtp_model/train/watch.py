"""What a run shows while it goes on: progress bar, log, TensorBoard where it is installed, held-out decoding."""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mtp_model.decode import generate
from mtp_model.model import MTPModel
from mtp_model.train.parallel import World

try:
    import resource
except ImportError:  # Windows
    resource = None

LOG = "log.jsonl"


class _Interrupted(Exception):
    pass


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation by real decoding, every `every` steps and at the end: how many tokens per step the adapter gives.

    prompts: token ids. mode, k, max_new_tokens: see `mtp_model.Decoding`. batch: prompts decoded side by side.
    """

    prompts: tuple[tuple[int, ...], ...]
    every: int
    mode: str = "quadratic"
    k: int | None = None
    max_new_tokens: int = 100
    batch: int = 8

    def __post_init__(self):
        if not self.prompts or not all(self.prompts):
            raise ValueError("the evaluation has no prompts, or an empty one; accepted are one or more of at least a token")
        for name in ("every", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"the evaluation's {name} is {getattr(self, name)}; accepted is 1 or more")

    def run(self, model: MTPModel, world: World, interrupted: Callable[[], object] = lambda: False) -> dict | None:
        """Tokens per step, pooled and as the mean over prompts. Data-parallel processes share the prompts; sharded ones,
        which can only run together, all decode all of them. None if it was interrupted, which a process by itself asks about at every step."""

        def go_on(_) -> None:
            if world.size == 1 and interrupted():
                raise _Interrupted

        apart = world.size > 1 and not world.sharded
        prompts = self.prompts[world.rank :: world.size] if apart else self.prompts
        training = model.training
        model.eval()
        tokens, passes, mean = 0, 0, 0.0
        try:
            for i in range(0, len(prompts), self.batch):
                stats = generate(
                    model, prompts[i : i + self.batch], mode=self.mode, k=self.k, max_new_tokens=self.max_new_tokens, on_tokens=go_on,
                    static=False if world.sharded else None,  # gathering a layer is no part of a captured step
                ).stats  # fmt: skip
                tokens, passes = tokens + sum(stats.tokens), passes + sum(stats.passes)
                mean += sum(t / p for t, p in zip(stats.tokens, stats.passes, strict=True))
        except _Interrupted:
            return None
        finally:
            model.kept_steps.clear()  # their memory is the training's
            model.train(training)
        sums = torch.tensor([tokens, passes, mean], dtype=torch.float64)
        tokens, passes, mean = (world.all_sum(sums) if apart else sums).tolist()
        return {
            "tokens_per_step": round(tokens / passes, 4), "mean_tokens_per_step": round(mean / len(self.prompts), 4),
            "prompts": len(self.prompts), "tokens": int(tokens), "mode": self.mode, "k": self.k or model.mtp.num_masks,
        }  # fmt: skip


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held: allocated on a GPU, resident on a CPU; nan where the system does not say. In MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def trim_log(path: Path, step: int) -> None:
    """Drop log lines of later steps than the checkpoint's: they will be made again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)


def _known(value):
    """A record for JSON, which has no nan: null in its place."""
    if isinstance(value, dict):
        return {name: _known(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Watch:
    """A run's outlets, as a context. On other processes than the first it shows and writes nothing."""

    def __init__(self, out: Path, steps: int, done: int, world: World):
        self.silent = world.rank != 0
        self.bar = tqdm(total=steps, initial=done, desc="train", unit="step", mininterval=2, disable=self.silent)
        self.log = None if self.silent else open(out / LOG, "a", buffering=1, encoding="utf-8")
        self.board = None
        if not self.silent and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        for outlet in (self.log, self.board):
            if outlet is not None:
                outlet.close()

    def step(self, record: dict, write: bool) -> None:
        """A step was done; `write`: its record belongs into the log."""
        self.bar.update()
        if not write:
            return
        self._write(record)
        right = " ".join("-" if math.isnan(share) else f"{100 * share:.0f}" for share in record["right_sampler"] or record["right_base"])
        losses = {"loss": 3, "base": 2, "sampler": 2, "lcm": 2}
        told = [f"{name} {record[name]:.{digits}f}" for name, digits in losses.items() if not math.isnan(record[name])]
        told += [f"right {right} %", f"{record['tokens_per_second']:.0f} tokens/s", f"{record['memory_mib']:.0f} MiB"]
        self.bar.set_postfix_str(", ".join(told))

    def evaluated(self, step: int, seconds: float, values: dict) -> None:
        self._write({"step": step, "seconds": round(seconds, 2), "evaluation": values})
        if not self.silent:
            self.bar.write(f"step {step}: {values['tokens_per_step']:.3f} tokens per step on {values['prompts']} held-out prompts")

    def _write(self, record: dict) -> None:
        if self.silent:
            return
        self.log.write(json.dumps(_known(record)) + "\n")
        if self.board is not None:
            for name, value in (record | record.get("evaluation", {})).items():
                for i, number in enumerate(value if isinstance(value, list) else [value], 1):
                    if isinstance(number, (int, float)) and name != "step":
                        self.board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, record["step"])
