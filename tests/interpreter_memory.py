"""Checks what Triton's interpreter cannot show by itself: it runs programs one after the other, and reads whatever lies at an address.

On a GPU the programs of a launch run at once, in no order, and so do the threads of one program between barriers. Patched, a launch is refused for

- an access outside the elements of the tensors that the launch was given, even where the address is mapped;
- a store of several values to one element;
- a store to what another program of the launch loads or stores;
- a load of what its own program stored: without a barrier another thread may load first;
- a store to what its own program loaded or stored by another access: without a barrier another thread may not have done so yet. (An update in
  place, stored where it was loaded, element by element, is one thread's, if there are as many elements as threads: of fewer, several threads
  have a copy each.)
- an atomic access, for there are none here.

The rules of one program do not matter to one of one warp, which does one thing after the other. A reduction is not taken for a barrier, though it
has one where it goes across warps. Storages above TRACKED_BYTES are held to their bounds alone.
"""

import inspect
from collections.abc import Iterator

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

TRACKED_BYTES = 2**26
NONE, MANY = -1, -2  # who touched an element: no program, several of them, or the program's number


class AccessError(Exception):
    """An access that goes wrong on a GPU, or whose result it would leave to chance."""


class _Storage:
    """One storage of the launch's tensors: which of its bytes begin an element of theirs, and who touched those."""

    def __init__(self, storage: torch.UntypedStorage):
        self.begin, size = storage.data_ptr(), storage.nbytes()
        self.end, self.names = self.begin + size, []
        self.tracked = size <= TRACKED_BYTES
        if self.tracked:
            self.given, self.otherwise = (np.zeros(size, bool) for _ in range(2))  # otherwise: loaded by its reader in more than one way
            self.reader, self.writer = (np.full(size, NONE, np.int32) for _ in range(2))
            self.loaded, self.stored = (np.zeros(size, np.int32) for _ in range(2))  # the number of the newest access

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.names.append(name)
        if self.tracked:
            strides = [stride * tensor.element_size() for stride in tensor.stride()]
            torch.from_numpy(self.given).as_strided(tensor.shape, strides, tensor.data_ptr() - self.begin).fill_(True)

    def __str__(self) -> str:
        return ", ".join(self.names)


def _way(pointers: np.ndarray) -> tuple | int:
    """The same for accesses by the same pointers, element by element."""
    return pointers.shape, hash(pointers.tobytes())


class _Launch:
    """The accesses of one launch."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor], warps: int):
        self.kernel, self.warps, self.storages = kernel, warps, {}
        for name, tensor in tensors.items():
            if tensor.numel():
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage.data_ptr(), _Storage(storage)).add(name, tensor)
        self.accesses, self.before = 0, 0  # how many there were, and how many before the newest barrier
        self.ways = [0]  # of the accesses by their number

    def _program(self) -> int:
        builder = interpreter.interpreter_builder
        (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        return (x * ny + y) * nz + z

    def _refuse(self, what: str, where: object, bad: np.ndarray) -> None:
        if bad.any():
            grid = interpreter.interpreter_builder.grid_idx
            raise AccessError(f"{self.kernel}, program {tuple(grid)}: {what} ({where}; {int(bad.sum())} of {bad.size} elements)")

    def _touched(self, what: str, pointers: np.ndarray, mask: np.ndarray) -> Iterator[tuple[_Storage, np.ndarray]]:
        """Each tracked storage of an access, and the bytes of it that are touched."""
        pointers, mask = np.broadcast_arrays(pointers, mask.astype(bool))
        rest = pointers[mask].astype(np.int64)
        self.accesses += 1
        self.ways.append(_way(pointers) if pointers.size >= 32 * self.warps else -self.accesses)
        for storage in self.storages.values():
            inside = (storage.begin <= rest) & (rest < storage.end)
            at, rest = rest[inside] - storage.begin, rest[~inside]
            if storage.tracked and at.size:
                self._refuse(f"{what} outside the tensors", storage, ~storage.given[at])
                yield storage, at
        near = "; ".join(f"{rest.min() - s.begin} of the {s.end - s.begin} bytes of {s}" for s in self.storages.values()) if rest.size else ""
        self._refuse(f"{what} outside the tensors", near, np.ones(rest.shape, bool))

    def _loaded_otherwise(self, storage: _Storage, at: np.ndarray, program: int) -> np.ndarray:
        """Which elements this program has loaded since its barrier by other pointers than this access's."""
        mine = (storage.reader[at] == program) & (storage.loaded[at] > self.before)
        return mine & (storage.otherwise[at] | self._another_way(storage.loaded[at], mine))

    def _another_way(self, accesses: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Which of the accesses, by their numbers, were by other pointers than the newest."""
        return which & np.isin(accesses, [number for number in np.unique(accesses[which]) if self.ways[number] != self.ways[-1]])

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        program = self._program()
        for storage, at in self._touched("load", pointers, mask):
            writer, reader = storage.writer[at], storage.reader[at]
            self._refuse("load of what another program stores", storage, (writer != NONE) & (writer != program))
            if self.warps > 1:
                self._refuse("load of what this program stored, without a barrier", storage, (writer == program) & (storage.stored[at] > self.before))
                storage.otherwise[at] = self._loaded_otherwise(storage, at, program)
                storage.loaded[at] = self.accesses
            storage.reader[at] = np.where((reader == NONE) | (reader == program), program, MANY)

    def store(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        program = self._program()
        for storage, at in self._touched("store", pointers, mask):
            writer, reader = storage.writer[at], storage.reader[at]
            self._refuse("store of several values to one element", storage, np.full(at.shape, len(np.unique(at)) < at.size))
            self._refuse("store to what another program stores", storage, (writer != NONE) & (writer != program))
            self._refuse("store to what another program loads", storage, (reader != NONE) & (reader != program))
            if self.warps > 1:
                self._refuse("store to what this program loaded otherwise, without a barrier", storage, self._loaded_otherwise(storage, at, program))
                mine = (writer == program) & (storage.stored[at] > self.before)
                self._refuse("store to what this program stored otherwise, without a barrier", storage, self._another_way(storage.stored[at], mine))
                storage.stored[at] = self.accesses
            storage.writer[at] = program

    def barrier(self) -> None:
        self.before = self.accesses


_launch: _Launch | None = None  # the newest of those under way


def _watched(method, watch):
    def patched(self, pointers, *rest):
        if _launch is not None:
            watch(_launch, pointers, *rest)
        return method(self, pointers, *rest)

    return patched


def _barrier(method):
    def patched(self, *args):
        if _launch is not None:
            _launch.barrier()
        return method(self, *args)

    return patched


def _atomic(self, *_):
    raise AccessError("an atomic access; accepted are loads and stores")


def _called(method):
    def patched(self, *args, **kwargs):
        global _launch
        given = dict(zip(inspect.getfullargspec(self.fn).args, args)) | kwargs  # noqa: B905
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        outer, _launch = _launch, _Launch(self.fn.__name__, tensors, kwargs.get("num_warps", 4))
        try:
            return method(self, *args, **kwargs)
        finally:
            _launch = outer

    return patched


def apply() -> None:
    """Patch the interpreter of this process. Calling it again does nothing."""
    if getattr(InterpreterBuilder, "memory_is_checked", False):
        return
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = _watched(load, lambda launch, pointers, mask, *_: launch.load(pointers.data, mask.data))
    InterpreterBuilder.create_masked_store = _watched(store, lambda launch, pointers, _, mask, *__: launch.store(pointers.data, mask.data))
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = _atomic
    InterpreterBuilder.create_barrier = _barrier(InterpreterBuilder.create_barrier)
    GridExecutor.__call__ = _called(GridExecutor.__call__)
    InterpreterBuilder.memory_is_checked = True
