"""A decoding step of fixed shape, whose lengths and drafts are on the device: verify, accept, commit and draft without the host.

What a step of `decode.Decoding` chooses on the host is data here: a sequence with fewer drafts than others has its masks after the last
of them, and its other rows are padding (see `layout`). Its operations are recorded at its first run and then replayed: on a GPU as a CUDA graph
with the rows of a step with all drafts, and the host reads what a step wrote while the next one works; on a CPU, for the specification, as a
TorchScript trace, which spares a small model most of Python's time, and as others for steps with copied drafts, which have more rows or no
masks, for there the host knows whether there are any and rows take time. The text is the same. A step is of the parameters as `nn.version` knows them:
what is written through `.data` it may miss (`MTPModel.train` and then `eval` forget all steps).

    step = take_step(model, batch, columns, StepOptions(mode, k))
    step.begin(...)                 # the outcome of a prefill into step.cache
    read = step.run()               # returns at once
    outcome = read()                # waits for that run
    keep_step(step)                 # for the next text of such a shape
"""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtp_kernels import Sampling
from mtp_kernels.nn import GatedLoRALinear
from mtp_kernels.packed import kept, version
from mtp_model.cache import ALIGNMENT, KVCache
from mtp_model.layout import MODES, Layout, decoding_layout
from mtp_model.lookup import Lookup
from mtp_model.model import MTPModel

WARM_UPS = 2  # runs before a capture: kernels are compiled and memory is reserved in them
FEW_ROWS, FEW_ROWS_ON_CPU = 128, 32  # up to here a product with a large matrix takes about as long as reading it
KEPT, KEPT_BYTES = 32, 2**30  # steps kept per model, and bytes of their caches; two are kept whatever they need
_TRACING = threading.Lock()  # a trace takes the parameters' requires_grad away meanwhile
# torch.jit.trace keeps what it has traced, and every tensor in it, until the process ends; those beneath it do not.
TRACES = all(
    hasattr(torch._C, name)
    for name in ("_create_graph_by_tracing", "_jit_pass_inline", "_jit_pass_constant_propagation", "_jit_pass_cse", "_create_function_from_graph")
)


def recordable(model: MTPModel) -> bool:
    """Whether a step of this model can be recorded: the kernels' on a GPU, the specification's on a CPU."""
    return model.fused if model.device.type == "cuda" else TRACES and not model.fused


def hooked(model: MTPModel) -> bool:
    """Whether something looks on at the model's passes, or changes them, which a recorded step knows nothing of."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


@dataclass(frozen=True)
class StepOptions:
    """Of `decode.Decoding`, all that decides what a step does. k: masks per block, 0 without; eos: token ids."""

    mode: str
    k: int
    use_sampler: bool = True
    draft_candidates: int | None = None
    eos: frozenset[int] = frozenset()
    sampling: Sampling | None = None
    lookup: Lookup | None = None

    @property
    def num_drafts(self) -> int:
        """The most that a step may verify."""
        return max(self.k, self.lookup.tokens if self.lookup else 0)

    @property
    def num_rows(self) -> int:
        """Of a step with all drafts, which has the most."""
        return self.layout((self.num_drafts,)).num_rows

    @property
    def masks_behind_copies(self) -> bool:
        return self.mode != "linear"

    def shares_logits(self, model: MTPModel, layout: Layout) -> bool:
        """Whether verification's pass over lm_head has the masks' rows too, since drafting needs their logits: where these are the rows that will be
        drafted from, or few enough to cost little beside reading lm_head, which then need not be read again (on a GPU with fused kernels alone)."""
        needed = not self.use_sampler or model.sampler is None or (self.draft_candidates or model.config.vocab_size) < model.config.vocab_size
        most = FEW_ROWS if model.fused else FEW_ROWS_ON_CPU if model.device.type == "cpu" else 0
        return bool(layout.num_blocks) and needed and (layout.num_blocks == 1 or layout.num_rows * layout.batch <= most)

    def without_blocks(self, copied: Tensor) -> Tensor | None:
        """(B,) which sequences' blocks are not to be drafted from, given whether their drafts were copied; None: every block is."""
        return None if self.masks_behind_copies or not self.lookup else copied

    def layout(self, drafts: tuple[int, ...], masked: bool = True, device: str = "cpu") -> Layout:
        """Of a step with so many drafts for each sequence. masked: with its mode's masks."""
        return decoding_layout(self.mode if masked else MODES[0], self.k, drafts, device)


@dataclass(frozen=True)
class Outcome:
    """A run's results on the host, one entry per sequence: the tokens that it wrote, how many drafts were accepted, and how many
    there were."""

    tokens: list[list[int]]
    accepted: list[int]
    offered: list[int]


class StaticStep:
    """The step for `batch` sequences with caches of `columns` columns.

    State, tensors of fixed address: lengths (B,), newest (B,), drafts (B, D), counts (B,) of drafts, copied (B,) whether they were copied,
    room (B,), finished (B,), seeds (B,), and for lookups text (B, S), whose newest token stands at `lengths`.
    """

    def __init__(self, model: MTPModel, batch: int, columns: int, options: StepOptions):
        self.model, self.options, self.k, self.most = model, options, options.k, options.num_drafts
        device, ids = model.device, torch.int64
        # All columns that are stored anyway, for a longer text that this step may serve next.
        self.cache = KVCache(model.config, batch, -(-columns // ALIGNMENT) * ALIGNMENT, device, model.dtype)
        self.lengths, self.newest, self.room, self.seeds, self.counts = (torch.zeros(batch, dtype=ids, device=device) for _ in range(5))
        self.drafts = torch.zeros(batch, self.most, dtype=ids, device=device)
        self.finished, self.copied = (torch.zeros(batch, dtype=torch.bool, device=device) for _ in range(2))
        self.text = torch.zeros(batch, self.cache.columns if options.lookup else 0, dtype=ids, device=device)
        self.eos = torch.tensor(sorted(options.eos), dtype=ids, device=device)
        self.outcome = torch.zeros(batch, self.most + 4, dtype=ids, device=device)  # accepted, written, counts, predictions
        self.overlaps = device.type == "cuda"  # whether a run may be begun before the one before it is read
        self.columns: int | None = None  # that a run looks at; None: all of the cache's
        self.offered, self.masked = self.most, bool(self.k)  # how many drafts a run has rows for, and whether it has masks
        self.key: tuple | None = None
        self._recorded: dict[tuple, Callable[..., object]] = {}  # by columns, offered and masked
        self._layouts: dict[tuple, Layout] = {}  # by the last two; kept, for a graph knows their addresses
        self._runs, self._copies = 0, []
        if self.overlaps:
            self._copies = [(torch.empty(self.outcome.shape, dtype=torch.int64, pin_memory=True), torch.cuda.Event()) for _ in range(2)]

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.lengths, self.newest, self.room, self.drafts, self.counts, self.copied, self.finished, self.seeds, self.text

    @property
    def _changing(self) -> tuple[Tensor, ...]:
        """All that a trace must not take for constants: what a step writes to, and the views of it that it reads."""
        cache = self.cache
        stored = (x for layer in range(self.model.config.num_hidden_layers) for x in cache.storage(layer))
        return *self.state, self.outcome, *stored, *cache.keys, *cache.values

    def begin(
        self, lengths: list[int], newest: Tensor, drafts: Tensor | None, counts: list[int], room: list[int], finished: list[bool], seeds: list[int],
        copied: list[bool] | None = None, texts: list[list[int]] = (),
    ) -> None:  # fmt: skip
        """Take over after a prefill that filled the step's cache. drafts: (B, up to D). copied, texts (the tokens so far, newest included):
        only lookups need them."""
        given = (
            (self.lengths, lengths), (self.counts, counts), (self.copied, copied or [False]), (self.room, room),
            (self.finished, finished), (self.seeds, seeds),
        )  # fmt: skip
        for tensor, values in given:
            tensor.copy_(torch.tensor(values, device="cpu"))
        self.newest.copy_(newest)
        if drafts is not None:
            self.drafts[:, : drafts.shape[1]] = drafts
        for row, text in zip(self.text, texts if self.options.lookup else (), strict=False):
            row[: len(text)] = torch.tensor(text, device="cpu")

    def run(self) -> Callable[[], Outcome]:
        """One step for every sequence: recorded the first time, then replayed. Returns what waits for its outcome and reads it; on a
        GPU one more run may be begun before that."""
        if not self.overlaps:
            self._run_on_host()
            found = self._read(self.outcome)
            return lambda: found
        with torch.cuda.device(self.model.device):  # capture, streams and events are the current device's
            key = self.columns, self.offered, self.masked
            if key not in self._recorded:
                self._recorded[key] = self._capture().replay
            self._recorded[key]()
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
        self._held = [*self._weights(), self.model.rotations]
        return graph

    def _weights(self) -> list[Tensor]:
        """The model's parameters, and what its layers keep of their adapters."""
        made = (module._prepared for module in self.model.modules() if isinstance(module, GatedLoRALinear))
        return [*self.model.parameters(), *(tensor for prepared in made if prepared for tensor in prepared[1][:2])]

    def _run_on_host(self) -> None:
        # The reference looks at all columns that it is given: those in use, rounded up to a power of two of the cache's pieces.
        pieces = -(-(int(self.lengths.max()) + self.options.num_rows) // ALIGNMENT)
        self.columns = min(ALIGNMENT << (pieces - 1).bit_length(), self.cache.columns)
        copied = {c for c, done in zip(self.copied.tolist(), self.finished.tolist(), strict=True) if not done}
        self.offered = self.most if True in copied else self.k
        self.masked = bool(self.k) and (self.options.masks_behind_copies or copied != {True})
        key = self.columns, self.offered, self.masked
        if not recordable(self.model):
            self._step()
        elif key in self._recorded:
            with torch.jit.optimized_execution(False):  # no further pass over the graph, which would cost more than it saves
                self._recorded[key](*self._changing)
        else:
            self._recorded[key] = self._trace()

    def _trace(self) -> Callable[..., object]:
        """Run a step, and record it: a function of `_changing`."""
        with _TRACING:
            return self._traced()

    def _traced(self) -> Callable[..., object]:
        self._rehearse(1)  # what is made once, such as the fastest form of an adapter, must not be recorded
        packed = [weight for weight in kept(self._weights()) if weight.is_mkldnn]  # which a trace cannot take for constants
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:  # which a trace refuses
            parameter.requires_grad_(False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that shapes are taken as constants, which they are here
                graph, _ = torch._C._create_graph_by_tracing(lambda *_: self._step(), (*packed, *self._changing), lambda _: "", True, False)
                torch._C._jit_pass_inline(graph)
                # What follows from constants alone is computed now, and what layers have in common once.
                torch._C._jit_pass_constant_propagation(graph)
                torch._C._jit_pass_cse(graph)
                return partial(torch._C._create_function_from_graph("step", graph), *packed)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _step(self) -> Tensor:
        layout = self._layout()
        z = self.verify(layout)
        accepted, logits = self.accept_and_commit(layout, z)
        self.draft(layout, z, accepted, logits)
        return self.outcome

    def _layout(self) -> Layout:
        """The layout of a step with rows for `offered` drafts, where no sequence has its masks behind more than its own."""
        key = self.offered, self.masked
        if key not in self._layouts:
            self._layouts[key] = self.options.layout((self.offered,) * len(self.lengths), self.masked, str(self.model.device))
        layout = self._layouts[key]
        return layout.anchored(torch.minimum(layout.anchors, self.counts)) if layout.num_blocks else layout

    def verify(self, layout: Layout) -> Tensor:
        """Hidden states of the newest token, its drafts and the masks behind them."""
        ids = torch.cat([self.newest.unsqueeze(0), self.drafts[:, : self.offered].t()])
        start = self.lengths if self.overlaps else self.lengths.clone()  # of which a trace sees that it stays: layers' work with it is done once
        rows = layout.at(ids, start, num_keys=self.columns or self.cache.columns)
        return self.model(rows, self.cache)

    def accept_and_commit(self, layout: Layout, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Accept the longest prefix that the model would have written itself; its K/V already stand in the cache.

        Returns how many drafts were accepted, and all rows' logits (T, B, V) where drafting needs them and they are made here."""
        rows = self.offered + 1
        logits = self.model.logits(z) if self.options.shares_logits(self.model, layout) else None
        of_tokens = None if logits is None else logits[:rows]
        predictions = self.model.next_tokens(z[:rows], self.options.sampling, self._keys(rows), of_tokens).t()  # (B, rows)
        if self.options.lookup:  # behind the newest token; what is not accepted is overwritten
            self.text.scatter_(1, self.lengths.unsqueeze(1) + torch.arange(1, rows + 1, device=z.device), predictions)
        accepted, newest, written = self.model.operations.accept_and_commit(
            self.drafts[:, : self.offered], predictions, self.counts, self.lengths, self.room, self.finished, self.eos
        )
        self.newest.copy_(newest)
        torch.cat([*(x.unsqueeze(1) for x in (accepted, written, self.counts)), predictions], 1, out=self.outcome[:, : rows + 3])
        return accepted, logits

    def _keys(self, count: int) -> Tensor | None:
        """(count, B) keys of what is drawn behind the newest tokens; None for greedy text."""
        return None if self.options.sampling is None else self.model.keys(self.seeds, self.lengths + 1, count)

    def draft(self, layout: Layout, z: Tensor, accepted: Tensor, logits: Tensor | None) -> None:
        """New drafts: copied from the text where it can be, else from the block behind the last accepted token, where there is one."""
        options, operations = self.options, self.model.operations
        if layout.num_blocks:
            behind = layout.anchors, accepted, self.k, options.without_blocks(self.copied)
            states, counts = operations.drafting_states(z, *behind)
            keys = self._keys(self.k)
            self.drafts[:, : self.k] = self.model.draft(
                states, self.newest, options.use_sampler, options.draft_candidates, options.sampling, None if keys is None else keys.t(),
                None if logits is None else operations.drafting_states(logits, *behind)[0],
            )  # fmt: skip
            self.counts.copy_(counts)
        elif options.lookup:
            self.counts.zero_()
        if options.lookup:
            count = options.lookup.tokens
            copied, found = operations.lookup_drafts(self.text, self.lengths, count, options.lookup.match)
            self.drafts[:, :count] = torch.where(found.unsqueeze(1), copied, self.drafts[:, :count])
            self.counts.masked_fill_(found, count)
            self.copied.copy_(found)

    def _read(self, outcome: Tensor) -> Outcome:
        rows = outcome.tolist()
        return Outcome([row[3 : 3 + row[1]] for row in rows], [row[0] for row in rows], [row[2] for row in rows])


def _key(model: MTPModel, batch: int, options: StepOptions) -> tuple:
    """What must be the same for a step to serve again; it holds the parameters that it was recorded with, or what was made of them."""
    return batch, options, (torch.get_num_threads(), *version(*model.parameters()))


def take_step(model: MTPModel, batch: int, columns: int, options: StepOptions) -> StaticStep:
    """A step with a cache of at least `columns` columns: one that was kept, or a new one."""
    key = _key(model, batch, options)
    step = model.kept_steps.pop(key, None)
    if step is None or step.cache.capacity < columns:
        step = StaticStep(model, batch, columns, options)
        step.key = key
    return step


def keep_step(step: StaticStep) -> None:
    """Keep the step for the next text. Dropped are the oldest, and those of parameters as they were before."""
    steps = step.model.kept_steps
    steps[step.key] = step
    for key in [key for key in steps if key[-1] != step.key[-1]]:
        del steps[key]
    while len(steps) > KEPT or len(steps) > 2 and sum(each.cache.bytes for each in steps.values()) > KEPT_BYTES:
        del steps[next(iter(steps))]
