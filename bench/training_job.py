"""A training step as a benchmark runs it: the model, its batches, the ways to compute the loss, and how they are held against float64."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from bench.plain_training import flex, plain_loss
from mtp_model.checkpoint import load_model
from mtp_model.config import ModelConfig, MTPConfig
from mtp_model.data import Batch, Example, collate
from mtp_model.demo import BASE, HELD_OUT
from mtp_model.loss import choose_anchors, mtp_loss, report
from mtp_model.model import MTPModel

BATCHES = 3  # different ones, in turn
ROUNDING = 1e-4  # of float32, as a share of a gradient's largest value; sound ways are at some 1e-6
ROUNDING_16 = 2e-2  # of a whole model's losses in 16 bits
DEMO = "demo"
def _llama3(factor: float, **sizes) -> ModelConfig:
    """A Llama 3 of these sizes; factor: its rope scaling's."""
    return ModelConfig(
        vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, **sizes,
        rope_scaling=dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    )  # fmt: skip


CONFIGS = {
    "Llama-3.2-1B": _llama3(32.0, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True),
    "Llama-3.1-8B": _llama3(8.0, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128),
    "Qwen3-4B": ModelConfig(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, qk_norm=True,
    ),
}


@dataclass(frozen=True)
class Way:
    """A way to compute a training step's loss. loss: (model, batch, anchors, **recipe) -> (total, the numbers of `mtp_loss`'s report)."""

    name: str
    loss: Callable[..., tuple[Tensor, dict[str, float]]]
    recompute: bool = False
    on_cpu: bool = True


def our_loss(model: MTPModel, batch: Batch, anchors: tuple[Tensor, Tensor], **recipe) -> tuple[Tensor, dict[str, float]]:
    losses = mtp_loss(model, batch, anchors=anchors, **recipe)
    numbers = report(losses.sums, model.sampler is not None)
    return losses.total, {name: getattr(numbers, name) for name in ("loss", "ntp", "base", "sampler", "lcm")}


def flex_loss(*args, **recipe) -> tuple[Tensor, dict[str, float]]:
    return plain_loss(*args, **recipe, attention=flex)


PLAIN = "plain"
WAYS = {
    way.name: way
    for way in (Way("ours", our_loss), Way("ours-recompute", our_loss, recompute=True), Way(PLAIN, plain_loss), Way("flex", flex_loss, on_cpu=False))
}


@dataclass(frozen=True)
class Case:
    """What is trained. anchors: per sequence, a random subset; None: every position."""

    shape: str
    batch_size: int
    length: int
    anchors: int | None
    masks: int
    rank: int


def make_model(case: Case, device: torch.device, dtype: torch.dtype, implementation: str | None, config: ModelConfig | None = None) -> MTPModel:
    """The demo model, or random weights; and an adapter whose B is not zero, so that every gradient is at work. Masks are trained too."""
    if config is None and case.shape == DEMO:
        model = load_model(BASE, device=device, dtype=dtype, implementation=implementation)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MTPModel(config or CONFIGS[case.shape], device=device, dtype=dtype, implementation=implementation).eval()
    model.add_adapter(MTPConfig(case.masks, case.rank), dtype=torch.float32, train_masks=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def held_out_tokens() -> np.ndarray:
    """The held-out prompts of the demo one behind the other."""
    from tokenizers import Tokenizer  # transformers' would be most of a small process's memory

    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    texts = [json.loads(line)["prompt"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    return np.array([token for text in texts for token in tokenizer.encode(text).ids], np.int32)


def make_batches(case: Case, vocab_size: int, device: torch.device, how_many: int = BATCHES) -> list[tuple[Batch, tuple[Tensor, Tensor]]]:
    """Batches with their anchors. Lengths are 3/4 of the case's and more, one sequence of each batch has all of it; every token bears a loss."""
    rng, batches = np.random.default_rng(0), []
    text = held_out_tokens() if case.shape == DEMO else rng.integers(0, vocab_size, case.length * case.batch_size, dtype=np.int32)
    start = 0
    for number in range(how_many):
        lengths = [case.length, *rng.integers(math.ceil(case.length * 0.75), case.length + 1, case.batch_size - 1).tolist()]
        examples = []
        for n in lengths:
            examples.append(Example(text.take(range(start, start + n), mode="wrap"), np.ones(n, bool)))
            start += n
        batch = collate(examples, device)
        batches.append((batch, choose_anchors(batch, case.anchors, torch.Generator().manual_seed(number))))
    return batches


class Job:
    """Training steps of a model on batches in turn: forward, backward and AdamW's update, with the loss computed any way."""

    def __init__(self, model: MTPModel, batches: list[tuple[Batch, tuple[Tensor, Tensor]]], recipe: dict):
        self.model, self.batches, self.recipe = model, batches, recipe
        # A rate of 0 takes as long as any: the ways share the parameters, and none is to train away from what the others find.
        self.optimizer = torch.optim.AdamW(list(model.adapter_parameters().values()), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def gradients(self, way: Way, number: int = 0) -> dict[str, float]:
        """Forward and backward of a batch; returns the reported losses."""
        self.model.recompute_activations(way.recompute)
        batch, anchors = self.batches[number % len(self.batches)]
        total, numbers = way.loss(self.model, batch, anchors, **self.recipe)
        total.backward()
        return numbers

    def step(self, way: Way, number: int = 0) -> dict[str, float]:
        numbers = self.gradients(way, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return numbers

    def steps(self, way: Way) -> Callable[[], object]:
        """What makes one step on the next batch with each call, from the first on."""
        numbers = count()
        return lambda: self.step(way, next(numbers))

    @property
    def tokens(self) -> float:
        """NTP tokens of a batch, on average."""
        return sum(int(batch.lengths.sum()) for batch, _ in self.batches) / len(self.batches)

    @property
    def mask_rows(self) -> float:
        return sum(int(real.sum()) for _, (_, real) in self.batches) * self.model.mtp.num_masks / len(self.batches)


def found(job: Job, way: Way) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses and the adapter's gradients of the job's first batch, in float64."""
    try:
        numbers = job.gradients(way)
        return numbers, {name: p.grad.double() for name, p in job.model.adapter_parameters().items()}
    finally:
        job.optimizer.zero_grad(set_to_none=True)


def check(model: MTPModel, case: Case, recipe: dict, ways: list[Way]) -> dict[str, tuple[bool, float]]:
    """For each way, whether its losses and gradients are right, and their largest error.

    Right is the plain way in float64. An error is a difference as a share of the loss, or of the gradient's largest value. In
    float32 it must be within `ROUNDING`; in 16 bits at most twice the plain way's, in the same dtype, of that very number.
    """
    batches = make_batches(case, model.config.vocab_size, model.device, 1)
    wide = copy.deepcopy(model).double()
    exact = found(Job(wide, batches, recipe), Way("exact", plain_loss))
    del wide
    job, known = Job(model, batches, recipe), {}

    def errors(way: Way) -> list[float]:
        if way.name not in known:
            numbers, gradients = found(job, way)
            scalars = [abs(numbers[name] - value) / max(abs(value), 1e-30) for name, value in exact[0].items()]
            known[way.name] = scalars + [float((gradients[name] - g).abs().max() / g.abs().max()) for name, g in exact[1].items()]
        return known[way.name]

    results = {}
    for way in ways:
        each = errors(way)
        if model.dtype.itemsize >= 4:
            limits = [ROUNDING] * len(each)
        else:
            step = torch.finfo(model.dtype).eps
            limits = [2 * error + step for error in errors(Way("plain formula", plain_loss))]
        results[way.name] = all(error <= limit for error, limit in zip(each, limits, strict=True)), max(each)  # NaN is within no limit
    return results


def agree(numbers: dict[str, float], others: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether two ways report the same losses of a batch of the full size, where float64 has no room."""
    limit = ROUNDING if dtype.itemsize >= 4 else ROUNDING_16
    return all(abs(numbers[name] - other) <= limit * abs(other) for name, other in others.items())


def check_case(case: Case) -> tuple[Case, ModelConfig | None]:
    """A case small enough for float64: a few sequences of the demo; of other shapes two layers and a small vocabulary."""
    if case.shape == DEMO:
        return replace(case, batch_size=min(case.batch_size, 2)), None
    config = replace(CONFIGS[case.shape], num_hidden_layers=2, vocab_size=2048)
    return replace(case, batch_size=min(case.batch_size, 2), length=min(case.length, 48)), config
