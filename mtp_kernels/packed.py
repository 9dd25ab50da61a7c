"""Matrix products on a CPU whose rows do not know of each other, of weights that are kept in the layout for it.

What is verified together must come out as it would one by one, to the bit. PyTorch's float32 product on a CPU (MKL's) sums a row in another order
when other rows stand beside it: with AVX-512 once K is above 1,000 or so, with AVX2 always; and its 16-bit product packs the weight at each call.
oneDNN's product with a weight in oneDNN's own layout reads the weight once, which is faster for few rows, and its order follows from the number of
rows at most: not at all from two rows up (oneDNN 3.12 in float32, with SSE 4.1, AVX2 and AVX-512), from how many are left over of 6 (3.10 with AVX2),
in ways of its own (AMX, for bfloat16). So a product has a number of rows that is right, in one of the ways of `TILINGS`: the first in which rows are
seen to be independent on this machine, tried at the first product of a dtype.

Where there is no packed product (PyTorch without oneDNN, as for Macs), or the weight was made under torch.inference_mode and so has no version to tell
whether a copy is still right, PyTorch's ordinary product serves in numbers of rows that are found likewise (`PLAIN_TILINGS`), the last of them one by one.

For a small weight MKL's product takes less time, so it serves where this machine is seen to sum every row alike, with the weight stored input-major.

A weight is packed at its first product under torch.inference_mode, which decoding runs in, and kept beside it: its matrices are then in memory twice.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from mtp_kernels._gradients import matmul

TILINGS = ((1, 2**31), (6, 48), (32, 32))  # products are filled up to a multiple of so many rows, and have at most so many
PLAIN_TILINGS = (TILINGS[0], (8, 8), (12, 12), (4, 4), (1, 1))  # of ordinary products; the last is right by itself
TRIED_ROWS = (*range(2, 10), 12, 15, 16, 17, 24, 25, 31, 32, 33, 47, 48, 49, 64, 81, 96, 128, 129, 200, 300)
TRIED_SHAPES = ((100, 96), (320, 1100), (3072, 576), (576, 3072))  # N, K
SMALL = 2**20  # elements of a weight up to which MKL's product may be the faster one
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


def quietly(try_out: Callable) -> Callable:
    """For what is tried on a CPU: in the dtypes asked for, whatever torch.autocast, default device and default dtype are where it is first needed."""

    @wraps(try_out)
    def run(*args):
        with torch.autocast("cpu", enabled=False), torch.device("cpu"), torch.no_grad():
            return try_out(*args)

    return run


@cache
@quietly
def _tiling(dtype: torch.dtype, threads: int) -> tuple[int, int] | None:
    """One of TILINGS; None where this CPU and PyTorch have no packed product of the dtype, or none whose rows are independent."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return None
    try:
        return next((tiling for tiling in TILINGS if all(_independent(n, k, dtype, tiling) for n, k in TRIED_SHAPES)), None)
    except (AttributeError, RuntimeError):
        return None


@cache
@quietly
def _plain_tiling(dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """One of PLAIN_TILINGS."""
    shapes = *TRIED_SHAPES, (64, 2048)  # the last has been seen to need other tiles than the others, with AVX2
    tried = (tiling for tiling in PLAIN_TILINGS[:-1] if all(_independent(n, k, dtype, tiling, reorder=False) for n, k in shapes))
    return next(tried, PLAIN_TILINGS[-1])


def _random(n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, k, generator=generator, dtype=torch.float32) for rows in (TRIED_ROWS[-1], n))


def _independent(n: int, k: int, dtype: torch.dtype, tiling: tuple[int, int], reorder: bool = True) -> bool:
    x, weight = (values.to(dtype) for values in _random(n, k))
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if reorder else weight
    whole = _tiled(x, weight, None, None, *tiling)
    return all(torch.equal(_tiled(x[-rows:], weight, None, None, *tiling), whole[-rows:]) for rows in (1, *TRIED_ROWS))


@cache
@quietly
def _rows_alike(n: int, k: int, threads: int) -> bool:
    """Whether MKL sums a row alike in products of all the numbers of rows that are tried, with an input-major float32 weight."""
    x, weight = _random(n, k)
    weight = weight.t().contiguous()
    whole = x @ weight
    return all(torch.equal(x[-rows:] @ weight, whole[-rows:]) for rows in TRIED_ROWS)


def _computed(dtype: torch.dtype, threads: int) -> torch.dtype | None:
    """In which a product of the dtype is computed: in float32 where there is no packed product of the dtype itself, whose rows PyTorch takes one by one."""
    return dtype if _tiling(dtype, threads) else torch.float32 if dtype.itemsize == 2 and _tiling(torch.float32, threads) else None


def pack(weight: Tensor) -> Tensor | None:
    """The weight (N, K), input-major or in oneDNN's layout, kept from the last time unless it has changed; None where there is nothing better than it is."""
    threads = torch.get_num_threads()
    if weight.device.type != "cpu" or weight.is_inference() or (dtype := _computed(weight.dtype, threads)) is None:
        return None
    held, state = _packs.get(weight), (threads, *version(weight))
    if held is None or held[0].expired() or held[1] != state:
        wide = weight.detach().to(dtype)
        if dtype is torch.float32 and weight.numel() <= SMALL and _rows_alike(*map(int, weight.shape), threads):
            form = wide.t().contiguous().t()
        else:
            form = torch.ops.mkldnn._reorder_linear_weight(wide.contiguous(), None)
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
        for kind in (DeprecationWarning, FutureWarning):  # the latter since torch 2.15
            warnings.simplefilter("ignore", kind)
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
        shrunk = _product(x.to(a.dtype), a, None, None)
        y.copy_(_product(shrunk if scale == 1 else shrunk * scale, b, None, y.to(b.dtype)))


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, unit: int, most: int) -> Tensor:
    """The product of rows, one or more, filled up to a multiple of `unit`, two at least unless `most` is one, `most` at a time."""
    rows = int(x.shape[0])
    if rows == unit == 1 < most:
        return _product(x.expand(2, -1), weight, bias, None if residual is None else residual.expand(2, -1))[:1]
    if missing := -rows % unit:
        x, residual = (y if y is None else F.pad(y, (0, 0, 0, missing)) for y in (x, residual))
    if rows <= most:
        y = _product(x, weight, bias, residual)
    else:
        parts = zip(x.split(most), itertools.repeat(None) if residual is None else residual.split(most), strict=False)
        y = torch.cat([_product(part, weight, bias, beside) for part, beside in parts])
    return y[:rows] if missing else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T (+ b) (+ residual) for x (M, K); on a CPU under torch.inference_mode each row as if it stood alone."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or x.device.type != "cpu":
        return matmul(x, weight, bias, residual)
    if x.shape[0] == 0:
        return x.new_empty(0, int(weight.shape[0]))
    threads = torch.get_num_threads()
    if (form := pack(weight)) is None:
        return _tiled(x, weight, bias, residual, *_plain_tiling(x.dtype, threads))
    tiling = _tiling(form.dtype, threads) if form.is_mkldnn else TILINGS[0]
    if form.dtype == x.dtype:
        return _tiled(x, form, bias, residual, *tiling)
    wide = (y if y is None else y.to(form.dtype) for y in (bias, residual))
    return _tiled(x.to(form.dtype), form, *wide, *tiling).to(x.dtype)
