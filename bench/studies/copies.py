"""Tokens per step by kind of text with drafts of the masks, with drafts copied from the text itself, and with both.

Copies are good where a text repeats itself or its prompt, masks wherever the model knows what comes. Both together take a copy
where the newest two tokens stood before, and the masks' drafts elsewhere. Drawn text repeats itself less than greedy text.
"""

from tqdm import tqdm

from bench.decode import Drawn
from bench.report import table
from bench.studies.common import Result, Study
from bench.studies.domains import read_domains
from mtp_kernels import Sampling
from mtp_model.lookup import Lookup

TITLE = "Tokens per step with drafts copied from the text"
FLAGS = ("adapter", "prompts", "new_tokens", "lookup", "temperatures", "seed")
DEFAULTS = {"prompts": 16, "temperatures": [0.7]}
QUICK = {"prompts": 1, "new_tokens": 12, "temperatures": [1.0]}
MODE = "quadratic"


def run(study: Study) -> Result:
    args, copies = study.args, {"lookup": study.args.lookup}
    Lookup(args.lookup)  # refuses what is none, before any work
    for temperature in args.temperatures:
        Sampling(temperature)
    k = study.use(args.adapter).mtp.num_masks
    ways = {"masks": (k, MODE, {}), "copies": (0, "autoregressive", copies), "both": (k, MODE, copies)}
    found, absent, notes = read_domains(study)
    temperatures, records, lines = [0.0, *args.temperatures], [], []
    for domain in tqdm(found, desc="copies", disable=None, leave=False):
        cells = [domain.name, str(len(domain.prompts))]
        for temperature in temperatures:
            drawn = {"drawn": Drawn(temperature)} if temperature else {}
            values = {
                way: study.tokens_per_step(args.adapter, masks, domain.prompts, mode, lookup=lookup, **drawn)
                for way, (masks, mode, lookup) in ways.items()
            }  # fmt: skip
            records.append({"domain": domain.name, "temperature": temperature, "prompts": domain.places, "texts": domain.texts, "by_way": values})
            cells += [f"{value['pooled']:.2f}" for value in values.values()]
        lines.append(cells)
    header = ["text", "prompts", *(f"{way}, {f'temperature {t:g}' if t else 'greedy'}" for t in temperatures for way in ways)]
    notes.append(f"Masks: {MODE}, k = {k}. Copies: {args.lookup} tokens that followed the last place where the newest two stood before.")

    def draw(figure):
        axes = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
        for axis, temperature in zip(axes, temperatures, strict=True):
            chosen = [r for r in records if r["temperature"] == temperature]
            for offset, way in enumerate(ways):
                axis.barh([i + 0.27 * (1 - offset) for i in range(len(chosen))], [r["by_way"][way]["pooled"] for r in chosen], 0.25, label=way)
            axis.set(yticks=range(len(chosen)), yticklabels=[r["domain"] for r in chosen], xlabel="tokens per step")
            axis.set_title(f"temperature {temperature:g}" if temperature else "greedy", fontsize=9)
            axis.grid(alpha=0.3, axis="x")
        axes[0].legend(fontsize=8)

    return Result({"rows": records, "absent": absent}, table(header, lines), notes, draw, size=(10, 4.5))
