"""The memories of a launch, and what a GPU would not forgive: bounds, alignment, and shared memory without a barrier between two warps."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

BASE = 1 << 40  # where the addresses of global memory begin
GUARD = 4096  # bytes between two storages
TRACKED_BYTES = 2**24  # of a storage; larger ones are held to their bounds alone
HALF = 2  # bytes of shared memory that are watched as one
NEVER = -1


class MemoryFault(Exception):
    """An access that goes wrong on a GPU, or whose result it would leave to chance."""


def _elements(data: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
    """(n, size) bytes from `first` on."""
    return data[first[:, None] + np.arange(size)]


@dataclass
class Accesses:
    """Loads or stores of one instruction: the first bytes, how many, and of which program, warp and epoch (barriers before it)."""

    first: np.ndarray
    size: int
    program: np.ndarray
    warp: np.ndarray
    epoch: np.ndarray

    def spread(self, grain: int) -> tuple[np.ndarray, ...]:
        """(grain, program, warp, epoch) of every piece of `grain` bytes."""
        count = self.size // grain
        places = (self.first[:, None] // grain + np.arange(count)).reshape(-1)
        return places, *(np.repeat(x, count) for x in (self.program, self.warp, self.epoch))


class GlobalMemory:
    """A copy of the storages of a launch's tensors at addresses of its own, each with its alignment up to 256 bytes.

    Who touched the storages of up to TRACKED_BYTES is kept, for `conflicts`.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.storages, end = {}, GUARD
        self.loads: list[Accesses] = []
        self.stores: list[Accesses] = []
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.storages:
                begin = -(-end // 256) * 256 + storage.data_ptr() % 256
                self.storages[storage.data_ptr()] = [begin, storage, []]
                end = begin + storage.nbytes() + GUARD
            self.storages[storage.data_ptr()][2].append(name)
        self.data, self.given, self.tracked = np.zeros(end, np.uint8), np.zeros(end, bool), np.zeros(end, bool)
        for begin, storage, _ in self.storages.values():
            ctypes.memmove(self.data.ctypes.data + begin, storage.data_ptr(), storage.nbytes())
            self.given[begin : begin + storage.nbytes()] = True
            self.tracked[begin : begin + storage.nbytes()] = storage.nbytes() <= TRACKED_BYTES

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return BASE + self.storages[storage][0] + tensor.storage_offset() * tensor.element_size()

    def give_back(self) -> None:
        """What the kernel stored, into the tensors."""
        for begin, storage, _ in self.storages.values():
            ctypes.memmove(storage.data_ptr(), self.data.ctypes.data + begin, storage.nbytes())

    def _first(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = addresses.view(np.int64) - BASE
        outside = (first < 0) | (first + size > self.data.size)
        if outside.any() or not (self.given[first] & self.given[first + size - 1]).all():
            places = ", ".join(f"{'/'.join(names)} at {BASE + begin:#x} of {s.nbytes()} bytes" for begin, s, names in self.storages.values())
            bad = addresses[outside] if outside.any() else addresses[~(self.given[first] & self.given[first + size - 1])]
            raise MemoryFault(f"{size} bytes at {int(bad[0]):#x} lie outside the tensors of the launch: {places}")
        if (first % size).any():
            raise MemoryFault(f"{size} bytes at {int(addresses[first % size > 0][0]):#x}, which is no multiple of {size}")
        return first

    def _keep(self, kept: list[Accesses], first: np.ndarray, size: int, who: tuple[np.ndarray, ...]) -> None:
        tracked = self.tracked[first]
        if tracked.any():
            kept.append(Accesses(first[tracked], size, *(x[tracked].astype(np.int32) for x in who)))

    def load(self, addresses: np.ndarray, size: int, who: tuple[np.ndarray, ...]) -> np.ndarray:
        """who: (program, warp, epoch) of each thread."""
        first = self._first(addresses, size)
        self._keep(self.loads, first, size, who)
        return _elements(self.data, first, size)

    def store(self, addresses: np.ndarray, values: np.ndarray, who: tuple[np.ndarray, ...]) -> None:
        first = self._first(addresses, values.shape[1])
        self._keep(self.stores, first, values.shape[1], who)
        where = first[:, None] + np.arange(values.shape[1])
        self.data[where] = values
        self._refuse((self.data[where] != values).any(1), "two threads store different values to", first)

    def conflicts(self) -> None:
        """Refuse what programs, or the warps of one without a barrier between them, stored where others loaded or stored."""
        if not self.stores:
            return
        grain = min(x.size for x in (*self.stores, *self.loads))
        place, program, warp, epoch = (np.concatenate(x) for x in zip(*(x.spread(grain) for x in self.stores), strict=True))
        storing = np.full(self.data.size // grain + 1, -1, np.int32)
        storing[place] = program
        self._refuse(storing[place] != program, "two programs store to", place * grain)
        place, inverse = np.unique(place.astype(np.int64) << 32 | epoch, return_inverse=True)
        warps = np.zeros(len(place), np.int64)  # those that store to a place in an epoch, a bit each
        np.bitwise_or.at(warps, inverse, 1 << warp.astype(np.int64))
        self._refuse((warps & warps - 1) > 0, "two warps store, without a barrier between them, to", (place >> 32) * grain)
        for accesses in self.loads:
            loaded, program, warp, epoch = accesses.spread(grain)
            stored = storing[loaded] >= 0
            if not stored.any():
                continue
            loaded, program, warp, epoch = (x[stored] for x in (loaded, program, warp, epoch))
            self._refuse(storing[loaded] != program, "a program stores what another loads,", loaded * grain)
            key = loaded.astype(np.int64) << 32 | epoch
            at = np.minimum(np.searchsorted(place, key), len(place) - 1)
            others = np.where(place[at] == key, warps[at], 0) & ~(1 << warp.astype(np.int64))
            self._refuse(others > 0, "a warp stores, without a barrier between them, what another loads,", loaded * grain)

    def _refuse(self, bad: np.ndarray, what: str, places: np.ndarray) -> None:
        if bad.any():
            place = int(places[bad][0])
            begin, _, names = max((s for s in self.storages.values() if s[0] <= place), key=lambda s: s[0])
            raise MemoryFault(f"{what} byte {place - begin} of {'/'.join(names)}")


class SharedMemory:
    """The shared memory of several programs (CTAs), of `size` bytes each, and who touched it since the newest barrier.

    lanes are numbers of threads over all the programs. Copies in flight (cp.async) may be touched by nobody; what a matrix instruction
    (wgmma) still reads may not be overwritten; what was stored in the ordinary way must be fenced before that instruction reads it.
    """

    def __init__(self, programs: int, threads: int, size: int):
        self.size = -(-size // 1024) * 1024 or 1024
        self.limit, self.threads, self.warps = size, threads, threads // 32
        self.data = np.full(programs * self.size, 0xFF, np.uint8)  # NaN in every dtype
        halves = self.data.size // HALF
        self.stored, self.loaded = (np.full((halves, self.warps), NEVER, np.int32) for _ in range(2))  # epoch of each warp's newest
        self.arriving, self.reading = np.zeros(halves, np.int16), np.zeros(halves, np.int16)
        self.unfenced = np.zeros(halves, np.int32)  # who stored it, plus one
        self.epoch = np.zeros(programs, np.int32)  # barriers so far
        self.groups = np.zeros(programs * threads, np.int32)  # of copies, closed so far by each thread
        self.copies: list[tuple] = []
        self.products: list[tuple] = []
        self.product_groups = np.zeros(programs * threads, np.int32)

    def _first(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses < 0).any() or (addresses + size > self.limit).any():
            raise MemoryFault(f"shared memory at {int(addresses.max())} of {self.limit} bytes")
        if (addresses % size).any():
            raise MemoryFault(f"{size} bytes of shared memory at {int(addresses[addresses % size > 0][0])}, which is no multiple of {size}")
        return lanes // self.threads * self.size + addresses

    def _watched(self, first: np.ndarray, size: int) -> np.ndarray:
        return first[:, None] // HALF + np.arange(-(-size // HALF))

    def _others(self, table: np.ndarray, halves: np.ndarray, lanes: np.ndarray) -> bool:
        """Whether another warp is in `table` since the newest barrier."""
        seen = table[halves] == self.epoch[lanes // self.threads][:, None, None]
        seen[np.arange(len(lanes)), :, lanes % self.threads // 32] = False
        return bool(seen.any())

    def _mark(self, table: np.ndarray, halves: np.ndarray, lanes: np.ndarray) -> None:
        table[halves, (lanes % self.threads // 32)[:, None]] = self.epoch[lanes // self.threads][:, None]

    def _before_store(self, halves: np.ndarray, lanes: np.ndarray) -> None:
        if self.arriving[halves].any():
            raise MemoryFault("a store to shared memory into which a copy is in flight")
        if self.reading[halves].any():
            raise MemoryFault("a store to shared memory that a matrix instruction may still read")
        if self._others(self.loaded, halves, lanes):
            raise MemoryFault("a store to shared memory that another warp has loaded since the newest barrier")
        if self._others(self.stored, halves, lanes):
            raise MemoryFault("a store to shared memory that another warp has stored to since the newest barrier")

    def load(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        first = self._first(lanes, addresses, size)
        halves = self._watched(first, size)
        if self.arriving[halves].any():
            raise MemoryFault("a load of shared memory into which a copy is in flight")
        if self._others(self.stored, halves, lanes):
            raise MemoryFault("a load of shared memory that another warp has stored to since the newest barrier")
        self._mark(self.loaded, halves, lanes)
        return _elements(self.data, first, size)

    def store(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        size = values.shape[1]
        first = self._first(lanes, addresses, size)
        halves = self._watched(first, size)
        self._before_store(halves, lanes)
        self._mark(self.stored, halves, lanes)
        self.unfenced[halves] = lanes[:, None] + 1
        where = first[:, None] + np.arange(size)
        self.data[where] = values
        bad = (self.data[where] != values).any(1)
        if bad.any():
            place = int(addresses[bad][0])
            raise MemoryFault(f"two threads store different values to one place of shared memory: {values[bad][0]} is not kept at {place}")

    def barrier(self, programs: np.ndarray) -> None:
        self.epoch[programs] += 1

    def copy(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Begin a copy: its bytes are there when its threads have waited for its group."""
        first = self._first(lanes, addresses, values.shape[1])
        halves = self._watched(first, values.shape[1])
        self._before_store(halves, lanes)
        if len(np.unique(first)) < len(first):
            raise MemoryFault("two threads copy to one place of shared memory")
        self.arriving[halves] += 1
        self.unfenced[halves] = 0  # Triton before 3.7 has no fence behind copies, and no GPU is known to need one
        self.copies.append((lanes, first, values, self.groups[lanes]))

    def commit_copies(self, lanes: np.ndarray) -> None:
        self.groups[lanes] += 1

    def wait_copies(self, lanes: np.ndarray, newest: int | None) -> None:
        """Of each of `lanes`, all groups but the `newest` have arrived; None: whatever was begun."""
        waiting, self.copies = self.copies, []
        here = np.zeros(len(self.groups), bool)
        here[lanes] = True
        for owners, first, values, group in waiting:
            done = here[owners] if newest is None else here[owners] & (group < self.groups[owners] - newest)
            if done.any():
                halves = self._watched(first[done], values.shape[1])
                self.arriving[halves] -= 1
                self.data[first[done][:, None] + np.arange(values.shape[1])] = values[done]
                self._mark(self.stored, halves, owners[done])
            if not done.all():
                self.copies.append((owners[~done], first[~done], values[~done], group[~done]))

    def fence(self, lanes: np.ndarray) -> None:
        """What these threads stored may be read by matrix instructions."""
        here = np.zeros(len(self.groups) + 1, bool)
        here[lanes + 1] = True
        self.unfenced[here[self.unfenced]] = 0

    def read_by_product(self, leader: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """(n, m) 16-bit elements at `addresses` (n, m), read by the warpgroups whose first threads are `leader` (n)."""
        if (addresses < 0).any() or (addresses + HALF > self.limit).any():
            raise MemoryFault(f"a matrix instruction reads shared memory at {int(addresses.max())} of {self.limit} bytes")
        halves = (leader[:, None] // self.threads * self.size + addresses) // HALF
        flat = halves.reshape(-1)
        if self.arriving[flat].any():
            raise MemoryFault("a matrix instruction reads shared memory into which a copy is in flight")
        if self.unfenced[flat].any():
            raise MemoryFault("a matrix instruction reads shared memory that was stored to without a fence")
        if (self.stored[halves] == self.epoch[leader // self.threads][:, None, None]).any():  # by one of the instruction's four warps, or another
            raise MemoryFault("a matrix instruction reads shared memory that was stored to since the newest barrier")
        np.add.at(self.reading, flat, 1)
        self.products.append((leader, halves, self.product_groups[leader]))
        return self.data.view(np.uint16)[halves]

    def commit_products(self, lanes: np.ndarray) -> None:
        self.product_groups[lanes] += 1

    def wait_products(self, lanes: np.ndarray, newest: int) -> None:
        waiting, self.products = self.products, []
        here = np.zeros(len(self.groups), bool)
        here[lanes] = True
        for leader, halves, group in waiting:
            done = here[leader] & (group < self.product_groups[leader] - newest)
            if done.any():
                np.subtract.at(self.reading, halves[done].reshape(-1), 1)
                for warp in range(4):
                    self._mark(self.loaded, halves[done], leader[done] + 32 * warp)
            if not done.all():
                self.products.append((leader[~done], halves[~done], group[~done]))
