"""The sampler's bytes, by hand."""

import subprocess
import sys
from pathlib import Path

from bench.sampler_counts import sampler_draft, step_table, table

LLAMA = (4096, 128_256, 8)


def test_exact_by_hand():
    b = sampler_draft(*LLAMA)
    assert b.lm_head == 8_405_385_216  # 8 x 128,256 x 4,096 x 2: the 8.4 GB
    assert b.rows == 0
    assert b.logits == 4_104_192  # 8 x 128,256 x 2, written and read
    assert b.layers == 570_425_344  # 17 x 4,096 x 4,096 x 2
    assert b.total == 8_979_914_752
    assert b == sampler_draft(*LLAMA, candidates=128_256)


def test_a_shortlist_by_hand():
    b = sampler_draft(*LLAMA, candidates=64)
    assert b.lm_head == 1_050_673_152  # once
    assert b.rows == 12_582_912  # 3 x 8 x 64 x 4,096 x 2
    assert b.logits == 4_106_240  # and 8 x 64 x 2 twice
    assert b.layers == 570_425_344
    assert b.total == 1_637_787_648


def test_a_batch_shares_lm_head_and_not_the_candidates():
    one, four = (sampler_draft(4, 10, 2, 3, batch, itemsize=4) for batch in (1, 4))
    assert (one.lm_head, one.layers) == (four.lm_head, four.layers) == (160, 320)
    assert (one.rows, one.logits) == (288, 208) and (four.rows, four.logits) == (1152, 832)


def test_table():
    lines = table(*LLAMA).splitlines()
    assert lines[2] == "| all (exact) | 8,405.4 | 0.0 | 4.1 | 570.4 | 8,979.9 | 100.0 % |"
    assert lines[6] == "| 64, listed by verification's pass | 0.0 | 12.6 | 0.0 | 570.4 | 583.0 | 6.5 % |"
    assert lines[5] == "| 64 | 1,050.7 | 12.6 | 4.1 | 570.4 | 1,637.8 | 18.2 % |"
    result = subprocess.run([sys.executable, "-m", "bench.sampler_counts"], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and lines[6] in result.stdout


def test_a_whole_step():
    """lm_head 9 times, twice, once, beside 16.06 - 1.05 - 1.05 GB of layers, 0.67 of LoRA, 0.57 of the sampler and 0.27 of keys and values."""
    lines = step_table(("Llama-3.1-8B",)).splitlines()
    assert lines[2] == "| Llama-3.1-8B | 15.28 | 24.93 (1.63x) | 17.57 (1.15x) | 16.52 (1.08x) |"
