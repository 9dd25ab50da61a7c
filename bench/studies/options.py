"""What each option of the training adds at equal training time: one recipe, which a small machine can afford, and one change each, then
all that add something together.

First a few steps of every variant in turn tell what a step of each costs; then each is trained for as many steps as fit the same
time, and decodes the held-out prompts. A difference of means that is not larger than the spread over seeds is marked as not told apart.
"""

from dataclasses import asdict

from bench.report import table
from bench.studies.common import TRAINING, Result, Study
from mtp_model import MTPConfig

TITLE = "The recipe's options at equal training time"
FLAGS = (*TRAINING, "source", "rank", "seeds", "variants")
DEFAULTS = {"seeds": 3, "seconds": 600.0}
QUICK = {"prompts": 1, "new_tokens": 8, "batch_size": 2, "anchors": 4, "max_length": 48, "seeds": 1, "rounds": 1, "steps": 1}


def variants(anchors: int) -> dict[str, tuple[str, dict]]:
    """Name to what it is and its changes to the plain recipe: the paper's, but for two options that make a step cheaper or its data fitter."""
    single = {
        "source": ("source text as data", {"data": "source"}),
        "all-anchors": ("masks after every position, the paper's", {"anchors_per_sequence": None}),
        "soft-0.5": ("soft targets, half", {"soft_targets": 0.5}),
        "soft-1": ("soft targets alone", {"soft_targets": 1.0}),
        "decay": ("mask j weighs 0.9 ** (j - 1)", {"mask_decay": 0.9}),
        "drop": ("half the passes drop late masks", {"drop_masks": 0.5}),
        "masks": ("learned masks", {"train_masks": True}),
    }
    together = {"soft_targets": 1.0, "mask_decay": 0.9, "train_masks": True}
    plain = f"plain: own continuations, {anchors} anchors per sequence"
    return {"plain": (plain, {})} | single | {"all": ("soft targets, weighted and learned masks together", together)}


def told_apart(values: list[float], plain: list[float]) -> bool:
    """Whether the means differ by more than the larger of the two spreads (most less least) over seeds; never told by one seed."""
    if min(len(values), len(plain)) < 2:
        return False
    spread = max(max(v) - min(v) for v in (values, plain))
    return abs(sum(values) / len(values) - sum(plain) / len(plain)) > spread


def run(study: Study) -> Result:
    args = study.args
    known = variants(args.anchors)
    unknown = [name for name in args.variants or () if name not in known]
    if unknown:
        raise ValueError(f"--variants has {', '.join(unknown)}; accepted are {', '.join(known)}")
    names = list(dict.fromkeys(["plain", *(args.variants or known)]))
    data = {"own": study.examples(args.data)}
    if any(known[name][1].get("data") == "source" for name in names):
        data["source"] = study.examples(args.source)
    mtp = MTPConfig(args.masks, args.rank)

    def kind(name: str, **settings):
        changes = dict(known[name][1])
        examples = data[changes.pop("data", "own")]
        return mtp, study.recipe(**changes | settings), examples

    cost = study.seconds_per_step({name: kind(name) for name in names})
    budget = args.seconds or args.steps * cost["plain"]
    records = []
    for seed in range(args.seeds):
        for name in names:
            _, config, examples = kind(name, steps=max(1, round(budget / cost[name])), seed=seed)
            directory = study.train(f"{name}-seed-{seed}", mtp, config, examples)
            records.append({
                "variant": name, "seed": seed, "steps": config.steps, "settings": asdict(config), "data": known[name][1].get("data", "own"),
                "wall_seconds": study.log(directory)[-1]["seconds"], "decoding": study.tokens_per_step(directory, args.masks),
            })  # fmt: skip

    by_name = {name: [r["decoding"]["pooled"] for r in records if r["variant"] == name] for name in names}
    plain = sum(by_name["plain"]) / args.seeds
    lines, summary = [], []
    for name, values in by_name.items():
        mean, steps = sum(values) / len(values), next(r["steps"] for r in records if r["variant"] == name)
        row = {"variant": name, "what": known[name][0], "seconds_per_step": cost[name], "steps": steps, "mean": mean, "least": min(values),
               "most": max(values), "gain_percent": 100 * (mean / plain - 1), "told_apart": told_apart(values, by_name["plain"])}  # fmt: skip
        summary.append(row)
        gain = "-" if name == "plain" else f"{row['gain_percent']:+.1f} %" + ("" if row["told_apart"] else " (not told apart)")
        lines.append([row["what"], f"{cost[name]:.3f}", str(steps), f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})", gain])
    header = ["recipe", "seconds per step", "steps", "tokens per step (least to most)", "gain over plain"]
    clock = "CPU seconds" if study.model.device.type == "cpu" else "seconds"
    seeds = f"{args.seeds} seeds" if args.seeds > 1 else "one seed, which tells nothing apart"
    notes = [f"Each trained for {budget:.0f} {clock}, {seeds}; rank {args.rank}, k = {args.masks}, quadratic decoding of {len(study.prompts)} held-out "
             "prompts. Not told apart: the means differ by no more than the larger of the two spreads over seeds."]  # fmt: skip

    def draw(figure):
        axis = figure.subplots()
        for i, row in enumerate(summary):
            axis.plot(by_name[row["variant"]], [i] * len(by_name[row["variant"]]), ".", color="grey")
            axis.plot(row["mean"], i, "D", color="C0" if row["told_apart"] or row["variant"] == "plain" else "lightgrey")
        axis.axvline(plain, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(summary)), [row["what"] for row in summary])
        axis.invert_yaxis()
        axis.set(xlabel=f"tokens per step, k = {args.masks} (points: seeds; pale: not told apart from plain)")
        axis.grid(alpha=0.3)

    return Result({"budget_seconds": budget, "seconds_per_step": cost, "summary": summary, "rows": records}, table(header, lines), notes, draw, size=(9, 4.5))
