"""What each part of the method brings (Fig. 7): linear decoding, quadratic, then the sampler, then LCM in training.

The first three are decodings of one adapter that was trained without the consistency loss (LCM); the last is of its twin with it.
Both have a sampler head, which the first two do not use.
"""

from bench.decode import ACCEPTANCE, acceptance_cells
from bench.report import table
from bench.studies.common import Result, Study
from mtp_model import load_adapter

TITLE = "What each part of the method brings"
FLAGS = ("pair", "held_out", "prompts", "new_tokens")
DEFAULTS: dict = {}
QUICK = {"prompts": 2, "new_tokens": 12}
# name, whether trained with LCM, mode, whether the sampler drafts
RUNGS = (
    ("linear", False, "linear", False),
    ("quadratic", False, "quadratic", False),
    ("+ sampler", False, "quadratic", True),
    ("+ LCM", True, "quadratic", True),
)
PAPER = (2.21, 2.75, 3.05, 3.375)


def gain(after: list[float], before: list[float]) -> tuple[float, float]:
    """Mean over prompts of the difference of their tokens per step, and its standard error (nan for one prompt)."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    error = (sum((d - mean) ** 2 for d in differences) / (n - 1) / n) ** 0.5 if n > 1 else float("nan")
    return mean, error


def told_by_lcm(pair) -> tuple[dict, list[str]]:
    """The pair's directories by whether they were trained with LCM, and in what else their trainings differ."""
    adapters = {path: load_adapter(path) for path in pair}
    training = [adapter.notes.get("training", {}) for adapter in adapters.values()]
    by_lcm = {notes.get("lcm_weight", 1.0) > 0: path for path, notes in zip(adapters, training, strict=True)}
    if len(by_lcm) < 2:
        raise ValueError(f"pair is {', '.join(str(p) for p in pair)}; accepted are one adapter trained with LCM and one without (lcm_weight 0)")
    others = {key for key in training[0] | training[1] if training[0].get(key) != training[1].get(key)} - {"lcm_weight"}
    if len({adapter.config for adapter in adapters.values()}) > 1:
        others.add("the adapter's own settings")
    return by_lcm, sorted(others)


def run(study: Study) -> Result:
    by_lcm, others = told_by_lcm(study.args.pair)
    k = min(load_adapter(path).config.num_masks for path in by_lcm.values())
    records, lines = [], []
    for (name, lcm, mode, sampler), paper in zip(RUNGS, PAPER, strict=True):
        record = study.tokens_per_step(by_lcm[lcm], k, mode=mode, use_sampler=sampler) | {"rung": name, "lcm": lcm, "paper": paper}
        added = ""
        if records:
            record["gain"], record["gain_error"] = gain(record["per_prompt"], records[-1]["per_prompt"])
            added = f"{record['gain']:+.3f} (± {record['gain_error']:.3f})"
        records.append(record)
        lines.append([name, *acceptance_cells(record), added, f"{paper:g}"])
    text = table([f"k = {k}", *ACCEPTANCE, "gain per prompt (± standard error)", "paper, 8 masks"], lines)
    notes = [f"{len(study.prompts)} held-out prompts. The gain is over the row above, prompt by prompt. The paper's figures are of an 8 B model."]
    if others:
        notes.append(f"The two adapters' trainings differ in more than LCM: {', '.join(others)}.")

    def draw(figure):
        axis = figure.subplots()
        axis.boxplot([r["per_prompt"] for r in records], tick_labels=[r["rung"] for r in records], widths=0.5)
        axis.plot(range(1, len(records) + 1), [r["pooled"] for r in records], "D-", label="pooled")
        axis.plot(range(1, len(records) + 1), [r["paper"] for r in records], "s:", color="grey", label="paper (Tulu3-8B)")
        axis.set(ylabel=f"tokens per step, k = {k}")
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8)

    return Result({"rows": records, "differences": others}, text, notes, draw, size=(6.5, 4))
