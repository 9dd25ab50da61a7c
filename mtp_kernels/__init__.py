"""Operations for multi-token prediction with mask tokens. `ops` is the contract; `reference` is its specification."""

from mtp_kernels.ops import (
    accept,
    accept_and_commit,
    attention,
    gated_lora_linear,
    gated_lora_swiglu,
    latent_consistency,
    linear_argmax,
    linear_cross_entropy,
    linear_sample,
    rms_norm,
    rotary_embedding,
    rotary_frequencies,
    rotary_tables,
    rotary_write,
    sampler_draft,
    sampler_hidden,
    sampling_keys,
    swiglu,
    unchecked,
)
from mtp_kernels.types import AttentionRule, SamplerWeights, Sampling

__version__ = "0.1.0"

__all__ = [
    "AttentionRule",
    "SamplerWeights",
    "Sampling",
    "accept",
    "accept_and_commit",
    "attention",
    "gated_lora_linear",
    "gated_lora_swiglu",
    "latent_consistency",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_sample",
    "rms_norm",
    "rotary_embedding",
    "rotary_frequencies",
    "rotary_tables",
    "rotary_write",
    "sampler_draft",
    "sampler_hidden",
    "sampling_keys",
    "swiglu",
    "unchecked",
]
