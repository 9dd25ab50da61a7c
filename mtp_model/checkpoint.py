"""Hugging Face models in, from directories or loaded; adapter directories in and out. Only safetensors and JSON are ever read.

An adapter directory holds `adapter_model.safetensors` (masks, `layers.N.PROJ.lora_A` (R, in) and `lora_B` (out, R) for the
seven projections, `sampler.*`) and `adapter_config.json` (its MTPConfig, the base's shape and fingerprint, free notes).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtp_model.config import ModelConfig, MTPConfig
from mtp_model.hub import MODEL, local_directory
from mtp_model.layers import STACKS
from mtp_model.model import MTPModel

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "mtp-kernels-adapter-2"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Our stacked projections, and the checkpoint's names for their parts.
_PARTS = {
    stack: tuple(("self_attn." if part in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp.") + part for part in parts)
    for stack, parts in STACKS.items()
}


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; accepted is a JSON object")
    return values


class _Tensors:
    """A checkpoint's tensors by name; `source` is what an error calls it by. taken: the names that were asked for."""

    def __init__(self, source: object, tensors: Mapping[str, Tensor]):
        self.source, self.tensors, self.taken = source, tensors, set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.source} lacks the tensor {name}")
        self.taken.add(name)
        tensor = self.tensors[name]
        if tensor.is_meta:
            raise ValueError(f"tensor {name} of {self.source} is not in memory; accepted is a model that is on its devices as a whole (not offloaded)")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name} of {self.source} is {tensor.dtype}; accepted are {', '.join(map(str, DTYPES))}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name} of {self.source} has shape {tuple(tensor.shape)}; its config says {shape}")
        return tensor


class _Files(Mapping):
    """The tensors of a model directory: a single model.safetensors, or shards with an index."""

    def __init__(self, directory: Path):
        index = directory / "model.safetensors.index.json"
        if index.exists():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise ValueError(f"{index} has no weight_map from tensor names to files")
            self.files = {name: directory / file for name, file in names.items()}
        elif (directory / "model.safetensors").exists():
            self.files = {name: directory / "model.safetensors" for name in self._open(directory / "model.safetensors").keys()}
        else:
            raise ValueError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
        self.handles: dict[Path, object] = {}

    def _open(self, path: Path):
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from None

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.files

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        if path not in self.handles:
            self.handles[path] = self._open(path)
        if name not in self.handles[path].keys():
            raise ValueError(f"{path} lacks the tensor {name} that the index places there")
        return self.handles[path].get_tensor(name)


def load_model(
    directory: str | Path, *, device=None, dtype: torch.dtype | None = None, implementation: str | None = None, revision: str | None = None
) -> MTPModel:
    """Open a Hugging Face directory of the Llama family, or a repository "owner/name" of the Hub: model_type llama, mistral, qwen2 or qwen3.

    dtype: default the checkpoint's own. implementation: "triton", "reference" or None, see `MTPModel.use`. revision: of a repository. End-of-text
    ids are those of generation_config.json, which transformers' generate heeds, or where it has none config.json's.
    Raises ValueError naming what is missing, of another shape, or not of the family, and for quantised weights.
    """
    _check_dtype(dtype)
    directory = local_directory(directory, MODEL, revision)
    values = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    config = _config(values, _read_json(generation) if generation.exists() else {})
    return _build(config, _Tensors(directory, _Files(directory)), device, dtype, implementation)


def from_transformers(model: nn.Module, *, device=None, dtype: torch.dtype | None = None, implementation: str | None = None) -> MTPModel:
    """The same of a causal language model of transformers that is loaded already. It is copied: the two share nothing.

    device, dtype: default the model's own. Adapters know the model if it is in its checkpoint's dtype, or in a wider one: rounded weights are
    another model's to them. Raises ValueError as `load_model` does, and for a model with more weights than those of its family, LoRA's for instance
    (PEFT: merge_and_unload; `remove_gated_lora`), or with forward hooks, which would be left behind.
    """
    _check_dtype(dtype)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "to_dict"):
        raise ValueError(f"the model is a {type(model).__name__}; accepted is a causal language model of transformers")
    generation = getattr(model, "generation_config", None)
    config = _config(config.to_dict(), {} if generation is None else generation.to_dict())
    tensors = _Tensors(f"the {type(model).__name__}", model.state_dict())
    lora = [name for name in tensors.tensors if "lora_" in name]
    if lora:
        raise ValueError(f"{tensors.source} has adapters ({lora[0]}, ...); accepted is a model without (PEFT: merge_and_unload; or remove_gated_lora)")
    hooks = [name or "itself" for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooks:
        raise ValueError(f"{tensors.source} has forward hooks ({hooks[0]}), which would be left behind; accepted is a model without")
    built = _build(config, tensors, next(model.parameters()).device if device is None else device, dtype, implementation)
    unknown = sorted(set(tensors.tensors) - tensors.taken)
    if unknown:
        raise ValueError(f"{tensors.source} has the tensors {unknown[:4]}, which would go unheeded; accepted is a model without")
    return built


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted are {', '.join(map(str, DTYPES))}, or None for the checkpoint's own")


def _config(values: dict, generation: dict) -> ModelConfig:
    eos = generation.get("eos_token_id")
    return ModelConfig.from_hf(values if eos is None else values | {"eos_token_id": eos})


@torch.inference_mode(False)  # under which its parameters could not be trained
def _build(config: ModelConfig, tensors: _Tensors, device, dtype: torch.dtype | None, implementation: str | None) -> MTPModel:
    d, f, hd = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
    shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q),
              "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}  # fmt: skip
    embed = tensors.get("model.embed_tokens.weight", (config.vocab_size, d))
    head = embed
    if not config.tie_word_embeddings or "lm_head.weight" in tensors:
        head = tensors.get("lm_head.weight", (config.vocab_size, d)).to(embed.device)
    if head is not embed and config.tie_word_embeddings:  # transformers unties what differs, whatever the config says
        config = replace(config, tie_word_embeddings=head.dtype is embed.dtype and torch.equal(head, embed))
    dtype = dtype or embed.dtype
    device = torch.device("cpu" if device is None else device)
    with torch.device("meta"):
        model = MTPModel(config, dtype=dtype)
    model.to_empty(device=device)

    def put(parameter: Tensor, parts: list[Tensor]) -> None:
        parameter.data.copy_(torch.cat(parts) if len(parts) > 1 else parts[0])

    put(model.embed, [embed])
    if config.tie_word_embeddings:
        model.lm_head = model.embed
    else:
        put(model.lm_head, [head])
    final_norm = tensors.get("model.norm.weight", (d,))
    put(model.norm.weight, [final_norm])
    some = [embed[:256], final_norm]  # and a row of every matrix, so that a fine-tuned base is told from its origin
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        put(layer.input_norm.weight, [tensors.get(prefix + "input_layernorm.weight", (d,))])
        put(layer.post_norm.weight, [tensors.get(prefix + "post_attention_layernorm.weight", (d,))])
        if layer.qk_norm is not None:
            of_heads = (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads))
            put(layer.qk_norm, [tensors.get(f"{prefix}self_attn.{name}.weight", (hd,)).expand(heads, hd) for name, heads in of_heads])
        for name, module in layer.adapted().items():
            sizes = [shapes[part.split(".")[1]] for part in _PARTS[name]]
            parts = [tensors.get(f"{prefix}{p}.weight", s) for p, s in zip(_PARTS[name], sizes, strict=True)]
            put(module.weight, parts)
            some += [part[0].clone() for part in parts]
            if module.bias is not None:
                put(module.bias, [tensors.get(f"{prefix}{p}.bias", s[:1]) for p, s in zip(_PARTS[name], sizes, strict=True)])
    digest = hashlib.sha256(repr((config.hidden_size, config.num_hidden_layers, config.vocab_size)).encode())
    for tensor in some:
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
    model.fingerprint = digest.hexdigest()[:16]
    model.use(implementation)
    return model.eval()


@dataclass
class Adapter:
    """An adapter by itself. `apply` puts it on a model; `notes` is free-form (how it was trained)."""

    config: MTPConfig
    tensors: dict[str, Tensor]
    base: dict
    notes: dict = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A digest of its tensors."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_base(self, model: MTPModel) -> None:
        """Raises ValueError if the model is not the base that the adapter was trained for."""
        if not hasattr(model, "fingerprint"):
            raise ValueError(f"the model is a {type(model).__name__}; accepted is what load_model or from_transformers gives")
        mine = describe_base(model)
        wrong = [f"{key} {self.base.get(key)!r}, the model's is {mine[key]!r}" for key in mine if self.base.get(key) != mine[key]]
        if wrong:
            raise ValueError(f"the adapter was trained for another base model: {'; '.join(wrong)} (a fingerprint is of the checkpoint's weights, unrounded)")

    def apply(self, model: MTPModel, dtype: torch.dtype | None = None) -> MTPModel:
        """Put the adapter on `model`. Raises ValueError if the model is not the base it was trained for."""
        self.check_base(model)
        model.add_adapter(self.config, dtype=dtype)
        try:
            import_adapter(model, self.tensors)
        except ValueError:
            model.remove_adapter()
            raise
        return model


def describe_base(model: MTPModel) -> dict:
    """What an adapter is told its base by: sizes, and a digest of some of the weights."""
    config = asdict(model.config)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {key: config[key] for key in keys} | {"fingerprint": model.fingerprint}


def _projections(model: MTPModel, name: str) -> list[tuple[str, int]]:
    """The file name of each projection's part of the stacked parameter `name`, and its rows; without those not adapted."""
    layer, stack, which = name.rsplit(".", 2)
    module = model.get_submodule(f"{layer}.{stack}")
    sizes = [module.rank] * len(module.splits) if which == "lora_A" else list(module.splits)
    return [(f"{layer}.{part}.{which}" if part in model.mtp.target_modules else "", size) for part, size in zip(STACKS[stack], sizes, strict=True)]


def export_adapter(model: MTPModel, parameters: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under their file names, one A and B per projection, on the CPU.

    parameters: their values by the model's names, where the model itself holds only parts of them; default the model's.
    """
    out = {}
    for name, parameter in (parameters or model.adapter_parameters()).items():
        tensor = parameter.detach().cpu()
        if "lora_" not in name:
            out[name] = tensor.clone()
            continue
        names, sizes = zip(*_projections(model, name), strict=True)
        out |= {part: piece.clone() for part, piece in zip(names, tensor.split(sizes), strict=True) if part}
    return out


@torch.no_grad()
def import_adapter(model: MTPModel, tensors: dict[str, Tensor]) -> None:
    """Copy `export_adapter`'s tensors into a model whose adapter has the same k, rank, projections and sampler."""
    template = export_adapter(model)
    missing, unknown = sorted(set(template) - set(tensors)), sorted(set(tensors) - set(template))
    if missing or unknown:
        raise ValueError(f"adapter tensors do not fit its config: missing {missing[:4]}, unknown {unknown[:4]}")
    for name, tensor in tensors.items():
        if tensor.shape != template[name].shape:
            raise ValueError(f"adapter tensor {name} has shape {tuple(tensor.shape)}; its config says {tuple(template[name].shape)}")
    for name, parameter in model.adapter_parameters().items():
        if "lora_" not in name:
            parameter.copy_(tensors[name])
            continue
        first = 0
        for part, size in _projections(model, name):
            if part:
                parameter[first : first + size].copy_(tensors[part])
            first += size


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that appears whole or not at all. Raises OSError naming it if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from None


def save_adapter(model: MTPModel, directory: str | Path, notes: dict | None = None, parameters: dict[str, Tensor] | None = None) -> None:
    """Write the model's adapter to `directory`; parameters: see `export_adapter`. Each file appears whole or not at all."""
    if model.mtp is None:
        raise ValueError("the model has no adapter to save")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "adapter": asdict(model.mtp), "base": describe_base(model), "notes": notes or {}}
    write_tensors(directory / ADAPTER_WEIGHTS, export_adapter(model, parameters))
    temporary = directory / (ADAPTER_CONFIG + ".tmp")
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, directory / ADAPTER_CONFIG)


def load_adapter(directory: str | Path, *, revision: str | None = None) -> Adapter:
    """Read an adapter directory, or a repository "owner/name" of the Hugging Face Hub; needs no base model.

    revision: of a repository. Raises ValueError naming what is wrong with it.
    """
    directory = local_directory(directory, (ADAPTER_CONFIG, ADAPTER_WEIGHTS), revision)
    values = _read_json(directory / ADAPTER_CONFIG)
    if values.get("format") != FORMAT:
        raise ValueError(f"{directory / ADAPTER_CONFIG} has format {values.get('format')!r}; accepted is {FORMAT!r}")
    for key in ("adapter", "base"):
        if not isinstance(values.get(key), dict):
            raise ValueError(f"{directory / ADAPTER_CONFIG} lacks the object {key!r}")
    config, base = MTPConfig.from_dict(values["adapter"]), values["base"]
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / ADAPTER_WEIGHTS} cannot be read as safetensors: {error}") from None
    return Adapter(config, tensors, base, values.get("notes", {}))
