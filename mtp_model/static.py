"""A decoding step of fixed shape, whose lengths and drafts are on the device: verify, accept, commit and draft without the host.

What a step of `decode.Decoding` chooses on the host is data here: a sequence without drafts has its masks after the newest
token, and its other rows are padding (see `layout`), so every step has the rows of a step with drafts. Its operations are recorded
at its first run and then replayed: on a GPU as a CUDA graph, where the host reads what a step wrote while the next one works; on a
CPU, for the specification, as a TorchScript trace, which spares a small model most of Python's time. The text is the same.

    step = take_step(model, batch, columns, mode, k, ...)
    step.begin(...)                 # the outcome of a prefill into step.cache
    read = step.run()               # returns at once
    outcome = read()                # waits for that run
    keep_step(step)                 # for the next text of such a shape
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_kernels import Sampling
from mtp_kernels.nn import GatedLoRALinear, version
from mtp_model.cache import ALIGNMENT, KVCache
from mtp_model.layout import Layout, decoding_layout
from mtp_model.model import MTPModel

WARM_UPS = 2  # runs before a capture: kernels are compiled and memory is reserved in them
KEPT, KEPT_BYTES = 32, 2**30  # steps kept per model, and bytes of their caches; two are kept whatever they need
_TRACING = threading.Lock()  # a trace takes the parameters' requires_grad away meanwhile
# torch.jit.trace keeps what it has traced, and every tensor in it, until the process ends; these two beneath it do not.
TRACES = all(hasattr(torch._C, name) for name in ("_create_graph_by_tracing", "_create_function_from_graph"))


def recordable(model: MTPModel) -> bool:
    """Whether a step of this model can be recorded: the kernels' on a GPU, the specification's on a CPU."""
    return model.fused if model.device.type == "cuda" else TRACES and not model.fused


@dataclass(frozen=True)
class Outcome:
    """A run's results on the host, one entry per sequence: the tokens that it wrote, how many drafts were accepted, and whether
    there were any."""

    tokens: list[list[int]]
    accepted: list[int]
    drafted: tuple[bool, ...]


class StaticStep:
    """The step for `batch` sequences with caches of `columns` columns. Options as in `decode.Decoding`.

    State, tensors of fixed address: lengths (B,), newest (B,), drafts (B, k), drafted (B,), room (B,), finished (B,), seeds (B,).
    """

    def __init__(
        self, model: MTPModel, batch: int, columns: int, mode: str, k: int, *, use_sampler: bool = True, draft_candidates: int | None = None,
        eos: frozenset[int] = frozenset(), sampling: Sampling | None = None,
    ):  # fmt: skip
        self.model, self.mode, self.k, self.sampling = model, mode, k, sampling
        self.use_sampler, self.draft_candidates = use_sampler, draft_candidates
        device = model.device
        self.layout = decoding_layout(mode, k, (True,) * batch, str(device))
        # All columns that are stored anyway, for a longer text that this step may serve next.
        self.cache = KVCache(model.config, batch, -(-columns // ALIGNMENT) * ALIGNMENT, device, model.dtype)
        self.lengths, self.newest, self.room, self.seeds = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4))
        self.drafts = torch.zeros(batch, k, dtype=torch.int64, device=device)
        self.drafted, self.finished = (torch.zeros(batch, dtype=torch.bool, device=device) for _ in range(2))
        self.eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        self.outcome = torch.zeros(batch, k + 4, dtype=torch.int64, device=device)  # predictions | accepted, written, drafted
        self.overlaps = device.type == "cuda"  # whether a run may be begun before the one before it is read
        self.columns: int | None = None  # that a run looks at; None: all of the cache's
        self.key: tuple | None = None
        self._recorded: dict[int | None, Callable[..., object]] = {}  # by columns
        self._runs, self._copies = 0, []
        if self.overlaps:
            self._copies = [(torch.empty(self.outcome.shape, dtype=torch.int64, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.lengths, self.newest, self.room, self.drafts, self.drafted, self.finished, self.seeds

    @property
    def _written(self) -> tuple[Tensor, ...]:
        return *self.state, self.outcome, *(x for layer in range(self.model.config.num_hidden_layers) for x in self.cache.storage(layer))

    def begin(
        self, lengths: list[int], newest: Tensor, drafts: Tensor | None, drafted: tuple[bool, ...], room: list[int], finished: list[bool], seeds: list[int]
    ) -> None:
        """Take over after a prefill that filled the step's cache."""
        self.lengths.copy_(torch.tensor(lengths))
        self.newest.copy_(newest)
        self.drafted.copy_(torch.tensor(drafted))
        self.room.copy_(torch.tensor(room))
        self.finished.copy_(torch.tensor(finished))
        self.seeds.copy_(torch.tensor(seeds))
        if drafts is not None:
            self.drafts.copy_(drafts)

    def run(self) -> Callable[[], Outcome]:
        """One step for every sequence: recorded the first time, then replayed. Returns what waits for its outcome and reads it; on a
        GPU one more run may be begun before that."""
        if not self.overlaps:
            self._run_on_host()
            found = self._read(self.outcome)
            return lambda: found
        with torch.cuda.device(self.model.device):  # capture, streams and events are the current device's
            if self.columns not in self._recorded:
                self._recorded[self.columns] = self._capture().replay
            self._recorded[self.columns]()
            copy, event = self._copies[self._runs % 2]
            self._runs += 1
            copy.copy_(self.outcome, non_blocking=True)
            event.record()

        def read() -> Outcome:
            event.synchronize()
            return self._read(copy)

        return read

    def _rehearse(self, times: int) -> None:
        """Steps that leave the state as it was; what they wrote in the cache, the next one writes again."""
        saved = [tensor.clone() for tensor in self.state]
        for _ in range(times):
            self._step()
            for tensor, value in zip(self.state, saved, strict=True):
                tensor.copy_(value)

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._rehearse(WARM_UPS)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        # A graph knows addresses and keeps nothing alive: parameters may be replaced, and what was made of them dropped.
        self._held = [*self.model.parameters(), *(module._prepared for module in self.model.modules() if isinstance(module, GatedLoRALinear))]
        return graph

    def _run_on_host(self) -> None:
        # The reference looks at all columns that it is given: those in use, rounded up to a power of two of the cache's pieces.
        pieces = -(-(int(self.lengths.max()) + self.layout.num_rows) // ALIGNMENT)
        self.columns = min(ALIGNMENT << (pieces - 1).bit_length(), self.cache.columns)
        if not recordable(self.model):
            self._step()
        elif self.columns in self._recorded:
            with torch.jit.optimized_execution(False):  # as recorded: no pass over the graph, which would cost more than it saves
                self._recorded[self.columns](*self._written)
        else:
            self._recorded[self.columns] = self._trace()

    def _trace(self) -> Callable[..., object]:
        """Run a step, and record it: a function of what the step writes to."""
        with _TRACING:
            return self._traced()

    def _traced(self) -> Callable[..., object]:
        self._rehearse(1)  # what is made once, such as the fastest form of an adapter, must not be recorded
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:  # which a trace refuses
            parameter.requires_grad_(False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that shapes are taken as constants, which they are here
                graph, _ = torch._C._create_graph_by_tracing(lambda *_: self._step(), self._written, lambda _: "", True, False)
                return torch._C._create_function_from_graph("step", graph)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _step(self) -> Tensor:
        layout = self._layout()
        z = self.verify(layout)
        accepted = self.accept_and_commit(z)
        self.draft(layout, z, accepted)
        return self.outcome

    def _layout(self) -> Layout:
        """The step's layout, with the masks of a sequence without drafts after its newest token."""
        if not self.k:
            return self.layout
        return self.layout.anchored(torch.where(self.drafted, self.layout.anchors, 0))

    def verify(self, layout: Layout) -> Tensor:
        """Hidden states of the newest token, its drafts and the masks behind them."""
        ids = torch.cat([self.newest.unsqueeze(0), self.drafts.t()])
        rows = layout.at(ids, self.lengths, self.model.config.vocab_size, num_keys=self.columns or self.cache.columns)
        return self.model(rows, self.cache)

    def accept_and_commit(self, z: Tensor) -> Tensor:
        """Accept the longest prefix that the model would have written itself; its K/V already stand in the cache."""
        z = z[: self.layout.num_ntp]
        predictions = self.model.next_tokens(z, self.sampling, self._keys(self.k + 1)).t()  # (B, k + 1)
        self.outcome[:, -1] = self.drafted
        accepted, newest, written = self.model.operations.accept_and_commit(
            self.drafts, predictions, self.drafted * self.k, self.lengths, self.room, self.finished, self.eos
        )
        self.newest.copy_(newest)
        self.outcome[:, : self.k + 1] = predictions
        self.outcome[:, self.k + 1] = accepted
        self.outcome[:, self.k + 2] = written
        return accepted

    def _keys(self, count: int) -> Tensor | None:
        """(count, B) keys of what is drawn behind the newest tokens; None for greedy text."""
        return None if self.sampling is None else self.model.keys(self.seeds, self.lengths + 1, count)

    def draft(self, layout: Layout, z: Tensor, accepted: Tensor) -> None:
        """New drafts from the block behind the last accepted token, where there is one."""
        if not self.k:
            return
        behind = blocks_behind(layout, accepted)
        states = drafting_states(layout, z, behind)
        keys = self._keys(self.k)
        drafts = self.model.draft(states, self.newest, self.use_sampler, self.draft_candidates, self.sampling, None if keys is None else keys.t())
        self.drafts.copy_(drafts)
        self.drafted.copy_(behind.any(0))

    def _read(self, outcome: Tensor) -> Outcome:
        k, rows = self.k, outcome.tolist()
        return Outcome([row[: row[k + 2]] for row in rows], [row[k + 1] for row in rows], tuple(bool(row[k + 3]) for row in rows))


def _key(model: MTPModel, batch: int, options: tuple) -> tuple:
    """What must be the same for a step to serve again; it holds the parameters that it was recorded with, or what was made of them."""
    return batch, options, version(*model.parameters())


def take_step(
    model: MTPModel, batch: int, columns: int, mode: str, k: int, use_sampler: bool, draft_candidates: int | None, eos: frozenset[int],
    sampling: Sampling | None = None,
) -> StaticStep:  # fmt: skip
    """A step with a cache of at least `columns` columns: one that was kept, or a new one."""
    key = _key(model, batch, (mode, k, use_sampler, draft_candidates, eos, sampling))
    step = model.kept_steps.pop(key, None)
    if step is None or step.cache.capacity < columns:
        step = StaticStep(model, batch, columns, mode, k, use_sampler=use_sampler, draft_candidates=draft_candidates, eos=eos, sampling=sampling)
        step.key = key
    return step


def keep_step(step: StaticStep) -> None:
    """Keep the step for the next text. Dropped are the oldest, and those of parameters as they were before."""
    kept = step.model.kept_steps
    kept[step.key] = step
    for key in [key for key in kept if key[-1] != step.key[-1]]:
        del kept[key]
    while len(kept) > KEPT or len(kept) > 2 and sum(each.cache.bytes for each in kept.values()) > KEPT_BYTES:
        del kept[next(iter(kept))]


def blocks_behind(layout: Layout, accepted: Tensor) -> Tensor:
    """(A, B) which blocks stand behind each sequence's row `accepted` (B,)."""
    return layout.anchors == accepted


def drafting_states(layout: Layout, z: Tensor, behind: Tensor) -> Tensor:
    """The states (B, k, d) of the first block behind each sequence's last accepted row; of a sequence without one any block's."""
    first = layout.num_ntp + behind.to(torch.int64).argmax(0) * layout.k
    index = first.unsqueeze(1) + torch.arange(layout.k, device=z.device)  # (B, k)
    return z[index, torch.arange(z.shape[1], device=z.device).unsqueeze(1)]
