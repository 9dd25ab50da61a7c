"""How benchmarks take time on a GPU: calls captured into graphs, over rotated inputs, every competitor in turn.

One run of a competitor is one call on each copy of the inputs. Copies exceed the L2 cache together, so that none finds its inputs
there; a CUDA graph holds the whole run, so that launching from Python is not what is measured; rounds go through all
competitors, a different one first each time, so that a drift of the clocks meets all alike.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

MAX_COPIES, MIN_CALLS = 128, 8
COPIES_BYTES = 6 * 2**30
LEAD_CYCLES = 800_000  # about 0.5 ms in which the CPU gets ahead of the GPU


class GPUClock:
    """Time on the GPU's own stream. A short wait is queued before each mark, so that launching a run is not part of its time."""

    def begin(self):
        torch.cuda._sleep(LEAD_CYCLES)
        return self.end()

    def end(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


class CPUClock:
    begin = end = staticmethod(time.perf_counter)

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait(self) -> None:
        pass


class WallClock(CPUClock):
    """The CPU's clock, read when a GPU has done all that was queued: for work in which the two wait for each other anyway."""

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    end = begin


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist())


def interleave(runs: dict[Hashable, Callable[[], object]], clock, budget: float, rounds: tuple[int, int] = (5, 40)) -> dict[Hashable, list[float]]:
    """Seconds of each run in each round. budget: about how many seconds all rounds may take, within the least and most rounds."""
    names = list(runs)
    if not names:
        return {}

    def one_round(first: int) -> dict[Hashable, tuple]:
        marks = {}
        for name in names[first:] + names[:first]:
            begin = clock.begin()
            runs[name]()
            marks[name] = begin, clock.end()
        return marks

    one_round(0)  # uploads graphs, wakes the clocks
    clock.wait()
    marks = [one_round(0)]
    clock.wait()
    took = sum(clock.seconds(*pair) for pair in marks[0].values())
    count = min(rounds[1], max(rounds[0], int(budget / max(took, 1e-9))))
    marks = [one_round(i % len(names)) for i in range(count)]
    clock.wait()
    return {name: [clock.seconds(*each[name]) for each in marks] for name in names}


def copies(inputs: dict[str, object], cache_bytes: int) -> tuple[list[dict[str, object]], bool]:
    """The inputs and enough copies of them to exceed three caches, and whether they do. Gradients are asked for as in the inputs."""
    size = sum(t.numel() * t.element_size() for t in inputs.values() if isinstance(t, Tensor))
    count = min(max(2, 3 * cache_bytes // max(size, 1) + 1), MAX_COPIES, max(2, COPIES_BYTES // max(size, 1)))

    def copy(value):
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return [inputs] + [{name: copy(value) for name, value in inputs.items()} for _ in range(count - 1)], count * size > 3 * cache_bytes


@lru_cache(maxsize=1)
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def run_of(call: Callable[[dict], object], rotated: Sequence[dict], captured: bool) -> tuple[Callable[[], object], int]:
    """What makes one run of `call`, and how many calls that is; on a GPU and if it can be captured, one graph launch."""
    turns = max(1, -(-MIN_CALLS // len(rotated)))

    def all_calls():
        for _ in range(turns):
            for inputs in rotated:
                call(inputs)

    if not captured:
        return all_calls, turns * len(rotated)
    side = capture_stream()  # compilation and first allocations, a library's workspace too, must be over before the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(rotated[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        all_calls()
    return graph.replay, turns * len(rotated)


def measured_roofs(dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches: bytes per second of a large copy (read and written), operations per second of a large matrix product."""
    free = torch.cuda.mem_get_info()[0]
    source = torch.empty(min(2**30, free // 8), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    product = torch.empty(side, side, device="cuda", dtype=dtype)
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b.t(), out=product)}
    seconds = {name: percentiles(each)[0] for name, each in interleave(runs, GPUClock(), 1.0, (20, 200)).items()}
    return {"bandwidth": 2 * source.numel() / seconds["copy"], "matmul": 2 * side**3 / seconds["matmul"]}
