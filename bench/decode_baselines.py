"""What a captured step is held against on the same weights: our autoregressive loop as the host runs it, and transformers' generate."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from mtp_model import Decoding, MTPModel
from mtp_model.layers import STACKS

UNCAPTURED, EAGER, COMPILED = "uncaptured", "transformers", "transformers-compiled"
BASELINES = {
    UNCAPTURED: "ours, autoregressive, not captured",
    EAGER: "transformers generate, eager",
    COMPILED: "transformers generate, static cache, torch.compile",
}
Way = Callable[[Tensor, int], tuple[list[list[int]], float]]  # prompts (B, P), length -> tokens, seconds from each one's first to its last


class Peer:
    """transformers' generate on the same weights: its parameters are views of ours."""

    def __init__(self, model: MTPModel, compiled: bool):
        from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

        ours = model.config
        config = AutoConfig.for_model(
            "qwen3" if ours.qk_norm else "llama",
            **{name: value for name, value in asdict(ours).items() if name not in ("rope_theta", "rope_scaling", "eos_token_ids", "output_bias", "qk_norm")},
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta} | (ours.rope_scaling or {}),
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        tensors = {"model.embed_tokens.weight": model.embed, "lm_head.weight": model.lm_head, "model.norm.weight": model.norm.weight}
        for i, layer in enumerate(model.layers):
            prefix = f"model.layers.{i}."
            tensors |= {f"{prefix}input_layernorm.weight": layer.input_norm.weight, f"{prefix}post_attention_layernorm.weight": layer.post_norm.weight}
            if layer.qk_norm is not None:
                tensors |= {f"{prefix}self_attn.{name}.weight": layer.qk_norm.data[at] for name, at in (("q_norm", 0), ("k_norm", -1))}
            for stack, module in layer.adapted().items():
                group = "self_attn" if stack in ("qkv_proj", "o_proj") else "mlp"
                for name, whole in (("weight", module.weight), ("bias", module.bias)):
                    if whole is not None:
                        tensors |= {f"{prefix}{group}.{part}.{name}": t for part, t in zip(STACKS[stack], whole.data.split(module.splits), strict=True)}
        self.model.load_state_dict(tensors, assign=True)
        with model.device:
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)  # its buffers are in no state dict
        self.compiled = compiled
        self.options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead", dynamic=False)} if compiled else {}

    def __call__(self, prompts: Tensor, length: int) -> tuple[list[list[int]], float]:
        """Tokens, and the seconds from each sequence's first to its last."""
        marks = []

        class Marks:
            def put(self, _: Tensor) -> None:
                marks.append(time.perf_counter())

            def end(self) -> None:
                pass

        out = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, do_sample=False, pad_token_id=0,
                                  streamer=Marks(), **self.options)  # fmt: skip
        if self.compiled and not hasattr(self.model, "_compiled_call"):
            raise RuntimeError("generate did not compile")
        return out[:, prompts.shape[1] :].tolist(), marks[-1] - marks[1]  # the first mark is the prompt's


def write_uncaptured(model: MTPModel, prompts: Tensor, length: int) -> tuple[list[list[int]], float]:
    """As `Peer`: each step is laid out and launched by the host."""
    decoding = Decoding(model, prompts.tolist(), mode="autoregressive", max_new_tokens=length, eos=(), static=False)
    next(iter(decoding))  # the prompts and the first token
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in decoding:
        pass
    return decoding.tokens, time.perf_counter() - began


def baseline(name: str, model: MTPModel) -> Way:
    return partial(write_uncaptured, model) if name == UNCAPTURED else Peer(model, name == COMPILED)
