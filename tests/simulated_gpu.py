"""A GPU that is not there: tensors that say cuda:0 and are computed on the CPU, so that what only runs on a GPU runs without one.

    TEST_GPU=simulated python -m pytest tests/test_model_triton.py

Kernels run in Triton's interpreter, CUDA graphs are what was called while they were captured, called again on the same memory. It refuses
what a GPU would refuse, or get wrong without a word:

- an operation, or a kernel, on tensors of the host and of the device;
- in a capture: waiting for the device, and tensors of the host;
- a replay that needs memory which is free again: a graph knows addresses, and keeps alive only what was made in its capture;
- reading what a copy that nobody waited for has brought: it is garbage until an event behind the copy was waited for.

What a capture calls leaves memory as it was. It does not simulate time, streams that run side by side, the reuse of a graph's own memory,
torch.compile, or inference mode, which is taken for no_grad. `waits` has what made the host wait, in words.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_dim", "unique_consecutive", "_unique2"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}  # whose indices may be the host's, out of a capture
waits: list[str] = []
_live: "weakref.WeakValueDictionary[int, OnDevice]" = weakref.WeakValueDictionary()
_capture: "CUDAGraph | None" = None
_copies: list[tuple[Tensor, Tensor]] = []  # begun and not waited for: where to, and what


class Refused(RuntimeError):
    """What a GPU would not do, or not do right."""


def wait(what: str) -> None:
    if _capture is not None:
        raise Refused(f"the host waits for the device in a capture: {what}")
    waits.append(what)
    _arrive(_copies)


def _arrive(copies: list[tuple[Tensor, Tensor]]) -> None:
    for pair in list(copies):
        pair[0].copy_(pair[1])
        _copies[:] = [other for other in _copies if other is not pair]


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class OnDevice(torch.Tensor):
    """A tensor on the device; `inner` is where it is in truth."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        strides = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="cpu", **strides)
        self.inner = inner
        _live[id(self)] = self
        return self

    device = property(lambda self: CUDA)  # the C++ beneath takes it for the CPU's, as it has no other device
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_) -> str:
        return f"OnDevice({self.inner})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            with _disable_current_modes():
                copy = OnDevice(self.inner.clone())
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return 0

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def cpu(self, *_, **__) -> Tensor:
        wait(f"{tuple(self.shape)} to the host")
        return _ToHost.apply(self)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # where the mode is off, as in autograd's own calls
        with _mode:
            return function(*args, **kwargs or {})


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return OnDevice(gradient)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if _capture is not None:
            raise Refused(f"{tuple(x.shape)} comes from the host in a capture")
        with _disable_current_modes():
            return OnDevice(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.inner


def _inner(x: object) -> object:
    return x.inner if isinstance(x, OnDevice) else x


class _Mode(TorchDispatchMode):
    """Where every operation comes by."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function._schema.name.split("::")[1]
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(x, OnDevice) for x in tensors) or any(isinstance(x, torch.device) and _is_cuda(x) for x in (*args, *kwargs.values()))
        kwargs |= {"device": "cpu"} if _is_cuda(kwargs.get("device")) else {}
        kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        if not on_device:
            return function(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:
                return function.decompose(*args, **kwargs)
        if function.namespace == "mtp_kernels":
            with self:  # launchers allocate and compute too
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if name == "copy_" and not isinstance(args[0], OnDevice):
            return self._copy_to_host(*args, **kwargs)
        self._look(function, name, tensors, args)
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        found = function(*inner_args, **inner_kwargs)
        out = tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)
        mutable = function._schema.is_mutable
        aliases = mutable or any(r.alias_info is not None for r in function._schema.returns)
        if _capture is not None and (mutable or not aliases):  # a view is as it was
            _capture.add(function, inner_args, inner_kwargs, [] if mutable else [x for x in tree_iter(found) if isinstance(x, Tensor)])
        return return_and_correct_aliasing(function, args, kwargs, out) if aliases else out

    @staticmethod
    def _look(function, name: str, tensors: list[Tensor], args: tuple) -> None:
        made = name.endswith("_like") or name in ("copy_", "_to_copy", "lift_fresh", "index_put")  # to the last autograd's C++ gives zeros of its own
        foreign = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        if foreign and not made and (name not in INDEX or foreign != [x for x in tree_iter(args[1]) if x is not None and not isinstance(x, OnDevice)]):
            raise Refused(f"{function} is given {tuple(foreign[0].shape)} of the host among tensors of the device")
        if foreign and _capture is not None and not name.endswith("_like"):
            raise Refused(f"{function} takes {tuple(foreign[0].shape)} from the host in a capture")
        by_flags = name in INDEX and any(x.dtype in (torch.bool, torch.uint8) for x in tree_iter(args[1]) if x is not None)
        if name in WAIT or by_flags:
            wait(f"{function}{' by flags' if by_flags else ''} of {[tuple(x.shape) for x in tensors]}")

    @staticmethod
    def _copy_to_host(into: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking:
            wait(f"{tuple(x.shape)} to the host")
            return into.copy_(x.inner)
        if _capture is not None:
            raise Refused("a copy to the host in a capture")
        _bytes(into.untyped_storage()).fill_(0x7F)
        _copies.append((into, x.inner.clone()))
        return into


_mode = _Mode()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    with _disable_current_modes():
        return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Address:
    """A tensor of memory from before a capture, as a graph knows it: it does not keep that alive."""

    def __init__(self, x: Tensor):
        self.storage, self.place = StorageWeakRef(x.untyped_storage()), (x.storage_offset(), tuple(x.shape), x.stride())
        self.dtype = x.dtype

    def tensor(self) -> Tensor:
        if self.storage.expired():
            raise Refused(f"a replay needs a tensor of {self.place[1]} {self.dtype} that is free again")
        return torch.empty(0, dtype=self.dtype).set_(torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata), *self.place)


class CUDAGraph:
    def __init__(self, *_, **__):
        self.calls: list[Callable[[], None]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def add(self, function: Callable, args: tuple, kwargs: dict, out: list[Tensor]) -> None:
        def known(x: object) -> object:
            return _Address(x) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.before else x

        args, kwargs = tree_map(known, (args, kwargs))

        def call() -> None:
            given, options = tree_map(lambda x: x.tensor() if isinstance(x, _Address) else x, (args, kwargs))
            found = function(*given, **options)
            for x, value in zip(out, (x for x in tree_iter(found) if isinstance(x, Tensor)), strict=False):
                x.copy_(value)

        self.calls.append(call)

    def replay(self) -> None:
        if _capture is not None:
            raise Refused("a replay in a capture")
        with torch.no_grad(), _disable_current_modes():
            for call in self.calls:
                call()


@contextlib.contextmanager
def _graph(graph: CUDAGraph, *_, **__) -> Iterator[None]:
    global _capture
    for x in list(_live.values()):
        storage = x.inner.untyped_storage()
        if storage.data_ptr() not in graph.before:
            graph.before[storage.data_ptr()] = storage, _bytes(storage).clone()
    _capture = graph
    try:
        yield
    finally:
        _capture = None
        for storage, content in graph.before.values():
            _bytes(storage).copy_(content)
        for x in list(_live.values()):  # what the capture made, and nothing has been written to
            if x.inner.untyped_storage().data_ptr() not in graph.before:
                _bytes(x.inner.untyped_storage()).fill_(0x7F)
        graph.before = {}


class Event:
    def __init__(self, *_, **__):
        self.copies: list[tuple[Tensor, Tensor]] = []

    def record(self, *_) -> None:
        self.copies = list(_copies)

    def synchronize(self) -> None:
        _arrive(self.copies)

    def elapsed_time(self, _) -> float:
        return 1.0


class Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _) -> None:
        pass

    def is_capturing(self) -> bool:
        return _capture is not None


@contextlib.contextmanager
def _nothing(*_, **__) -> Iterator[None]:
    yield


def _to(plain: Callable) -> Callable:
    def to(self: Tensor, *args, **kwargs) -> Tensor:
        values = [*args, *kwargs.values()]
        devices = [torch.device(x) for x in values if isinstance(x, (str, torch.device))] + [x.device for x in values if isinstance(x, Tensor)]
        dtypes = [x for x in values if isinstance(x, torch.dtype)] + [x.dtype for x in values if isinstance(x, Tensor)]
        on_device = isinstance(self, OnDevice)
        if not on_device and not any(map(_is_cuda, devices)):
            return plain(self, *args, **kwargs)
        x = _ToDevice.apply(self) if not on_device else self.cpu() if devices and devices[0].type == "cpu" else self
        x = plain(x, dtypes[0]) if dtypes else x
        return x.clone() if x is self and kwargs.get("copy") else x

    return to


def _inference_mode(mode=True):
    return torch.no_grad()(mode) if callable(mode) else torch.no_grad() if mode else torch.set_grad_enabled(torch.is_grad_enabled())


def _launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
    if not min(grid):
        return
    if any(isinstance(x, OnDevice) for x in tensors) and not all(isinstance(x, OnDevice) for x in tensors):
        raise Refused(f"{kernel.fn.__name__} is given tensors of the host and of the device")
    args, options = tree_map(_inner, (args, options))
    with _disable_current_modes():
        kernel[grid](*args, **options)
    if _capture is not None:
        _capture.add(lambda *a, **o: kernel[grid](*a, **o), args, options, [])


def apply() -> None:
    """To be called before the packages are imported; Triton must be interpreting."""
    free = SimpleNamespace(L2_cache_size=2**16, total_memory=2**30, name="simulated")
    instead = dict(
        _lazy_init=lambda: None, is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda _: None,
        get_device_name=lambda *_: free.name, get_device_properties=lambda *_: free, is_bf16_supported=lambda *_, **__: True,
        get_device_capability=lambda *_: (9, 0), mem_get_info=lambda *_: (2**27, 2**30), memory_allocated=lambda *_: 0, max_memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=lambda *_: None, empty_cache=lambda: None, set_sync_debug_mode=lambda _: None, _sleep=lambda _: None,
        get_rng_state=lambda *_: torch.get_rng_state(), set_rng_state=lambda *_: None, manual_seed_all=lambda _: None,
        synchronize=lambda *_: wait("torch.cuda.synchronize"), is_current_stream_capturing=lambda: _capture is not None,
        graph_pool_handle=lambda: 0, current_stream=lambda *_: Stream(),
        device=_nothing, stream=_nothing, graph=_graph, Stream=Stream, Event=Event, CUDAGraph=CUDAGraph,
    )  # fmt: skip
    for name, value in instead.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = torch.cuda.current_stream  # optimizers ask it where torch is built for a GPU
    torch.inference_mode = torch.autograd.grad_mode.inference_mode = _inference_mode
    torch.Tensor.to = _to(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *_, **__: self.to(CUDA)
    _device_constructors()  # which keeps what it finds
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made(getattr(torch, name)))
    torch.nn.functional.one_hot = lambda x, n: (x.unsqueeze(-1) == torch.arange(n, device=x.device)).long()  # C++ makes its numbers on the CPU
    generator = torch.Generator

    class Generators(type):
        def __call__(cls, device="cpu"):
            return generator()

        def __instancecheck__(cls, x):
            return isinstance(x, generator)

    torch.Generator = Generators("Generator", (), {})
    torch.autograd.set_multithreading_enabled(False)  # a device has a thread of its own for it
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _mode.__enter__()

    import mtp_kernels.triton
    from mtp_kernels.triton import _device
    from mtp_model.static import StaticStep

    mtp_kernels.triton.INTERPRETED = _device.INTERPRETED = False  # so that kernels for the host's tensors are refused as beside a GPU
    _device.target, _device.launch = lambda: ("cuda", 90), _launch
    traced = StaticStep._traced

    def untouched(self):
        with _disable_current_modes():
            return traced(self)

    StaticStep._traced = untouched


def _made(plain: Callable) -> Callable:
    def make(*args, device=None, pin_memory=False, **kwargs) -> Tensor:
        x = plain(*args, device=None if _is_cuda(device) else device, **kwargs)
        return x.to(device) if _is_cuda(device) else x

    return make
