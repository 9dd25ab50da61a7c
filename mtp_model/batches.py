"""Which examples make which batch: a function of the examples' lengths, the settings and the batch's number.

Nothing is remembered from batch to batch, so a run goes on anywhere. Batches are consecutive pieces of a stream of epochs, each in an
order of its own; one may straddle two epochs. Two options save padding: several examples in one sequence (packing), and
sequences of like length in one batch (buckets).
"""

import numpy as np

WINDOW = 50  # batches that are sorted by length together: enough for like lengths, few enough to leave the order random


def pack(lengths: np.ndarray, limit: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples of the given lengths, (n,) int64, to sequences of at most `limit` tokens, by best fit, longest first.

    Returns (members, offsets): sequence s holds the examples members[offsets[s]:offsets[s + 1]]. Equal lengths come in an order
    drawn from `seed`. Raises ValueError for an example longer than `limit`.
    """
    if lengths.max() > limit:
        raise ValueError(f"example {lengths.argmax()} has {lengths.max()} tokens; accepted are {limit} (pack_length) or fewer: max_length cuts longer ones")
    order = np.random.default_rng([seed, 0, 1]).permutation(len(lengths))  # [seed, epoch] draws the epochs' orders
    order = order[np.argsort(-lengths[order], kind="stable")]
    # Sequences by the room that is left in them, and the rooms that occur as the bits of one integer: its lowest bit from `length`
    # up is the tightest fit, found in a few machine words.
    open_by_room: list[list[int]] = [[] for _ in range(limit + 1)]
    rooms, count, chosen = 0, 0, []
    for length in lengths[order].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence, count = limit, count, count + 1
        chosen.append(sequence)
        open_by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    chosen = np.array(chosen)
    return order[np.argsort(chosen, kind="stable")], np.concatenate(([0], np.cumsum(np.bincount(chosen))))


class Batches:
    """Batch number -> its sequences, each a list of example indices (one unless packed).

    lengths: (n,) of the examples. pack_length: put examples together into sequences of at most that many tokens, the same ones in
    every epoch. buckets: batches of sequences of like length. Every example comes exactly once per epoch.

    Raises ValueError for settings out of range, and for an example longer than `pack_length`.
    """

    def __init__(self, lengths, batch_size: int, seed: int, *, pack_length: int | None = None, buckets: bool = False):
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.ndim != 1 or not len(lengths):
            raise ValueError(f"lengths have shape {lengths.shape}; accepted is (n,) with n 1 or more")
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("pack_length", pack_length, 3)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; accepted is {least} or more")
        self.batch_size, self.seed, self.buckets = batch_size, seed, buckets
        self._members, self._offsets = (np.arange(len(lengths)), np.arange(len(lengths) + 1)) if pack_length is None else pack(lengths, pack_length, seed)
        self._lengths = np.add.reduceat(lengths[self._members], self._offsets[:-1])
        self._epoch, self._order = -1, None

    @property
    def sequences(self) -> int:
        """How many sequences an epoch has."""
        return len(self._lengths)

    @property
    def efficiency(self) -> float:
        """Which share of the first epoch's batches, each padded to its longest sequence, are tokens."""
        lengths = self._lengths[self._epoch_order(0)]
        starts = np.arange(0, len(lengths), self.batch_size)
        sizes = np.diff(starts, append=len(lengths))
        return float(lengths.sum() / (np.maximum.reduceat(lengths, starts) * sizes).sum())

    def __call__(self, number: int) -> list[list[int]]:
        """The sequences of batch `number`, from 0: `batch_size` lists of example indices. Raises ValueError if it is negative."""
        if number < 0:
            raise ValueError(f"number is {number}; accepted is 0 or more")
        picked, position, end = [], number * self.batch_size, (number + 1) * self.batch_size
        while position < end:
            epoch, offset = divmod(position, self.sequences)
            part = self._epoch_order(epoch)[offset : offset + end - position]
            picked += [self._members[self._offsets[s] : self._offsets[s + 1]].tolist() for s in part]
            position += len(part)
        return picked

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The sequences in the order of an epoch; the last one asked for is kept."""
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(self.sequences)
            self._epoch, self._order = epoch, self._bucketed(order, epoch, random) if self.buckets else order
        return self._order

    def _bucketed(self, order: np.ndarray, epoch: int, random: np.random.Generator) -> np.ndarray:
        """A shuffled epoch with its whole batches made of like lengths. What shares a batch with another epoch stays as it is."""
        size = self.batch_size
        head = min(-epoch * self.sequences % size, self.sequences)
        whole = (self.sequences - head) // size * size
        parts = [order[:head]]
        for start in range(head, head + whole, WINDOW * size):
            window = order[start : min(start + WINDOW * size, head + whole)]
            by_length = window[np.argsort(self._lengths[window], kind="stable")]
            parts.append(random.permutation(by_length.reshape(-1, size)).ravel())
        return np.concatenate([*parts, order[head + whole :]])
