"""The frozen model's own answers to the prompts of a data set: training data that says what the model itself will say.

An adapter learns to foresee the model that it is for, so its own continuations fit better than anybody else's text (self-distillation, as
Medusa trains its heads: Cai et al. 2024, arXiv 2401.10774, section 2.3.2). They are greedy, or drawn, for an adapter that is to foresee drawn
text, and are written with this package's own decoding: several tokens per step once there is an adapter, and the same text without one.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mtp_model.arguments import add_lookup_arguments, add_sampling_arguments, lookup_options, refuse_masks, sampling_options
from mtp_model.decode import SEEDS, generate, sampling_of
from mtp_model.layout import MODES
from mtp_model.lookup import lookup_of
from mtp_model.model import MTPModel
from mtp_model.records import read_prompts


@dataclass(frozen=True)
class AnswerOptions:
    """batch: prompts decoded side by side. The others: see `mtp_model.Decoding`; the text does not depend on batch, mode, k and lookup.
    seed: the first prompt's, prompt i has seed + i; default 0."""

    batch: int = 16
    mode: str = "autoregressive"
    k: int | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    lookup: int | None = None
    lookup_match: int | None = None

    def __post_init__(self):
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is 1 or more")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; accepted are {', '.join(MODES)}")
        lookup_of(self.lookup, self.lookup_match)
        if sampling_of(self.temperature, self.top_k, self.top_p, self.min_p, self.seed) and self.seed is None:
            object.__setattr__(self, "seed", 0)
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < SEEDS):
            raise ValueError(f"seed is {self.seed!r}; accepted is an integer from 0 to 2^63 - 1")

    @property
    def text(self) -> list:
        """What, beside the model, decides an answer's text, by which lines are told from those of other settings."""
        if not self.temperature:
            return [self.max_new_tokens]
        return [self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed] + ([self.min_p] if self.min_p else [])

    def decoding(self, first: int) -> dict:
        """What `Decoding` takes for prompts from number `first` on."""
        drawn = {}
        if self.temperature:
            drawn = dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=(self.seed + first) % SEEDS)
        return dict(mode=self.mode, k=self.k, max_new_tokens=self.max_new_tokens, lookup=self.lookup, lookup_match=self.lookup_match) | drawn


def write_answers(model: MTPModel, prompts: list[list[int]], out: str | Path, options: AnswerOptions) -> Iterator[int]:
    """Write a line {"prompt_ids", "response_ids", "by"} for each prompt to `out`, in order; yields how many lines stand after each batch.

    by: the model's fingerprint, its dtype and the options that decide the answer. A file that holds some lines already is continued; what an
    interruption cut off is written again. Raises ValueError, and changes nothing, if its lines are not this model's answers to these prompts,
    and for a model with an ungated adapter, which writes another text.
    """
    if model.mtp is not None and not model.mtp.gated:
        raise ValueError("the adapter is not gated, so the text would not be the frozen model's own; accepted is a gated adapter, or none")
    out, by = Path(out), [model.fingerprint, str(model.dtype).removeprefix("torch."), *options.text]
    done = _answered(out, prompts, by) if out.exists() else 0
    yield done
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        for first in range(done, len(prompts), options.batch):
            batch = prompts[first : first + options.batch]
            tokens = generate(model, batch, **options.decoding(first)).tokens
            lines = [json.dumps({"prompt_ids": p, "response_ids": t, "by": by}) + "\n" for p, t in zip(batch, tokens, strict=True)]
            file.write("".join(lines))
            file.flush()
            yield first + len(batch)


def _answered(out: Path, prompts: list[list[int]], by: list) -> int:
    """How many prompts `out` answers; a last line that was cut off is removed."""
    whole, count = 0, 0
    with open(out, "rb") as file:
        for line in file:
            prompt = prompts[count] if count < len(prompts) else None
            cut_off = not line.endswith(b"\n")
            if cut_off:
                begins = json.dumps({"prompt_ids": prompt})[:-1].encode()
                same = line.startswith(begins[: len(line)])
            else:
                try:
                    record = json.loads(line)
                    same = record["prompt_ids"] == prompt and record["by"] == by
                except (ValueError, TypeError, KeyError):
                    same = False
            if not same:
                raise ValueError(
                    f"{out}, line {count + 1} is not this model's answer to prompt {count + 1} in {by[1]} with {by[2]} new tokens at most"
                    + (f" and temperature, top_k, top_p, seed{', min_p' * (len(by) > 7)} {by[3:]}" if by[3:] else "")
                    + "; accepted is a new file, or one that the same model, dtype, prompts and options began"
                )
            if cut_off:
                break
            whole, count = whole + len(line), count + 1
    os.truncate(out, whole)
    return count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="write several tokens per step with this adapter; the text is the same")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lines or parquet, as for train; answers in it are left out")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines to write, or to go on with")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts (default: all)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help='tokens of a {"text"} that are its prompt (default 32)')
    parser.add_argument("--batch", type=int, default=AnswerOptions.batch, help="prompts decoded side by side (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=AnswerOptions.max_new_tokens, help="default %(default)s")
    add_lookup_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, help="of what is drawn for the first prompt; prompt i has SEED + i (default 0)")
    parser.add_argument("--mode", choices=MODES, help="default: linear with an adapter, autoregressive without")
    parser.add_argument("--k", type=int, help="masks per block (default: the adapter's)")


def run(args, model: MTPModel, tokenizer) -> int:
    mode = args.mode or ("linear" if args.adapter else "autoregressive")
    refuse_masks(mode, args.k)
    options = AnswerOptions(args.batch, mode, args.k, args.max_new_tokens, seed=args.seed, **sampling_options(args), **lookup_options(args))
    prompts = read_prompts(args.data, tokenizer, vocab_size=model.config.vocab_size, text_tokens=args.prompt_tokens, limit=args.limit)
    with tqdm(total=len(prompts), desc="answers", unit="prompt") as bar:
        for count in write_answers(model, prompts, args.out, options):
            bar.update(count - bar.n)
    print(f"{len(prompts)} answers in {args.out}")
    return 0
