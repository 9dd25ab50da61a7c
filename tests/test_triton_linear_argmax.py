"""The greedy token's kernels: the logits' own argmax, lowest id first, whatever rows stand beside; interpreted where there is no GPU."""

import functools
import sys

import pytest
import torch

pytest.importorskip("triton")

import mtp_kernels.triton  # noqa: E402, F401
from mtp_kernels import argmax, gated_lora_linear, linear_argmax  # noqa: E402
from mtp_kernels.testing import guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import _tiles  # noqa: E402

KERNELS = sys.modules["mtp_kernels.triton.linear_argmax"]  # the package's attribute of this name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
fused = functools.partial(linear_argmax, implementation="triton")


def lowest(logits):
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == logits.amax(-1, keepdim=True), ids, logits.shape[-1]).amin(-1)


@pytest.fixture
def many_pieces(monkeypatch):
    monkeypatch.setattr(_tiles, "argmax_tiles", lambda n: (32, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading, d, vocab", [((), 16, 1), ((1,), 40, 200), ((3, 2), 33, 70)])
def test_the_products_logits(leading, d, vocab, dtype, device, many_pieces):
    hidden, weight = guarded_randn((*leading, d), dtype, device), guarded_randn((vocab, d), dtype, device, 1)
    with guarded_outputs(KERNELS):
        got = fused(hidden, weight)
    logits = gated_lora_linear(hidden, weight, implementation="triton")
    assert got.dtype == torch.int64 and got.shape == leading and torch.equal(got, lowest(logits))


def test_its_own_pieces(device):
    """Two pieces as they come, one of them ragged, with the largest logit in either, and a tie between them."""
    piece = _tiles.argmax_tiles(128_256)[0]
    where = ([piece - 1], [piece], [piece + 2], [7, piece + 1], [])
    weight = torch.zeros(piece + 3, len(where), device=device)
    for i, ids in enumerate(where):
        weight[ids, i] = 1
    assert fused(torch.eye(len(where), device=device), weight).tolist() == [min(ids, default=0) for ids in where]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_id(dtype, device, many_pieces):
    """Four different rows of the weight, so that each logit stands in many pieces; and logits that only rounding makes equal."""
    weight = torch.randn(4, 16, device=device).to(dtype).repeat(30, 1)[3:]
    hidden = torch.randn(9, 16, device=device).to(dtype)
    got = fused(hidden, weight)
    assert torch.equal(got, lowest(gated_lora_linear(hidden, weight, implementation="triton"))) and got.max() < 4
    if dtype != torch.float32:
        step = torch.finfo(dtype).eps / 8
        close = torch.tensor([[1.0, 0], [1.0, step], [1.0, 2 * step]], device=device).to(dtype)
        assert fused(torch.ones(1, 2, device=device).to(dtype), close).tolist() == [0]


def test_what_is_not_a_number(device, many_pieces):
    """Some id of the vocabulary, for embeddings are looked up by it."""
    logits = torch.randn(4, 70, device=device)
    logits[0], logits[1], logits[2, 40:], logits[3] = torch.nan, -torch.inf, torch.nan, torch.inf
    for row, id in zip(logits, (0, 0, int(logits[2, :40].argmax()), 0), strict=True):
        assert fused(torch.ones(1, 1, device=device), row.unsqueeze(1)).tolist() == [id]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(dtype, device, monkeypatch):
    weight = torch.randn(70, 1100, device=device).to(dtype)  # K is cut into segments
    hidden = torch.randn(33, 1100, device=device).to(dtype)
    whole, logits = fused(hidden, weight), gated_lora_linear(hidden, weight, implementation="triton")
    assert torch.equal(whole, lowest(logits))
    for rows in (1, 17):
        assert torch.equal(fused(hidden[:rows], weight), whole[:rows])
        assert torch.equal(gated_lora_linear(hidden[:rows], weight, implementation="triton"), logits[:rows])
    monkeypatch.setattr(KERNELS, "ROWS", 16)
    assert torch.equal(fused(hidden, weight), whole)


def test_views_gradients_and_nothing(device, many_pieces):
    hidden, weight = torch.randn(4, 3, 24, device=device), torch.randn(16, 50, device=device).t()
    assert torch.equal(fused(hidden[:, ::2, 3:19], weight), fused(hidden[:, ::2, 3:19].contiguous(), weight.contiguous()))
    assert not fused(hidden[..., :16].requires_grad_(), weight).requires_grad
    assert fused(hidden[:0, :, :16], weight).shape == (0, 3)


def test_of_logits_that_are_known(device, many_pieces):
    """Some rows of a pass's, as verification takes them, and logits that are nobody's rows."""
    logits = guarded_randn((5, 3, 70), torch.float32, device)
    wanted = argmax(logits, implementation="reference")
    with guarded_outputs(KERNELS):
        assert torch.equal(argmax(logits[1:4], implementation="triton"), wanted[1:4])
    assert torch.equal(argmax(logits.transpose(0, 1), implementation="triton"), wanted.t())
    assert argmax(logits[0, 0], implementation="triton").tolist() == wanted[0, 0].item() and argmax(logits[:0], implementation="triton").shape == (0, 3)


def test_operator(device, many_pieces):
    hidden, weight = torch.randn(5, 16, device=device), torch.randn(40, 16, device=device)
    torch.library.opcheck(torch.ops.mtp_kernels.argmax.default, (hidden @ weight.t(),), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *x: fused(*x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), fused(hidden, weight))
