"""Configurations: the base model's (read from a Hugging Face config.json) and the adapter's."""

import dataclasses
import math
from dataclasses import dataclass, field

from mtp_kernels import rotary_frequencies

MAX_MASKS = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

# model_type -> what transformers takes where a config.json says nothing, and what it takes whatever that says.
FAMILIES = {
    "llama": ({}, {"use_sliding_window": False}),
    "mistral": ({"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
                {"attention_bias": False, "mlp_bias": False, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen2": (_QWEN, {"attention_bias": True, "output_bias": False, "mlp_bias": False}),
    "qwen3": (_QWEN | {"head_dim": 128}, {"qk_norm": True, "mlp_bias": False}),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family model. Field names are Hugging Face's, but for what these know by the family:

    attention_bias: q, k and v have a bias; output_bias: o has one. qk_norm: q's and k's heads are normalised before the rotation.
    windows: of each layer, how many of the newest positions a token sees, its own among them; None: all. Empty: all of them in every layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None, hash=False)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """Read the dict of a config.json. Raises ValueError naming what is not Llama-family about it."""
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(f"model_type is {kind!r}; accepted are {', '.join(FAMILIES)} (Llama 2, 3.x, Tulu, Mistral, Qwen 2, 2.5, 3)")
        default, fixed = FAMILIES[kind]
        config = default | config | fixed
        if config.get("quantization_config"):
            raise ValueError(f"the weights are quantised ({config['quantization_config']}); accepted are float32, float16 and bfloat16")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {activation!r}; accepted is 'silu'")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in needed if key not in config]
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}")
        for key in (*needed, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
            value = config.get(key)
            if (type(value) is not int or value < 1) and (value is not None or key in needed):
                raise ValueError(f"{key} is {value!r}; accepted is an integer from 1")
        eos = config.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int for token in eos):
            raise ValueError(f"eos_token_id is {config['eos_token_id']!r}; accepted are a token's id, a list of them, or null")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; accepted is a multiple")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling is {rope!r}; accepted is an object, or null")
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        scaling = rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
        rotary_frequencies(head_dim, scaling=scaling)  # refuses types that it does not know
        full, slides, layers = "full_attention", "sliding_attention", config["num_hidden_layers"]
        kinds = config.get("layer_types") or [slides if i >= (config.get("max_window_layers") or 0) else full for i in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (full, slides) for kind in kinds):
            raise ValueError(f"layer_types is {kinds}; accepted are {full!r} or {slides!r} for each of {layers} layers")
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        windows = tuple(window if kind == slides else None for kind in kinds)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            output_bias=bool(fixed.get("output_bias", config.get("attention_bias", False))),
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=fixed.get("qk_norm", False),
            eos_token_ids=tuple(eos),
            windows=windows if any(windows) else (),
        )


@dataclass(frozen=True)
class MTPConfig:
    """An adapter: k masks, gated LoRA of one rank on the seven projections or some of them, optionally a sampler head.

    num_masks: k, 1 to 16. rank: 1 to 512. alpha: LoRA is scaled by alpha / rank; default: the rank itself, scale 1.
    target_modules: which of `PROJECTIONS` have a LoRA; default all (arXiv 2507.11851, section 2.2; Hu et al. 2021, arXiv
    2106.09685, section 7.1, compare subsets). gated: False applies the LoRA to NTP rows too, ordinary LoRA as the paper's
    Fig. 6 compares it: the model's own predictions change, so it is for studies only.
    """

    num_masks: int = 8
    rank: int = 128
    alpha: float | None = None
    sampler: bool = True
    target_modules: tuple[str, ...] = PROJECTIONS
    gated: bool = True

    def __post_init__(self):
        for name in ("num_masks", "rank"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is an integer")
        if not 1 <= self.num_masks <= MAX_MASKS:
            raise ValueError(f"num_masks is {self.num_masks}; accepted are 1 to {MAX_MASKS}")
        if not 1 <= self.rank <= 512:
            raise ValueError(f"rank is {self.rank}; accepted are 1 to 512")
        if self.alpha is not None and not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha is {self.alpha!r}; accepted is a positive number, or None for the rank")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        names = self.target_modules
        if isinstance(names, str) or not names or not set(names) <= set(PROJECTIONS):
            raise ValueError(f"target_modules is {names!r}; accepted are one or more of {', '.join(PROJECTIONS)}")
        object.__setattr__(self, "target_modules", tuple(name for name in PROJECTIONS if name in names))

    @classmethod
    def from_dict(cls, values: dict) -> "MTPConfig":
        """Read the dict of an adapter_config.json. Raises ValueError for fields or values that are not accepted."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"adapter config has unknown fields {sorted(unknown)}; accepted are "
                             f"{[f.name for f in dataclasses.fields(cls)]}")  # fmt: skip
        return cls(**values)
