"""The kernels against eager PyTorch, torch.compile, PEFT's boolean gather and the base matmul alone.

    python -m bench.kernels [--quick] [--operation NAME ...] [--model NAME ...] [--rows M ...] [--rank R ...]
                            [--context N ...] [--dtype NAME]
    python -m bench.kernels --report FILE.json     the Markdown again, from the JSON

On a GPU every competitor is held against float64 first, then timed (`bench.timing`), and its time is set against what this GPU's
memory and matrix units were measured to do; another run, not timed, says how much memory it allocates. Without a GPU the same checks
run at toy size, and what is printed of the real shapes are counts: bytes, operations, and the least time they take by the datasheets
of named GPUs. The exit status is 1 if a competitor is wrong or fails.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import render
from bench.cases import MODELS, SETTINGS, TOY, TOY_SETTINGS, Case, Scope
from bench.counts import DATASHEETS, GPU
from bench.measure import check_toys, describe, measure_all
from bench.report import environment, write_json
from bench.suite_attention import texts
from bench.suites import SUITES
from bench.timing import measured_roofs

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
RANKS = (16, 64, 128)
CONTEXTS = {n for m in MODELS.values() for n in m.contexts} | {n for s in SETTINGS if s.mode == "training" for n in texts(s)}
QUICK = dict(model=["Llama-3.1-8B"], rows=[1, 17, 81, 1024, 2048], rank=[128], context=[1024, 2048, 32768])


def select(args) -> list[Case]:
    """The cases that were asked for; one that several models share once."""
    scope = Scope(tuple(args.rank), args.context and tuple(args.context), args.quick)
    settings = [s for s in SETTINGS if args.rows is None or s.rows in args.rows]
    models = [m for name, m in MODELS.items() if args.model is None or name in args.model]
    cases = [case for name in args.operation or SUITES for m in models for case in SUITES[name](m, settings, scope)]
    return list({tuple(describe(case).values()): case for case in cases}.values())


def toy_cases(operations: list[str] | None) -> list[Case]:
    return [case for name in operations or SUITES for case in SUITES[name](TOY, TOY_SETTINGS, Scope((16,), short=True))]


def count_row(case: Case, itemsize: int) -> dict:
    """What the case must move and compute, and the least time by the datasheets."""
    count = case.count(itemsize, True)
    values = describe(case) | dict(bytes=count.bytes, operations=count.operations)
    return values | {f"roof_us {gpu.name}": count.seconds(gpu) * 1e6 for gpu in DATASHEETS}


def plan_rows(cases: list[Case], itemsize: int) -> list[dict]:
    """What each plan of gated LoRA moves and computes; nothing without Triton, whose tiles are what is counted."""
    try:
        found = [(case, plan) for case in cases if case.plans is not None for plan in case.plans(itemsize)]
    except ImportError:
        return []
    return [
        describe(case) | vars(plan) | dict(programs=" + ".join(map(str, plan.programs)), bytes=case.count(itemsize, True).bytes) for case, plan in found
    ]


def interpreted() -> bool:
    """Whether the Triton kernels run on a CPU in this process."""
    if importlib.util.find_spec("triton") is None:
        return False
    from mtp_kernels.triton import INTERPRETED

    return INTERPRETED


def uncovered() -> list[str]:
    """Operations with a Triton kernel that no suite measures."""
    if importlib.util.find_spec("triton") is None:
        return []
    from mtp_kernels.triton import __all__ as operations

    return [name for name in operations if name not in SUITES]


def driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", nargs="+", choices=SUITES, help="default: all")
    parser.add_argument("--model", nargs="+", choices=MODELS, help="whose shapes (default: all)")
    parser.add_argument("--rows", nargs="+", type=int, help=f"default: {', '.join(map(str, sorted({s.rows for s in SETTINGS})))}")
    parser.add_argument("--rank", nargs="+", type=int, help=f"of gated LoRA (default: {', '.join(map(str, RANKS))})")
    lengths = f"of attention, tokens before a step or of training's text (default: {', '.join(map(str, sorted(CONTEXTS)))})"
    parser.add_argument("--context", nargs="+", type=int, help=lengths)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    named = ", ".join(f"--{name} {' '.join(map(str, values))}" for name, values in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"few shapes, without torch.compile; unless named: {named}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=0.1, help="of GPU time for a case's rounds (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after these (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<GPU>; on a CPU nothing is written without it")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="only print the Markdown of an earlier run")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    if args.report:
        print(render.markdown(render.read(args.report)))
        return 0
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    args.rank = args.rank or list(RANKS)
    known = {s.rows for s in SETTINGS}
    if args.rows and not set(args.rows) <= known:
        raise ValueError(f"--rows is {args.rows}; accepted are {', '.join(map(str, sorted(known)))}")
    if args.context and not set(args.context) <= CONTEXTS:
        raise ValueError(f"--context is {args.context}; accepted are {', '.join(map(str, sorted(CONTEXTS)))}")
    if not all(1 <= rank <= 512 for rank in args.rank):
        raise ValueError(f"--rank is {args.rank}; accepted are 1 to 512")
    gpu, dtype, began = torch.cuda.is_available(), DTYPES[args.dtype], time.monotonic()
    cases, where = select(args), environment(torch.device("cuda" if gpu else "cpu"))
    out = args.out or (Path(__file__).parent / "results" / re.sub(r"\W+", "-", where["device"].lower()).strip("-") if gpu else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)  # before anything is measured
    settings = {name: value if isinstance(value, (int, float, list, type(None))) else str(value) for name, value in vars(args).items()}
    values = dict(
        environment=where | (dict(driver=driver()) if gpu else {}), settings=settings,
        measured=gpu, notes=[], roofs=None, rows=[], counts=[count_row(c, dtype.itemsize) for c in cases], plans=plan_rows(cases, dtype.itemsize),
    )  # fmt: skip
    if not values["plans"] and any(c.plans for c in cases):
        values["notes"].append("Triton is not installed: the plans of gated LoRA, which its tiles decide, are not counted.")
    if uncovered():
        values["notes"].append(f"With a Triton kernel but not measured here by itself: {', '.join(uncovered())}.")
    if gpu:
        roofs = values["roofs"] = measured_roofs(dtype)
        roof = GPU("this GPU, measured", roofs["bandwidth"], roofs["matmul"])
        values["rows"] = measure_all(cases, dtype, roof, not (args.no_compile or args.quick), args.seconds, args.minutes)
    else:
        ours = interpreted()
        if dtype == torch.bfloat16:
            dtype = torch.float32
            values["notes"].append("Checked in float32: Triton's interpreter is wrong in bfloat16.")
        if not ours:
            values["notes"].append("Ours was not checked: that takes a GPU, or Triton installed and TRITON_INTERPRET=1 in the environment.")
        values["notes"].append("Peak memory was not measured: that takes a GPU.")
        values["rows"] = list(check_toys(toy_cases(args.operation), dtype, ours))
    values["seconds"] = round(time.monotonic() - began, 1)
    print(render.markdown(values, short=gpu))
    if out:
        write_json(out / "kernels.json", values)
        print("written: " + ", ".join(map(str, [out / "kernels.json", *render.write(values, out)])))
    return 1 if any(r["status"].startswith(("wrong", "failed")) for r in values["rows"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
