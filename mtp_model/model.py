"""The model: a frozen Llama-family base, and the adapter (masks, gated LoRA, sampler) that can be put on it."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_kernels import Sampling, rotary_frequencies, rotary_scale, sampling_keys, swiglu, unchecked
from mtp_kernels.nn import RMSNorm, SamplerHead
from mtp_kernels.packed import forget
from mtp_model.cache import KVCache
from mtp_model.config import ModelConfig, MTPConfig
from mtp_model.layers import STACKS, DecoderLayer
from mtp_model.layout import Rows


class MTPModel(nn.Module):
    """A Llama-family language model that can also run mask rows.

    `forward` takes the `Rows` of any pass and a cache and returns hidden states after the final norm, (T, B, d).
    Base parameters are frozen; the adapter's require gradients (the masks by option). implementation: see `use`.
    kept_steps: decoding steps kept for the next text, see `mtp_model.static`. rotations: (P, 2 D), rotary tables of positions 0 to P - 1.
    """

    def __init__(self, config: ModelConfig, device=None, dtype: torch.dtype | None = None, implementation: str | None = None):
        super().__init__()
        self.config = config
        self.mtp: MTPConfig | None = None
        self.fingerprint = ""
        factory = {"device": device, "dtype": dtype}
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))
        nn.init.normal_(self.embed, std=0.02)
        self.layers = nn.ModuleList([DecoderLayer(config, i, **factory) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.lm_head = self.embed
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))
            nn.init.normal_(self.lm_head, std=0.02)
        self.register_parameter("masks", None)
        self.sampler: SamplerHead | None = None
        self.requires_grad_(False)
        self.use(implementation)

    def use(self, implementation: str | None) -> "MTPModel":
        """Compute with the "triton" kernels or the "reference"; None: Triton on a GPU that has it, else the reference.

        Raises ValueError if the implementation asked for cannot run where the model is (see `mtp_kernels.ops`).
        """
        if implementation is not None and self.device.type != "meta":
            swiglu(torch.zeros(1, 2, device=self.device), implementation=implementation)  # says why, if it cannot
        self.kept_steps, self.rotations = {}, None
        self.implementation, self.operations = implementation, unchecked(implementation, self.device)  # every shape follows from the config
        for module in self.modules():
            if hasattr(module, "operations"):
                module.operations = self.operations
        return self

    def __getstate__(self) -> dict:
        # A copy has other tensors than those that a captured step works on.
        return self.__dict__ | {"kept_steps": {}, "rotations": None}

    def train(self, mode: bool = True) -> "MTPModel":
        """As of any module. With another mode what was made of the parameters is forgotten, so that one written to through `.data` counts."""
        if mode != self.training:
            self.kept_steps.clear()
            forget(self.parameters())
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # .to(), .cuda() and their like: the device may be another
        forget(self.parameters())
        super()._apply(fn, recurse)
        return self.use(self.implementation)

    @property
    def fused(self) -> bool:
        """Whether the model computes with the Triton kernels."""
        return self.operations.linear_argmax is not unchecked("reference").linear_argmax

    @property
    def frequencies(self) -> Tensor:
        """(D / 2,) rotary frequencies, float32 (float64 of a model in that), as the config says."""
        with torch.device("cpu"):
            frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        return frequencies.to(self.device, torch.promote_types(self.dtype, torch.float32))

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @torch.inference_mode(False)  # under which its parameters could not be trained
    def add_adapter(self, mtp: MTPConfig, seed: int = 0, dtype: torch.dtype | None = None, train_masks: bool = False) -> None:
        """Put a new adapter on the model: it changes no output until trained (B is zero), and never an NTP row's.

        Masks are drawn at the embedding table's standard deviation. dtype: of the adapter's parameters, default the base's.
        """
        if self.mtp is not None:
            raise ValueError("the model has an adapter already; remove_adapter() takes it off")
        dtype = dtype or self.dtype
        generator = torch.Generator().manual_seed(seed)
        shape = (mtp.num_masks, self.config.hidden_size)
        drawn = {"device": "cpu", "dtype": torch.float32}  # the same whatever torch's defaults are
        masks = torch.randn(shape, generator=generator, **drawn) * self.embed.float().std().cpu()
        self.masks = nn.Parameter(masks.to(self.device, dtype), requires_grad=train_masks)
        for layer in self.layers:
            for name, module in layer.adapted().items():
                targets = tuple(projection in mtp.target_modules for projection in STACKS[name])
                if any(targets):
                    module.add_adapter(mtp.rank, mtp.alpha, dtype, generator, targets)
        if mtp.sampler:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.sampler = SamplerHead(self.config.hidden_size, **drawn).to(self.device, dtype)
        self.mtp = mtp
        self.use(self.implementation)  # the new sampler too

    def remove_adapter(self) -> None:
        """Take the adapter off; what remains is the base model as it was."""
        for layer in self.layers:
            for module in layer.adapted().values():
                module.remove_adapter()
        self.masks, self.sampler, self.mtp = None, None, None

    def recompute_activations(self, on: bool = True) -> None:
        """Keep one tensor per layer for the backward pass and run each layer again there: less memory, more time."""
        for layer in self.layers:
            layer.recompute = on

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Every adapter parameter by name: masks, layers.N.*.lora_A / lora_B, sampler.*."""
        return {n: p for n, p in self.named_parameters() if n == "masks" or "lora_" in n or n.startswith("sampler.")}

    def embed_rows(self, rows: Rows) -> Tensor:
        """(T, B, d) input embeddings: tokens from the table, mask j from `masks[j - 1]`."""
        x = F.embedding(rows.ids, self.embed)
        if not rows.num_masks:
            return x
        masks = self.masks.to(self.dtype)[: rows.k].repeat(rows.num_masks // rows.k, 1)
        masks = masks.unsqueeze(1).expand(-1, int(rows.ids.shape[1]), -1)
        return torch.cat([x, masks])

    def rotary(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(T, B, D) each, the rows of `ops.rotary_tables` at the pass's positions, which are all below its num_keys."""
        kept, least = self.rotations, rows.num_keys
        if kept is None or len(kept) < least:
            positions, scale = torch.arange(1 << (least - 1).bit_length(), device=self.device), rotary_scale(self.config.rope_scaling)
            kept = self.rotations = torch.cat(self.operations.rotary_tables(positions, self.frequencies, self.dtype, scale), -1)
        return F.embedding(rows.positions, kept).chunk(2, -1)

    def forward(self, rows: Rows, cache: KVCache) -> Tensor:
        if rows.num_masks and self.mtp is None:
            raise ValueError("the pass has mask rows and the model no adapter; add_adapter() or load_adapter() gives it one")
        if rows.num_masks and rows.k > self.mtp.num_masks:
            raise ValueError(f"the pass has {rows.k} masks in a block; accepted are up to the adapter's {self.mtp.num_masks}")
        if self.mtp is not None and not self.mtp.gated:
            rows = replace(rows, gated=False)
        (t, b), width = map(int, rows.positions.shape), self.config.hidden_size
        x, rotary = self.embed_rows(rows).view(t * b, width), self.rotary(rows)
        for layer in self.layers:
            x = layer(x, rows, rotary, cache)
        return self.norm(x).view(t, b, width)

    def logits(self, z: Tensor) -> Tensor:
        """(..., V) logits of hidden states (..., d)."""
        return self.operations.gated_lora_linear(z, self.lm_head)

    def keys(self, seeds: Tensor, first: Tensor, count: int) -> Tensor:
        """(count, B) keys of what is drawn at positions first, first + 1, ... of each sequence; seeds, first: (B,)."""
        return sampling_keys(seeds, first + torch.arange(count, device=first.device).unsqueeze(1), self.config.vocab_size)

    def next_tokens(self, z: Tensor, sampling: Sampling | None = None, keys: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
        """(...) the next token of hidden states (..., d): the most likely, the lowest id on a tie, or one drawn with keys (...).

        logits: (..., V) of z, where they are known.
        """
        operations = self.operations
        if sampling is None:
            return operations.linear_argmax(z, self.lm_head) if logits is None else operations.argmax(logits)
        return operations.linear_sample(z, self.lm_head, keys, sampling) if logits is None else operations.sample(logits, keys, sampling)

    def draft(
        self, z: Tensor, first: Tensor, use_sampler: bool = True, candidates: int | None = None, sampling: Sampling | None = None,
        keys: Tensor | None = None, logits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, k) draft tokens from the states z (B, k, d) of a block's masks and the token before them, first (B,).

        candidates: how many tokens the sampler chooses from for each mask (see `ops.sampler_draft`); default all of them.
        sampling, keys (B, k): draft for text that is drawn so. logits: (B, k, V) of z, where they are known: lists of candidates are made of them.
        """
        if not use_sampler or self.sampler is None:
            return self.next_tokens(z, sampling, keys, logits)
        if logits is not None and candidates is not None and candidates < self.config.vocab_size:
            candidates = logits.topk(candidates, dim=-1, sorted=False).indices
        noise = {} if sampling is None else {"keys": keys, "temperature": sampling.temperature}
        return self.sampler.draft(z, first, self.embed, self.lm_head, candidates, **noise)
