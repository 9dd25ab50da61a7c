"""The implementation: fused Triton kernels behind the contract of `ops`. Importing it needs Triton, but no GPU."""

from mtp_kernels.triton._device import INTERPRETED as INTERPRETED
from mtp_kernels.triton.accept import accept
from mtp_kernels.triton.attention import attention
from mtp_kernels.triton.gated_lora import gated_lora_linear, gated_lora_swiglu
from mtp_kernels.triton.norm import rms_norm
from mtp_kernels.triton.rotary import rotary_embedding
from mtp_kernels.triton.swiglu import swiglu

__all__ = ["accept", "attention", "gated_lora_linear", "gated_lora_swiglu", "rms_norm", "rotary_embedding", "swiglu"]
