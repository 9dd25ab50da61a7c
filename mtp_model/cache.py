"""The K/V cache: rows are written right behind the committed tokens, and committing is adding to a length.

Example, one sequence, n = 3 committed tokens, quadratic step with k = 1 (rows t, d1, one mask after each):

    column    0  1  2 | 3  4  | 5  6 | 7 ...
    holds     x0 x1 x2| t  d1 | m  m | free        after write()
    d1 right  x0 x1 x2  t  d1 | the next step writes here            commit 2: n = 5
    d1 wrong  x0 x1 x2  t | the next step writes here                commit 1: n = 4

Nothing is copied: the accepted prefix already stands where it belongs, and what follows it is overwritten.
"""

import torch
from torch import Tensor

from mtp_model.config import ModelConfig

_ALIGNMENT = 256  # columns; whole pieces, so that attention in pieces of this many never needs a padded copy


class KVCache:
    """Keys and values of `batch` sequences, up to `capacity` columns each; `lengths[b]` of them are committed."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device=None, dtype: torch.dtype = torch.float32):
        columns = -(-capacity // _ALIGNMENT) * _ALIGNMENT
        shape = (batch, config.num_key_value_heads, columns, config.head_dim)
        # Zeros, not empty memory: a column nobody may attend still enters a product with probability 0, and 0 * NaN is NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
        self.lengths = [0] * batch

    def update(self, layer: int, k: Tensor, v: Tensor, start: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Put a pass's K/V, (T, B, H_kv, D) each, at columns start[b].. and return the layer's (B, H_kv, S, D) pair.

        Rows that require gradients (masks in training) are appended to a copy of the committed part instead, which the
        cache does not keep.
        """
        if max(start) + k.shape[0] > self.capacity and not k.requires_grad:
            raise ValueError(f"{max(start) + k.shape[0]} columns are needed; the cache has {self.capacity}")
        k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
        keys, values = self.keys[layer], self.values[layer]
        if k.requires_grad:
            n = start[0]  # training starts every sequence's masks at the same column
            return torch.cat([keys[:, :, :n], k], dim=2), torch.cat([values[:, :, :n], v], dim=2)
        rows = k.shape[2]
        if start.count(start[0]) == len(start):
            keys[:, :, start[0] : start[0] + rows] = k
            values[:, :, start[0] : start[0] + rows] = v
        else:
            for b, n in enumerate(start):
                keys[b, :, n : n + rows] = k[b]
                values[b, :, n : n + rows] = v[b]
        return keys, values

    def commit(self, counts: list[int]) -> None:
        """Add counts[b] tokens to each sequence."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
