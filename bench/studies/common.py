"""What the studies share: flags, model and data, trainings that may be interrupted, decoding, and how results are written.

Each training has a directory of its own under --work, named after all that decides its result, and each decoding is noted there
until the study is done: the same command goes on where it was stopped, and a changed setting repeats only what it changes.
"""

import hashlib
import json
import os
import re
import shutil
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from bench.decode import acceptance
from bench.report import shown
from mtp_model import MTPConfig, TrainConfig, load_adapter
from mtp_model.arguments import add_model_arguments, load_asked_model, load_tokenizer
from mtp_model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mtp_model.data import Examples, read_examples
from mtp_model.demo import ABLATION, ADAPTER, HELD_OUT
from mtp_model.records import read_prompts
from mtp_model.train import LOG, Evaluation, Trainer

FLAGS = {
    "adapter": dict(type=Path, default=ADAPTER, metavar="DIR", help="trained adapter (default: the demo's)"),
    "pair": dict(type=Path, nargs=2, default=ABLATION, metavar="DIR", help="adapters trained with and without LCM, alike in all else (default: the demo's)"),
    "data": dict(type=Path, default=Path("runs/data/answers.jsonl"), metavar="FILE", help="the model's own continuations, which "
                 "`python -m mtp_model.demo.answers --model DIR --out runs/data` writes (default: %(default)s)"),
    "source": dict(type=Path, default=Path("runs/data/source.jsonl"), metavar="FILE", help="source text, which stands beside them (default: %(default)s)"),
    "held_out": dict(type=Path, default=HELD_OUT, metavar="FILE", help='JSON lines of {"prompt": text} (default: held-out source)'),
    "prompts": dict(type=int, default=32, metavar="N", help="held-out prompts (default %(default)s)"),
    "new_tokens": dict(type=int, default=100, metavar="N", help="tokens written for each (default %(default)s)"),
    "batch_size": dict(type=int, default=8, metavar="N", help="sequences per training step (default %(default)s)"),
    "anchors": dict(type=int, default=24, metavar="N", help="anchors per sequence (default %(default)s)"),
    "max_length": dict(type=int, default=320, metavar="N", help="longer training sequences are cut (default %(default)s)"),
    "lr": dict(type=float, default=3e-3, help="learning rate after 30 steps, falling to zero over the last half (default %(default)s)"),
    "rank": dict(type=int, default=32, metavar="R", help="LoRA rank (default %(default)s)"),
    "masks": dict(type=int, default=8, metavar="K", help="masks per block (default %(default)s)"),
    "seeds": dict(type=int, default=1, metavar="N", help="trainings of each kind, from seeds 0 to N - 1 (default %(default)s)"),
    "rounds": dict(type=int, default=5, metavar="N", help="rounds of four steps by which a step's time is told (default %(default)s)"),
    "ranks": dict(type=int, nargs="+", default=[1, 4, 16, 64, 128], metavar="R", help="default: 1 4 16 64 128"),
    "k": dict(type=int, nargs="+", metavar="K", help="masks per block (default: 1 to the adapter's)"),
    "lookup": dict(type=int, default=10, metavar="N", help="tokens that are copied (default %(default)s)"),
    "candidates": dict(type=int, nargs="+", default=[64, 32, 16, 8], metavar="C", help="tokens on the sampler's list, beside all (default: 64 32 16 8)"),
    "temperatures": dict(type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0], metavar="T", help="beside 0, greedy text (default: %(default)s)"),
    "variants": dict(nargs="+", metavar="NAME", help="some of the recipes, beside plain (default: all)"),
    "seed": dict(type=int, default=0, help="which prompts are picked, or of the placeholder masks (default %(default)s)"),
}  # fmt: skip
TRAINING = ("data", "held_out", "prompts", "new_tokens", "batch_size", "anchors", "max_length", "lr", "masks", "rounds")
BUDGET = ("steps", "seconds")
DECODE_BATCH = 8  # prompts side by side; a text and its passes are the same in any batch


def add_arguments(parser: ArgumentParser, names: tuple[str, ...], sizes: dict) -> None:
    """The flags of those names and what every study has; sizes: the study's own defaults."""
    add_model_arguments(parser)
    for name in names:
        parser.add_argument("--" + name.replace("_", "-"), **FLAGS[name])
    if "data" in names:

        def usual(name):
            return f" (default {sizes[name]})" if name in sizes else ""

        budget = parser.add_mutually_exclusive_group()
        budget.add_argument("--steps", type=int, metavar="N", help="length of a training (of the plain one, where all get equal time)" + usual("steps"))
        budget.add_argument("--seconds", type=float, metavar="S", help="the same in CPU seconds (on a GPU: seconds)" + usual("seconds"))
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), metavar="DIR", help="for trainings and what is half done (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for NAME.json and NAME.png (default: bench/results/<cpu or GPU>/studies)")
    parser.set_defaults(**{name: value for name, value in sizes.items() if name not in BUDGET})
    parser.add_argument("--quick", action="store_true", help="a smoke run at tiny size, unless sizes are named; written to WORK/quick")


def check(args: Namespace) -> None:
    """Raises ValueError for a number out of range, before any work."""
    for name in ("prompts", "new_tokens", "batch_size", "anchors", "seeds", "rounds", "steps", "seconds"):
        value = getattr(args, name, None)
        if value is not None and (value < 1 if name != "seconds" else value <= 0):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted is {'1 or more' if name != 'seconds' else 'above 0'}")


def digest(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def results_directory(device: torch.device, name: str) -> Path:
    """Where results of that kind of device belong in a checkout."""
    place = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", name.lower()).strip("-")
    return Path(__file__).parents[1] / "results" / place / "studies"


@dataclass
class Result:
    """What a study found. values: for the JSON. text: the tables. notes: sentences below them. draw(figure): the picture.
    good: False if something that must hold does not."""

    values: dict
    text: str
    notes: list[str] = field(default_factory=list)
    draw: Callable | None = None
    size: tuple[float, float] = (9, 3.6)
    good: bool = True


class Study:
    """A study under way: the model with its tokenizer and held-out prompts, and what is done with them.

    The model carries the adapter that was last asked for; base weights are never changed.
    """

    def __init__(self, name: str, args: Namespace):
        self.name, self.args, self.work = name, args, args.work / name
        self.model, self.tokenizer = load_asked_model(args), load_tokenizer(args.model)
        self.base_parameters = sum(p.numel() for p in self.model.parameters())

    @cached_property
    def prompts(self) -> list[list[int]]:
        return read_prompts([self.args.held_out], self.tokenizer, vocab_size=self.model.config.vocab_size, limit=self.args.prompts)

    def use(self, adapter: Path):
        """The model with the adapter of that directory."""
        self.model.remove_adapter()
        return load_adapter(adapter).apply(self.model, self.model.dtype)

    def examples(self, path: Path) -> Examples:
        if not path.is_file():
            raise ValueError(f"training data {path} is not a file; `python -m mtp_model.demo.answers --model {shown(self.args.model)} --out DIR` writes "
                             "answers.jsonl and source.jsonl")  # fmt: skip
        config, length = self.model.config, self.args.max_length
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
        return read_examples([path], self.tokenizer, max_length=length, vocab_size=config.vocab_size, eos=eos)

    def recipe(self, **changes) -> TrainConfig:
        """The plain recipe with the flags' sizes. steps is to be given."""
        args = self.args
        usual = dict(batch_size=args.batch_size, lr=args.lr, warmup=30, decay=0.5, anchors_per_sequence=args.anchors, save_every=50)
        return TrainConfig(**usual | changes)

    def train(self, label: str, mtp: MTPConfig, config: TrainConfig, examples: Examples, evaluation: Evaluation | None = None) -> Path:
        """The directory of that training, done now as far as it was not. Raises KeyboardInterrupt if it is stopped, its state kept."""
        identity = [asdict(mtp), asdict(config), examples.fingerprint, self.model.fingerprint, str(self.model.dtype), repr(evaluation)]
        out = self.work / f"{label}-{digest(identity)}"
        if (out / ADAPTER_CONFIG).exists() and load_adapter(out).notes["training"]["steps_done"] == config.steps:
            tqdm.write(f"{label}: {config.steps} steps, trained before in {out}")
            return out
        tqdm.write(f"{label}: {config.steps} steps in {out}")
        trainer = Trainer(self.model, examples, mtp, config, out, resume=True, notes={"study": self.name, "run": label}, evaluation=evaluation)
        if not trainer.run():
            raise KeyboardInterrupt
        return out

    def log(self, run: Path) -> list[dict]:
        return [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]

    def seconds_per_step(self, kinds: dict[str, tuple[MTPConfig, TrainConfig, Examples]]) -> dict[str, float]:
        """CPU seconds (on a GPU: seconds) of a training step of each kind: the median over rounds in which all kinds take turns."""
        identity = [self.args.rounds, {name: (asdict(m), asdict(c), e.fingerprint) for name, (m, c, e) in kinds.items()}, str(self.model.device)]
        return self.once("seconds per step", identity, lambda: self._calibrate(kinds), keep=True)  # it decides lengths: once told, told for good

    def _calibrate(self, kinds: dict[str, tuple[MTPConfig, TrainConfig, Examples]]) -> dict[str, float]:
        costs: dict[str, list[float]] = {name: [] for name in kinds}
        bar = tqdm(total=self.args.rounds * len(kinds), desc="time per step", disable=None)
        for number in range(self.args.rounds):
            for name, (mtp, config, examples) in kinds.items():
                with TemporaryDirectory() as scratch:
                    trainer = Trainer(self.model, examples, mtp, replace(config, steps=1000, seed=1000 + number), scratch)
                    trainer.train_step()  # the first one allocates
                    began = self.clock()
                    for _ in range(4):
                        trainer.train_step()
                    costs[name].append((self.clock() - began) / 4)
                bar.update()
        bar.close()
        return {name: statistics.median(values) for name, values in costs.items()}

    def clock(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def steps(self, mtp: MTPConfig, config: TrainConfig, examples: Examples) -> int:
        """How many steps --steps or --seconds says."""
        if self.args.steps:
            return self.args.steps
        return max(1, round(self.args.seconds / self.seconds_per_step({"step": (mtp, config, examples)})["step"]))

    def tokens_per_step(
        self, adapter: Path, k: int, prompts: list[list[int]] | None = None, mode: str = "quadratic", use_sampler: bool = True, **options
    ) -> dict:
        """`bench.decode.acceptance` of the held-out prompts, or of others, with that adapter."""
        prompts = prompts or self.prompts
        weights = hashlib.sha256((adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
        identity = [weights, self.model.fingerprint, str(self.model.dtype), prompts, self.args.new_tokens, mode, k, use_sampler, options]

        def decode():
            return acceptance(self.use(adapter), prompts, self.args.new_tokens, mode, k, use_sampler, DECODE_BATCH, **options)

        return self.once(f"decoding {adapter.name}", identity, decode)

    def once(self, what: str, identity: list, compute: Callable, keep: bool = False):
        """compute(), or what it gave before an interruption of this study; keep: or at any time before."""
        path = self.work / ("kept" if keep else "done") / f"{digest([what, identity])}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, path)
        return value

    def finished(self) -> None:
        """The study is written down: what it measured is measured anew the next time. Trainings and their lengths stay."""
        shutil.rmtree(self.work / "done", ignore_errors=True)
