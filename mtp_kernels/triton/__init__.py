"""The implementation: fused Triton kernels behind the contract of `ops`. Importing it needs Triton, but no GPU."""

from mtp_kernels.triton._device import INTERPRETED as INTERPRETED
from mtp_kernels.triton.accept import accept, accept_and_commit
from mtp_kernels.triton.attention import attention
from mtp_kernels.triton.cross_entropy import linear_cross_entropy
from mtp_kernels.triton.drafting import drafting_states, lookup_drafts
from mtp_kernels.triton.gated_lora import gated_lora_linear, gated_lora_swiglu
from mtp_kernels.triton.latent_consistency import latent_consistency
from mtp_kernels.triton.linear_argmax import argmax, linear_argmax, linear_sample, sample
from mtp_kernels.triton.norm import rms_norm
from mtp_kernels.triton.rotary import rotary_embedding, rotary_write
from mtp_kernels.triton.sampler import sampler_draft
from mtp_kernels.triton.swiglu import swiglu

__all__ = [
    "accept", "accept_and_commit", "argmax", "attention", "drafting_states", "gated_lora_linear", "gated_lora_swiglu", "latent_consistency",
    "linear_argmax", "linear_cross_entropy", "linear_sample", "lookup_drafts", "rms_norm", "rotary_embedding", "rotary_write", "sample",
    "sampler_draft", "swiglu",
]  # fmt: skip
