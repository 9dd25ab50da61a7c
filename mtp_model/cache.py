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

ALIGNMENT = 256  # columns; whole pieces, so that attention in pieces of this many never needs a padded copy


class KVCache:
    """Keys and values of `batch` sequences, up to `capacity` columns each (stored are `columns`); `lengths[b]` of them are committed."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device=None, dtype: torch.dtype = torch.float32):
        columns = -(-capacity // ALIGNMENT) * ALIGNMENT
        # Stored by column, (S, B, H_kv, D), as a pass's rows come, so that writing them is one copy.
        # Zeros, not empty memory: a column that a row may not attend still enters a product with probability 0, and 0 * NaN is NaN.
        shape = (config.num_hidden_layers, columns, batch, config.num_key_value_heads, config.head_dim)
        self._keys, self._values = (list(torch.zeros(shape, device=device, dtype=dtype)) for _ in range(2))
        self.keys, self.values = ([x.permute(1, 2, 0, 3) for x in stored] for stored in (self._keys, self._values))
        self.capacity, self.columns = capacity, columns
        self.lengths = [0] * batch

    def update(self, layer: int, k: Tensor, v: Tensor, start: tuple[int, ...], keep: bool = True) -> tuple[Tensor, Tensor]:
        """Put a pass's K/V, (T, B, H_kv, D) each, at columns start[b].. and return the layer's (B, H_kv, S, D) pair. As with `rotary_write`, what
        is not finite is kept as zero, so that a token that overflows float16 is nothing to rows that may not attend it.

        Rows that are not to be kept (masks alone, in training) or that require gradients are appended to a copy of the
        committed part instead, which must have the same length in every sequence.
        """
        rows, n = k.shape[0], start[0]
        keys, values = self._keys[layer], self._values[layer]
        if not keep or k.requires_grad:
            return torch.cat([keys[:n], k]).permute(1, 2, 0, 3), torch.cat([values[:n], v]).permute(1, 2, 0, 3)
        if min(start) < 0 or max(start) + rows > self.capacity:
            raise ValueError(f"columns {min(start)} to {max(start) + rows - 1} are asked for; the cache has {self.capacity}, from 0")
        for stored, x in ((keys, k), (values, v)):
            if start.count(n) == len(start):
                torch.nan_to_num(x, 0.0, 0.0, 0.0, out=stored[n : n + rows])
            else:
                for b, first in enumerate(start):
                    torch.nan_to_num(x[:, b], 0.0, 0.0, 0.0, out=stored[first : first + rows, b])
        return self.keys[layer], self.values[layer]

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values by column, (S, B, H_kv, D) each, as `mtp_kernels.rotary_write` fills them."""
        return self._keys[layer], self._values[layer]

    @property
    def bytes(self) -> int:
        """That its keys and values take."""
        return sum(x.numel() * x.element_size() for x in (*self._keys, *self._values))

    def commit(self, counts: list[int]) -> None:
        """Add counts[b] tokens to each sequence. Raises ValueError for counts that are negative or more than the cache holds."""
        lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        if min(counts) < 0 or max(lengths) > self.capacity:
            raise ValueError(f"counts are {counts} after {self.lengths}; accepted are 0 or more, up to the cache's {self.capacity} columns")
        self.lengths = lengths
