"""Tokens per step where the sampler chooses among each mask's likeliest tokens, instead of among all.

A shortlist spares the sampler most of its reading of lm_head (`bench.sampler_counts` counts it), and drafts become a little worse: a token
that is not on the list is no draft. The text is the same.
"""

from bench.decode import ACCEPTANCE, acceptance_cells
from bench.report import table
from bench.studies.common import Result, Study

TITLE = "Tokens per step by the length of the sampler's list"
FLAGS = ("adapter", "held_out", "prompts", "new_tokens", "candidates")
DEFAULTS: dict = {}
QUICK = {"prompts": 2, "new_tokens": 12, "candidates": [8]}
MODE = "quadratic"


def run(study: Study) -> Result:
    args, model = study.args, study.use(study.args.adapter)
    k, vocabulary = model.mtp.num_masks, model.config.vocab_size
    if model.sampler is None:
        raise ValueError(f"{args.adapter} has no sampler, which alone takes a list; accepted is an adapter with one")
    beyond = [count for count in args.candidates if not 1 <= count < vocabulary]
    if beyond:
        raise ValueError(f"--candidates are {args.candidates}; accepted are 1 to {vocabulary - 1}, for all {vocabulary} tokens are measured beside them")
    sizes = [vocabulary, *sorted(set(args.candidates), reverse=True)]
    records = [study.tokens_per_step(args.adapter, k, mode=MODE, candidates=count) | {"candidates": count} for count in sizes]
    most = records[0]["pooled"]
    lines = [
        ["all" if r["candidates"] == vocabulary else str(r["candidates"]), *acceptance_cells(r), f"{100 * (r['pooled'] / most - 1):+.1f} %"] for r in records
    ]  # fmt: skip
    notes = [f"{len(study.prompts)} held-out prompts, {MODE}, k = {k}, a vocabulary of {vocabulary:,}."]

    def draw(figure):
        axis = figure.subplots()
        axis.semilogx([r["candidates"] for r in records], [r["pooled"] for r in records], "o-", base=2)
        axis.set(xlabel="tokens the sampler chooses from", ylabel=f"tokens per step, k = {k}")
        axis.grid(alpha=0.3)

    return Result({"rows": records}, table(["candidates", *ACCEPTANCE, "against all"], lines), notes, draw, size=(6, 4))
