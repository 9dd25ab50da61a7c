"""Which implementation computes an operation: the reference or the Triton kernels, by the tensors' device or as asked."""

import importlib.util
from types import ModuleType, SimpleNamespace

import torch

from mtp_kernels import reference

IMPLEMENTATIONS = ("reference", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
OPERATIONS = (
    "accept", "accept_and_commit", "argmax", "attention", "drafting_states", "gated_lora_linear", "gated_lora_swiglu", "latent_consistency",
    "linear_argmax", "linear_cross_entropy", "linear_sample", "lookup_drafts", "rms_norm", "rotary_embedding", "rotary_frequencies", "rotary_scale",
    "rotary_tables", "rotary_write", "sample", "sampler_draft", "sampler_hidden", "swiglu",
)  # fmt: skip


def _triton() -> ModuleType | None:
    """The fused kernels, imported at the first use; None where Triton is not installed."""
    if not HAS_TRITON:
        return None
    from mtp_kernels import triton

    return triton


def choose(name: str | None, operation: str, device: torch.device):
    """The function that computes `operation` for tensors on `device`, by default or as asked."""
    if name not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {name!r}; accepted are {', '.join(map(repr, IMPLEMENTATIONS))} or None")
    if name == "reference" or (name is None and device.type != "cuda"):
        return getattr(reference, operation)
    kernels = _triton()
    if name is None:
        return getattr(kernels, operation, None) or getattr(reference, operation)
    if kernels is None:
        raise ValueError("implementation is 'triton' and Triton is not installed; accepted here is 'reference'")
    if operation not in kernels.__all__:
        raise ValueError(f"{operation} has no Triton kernel; those that have are {', '.join(kernels.__all__)}")
    if device.type != "cuda" and not kernels.INTERPRETED:
        raise ValueError(
            f"implementation is 'triton' and the tensors are on {device}; accepted are a GPU, or TRITON_INTERPRET=1 set before Triton is imported"
        )
    return getattr(kernels, operation)


def unchecked(implementation: str | None = None, device: torch.device | None = None) -> SimpleNamespace:
    """The operations without their argument checks, as attributes: for inner loops whose shapes are right by construction.

    They take the same arguments except `implementation`, chosen here: None picks for tensors on `device`, or, if that is
    None too, at each call by the device of the first argument.
    With "triton", an operation without a Triton kernel is the reference's. A wrong argument gives whatever it gives.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}; accepted are {', '.join(map(repr, IMPLEMENTATIONS))} or None")
    kernels = None if implementation == "reference" else _triton()
    if implementation == "triton" and kernels is None:
        raise ValueError("implementation is 'triton' and Triton is not installed; accepted here is 'reference'")
    table = {}
    for name in OPERATIONS:
        plain, fused = getattr(reference, name), getattr(kernels, name, None)
        if fused is None or implementation == "triton":
            table[name] = fused or plain
        elif device is not None:
            table[name] = fused if device.type == "cuda" else plain
        else:
            table[name] = lambda x, *args, _plain=plain, _fused=fused, **options: (
                (_fused if x.is_cuda else _plain)(x, *args, **options)
            )
    return SimpleNamespace(**table)
