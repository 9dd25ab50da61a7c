"""What the kernels share: how they are launched, and the only place that asks what GPU this is."""

import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run `kernel` on `grid`. Every launch goes through here, so that a test can compile what would be launched."""
    if min(grid):
        kernel[grid](*args, **options)
