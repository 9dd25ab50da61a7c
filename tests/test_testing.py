"""The guards that the kernels' tests rely on can fail."""

from types import ModuleType

import pytest
import torch

from mtp_kernels.testing import GUARD, guarded, guarded_outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_a_write_beside_a_guarded_tensor_shows(dtype):
    for offset in (-1, 6, GUARD):
        tensor, check = guarded((2, 3), dtype)
        assert tensor.shape == (2, 3) and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        assert tensor.isnan().all() if dtype.is_floating_point else (tensor == tensor[0, 0]).all()
        tensor.fill_(0)
        check()
        tensor.as_strided((1,), (1,), tensor.storage_offset() + offset).fill_(0)
        with pytest.raises(AssertionError, match="was written"):
            check()


def test_guarded_outputs():
    module = ModuleType("kernels")
    exec("import torch\ndef make(x): return torch.empty((2, 5), dtype=x.dtype, device=x.device), torch.empty_like(x)", module.__dict__)
    x = torch.zeros(3, 4).t()
    with guarded_outputs(module):
        a, b = module.make(x)
        assert a.shape == (2, 5) and b.stride() == x.stride() and a.isnan().all() and b.isnan().all()
    assert module.torch is torch
    with pytest.raises(AssertionError, match="after a tensor"), guarded_outputs(module):
        module.make(x)[1].as_strided((13,), (1,)).zero_()
    with pytest.raises(AssertionError, match="no output"), guarded_outputs(module):
        pass
