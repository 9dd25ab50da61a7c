"""The implementation: fused Triton kernels behind the contract of `ops`. Importing it needs Triton, but no GPU."""

from mtp_kernels.triton._device import INTERPRETED as INTERPRETED

__all__ = []
