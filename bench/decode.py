"""The main job: the demo model writes several tokens per step, and exactly its own text.

    python -m bench.decode                 the table, one sample, a JSON file and a plot
    python -m bench.decode --check         every mode, k in 1, 2, 4, 8, batch 1 and 4: outputs against autoregressive's
    python -m bench.decode --ablation      tokens per step: linear, quadratic, with and without sampler, LCM
    python -m bench.decode --lookup 10     the same with drafts copied from the text itself (--check and --ablation; the table has such rows anyway)
    python -m bench.decode --temperature 1 drawn text (with --check and --ablation too), a seed for each prompt; transformers draws its own
    python -m bench.decode --shape NAME    a shape with random weights: time per step by part, and a prescribed acceptance;
                                           it has settings of its own: --shape NAME --help

All rows run on the same weights in one process, prompt by prompt in turn, so that each speedup is a ratio of neighbours.
Tokens per step (the paper's "acceptance") and wall-clock speedup are different things and stand in different columns.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from bench import decode_shape
from bench.report import PeakMemory, environment, quartiles, shown, table, write_json
from mtp_model import Decoding, MTPModel, generate, load_adapter
from mtp_model.arguments import (
    DTYPES,
    add_lookup_arguments,
    add_model_arguments,
    add_sampling_arguments,
    default_dtype,
    load_asked_model,
    load_tokenizer,
    lookup_options,
    positive,
    sampling_options,
)
from mtp_model.demo import ABLATION, ADAPTER, HELD_OUT
from mtp_model.hub import MODEL, local_directory
from mtp_model.layout import MODES
from mtp_model.records import read_prompts

AUTOREGRESSIVE = "autoregressive"
GENERATE, LOOKUP = "transformers generate", "transformers prompt lookup"
COPIED, COPIED_K = 10, 2  # tokens, as many as transformers' prompt lookup is asked for; masks beside them
DEFAULT_ROWS = {"linear": (1, 2, 4), "quadratic": (1, 2, 3, 4, 8)}
ACCEPTANCE = ("tokens per step, pooled", "mean over prompts", "median (quartiles)")


@dataclass
class Row:
    """One way of decoding and what was measured of it, an entry per prompt (or batch) and repeat. lookup: the options for copied drafts."""

    name: str
    k: int = 0
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    identical: int = 0
    compared: int = 0
    per_prompt: list[float] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    peak_mib: float = 0.0
    lookup: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        copies = f"lookup {self.lookup['lookup']}" if self.lookup.get("lookup") else ""
        if not self.k:
            return f"{copies}, no masks" if copies else self.name
        return f"{self.name}, k = {self.k}" + (f", {copies}" if copies else "")

    @property
    def options(self) -> dict:
        """What `Decoding` takes."""
        return {"mode": self.name, "k": self.k or None, **self.lookup}


@dataclass(frozen=True)
class Drawn:
    """Text that is drawn, not greedy: prompt i of a benchmark with seed i, to its full length, for texts that differ may end anywhere."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def options(self, first: int, count: int) -> dict:
        """What `generate` takes for `count` prompts from number `first` on."""
        return vars(self) | {"seed": list(range(first, first + count)), "eos": ()}


def texts(drawn: Drawn | None, first: int, batch: list) -> dict:
    return drawn.options(first, len(batch)) if drawn else {}


class Peer:
    """transformers' own decoding of the same weights."""

    def __init__(self, directory: Path, device, dtype, drawn: Drawn | None = None):
        self.options, self.drawn = {"do_sample": False}, drawn
        if drawn:
            self.options = {"do_sample": True, "temperature": drawn.temperature, "top_k": drawn.top_k or 0, "top_p": drawn.top_p or 1.0, "min_p": drawn.min_p}
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
        self.eos = self.model.generation_config.eos_token_id
        self.eos = self.eos if isinstance(self.eos, list) else [self.eos]

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int, lookup: bool) -> list[list[int]]:
        length = max(map(len, prompts))
        pad = self.eos[0] or 0
        ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        options = self.options | ({"prompt_lookup_num_tokens": 10} if lookup else {}) | ({"min_new_tokens": new_tokens} if self.drawn else {})
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=pad, **options)[:, length:].tolist()
        for i, tokens in enumerate(out):
            end = next((j + 1 for j, t in enumerate(tokens) if t in self.eos), len(tokens))
            out[i] = tokens[:end]
        return out


def measure(row: Row, model: MTPModel, peer: Peer | None, prompts: list[list[int]], new_tokens: int, **options) -> list[list[int]]:
    """Decode the prompts (one batch) in the row's way, book what it took, return the tokens."""
    with PeakMemory(model.device) as peak:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        if row.name in (GENERATE, LOOKUP):
            tokens, stats = peer.run(prompts, new_tokens, row.name == LOOKUP), None
        else:
            result = generate(model, prompts, max_new_tokens=new_tokens, **row.options, **options)
            tokens, stats = result.tokens, result.stats
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        row.seconds.append(time.perf_counter() - began)
    row.peak_mib = max(row.peak_mib, peak.mib)
    row.tokens += sum(map(len, tokens))
    if stats is not None:
        row.passes += sum(stats.passes)
        row.per_prompt += [t / p for t, p in zip(stats.tokens, stats.passes, strict=True)]
        row.offered = [a + b for a, b in zip(row.offered or [0] * len(stats.offered), stats.offered, strict=True)]
        row.accepted = [a + b for a, b in zip(row.accepted or [0] * len(stats.accepted), stats.accepted, strict=True)]
        row.parts = {part: row.parts.get(part, 0.0) + s for part, s in stats.seconds.items()}
    return tokens


def compare(
    rows: list[Row], model: MTPModel, peer: Peer | None, batches: list[list[list[int]]], new_tokens: int, repeats: int, drawn: Drawn | None = None
) -> None:
    """Run every row on every batch, in turn, `repeats` times; outputs are held against the first row's, but for those transformers draws."""
    longest = {len(batch): batch for batch in sorted(batches, key=lambda batch: max(map(len, batch)))}  # of each size: the last batch may be smaller
    for row, batch in product(rows, longest.values()):  # warm up: first calls allocate and record steps, which serve shorter texts too, or compile
        measure(Row(row.name, row.k, lookup=row.lookup), model, peer, batch, new_tokens, **texts(drawn, 0, batch))
    bar = tqdm(total=repeats * len(batches) * len(rows), desc="decode", disable=None)
    for repeat in range(repeats):
        for number, batch in enumerate(batches):
            expected = None
            for row in rows:
                tokens = measure(row, model, peer, batch, new_tokens, **texts(drawn, number * len(batches[0]), batch))
                expected = tokens if expected is None else expected
                if repeat == 0 and (row.name in MODES or not drawn):
                    row.identical += sum(a == b for a, b in zip(tokens, expected, strict=True))
                    row.compared += len(batch)
                bar.update()
    bar.close()


def ratio(over: Row, row: Row) -> tuple[float, float, float]:
    """Speedup of `row` over `over`: median and quartiles over prompts and repeats of the ratio of neighbouring times."""
    return quartiles([a / b for a, b in zip(over.seconds, row.seconds, strict=True)])


def main_table(rows: list[Row]) -> tuple[str, Row]:
    """The result table in Markdown, and the fastest of our rows."""
    base = rows[0]
    peer = next((r for r in rows if r.name == GENERATE), None)
    ours = [r for r in rows if r.name in MODES]
    best = max(ours, key=lambda r: ratio(base, r)[0])
    header = ["decoding", "tokens per step", "tokens/s", "speedup over autoregressive", "over transformers generate", "same text", "peak MiB"]
    lines = []
    for row in rows:
        cells = [row.label + (" **(best)**" if row is best else ""), f"{row.tokens / row.passes:.2f}" if row.passes else "-"]
        cells.append(f"{row.tokens / sum(row.seconds):.0f}")
        cells += ["{:.2f}x ({:.2f} to {:.2f})".format(*ratio(over, row)) if over else "-" for over in (base, peer)]
        cells += [f"{row.identical} of {row.compared}" if row.compared else "-", f"{row.peak_mib:.0f}"]
        lines.append(cells)
    return table(header, lines), best


def sample(model: MTPModel, tokenizer, prompt: list[int], row: Row, new_tokens: int, colour: bool, **options) -> str:
    """One continuation with the accepted drafts made visible: green in a terminal, in brackets elsewhere."""
    out = ["\033[2m" + tokenizer.decode(prompt) + "\033[0m" if colour else tokenizer.decode(prompt)]
    decoding = Decoding(model, [prompt], max_new_tokens=new_tokens, **row.options, **options)
    for new in decoding:
        drafts, own = tokenizer.decode(new[0][:-1]), tokenizer.decode(new[0][-1:])
        if drafts:
            out.append(f"\033[32m{drafts}\033[0m" if colour else f"[{drafts}]")
        out.append(own)
    legend = "green" if colour else "in brackets"
    return "".join(out) + f"\n\n({legend}: drafted and accepted; the rest: the model's own token of each step; {row.label})"


def plot(rows: list[Row], path: Path, title: str) -> bool:
    """Speedup and tokens per step against k; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for mode in MODES[1:]:
        chosen = sorted((r for r in rows if r.name == mode and not r.lookup), key=lambda r: r.k)
        if chosen:
            ks = [r.k for r in chosen]
            axes[0].plot(ks, [r.tokens / r.passes for r in chosen], "o-", label=mode)
            speed = [ratio(rows[0], r) for r in chosen]
            errors = [[s[0] - s[1] for s in speed], [s[2] - s[0] for s in speed]]
            axes[1].errorbar(ks, [s[0] for s in speed], yerr=errors, fmt="o-", capsize=3, label=mode)
    for axis, label in zip(axes, ("tokens per step", "wall-clock speedup over autoregressive"), strict=True):
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="masks k", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def check(
    model: MTPModel, prompts: list[list[int]], new_tokens: int, modes: Sequence[str], ks: list[int],
    drawn: Drawn | None = None, lookup: dict | None = None,
) -> tuple[str, bool]:  # fmt: skip
    """Autoregressive decoding and every mode and k at batch 1 and 4: how many outputs equal autoregressive decoding's at batch 1."""
    expected = [
        generate(model, [p], mode=AUTOREGRESSIVE, max_new_tokens=new_tokens, **texts(drawn, i, [p])).tokens[0]
        for i, p in enumerate(tqdm(prompts, desc="autoregressive", disable=None))
    ]
    lines, good = [], True
    ways = [(AUTOREGRESSIVE, 0)] + [(mode, k) for mode in modes for k in ks]
    for mode, k in tqdm(ways, desc="check", disable=None):
        cells = [mode, str(k) if k else "-"]
        for size in (1, 4):
            row = Row(mode, k, lookup=lookup or {})
            batches = [(i, prompts[i : i + size]) for i in range(0, len(prompts), size)]
            tokens = [t for i, batch in batches for t in measure(row, model, None, batch, new_tokens, **texts(drawn, i, batch))]
            same = sum(a == b for a, b in zip(tokens, expected, strict=True))
            good &= same == len(prompts)
            cells += [f"{same} of {len(prompts)}", f"{row.tokens / row.passes:.2f}"]
        lines.append(cells)
    return table(["mode", "k", "same text, batch 1", "tokens per step", "same text, batch 4", "tokens per step"], lines), good


def acceptance(
    model: MTPModel, prompts: list[list[int]], new_tokens: int, mode: str, k: int, use_sampler: bool = True, batch: int = 1, drawn: Drawn | None = None,
    lookup: dict | None = None, candidates: int | None = None,
) -> dict:  # fmt: skip
    """Tokens per step of one way of decoding: pooled, and over the prompts mean, median and quartiles."""
    row = Row(mode, k, lookup=lookup or {})
    for i in tqdm(range(0, len(prompts), batch), desc=f"{mode}, k = {k}", disable=None, leave=False):
        each = prompts[i : i + batch]
        measure(row, model, None, each, new_tokens, use_sampler=use_sampler, draft_candidates=candidates, **texts(drawn, i, each))
    return acceptance_record(row, use_sampler)


def acceptance_record(row: Row, use_sampler: bool) -> dict:
    """What was measured of tokens per step, one decoding of each prompt."""
    middle, low, high = quartiles(row.per_prompt)
    return {"mode": row.name, "sampler": use_sampler, "k": row.k, "pooled": row.tokens / row.passes, "mean": sum(row.per_prompt) / len(row.per_prompt),
            "median": middle, "quartiles": [low, high], "per_prompt": row.per_prompt}  # fmt: skip


def acceptance_cells(record: dict) -> list[str]:
    """What `ACCEPTANCE` heads."""
    low, high = record["quartiles"]
    return [f"{record['pooled']:.2f}", f"{record['mean']:.2f}", f"{record['median']:.2f} ({low:.2f} to {high:.2f})"]


def steps_trained(notes: dict) -> int:
    """How many steps made an adapter, with those of the adapter that it was trained further from; 0 if its notes do not say."""
    before = steps_trained(notes["before"]) if "before" in notes else 0
    return before + notes.get("training", {}).get("steps_done", 0)


def ablation(
    model: MTPModel, prompts: list[list[int]], new_tokens: int, k: int, adapters: list[Path], drawn: Drawn | None = None, lookup: dict | None = None
) -> tuple[str, list[dict]]:
    """Tokens per step of the method's parts, with quartiles over the prompts; leaves the last adapter on the model."""
    lines, records = [], []
    for directory in adapters:
        adapter = load_adapter(directory)
        model.remove_adapter()
        adapter.apply(model, model.dtype)
        lcm, steps = adapter.notes.get("training", {}).get("lcm_weight", 1.0) > 0, steps_trained(adapter.notes)
        name = ("with LCM" if lcm else "without LCM") + (f", {steps} steps" if steps else "")
        for mode, sampler in (("linear", False), ("linear", True), ("quadratic", False), ("quadratic", True)):
            record = acceptance(model, prompts, new_tokens, mode, k, sampler, drawn=drawn, lookup=lookup)
            records.append(record | {"lcm": lcm, "steps": steps})
            lines.append([f"{mode}, {'with' if sampler else 'without'} sampler, {name}", *acceptance_cells(record)])
    return table([f"k = {k}", *ACCEPTANCE], lines), records


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, metavar="DIR", help="directory, or owner/name on the Hub (default: the demo adapter)")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], help="default: linear and quadratic; with --check all three")
    parser.add_argument("--k", type=int, nargs="+", help="masks per block (default: several by mode)")
    parser.add_argument("--batch", type=positive, help="prompts decoded together (default 1)")
    parser.add_argument("--prompts", type=Path, default=HELD_OUT, metavar="FILE", help="JSON lines or parquet, as for training (default: held-out source)")
    parser.add_argument("--num-prompts", type=positive, help="how many of them (default 16; with --check and --ablation 64)")
    parser.add_argument("--new-tokens", type=positive, default=100)
    parser.add_argument("--repeats", type=positive, help="how often every prompt is decoded in every way (default 2)")
    add_lookup_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, help="which prompt the sample shows (default: the first)")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' rows out")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="for decode.json and decode.png (default: results)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="only compare outputs, every mode and k, batch 1 and 4")
    only.add_argument("--ablation", action="store_true", help="only tokens per step with and without sampler and LCM")
    return parser


def refuse_unheeded(args: argparse.Namespace) -> None:
    """Raises ValueError for options of the timed table where it is not made."""
    table_alone = ("batch", "repeats", "seed", "no_transformers")
    for only, names, why in (
        ("check", table_alone, "decodes in batches of 1 and 4, once, and shows no sample"),
        ("ablation", ("modes", *table_alone), "decodes in both modes, one by one, once, and shows no sample"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, only) and getattr(args, name) not in (None, False)]
        if given:
            raise ValueError(f"--{only} {why}, whatever {' and '.join(given)} may say; accepted is either without the other")
    if args.ablation and len(args.k or ()) > 1:
        raise ValueError(f"--k has {args.k}; accepted is one with --ablation")


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if any(argument.partition("=")[0] == "--shape" for argument in argv):
        return decode_shape.main(argv)
    args = build_parser().parse_args(argv)
    drawn = Drawn(**sampling_options(args)) if sampling_options(args)["temperature"] else None
    lookup = lookup_options(args)
    refuse_unheeded(args)
    if not args.check and not args.ablation:
        args.batch, args.repeats, args.seed = args.batch or 1, args.repeats or 2, args.seed or 0
    args.out.mkdir(parents=True, exist_ok=True)  # before anything is measured
    dtype_name = args.dtype or default_dtype(args.device)
    device, dtype = torch.device(args.device), DTYPES[dtype_name]
    model = load_adapter(args.adapter).apply(load_asked_model(args), dtype)
    tokenizer = load_tokenizer(args.model)
    count = args.num_prompts or (64 if args.check or args.ablation else 16)
    prompts = read_prompts([args.prompts], tokenizer, vocab_size=model.config.vocab_size, limit=count)
    bad = [k for k in args.k or () if not 1 <= k <= model.mtp.num_masks]
    if bad:
        raise ValueError(f"--k has {bad}; accepted are 1 to the adapter's {model.mtp.num_masks}")
    ks = args.k or [k for k in (1, 2, 4, 8) if k <= model.mtp.num_masks]
    where = environment(device)
    settings = {key: shown(value) for key, value in vars(args).items()} | {"dtype": dtype_name}
    batch = "1 and 4" if args.check else args.batch or 1
    print(f"{where['device']}, {dtype_name}, {where['cpu_threads']} CPU threads, torch {where['versions']['torch']}; "
          f"{len(prompts)} held-out prompts, up to {args.new_tokens} new tokens each, batch {batch}{f', drawn: {drawn}' if drawn else ''}\n")  # fmt: skip

    if args.check:
        text, good = check(model, prompts, args.new_tokens, args.modes or MODES[1:], ks, drawn, lookup)
        print(text)
        write_json(args.out / "decode_check.json", {"environment": where, "settings": settings, "identical": good, "table": text.splitlines()})
        return 0 if good or dtype != torch.float32 else 1
    if args.ablation:
        adapters = [args.adapter, *(ABLATION if args.adapter == ADAPTER else ())]
        text, records = ablation(model, prompts, args.new_tokens, (args.k or [model.mtp.num_masks])[0], adapters, drawn, lookup)
        print(text)
        write_json(args.out / "decode_ablation.json", {"environment": where, "settings": settings, "rows": records})
        return 0

    rows = [Row(AUTOREGRESSIVE)]
    for mode in args.modes or DEFAULT_ROWS:
        rows += [Row(mode, k) for k in args.k or DEFAULT_ROWS.get(mode, ks) if k <= model.mtp.num_masks]
    copies = lookup if args.lookup else {"lookup": COPIED}
    ways = [(mode, k) for mode in args.modes or DEFAULT_ROWS for k in args.k or [min(COPIED_K, model.mtp.num_masks)]]
    rows += [Row(mode, k, lookup=copies) for mode, k in [(AUTOREGRESSIVE, 0), *ways]]
    peer = None
    if not args.no_transformers:
        peer = Peer(local_directory(args.model, MODEL), device, dtype, drawn)
        rows += [Row(GENERATE)] + ([Row(LOOKUP)] if args.batch == 1 else [])
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    compare(rows, model, peer, batches, args.new_tokens, args.repeats, drawn)
    text, best = main_table(rows)
    print(text)
    print("\nSpeedups: median (quartiles) over prompts and repeats. Same text: as autoregressive, token for token. "
          "Peak: of the whole process, transformers' copy of the model included.\n")  # fmt: skip
    number = args.seed % len(prompts)
    print(sample(model, tokenizer, prompts[number], best, args.new_tokens, sys.stdout.isatty(), **texts(drawn, number, prompts[number : number + 1])))
    records = [vars(r) | {"tokens_per_step": r.tokens / r.passes if r.passes else None, "speedup": ratio(rows[0], r)} for r in rows]
    write_json(args.out / "decode.json", {"environment": where, "settings": settings, "rows": records, "table": text.splitlines()})
    drawn = plot(rows, args.out / "decode.png", f"{where['device']}, {dtype_name}, batch {args.batch}")
    print(f"\nwritten: {args.out / 'decode.json'}" + (f", {args.out / 'decode.png'}" if drawn else " (no plot: matplotlib is not installed)"))
    same = all(r.identical == r.compared for r in rows if r.name in MODES)
    return 0 if same or dtype != torch.float32 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
