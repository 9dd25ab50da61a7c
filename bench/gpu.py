"""Everything worth doing on a GPU, in one command and a bounded time; results are files.

    python -m bench.gpu [--out DIR] [--minutes 9] [--only NAME ...]

One after the other, each in a process of its own with a time limit: the tests on real kernels (which compile some 1,500, so they are shared
by as many processes as there are cores), the kernel benchmarks, the demo model's texts compared in bfloat16 and float32, greedy, drawn and
with copied drafts, its decoding timed, decoding steps of Llama shapes with random weights, a short training run, and training steps against
the plain way. --only: some of the steps, where one call's time is short. `summary.json` has GPU, versions, commit and date, and what became
of each step, of earlier calls too. The exit status is 1 if a step failed or ran out of time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.report import environment, write_json
from mtp_model.demo.corpus import read_corpus

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A command and the share of the whole time that it may take; its output goes to NAME.txt.

    copies: run it so many times side by side, the i-th with `--shard i/copies` behind it, its output in NAME.i.txt.
    """

    name: str
    command: tuple[str, ...]
    share: float
    copies: int = 1

    def commands(self, out: Path) -> list[tuple[tuple[str, ...], Path]]:
        """Each process's command and the file for its output."""
        if self.copies == 1:
            return [(self.command, out / f"{self.name}.txt")]
        return [((*self.command, "--shard", f"{i}/{self.copies}"), out / f"{self.name}.{i}.txt") for i in range(self.copies)]


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "passed", "failed" or "out of time"
    seconds: float


def steps(out: Path, texts: Path) -> list[Step]:
    processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    python, tests = sys.executable, sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*triton*.py"))
    train = ("--data", str(texts), "--out", str(out / "train"), "--steps", "60", "--rank", "32", "--batch-size", "16", "--warmup", "5",
             "--max-length", "512", "--dtype", "bfloat16", "--lr", "1e-3", "--log-every", "1")  # fmt: skip
    shapes = ("--shape", "Llama-3.1-8B", "Llama-3.2-1B", "--quick", "--minutes", "1.8", "--json", str(out / "decode_shapes.json"))
    check = (python, "-m", "bench.decode", "--check")
    return [
        Step("tests", (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=30", *tests, "tests/test_static.py"), 0.35, processes),
        Step("kernels", (python, "-m", "bench.kernels", "--quick", "--minutes", "2", "--out", str(out)), 0.35),
        Step("check_bfloat16", (*check, "--num-prompts", "16", "--dtype", "bfloat16", "--out", str(out / "bfloat16")), 0.25),
        Step("check_float32", (*check, "--num-prompts", "16", "--dtype", "float32", "--out", str(out / "float32")), 0.25),
        Step("check_drawn", (*check, "--num-prompts", "8", "--k", "2", "8", "--temperature", "0.8", "--top-p", "0.95", "--out", str(out / "drawn")), 0.15),
        Step("check_lookup", (*check, "--num-prompts", "8", "--k", "2", "8", "--lookup", "10", "--out", str(out / "lookup")), 0.15),
        Step("decode", (python, "-m", "bench.decode", "--num-prompts", "8", "--out", str(out)), 0.2),
        Step("decode_shapes", (python, "-m", "bench.decode", *shapes), 0.3),
        Step("train", (python, "-m", "mtp_model", "train", *train), 0.15),
        Step("train_step", (python, "-m", "bench.train", "--seconds", "5", "--json", str(out / "train.json")), 0.5),
    ]


def write_texts(path: Path, count: int = 400) -> None:
    """Some of the demo corpus as JSON lines."""
    train, _ = read_corpus()
    lines = [json.dumps({"text": text[:4000]}) for text in train.values() if len(text) > 1000]
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")


def run(todo: Sequence[Step], out: Path, seconds: float) -> list[Outcome]:
    """Run the steps; the last ones get what the first have left, and one that fails stops no other."""
    end, outcomes = time.monotonic() + seconds, []
    for step in todo:
        began = time.monotonic()
        limit = max(1.0, min(seconds * step.share, end - began))
        processes, files = [], [file for _, file in step.commands(out)]
        for command, file in step.commands(out):
            with open(file, "w", encoding="utf-8") as log:
                processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(max(0.1, began + limit - time.monotonic())) for process in processes]
            status = "failed" if any(codes) else "passed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            for process in processes:
                process.kill()
                process.wait()
        outcomes.append(Outcome(step.name, status, round(time.monotonic() - began, 1)))
        print(f"{step.name}: {status} after {outcomes[-1].seconds} s", flush=True)
        if status != "passed":
            for process, file in zip(processes, files, strict=True):
                if process.returncode:
                    print("".join(file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:]))
    return outcomes


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="directory for the results (default: bench/results/NAME OF THE GPU)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default 9)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps alone")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: there is no GPU here; without one, `python -m bench.kernels` and `python -m bench.compiled` say what can be said", file=sys.stderr)
        return 2
    where = environment(torch.device("cuda"))
    out = (args.out or ROOT / "bench" / "results" / torch.cuda.get_device_name().lower().replace(" ", "-")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = steps(out, out / "texts.jsonl")
    unknown = set(args.only or ()) - {step.name for step in todo}
    if unknown:
        print(f"error: --only has {sorted(unknown)}; accepted are {', '.join(step.name for step in todo)}", file=sys.stderr)
        return 2
    todo = [step for step in todo if not args.only or step.name in args.only]
    texts = out / "texts.jsonl"
    write_texts(texts)
    try:
        outcomes = run(todo, out, args.minutes * 60)
    finally:
        texts.unlink()
    summary, done = out / "summary.json", {outcome.name: {"environment": where} | asdict(outcome) for outcome in outcomes}
    before = json.loads(summary.read_text(encoding="utf-8"))["steps"] if summary.exists() else []
    write_json(summary, {"steps": [step for step in before if step["name"] not in done] + list(done.values())})
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
