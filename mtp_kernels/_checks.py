"""What the contract's checks of arguments share: shapes, dtypes and devices, in errors that say what was passed and what is accepted."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {shape_of(tensor)}; accepted is {meaning} = {tuple(expected)}")


def check_floating(names: str, first: Tensor, *others: Tensor | None) -> None:
    """One floating dtype and one device for all; `names` lists them in order. None stands for an argument not passed."""
    dtype, device = first.dtype, first.device
    if dtype not in DTYPES:
        raise ValueError(f"{names.split()[0]} has dtype {dtype}; accepted are {', '.join(map(str, DTYPES))}")
    for i, tensor in enumerate(others, 1):
        if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
            one, other = names.split()[0], names.split()[i]
            raise ValueError(
                f"{other} is {tensor.dtype} on {tensor.device} and {one} {dtype} on {device}; accepted is one dtype and one "
                f"device for both"
            )


def check_integer(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted are torch.int32 and torch.int64")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; accepted is the other arguments' device, {device}")


def check_exactly(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; accepted is {dtype} on {device}")
