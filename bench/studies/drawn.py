"""Tokens per step of drawn text by temperature, and what noise on the drafts brings.

Drafts with the noise of their positions draw what the text draws where sampler and model agree. Beside them stand the sampler's most
likely tokens as drafts: one is then accepted with the model's probability of it, as by the usual rule of speculative sampling.
Both write the same text, autoregressive decoding's with the same seeds, which is counted; the exit status is 1 if one is another.
"""

import contextlib
from collections.abc import Iterator

from bench.decode import ACCEPTANCE, Drawn, Row, acceptance_cells, acceptance_record, measure, texts
from bench.report import table
from bench.studies.common import DECODE_BATCH, Result, Study
from mtp_kernels import Sampling
from mtp_model import MTPModel, generate

TITLE = "Tokens per step of drawn text"
FLAGS = ("adapter", "held_out", "prompts", "new_tokens", "temperatures")
DEFAULTS: dict = {}
QUICK = {"prompts": 2, "new_tokens": 12, "temperatures": [1.0]}
MODE = "quadratic"


@contextlib.contextmanager
def most_likely_drafts(model: MTPModel) -> Iterator[None]:
    """Within, drafts are without noise."""
    draft = model.draft
    model.kept_steps.clear()
    model.draft = lambda z, first, use_sampler=True, candidates=None, *_: draft(z, first, use_sampler, candidates)
    try:
        yield
    finally:
        del model.draft
        model.kept_steps.clear()


def decode(model: MTPModel, prompts: list[list[int]], new_tokens: int, k: int, drawn: Drawn | None) -> dict:
    """As `bench.decode.acceptance`, and how many texts are autoregressive decoding's."""
    row, same = Row(MODE, k), 0
    for i in range(0, len(prompts), DECODE_BATCH):
        batch = prompts[i : i + DECODE_BATCH]
        options = texts(drawn, i, batch)
        expected = generate(model, batch, mode="autoregressive", max_new_tokens=new_tokens, **options).tokens
        same += sum(a == b for a, b in zip(measure(row, model, None, batch, new_tokens, **options), expected, strict=True))
    return acceptance_record(row, True) | {"same": same}


def run(study: Study) -> Result:
    args, prompts = study.args, study.prompts
    for temperature in args.temperatures:
        Sampling(temperature)  # refuses what is none, before any work
    model = study.use(args.adapter)
    k = model.mtp.num_masks
    records, lines = [], []
    for temperature in [0.0, *args.temperatures]:
        drawn = Drawn(temperature) if temperature else None
        for noise in (True, False) if drawn else (False,):
            with contextlib.nullcontext() if noise else most_likely_drafts(model):
                record = decode(model, prompts, args.new_tokens, k, drawn) | {"temperature": temperature, "noise": noise}
            records.append(record)
            drafts = ("with noise" if noise else "most likely") if drawn else "most likely"
            lines.append([f"{temperature:g}", drafts, *acceptance_cells(record), f"{record['same']} of {len(prompts)}"])
    text = table(["temperature", "drafts", *ACCEPTANCE, "same text"], lines)
    notes = [f"{len(prompts)} held-out prompts, a seed each, quadratic, k = {k}. Temperature 0 is greedy text. Same text: as autoregressive, token for token."]

    def draw(figure):
        axis = figure.subplots()
        for noise, label in ((True, "drafts with noise"), (False, "most likely drafts")):
            points = [(r["temperature"], r["pooled"]) for r in records if r["noise"] == noise or not r["temperature"]]
            axis.plot(*zip(*points, strict=True), "o-", label=label)
        axis.set(xlabel="temperature", ylabel=f"tokens per step, k = {k}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    good = all(record["same"] == len(prompts) for record in records)
    return Result({"rows": records}, text, notes, draw, size=(6, 4), good=good or args.dtype not in (None, "float32"))
