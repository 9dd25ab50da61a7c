"""Decoding steps of a shape with random weights: their time by part, and the speedup that a prescribed acceptance would make of it.

    python -m bench.decode --shape Llama-3.1-8B --shape Llama-3.2-1B
    python -m bench.decode --shape demo                                  the demo's shape, which a CPU can do

No checkpoint is read and no file is written, but --json's. Acceptance is prescribed, not the model's: each draft is the model's own
text, or with a given chance another token (see `bench.prescribed`). Every text must equal the autoregressive one; the exit status
is 1 if one does not. Rows are measured in turn, over and over, each speedup is a ratio of neighbours, and Ctrl-C prints what is done.
"""

import argparse
import gc
import itertools
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench.decode_baselines import BASELINES, COMPILED, EAGER, UNCAPTURED, Way, baseline
from bench.decode_rows import LEGEND, Row, Setting, Step, record, report
from bench.measure import why
from bench.prescribed import AUTOREGRESSIVE, SHAPES, Parts, PrescribedStep, prefill, random_model, shape_config, step_bytes, write
from bench.report import PeakMemory, environment, write_json
from bench.timing import CPUClock, GPUClock, measured_roofs
from bench.training_job import DEMO
from mtp_model import MTPModel
from mtp_model.arguments import DTYPES, IMPLEMENTATIONS, default_device, default_dtype
from mtp_model.cache import KVCache
from mtp_model.decode import default_candidates
from mtp_model.layout import MODES


class Bench:
    """The measuring of one setting; what is done stands in `setting` at any time."""

    def __init__(self, model: MTPModel, setting: Setting, args, deadline: float):
        self.model, self.setting, self.args, self.deadline = model, setting, args, deadline
        self.gpu, self.steps = model.device.type == "cuda", {}
        generator = torch.Generator().manual_seed(args.seed)
        batch, length, longest = setting.batch, args.new_tokens, max(args.k)
        self.prompts = torch.randint(0, model.config.vocab_size, (batch, setting.context), generator=generator).to(model.device)
        self.coins = torch.rand(batch, length + longest + 1, generator=generator).to(model.device)  # one table for all: p = 0.2 is wrong where 0.5 is
        self.cache = KVCache(model.config, batch, setting.context + length + (longest + 1) ** 2, model.device, model.dtype)

    def late(self, what: str) -> bool:
        """Whether the time is over; then `what` is named as left out."""
        if time.monotonic() > self.deadline:
            self.setting.left_out[what] = "the time was over"
        return time.monotonic() > self.deadline

    def run(self, bar: tqdm) -> None:
        bar.set_postfix_str("recorded text")
        self.record()
        for mode in self.args.modes:
            for k in self.args.k:
                bar.set_postfix_str(f"{mode}, k = {k}: first run")
                if not self.late(f"{mode}, k = {k}"):
                    self.add(mode, k)
        bar.set_postfix_str("steps by part")
        self.time_steps()
        bar.set_postfix_str("texts")
        self.write_texts(bar)

    def record(self) -> None:
        batch, length = self.setting.batch, self.args.new_tokens
        blank = torch.zeros(batch, length, dtype=torch.int64, device=self.model.device)
        blank[:, 0] = prefill(self.model, self.prompts, self.cache)
        self.text = blank
        self.add(AUTOREGRESSIVE, 0)
        self.expected = write(self.steps[AUTOREGRESSIVE, 0])[0]
        self.text = torch.tensor(self.expected, device=self.model.device)
        self.setting.distinct = min(len(set(text)) for text in self.expected)

    def add(self, mode: str, k: int) -> None:
        """Make the step and run it once, which captures it."""
        step = PrescribedStep(self.model, self.cache, mode, k, self.text, self.setting.context, draft_candidates=self.args.draft_candidates)
        with PeakMemory(self.model.device) as peak:
            write(step)
        self.steps[mode, k] = step
        shared = step.options.shares_logits(self.model, step._layout())
        count = step_bytes(self.model, k, self.setting.batch, self.setting.context, self.args.draft_candidates, shared)
        self.setting.steps.append(Step(mode, k, count, peak.mib))

    def time_steps(self) -> None:
        clock = GPUClock() if self.gpu else CPUClock()
        parts = [(found, Parts(self.steps[found.name, found.k])) for found in self.setting.steps]
        for number in range(-1, self.args.rounds):  # the first round wakes all up
            turn = number % len(parts)
            for found, part in parts[turn:] + parts[:turn]:
                for name, seconds in part.run(clock).items():
                    if number >= 0:
                        found.seconds[name].append(seconds)

    def baseline(self, name: str) -> Way | None:
        """The baseline, run once; None, and named as left out, if it cannot be."""
        if name not in self.args.baselines:
            self.setting.left_out[BASELINES[name]] = "not asked for"
        elif name == COMPILED and not self.gpu:
            self.setting.left_out[BASELINES[name]] = "it is a GPU's launches that it saves"
        elif not self.late(BASELINES[name]):
            try:
                way = baseline(name, self.model)
                way(self.prompts, self.args.new_tokens)
                return way
            except Exception as problem:  # noqa: BLE001 - one competitor's failure is reported, the others go on
                self.setting.left_out[BASELINES[name]] = why(problem)
        return None

    def write_texts(self, bar: tqdm) -> None:
        rows: list[tuple[Row, Way | None]] = []
        for step in self.setting.steps:  # a graph takes its memory when it is captured
            chances = self.args.wrong if step.k else [None]
            rows += [(Row(step.name, step.k, wrong, peak_mib=step.peak_mib), None) for wrong in chances]
        for name in BASELINES:
            bar.set_postfix_str(f"{BASELINES[name]}: first run")
            way = self.baseline(name)
            if way:
                rows.append((Row(BASELINES[name], ours=name == UNCAPTURED), way))
        bar.set_postfix_str("texts")
        self.setting.rows += [row for row, _ in rows]
        for number in range(self.args.repeats):
            if number and self.late(f"repeats from the {number + 1}. on"):
                return
            turn = number % len(rows)
            for row, way in rows[turn:] + rows[:turn]:
                self.write_text(row, way)
                bar.update()

    def write_text(self, row: Row, way: Way | None) -> None:
        with PeakMemory(self.model.device) as peak:
            if way:
                texts, seconds = way(self.prompts, self.args.new_tokens)
            else:
                step = self.steps[row.name, row.k]
                if row.k:
                    step.prescribe(self.coins < row.wrong)
                texts, passes, seconds = write(step)
                row.passes += passes
        row.seconds.append(seconds)
        row.peak_mib = max(row.peak_mib, peak.mib)
        row.tokens += sum(len(text) - 1 for text in texts)
        row.same += sum(a == b for a, b in zip(texts, self.expected, strict=True))
        row.compared += len(texts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", action="extend", choices=SHAPES, required=True, help="one or more")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU that has it, else float32")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: triton on a GPU, reference on a CPU")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=["linear", "quadratic"], help="default: linear and quadratic")
    parser.add_argument("--k", type=int, nargs="+", help="masks per block (default 1 2 4 8; quick: 4 8)")
    parser.add_argument("--masks", type=int, default=8, help="that the adapter has (default 8)")
    parser.add_argument("--rank", type=int, help="of the adapter (default 32 for the demo, else 128)")
    parser.add_argument("--draft-candidates", type=int, metavar="N", help="tokens that the sampler chooses from (default: 64 of a large vocabulary, else all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences (default 1)")
    parser.add_argument("--context", type=int, nargs="+", default=[512], help="tokens before the text (default 512)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the text (default 64)")
    parser.add_argument("--wrong", type=float, nargs="+", metavar="P", help="prescribed chances that a draft is wrong (default 0 0.2 0.5 1; quick: 0 0.5 1)")
    parser.add_argument("--repeats", type=int, default=3, help="of every text (default 3)")
    parser.add_argument("--rounds", type=int, help="of every step by part (default 20; quick: 10)")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, help="default: all on a GPU, only ours on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and coins (default 0)")
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun (default: no limit)")
    parser.add_argument("--quick", action="store_true", help="less of everything, and without torch.compile")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write a file")
    return parser


def settle(args) -> None:
    """Defaults that depend on other settings. Raises ValueError for settings out of range."""
    args.dtype = args.dtype or default_dtype(args.device)
    quick = args.quick
    ks = [k for k in ([4, 8] if quick else [1, 2, 4, 8]) if k <= args.masks] or [args.masks]
    chosen = {"k": ks, "wrong": [0.0, 0.5, 1.0] if quick else [0.0, 0.2, 0.5, 1.0], "rounds": 10 if quick else 20,
              "baselines": [UNCAPTURED] if args.device == "cpu" else [UNCAPTURED, EAGER] if quick else list(BASELINES)}  # fmt: skip
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {"masks": 1, "rank": 1, "batch": 1, "context": 1, "new_tokens": 2, "repeats": 1, "rounds": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < bound:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted is {bound} or more")
    if not all(1 <= k <= args.masks for k in args.k):
        raise ValueError(f"--k is {args.k}; accepted are 1 to --masks, {args.masks}")
    if not all(0 <= wrong <= 1 for wrong in args.wrong):
        raise ValueError(f"--wrong is {args.wrong}; accepted are chances from 0 to 1")
    vocab = min(shape_config(shape).vocab_size for shape in args.shape)
    if args.draft_candidates is not None and not 1 <= args.draft_candidates <= vocab:
        raise ValueError(f"--draft-candidates is {args.draft_candidates}; accepted are 1 to the vocabulary's {vocab}")
    if args.draft_candidates is None:
        args.draft_candidates = default_candidates(vocab)
    if args.minutes is not None and args.minutes <= 0:
        raise ValueError(f"--minutes is {args.minutes}; accepted is above 0")


def measure_all(args, device: torch.device, settings: list[Setting], done) -> None:
    """Fill `settings`, one after another; done() is called behind each."""
    deadline = time.monotonic() + 60 * (args.minutes or float("inf"))
    count = len(args.shape) * len(args.batch) * len(args.context)
    bar = tqdm(total=count * args.repeats * (1 + len(args.modes) * len(args.k) * len(args.wrong) + len(args.baselines)), desc="decode", disable=None)
    for shape in dict.fromkeys(args.shape):
        bar.set_description(shape)
        model = None
        for batch, context in itertools.product(args.batch, args.context):
            setting = Setting(shape, batch, context)
            settings.append(setting)
            if time.monotonic() > deadline:
                setting.left_out["all of it"] = "the time was over"
                continue
            try:
                if model is None:
                    rank = args.rank if args.rank is not None else 32 if shape == DEMO else 128
                    model = random_model(shape_config(shape), device, DTYPES[args.dtype], rank, args.masks, args.implementation, args.seed)
                Bench(model, setting, args, deadline).run(bar)
            except torch.OutOfMemoryError as problem:
                setting.left_out["the rest"] = why(problem)
            gc.collect()  # steps and what they captured
            if device.type == "cuda":
                torch.compiler.reset()  # compiled calls hold their model, and would meet the next setting's shapes as dynamic ones
                torch.cuda.empty_cache()
            done()
    bar.close()


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    settle(args)
    device = torch.device(args.device)
    where, settings, interrupted = environment(device), [], False
    print(f"{where['device']}, {args.dtype}, {where['cpu_threads']} CPU threads, torch {where['versions']['torch']}; random weights, prescribed acceptance\n")
    bandwidth = measured_roofs(DTYPES[args.dtype])["bandwidth"] if device.type == "cuda" else None
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "json"}

    def save() -> tuple[list[dict], bool]:
        """The results so far, also as a file: who ends this early keeps what is done."""
        results = [record(setting, bandwidth) for setting in settings]
        same = all(row["same"] == row["compared"] for result in results for row in result["rows"] if row["ours"])
        if args.json:
            write_json(args.json, {"environment": where, "settings": kept, "bandwidth": bandwidth, "prescribed": True, "same_text": same,
                                   "interrupted": interrupted, "results": results})  # fmt: skip
        return results, same

    try:
        measure_all(args, device, settings, save)
    except KeyboardInterrupt:
        interrupted = True
    results, same = save()
    print("\n\n".join([*map(report, results), LEGEND]))
    if args.json:
        print(f"\nwritten: {args.json}")
    if not same:
        print("error: a text of ours differs from the autoregressive one", file=sys.stderr)
    return 130 if interrupted else 0 if same else 1
