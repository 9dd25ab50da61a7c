"""What the launchers would launch, compiled for chips that are not here: registers, spills, shared memory, matrix instructions.

    python -m bench.compiled [--kernel NAME] [--target sm_90] [--quick] [--json FILE]

Needs no GPU, and a process in which Triton is not interpreted. Each case calls a function of `mtp_kernels.triton` with real
arguments; every launch is compiled with the specialisation those arguments have, and nothing runs.
The exit status is 1 if a kernel spills registers in an innermost loop, takes more shared memory than the chip has,
multiplies 16-bit matrices without its matrix unit, or has Hopper's matrix instructions, which run beside others, wait for each other.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget

import mtp_kernels.triton as kernels
from mtp_kernels import AttentionRule, SamplerWeights, Sampling
from mtp_kernels.triton import _device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# ptxas moves a few bytes to memory by its own choice where registers are left (64 to 128 used of 255); above this they ran out.
SPILL_ALLOWANCE = 64  # bytes per thread
# In PTX or AMD's assembly -> the machine's, as a disassembler names them. It agrees on all that there is here, and takes as long as compiling.
MATRIX_INSTRUCTIONS = {
    r"\bmma\.sync\.[\w.]*\.f32\.b?f16\.": "HMMA",
    r"\bwgmma\.mma_async\.[\w.]*\.f32\.b?f16\b": "HGMMA",
    r"\btcgen05\.mma\.[\w.:]*kind::f16\b": "UTCHMMA",
    r"\bv_s?mfma_": "mfma",
}


@dataclass(frozen=True)
class Case:
    """One call. kernel: the operation's name. quick: also part of the tests. expect: target -> an instruction that must show."""

    kernel: str
    name: str
    run: Callable[[], object]
    quick: bool = False
    expect: dict[str, str] = field(default_factory=dict)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    """Memory that is never touched: on the CPU, as custom operators give tensors on "meta" to their fakes, which launch nothing."""
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def forward_and_backward(y) -> None:
    ys = [y] if isinstance(y, torch.Tensor) else list(y)
    torch.autograd.backward(ys, [empty(*y.shape, dtype=y.dtype) for y in ys])


def norm_case(m: int, d: int, dtype: torch.dtype, grad: bool):
    def run():
        x, residual, weight = empty(m, d, dtype=dtype, grad=grad), empty(m, d, dtype=dtype), empty(d, dtype=dtype, grad=grad)
        y = kernels.rms_norm(x, weight, 1e-5), *kernels.rms_norm(x, weight, 1e-5, residual)
        if grad:
            forward_and_backward(y)

    return run


def rotary_case(m: int, heads: int, head_dim: int, dtype: torch.dtype, normed: bool = False):
    def run():
        x = empty(m, heads + 8, head_dim, dtype=dtype, grad=True)[:, :heads]  # q and k of a fused projection's result
        norm = empty(heads, head_dim, dtype=dtype) if normed else None
        forward_and_backward(kernels.rotary_embedding(x, empty(m, head_dim, dtype=dtype), empty(m, head_dim, dtype=dtype), norm))

    return run


def rotary_write_case(b: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normed: bool = False):
    """17 rows of b sequences into a cache of 4,096 columns."""

    def run():
        cos, sin = (empty(17, b, head_dim, dtype=dtype) for _ in range(2))
        keys, values = (empty(4096, b, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        qkv, norm = empty(17, b, heads + 2 * kv_heads, head_dim, dtype=dtype), empty(heads + kv_heads, head_dim, dtype=dtype) if normed else None
        kernels.rotary_write(qkv, cos, sin, keys, values, empty(b, dtype=torch.int64), norm)

    return run


def argmax_case(m: int, vocab: int, dtype: torch.dtype):
    return lambda: kernels.argmax(empty(m, vocab, dtype=dtype))


def sample_case(m: int, vocab: int, dtype: torch.dtype):
    return lambda: kernels.sample(empty(m, vocab, dtype=dtype), empty(m, dtype=torch.int64), Sampling(0.7))


def linear_argmax_case(m: int, d: int, vocab: int, dtype: torch.dtype):
    return lambda: kernels.linear_argmax(empty(m, d, dtype=dtype), empty(vocab, d, dtype=dtype))


def linear_sample_case(m: int, d: int, vocab: int, top_k: int | None, dtype: torch.dtype):
    keys = empty(m, dtype=torch.int64)
    return lambda: kernels.linear_sample(empty(m, d, dtype=dtype), empty(vocab, d, dtype=dtype), keys, Sampling(0.7, top_k))


def sampler_case(b: int, d: int, vocab: int, candidates: int | None, dtype: torch.dtype, drawn: bool = False):
    """Two of k steps; the memory is never touched, but a shortlist's top is a library's, which runs."""

    def run():
        weights = SamplerWeights(*(empty(*s, dtype=dtype) for s in ((d, 2 * d), (d,), (d,), (d,), (d, d), (d,), (d,), (d,))))
        z, embedding, lm_head = (empty(*shape, dtype=dtype) for shape in ((b, 2, d), (vocab, d), (vocab, d)))
        keys = empty(2, b, dtype=torch.int64).t() if drawn else None
        kernels.sampler_draft(z, empty(b, dtype=torch.int64), embedding, weights, lm_head, candidates=candidates, keys=keys)

    return run


def swiglu_case(m: int, f: int, dtype: torch.dtype):
    return lambda: forward_and_backward(kernels.swiglu(empty(m, 2 * f, dtype=dtype, grad=True)))


def gated_lora_case(m: int, k: int, splits: tuple[int, ...], rank: int, first_on: int | None, dtype: torch.dtype, grad: bool = False):
    def run():
        n = sum(splits)
        a, b = (empty(len(splits) * rank, k, dtype=dtype, grad=grad), empty(n, rank, dtype=dtype, grad=grad)) if rank else (None, None)
        x, weight = empty(m, k, dtype=dtype, grad=grad), empty(n, k, dtype=dtype)
        y = kernels.gated_lora_linear(x, weight, a, b, first_on, splits=splits)
        if grad:
            forward_and_backward(y)

    return run


def gated_swiglu_case(m: int, k: int, f: int, rank: int, first_on: int | None, dtype: torch.dtype):
    def run():
        a, b = (empty(2 * rank, k, dtype=dtype), empty(2 * f, rank, dtype=dtype)) if rank else (None, None)
        kernels.gated_lora_swiglu(empty(m, k, dtype=dtype), empty(2 * f, k, dtype=dtype), a, b, first_on)

    return run


# Llama-3.1-8B's projections, at the rows of plain decoding, linear and quadratic steps, a block of few rows, and training.
QKV, HEAD = (4096, 1024, 1024), (128_256,)


def gated_lora_cases(dtype: torch.dtype):
    name = str(dtype).split(".")[1]
    for m in (1, 9, 17, 25, 81, 128):
        first_on = m // 9 + 1 if m > 1 else None
        quick = m == 81 and dtype == torch.bfloat16
        expect = {"sm_90": "HGMMA"} if dtype != torch.float32 else {}
        yield Case("gated_lora_linear", f"q/k/v, {m} rows, rank 128, {name}", gated_lora_case(m, 4096, QKV, 128, first_on, dtype), quick, expect)
        yield Case("gated_lora_linear", f"down, {m} rows, rank 16, {name}", gated_lora_case(m, 14336, (4096,), 16, first_on, dtype), False, expect)
        yield Case("gated_lora_linear", f"lm_head, {m} rows, {name}", gated_lora_case(m, 4096, HEAD, 0, None, dtype))
        yield Case("gated_lora_swiglu", f"gate/up, {m} rows, rank 128, {name}", gated_swiglu_case(m, 4096, 14336, 128, first_on, dtype), quick)
        yield Case("gated_lora_swiglu", f"gate/up, {m} rows, no gate, {name}", gated_swiglu_case(m, 4096, 14336, 0, None, dtype))
    for m in (1024, 8192):
        quick = m == 1024 and dtype == torch.bfloat16
        yield Case("gated_lora_linear", f"q/k/v, {m} rows, rank 128, {name}, gradients", gated_lora_case(m, 4096, QKV, 128, m // 9, dtype, True), quick)
        yield Case("gated_lora_linear", f"down, {m} rows, rank 16, {name}, gradients", gated_lora_case(m, 14336, (4096,), 16, m // 9, dtype, True))
        yield Case("gated_lora_linear", f"odd sizes, {m} rows, rank 5, {name}, gradients", gated_lora_case(m, 2050, (2049,), 5, m // 9, dtype, True))
        yield Case("gated_lora_swiglu", f"gate/up, {m} rows, rank 128, {name}", gated_swiglu_case(m, 4096, 14336, 128, m // 9, dtype))


def attention_case(t: int, masks: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype, batch: int = 1, grad: bool = False, packed: bool = False):
    """t rows, the last of them masks in blocks of 8, on a cache of 4,096 columns; packed: of several documents."""

    def run():
        q = empty(t, batch, heads + 2 * kv_heads, d, dtype=dtype, grad=grad)[:, :, :heads]  # of a fused projection's result
        k, v = (empty(batch, kv_heads, 4096, d, dtype=dtype, grad=grad) for _ in range(2))
        zeros = torch.zeros(t, dtype=torch.int64)
        visible, mask_start = zeros[:, None].expand(-1, batch).contiguous(), torch.zeros(batch, dtype=torch.int64)
        rule = AttentionRule(visible, zeros, zeros.clone(), mask_start, masks, 4000, 8, visible.clone() if packed else None)
        y = kernels.attention(q, k, v, rule)
        if grad:
            forward_and_backward(y)

    return run


def accept_case(b: int, k: int, dtype: torch.dtype, counts: bool):
    """Transposed, as decoding has them."""

    def run():
        kernels.accept(empty(k, b, dtype=dtype).t(), empty(k + 1, b, dtype=dtype).t(), empty(b, dtype=dtype) if counts else None)

    return run


def commit_case(b: int, k: int, ends: int):
    def run():
        lengths, room, counts = (empty(b, dtype=torch.int64) for _ in range(3))
        drafts, predictions = empty(b, k, dtype=torch.int64), empty(k + 1, b, dtype=torch.int64).t()
        kernels.accept_and_commit(drafts, predictions, counts, lengths, room, empty(b, dtype=torch.bool), empty(ends, dtype=torch.int64))

    return run


def drafting_case(b: int, blocks: int, k: int, d: int, dtype: torch.dtype, without: bool):
    def run():
        anchors, accepted = empty(blocks, b, dtype=torch.int64), empty(b, dtype=torch.int64)
        kernels.drafting_states(empty(blocks * (k + 1), b, d, dtype=dtype), anchors, accepted, k, empty(b, dtype=torch.bool) if without else None)

    return run


def lookup_case(b: int, columns: int, tokens: int, match: int):
    return lambda: kernels.lookup_drafts(empty(b, columns, dtype=torch.int64), empty(b, dtype=torch.int64), tokens, match)


def cross_entropy_case(m: int, v: int, dtype: torch.dtype, teacher: bool, grad: bool):
    """A narrow hidden state: the library's products do run, on a CPU."""

    def run():
        hidden, head, labels = empty(m, 8, dtype=dtype, grad=grad), empty(v, 8, dtype=dtype, grad=grad), torch.zeros(m, dtype=torch.int64)
        loss, _ = kernels.linear_cross_entropy(hidden, head, labels, teacher=empty(m, 8, dtype=dtype) if teacher else None, soft=0.5)
        if grad:
            forward_and_backward(loss)

    return run


def latent_consistency_case(m: int, d: int, dtype: torch.dtype):
    def run():
        index, weight = torch.zeros(m, dtype=torch.int64), empty(m, dtype=torch.float32)
        forward_and_backward(kernels.latent_consistency(empty(m, d, dtype=dtype, grad=True), empty(m, d, dtype=dtype), index, weight))

    return run


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: list[Case] = [
    Case("accept", "4 x 8 int64, counts", accept_case(4, 8, torch.int64, True), quick=True),
    Case("accept_and_commit", "4 x 8, 3 ends", commit_case(4, 8, 3), quick=True),
    Case("accept_and_commit", "1 x 0, 1 end", commit_case(1, 0, 1)),
    Case("accept_and_commit", "64 x 16, 9 ends", commit_case(64, 16, 9)),
    Case("drafting_states", "4 x 8 x 4096 bfloat16, quadratic", drafting_case(4, 9, 8, 4096, BF16, False), quick=True),
    Case("drafting_states", "1 x 1 x 2880 float32, linear", drafting_case(1, 1, 1, 2880, FP32, True)),
    Case("drafting_states", "16 x 16 x 2048 float16, linear", drafting_case(16, 1, 16, 2048, FP16, True)),
    Case("lookup_drafts", "4 x 8192, 10 tokens behind 2", lookup_case(4, 8192, 10, 2), quick=True),
    Case("lookup_drafts", "1 x 256, 16 tokens behind 16", lookup_case(1, 256, 16, 16)),
    *(Case("accept", f"{b} x {k} {str(dtype)[6:]}", accept_case(b, k, dtype, False)) for b, k, dtype in ((1, 0, torch.int64), (100, 16, torch.int32))),
    *(
        Case(
            "linear_cross_entropy", f"4 x {v} {str(dtype)[6:]}{', teacher' * teacher}{', gradients' * grad}", cross_entropy_case(4, v, dtype, teacher, grad),
            quick=v == 128_256 and dtype is BF16 and grad,
        )
        for v, dtype in ((128_256, BF16), (50_257, FP16), (128_256, FP32), (77, FP32))
        for teacher in (False, True)
        for grad in (False, True)
    ),
    Case("latent_consistency", "64 x 4096 bfloat16", latent_consistency_case(64, 4096, BF16), quick=True),
    Case("latent_consistency", "64 x 2880 float16", latent_consistency_case(64, 2880, FP16)),
    Case("latent_consistency", "64 x 16384 float32", latent_consistency_case(64, 16384, FP32)),
    Case("rms_norm", "17 x 4096 bfloat16", norm_case(17, 4096, BF16, False)),
    Case("rms_norm", "512 x 4096 bfloat16, gradients", norm_case(512, 4096, BF16, True), quick=True),
    Case("rms_norm", "512 x 2880 float16, gradients", norm_case(512, 2880, FP16, True)),
    Case("rms_norm", "64 x 16384 bfloat16, gradients", norm_case(64, 16384, BF16, True)),
    Case("rms_norm", "64 x 16384 float32, gradients", norm_case(64, 16384, FP32, True)),
    Case("rotary_embedding", "81 x 40 x 128 bfloat16", rotary_case(81, 40, 128, BF16), quick=True),
    *(Case("rotary_embedding", f"17 x 12 x {d} float16", rotary_case(17, 12, d, FP16)) for d in (64, 80, 96)),
    Case("rotary_embedding", "17 x 40 x 128 float32", rotary_case(17, 40, 128, FP32)),
    *(
        Case("rotary_embedding", f"17 x 40 x {d} {str(dtype)[6:]}, normed", rotary_case(17, 40, d, dtype, True))
        for d, dtype in ((128, BF16), (80, FP16), (128, FP32))
    ),
    *(
        Case("rotary_write", f"{b} x {h} + {kv} heads of {d} {str(dtype)[6:]}", rotary_write_case(b, h, kv, d, dtype), quick=b == 4)
        for b, h, kv, d, dtype in ((1, 32, 8, 128, BF16), (4, 32, 8, 128, BF16), (1, 12, 12, 80, FP16), (1, 32, 8, 128, FP32))
    ),
    *(Case("rotary_write", f"1 x 32 + 8 heads of 128 {str(dtype)[6:]}, normed", rotary_write_case(1, 32, 8, 128, dtype, True)) for dtype in (BF16, FP32)),
    Case("argmax", "9 x 128256 bfloat16", argmax_case(9, 128_256, BF16), quick=True),
    Case("sample", "9 x 128256 bfloat16", sample_case(9, 128_256, BF16), quick=True),
    *(
        Case("linear_argmax", f"{m} x {d} of {vocab} {str(dtype)[6:]}", linear_argmax_case(m, d, vocab, dtype), quick=m == 9)
        for m, d, vocab, dtype in ((1, 4096, 128_256, BF16), (9, 4096, 128_256, BF16), (81, 2048, 32_000, FP16), (9, 4096, 128_256, FP32))
    ),
    *(
        Case(
            "linear_sample", f"{m} x {d} of {vocab}{f', {top_k} best' if top_k else ''} {str(dtype)[6:]}", linear_sample_case(m, d, vocab, top_k, dtype),
            quick=m == 9 and dtype is BF16,
        )
        for m, d, vocab, top_k, dtype in (
            (1, 4096, 128_256, None, BF16), (9, 4096, 128_256, 20, BF16), (81, 2048, 32_000, None, FP16), (9, 4096, 128_256, 20, FP32),
        )
    ),  # fmt: skip
    *(
        Case(
            "sampler_draft", f"{b} x {d}, {'all' if c is None else c} of {vocab}, drawn {str(dtype)[6:]}", sampler_case(b, d, vocab, c, dtype, True),
            quick=b == 1 and c is None,
        )
        for b, d, vocab, dtype in ((1, 4096, 128_256, BF16), (64, 8192, 128_256, BF16), (3, 2050, 32_001, FP16), (4, 4096, 128_256, FP32))
        for c in (None, 64)
    ),
    *(
        Case(
            "sampler_draft", f"{b} x {d}, {'all' if c is None else c} of {vocab} {str(dtype)[6:]}", sampler_case(b, d, vocab, c, dtype),
            quick=b == 1 and dtype is BF16 and c is not None,  # all of the vocabulary: drawn, the same kernel with noise
        )
        for b, d, vocab, dtype in (
            (1, 4096, 128_256, BF16), (16, 4096, 128_256, BF16), (64, 8192, 128_256, BF16), (3, 2050, 32_001, FP16), (4, 4096, 128_256, FP32),
        )
        for c in (None, 64)
    ),
    Case("swiglu", "81 x 14336 bfloat16", swiglu_case(81, 14336, BF16), quick=True),
    Case("swiglu", "17 x 1000 float16", swiglu_case(17, 1000, FP16)),
    Case("swiglu", "17 x 11008 float32", swiglu_case(17, 11008, FP32)),
    *(case for dtype in (BF16, FP16, FP32) for case in gated_lora_cases(dtype)),
    *(
        Case(
            "attention", f"{name}, {t} rows {str(dtype)[6:]}", attention_case(t, masks, 32, 8, d, dtype), quick=quick and t in (1, 81) and dtype is BF16,
            expect={"sm_90": "HGMMA", "sm_100": "UTCHMMA"} if dtype is BF16 else {},
        )
        for name, d, quick in (("Llama-3.1-8B", 128, True), ("Llama-3.2-1B", 64, False))  # Qwen3-4B has the 8B's heads
        for t, masks in ((1, 0), (9, 8), (17, 8), (25, 16), (81, 72))
        for dtype in (BF16, FP32)
    ),
    *(
        Case(
            "attention", f"{d} wide, 512 mask rows {str(dtype)[6:]}, gradients", attention_case(512, 512, 32, 8, d, dtype, batch=2, grad=True),
            quick=d == 128 and dtype is BF16,
        )
        for d in (64, 80, 128) for dtype in (BF16, FP32)
    ),
    *(
        Case(
            "attention", f"{d} wide, 512 mask rows of packed documents {str(dtype)[6:]}, gradients",
            attention_case(512, 512, 32, 8, d, dtype, batch=2, grad=True, packed=True),
        )
        for d in (64, 80, 128) for dtype in (BF16, FP32)
    ),
    *(
        Case("attention", f"{d} wide, 2048 rows of {name} bfloat16", attention_case(2048, 0, 32, 8, d, BF16, packed=packed))
        for d in (64, 80, 96, 256) for name, packed in (("a prompt", False), ("packed documents", True))
    ),
    Case("attention", "128 wide, 1024 rows of packed documents bfloat16", attention_case(1024, 0, 32, 8, 128, BF16, batch=2, packed=True)),
    Case("attention", "96 wide, 17 rows float16", attention_case(17, 8, 32, 32, 96, FP16)),
    Case("attention", "128 wide, 16384 rows bfloat16, pieces in rounds", attention_case(16384, 0, 32, 8, 128, BF16)),
    Case("attention", "Qwen2.5-7B, 81 rows bfloat16", attention_case(81, 72, 28, 4, 128, BF16)),  # seven heads to a key head
    Case("attention", "Qwen2.5-7B, 512 mask rows bfloat16, gradients", attention_case(512, 512, 28, 4, 128, BF16, batch=2, grad=True)),
    Case("attention", "256 wide, 17 rows bfloat16", attention_case(17, 8, 8, 4, 256, BF16)),
]


def _compile(kernel, target: str, args, options, grid) -> tuple[object, str]:
    """The compiled kernel and what ptxas said. Pointers keep the alignment that the arguments' addresses have."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = kernel.warmup(*args, grid=grid, **_device.OPTIONS, **options)
    return compiled, log.getvalue()


def _resources(compiled, log: str) -> tuple[int, int]:
    """(registers per thread, bytes of registers spilled per thread)."""
    if "amdgcn" in compiled.asm:
        counts = {name: int(n) for name, n in re.findall(r"\.((?:vgpr|vgpr_spill)_count):\s+(\d+)", compiled.asm["amdgcn"])}
        return counts["vgpr_count"], 4 * counts["vgpr_spill_count"]  # scalars spill into vector registers, not into memory
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return max(map(int, re.findall(r"Used (\d+) registers", log))), max(map(int, spills), default=0)


def _machine_code(compiled) -> str:
    if "amdgcn" in compiled.asm:
        return compiled.asm["amdgcn"]
    disassembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _spills_in_loops(code: str) -> int:
    """Loads and stores of spilled registers in the loops of machine code that hold no other: the rest runs seldom."""
    lines, labels, loops = code.splitlines(), {}, []
    for number, line in enumerate(lines):
        label = re.match(r"(\.L\w+):", line)
        target = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)", line)
        if label:
            labels[label[1]] = number
        elif target and target[1] in labels:
            loops.append((labels[target[1]], number))
    innermost = [(a, b) for a, b in loops if not any((a, b) != other and a <= other[0] and other[1] <= b for other in loops)]
    return sum(bool(re.search(r"\b(LDL|STL)\b|Folded (Spill|Reload)", line)) for a, b in innermost for line in lines[a:b])


def _matrix_instruction(compiled) -> str:
    """Instructions that multiply matrices, by name: NVIDIA's of 16 bits, AMD's of any."""
    code = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    return " ".join(name for pattern, name in MATRIX_INSTRUCTIONS.items() if re.search(pattern, code))


def _problems(row: dict, ttir: str, log: str, expected: str | None) -> list[str]:
    found = []
    if "wgmma.mma_async instructions are serialized" in log:
        found.append("has matrix instructions that wait for each other")
    if row["spills_in_loops"]:
        found.append(f"spills {row['spills']} bytes, also in its loops")
    if row["shared"] > row["shared_limit"]:
        found.append(f"takes {row['shared']} bytes of shared memory of {row['shared_limit']}")
    if re.search(r"tt\.dot .*x(bf16|f16)>", ttir) and not row["matrix"]:
        found.append("multiplies 16-bit matrices without matrix instructions")
    if expected and expected not in row["matrix"].split():
        found.append(f"has {row['matrix'] or 'no matrix instruction'} and not {expected}")
    return found


def measure(cases: list[Case], targets: list[str]) -> list[dict]:
    """One row per case, kernel, constants and target; a kernel compiled before under another case is not repeated."""
    if _device.INTERPRETED:
        raise RuntimeError("Triton is interpreted in this process; accepted is an environment without TRITON_INTERPRET")
    rows, seen = [], set()
    runtime, knobs = triton.runtime.driver, triton.knobs
    before = _device.launch, _device.target
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = cache, True, True
        try:
            for target in targets:
                chip = TARGETS[target]
                # a device number of its own for each chip: Triton remembers compiled kernels by it
                number = 1000 + list(TARGETS).index(target)
                runtime.set_active(
                    SimpleNamespace(
                        get_current_target=lambda chip=chip: chip,
                        get_current_device=lambda number=number: number,
                        get_current_stream=lambda _: 0,
                        get_active_torch_device=lambda: torch.device("cpu"),
                    )
                )
                _device.target = lambda chip=chip: (chip.backend, chip.arch)
                for case in cases:

                    def record(kernel, grid, *args, case=case, target=target, **options):
                        if not min(grid):
                            return
                        start = time.perf_counter()
                        compiled, log = _compile(kernel, target, args, options, grid)
                        if (target, compiled.hash) in seen:
                            return
                        seen.add((target, compiled.hash))
                        registers, spills = _resources(compiled, log)
                        in_loops = _spills_in_loops(_machine_code(compiled)) if spills > SPILL_ALLOWANCE else None
                        names, metadata = compiled.src.fn.arg_names, compiled.metadata
                        constants = {names[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
                        row = dict(
                            operation=case.kernel, case=case.name, kernel=compiled.src.fn.__name__, target=target,
                            constants={name: value if isinstance(value, (int, float, str)) else str(value) for name, value in constants.items()},
                            warps=metadata.num_warps, stages=metadata.num_stages, registers=registers, spills=spills, spills_in_loops=in_loops,
                            shared=metadata.shared, shared_limit=SHARED_LIMIT[target], matrix=_matrix_instruction(compiled),
                        )  # fmt: skip
                        row["problems"] = _problems(row, compiled.asm["ttir"], log, case.expect.get(target) if "tt.dot" in compiled.asm["ttir"] else None)
                        row["seconds"] = round(time.perf_counter() - start, 2)
                        rows.append(row)

                    _device.launch = record
                    case.run()
        finally:
            _device.launch, _device.target = before
            runtime._active = None
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| operation | case | kernel | target | warps | registers | spills | shared | matrix | |", "|---|---|---|---|---:|---:|---:|---:|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['operation']} | {r['case']} | {r['kernel']} | {r['target']} | {r['warps']} | {r['registers']} | {r['spills']} | "
            f"{r['shared']} | {r['matrix']} | {'; '.join(r['problems'])} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernel", help="only this operation")
    parser.add_argument("--target", choices=TARGETS, help="only this chip")
    parser.add_argument("--quick", action="store_true", help="the few cases of the tests")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    cases = [c for c in CASES if args.kernel in (None, c.kernel) and (c.quick or not args.quick)]
    if not cases:
        parser.error(f"no case of {args.kernel!r}; those there are: {', '.join(sorted({c.kernel for c in CASES}))}")
    rows = measure(cases, [args.target] if args.target else list(TARGETS))
    print(table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(dict(triton=triton.__version__, torch=torch.__version__, rows=rows), file, indent=1)
    bad = [row for row in rows if row["problems"]]
    print(f"{len(rows)} kernels, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
