"""Modules: each is its operation on its own weights, adapters come and go, nothing stale is kept, and torch's own tools
(autocast, compile, checkpointing, copies, optimizers, sharding) find ordinary modules."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtp_kernels import ops
from mtp_kernels.nn import GatedLoRALinear, RMSNorm, SamplerHead, SwiGLU
from mtp_kernels.testing import assert_within_budget

MIXED = torch.tensor([True, False, True, True, False])


def layer(splits=(6, 2, 4), rank=3, bias=False):
    torch.manual_seed(0)
    module = GatedLoRALinear(8, splits, bias=bias)
    module.add_adapter(rank, alpha=2.0 * rank)
    with torch.no_grad():
        module.lora_B.normal_()
        if bias:
            module.bias.normal_()
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits, rank", [(5, 2), ((6, 2, 4), 3), ((6, 2, 4), 200)])
@pytest.mark.parametrize("grad", [False, True])
def test_gated_lora_linear_is_its_operation(splits, rank, bias, grad):
    module = layer(splits, rank, bias)
    x, residual = torch.randn(7, 8), torch.randn(7, sum(module.splits))
    with torch.set_grad_enabled(grad):
        y = module(x, 3, residual)
    w = module.weight.detach().double()
    a, b = module.lora_A.detach().double().view(-1, rank, 8), module.lora_B.detach().double().split(module.splits)
    expected = x.double() @ w.t() + residual + (module.bias.detach() if bias else 0)
    expected[3:] += 2.0 * torch.cat([x[3:].double() @ a[i].t() @ b[i].t() for i in range(len(b))], dim=1)
    assert torch.allclose(y.double(), expected, atol=1e-4)
    assert torch.equal(module(x), ops.gated_lora_linear(x, module.weight, bias=module.bias))
    assert y.requires_grad == grad


@pytest.mark.parametrize("training", [False, True])
def test_changed_adapters_are_seen(training):
    module, x = layer().train(training), torch.randn(4, 8)
    with torch.no_grad():
        before = module(x, 0)
        module.lora_B.mul_(2)
        after = module(x, 0)
        module.lora_A.mul_(0.5)
        assert torch.allclose(module(x, 0), before, atol=1e-5) and not torch.allclose(after, before, atol=1e-2)
        module.lora_B.data = torch.zeros_like(module.lora_B)
        assert torch.equal(module(x, 0), module(x))
        assert module(x.bfloat16().float(), 0).dtype == torch.float32


def test_what_is_kept_belongs_to_the_parameters():
    module, x = layer().eval(), torch.randn(4, 8)
    with torch.no_grad():
        module(x, 0)
        for _ in range(20):  # storage that is freed and used again must not pass for the old one's
            module.lora_B.data = torch.randn(12, 3)
            module.lora_B.data = torch.randn(12, 3)
            expected = ops.gated_lora_linear(x, module.weight, module.lora_A, module.lora_B, 0, scale=2.0, splits=(6, 2, 4))
            assert torch.allclose(module(x, 0), expected, atol=1e-5)
        module.lora_B.data.zero_()  # torch counts no version here: eval() is what forgets
        assert torch.equal(module.eval()(x, 0), module(x))
        with torch.inference_mode():
            before = module(x)
            module.weight.data.mul_(2)
            torch.testing.assert_close(module.train().eval()(x), 2 * before)
        assert copy.deepcopy(module)._prepared is None
        module.load_state_dict(layer().state_dict())
        assert torch.equal(module(x, 0), layer().eval()(x, 0))
    with torch.inference_mode():
        made_here = layer().eval()  # its parameters have no version counter
        assert torch.allclose(made_here(x, 0), module(x, 0), atol=1e-6)


def test_base_and_adapter_may_differ_in_dtype():
    module = layer()
    module.weight.data = module.weight.data.bfloat16()
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        y = module(x, 2)
    assert y.dtype == torch.bfloat16 and torch.equal(y[:2], module(x)[:2]) and not torch.equal(y[2:], module(x)[2:])


def test_adapters_come_and_go():
    module = GatedLoRALinear(8, 5)
    x = torch.randn(3, 8)
    base = module(x)
    module.add_adapter(4, alpha=4.0)
    assert torch.equal(module(x, 0), base)  # B is zero
    assert {"weight", "lora_A", "lora_B"} == set(module.state_dict())
    assert "rank=4" in repr(module)
    module.remove_adapter()
    assert {"weight"} == set(module.state_dict()) and torch.equal(module(x, 0), base)
    for rank in (0, 513):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            module.add_adapter(rank, alpha=1.0)
    module.add_adapter(4)
    assert module.scale == 1.0


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear(bias):
    linears = [nn.Linear(8, n, bias=bias).eval() for n in (6, 2, 4)]
    x = torch.randn(5, 8)
    one = GatedLoRALinear.from_linear(linears[0])
    assert one.weight is linears[0].weight and one.bias is linears[0].bias and not one.training and one.rank == 0
    assert torch.equal(one(x), linears[0](x)) and set(one.state_dict()) == set(linears[0].state_dict())
    linears[1].requires_grad_(False)
    group = GatedLoRALinear.from_linear(linears, rank=2, alpha=6.0)
    assert group.splits == (6, 2, 4) and (group.rank, group.scale) == (2, 3.0) and group.weight.requires_grad
    torch.testing.assert_close(group(x, 0), torch.cat([each(x) for each in linears], dim=1))
    assert not GatedLoRALinear.from_linear([each.requires_grad_(False) for each in linears]).weight.requires_grad


def test_from_linear_refuses():
    class Quantised(nn.Linear):
        pass

    refused = {
        "Quantised": Quantised(8, 4), "no module": [], "RMSNorm": [nn.Linear(8, 4), RMSNorm(8)],
        "in_features": [nn.Linear(8, 4), nn.Linear(7, 4)], "bias": [nn.Linear(8, 4), nn.Linear(8, 4, bias=False)],
        "bfloat16": [nn.Linear(8, 4), nn.Linear(8, 4, dtype=torch.bfloat16)],
    }  # fmt: skip
    for match, linears in refused.items():
        with pytest.raises(ValueError, match=match):
            GatedLoRALinear.from_linear(linears)
    with pytest.raises(ValueError, match=r"\(12, 12, 10\) intermediate features"):
        SwiGLU.from_linear(nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(10, 8))


def mlp(rank=3, training=False, **options):
    torch.manual_seed(0)
    module = SwiGLU(8, 12, **options)
    module.add_adapter(rank, alpha=2.0 * rank)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 3)
    return module.train(training)


def test_swiglu_mlp():
    linears = [nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)]
    gate, up, down = linears
    module, x = SwiGLU.from_linear(*linears), torch.randn(5, 8)
    expected = down(F.silu(gate(x)) * up(x))
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x, residual=x), x + expected)
    module.add_adapter(2)
    names = {"gate_up_proj", "down_proj"}
    assert set(module.state_dict()) == {f"{name}.{part}" for name in names for part in ("weight", "bias", "lora_A", "lora_B")}
    with torch.no_grad():
        module.down_proj.lora_B.normal_()
    changed = (module(x, 3) != module(x)).any(1)
    assert changed.tolist() == [False] * 3 + [True] * 2
    module.remove_adapter()
    assert not [name for name in module.state_dict() if "lora" in name]


@pytest.mark.parametrize("backend, gate", [("eager", None), ("eager", 2), ("aot_eager", MIXED)], ids=str)
def test_compiles_whole(backend, gate):
    """Without a graph break, with and without gradients; another gate of the kind is no other result's."""
    module, x = mlp(), torch.randn(5, 8)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, gate), module(x, gate))
        if gate is not None:
            other = 4 if isinstance(gate, int) else ~gate
            torch.testing.assert_close(compiled(x, other), module(x, other))
    module.train()
    used = [p for n, p in module.named_parameters() if gate is not None or "lora" not in n]
    got, wanted = (torch.autograd.grad(f(x, gate, x).sum(), used) for f in (compiled, module))
    torch.testing.assert_close(got, wanted)
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["linear", "adapted", "mlp", "norm"])
def test_exported_for_any_number_of_rows(kind, strict):
    module = {"linear": GatedLoRALinear(8, (6, 2, 4)), "adapted": layer(), "mlp": SwiGLU(8, 12), "norm": RMSNorm(8)}[kind].eval()
    rows = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("sequence", min=2, max=64)}
    inputs = [(torch.randn(b, t, 8), *([torch.rand(b, t) < 0.5] if kind == "adapted" else [])) for b, t in ((2, 5), (3, 7))]
    exported = torch.export.export(module, inputs[0], dynamic_shapes=(rows,) * len(inputs[0]), strict=strict).module()
    for each in inputs:
        torch.testing.assert_close(exported(*each), module(*each))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_step_reaches_what_is_kept(fused):
    """A fused optimizer writes without raising torch's version counter; the model stays in evaluation mode all along."""
    module, x = layer().eval(), torch.randn(5, 8)
    optimizer = torch.optim.AdamW([module.lora_A, module.lora_B], lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            kept = module(x, 2)
        y = module(x, 2)
        torch.testing.assert_close(kept, y.detach())
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_reset_parameters():
    """As after `to_empty`: every value is drawn anew, and a fresh adapter adds nothing."""
    module, x = mlp(bias=True), torch.randn(5, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    for part in module.children():
        part.reset_parameters()
    norm = RMSNorm(8, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert torch.equal(module(x, 0), module(x)) and module(x).isfinite().all() and module.gate_up_proj.lora_A.std() > 0
    assert torch.equal(norm.weight, torch.ones(8)) and module.down_proj.out_features == 8


@pytest.mark.parametrize("gate", [None, 2, MIXED], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(gate, grad):
    module, x = layer(bias=True).eval(), torch.randn(5, 8)
    low = copy.deepcopy(module).bfloat16()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y = module(x, gate)
        assert y.dtype == F.linear(x, module.weight).dtype == torch.bfloat16
        summed = module(x, gate, residual=torch.full((5, 12), 1000.0))
    assert torch.equal(y, low(x.bfloat16(), gate))
    assert summed.dtype == torch.float32 and torch.equal(summed, 1000 + y.float())  # bfloat16 has steps of 4 up there
    if grad:
        y.float().square().sum().backward()
        assert module.weight.grad.dtype == torch.float32 and (module.lora_A.grad is not None) == (gate is not None)
    with pytest.raises(ValueError, match="one dtype"):
        module(x.bfloat16(), gate)


@torch.no_grad()
def test_norm_sampler_and_mlp_under_autocast():
    norm, head, block, x = RMSNorm(8), SamplerHead(8), mlp(), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x.bfloat16()), norm(x.bfloat16().float())) and norm(x.bfloat16(), x)[1].dtype == torch.float32
        got, sampled = block(norm(x), 2, residual=x), head(x, x.bfloat16())
    exact = copy.deepcopy(block).double()
    z, w = norm(x).double(), {n: p for n, p in exact.named_parameters()}
    both = z @ w["gate_up_proj.weight"].T
    a, b = w["gate_up_proj.lora_A"].view(2, 3, 8), w["gate_up_proj.lora_B"].view(2, 12, 3)
    both[2:] += 2 * torch.cat([z[2:] @ a[i].T @ b[i].T for i in range(2)], dim=1)
    hidden = F.silu(both[:, :12]) * both[:, 12:]
    out = hidden @ w["down_proj.weight"].T
    out[2:] += 2 * hidden[2:] @ w["down_proj.lora_A"].T @ w["down_proj.lora_B"].T
    eager = block.bfloat16()(z.bfloat16(), 2)
    assert_within_budget((got - x).bfloat16(), out, eager)
    torch.testing.assert_close(sampled.float(), head(x, x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gate", [2, MIXED], ids=str)
def test_activation_checkpointing(gate, reentrant):
    module, x = mlp(training=True), torch.randn(5, 8, requires_grad=True)
    parts = [x, *module.parameters()]
    module(x, gate).square().sum().backward()
    plain = [part.grad.clone() for part in parts]
    for part in parts:
        part.grad = None
    checkpoint(module, x, gate, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(part.grad, wanted) for part, wanted in zip(parts, plain, strict=True))


@torch.no_grad()
def test_copies_and_files():
    module, x = mlp(), torch.randn(5, 8)
    y = module(x, 2)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded, copied, other = torch.load(file, weights_only=False), copy.deepcopy(module), SwiGLU(8, 12).eval()
    other.add_adapter(3, alpha=6.0)
    other.load_state_dict(module.state_dict())
    module.down_proj.lora_B.zero_()
    for each in (loaded, copied, other):
        assert torch.equal(each(x, 2), y) and not torch.equal(module(x, 2), y)
    for dtype in (torch.bfloat16, torch.float16):
        each = copied.to(dtype)
        assert {p.dtype for p in each.parameters()} == {dtype} and each(x.to(dtype), 2).dtype == dtype
    with torch.device("meta"):
        shapes = mlp()
    assert shapes(x.to("meta"), 2).shape == x.shape == shapes.to_empty(device="cpu")(x, 2).shape


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of in-place writes to outputs, of which there are none here
def test_parameters_are_ordinary(tmp_path):
    """An optimizer and FSDP's sharding see plain parameters; a step with either gives the same."""
    module, x = mlp(training=True), torch.randn(5, 8)
    assert {type(p) for p in module.parameters()} == {nn.Parameter} and len(list(module.parameters())) == 6
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = copy.deepcopy(module)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for part in (sharded.gate_up_proj, sharded.down_proj, sharded):
            dist.fsdp.fully_shard(part, mesh=mesh)
        outputs = []
        for each in (module, sharded):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.001)
            for _ in range(2):
                each.train()(x, 2).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    outputs.append(each.eval()(x, 2).clone())
        torch.testing.assert_close(outputs[:2], outputs[2:])
        assert not torch.allclose(outputs[0], outputs[1])
    finally:
        dist.destroy_process_group()


def test_norm_and_sampler_are_their_operations():
    norm, head = RMSNorm(8, eps=1e-3), SamplerHead(8)
    x, e = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        norm.weight.normal_()
        y, total = norm(x, e)
        assert torch.equal(total, x + e) and torch.equal(y, ops.rms_norm(x + e, norm.weight, 1e-3))
        h = head.norm1(torch.nn.functional.silu(head.linear1(torch.cat([e, x], -1))))
        expected = head.norm2(torch.nn.functional.silu(head.linear2(h)))
        assert torch.allclose(head(e, x), expected, atol=1e-6)
    assert head(e, x).requires_grad


def test_sampler_drafts_from_candidates():
    head, z, table = SamplerHead(8), torch.randn(2, 3, 8), torch.randn(20, 8)
    first = torch.tensor([3, 4])
    for candidates in (None, 1, 4, 20):
        drafts = head.draft(z, first, table, table, candidates)
        assert torch.equal(drafts, ops.sampler_draft(z, first, table, head.weights(), table, candidates=candidates))
    assert torch.equal(drafts, head.draft(z, first, table, table))
    assert torch.equal(head.draft(z, first, table, table, 1), (z @ table.t()).argmax(-1))


def test_projections_that_are_not_targets_get_no_gradient():
    module = GatedLoRALinear(8, (4, 6, 2))
    module.add_adapter(3, targets=(True, False, True))
    module(torch.randn(5, 8), 0).square().sum().backward()
    assert [bool(part.any()) for part in module.lora_B.grad.split(module.splits)] == [True, False, True]


def test_swiglu_takes_no_residual():
    with pytest.raises(ValueError, match="residual and swiglu were both passed"):
        GatedLoRALinear(8, (4, 4))(torch.zeros(2, 8), residual=torch.zeros(2, 8), swiglu=True)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("name", ["rms_norm", "rms_norm with residual", "swiglu", "rotary_embedding", "gated_lora_linear", "linear_cross_entropy", "attention"])
def test_gradients_of_gradients_are_refused(name, implementation, device):
    """Instead of counted as zero."""
    pytest.importorskip("triton")
    with torch.device(device):
        refuse_gradients_of_gradients(name, implementation)


def refuse_gradients_of_gradients(name, implementation):
    from mtp_kernels import AttentionRule, ops

    x = torch.randn(3, 2, 2, 16).requires_grad_()
    flat, weight, zeros = x.view(12, 16), torch.randn(16), torch.zeros(3, 2, dtype=torch.int64)
    rule = AttentionRule(zeros + 2, zeros[:, 0] - 1, zeros[:, 0], zeros[0], 0, 2)
    y = {
        "rms_norm": lambda: ops.rms_norm(flat, weight, implementation=implementation),
        "rms_norm with residual": lambda: ops.rms_norm(flat, weight, residual=torch.randn(12, 16), implementation=implementation)[0],
        "swiglu": lambda: ops.swiglu(flat, implementation=implementation),
        "rotary_embedding": lambda: ops.rotary_embedding(x, *torch.randn(2, 3, 2, 16), implementation=implementation),
        "gated_lora_linear": lambda: ops.gated_lora_linear(flat, torch.randn(8, 16), torch.randn(4, 16), torch.randn(8, 4), 5, implementation=implementation),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(flat, torch.randn(9, 16), torch.arange(12) % 9, implementation=implementation)[0],
        "attention": lambda: ops.attention(x, torch.randn(2, 2, 2, 16), torch.randn(2, 2, 2, 16), rule, implementation=implementation),
    }[name]()
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    if gradient.requires_grad:
        try:
            (second,) = torch.autograd.grad(gradient.square().sum(), x)
        except RuntimeError:
            return
        assert implementation == "reference" and second.any()  # plain operations, which can be differentiated any number of times
