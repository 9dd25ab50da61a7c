"""A decoding step whose acceptance is prescribed: a model of random weights is timed as if its drafts were as good as one likes.

Time does not depend on what weights hold, so a shape is measured without a checkpoint. Acceptance does, and random weights have none
worth naming; so it is set, not measured. The model's own text is recorded first. In each step the model then drafts as it always does,
sampler included, and what it drafted is replaced by the recorded text, wrong at positions that a table of coins names. The
verification is the model's own and knows nothing of it, so the text must still come out equal.

    step = PrescribedStep(model, cache, "quadratic", 8, text, start)
    step.prescribe(coins < 0.2)     # a draft is wrong with chance 0.2
    tokens, passes, seconds = write(step)
"""

import itertools
import json
import time

import torch
from torch import Tensor

from bench.timing import capture_stream
from bench.training_job import CONFIGS, DEMO
from mtp_model.cache import KVCache
from mtp_model.config import ModelConfig, MTPConfig
from mtp_model.demo import BASE
from mtp_model.layout import Layout, prefill_layout
from mtp_model.model import MTPModel
from mtp_model.static import WARM_UPS, StaticStep, StepOptions

AUTOREGRESSIVE = "autoregressive"
GAIN = 3.0  # over PyTorch's own initial weights, whose text is one token again and again: equal texts would then say little
SHAPES = (DEMO, *CONFIGS)
PARTS = ("verify", "accept", "draft")


def shape_config(shape: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((BASE / "config.json").read_text(encoding="utf-8"))) if shape == DEMO else CONFIGS[shape]


def random_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, rank: int, masks: int, implementation: str | None = None, seed: int = 0
) -> MTPModel:
    """A model of that shape with random weights, drawn on the device, and a random adapter with sampler whose B is not zero."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = MTPModel(config, device=device, dtype=dtype, implementation=implementation).eval()
    model.add_adapter(MTPConfig(masks, rank), seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for layer in model.layers:
            for module in layer.adapted().values():
                module.weight.mul_(GAIN)
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02, generator=generator)
    return model.eval()


@torch.inference_mode()
def prefill(model: MTPModel, prompts: Tensor, cache: KVCache) -> Tensor:
    """Put the prompts (B, P) into an empty cache; returns the token (B,) that follows each."""
    batch, length = prompts.shape
    rows = prefill_layout([length] * batch, 0, model.device).at(prompts.t(), [0] * batch)
    return model.next_tokens(model(rows, cache)[-1])


class PrescribedStep(StaticStep):
    """A step that drafts, and then offers the recorded text instead of its drafts.

    cache: holds `start` tokens of each sequence; steps of other modes may share it, since none writes before that. text: (B, N)
    recorded tokens, the first of which follows the cache's. Options as in `StepOptions`.
    """

    def __init__(self, model: MTPModel, cache: KVCache, mode: str, k: int, text: Tensor, start: int, **options):
        super().__init__(model, text.shape[0], 1, StepOptions(mode, k, **options))
        self.cache = cache
        self.recorded_text, self.start = text, start
        self.ahead = torch.arange(1, k + 1, device=text.device)
        self.offers = torch.zeros(text.shape[0], text.shape[1] + k + 1, dtype=torch.int64, device=text.device)
        self.prescribe(torch.zeros_like(self.offers, dtype=torch.bool))

    def prescribe(self, wrong: Tensor) -> None:
        """wrong: (B, >= N + k + 1) bool, whether a draft of the recorded text's token i is another token. A captured graph obeys it too."""
        text = torch.nn.functional.pad(self.recorded_text, (0, self.k + 1))  # what is offered behind the text is cut off by the room
        self.offers.copy_((text + wrong[:, : text.shape[1]]) % self.model.config.vocab_size)

    def restart(self) -> None:
        """To the beginning of the text: its first token is the newest, and there are drafts behind it."""
        batch, length = self.recorded_text.shape
        drafts = self.offers[:, 1 : self.k + 1] if self.k else None
        self.begin([self.start] * batch, self.recorded_text[:, 0], drafts, [self.k] * batch, [length - 1] * batch, [length == 1] * batch, [0] * batch)

    def draft(self, layout: Layout, z: Tensor, accepted: Tensor, logits: Tensor | None) -> None:
        super().draft(layout, z, accepted, logits)
        if self.k:
            self.drafts.copy_(self.offers.gather(1, (self.lengths - self.start).unsqueeze(1) + self.ahead))


@torch.inference_mode()
def write(step: PrescribedStep) -> tuple[list[list[int]], int, float]:
    """Write the text from its first token on, as `mtp_model.decode` does: on a GPU each step is begun before the one before it is read.

    Returns the tokens, how many passes wrote some (summed over the sequences), and the seconds until the last token is on the host.
    """
    length, ahead = step.recorded_text.shape[1], step.model.device.type == "cuda"
    texts, passes = step.recorded_text[:, :1].tolist(), 0
    step.restart()
    if ahead:
        torch.cuda.synchronize()
    began, following = time.perf_counter(), None
    while min(map(len, texts)) < length:
        read = following or step.run()
        following = step.run() if ahead else None
        for text, new in zip(texts, read().tokens, strict=True):
            text += new
            passes += bool(new)
    seconds = time.perf_counter() - began
    if following:
        following()
    return texts, passes, seconds


class Parts:
    """The parts of a step on their own, each captured as a graph of its own on a GPU. Adding a part's end is all that it adds to a step."""

    @torch.inference_mode()
    def __init__(self, step: PrescribedStep):
        self.step = step
        self.calls = [self._verify, self._accept, self._draft][: 3 if step.k else 2]  # without masks there is no graph of a draft
        if step.model.device.type != "cuda":
            return
        side = capture_stream()
        step.restart()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step.restart()
                for call in self.calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        self.held = step.model.rotations  # a graph keeps nothing alive
        pool, graphs = torch.cuda.graph_pool_handle(), []  # one pool: a graph reads what the one before left, in the order of the capture
        for call in self.calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
            graphs.append(graph)
        self.calls = [graph.replay for graph in graphs]

    def _verify(self) -> None:
        self.layout = self.step._layout()
        self.z = self.step.verify(self.layout)

    def _accept(self) -> None:
        self.outcome = self.step.accept_and_commit(self.layout, self.z)

    def _draft(self) -> None:
        self.step.draft(self.layout, self.z, *self.outcome)

    @torch.inference_mode()
    def run(self, clock) -> dict[str, float]:
        """Seconds of each part in one step behind the prompts, and of the step."""
        self.step.restart()
        marks = [clock.begin()]
        for call in self.calls:
            call()
            marks.append(clock.end())
        clock.wait()
        seconds = [clock.seconds(*pair) for pair in itertools.pairwise(marks)] + [0.0] * (len(PARTS) - len(self.calls))
        return dict(zip(PARTS, seconds, strict=True)) | {"step": clock.seconds(marks[0], marks[-1])}


def step_bytes(model: MTPModel, k: int, batch: int, context: int, candidates: int | None = None, shared: bool = False) -> dict[str, int]:
    """The least that a step must read, in bytes: every matrix once, but lm_head as often as the sampler's k steps, one after another,
    come back to it, and the keys and values of `context` tokens of each sequence. Rows, and what passes between launches, are not counted.

    candidates: that the sampler chooses from, whose lists come from a pass over lm_head of their own or, shared, from verification's.
    base: the layers. adapter: LoRA, if there are masks. lm_head: verification and drafting. sampler: its two matrices; the half of
    the first that takes the masks' states is read once, all else k times. kv: the cache.
    """
    config, size = model.config, model.dtype.itemsize

    def of(*parameters: Tensor) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    layers = dict(model.layers.named_parameters())
    adapter = of(*(p for name, p in layers.items() if "lora_" in name))
    head, readings = of(model.lm_head), 1.0
    counts = {"base": of(model.norm.weight, *layers.values()) - adapter, "adapter": adapter if k else 0, "sampler": 0}
    if k and model.sampler is not None:
        half = of(model.sampler.linear2.weight)
        counts["sampler"] = half + 2 * k * half
        short = candidates is not None and candidates < config.vocab_size
        readings += (not shared) + k * min(batch * candidates / config.vocab_size, 1) if short else k
    elif k:
        readings += not shared
    kv = 2 * config.num_hidden_layers * batch * context * config.num_key_value_heads * config.head_dim * size
    return counts | {"lm_head": round(head * readings), "kv": kv}
