"""Launchers as PyTorch operators: opaque to torch.compile, known to fake tensors.

By hand instead of `torch.library.custom_op`, whose call costs three times as much (17 against 5 us on a slow core, and 33
against 13 with a gradient), which at decoding size is more than the kernel. Gradients come from a `torch.autograd.Function`
that calls these operators; they have no formula of their own.
"""

from collections.abc import Callable

import torch

_library = torch.library.Library("mtp_kernels", "FRAGMENT")


def operator(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorator: a launcher with annotated arguments becomes torch.ops.mtp_kernels.<its name, without underscores around>.

    fake: same arguments; gives empty outputs of the right shapes. mutates: the arguments that the launcher writes into.
    """

    def register(launcher: Callable):
        name = launcher.__name__.strip("_")
        _library.define(name + torch.library.infer_schema(launcher, mutates_args=mutates), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mtp_kernels::{name}", fake, lib=_library)
        return getattr(torch.ops.mtp_kernels, name).default

    return register


def rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as (M, width), of unit stride along the width: a view where x's strides allow one."""
    x = x.reshape(-1, width) if x.ndim != 2 else x
    return x if x.stride(1) == 1 else x.contiguous()


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
