"""The kernels compiled for four chips, in processes in which Triton is not interpreted; no GPU is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    c = tl.zeros((M, N), tl.float32)
    for i in range(8):
        a, b = tl.load(a_ptr + i * M * K + m[:, None] * K + k), tl.load(b_ptr + i * N * K + k[:, None] * N + n)
        c = tl.dot(a, b, c)
    tl.store(c_ptr + m[:, None] * N + n, c.to(c_ptr.dtype.element_ty))


def bad_cases():
    """One good launch, and one for each thing that is to be found out."""
    from bench.compiled import Case, empty
    from mtp_kernels.triton import _device

    def product(m, n, k, offset=0, **options):
        a, b, c = (empty(rows * columns + 8)[offset:] for rows, columns in ((m, k), (k, n), (m, n)))
        return lambda: _device.launch(product_kernel, (1,), a_ptr=a, b_ptr=b, c_ptr=c, M=m, N=n, K=k, **options)

    return [
        Case("good", "", product(64, 64, 32, num_warps=4, num_stages=2), expect={"sm_90": "HGMMA"}),
        Case("unaligned", "", product(64, 64, 32, offset=1, num_warps=4, num_stages=2)),
        Case("spills", "", product(128, 64, 32, num_warps=1, num_stages=2)),
        Case("shared memory", "", product(128, 128, 128, num_warps=8, num_stages=8)),
        Case("another instruction", "", product(32, 64, 32, num_warps=4, num_stages=2), expect={"sm_90": "HGMMA"}),
    ]


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("compiled") / "rows.json"
    result = run("-m", "bench.compiled", "--quick", "--json", str(file))
    assert file.exists(), result.stdout + result.stderr
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_kernel_spills_or_takes_too_much_shared_memory(target, quick_rows):
    from bench.compiled import CASES, SHARED_LIMIT

    rows = [row for row in quick_rows if row["target"] == target]
    assert {row["operation"] for row in rows} == {case.kernel for case in CASES if case.quick}
    for row in rows:
        assert row["problems"] == [], row
        assert 0 < row["registers"] <= 512 and row["shared"] <= SHARED_LIMIT[target], row


def test_every_operation_has_a_quick_case():
    from bench.compiled import CASES
    from mtp_kernels import triton as kernels

    assert {case.kernel for case in CASES if case.quick} == set(kernels.__all__)


def test_a_bad_kernel_is_found_out():
    result = run(__file__)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["operation"]: row for row in json.loads(result.stdout)}
    good, unaligned = rows["good"], rows["unaligned"]
    assert good["problems"] == [] and good["matrix"] == "HGMMA" and good["constants"] == {"M": 64, "N": 64, "K": 32}
    assert unaligned["registers"] != good["registers"]  # the alignment of the arguments reaches the compiler
    assert rows["spills"]["spills"] > 0 and "spills" in rows["spills"]["problems"][0]
    assert rows["shared memory"]["shared"] > 232_448 and "shared memory" in rows["shared memory"]["problems"][0]
    assert "HMMA and not HGMMA" in rows["another instruction"]["problems"][0]


def test_registers_spilled_in_a_loop_are_told_from_others():
    from bench.compiled import _spills_in_loops

    nvidia = """
        /*0000*/                   STL [R1], R2 ;
.L_x_1:
        /*0010*/                   LDL R2, [R1] ;
.L_x_0:
        /*0020*/                   {} ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0060*/                   EXIT ;
"""
    assert [_spills_in_loops(nvidia.format(x)) for x in ("FADD R3, R2, R2", "LDL.64 R2, [R1]", "STL [R1+0x4], R3")] == [0, 1, 1]
    amd = """
\tscratch_store_dword off, v1, off ; 4-byte Folded Spill
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\t{}
\ts_cbranch_scc1 .LBB0_2
"""
    assert [_spills_in_loops(amd.format(x)) for x in ("v_add_f32 v1, v2, v3", "scratch_load_dword v1, off, off ; 4-byte Folded Reload")] == [0, 1]


def test_matrix_instructions_that_wait_are_found_out():
    """By what ptxas says of a kernel of attention's earlier form."""
    from bench.compiled import _problems

    row = dict(spills=0, spills_in_loops=None, shared=0, shared_limit=1, matrix="HGMMA")
    log = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions defining "
        "accumulator registers of a wgmma between start and end of the pipeline stage in the function 'attend_kernel'"
    )
    assert _problems(row, "", "", None) == [] and "wait for each other" in _problems(row, "", log, None)[0]


def test_fused_arithmetic_does_not_follow_the_environment():
    """Nor Triton's version, whose default it is otherwise: every launch asks for it."""
    from mtp_kernels.triton._device import launch

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, args, options))

    launched = []
    launch(Kernel(), (2,), 3, num_warps=4)
    assert launched == [((2,), (3,), {"num_warps": 4, "enable_fp_fusion": True})]


def test_an_interpreting_process_is_refused():
    if not triton.knobs.runtime.interpret:
        pytest.skip("this process does not interpret")
    from bench.compiled import measure

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        measure([], ["sm_90"])


if __name__ == "__main__":
    from bench.compiled import measure

    print(json.dumps(measure(bad_cases(), ["sm_90"])))
