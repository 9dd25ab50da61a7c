"""Decoding: prefill, then (verify, accept, commit, draft) until done. The text equals autoregressive decoding's, greedy or drawn.

    decoding = Decoding(model, [prompt_ids], mode="quadratic", k=4, max_new_tokens=100)
    for new in decoding:            # new[b]: tokens of sequence b accepted in this step
        ...
    decoding.tokens, decoding.stats
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from operator import index

import numpy as np
import torch
from torch import Tensor

from mtp_kernels import Sampling, accept
from mtp_model.cache import KVCache
from mtp_model.layout import MODES, Layout, prefill_layout
from mtp_model.lookup import lookup_of
from mtp_model.model import MTPModel
from mtp_model.static import StaticStep, StepOptions, hooked, keep_step, recordable, take_step

SEEDS = 2**63
LARGE_VOCABULARY, SHORTLIST = 8192, 64


@dataclass
class DecodeStats:
    """What a decoding did. Lists have one entry per sequence, except the two by draft position (as many as a step can have drafts).

    passes: passes of the model that emitted tokens for the sequence, prefill included. tokens: tokens emitted, those after
    end-of-text or the maximum not counted. offered[i], accepted[i]: steps in which draft i + 1 was put up for verification,
    and in which it was accepted. seconds: wall-clock in "verify" (passes of the model; of static steps all), "draft" (the sampler), "other".
    """

    passes: list[int]
    tokens: list[int]
    offered: list[int]
    accepted: list[int]
    seconds: dict[str, float] = field(default_factory=lambda: {"verify": 0.0, "draft": 0.0, "other": 0.0})

    @property
    def tokens_per_step(self) -> float:
        """Pooled over the sequences; exactly 1 without drafts. The paper's "speedup", not wall-clock."""
        return sum(self.tokens) / sum(self.passes)

    @property
    def mean_tokens_per_step(self) -> float:
        """The mean over sequences of each one's own tokens per step."""
        return sum(t / p for t, p in zip(self.tokens, self.passes, strict=True)) / len(self.tokens)


@dataclass
class DecodeResult:
    """tokens[b]: new tokens of sequence b, end-of-text included when it was written."""

    tokens: list[list[int]]
    stats: DecodeStats


def default_way(model: MTPModel, k: int | None = None) -> tuple[str, int | None]:
    """Mode and k where none was asked for: on a CPU, where extra rows cost time, linear with two masks; on a GPU quadratic with all.

    Which is fastest for a model, a machine and a batch, `mtp_model.choose` measures.
    """
    if model.mtp is None:
        return MODES[0], None
    if model.device.type == "cpu":
        return "linear", min(2, model.mtp.num_masks) if k is None else k
    return "quadratic", k


def default_candidates(vocab_size: int) -> int | None:
    """draft_candidates where none was asked for: of a large vocabulary 64, else all. The k drafts are made one after another, each reading lm_head,
    so that with Llama-3.1-8B's k = 8 would cost half a step (`bench.sampler_counts`), and a token that is not among a mask's 64 likeliest is
    seldom the sampler's choice: of the demo's 1,024 tokens 64 cost 1.7 % of its tokens per step, 16 of them 3.1 %."""
    return SHORTLIST if vocab_size > LARGE_VOCABULARY else None


def token_lists(prompts: Sequence[Sequence[int]] | Tensor, name: str = "prompts") -> list[list[int]]:
    """Lists of token ids, of lists, arrays or tensors of them. Raises ValueError for anything else."""
    try:
        return [[index(token) for token in (p.tolist() if hasattr(p, "tolist") else p)] for p in prompts]
    except TypeError:
        raise ValueError(f"{name} are {str(prompts)[:80]!r}; accepted are lists of token ids, integers, one list for each sequence") from None


def sampling_of(
    temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None, seed: object = None
) -> Sampling | None:
    """How tokens are drawn, None for greedy text. Raises ValueError for what would go unheeded in greedy text."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature >= 0:
        raise ValueError(f"temperature is {temperature!r}; accepted are 0 for greedy text, or a number above it")
    if temperature:
        return Sampling(temperature, top_k, top_p, min_p)
    drawn = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    given = [f"{name} is {value!r}" for name, value in drawn.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} and temperature 0, which is greedy text; accepted is a temperature above 0 with it")
    return None


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` prompts, of what `Decoding` takes. Raises ValueError for anything else."""
    try:
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        if hasattr(seed, "__len__"):
            seeds = list(map(index, seed))
        else:
            first = -1 if isinstance(seed, bool) else index(seed)
            seeds = [(first + b) % SEEDS for b in range(count)] if 0 <= first < SEEDS else []
    except TypeError:
        seeds = []
    if len(seeds) != count or not all(0 <= s < SEEDS for s in seeds):
        raise ValueError(f"seed is {seed!r}; accepted are an integer from 0 to 2^63 - 1, a list of {count} of them, one for each prompt, or None")
    return seeds


class Decoding:
    """An iterator over the steps of a decoding; each yields the newly accepted tokens of every sequence.

    prompts: token ids, one non-empty list per sequence. mode: see `layout.MODES`; default that of `default_way`, which then gives
    k too. k: masks per block, 1 to the adapter's (default: all of them). eos: end-of-text ids; default the model's, () for none.
    use_sampler: False drafts from the masks' own logits. draft_candidates: how many tokens, 1 to the vocabulary, the sampler chooses
    from for each mask, which spares it most of its reading of lm_head; default that of `default_candidates`. It changes which drafts are offered,
    never the text, and does nothing without a sampler.

    lookup: how many tokens, 1 to 16, to copy as drafts from the text itself, prompt included, where its newest lookup_match tokens (default
    2) stood before: those that followed the last such place (prompt lookup, Saxena 2023). Where they did not, the drafts are the masks'.
    Autoregressive decoding, which has no masks and needs no adapter, has these drafts alone. The text is the same.

    temperature: 0 for greedy text; above, tokens are drawn, as top_k, top_p and min_p say (see `mtp_kernels.Sampling`). seed: of the noise that
    draws them, one integer for each sequence, or of the first, the next ones' being seed + 1, seed + 2, ...; default one from torch's own
    generator. A token's noise follows from its seed and its position, so a prompt and its seed give one text in every mode, with any k, in any
    batch, as the most likely tokens do. `seeds` are those that serve.

    static: steps of fixed shape with lengths on the device, recorded once and replayed, on a GPU as a CUDA
    graph (see `mtp_model.static`); default where a step can be recorded, with Triton kernels there and with the specification on a CPU, and no
    module has forward hooks; False: each step is laid out by the host. Raises ValueError for anything else, before any work.

    The model must stay as it is until the text is written, and no other thread may train it meanwhile. Between texts its parameters may change,
    by all that torch counts: not through `.data` or numpy, or else `model.train().eval()` makes it known.
    """

    def __init__(
        self,
        model: MTPModel,
        prompts: Sequence[Sequence[int]],
        *,
        mode: str | None = None,
        k: int | None = None,
        max_new_tokens: int = 100,
        eos: Sequence[int] | None = None,
        use_sampler: bool = True,
        draft_candidates: int | None = None,
        lookup: int | None = None,
        lookup_match: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        static: bool | None = None,
    ):
        if not hasattr(model, "mtp"):
            raise ValueError(f"the model is a {type(model).__name__}; accepted is what load_model or from_transformers gives")
        k, max_new_tokens, draft_candidates, lookup, lookup_match, temperature, top_k, top_p, min_p = (
            value.item() if isinstance(value, np.generic) else value
            for value in (k, max_new_tokens, draft_candidates, lookup, lookup_match, temperature, top_k, top_p, min_p)
        )
        if mode is None:
            mode, k = default_way(model, k)
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; accepted are {', '.join(MODES)}")
        if mode == "autoregressive":
            k = 0
        elif model.mtp is None:
            raise ValueError(f"mode {mode!r} needs an adapter and the model has none; accepted without one is 'autoregressive'")
        else:
            k = model.mtp.num_masks if k is None else k
            if type(k) is not int or not 1 <= k <= model.mtp.num_masks:
                raise ValueError(f"k is {k!r}; accepted are 1 to the adapter's {model.mtp.num_masks}")
        prompts, vocab = token_lists(prompts), model.config.vocab_size
        if not prompts or not all(prompts):
            raise ValueError("accepted are one or more prompts of at least one token each")
        for b, prompt in enumerate(prompts):
            if min(prompt) < 0 or max(prompt) >= vocab:
                raise ValueError(f"prompt {b} has a token id outside 0 to {vocab - 1}")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; accepted is an integer from 1")
        if (most := max(map(len, prompts)) + max_new_tokens) > model.config.max_position_embeddings:
            warnings.warn(f"texts may become {most} tokens long; the model was made for {model.config.max_position_embeddings}", stacklevel=2)
        if draft_candidates is not None and (type(draft_candidates) is not int or not 1 <= draft_candidates <= vocab):
            raise ValueError(f"draft_candidates is {draft_candidates!r}; accepted are an int from 1 to the vocabulary's {vocab}, or None")
        sampling = sampling_of(temperature, top_k, top_p, min_p, seed)
        self.seeds = seeds_of(seed, len(prompts)) if sampling else [0] * len(prompts)
        self.model, self.mode, self.k, self.max_new_tokens = model, mode, k, max_new_tokens
        self.prompts = prompts
        if static and model.device.type == "cuda" and not recordable(model):
            raise ValueError("static steps on a GPU are of the Triton kernels, for the reference waits for the device; accepted is False, or None")
        if static and hooked(model):
            raise ValueError("the model's modules have forward hooks, which a recorded step would not call; accepted is static=False, or None")
        self.static = recordable(model) and not hooked(model) if static is None else static
        if eos is not None and isinstance(eos, int):
            raise ValueError(f"eos is {eos}; accepted are several token ids, as in [{eos}], or () for none")
        self.eos = frozenset(model.config.eos_token_ids if eos is None else token_lists([eos], "eos")[0])
        draft_candidates = default_candidates(vocab) if draft_candidates is None else draft_candidates
        self.options = StepOptions(mode, k, use_sampler, draft_candidates, self.eos, sampling, lookup_of(lookup, lookup_match))
        batch, most = len(prompts), self.options.num_drafts
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.finished = [False] * batch
        self.stats = DecodeStats([0] * batch, [0] * batch, [0] * most, [0] * most)
        self._iterator = self._run()

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self._iterator  # one run: a loop that was left goes on where it stopped

    def close(self) -> None:
        """Stop here; what was recorded for this text serves the next one."""
        self._iterator.close()

    def _run(self) -> Iterator[list[list[int]]]:
        began = time.perf_counter()
        steps = self._steps()
        while True:  # gradients are off inside the steps only, never in the caller's code between them
            with torch.inference_mode(), torch.autocast(self.model.device.type, enabled=False):  # the model's dtype was chosen
                new = next(steps, None)
            seconds = self.stats.seconds
            seconds["other"] = time.perf_counter() - began - seconds["verify"] - seconds["draft"]
            if new is None:
                return
            paused = time.perf_counter()
            yield new
            began += time.perf_counter() - paused

    def _steps(self) -> Iterator[list[list[int]]]:
        model, k = self.model, self.k
        lengths = [len(p) for p in self.prompts]
        capacity = max(lengths) + self.max_new_tokens + self.options.num_rows
        step = take_step(model, len(lengths), capacity, self.options) if self.static else None
        cache = step.cache if step else KVCache(model.config, len(lengths), capacity, model.device, model.dtype)

        # Prefill: the prompts and a block after each, so that the first step already has drafts.
        cache.lengths = [0] * len(lengths)
        layout = prefill_layout(lengths, k, model.device)
        padded = [p + [0] * (max(lengths) - len(p)) for p in self.prompts]
        z = self._forward(layout, torch.tensor(padded, device=model.device).t(), cache)
        last = torch.tensor(lengths, device=model.device) - 1
        newest = self._next_tokens(z[last, torch.arange(len(lengths), device=model.device)].unsqueeze(0), lengths)[0]  # (B,)
        cache.commit(lengths)
        new = self._emit([[token] for token in newest.tolist()])
        drafts, counts, copied = self._draft(layout, z, last, newest, cache.lengths, [False] * len(lengths), None)
        if step:
            try:
                yield new
                yield from self._static_steps(step, newest, drafts, counts, copied)
            except GeneratorExit:  # close()
                pass
            keep_step(step)
            return

        yield new
        while not all(self.finished):
            # Verify: the newest token and its drafts, with masks behind them.
            masked = self.options.masks_behind_copies or not all(c or done for c, done in zip(copied, self.finished, strict=True))
            layout = self.options.layout(tuple(counts), masked, str(model.device))
            ids = torch.cat([newest.unsqueeze(0), drafts[:, : max(counts)].t()])
            z = self._forward(layout, ids, cache)
            logits = model.logits(z) if self.options.shares_logits(model, layout) else None
            of_tokens = None if logits is None else logits[: layout.num_ntp]
            predictions = self._next_tokens(z[: layout.num_ntp], [n + 1 for n in cache.lengths], of_tokens).t()  # (B, drafts + 1)

            # Accept: the longest prefix that the model would have written itself.
            accepted, newest = accept(ids[1:].t(), predictions, torch.tensor(counts, device=model.device))
            lengths = accepted.tolist()

            # Commit: the accepted tokens' K/V already stand in the cache.
            new = self._emit([p[: a + 1] for p, a in zip(predictions.tolist(), lengths, strict=True)], lengths, counts)
            cache.commit([0 if done else a + 1 for a, done in zip(lengths, self.finished, strict=True)])

            # Draft: from the text itself, or from the block behind the last accepted token.
            drafts, counts, copied = self._draft(layout, z, accepted, newest, cache.lengths, copied, logits)
            yield new

    def _static_steps(self, step: StaticStep, newest: Tensor, drafts: Tensor, counts: list[int], copied: list[bool]) -> Iterator[list[list[int]]]:
        """The same loop with the four parts in one launch: each step is begun before the one before it is read."""
        if all(self.finished):
            return
        room = [0 if done else self.max_new_tokens - len(tokens) for tokens, done in zip(self.tokens, self.finished, strict=True)]
        step.begin(step.cache.lengths, newest, drafts, counts, room, self.finished, self.seeds, copied, self._texts())
        began, following = time.perf_counter(), None
        try:
            while not all(self.finished):
                read = following or step.run()
                following = step.run() if step.overlaps else None
                outcome = read()
                now = time.perf_counter()
                self.stats.seconds["verify"], began = self.stats.seconds["verify"] + now - began, now
                new = self._emit(outcome.tokens, outcome.accepted, outcome.offered)
                paused = time.perf_counter()
                yield new
                began += time.perf_counter() - paused
        finally:
            if following:
                following()

    def _forward(self, layout: Layout, ids: Tensor, cache: KVCache) -> Tensor:
        began = time.perf_counter()
        z = self.model(layout.at(ids, cache.lengths), cache)
        self._book("verify", began)
        return z

    def _keys(self, first: list[int], count: int) -> Tensor | None:
        """(count, B) keys of what is drawn at the positions from `first` of each sequence; None for greedy text."""
        if self.options.sampling is None:
            return None
        return self.model.keys(*(torch.tensor(numbers, device=self.model.device) for numbers in (self.seeds, first)), count)

    def _next_tokens(self, z: Tensor, first: list[int], logits: Tensor | None = None) -> Tensor:
        """(T, B) tokens that the model writes at positions first, first + 1, ... of each sequence, from states z (T, B, d) and, where known, logits."""
        return self.model.next_tokens(z, self.options.sampling, self._keys(first, z.shape[0]), logits)

    def _texts(self) -> list[list[int]]:
        return [prompt + tokens for prompt, tokens in zip(self.prompts, self.tokens, strict=True)]

    def _draft(
        self, layout: Layout, z: Tensor, accepted: Tensor, newest: Tensor, position: list[int], copied: list[bool], logits: Tensor | None
    ) -> tuple[Tensor, list[int], list[bool]]:
        """The next drafts (B, D), how many each sequence has, and whether they are copied, as those of this step were or not.

        Copied ones are taken where there are any, else k with a block behind row `accepted`. position: of newest (B,). logits: all rows', or None."""
        options, batch, device = self.options, len(self.finished), self.model.device
        drafts, counts = torch.zeros(batch, options.num_drafts, dtype=torch.int64, device=device), [0] * batch
        if all(self.finished):
            return drafts, counts, copied
        began = time.perf_counter()
        operations = self.model.operations
        if layout.num_blocks:
            without = options.without_blocks(torch.tensor(copied, device=device))
            states, found = operations.drafting_states(z, layout.anchors, accepted, self.k, without)
            counts = found.tolist()
        if any(counts):
            keys = self._keys([p + 1 for p in position], self.k)
            if logits is not None:
                logits, _ = operations.drafting_states(logits, layout.anchors, accepted, self.k, without)
            drafts[:, : self.k] = self.model.draft(
                states, newest, options.use_sampler, options.draft_candidates, options.sampling, None if keys is None else keys.t(), logits
            )
        if options.lookup:
            texts, count = self._texts(), options.lookup.tokens
            ends = torch.tensor([len(text) - 1 for text in texts], device=device)
            padded = torch.tensor([text + [0] * (int(ends.max()) + 1 - len(text)) for text in texts], device=device)
            found_drafts, found = operations.lookup_drafts(padded, ends, count, options.lookup.match)
            copied = [has and not done for has, done in zip(found.tolist(), self.finished, strict=True)]  # rows take time
            for b in range(batch):
                if copied[b]:
                    counts[b], drafts[b, :count] = count, found_drafts[b]
        if any(counts):
            self._book("draft", began)
        return drafts, counts, copied

    def _emit(self, new: list[list[int]], accepted: list[int] | None = None, counts: list[int] = ()):
        """Append what a pass wrote, cut at end-of-text and at the maximum; returns what was appended."""
        out = []
        for b, tokens in enumerate(new):
            if self.finished[b]:
                out.append([])
                continue
            end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos), len(tokens))
            tokens = tokens[: min(end, self.max_new_tokens - len(self.tokens[b]))]
            self.tokens[b] += tokens
            self.stats.passes[b] += 1
            self.stats.tokens[b] += len(tokens)
            if accepted is not None:
                for i in range(counts[b]):
                    self.stats.offered[i] += 1
                    self.stats.accepted[i] += i < min(accepted[b], len(tokens))
            self.finished[b] = tokens[-1] in self.eos or len(self.tokens[b]) >= self.max_new_tokens
            out.append(tokens)
        return out

    def _book(self, part: str, began: float) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.stats.seconds[part] += time.perf_counter() - began


def generate(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    *,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    **options,
) -> DecodeResult:
    """Run a `Decoding` (which see for the options) to its end; `on_tokens` is called with each step's new tokens."""
    with closing(decoding := Decoding(model, prompts, **options)):  # also where `on_tokens` raises
        for new in decoding:
            if on_tokens is not None:
                on_tokens(new)
    return DecodeResult(decoding.tokens, decoding.stats)
