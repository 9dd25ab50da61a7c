"""The cache's worked example, step by step, and its refusal to overflow."""

import pytest
import torch

from mtp_model.cache import KVCache
from mtp_model.config import ModelConfig

CONFIG = ModelConfig(6, 8, 8, 2, 2, 1, 4)


def named(*values):
    """Keys of rows, (T, 1, 1, 4), each filled with one number."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 1, 4)


def columns(cache, layer=0, b=0):
    assert torch.equal(cache.values[layer], -cache.keys[layer])
    return cache.keys[layer][b, 0, : cache.capacity, 0].tolist()


@pytest.mark.parametrize("right, committed, row", [(True, 2, 5), (False, 1, 4)])
def test_worked_example(right, committed, row):
    """Three tokens 1 2 3, then t = 4, d1 = 5 with a mask after each (8, 9); the next step writes 6."""
    cache = KVCache(CONFIG, 1, 10)
    cache.update(0, named(1, 2, 3), -named(1, 2, 3), (0,))
    cache.commit([3])
    keys, values = cache.update(0, named(4, 5, 8, 9), -named(4, 5, 8, 9), (3,))
    assert keys[0, 0, :10, 0].tolist() == [1, 2, 3, 4, 5, 8, 9, 0, 0, 0] and torch.equal(values, -keys)
    cache.commit([committed])
    assert cache.lengths == [row]
    cache.update(0, named(6), -named(6), tuple(cache.lengths))
    expected = [1, 2, 3, 4, 5, 6, 9] if right else [1, 2, 3, 4, 6, 8, 9]
    assert columns(cache) == [*expected, 0, 0, 0]
    assert not cache.keys[1].any()


@pytest.mark.parametrize("start", [(0, 0), (1, 0)])
def test_what_is_not_finite_is_kept_as_zero(start):
    cache = KVCache(CONFIG, 2, 4)
    k, v = torch.ones(2, 2, 1, 4), torch.full((2, 2, 1, 4), 2.0)
    k[0, 1], v[1, 0, 0, 2], v[1, 1, 0, 3] = torch.nan, torch.inf, -torch.inf
    keys, values = cache.update(0, k, v, start)
    for b, n in enumerate(start):
        for stored, x in ((keys, k), (values, v)):
            assert torch.equal(stored[b, 0, n : n + 2], torch.where(x.isfinite(), x, 0)[:, b, 0]) and not stored[b, 0, n + 2 :].any()


def test_different_starts():
    cache = KVCache(CONFIG, 2, 6)
    rows = named(1, 2).expand(-1, 2, -1, -1) * torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    cache.update(1, rows, -rows, (3, 1))
    assert columns(cache, 1, 0) == [0, 0, 0, 1, 2, 0]
    assert columns(cache, 1, 1) == [0, 10, 20, 0, 0, 0]
    cache.commit([2, 0])
    cache.commit([1, 4])
    assert cache.lengths == [3, 4]


def test_capacity():
    cache = KVCache(CONFIG, 2, 6)
    assert cache.capacity == 6 and cache.bytes == 2 * KVCache(CONFIG, 2, 6, dtype=torch.bfloat16).bytes
    rows = torch.ones(3, 2, 1, 4)
    cache.update(0, rows, -rows, (3, 0))
    with pytest.raises(ValueError, match="columns 0 to 6 are asked for; the cache has 6"):
        cache.update(0, rows, -rows, (0, 4))
    assert columns(cache, 0, 1) == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError):
        cache.commit([1])
    cache.commit([6, 2])  # full
    for counts in ([1, 0], [0, -1]):
        with pytest.raises(ValueError, match="accepted are 0 or more, up to the cache's 6 columns"):
            cache.commit(counts)
    assert cache.lengths == [6, 2]


def test_rows_with_gradients_are_not_kept():
    cache = KVCache(CONFIG, 1, 3)
    cache.update(0, named(1, 2, 3), -named(1, 2, 3), (0,))
    masks = named(7, 8).clone().requires_grad_()
    keys, values = cache.update(0, masks, -masks, (3,))
    assert keys[0, 0, :, 0].tolist() == [1, 2, 3, 7, 8] and torch.equal(values, -keys)
    keys.sum().backward()
    assert bool((masks.grad == 1).all())
    assert columns(cache) == [1, 2, 3]
