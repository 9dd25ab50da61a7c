"""Tokens per step by kind of text (the form of Table 1), with 1 to 8 masks, quadratic decoding.

The demo model has read this Python's library, so of it only held-out files are used; all else was never trained on: other packages'
Python, C++ headers, English, HTML and number tables. What an installation lacks is said and left out.
"""

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench.report import table
from bench.studies.common import Result, Study
from mtp_model.demo.answers import held_out_prompts
from mtp_model.demo.corpus import read_corpus

TITLE = "Tokens per step by kind of text"
FLAGS = ("adapter", "prompts", "new_tokens", "k", "seed")
DEFAULTS = {"prompts": 16}
QUICK = {"prompts": 1, "new_tokens": 8, "k": [1, 8]}
PROMPT_LENGTH, MAX_FILES, MAX_BYTES = 96, 200, 400_000
PAPER = {"GSM8K": [1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22], "MMLU": [1.54, 1.87, 2.06, 2.18, 2.26, 2.32, 2.36, 2.38],
         "HumanEval": [1.86, 2.63, 3.30, 3.87, 4.40, 4.79, 5.14, 5.35], "AlpacaEval": [1.61, 1.97, 2.18, 2.31, 2.40, 2.45, 2.49, 2.52],
         "mean of 13 tasks": [1.67, 2.14, 2.48, 2.69, 2.88, 2.99, 3.10, 3.17]}  # fmt: skip


def read_files(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Name to text of up to `MAX_FILES` of the files, spread evenly over them; not of what is large or no UTF-8."""
    paths = sorted(path for path in paths if path.is_file() and path.stat().st_size <= MAX_BYTES)
    texts = {}
    for i in range(0, len(paths), max(1, -(-len(paths) // MAX_FILES))):
        try:
            texts[paths[i].relative_to(root).as_posix()] = paths[i].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def english() -> dict[str, str]:
    """The language reference as the library carries it for help()."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(topics)


def find_domains(library: Path | None = None, packages: Path | None = None) -> dict[str, dict[str, str]]:
    """Domain to its texts by name, empty where there are none. library: this Python's; packages: the directory of torch's own files."""
    library, packages = Path(library or sysconfig.get_paths()["stdlib"]), Path(packages or Path(torch.__file__).parent)
    try:
        _, held_out = read_corpus(library)
    except ValueError:  # no library here
        held_out = {}
    tests = {name: text for name, text in held_out.items() if "test/" in name or "tests/" in name or "_test/" in name}
    return {
        "Python, library": {name: text for name, text in held_out.items() if name not in tests},
        "Python, tests": tests,
        "Python, PyTorch": read_files(packages, packages.rglob("*.py")),
        "C++ headers, PyTorch": read_files(packages, (packages / "include" / "c10").rglob("*.h")),
        "English, language reference": english(),
        "HTML": read_files(library, [*library.glob("idlelib/*.html"), *library.glob("test/*.html")]),
        "number tables": read_files(library, library.glob("test/decimaltestdata/*.decTest")),
    }


@dataclass(frozen=True)
class Domain:
    """Prompts of a kind of text: their tokens, and where they stand. texts: how many files there are."""

    name: str
    prompts: list[list[int]]
    places: list[dict]
    texts: int


def read_domains(study: Study) -> tuple[list[Domain], list[str], list[str]]:
    """The domains, which of them this installation lacks, and notes on what is less than was asked for."""
    args, found, absent, notes = study.args, [], [], []
    for name, texts in find_domains().items():
        records = held_out_prompts(study.tokenizer, texts, args.prompts, PROMPT_LENGTH, args.seed) if any(len(t) > 2000 for t in texts.values()) else []
        if not records:
            absent.append(name)
            continue
        prompts = [study.tokenizer(record["prompt"])["input_ids"] for record in records]
        found.append(Domain(name, prompts, [{"file": record["file"], "line": record["line"]} for record in records], len(texts)))
        if len(prompts) < args.prompts:
            notes.append(f"{name}: {len(prompts)} prompts instead of {args.prompts}, of {len(texts)} files.")
    if not found:
        raise ValueError(f"no text was found for {', '.join(absent)}; accepted is an installation with at least one of them")
    if absent:
        notes.append(f"Left out, for this installation has no text for them: {', '.join(absent)}.")
    notes.append(f"Tokens per step, pooled over a domain's prompts of {PROMPT_LENGTH} tokens, up to {args.new_tokens} new ones.")
    return found, absent, notes


def run(study: Study) -> Result:
    args = study.args
    most = study.use(args.adapter).mtp.num_masks
    ks = args.k or list(range(1, most + 1))
    bad = [k for k in ks if not 1 <= k <= most]
    if bad:
        raise ValueError(f"--k has {bad}; accepted are 1 to the adapter's {most}")
    records, lines = [], []
    found, absent, notes = read_domains(study)
    for domain in tqdm(found, desc="domains", disable=None, leave=False):
        values = {k: study.tokens_per_step(args.adapter, k, domain.prompts) for k in ks}
        by_masks = {str(k): value for k, value in values.items()}
        records.append({"domain": domain.name, "prompts": domain.places, "texts": domain.texts, "by_masks": by_masks})
        lines.append([domain.name, str(len(domain.prompts)), *(f"{values[k]['pooled']:.2f}" for k in ks)])
    shown = {name: values for name, values in PAPER.items() if name in ("GSM8K", "MMLU", "mean of 13 tasks")}
    lines += [[f"(paper, 8 B model: {name})", "-", *(f"{values[k - 1]:.2f}" if k <= 8 else "-" for k in ks)] for name, values in shown.items()]

    def draw(figure):
        axis = figure.subplots()
        for record in records:
            axis.plot(ks, [record["by_masks"][str(k)]["pooled"] for k in ks], "o-", label=record["domain"])
        axis.plot([k for k in ks if k <= 8], [PAPER["mean of 13 tasks"][k - 1] for k in ks if k <= 8], "s:", color="grey", label="paper, mean of 13 tasks")
        axis.set(xlabel="masks k", ylabel="tokens per step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    return Result({"rows": records, "absent": absent, "paper": PAPER}, table(["text", "prompts", *(f"k = {k}" for k in ks)], lines), notes, draw, size=(7, 4.5))
