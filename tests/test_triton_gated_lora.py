"""The fused gated LoRA kernels: every plan, gate and gradient against float64; rows that keep their bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_kernels import gated_lora_linear, gated_lora_swiglu
from mtp_kernels.testing import assert_within_budget

pytest.importorskip("triton")
from mtp_kernels.triton import gated_lora as implementation  # noqa: E402
from mtp_kernels.triton._tiles import gated_lora_tiles, segments_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def make(m, k, splits, rank, dtype, bias=True, residual=True):
    n = sum(splits)
    return dict(
        x=randn(m, k, dtype=dtype), weight=randn(n, k, dtype=dtype, scale=k**-0.5, seed=1),
        lora_a=randn(len(splits) * rank, k, dtype=dtype, scale=k**-0.5, seed=2),
        lora_b=randn(n, rank, dtype=dtype, scale=rank**-0.5, seed=3), splits=splits, scale=0.5,
        bias=randn(n, dtype=dtype, seed=4) if bias else None,
        residual=randn(m, n, dtype=dtype, seed=5) if residual else None,
    )  # fmt: skip


def formula(x, weight, lora_a, lora_b, on, splits, scale, bias=None, residual=None):
    """The layer as anyone would write it: the adapter for every row, times the gate."""
    y = x @ weight.T
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    parts = [(x @ a.T) @ b.T for a, b in zip(lora_a.chunk(len(splits)), lora_b.split(splits), strict=True)]
    return y + torch.cat(parts, -1) * scale * on.unsqueeze(-1).to(x.dtype)


def gates(m, kind):
    """(gate, which rows it turns on)."""
    first = torch.arange(m, device=DEVICE) >= m // 3
    return {
        "none": (None, torch.zeros_like(first)),
        "all off": (m, torch.zeros_like(first)),
        "all on": (0, torch.ones_like(first)),
        "first": (m // 3, first),
        "in memory": (torch.tensor([m // 3], device=DEVICE), first),
        "by row": ((torch.arange(m, device=DEVICE) % 3 == 1), torch.arange(m, device=DEVICE) % 3 == 1),
    }[kind]


GATES = ["none", "all off", "all on", "first", "in memory", "by row"]
# (rows, K, splits, rank): one and several tiles and segments, projections that share a tile, sizes that fill none
SHAPES = [(1, 96, (192,), 1), (9, 100, (70, 30, 20), 5), (17, 1100, (33,), 40), (140, 72, (64, 130), 16), (131, 1030, (40,), 17)]


def double(case):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in case.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, kind, dtype):
    case = make(*shape, dtype)
    gate, on = gates(shape[0], kind)
    got = gated_lora_linear(**case, gate=gate, implementation="triton")
    assert_within_budget(got, formula(**double(case), on=on), formula(**case, on=on))
    base = gated_lora_linear(case["x"], case["weight"], bias=case["bias"], residual=case["residual"], implementation="triton")
    assert torch.equal(got[~on], base[~on])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATES[1:])
@pytest.mark.parametrize("shape", [(9, 100, (70, 30, 20), 5), (70, 48, (33, 20), 24)], ids=str)
def test_gradients(shape, kind, dtype):
    case = make(*shape, dtype)
    gate, on = gates(shape[0], kind)
    names = [n for n, v in case.items() if isinstance(v, torch.Tensor)]
    dy = randn(shape[0], sum(shape[2]), dtype=dtype, seed=7)

    def gradients(function, values, upstream):
        leaves = {n: v.clone().requires_grad_() if n in names else v for n, v in values.items()}
        function(leaves).backward(upstream)
        return {n: leaves[n].grad for n in names}

    def fused(leaves):
        return gated_lora_linear(**leaves, gate=gate, implementation="triton")

    got = gradients(fused, case, dy)
    exact = gradients(lambda leaves: formula(**leaves, on=on), double(case), dy.double())
    eager = gradients(lambda leaves: formula(**leaves, on=on), case, dy)
    for name in names:
        assert_within_budget(got[name], exact[name], eager[name])
    again = gradients(fused, case, dy)
    assert all(torch.equal(got[n], again[n]) for n in names)  # no sum's order is left to chance


def test_only_what_is_asked_for_is_computed(monkeypatch):
    case = make(20, 32, (24,), 4, torch.float32)
    launched = []
    launch = implementation._device.launch
    monkeypatch.setattr(
        implementation._device, "launch", lambda kernel, *a, **o: (launched.append(kernel.fn.__name__), launch(kernel, *a, **o))
    )
    case["x"].requires_grad_()
    y = gated_lora_linear(**case, gate=20, implementation="triton")
    assert launched == ["product_kernel"]
    y.sum().backward()
    assert launched == ["product_kernel"] * 2 and case["lora_a"].grad is None and case["weight"].grad is None


def test_off_rows_touch_no_adapter():
    case = make(140, 64, (80,), 8, torch.float32)
    clean = gated_lora_linear(**case, gate=128, implementation="triton")
    case["lora_a"][:] = float("nan")
    poisoned = gated_lora_linear(**case, gate=128, implementation="triton")
    assert torch.equal(clean[:128], poisoned[:128]) and poisoned[128:].isnan().all()


@pytest.mark.parametrize("rows", [9, 140])
def test_off_rows_beside_on_rows_skip_the_adapter(rows):
    """In one tile: nothing of the adapter is added to them, not even zero times it."""
    case = make(rows, 64, (80,), 8, torch.float32)
    clean = gated_lora_linear(**case, gate=rows - 4, implementation="triton")
    case["lora_b"][:] = float("nan")
    poisoned = gated_lora_linear(**case, gate=rows - 4, implementation="triton")
    assert torch.equal(clean[:-4], poisoned[:-4]) and poisoned[-4:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, n", [(64, 70), (1100, 40), (2048, 64)])
def test_a_row_keeps_its_bits(k, n, dtype):
    """However many rows stand beside it, in either plan, with or without gradients, adapter on other rows or not."""
    case = make(150, k, (n,), 8, dtype)
    x, residual = case.pop("x"), case.pop("residual")
    full = gated_lora_linear(x, residual=residual, **case, implementation="triton")
    for rows in (1, 2, 9, 16, 17, 33, 64, 65, 81, 128, 129):
        got = gated_lora_linear(x[:rows], residual=residual[:rows], **case, gate=rows - rows // 2, implementation="triton")
        assert torch.equal(got[: rows - rows // 2], full[: rows - rows // 2]), rows
    alone = gated_lora_linear(x[70:71], residual=residual[70:71], **case, implementation="triton")
    assert torch.equal(alone, full[70:71])
    with_gradients = gated_lora_linear(x[:9].clone().requires_grad_(), residual=residual[:9], **case, gate=5, implementation="triton")
    assert torch.equal(with_gradients[:5], full[:5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, k, features", [(1, 64, 40), (9, 1040, 70), (135, 48, 90)])
def test_swiglu_is_the_two_operations(rows, k, features, dtype):
    """Fused or not: within the budget, and on gate-off rows the same bits whatever the gate."""
    case = make(rows, k, (features, features), 6, dtype, residual=False)
    case.pop("residual"), case.pop("splits")

    def eager(values, on):
        y = formula(**values, on=on, splits=(features, features))
        return torch.nn.functional.silu(y[:, :features]) * y[:, features:]

    base = gated_lora_swiglu(case["x"], case["weight"], bias=case["bias"], implementation="triton")
    for kind in ("none", "first", "by row"):
        gate, on = gates(rows, kind)
        got = gated_lora_swiglu(**case, gate=gate, implementation="triton")
        assert_within_budget(got, eager(double(case), on), eager(case, on))
        assert torch.equal(got[~on], base[~on])
        trained = gated_lora_swiglu(**case | {"x": case["x"].clone().requires_grad_()}, gate=gate, implementation="triton")
        assert torch.equal(trained[~on], base[~on])  # under gradients it is two operations


def test_swiglu_gradients():
    case = make(11, 40, (24, 24), 6, torch.float32, residual=False)
    case.pop("residual"), case.pop("splits")
    dy, grads = randn(11, 24, seed=9), []
    for implementation_name in ("triton", "reference"):
        leaves = {n: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in case.items()}
        gated_lora_swiglu(**leaves, gate=4, implementation=implementation_name).backward(dy)
        grads.append([v.grad for v in leaves.values() if isinstance(v, torch.Tensor)])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(data):
    m, k = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 80))
    splits = tuple(data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)))
    case = make(m, k, splits, data.draw(st.integers(1, 70)), torch.float32, data.draw(st.booleans()), data.draw(st.booleans()))
    gate, on = gates(m, data.draw(st.sampled_from(GATES)))
    got = gated_lora_linear(**case, gate=gate, implementation="triton")
    exact = formula(**double(case), on=on)
    assert got.shape == exact.shape and (not m or (got - exact).abs().max() < 1e-5)


def test_inputs_that_are_views():
    wide = randn(6, 3, 200)
    x, weight = wide[:, :, 40:104], randn(64, 30).t()  # columns of a wider tensor, and a weight stored input-major
    a, b = randn(64, 5, seed=1).t(), randn(5, 30, seed=2).t()
    got = gated_lora_linear(x, weight, a, b, 7, implementation="triton")
    exact = formula(x.double(), weight.double(), a.double(), b.double(), torch.arange(18, device=DEVICE).view(6, 3) >= 7, (30,), 1.0)
    assert got.shape == (6, 3, 30) and torch.allclose(got.double(), exact, atol=1e-4)


def test_strides_of_gate_and_bias():
    case = make(6, 32, (24,), 4, torch.float32)
    gate, bias = torch.arange(12, device=DEVICE) % 3 == 0, randn(48)
    for wide_gate, wide_bias in ((gate[::2], bias[::2]), (gate[:1].expand(6), bias[:1].expand(24))):
        given, plain = ({"gate": f(wide_gate), "bias": f(wide_bias)} for f in (lambda x: x, torch.Tensor.contiguous))
        assert torch.equal(*(gated_lora_linear(**case | each, implementation="triton") for each in (given, plain)))


@pytest.mark.parametrize("kind", ["first", "in memory", "by row"])
def test_gradients_of_the_adapter_read_no_off_row(kind):
    case = make(70, 48, (33, 20), 24, torch.float32)
    gate, on = gates(70, kind)
    dy = randn(70, 53, seed=7)

    def adapter_gradients(x, upstream):
        a, b = (case[n].clone().requires_grad_() for n in ("lora_a", "lora_b"))
        y = gated_lora_linear(**case | {"x": x, "lora_a": a, "lora_b": b}, gate=gate, implementation="triton")
        return torch.autograd.grad(y, (a, b), upstream)

    clean, off = adapter_gradients(case["x"], dy), ~on.unsqueeze(1)
    poisoned = adapter_gradients(case["x"].masked_fill(off, torch.nan), dy.masked_fill(off, torch.nan))
    assert all(map(torch.equal, poisoned, clean))


@pytest.mark.parametrize("rank", [1, 15, 64, 65, 512])
def test_ranks(rank):
    case = make(5, 64, (32, 16), rank, torch.float32)
    gate, on = gates(5, "first")
    got = gated_lora_linear(**case, gate=gate, implementation="triton")
    assert torch.allclose(got.double(), formula(**double(case), on=on), atol=1e-5)


def test_compiled_without_a_break():
    case = make(6, 32, (24,), 4, torch.float32)
    case["lora_a"].requires_grad_()

    def run(x, gate):
        return gated_lora_linear(**case | {"x": x}, gate=gate, implementation="triton") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for gate in (2, torch.arange(6, device=DEVICE) % 2 == 0):
        assert torch.equal(compiled(case["x"], gate), run(case["x"], gate))
        (gradient,) = torch.autograd.grad(compiled(case["x"], gate).sum(), case["lora_a"])
        (expected,) = torch.autograd.grad(run(case["x"], gate).sum(), case["lora_a"])
        assert torch.equal(gradient, expected)


def test_registered_operations():
    case = make(6, 32, (24, 8), 4, torch.float32)
    on = torch.arange(6, device=DEVICE) % 2 == 0
    operators = torch.ops.mtp_kernels
    for gate, first_on in ((None, -1), (None, 2), (on, -1)):
        common = (gate, first_on, 0.5, [24, 8])
        inputs = [case[n] for n in ("x", "weight", "lora_a", "lora_b")]
        added = (case["bias"], case["residual"])
        torch.library.opcheck(operators.gated_lora.default, (*inputs, *common, *added, False))
        torch.library.opcheck(operators.gated_lora.default, (*inputs, *common, case["bias"], None, True))
        torch.library.opcheck(operators.gated_lora_training.default, (*inputs, *common, *added))
        s = torch.ones(6, 8, device=DEVICE)
        torch.library.opcheck(operators.gated_lora_backward.default, (randn(6, 32), *inputs, *common, s, True, True))


def test_segments_follow_from_the_weight_alone():
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (40, 1100)):
        for itemsize in (2, 4):
            seen = set()
            for shared_memory in (65_536, 166_912, 232_448):
                for m in (1, 16, 17, 81, 128, 129, 8192):
                    tiles = gated_lora_tiles(m, n, k, itemsize, shared_memory)
                    seen.add((tiles.block_k, tiles.segments, tiles.segment_k))
            assert len(seen) == 1
            block_k, segments, segment_k = seen.pop()
            assert (segments, segment_k) == segments_of(n, k, block_k) and segments * segment_k >= k > (segments - 1) * segment_k
