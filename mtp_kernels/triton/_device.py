"""What the kernels share: how they are launched, and the only place that asks what GPU this is."""

from functools import lru_cache
from itertools import chain

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
OPTIONS = {"enable_fp_fusion": True}  # of every launch; the default follows an environment variable, and Triton's version


@lru_cache(maxsize=1)
def target() -> tuple[str, int | str]:
    """The chip that launch choices may depend on: ("cuda", 80 | 90 | 100 ...) or ("hip", "gfx942"); interpreted, ("cuda", 90)."""
    if INTERPRETED:
        return "cuda", 90
    current = triton.runtime.driver.active.get_current_target()
    return current.backend, current.arch


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run `kernel` on `grid`. Every launch goes through here, so that a test can compile what would be launched."""
    if not min(grid):
        return
    for x in chain(args, options.values()):
        if isinstance(x, torch.Tensor) and x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):  # Triton launches on the current device, wherever the tensors are
                kernel[grid](*args, **OPTIONS, **options)
            return
    kernel[grid](*args, **OPTIONS, **options)


def shared_memory() -> int:
    """Bytes of shared memory (LDS) that one program may use."""
    backend, arch = target()
    if backend == "hip":
        return 163_840 if str(arch).startswith("gfx95") else 65_536
    return {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}.get(arch, 101_376)
