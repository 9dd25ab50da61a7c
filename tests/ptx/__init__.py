"""The kernels as compiled for NVIDIA's GPUs, run on a CPU: Triton compiles, and `machine` runs the PTX instruction by instruction.

What Triton's interpreter leaves out is under test here: real tile sizes and layouts, copies in flight, matrix instructions of 16-bit numbers,
barriers between warps. Slow as it is, the tests of the kernels run so:

    TEST_PTX=sm_90 python -m pytest tests/test_triton_attention.py
"""

import functools
from types import SimpleNamespace

import numpy as np
import torch

TARGETS = {"sm_80": 80, "sm_90": 90}


def apply(target: str) -> None:
    """Every launch of this process goes to the machine, compiled for `target`. Triton must not be interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget

    import mtp_kernels.testing
    import mtp_kernels.triton
    from mtp_kernels.triton import _device

    if target not in TARGETS:
        raise ValueError(f"there is no machine for {target!r}; accepted are {', '.join(TARGETS)}")
    if _device.INTERPRETED:
        raise RuntimeError("Triton is interpreted in this process")
    chip = GPUTarget("cuda", TARGETS[target], 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: chip, get_current_device=lambda: 0, get_current_stream=lambda _: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )  # fmt: skip
    _device.target = lambda: (chip.backend, chip.arch)
    _device.launch = launch
    mtp_kernels.triton.INTERPRETED = True  # tensors on the CPU are accepted
    mtp_kernels.testing.assert_within_budget = functools.partial(assert_within_budget, mtp_kernels.testing.assert_within_budget)


def assert_within_budget(original, got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
    """As the original; but eager's float32 is a CPU's, which sums in many more parts than a GPU's threads: four times its error."""
    original(got, exact, (exact + 4 * (eager - exact)).to(eager.dtype) if eager.dtype == torch.float32 else eager)


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """As `_device.launch`, on the machine."""
    from mtp_kernels.triton._device import OPTIONS

    from . import machine

    if not min(grid):
        return
    compiled = kernel.warmup(*args, grid=grid, **OPTIONS, **options)
    names, arguments, tensors = compiled.src.fn.arg_names, [], {}
    given = dict(zip(names, args, strict=False)) | options
    for name in names:
        kind, value = compiled.src.signature[name], given.get(name)
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            arguments.append(value)
        elif kind == "fp32":
            arguments.append(int(np.float32(value).view(np.uint32)))
        elif kind in ("i32", "u32", "i64", "u64", "i1"):
            arguments.append(int(value) % 2**64)
        else:
            raise TypeError(f"{name} is of type {kind}, which the machine does not know")
    machine.run(compiled.asm["ptx"], grid, arguments, tensors, compiled.metadata.shared)
