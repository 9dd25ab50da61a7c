"""Which way of decoding is fastest: mode, k and lookup by measured time, on prompts like those that are to be decoded.

More masks, and a block of them after every row, have more tokens accepted per step and make the step longer: hardly on a large
GPU with one text, much on a CPU or with many texts side by side. Neither can be told from the model alone, so both are measured.

    ranking = measure(model, prompts)                # fastest first; the outcome is text that would have been written anyway
    generate(model, prompts, **ranking[0].options)

    python -m mtp_model choose --model my-llama --adapter my-adapter --prompts chats.jsonl
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path

from tqdm import tqdm

from mtp_model.arguments import add_lookup_arguments, add_sampling_arguments, lookup_options, sampling_options
from mtp_model.decode import Decoding, generate, seeds_of
from mtp_model.demo import HELD_OUT
from mtp_model.layout import MODES
from mtp_model.lookup import lookup_of
from mtp_model.model import MTPModel
from mtp_model.records import read_prompts

AUTOREGRESSIVE = MODES[0]
CANDIDATES = ("linear", "quadratic")
KS = (1, 2, 3, 4, 6, 8, 12, 16)
UNMEASURED = 4  # steps before a turn, where no whole text precedes it


@dataclass
class Measured:
    """A way of decoding. seconds: of each round, for all prompts. tokens, passes: of one round, as in `DecodeStats`, summed. lookup: the
    options `lookup` and `lookup_match`, where it has them."""

    mode: str
    k: int | None = None
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    lookup: dict = field(default_factory=dict)

    @property
    def options(self) -> dict:
        """What `generate` takes."""
        return {"mode": self.mode, "k": self.k, **self.lookup}

    @property
    def flags(self) -> str:
        """The same for `python -m mtp_model generate`."""
        given = {name.replace("_", "-"): value for name, value in self.options.items() if value is not None}
        return " ".join(f"--{name} {value}" for name, value in given.items())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.passes


def measure(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    *,
    modes: Sequence[str] = CANDIDATES,
    ks: Sequence[int] | None = None,
    batch: int = 1,
    max_new_tokens: int = 64,
    rounds: int = 3,
    lookup: int | None = None,
    lookup_match: int | None = None,
    progress: bool = False,
    **options,
) -> list[Measured]:
    """Decode the prompts, `batch` side by side, autoregressively and in each of `modes` with each of `ks`; the fastest first.

    The ways take turns, `rounds` times, so that a machine whose speed changes changes it for all. Not measured are a text before each
    way's first turn, and before every turn of one with copied drafts, and a few steps before the others, for what has to be recorded or
    compiled. ks: default those of 1, 2, 3, 4, 6, 8, 12, 16 that the adapter has. lookup, lookup_match: measure every way with these too,
    and without. options: of `Decoding`, the same for all; of drawn text the seed is by default 0, the first prompt's, so that all draw
    one text. Raises ValueError for a model without an adapter and for arguments that `Decoding` refuses, before any work.
    """
    if model.mtp is None:
        raise ValueError("the model has no adapter, so there is nothing to choose from; load_adapter() gives it one")
    if batch < 1 or rounds < 1 or not prompts:
        raise ValueError(f"batch is {batch}, rounds {rounds}, and there are {len(prompts)} prompts; accepted are 1 or more of each")
    masks = model.mtp.num_masks
    ks = [k for k in KS if k <= masks] if ks is None else list(ks)
    wrong = [k for k in ks if type(k) is not int or not 1 <= k <= masks], [mode for mode in modes if mode not in MODES[1:]]
    if any(wrong) or not ks or not modes:
        raise ValueError(f"ks are {ks} and modes {list(modes)}; accepted are 1 to the adapter's {masks}, and {', '.join(MODES[1:])}")
    copies = {"lookup": lookup, "lookup_match": lookup_match} if lookup_of(lookup, lookup_match) else {}
    ways = [Measured(mode, k, lookup=each) for each in ([{}, copies] if copies else [{}]) for mode, k in ((AUTOREGRESSIVE, None), *product(modes, ks))]
    seeds = seeds_of(options.pop("seed", 0), len(prompts)) if options.get("temperature") else None
    batches = [(prompts[i : i + batch], {"seed": seeds[i : i + batch]} if seeds else {}) for i in range(0, len(prompts), batch)]
    sizes = {len(each): (each, seed) for each, seed in batches[::-1]}  # the last batch may be a smaller one, whose steps are others
    bar = tqdm(desc="choose", total=len(ways) * rounds, disable=None if progress else True)
    for number in range(rounds):
        for way in ways:
            asked = {"max_new_tokens": max_new_tokens} | way.options | options
            for each, seed in sizes.values():
                decoding = Decoding(model, each, **asked | seed)
                for _ in islice(decoding, UNMEASURED if number and not way.lookup else None):
                    pass
                decoding.close()
            began, way.tokens, way.passes = time.perf_counter(), 0, 0
            for each, seed in batches:
                stats = generate(model, each, **asked | seed).stats
                way.tokens, way.passes = way.tokens + sum(stats.tokens), way.passes + sum(stats.passes)
            way.seconds.append(time.perf_counter() - began)
            bar.update()
    bar.close()
    return sorted(ways, key=lambda way: way.tokens_per_second, reverse=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="directory, or owner/name on the Hub (default: the demo adapter, for the demo model)")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[HELD_OUT], metavar="FILE", help="as for answers (default: the demo's held-out source)")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="the first N prompts (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded side by side (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    add_lookup_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=list(CANDIDATES), help="default: linear quadratic")
    parser.add_argument("--k", type=int, nargs="+", help="masks per block (default: 1, 2, 3, 4, 6, 8, 12, 16, up to the adapter's)")


def run(args, model: MTPModel, tokenizer) -> int:
    prompts = read_prompts(args.prompts, tokenizer, vocab_size=model.config.vocab_size, limit=args.limit)
    ranking = measure(
        model, prompts, modes=args.modes, ks=args.k, batch=args.batch, max_new_tokens=args.max_new_tokens, rounds=args.rounds, progress=True,
        **sampling_options(args), **lookup_options(args),
    )  # fmt: skip
    plain = next(way for way in ranking if way.mode == AUTOREGRESSIVE and not way.lookup)
    print(f"{'':<30}{'tokens/s':>10}{'speedup':>9}{'tokens per step':>17}")
    for way in ranking:
        name = way.mode + (f", k = {way.k}" if way.k else "") + (f", lookup {args.lookup}" if way.lookup else "")
        print(f"{name:<30}{way.tokens_per_second:>10.0f}{way.tokens_per_second / plain.tokens_per_second:>8.2f}x{way.tokens_per_step:>17.2f}")
    print(f"fastest here, with {args.batch} side by side: {ranking[0].flags}")
    return 0
