"""What drafting k tokens moves with the sampler: exact, and from a shortlist. Arithmetic on shapes, no measurement.

    python -m bench.sampler_counts

Exact drafting reads all of lm_head in each of its k sequential steps. A shortlist reads it once, for all k masks, or not at all where the pass over
it that verifies tokens has the masks' rows too; in the steps it reads only the rows of its candidates. Counted is what
`mtp_kernels.reference.sampler_draft` moves through memory, each matrix read once per product that has it; left out are vectors of the hidden size
(states, embeddings, biases, norms) and the candidates' ids.
"""

import argparse
from dataclasses import dataclass

import torch

from bench.counts import Count
from bench.prescribed import shape_config, step_bytes
from mtp_kernels.nn import SamplerHead
from mtp_model import MTPModel


@dataclass(frozen=True)
class SamplerBytes:
    """lm_head: its products' reading of it. rows: the candidates' rows, gathered. logits: written, then read by argmax or
    topk. layers: the sampler's own two matrices."""

    lm_head: int
    rows: int
    logits: int
    layers: int

    @property
    def total(self) -> int:
        return self.lm_head + self.rows + self.logits + self.layers

    @property
    def least(self) -> int:
        """What remains where logits stay on the chip and candidates' rows are read in place."""
        return self.lm_head + self.rows // 3 + self.layers


def sampler_draft(d: int, vocab: int, k: int, candidates: int | None = None, batch: int = 1, itemsize: int = 2, listed: bool = False) -> SamplerBytes:
    """Bytes that drafting k tokens for each of `batch` sequences moves. candidates, listed (their lists are given): see `mtp_kernels.sampler_draft`."""
    layers = (1 + 2 * k) * d * d * itemsize  # the first matrix's half for z once, its other half and the second one k times
    every_logit = 2 * batch * k * vocab * itemsize
    if candidates is None or candidates >= vocab:
        return SamplerBytes(k * vocab * d * itemsize, 0, every_logit, layers)
    drafted = batch * k * candidates
    rows = 3 * drafted * d * itemsize  # read, written side by side, read by the product
    if listed:
        return SamplerBytes(0, rows, 2 * drafted * itemsize, layers)
    return SamplerBytes(vocab * d * itemsize, rows, every_logit + 2 * drafted * itemsize, layers)


def least(d: int, vocab: int, k: int, candidates: int | None = None, batch: int = 1, itemsize: int = 2) -> Count:
    """What no implementation can leave out, and the products' operations."""
    logits = vocab if candidates is None or candidates >= vocab else vocab + candidates  # of z for the list, then of the listed tokens
    return Count(sampler_draft(d, vocab, k, candidates, batch, itemsize).least, 2 * batch * k * d * (3 * d + logits))


def table(d: int, vocab: int, k: int, candidates: tuple[int | None, ...] = (None, 16, 64, 256), batch: int = 1) -> str:
    exact = sampler_draft(d, vocab, k, batch=batch).total
    lines = ["| candidates | lm_head, MB | rows, MB | logits, MB | sampler's layers, MB | total, MB | of exact |", "|---:|---:|---:|---:|---:|---:|---:|"]
    for c, listed in [(None, False)] * (None in candidates) + [(size, given) for size in candidates if size is not None for given in (False, True)]:
        b = sampler_draft(d, vocab, k, c, batch, listed=listed)
        cells = [f"{x / 1e6:,.1f}" for x in (b.lm_head, b.rows, b.logits, b.layers, b.total)]
        name = "all (exact)" if c is None else f"{c}, listed by verification's pass" if listed else str(c)
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * b.total / exact:.1f} % |")
    return "\n".join(lines)


def step_table(shapes: tuple[str, ...] = ("Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-4B"), k: int = 8, rank: int = 128, context: int = 2048) -> str:
    """Gigabytes that a whole decoding step must read, by how the sampler's candidates are found: see `bench.prescribed.step_bytes`."""
    lines = ["| model | autoregressive, GB | all tokens | 64, a pass of its own | 64, listed by verification's pass |", "|---|---:|---:|---:|---:|"]
    for shape in shapes:
        with torch.device("meta"):
            model = MTPModel(shape_config(shape), dtype=torch.bfloat16)
            model.sampler = SamplerHead(model.config.hidden_size, dtype=torch.bfloat16)
            for layer in model.layers:
                for module in layer.adapted().values():
                    module.add_adapter(rank)
        least = sum(step_bytes(model, 0, 1, context).values())
        cells = []
        for way in ((None, False), (64, False), (64, True)):
            step = sum(step_bytes(model, k, 1, context, *way).values())
            cells.append(f"{step / 1e9:.2f} ({step / least:.2f}x)")
        lines.append(f"| {shape} | {least / 1e9:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.sampler_counts", description=__doc__.split("\n\n")[0]).parse_args()
    print("Llama-3.1-8B (d = 4096, V = 128256), k = 8, batch 1, bfloat16:\n")
    print(table(4096, 128_256, 8))
    print("\nA whole step, rank 128, 2,048 tokens in the cache, and against an autoregressive step (rows not counted: few cost nothing):\n")
    print(step_table())
