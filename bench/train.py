"""A training step: forward, backward and AdamW's update of the adapter, ours against the plain way.

    python -m bench.train                         the demo model on a CPU; on a GPU random weights of Llama shapes
    python -m bench.train --json                  the same, and a JSON file
    python -m bench.train --fit --memory 24       the longest sequence that each way trains in 24 GiB

Ways: `ours` (`mtp_model.loss`: tokens are a frozen prefill, masks alone have gradients, no logits are kept), `ours-recompute` (with
activation checkpointing), `plain` (`bench.plain_training`: all rows in one pass, the adapter on every row times its gate, a dense
mask, all logits), `flex` (the same with FlexAttention; not on a CPU, where it has no backward). Each is held against float64 first:
losses and every adapter gradient; the exit status is 1 if one is wrong. Steps are then timed in turn, and their peak memory is taken: on a CPU each
way has a process of its own, for what one leaves on the heap may slow another down; on a GPU they share one, and its allocations count.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.measure import why
from bench.report import PeakMemory, environment, table, write_json
from bench.timing import WallClock, interleave, percentiles
from bench.training_job import CONFIGS, DEMO, PLAIN, WAYS, Case, Job, Way, agree, check, check_case, make_batches, make_model
from mtp_model.arguments import DTYPES, IMPLEMENTATIONS, default_device, default_dtype, device_name

ROOT = Path(__file__).resolve().parents[1]
LENGTH_UNIT = 64  # of --fit
LONGEST = 2**20
DEFAULT = ("Llama-3.2-1B", "Llama-3.1-8B")  # shapes measured on a GPU where none is named


def cases(args) -> list[Case]:
    """What was asked for. Of the demo by default its recipe's batch, twice the sequences with a third of the masks each, and two sequences
    with masks after every position, the paper's recipe. Of a Llama shape a short sequence, which the plain way has room for on a GPU of 80 GB,
    and a long one."""
    chosen = []
    for shape in args.shape or ([DEMO] if args.device == "cpu" else DEFAULT):
        demo = shape == DEMO
        if demo and args.batch_size is args.length is args.anchors is None:
            chosen += [Case(shape, size, 192, anchors, args.masks, args.rank or 32) for size, anchors in ((16, 24), (32, 8), (2, None))]
            continue
        anchors = args.anchors if args.anchors is not None else 24 if demo else 0
        for length in [args.length] if args.length else [192] if demo else [512, 2048]:
            chosen.append(Case(shape, args.batch_size or (16 if demo else 1), length, anchors or None, args.masks, args.rank or (32 if demo else 128)))
    return chosen


def build(case: Case, args) -> Job:
    device = torch.device(args.device)
    model = make_model(case, device, DTYPES[args.dtype], args.implementation)
    return Job(model, make_batches(case, model.config.vocab_size, device), recipe(args))


def recipe(args) -> dict:
    return {"lcm_weight": args.lcm_weight, "mask_decay": args.mask_decay}


def asked() -> Iterator[int]:
    """0, 1, ... for the lines on standard input, one at a time; a line is written when it begins, and when each number has been dealt with."""
    print(flush=True)
    for number, _ in enumerate(sys.stdin):
        yield number
        print(flush=True)


def alone(case: Case, way: Way, args) -> dict:
    """Some steps in this process: seconds, and its peak memory, all of it and what comes on top of model, optimizer and libraries."""
    job = build(case, args)
    tiny = replace(case, batch_size=1, length=min(case.length, 16))
    batches, job.batches = job.batches, make_batches(tiny, job.model.config.vocab_size, job.model.device, 1)
    job.step(way)  # makes the optimizer's moments and the libraries' buffers
    job.batches = batches
    clock = WallClock(job.model.device)
    with PeakMemory(job.model.device) as peak:
        marks = []
        for number in range(args.steps) if args.steps else asked():
            marks.append((clock.begin(), job.step(way, number), clock.end()))
    return {"peak_mib": peak.mib, "above_mib": peak.mib - peak.before_mib, "seconds": [end - begin for begin, _, end in marks]}


def command(case: Case, way: Way, args) -> list[str]:
    """That runs `alone`, a step for each line that it is sent."""
    flags = ["--only", way.name, "--shape", case.shape, "--batch-size", case.batch_size, "--length", case.length, "--anchors", case.anchors or 0,
             "--masks", case.masks, "--rank", case.rank, "--device", args.device, "--dtype", args.dtype, "--mask-decay", args.mask_decay,
             "--lcm-weight", args.lcm_weight, "--steps", 0, "--threads", torch.get_num_threads(), "--json", "-"]  # fmt: skip
    flags += ["--implementation", args.implementation] if args.implementation else []
    return [sys.executable, "-m", "bench.train", *map(str, flags)]


class Apart:
    """A way in a process of its own, which makes a step with each call, and with `close` tells what `alone` found. Raises RuntimeError if it ends before."""

    def __init__(self, case: Case, way: Way, args):
        self.way, self.errors = way, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command(case, way, args), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __enter__(self) -> "Apart":
        self._wait()
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def __call__(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # then there is no line to read either
            print(file=self.process.stdin, flush=True)
        self._wait()

    def _wait(self) -> None:
        while (line := self.process.stdout.readline()) != "\n":
            if line:  # of some library
                continue
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"{self.way.name} by itself ended with {self.process.returncode}: {self.errors.read().strip()[-300:]}")

    def close(self) -> dict:
        out, _ = self.process.communicate()
        return json.loads(out)


def allocated(job: Job, way: Way) -> dict:
    """Peak of a GPU's allocations during a step, absolute and above what was there before it."""
    with PeakMemory(job.model.device) as peak:
        job.step(way)
    return {"peak_mib": peak.mib, "above_mib": peak.mib - peak.before_mib}


def measure(case: Case, ways: list[Way], args) -> list[dict]:
    """A record for each way, `status` "ok", "wrong" or why it could not run."""
    small, config = check_case(case)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    bar = tqdm(desc=f"{case.shape}, {case.length} tokens", total=3, bar_format="{desc}: {postfix} [{elapsed}]", disable=None)

    def say(what: str) -> None:
        bar.set_postfix_str(what)

    rows = {way.name: {"way": way.name, "status": "ok", "error": {}} for way in ways}
    for checked in dict.fromkeys((torch.float32, dtype)):  # 16 bits hide a mistake that float32 shows
        model = make_model(small, device, checked, args.implementation, config)
        for way in ways:
            kept = rows[way.name]
            if kept["status"] != "ok":
                continue
            say(f"{way.name}: check against float64")
            try:
                good, error = check(model, small, recipe(args), [way])[way.name]
            except RuntimeError as problem:  # of one way, and no reason to lose the others
                kept["status"] = why(problem)
                continue
            kept["error"][str(checked).removeprefix("torch.")] = error if math.isfinite(error) else None
            kept["status"] = "ok" if good else "wrong"
        del model
    job, runs, numbers = build(case, args), {}, {}
    for way in ways:
        if rows[way.name]["status"] != "ok":
            continue
        say(f"{way.name}: first step")
        try:
            numbers[way.name] = job.step(way)  # compiles on a GPU
            if not agree(numbers[way.name], next(iter(numbers.values())), dtype):
                rows[way.name]["status"] = "wrong"
                continue
            rows[way.name] |= allocated(job, way) if device.type == "cuda" else {}
            runs[way.name] = job.steps(way)
        except RuntimeError as problem:  # out of memory is one
            rows[way.name]["status"] = why(problem)
        if device.type == "cuda":
            job.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    tokens, mask_rows = job.tokens, job.mask_rows
    say("steps in turn")
    with contextlib.ExitStack() as processes:
        if device.type != "cuda":
            del job
            runs = {name: processes.enter_context(Apart(case, WAYS[name], args)) for name in runs}
        for name, seconds in interleave(runs, WallClock(device), args.seconds, (args.rounds, 40)).items():
            rows[name] |= {"seconds": seconds, "losses": numbers[name]}
            if device.type != "cuda":
                rows[name] |= {name: value for name, value in runs[name].close().items() if name != "seconds"}
    for row in rows.values():
        if "seconds" in row:
            median = percentiles(row["seconds"])[0]
            pairs = zip(rows[PLAIN]["seconds"], row["seconds"], strict=True) if "seconds" in rows.get(PLAIN, {}) else None
            row |= {"tokens_per_second": tokens / median, "mask_rows_per_second": mask_rows / median,
                    "over_plain": percentiles([a / b for a, b in pairs]) if pairs else None}  # fmt: skip
    bar.close()
    return [asdict(case) | rows[way.name] for way in ways]


def longest(fits, start: int = LENGTH_UNIT) -> int:
    """The largest multiple of LENGTH_UNIT, to a tenth of itself, that fits; 0 if none does."""
    good, bad = 0, start
    while bad < LONGEST and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(LENGTH_UNIT, good // 10):
        middle = (good + bad) // 2 // LENGTH_UNIT * LENGTH_UNIT
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def peak_apart(case: Case, way: Way, args) -> float:
    """Peak memory of two steps in a process of their own, MiB."""
    with Apart(case, way, args) as run:
        for _ in range(2):
            run()
        return run.close()["peak_mib"]


def fit(case: Case, way: Way, args) -> int:
    """The longest sequence whose step stays within --memory: a GPU's allocations, or on a CPU the whole process."""
    if args.device == "cpu":
        return longest(lambda length: peak_apart(replace(case, length=length), way, args) <= args.memory * 1024)
    device = torch.device(args.device)
    model = make_model(case, device, DTYPES[args.dtype], args.implementation)

    def fits(length: int) -> bool:
        torch.cuda.empty_cache()
        try:
            Job(model, make_batches(replace(case, length=length), model.config.vocab_size, device, 1), recipe(args)).step(way)
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
        return True

    return longest(fits)


def _case(record: dict) -> tuple:
    return record["shape"], record["batch_size"], record["length"], record["anchors"]


def main_table(records: list[dict]) -> str:
    """The result table in Markdown; of each case the fastest way is marked."""
    header = ["training step", "s per step (20 to 80 %)", "tokens/s", "mask rows/s", "over plain", "peak MiB", "above start", "error"]
    lines, fastest = [], {}
    for record in records:
        key = _case(record)
        if "seconds" in record and record["tokens_per_second"] > fastest.get(key, {"tokens_per_second": 0})["tokens_per_second"]:
            fastest[key] = record
    for record in records:
        anchors = "masks after all" if record["anchors"] is None else f"after {record['anchors']} each"
        label = f"{record['shape']}, {record['batch_size']} x {record['length']}, {anchors}: {record['way']}"
        errors = record["error"].values()
        error = "not finite" if None in errors else f"{max(errors):.0e}"
        if "seconds" not in record:
            lines.append([label, record["status"], *["-"] * 5, error])
            continue
        label += " **(best)**" if fastest[_case(record)] is record else ""
        cells = [label, "{:.3g} ({:.3g} to {:.3g})".format(*percentiles(record["seconds"]))]
        cells += [f"{record['tokens_per_second']:.0f}", f"{record['mask_rows_per_second']:.0f}"]
        cells.append("{:.2f}x ({:.2f} to {:.2f})".format(*record["over_plain"]) if record["over_plain"] else "-")
        lines.append([*cells, f"{record['peak_mib']:.0f}", f"{record['above_mib']:.0f}", error])
    return table(header, lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=[DEMO, *CONFIGS], help="default: the demo model on a CPU, the Llamas on a GPU")
    parser.add_argument("--batch-size", type=int, help="sequences (default 16 for the demo, else 1)")
    parser.add_argument("--length", type=int, help="tokens of the longest sequence (default 192 for the demo, else 512 and 2048)")
    parser.add_argument("--anchors", type=int, help="masks after that many positions of each sequence, 0: after all (default 24 for the demo, else 0)")
    parser.add_argument("--masks", type=int, default=8, metavar="K", help="masks per block (default 8)")
    parser.add_argument("--rank", type=int, help="of the adapter (default 32 for the demo, else 128)")
    parser.add_argument("--mask-decay", type=float, default=0.9, help="mask j weighs that ** (j - 1) (default %(default)s, the demo's)")
    parser.add_argument("--lcm-weight", type=float, default=1.0, help="of the consistency loss (default 1)")
    parser.add_argument("--device", type=device_name, default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base (default: bfloat16 on a GPU that has it, else float32); the adapter is in float32")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="of ours (default: triton on a GPU, reference on a CPU)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--seconds", type=float, default=15.0, help="that a case's rounds of steps may take (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="at the least (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's own)")
    parser.add_argument("--fit", action="store_true", help="only the longest sequence that each way trains within --memory")
    parser.add_argument("--memory", type=float, metavar="GIB", help="for --fit: of the GPU (default: all of it), or of a process on a CPU")
    parser.add_argument("--only", choices=WAYS, help="one way by itself: memory and seconds of --steps steps, as JSON")
    parser.add_argument("--steps", type=int, default=2, help="of --only (default %(default)s; 0: one for each line on standard input)")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="write a file (default of PATH: bench/results/DEVICE/train.json); -: print it")
    return parser


def settle(args) -> None:
    """Defaults that depend on the device. Raises ValueError for settings out of range."""
    args.dtype = args.dtype or default_dtype(args.device)
    least = {"batch_size": 1, "length": 4, "anchors": 0, "rounds": 1, "steps": 0, "threads": 1, "rank": 1, "masks": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted is {bound} or more")
    if args.memory is not None and args.memory <= 0:
        raise ValueError(f"--memory is {args.memory}; accepted is above 0")
    if args.fit and args.device == "cpu" and args.memory is None:
        raise ValueError("--fit on a CPU needs --memory, in GiB")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.fit and args.memory and args.device != "cpu":
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 2**30 / torch.cuda.get_device_properties(args.device).total_memory))


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    settle(args)
    if args.only:
        print(json.dumps(alone(cases(args)[0], WAYS[args.only], args)))
        return 0
    where, gpu = environment(torch.device(args.device)), args.device != "cpu"
    ways = [WAYS[name] for name in args.ways if gpu or WAYS[name].on_cpu]
    settings, path = {name: value for name, value in vars(args).items() if name != "json"}, None
    if args.json not in (None, "-"):
        name = re.sub(r"\W+", "-", where["device"].lower()).strip("-") if gpu else "cpu"
        path = Path(args.json) if args.json else Path(__file__).parent / "results" / name / "train.json"
        path.parent.mkdir(parents=True, exist_ok=True)  # before anything is measured
    if args.fit:
        shapes = {case.shape: case for case in cases(args)}  # the length is what is sought
        records = []
        for case, way in tqdm(list(itertools.product(shapes.values(), ways)), desc="fit", disable=None):
            records.append(asdict(case) | {"way": way.name, "length": fit(case, way, args)})
        lines = [[f"{r['shape']}, batch {r['batch_size']}: {r['way']}", str(r["length"])] for r in records]
        text = table(["longest sequence that fits", "tokens"], lines)
    else:
        records = []
        for case in cases(args):
            records += measure(case, ways, args)
            if path:  # what stands, should the time run out
                write_json(path, {"environment": where, "settings": settings, "records": records, "unfinished": True})
        text = main_table(records)
        text += ("\n\nOver plain: of steps of the same round. Peak: of steps by themselves; above start: less what model, optimizer and libraries took before. "
                 "Error: against float64.")  # fmt: skip
    left = [name for name in args.ways if WAYS[name] not in ways]
    if left:
        text += f"\nLeft out: {', '.join(left)} (FlexAttention has no backward on a CPU)."
    values = {"environment": where, "settings": settings, "records": records, "table": text.splitlines()}
    if args.json == "-":
        print(json.dumps(values))
    else:
        print(f"{where['device']}, {args.dtype}, {where['cpu_threads']} CPU threads, torch {where['versions']['torch']}\n\n{text}")
    if path:
        write_json(path, values)
        print(f"\nwritten: {path}")
    return 1 if any(record.get("status") == "wrong" for record in records) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
