"""Makes Triton's interpreter right for bfloat16, which it keeps as uint16 and treats as integers in places.

As shipped (3.6 to 3.9) its dots and sums work on the raw bits and its casts truncate, silently. Patched, an operation on
bfloat16 is computed in float32 and rounded to the nearest, ties to even: what the hardware gives, and PyTorch.
Not covered, as the interpreter refuses it anyway: atomics. `tl.fma` rounds twice (to float32, then bfloat16).
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

FLOAT_OPERATIONS = (
    "fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "approx_divf", "fma", "clampf", "minimumf", "maximumf", "minnumf", "maxnumf",
    "fneg", "cos", "sin", "exp", "exp2", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "erf", "floor", "ceil",
)  # fmt: skip
COMPARISONS = tuple(f"fcmp{ordered}{kind}" for ordered in "OU" for kind in ("LT", "LE", "GT", "GE", "EQ", "NE"))
CASTS = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc")


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32: exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to the nearest, ties to even; a NaN stays one."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a NaN's bits may overflow here; replaced below
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _holds_bfloat16(x) -> bool:
    # a comparison's result is boolean data under its operand's type, so that the type alone does not tell
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _wide(x):
    return TensorHandle(widen(x.data), tl.float32) if _holds_bfloat16(x) else x


def _narrowed(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data), tl.bfloat16)


def _in_float32(method, rounds: bool):
    def patched(self, *args):
        if not any(_holds_bfloat16(x) for x in args):
            return method(self, *args)
        with np.errstate(all="ignore"):
            result = method(self, *map(_wide, args))
            return _narrowed(result) if rounds else TensorHandle(result.data, tl.int1)

    return patched


def _cast(method):
    def patched(self, src, dst_type, *rest):
        to_bfloat16 = dst_type.scalar == tl.bfloat16
        if not to_bfloat16 and not _holds_bfloat16(src):
            return method(self, src, dst_type, *rest)
        with np.errstate(all="ignore"):
            if to_bfloat16:
                return src if _holds_bfloat16(src) else TensorHandle(narrow(src.data), tl.bfloat16)
            return TensorHandle(widen(src.data).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    return patched


def _fp_to_fp(method):
    """The casts that name a rounding mode, and those of 8-bit floats (left alone)."""

    def patched(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        if {source, target} != {tl.float32, tl.bfloat16} and (target != tl.bfloat16 or source not in (tl.float16, tl.float64)):
            return method(self, src, dst_type, rounding_mode)
        if source == tl.bfloat16:
            return TensorHandle(widen(src.data), tl.float32)
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return TensorHandle((src.data.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)
        return TensorHandle(narrow(src.data), tl.bfloat16)

    return patched


def _dot(method):
    def patched(self, a, b, d, *rest):
        return method(self, _wide(a), _wide(b), d, *rest)  # a product of two bfloat16 is exact in float32

    return patched


def _reduction(method, built_in):
    """The shortcuts for known combine functions; any other goes element by element through the operations above."""

    def patched(self, inputs):
        if self.combine_fn not in built_in or not any(_holds_bfloat16(x.handle) for x in inputs):
            return method(self, inputs)
        wide = tuple(
            tl.core.tensor(_wide(x.handle), tl.block_type(tl.float32, x.shape)) if _holds_bfloat16(x.handle) else x for x in inputs
        )
        results = method(self, wide)
        first, rest = (results[0], results[1:]) if isinstance(results, (tuple, list)) else (results, None)
        shape = first.shape
        value = tl.core.tensor(_narrowed(first.handle), tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16)
        return value if rest is None else (value, *rest)

    return patched


def apply() -> None:
    """Patch the interpreter of this process. Calling it again does nothing."""
    if getattr(InterpreterBuilder, "bfloat16_is_right", False):
        return
    builder, standard = InterpreterBuilder, tl.standard

    def wrap(names, wrapper, *options):
        for name in names:
            if hasattr(builder, f"create_{name}"):
                setattr(builder, f"create_{name}", wrapper(getattr(builder, f"create_{name}"), *options))

    wrap(FLOAT_OPERATIONS, _in_float32, True)
    wrap(COMPARISONS, _in_float32, False)
    wrap(CASTS, _cast)
    wrap(["fp_to_fp"], _fp_to_fp)
    wrap(["dot"], _dot)
    builder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)
    known = [
        getattr(standard, name, None)
        for name in ("_argmin_combine_tie_break_left", "_argmax_combine_tie_break_left", "_elementwise_max", "_elementwise_min", "_sum_combine")
    ]
    ReduceOps.apply_impl = _reduction(ReduceOps.apply_impl, known)
    ScanOps.apply_impl = _reduction(ScanOps.apply_impl, [standard._sum_combine, standard._prod_combine])
    builder.bfloat16_is_right = True
