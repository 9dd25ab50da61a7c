"""The noise of `mtp_kernels._sampling` in a kernel."""

import triton
import triton.language as tl


@triton.jit
def gumbel(key, ids):
    """Float32 Gumbel noise of the tokens ids for keys, int64; shapes broadcast. The logarithm of 1 - u is a series where u is small."""
    z = key.to(tl.uint64, bitcast=True) + (ids.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    u = ((z ^ (z >> 31)) >> 1).to(tl.int64).to(tl.float32) * 1.0842021724855044e-19  # 2^-63
    u = tl.minimum(u, 0.9999999403953552)  # 1 - 2^-24
    exponential = tl.where(u < 0.00390625, u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25))), -tl.log(1.0 - u))
    return -tl.log(exponential)
