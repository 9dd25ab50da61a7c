"""A case's competitors held against float64, and those that are right timed against each other: one row of results each."""

import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from bench.cases import BASE, COMPILED, EAGER, FLEX, OURS, Case, Provider
from bench.counts import GPU
from bench.report import PeakMemory
from bench.timing import GPUClock, copies, interleave, percentiles, run_of
from mtp_kernels.testing import assert_within_budget

PEAK = "peak MiB"


def describe(case: Case) -> dict:
    s = case.setting
    return dict(operation=case.operation, model=case.model, layer=case.layer, shape=case.shape, setting=s.name, rows=s.rows, on=s.on,
                rank=case.rank, backward=case.backward)  # fmt: skip


def double(inputs: dict) -> dict:
    def widened(t):
        return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return {name: widened(t) for name, t in inputs.items()}


class Check:
    """Holds competitors of one case against float64. Formulas are computed once, however many are held against them."""

    def __init__(self, case: Case, inputs: dict):
        self.case, self.inputs, self.wide, self.known = case, inputs, double(inputs), {}

    def __call__(self, provider: Provider) -> tuple[bool, float]:
        """Whether every result is within the budget, and the largest error in units of the eager formula's."""
        if provider.plain not in self.known:
            exact, eager = (self.case.results(provider.plain, inputs) for inputs in (self.wide, self.inputs))
            pairs = zip(exact, eager, strict=True)
            units = [float((p.double() - e).abs().max()) if e is not None and e.is_floating_point() else None for e, p in pairs]
            self.known[provider.plain] = list(zip(exact, eager, units, strict=True))
        good, worst = True, 0.0
        results = self.case.results(provider.call, self.inputs)
        for got, (exact, eager, unit) in zip(results, self.known[provider.plain], strict=True):
            if got is None or exact is None or not exact.is_floating_point():
                same = got is exact or got is not None and exact is not None and torch.equal(got, exact)
                good, worst = (good, worst) if same else (False, float("inf"))
                continue
            try:
                assert_within_budget(got, exact, eager)
            except AssertionError:
                good = False
            error = float((got.double() - exact).abs().max()) if got.shape == exact.shape else float("inf")
            unit = unit or float(torch.finfo(eager.dtype).eps * exact.abs().max())  # where eager is exact, a rounding step
            ratio = error / unit if unit else 0.0 if error == 0 else float("inf")
            worst = ratio if ratio != ratio else max(worst, ratio)  # a NaN stays
        return good, worst


def row(case: Case, provider: Provider, itemsize: int, status: str, error: float | None = None, **measured) -> dict:
    count = case.count(itemsize, provider.adapter)
    blank = dict.fromkeys(("seconds", "p20", "p80", "bound", "share_of_roof", "over_eager", "of_base", "cold", PEAK))
    if error is not None and not abs(error) < float("inf"):  # JSON has no such numbers
        status, error = f"{status}: error is {error}", None
    return describe(case) | dict(provider=provider.name, status=status, error=error, captured=provider.captured,
                                 bytes=count.bytes, operations=count.operations) | blank | measured  # fmt: skip


def why(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def check_toys(cases: list[Case], dtype: torch.dtype, ours: bool) -> Iterator[dict]:
    """Every competitor that runs on a CPU, at toy size. ours: Triton is there and interpreted."""
    for case in cases:
        check = Check(case, case.make(torch.device("cpu"), dtype))
        for provider in case.providers:
            if provider.name == COMPILED:  # takes a compiler and a minute, and is PyTorch's own business
                continue
            if provider.name == OURS and not ours:
                yield row(case, provider, dtype.itemsize, "skipped")
                continue
            try:
                good, error = check(provider)
                yield row(case, provider, dtype.itemsize, "ok" if good else "wrong", error)
            except Exception as problem:  # noqa: BLE001 - one competitor's failure is reported, the others go on
                yield row(case, provider, dtype.itemsize, why(problem))


def peak_mib(case: Case, provider: Provider, inputs: dict, device: torch.device) -> float | None:
    """What one call allocates at its height beyond what was there before; None without a GPU. The check has warmed everything up."""
    if device.type != "cuda":
        return None
    with PeakMemory(device) as peak:
        case.run(provider.call, inputs)
    return round(peak.mib - peak.before_mib, 3)


def measure(case: Case, providers: list[Provider], dtype: torch.dtype, device: torch.device, roof: GPU, cache: int, clock, budget: float) -> list[dict]:
    """One row per competitor: checked first, and timed only if right."""
    rows, runs, calls, errors, peaks = {}, {}, {}, {}, {}
    inputs = case.make(device, dtype)
    check = Check(case, inputs)
    for provider in providers:
        try:
            good, errors[provider] = check(provider)
            if not good:
                rows[provider] = row(case, provider, dtype.itemsize, "wrong", errors[provider])
        except Exception as problem:  # noqa: BLE001
            rows[provider] = row(case, provider, dtype.itemsize, why(problem))
    del check  # the float64 results are larger than everything else
    rotated, cold = copies(inputs, cache)
    for provider in providers:
        if provider in rows:
            continue
        try:
            peaks[provider] = peak_mib(case, provider, inputs, device)
            runs[provider], calls[provider] = run_of(lambda i, call=provider.call: case.run(call, i), rotated, provider.captured and device.type == "cuda")
        except Exception as problem:  # noqa: BLE001
            rows[provider] = row(case, provider, dtype.itemsize, why(problem), errors[provider])
    taken = interleave(runs, clock, budget)
    by_name = {p.name: taken[p] for p in runs}
    for provider, seconds in taken.items():
        each = [s / calls[provider] for s in seconds]
        (median, p20, p80), count = percentiles(each), case.count(dtype.itemsize, provider.adapter)

        def ratio(other: str, inverse: bool, seconds=seconds) -> float | None:
            """Median over rounds of the ratio of times in the same round; every competitor makes as many calls per round."""
            pairs = zip(by_name[other], seconds, strict=True) if other in by_name else ()
            values = [a / b if inverse else b / a for a, b in pairs]
            return percentiles(values)[0] if values else None

        rows[provider] = row(
            case, provider, dtype.itemsize, "ok", errors[provider], seconds=median, p20=p20, p80=p80, bound=count.bound(roof),
            share_of_roof=count.seconds(roof) / median, over_eager=ratio(EAGER, True), of_base=ratio(BASE, False), cold=cold,
            **{PEAK: peaks[provider]},
        )  # fmt: skip
    return [rows[p] for p in providers]


def measure_all(cases: list[Case], dtype: torch.dtype, roof: GPU, with_compile: bool, budget: float, minutes: float) -> list[dict]:
    if with_compile:
        import torch._dynamo.config as config

        config.recompile_limit, config.fail_on_recompile_limit_hit = 64, True  # past the limit it would be eager by another name
    device = torch.device("cuda")
    cache, began, rows = torch.cuda.get_device_properties().L2_cache_size, time.monotonic(), []
    for case in tqdm(cases, desc="kernels", disable=None):
        providers = [p for p in case.providers if with_compile or p.name not in (COMPILED, FLEX)]
        if time.monotonic() - began > 60 * minutes:
            rows += [row(case, p, dtype.itemsize, "not run: out of time") for p in providers]
            continue
        try:
            rows += measure(case, providers, dtype, device, roof, cache, GPUClock(), budget)
        except Exception as problem:  # noqa: BLE001
            rows += [row(case, p, dtype.itemsize, why(problem)) for p in providers]
        torch.cuda.empty_cache()
    return rows
