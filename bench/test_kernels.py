"""The operations of `bench.kernels` at small sizes under pytest-benchmark: `pytest bench`. On a GPU ours too, on a CPU plain PyTorch."""

import pytest
import torch

from bench.cases import COMPILED, LOSS, OURS, TOY, Model, Scope, Setting
from bench.measure import Check
from bench.suites import SUITES

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
MODEL = Model("small", 1024, 2816, 16, 8, 64, 32_000, (2048,)) if GPU else TOY
STEP = Setting("linear, k = 8", 17, 8, not GPU, "linear", 8)
SETTINGS = (STEP, Setting("training", 1152, 1024, True), Setting(LOSS, 2048, 0, True, LOSS)) if GPU else (STEP, Setting(LOSS, 8, 0, True, LOSS))
CASES = [
    pytest.param(case, provider, id=f"{case.operation}-{case.layer}-{case.setting.rows}{'-backward' * case.backward}-{provider.name}")
    for suite in SUITES.values()
    for case in suite(MODEL, SETTINGS, Scope((16,), short=True))
    for provider in case.providers
    if provider.name != COMPILED and (GPU or provider.name != OURS)
]


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize("case, provider", CASES)
def test_kernel(benchmark, case, provider):
    inputs = case.make(DEVICE, DTYPE)
    good, error = Check(case, inputs)(provider)
    assert good, f"the error is {error:.2f} times eager's"

    def call():
        case.run(provider.call, inputs)
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{case.operation} {case.layer} {case.setting.rows}"
    benchmark(call)
