"""Which rank the adapter needs (Fig. 8): tokens per step by LoRA rank, with and without the sampler, and the memory each costs.

One training of equal steps per rank (and seed); without the sampler means the same adapter drafting from the masks' own logits.
"""

import math

from bench.report import table
from bench.studies.common import TRAINING, Result, Study
from mtp_model import MTPConfig, MTPModel

TITLE = "LoRA rank: tokens per step and memory"
FLAGS = (*TRAINING, "ranks", "seeds")
DEFAULTS = {"steps": 400}
QUICK = {"prompts": 1, "new_tokens": 8, "batch_size": 2, "anchors": 4, "max_length": 64, "ranks": [1, 16], "rounds": 1, "steps": 1}
PAPER = {"tokens_per_step": {"1": 3.19, "16": 3.29, "128": 3.37, "512": 3.06}, "without_sampler": {"128": 2.98},
         "memory_percent": {"1": 0.66, "16": 1.15, "128": 4.80}}  # fmt: skip


def overhead(model: MTPModel, base_parameters: int) -> dict[str, float]:
    """Parameters of LoRA, sampler and masks in % of the base's."""
    counts = {"lora": 0, "sampler": 0, "masks": 0}
    for name, parameter in model.adapter_parameters().items():
        counts["lora" if "lora_" in name else name.split(".")[0]] += parameter.numel()
    return {part: 100 * count / base_parameters for part, count in counts.items()}


def run(study: Study) -> Result:
    args, examples, records = study.args, study.examples(study.args.data), []
    largest = MTPConfig(args.masks, max(args.ranks))
    steps = study.steps(largest, study.recipe(), examples)
    for rank in args.ranks:
        for seed in range(args.seeds):
            run = study.train(f"rank-{rank}-seed-{seed}", MTPConfig(args.masks, rank), study.recipe(steps=steps, seed=seed), examples)
            record = {"rank": rank, "seed": seed, "steps": steps, "memory_percent": overhead(study.use(run), study.base_parameters)}
            for key, sampler in (("with_sampler", True), ("without_sampler", False)):
                record[key] = study.tokens_per_step(run, args.masks, use_sampler=sampler)
            records.append(record)

    lines, means = [], {}
    for rank in args.ranks:
        mine = [r for r in records if r["rank"] == rank]
        cells = [str(rank)]
        for key in ("with_sampler", "without_sampler"):
            values = [r[key]["pooled"] for r in mine]
            means[rank, key] = sum(values) / len(values)
            cells.append(f"{means[rank, key]:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""))
        memory = mine[0]["memory_percent"]
        cells += [f"{memory[part]:.2f} %" for part in ("lora", "sampler")] + [f"{sum(memory.values()):.2f} %"]
        cells += [f"{PAPER['tokens_per_step'].get(str(rank), math.nan):.2f}".replace("nan", "-")]
        lines.append(cells)
    header = ["rank", "tokens per step", "without sampler", "LoRA, of the base", "sampler", "all, masks too", "paper"]
    notes = [f"k = {args.masks}, {steps} steps each, {args.seeds} seed{'s (mean, least to most)' if args.seeds > 1 else ''}, pooled over {len(study.prompts)} "
             f"held-out prompts. Memory: parameters in % of the base's {study.base_parameters:,}: a small base makes the sampler's share large."]  # fmt: skip

    def draw(figure):
        left, right = figure.subplots(1, 2)
        for key, label in (("with_sampler", "with sampler"), ("without_sampler", "without")):
            left.plot(args.ranks, [means[rank, key] for rank in args.ranks], "o-", label=label)
        for part, label in (("lora", "LoRA"), ("sampler", "sampler")):
            right.plot(args.ranks, [next(r for r in records if r["rank"] == rank)["memory_percent"][part] for rank in args.ranks], "o-", label=label)
        for axis, label in ((left, f"tokens per step, k = {args.masks}"), (right, "% of the base's parameters")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(args.ranks, [str(rank) for rank in args.ranks])
            axis.set(xlabel="rank", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)

    return Result({"rows": records, "paper": PAPER}, table(header, lines), notes, draw)
