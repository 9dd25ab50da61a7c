"""Modules: each is its operation on its own weights, adapters come and go, and nothing stale is kept."""

import pytest
import torch

from mtp_kernels import ops
from mtp_kernels.nn import GatedLoRALinear, RMSNorm, SamplerHead


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


def test_changed_adapters_are_seen():
    module, x = layer(), torch.randn(4, 8)
    with torch.no_grad():
        before = module(x, 0)
        module.lora_B.mul_(2)
        after = module(x, 0)
        module.lora_A.mul_(0.5)
        assert torch.allclose(module(x, 0), before, atol=1e-5) and not torch.allclose(after, before, atol=1e-2)
        module.lora_B.data = torch.zeros_like(module.lora_B)
        assert torch.equal(module(x, 0), module(x))
        assert module(x.bfloat16().float(), 0).dtype == torch.float32


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
