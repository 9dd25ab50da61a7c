"""Matrix products on a CPU whose rows do not know of each other, of weights that are kept in the layout for it.

What is verified together must come out as it would one by one, to the bit. PyTorch's float32 product on a CPU (MKL's) sums a row in another order
when other rows stand beside it: with AVX-512 once K is above 1,000 or so, with AVX2 always; and its 16-bit product packs the weight at each call.
oneDNN's product with a weight in oneDNN's own layout has one order from two rows up, and reads the weight once, which is faster for few rows. (Seen
with SSE 4.1, AVX2 and AVX-512, 1 to 16 threads; `tests/test_ops.py` holds it.) Where tiles of AMX compute (bfloat16, and float16 on later chips) the
order follows from the number of rows, which therefore is always the same, TILE_ROWS, and takes no longer than one.

For a small weight MKL's product takes less time, so it serves where this machine is seen to sum every row alike, with the weight stored input-major.

A weight is packed at its first product under torch.inference_mode, which decoding runs in, and kept beside it: its matrices are then in memory twice.
"""

import warnings
from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from mtp_kernels._gradients import matmul

TILE_ROWS = 32
SMALL = 2**20  # elements of a weight up to which MKL's product may be the faster one
TRIED_ROWS = (*range(2, 34), 40, 48, 49, 64, 72, 81, 96, 128, 129, 200, 256, 300)
MATRIX_WIDTH = 1024  # of rows of which a single one is multiplied as two, for one would be summed in another order
_steps = 0  # that optimizers made, of any kind
_packs = WeakIdKeyDictionary()  # weight -> (its storage, version, packed)


def _stepped(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_stepped)


def version(*parameters: Tensor) -> tuple:
    """What is another after parameters were replaced or written to: their memory, torch's version counters, and, since a fused
    optimizer does not raise those, how many steps optimizers have made. Writing through `.data` changes none of it."""
    return _steps, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


@cache
def _min_rows(dtype: torch.dtype) -> int | None:
    """2, or TILE_ROWS where a product always has that many; None where this CPU and PyTorch have no packed product of the dtype."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return None
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(2, 16, dtype=dtype), weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    if dtype is torch.float32:
        return 2
    support = "_is_amx_tile_supported" if dtype is torch.bfloat16 else "_is_amx_fp16_supported"
    return TILE_ROWS if getattr(torch.cpu, support, lambda: False)() else 2


@cache
def _rows_alike(n: int, k: int, threads: int) -> bool:
    """Whether MKL sums a row alike in products of all the numbers of rows that are tried, with an input-major float32 weight."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, k, generator=generator) for rows in (TRIED_ROWS[-1], n))
    weight = weight.t().contiguous()
    whole = x @ weight
    return all(torch.equal(x[:rows] @ weight, whole[:rows]) for rows in TRIED_ROWS)


def pack(weight: Tensor) -> Tensor | None:
    """The weight (N, K), input-major or in oneDNN's layout, kept from the last time unless it has changed; None where there is nothing better than it is."""
    if weight.device.type != "cpu" or weight.is_inference() or _min_rows(weight.dtype) is None:
        return None
    held, state = _packs.get(weight), (torch.get_num_threads(), *version(weight))
    if held is None or held[0].expired() or held[1] != state:
        if weight.dtype is torch.float32 and weight.numel() <= SMALL and _rows_alike(*map(int, weight.shape), torch.get_num_threads()):
            form = weight.detach().t().contiguous().t()
        else:
            form = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        held = _packs[weight] = StorageWeakRef(weight.untyped_storage()), state, form
    return held[2]


def kept(weights: Iterable[Tensor]) -> list[Tensor]:
    """The packed copies that there are of the weights."""
    return [_packs[weight][2] for weight in weights if weight in _packs]


def forget(weights: Iterable[Tensor]) -> None:
    """Give the memory of the weights' packed copies back."""
    for weight in weights:
        _packs.pop(weight, None)


@cache
def _traceable():
    """The product as TorchScript, for a trace, which cannot take the operator's list of numbers."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(linear)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if not weight.is_mkldnn:
        return matmul(x, weight, bias, residual)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    if torch.jit.is_tracing():
        return _traceable()(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def add_adapter_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    """y += scale (x A^T) B^T, for rows whose bits nothing depends on."""
    wide = x.dtype.itemsize >= 4 or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    a, b = (None, None) if wide else (pack(lora_a), pack(lora_b))
    if a is None or b is None:
        y.addmm_(F.linear(x, lora_a), lora_b.t(), alpha=scale)
    else:
        shrunk = _product(x, a, None, None)
        y.copy_(_product(shrunk if scale == 1 else shrunk * scale, b, None, y))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T (+ b) (+ residual) for x (M, K); on a CPU under torch.inference_mode each row as if it stood alone."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or x.device.type != "cpu":
        return matmul(x, weight, bias, residual)
    rows, width = map(int, x.shape)
    w, least = pack(weight), _min_rows(x.dtype)
    if w is None:  # at least no single row, which would take a matrix-vector routine
        w, least = weight, 2
    if rows == 0:
        return x.new_empty(0, int(weight.shape[0]))
    if least < TILE_ROWS:
        if rows > 1 or w.is_mkldnn and width < MATRIX_WIDTH:
            return _product(x, w, bias, residual)
        return _product(x.expand(2, -1), w, bias, None if residual is None else residual.expand(2, -1))[:1]
    padding = (0, 0, 0, -rows % TILE_ROWS)
    x, residual = (y if y is None or not padding[-1] else F.pad(y, padding) for y in (x, residual))
    residuals = [None] * len(x) if residual is None else residual.split(TILE_ROWS)
    tiles = [_product(tile, w, bias, each) for tile, each in zip(x.split(TILE_ROWS), residuals, strict=False)]
    y = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
    return y[:rows] if padding[-1] else y
