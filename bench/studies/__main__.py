"""The paper's studies on the demo model, drawn text, copied drafts, and what each option of the training adds at equal training time.

    python -m bench.studies probe       rank of the right future token in the masks' logits, before and after training (Fig. 1)
    python -m bench.studies gating      gated against ordinary LoRA while it is trained: quality and tokens per step (Fig. 6)
    python -m bench.studies ladder      linear, quadratic, + sampler, + LCM (Fig. 7)
    python -m bench.studies rank        LoRA ranks, with and without sampler, and their memory (Fig. 8)
    python -m bench.studies domains     tokens per step by kind of text and number of masks (Table 1)
    python -m bench.studies drawn       tokens per step of drawn text by temperature, drafts with and without noise
    python -m bench.studies copies      tokens per step by kind of text with copied drafts, greedy and drawn
    python -m bench.studies shortlist   tokens per step where the sampler chooses among few tokens
    python -m bench.studies options     the recipe's options one by one, at equal training time
    python -m bench.studies all         all of them in that order

Each prints a table and writes NAME.json and, with matplotlib, NAME.png. gating, rank and options train, for which they take the
text that `python -m mtp_model.demo.answers` writes. Ctrl-C stops, and the same command goes on. NAME -h lists a study's flags.
"""

import argparse
import sys

from bench.report import environment, shown, write_json
from bench.studies import copies, domains, drawn, gating, ladder, options, probe, rank, shortlist
from bench.studies.common import BUDGET, Result, Study, add_arguments, check, results_directory
from mtp_model.arguments import default_dtype

STUDIES = {
    "probe": probe, "gating": gating, "ladder": ladder, "rank": rank, "domains": domains, "drawn": drawn, "copies": copies, "shortlist": shortlist,
    "options": options,
}  # fmt: skip


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="study", required=True, metavar="NAME")
    own = {}
    for name, module in STUDIES.items():
        own[name] = commands.add_parser(  # whole flags only: one study's --rank is not another's --ranks
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        add_arguments(own[name], module.FLAGS, module.DEFAULTS)
    flags = dict.fromkeys(flag for module in STUDIES.values() for flag in module.FLAGS)
    every = commands.add_parser("all", description="all studies; a flag counts for those that have it, defaults are each one's own", allow_abbrev=False)
    add_arguments(every, tuple(flags), {})
    return parser, own


def settle(study: str, parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The study's arguments: what was named, else its own sizes, or with --quick its tiny ones."""
    module = STUDIES[study]
    sizes = module.QUICK if "--quick" in argv else module.DEFAULTS
    parser.set_defaults(**{name: value for name, value in sizes.items() if name not in BUDGET})
    args = parser.parse_known_args(argv)[0]  # the whole parser has refused what no study knows
    if "data" in module.FLAGS and args.steps is None and args.seconds is None:
        vars(args).update({name: sizes[name] for name in BUDGET if name in sizes})
    check(args)
    return args


def save_picture(path, result: Result, title: str) -> bool:
    """Whether the picture was drawn: not without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=result.size, layout="constrained")
    result.draw(figure)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def run(name: str, args: argparse.Namespace) -> bool:
    """Do a study, print and write what it found; returns whether all held that must."""
    study = Study(name, args)
    device = study.model.device
    where = environment(device)
    out = args.out or (args.work / "quick" if args.quick else results_directory(device, where["device"]))
    out.mkdir(parents=True, exist_ok=True)  # before anything is measured
    dtype = args.dtype or default_dtype(args.device)
    print(f"{name}: {where['device']}, {dtype}, {where['cpu_threads']} CPU threads, torch {where['versions']['torch']}\n")
    result = STUDIES[name].run(study)
    print("\n" + "\n\n".join([result.text, *result.notes]))
    settings = {key: shown(value) for key, value in vars(args).items() if key not in ("out", "work", "implementation")}
    settings |= {"dtype": dtype, "implementation": args.implementation or "default"}
    settings |= {"base_parameters": study.base_parameters, "base_fingerprint": study.model.fingerprint}
    values = {"study": name, "environment": where, "settings": settings} | result.values
    write_json(out / f"{name}.json", values | {"notes": result.notes, "table": result.text.splitlines()})
    drawn = save_picture(out / f"{name}.png", result, f"{STUDIES[name].TITLE}\n{where['device']}, {dtype}")
    print(f"\nwritten: {out / name}.json" + (f", {out / name}.png" if drawn else " (no picture: matplotlib is not installed)") + "\n")
    study.finished()
    return result.good


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, own = build_parser()
    name = parser.parse_args(argv).study
    rest = argv[argv.index(name) + 1 :]
    try:
        good = [run(study, settle(study, own[study], rest)) for study in (STUDIES if name == "all" else [name])]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
