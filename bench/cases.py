"""The parts of a benchmark's case: whose shapes, how many rows, who competes, and how a call is run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bench import counts

EAGER, COMPILED, FUSED, GATHER, BASE, OURS = "eager", "torch.compile", "torch fused", "boolean gather", "base alone", "ours"
SDPA, FLEX = "sdpa, dense mask", "FlexAttention"
CHUNKED = "reference, chunked"
LOSS = "loss"


@dataclass(frozen=True)
class Model:
    """contexts: tokens before a decoding step, for attention. qk_norm: q's and k's heads are normalised before the rotation."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    qk_norm: bool = False

    def layers(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (inputs, the projections that share them), as `mtp_model` merges them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "o": (q, (self.hidden,)),
            "gate_up": (self.hidden, (self.intermediate, self.intermediate)),
            "down": (self.intermediate, (self.hidden,)),
        }


MODELS = {
    model.name: model
    for model in (
        Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128_256),
        Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128_256),
        Model("Qwen3-4B", 2560, 9728, 32, 8, 128, 151_936, qk_norm=True),
    )
}
TOY = Model("toy", 64, 96, 4, 2, 16, 160, (520,))  # ours takes keys in pieces of 512: one boundary


@dataclass(frozen=True)
class Setting:
    """Rows of a call, of which the last `on` are gate-on; train: its backward pass is measured too.

    mode, k: the layout that the rows are of, where they are a pass and not just a number of rows; attention and a step's operations need
    one. In training `rows` is also the length of the text. LOSS: no pass, but the rows of many, whose losses are taken together.
    """

    name: str
    rows: int
    on: int
    train: bool = False
    mode: str = ""
    k: int = 0

    @property
    def decodes(self) -> bool:
        return self.mode not in ("", "training", LOSS)


@dataclass(frozen=True)
class Scope:
    """Of which shapes cases are made. ranks: of gated LoRA. contexts: of attention, tokens before a decoding step or of training's text;
    None: all. short: of decoding the fewest and the most rows, no batch, the most masks, and one shape of training."""

    ranks: tuple[int, ...]
    contexts: tuple[int, ...] | None = None
    short: bool = False

    def decoding(self, settings: Iterable[Setting]) -> list[Setting]:
        found = [s for s in settings if s.decodes]
        return list(dict.fromkeys((found[0], found[-1]))) if self.short and found else found

    def masks(self, settings: Iterable[Setting]) -> list[int]:
        """Numbers of masks that decoding has."""
        found = sorted({s.k for s in settings if s.decodes and s.k})
        return found[-1:] if self.short else found

    def lengths(self, known: Iterable[int]) -> list[int]:
        return [n for n in known if self.contexts is None or n in self.contexts]


def _share(rows: int) -> int:
    return rows - -(-rows // 9)  # 8 masks after every token


SETTINGS = (  # linear: k + 1 tokens and k masks; quadratic: k masks after each of k + 1 tokens
    Setting("plain decoding", 1, 0, mode="autoregressive"),
    Setting("linear, k = 4", 9, 4, mode="linear", k=4),
    Setting("linear, k = 8", 17, 8, mode="linear", k=8),
    Setting("quadratic, k = 4", 25, 20, mode="quadratic", k=4),
    Setting("quadratic, k = 8", 81, 72, mode="quadratic", k=8),
    Setting("few rows", 128, _share(128)),
    Setting("few rows, all off", 128, 0),
    Setting("training", 1024, _share(1024), True, "training"),
    Setting("prefill, all off", 1024, 0),
    Setting("training", 8192, _share(8192), True, "training"),
    Setting("prefill, all off", 8192, 0),
    Setting("loss", 2048, 0, True, LOSS),
    Setting("loss", 16384, 0, True, LOSS),
)
TOY_SETTINGS = (
    Setting("plain decoding", 1, 0, mode="autoregressive"),
    Setting("linear, k = 8", 17, 8, mode="linear", k=8),
    Setting("training", 160, _share(160), True, "training"),
    Setting("loss", 8, 0, True, LOSS),
)


@dataclass(frozen=True)
class Provider:
    """A competitor. call: inputs -> outputs. plain: the formula it is held against. captured: whether a CUDA graph can hold it.
    adapter: whether it computes one where the case has one."""

    name: str
    call: Callable[[dict], Tensor | tuple[Tensor, ...]]
    plain: Callable[[dict], Tensor | tuple[Tensor, ...]]
    captured: bool = True
    adapter: bool = True


@dataclass(frozen=True)
class Case:
    """One shape of one operation.

    count: bytes per element, and whether the adapter is computed -> what must move. upstream: the inputs that are gradients of the
    outputs; leaves: those whose gradients are taken. plans: bytes per element -> the ways to launch it, where there are several.
    mutates: the inputs that a call changes. judge: inputs and outputs -> what competitors are compared by, where there are many right outputs.
    """

    operation: str
    model: str
    layer: str
    shape: str
    setting: Setting
    rank: int
    backward: bool
    count: Callable[[int, bool], counts.Count]
    make: Callable[[torch.device, torch.dtype], dict]
    providers: tuple[Provider, ...]
    upstream: tuple[str, ...]
    leaves: tuple[str, ...]
    plans: Callable[[int], list[counts.Plan]] | None = None
    mutates: tuple[str, ...] = ()
    judge: Callable[..., Tensor] | None = None

    @property
    def label(self) -> str:
        adapter = f", {self.setting.on} on, rank {self.rank}" if self.rank else ""
        return f"{self.model} {self.layer}, {self.setting.rows} rows{adapter}{', forward + backward' if self.backward else ''}"

    def run(self, call: Callable, inputs: dict) -> tuple[Tensor | None, ...]:
        """The outputs, and in a backward case the leaves' gradients behind them (None: the call does not depend on that leaf)."""
        ys = call(inputs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        if not self.backward:
            return ys
        upstream = [inputs[name] for name in self.upstream]
        if len(ys) > len(upstream):  # projections that were left apart
            upstream = upstream[0].split([y.shape[-1] for y in ys], -1)
        return *ys, *torch.autograd.grad(ys, [inputs[name] for name in self.leaves], upstream, allow_unused=True)

    def results(self, call: Callable, inputs: dict) -> list[Tensor | None]:
        """As `run`, in the form in which competitors compare: projections side by side, inputs that were changed behind the outputs."""
        inputs = inputs | {name: inputs[name].clone() for name in self.mutates}
        out = self.run(call, inputs)
        extra = len(out) - len(self.upstream) - (len(self.leaves) if self.backward else 0)
        if extra and self.upstream:
            out = torch.cat(out[: 1 + extra], -1), *out[1 + extra :]
        if self.judge:
            out = (self.judge(inputs, *out),)
        out = *out, *(inputs[name] for name in self.mutates)
        return [None if t is None else t.detach() for t in out]


@lru_cache
def _compile(function: Callable) -> Callable:
    """Once for all shapes: a compilation each would take longer than all measurements, and the products are the library's anyway."""
    return torch.compile(function, dynamic=True)


def compiled(function: Callable) -> Callable:
    return lambda inputs: _compile(function)(inputs)  # compiled at its first call


def random_tensors(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).requires_grad_(grad)

    return randn
