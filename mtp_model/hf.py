"""Gated LoRA in a transformers model that is loaded already: put in, switched on for rows of a pass, taken out.

    model = add_gated_lora(model)            # nothing changes yet: the gate is off
    with gate(model, rows):                  # or model(ids, gate=rows)
        logits = model(ids).logits
    model = remove_gated_lora(model)

rows: a boolean tensor of the pass's (batch, sequence), True where the adapter applies; for a batch of one also an int m,
rows m and later; True for all rows of every pass, so that `generate` writes with the adapter; None is off. With the gate off
every projection runs the code it ran before, so logits, `generate` and checkpoints are what they were, bit for bit.

How it hangs together. A projection stays the object it was; its class changes to `GatedLinear` and back, so parameters,
keys, hooks and references to it are untouched. A pass's gate travels as a keyword argument from the model through a decoder
layer to its attention, where a hook takes it out and lays it ready for the layer's projections, until the MLP is done. So
activation checkpointing, which runs a layer again with the same arguments, perhaps in another thread and long after the
context was left, finds the same gate.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mtp_kernels.nn import GatedLoRALinear
from mtp_model.checkpoint import load_adapter
from mtp_model.config import FAMILIES

PROJECTIONS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Rows = bool | int | Tensor | None


class _State:
    """What a thread's passes are to do."""

    def __init__(self):
        self.asked: tuple[tuple[nn.Module, Rows], ...] = ()  # by `gate`, for whole models, the innermost first
        self.gate: int | Tensor | None = None  # for the projections of the decoder layer that is running


class _Thread(threading.local):
    """A model may run in several threads at once. The state is an object of its own: torch.compile loses what is written to the
    attributes of a thread-local itself when a graph breaks."""

    def __init__(self):  # once in each thread
        self.state = _State()


_thread = _Thread()


class GatedLinear(GatedLoRALinear, nn.Linear):
    """An nn.Linear while it has an adapter. Made of one by assigning its `__class__`, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        rows = _thread.state.gate
        if rows is None:
            return nn.Linear.forward(self, x)
        return GatedLoRALinear.forward(self, x, rows)


@dataclass
class _Added:
    """What `remove_gated_lora` has to undo."""

    linears: dict[str, GatedLinear]  # by their name in an adapter directory, layers.N.PROJ
    handles: list
    trained: dict[str, nn.Parameter]  # of the base, frozen meanwhile


def _base(model: nn.Module) -> nn.Module:
    """The decoder inside a model with a head, or the model itself. Raises ValueError for a family that is not known."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    base = getattr(model, "base_model", model)
    if family not in FAMILIES or not isinstance(getattr(base, "layers", None), nn.ModuleList):
        raise ValueError(
            f"the model is a {type(model).__name__} with model_type {family!r}; accepted are transformers models whose "
            f"model_type is {', '.join(FAMILIES)}"
        )
    return base


def _added(model: nn.Module) -> tuple[nn.Module, _Added]:
    base = _base(model)
    added = getattr(base, "_gated_lora", None)
    if added is None:
        raise ValueError("the model has no gated LoRA; add_gated_lora(model) gives it one")
    return base, added


def _plain_linear(layer: nn.Module, name: str, target: str) -> nn.Linear:
    module = getattr(getattr(layer, PROJECTIONS[target], None), target, None)
    kind = type(module)
    if kind is not nn.Linear:
        raise ValueError(f"{name} is a {kind.__module__}.{kind.__name__}; accepted is torch.nn.Linear (not quantised or wrapped; PEFT: merge_and_unload)")
    if module.weight.dtype not in DTYPES:
        raise ValueError(f"{name} is {module.weight.dtype}; accepted are {', '.join(map(str, DTYPES))}")
    if "forward" in vars(module):  # it would go on to call nn.Linear's, and the adapter would do nothing
        raise ValueError(f"{name} has a forward of its own (offloading?); accepted is nn.Linear's")
    return module


def add_gated_lora(
    model: nn.Module,
    rank: int = 128,
    alpha: float | None = None,
    targets: Sequence[str] = tuple(PROJECTIONS),
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> nn.Module:
    """Give a transformers Llama, Mistral, Qwen2 or Qwen3 model a new gated LoRA adapter, in place; returns the model.

    Pass the outermost model: its `save_pretrained` is told to leave the adapter out, and so are the checkpoints of transformers'
    Trainer: save and load `gated_lora_state_dict` beside them (with a "gate" column also set remove_unused_columns=False). (Of all it writes, only the number
    `total_parameters` in the index of a checkpoint in several files counts the adapter: it is `model.num_parameters()`.)

    rank: 1 to 512. alpha: the adapter is scaled by alpha / rank; default the rank. targets: which projections of every
    layer. seed: of A (B is zero, so a fresh adapter adds nothing). dtype: of the adapter, default each weight's.
    freeze: only the adapter requires gradients until it is removed; False leaves the model's parameters as they are.

    Raises ValueError, and changes nothing, for another family, a model that has an adapter already, an argument that is
    not accepted, and a projection that is not a plain nn.Linear.
    """
    base = _base(model)
    if getattr(base, "_gated_lora", None) is not None:
        raise ValueError("the model has a gated LoRA already; remove_gated_lora(model) takes it out")
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets or not all(isinstance(target, str) and target in PROJECTIONS for target in targets):
        raise ValueError(f"targets are {targets}; accepted are one or more of {', '.join(PROJECTIONS)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 512:
        raise ValueError(f"rank is {rank!r}; accepted are 1 to 512")
    if alpha is not None and not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise ValueError(f"alpha is {alpha!r}; accepted is a positive number, or None for the rank")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype}; accepted are {', '.join(map(str, DTYPES))}, or None for each weight's")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; accepted is an integer from 0 to 2^63 - 1")
    names = [(i, target) for i in range(len(base.layers)) for target in PROJECTIONS if target in targets]
    linears = {f"layers.{i}.{t}": _plain_linear(base.layers[i], f"layers.{i}.{PROJECTIONS[t]}.{t}", t) for i, t in names}
    if len(set(linears.values())) < len(linears):
        raise ValueError("layers share a projection; accepted is one of its own for each")

    generator = torch.Generator().manual_seed(seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if freeze and parameter.requires_grad}
    others = [m for m in model.modules() if type(m) is nn.Linear and m.bias is None and m not in linears.values()]
    handles = [m.register_forward_pre_hook(_contiguous) for m in others if freeze and m.weight.requires_grad]
    for parameter in trained.values():
        parameter.requires_grad_(False)
    for linear in linears.values():
        linear.__class__ = GatedLinear
        linear.splits = (linear.out_features,)
        linear.add_adapter(rank, alpha, dtype, generator)
    handles.append(base.register_forward_pre_hook(_before_model, with_kwargs=True))
    for layer in base.layers:
        handles.append(layer.self_attn.register_forward_pre_hook(_before_attention, with_kwargs=True))
        handles.append(layer.mlp.register_forward_hook(_close, always_call=True))
    handles.append(base.register_forward_hook(_close, always_call=True))  # after an error in between
    base._gated_lora = _Added(linears, handles, trained)
    for module, keys in _adapter_keys(model):
        module._keys_to_ignore_on_save = set(module._keys_to_ignore_on_save or ()) | keys
    return model


def remove_gated_lora(model: nn.Module) -> nn.Module:
    """Take the adapter out, in place; returns the model, all of it as it was before `add_gated_lora`.

    Raises ValueError for a model without one.
    """
    base, added = _added(model)
    for module, keys in _adapter_keys(model):
        module._keys_to_ignore_on_save = set(module._keys_to_ignore_on_save or ()) - keys
    for handle in added.handles:
        handle.remove()
    for linear in added.linears.values():
        for name in ("lora_A", "lora_B", "splits", "rank", "scale"):
            delattr(linear, name)
        for name in ("_prepared", "targets"):
            linear.__dict__.pop(name, None)
        linear.__class__ = nn.Linear
    now = dict(model.named_parameters())  # some may have been replaced meanwhile
    for name, parameter in added.trained.items():
        parameter.requires_grad_(True)
        now.get(name, parameter).requires_grad_(True)
    del base._gated_lora
    return model


def _adapter_keys(model: nn.Module) -> Iterator[tuple[nn.Module, set[str]]]:
    """Each transformers model in `model`, itself and its parts, with the adapter's names in its state dict."""
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            names = [name for name, part in module.named_modules() if isinstance(part, GatedLinear)]
            yield module, {f"{name}.{which}" for name in names for which in ("lora_A", "lora_B")}


def gated_lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, `layers.N.PROJ.lora_A` (R, in) and `lora_B` (out, R): the names in an adapter directory.

    The tensors share the parameters' storage, as those of a state dict do. Raises ValueError for a model without an adapter.
    """
    linears = _added(model)[1].linears
    return {f"{name}.{which}": getattr(linear, which).detach() for name, linear in linears.items() for which in ("lora_A", "lora_B")}


def load_gated_lora_state_dict(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `gated_lora_state_dict` into the model's adapter.

    Raises ValueError, and changes nothing, for missing or unknown names, other shapes, or a model without an adapter.
    """
    mine = gated_lora_state_dict(model)
    missing, unknown = sorted(set(mine) - set(tensors)), sorted(set(tensors) - set(mine))
    if missing or unknown:
        raise ValueError(f"the tensors do not fit the model's adapter: missing {missing[:4]}, unknown {unknown[:4]}")
    for name, tensor in tensors.items():
        if tensor.shape != mine[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted is the adapter's, {tuple(mine[name].shape)}")
    for name, tensor in tensors.items():
        mine[name].copy_(tensor)


def load_gated_lora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Give the model the gated LoRA of an adapter, with its rank, alpha and targets; its masks and sampler are left out.

    directory: what `load_adapter` takes. Raises ValueError, and changes nothing, as `load_adapter` and `add_gated_lora` do, and for an adapter of other sizes.
    """
    adapter = load_adapter(directory)
    add_gated_lora(model, adapter.config.rank, adapter.config.alpha, adapter.config.target_modules)
    try:
        load_gated_lora_state_dict(model, {name: tensor for name, tensor in adapter.tensors.items() if "lora_" in name})
    except ValueError:
        remove_gated_lora(model)
        raise
    return model


@contextmanager
def gate(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Inside, every pass of `model` in this thread applies its adapter to `rows` (see the module's text).

    An inner context, or the argument `gate=` of the model itself, takes precedence. Rows are those of one pass: with a
    cache, of its new tokens. A pass whose shape the gate does not fit raises ValueError in its first layer. The context is the thread's:
    do not await in it.
    Raises ValueError for a model without an adapter or another kind of gate.
    """
    base = _added(model)[0]
    _check_kind(rows)
    state, mine = _thread.state, (base, rows)
    state.asked = (mine, *state.asked)
    try:
        yield
    finally:
        state.asked = tuple(each for each in state.asked if each is not mine)


def _check_kind(rows: Rows) -> None:
    if isinstance(rows, Tensor):
        if rows.dtype is torch.bool:
            return
        rows = f"a tensor of {rows.dtype}"
    elif rows is None or rows is True or (isinstance(rows, int) and not isinstance(rows, bool) and rows >= 0):
        return
    raise ValueError(
        f"gate is {rows}; accepted are a boolean tensor of shape (batch, sequence), an int from 0 for a batch of one, True for all rows, or None"
    )


def _contiguous(module: nn.Module, args: tuple) -> tuple:
    """For a matrix frozen here, which is lm_head above all: torch takes another routine for a product with a strided input
    (the last rows of several sequences, say) when the weight requires no gradient, and its sums differ in the last bit."""
    return (args[0].contiguous(), *args[1:]) if args else args


def _before_model(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if "gate" not in kwargs:
        for model, rows in _thread.state.asked:
            if model is base:
                return args, kwargs | {"gate": rows}
    return None


def _before_attention(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    rows = kwargs.pop("gate", None)
    hidden = args[0] if args else kwargs["hidden_states"]
    _check_kind(rows)
    batch, sequence = hidden.shape[:2]
    if isinstance(rows, Tensor):
        if rows.shape != (batch, sequence):
            raise ValueError(f"gate has shape {tuple(rows.shape)}; accepted is this pass's (batch, sequence) = {(batch, sequence)}")
        rows = rows.to(hidden.device)
    elif rows is True:
        rows = 0
    elif rows is not None:
        if batch != 1 or rows > sequence:
            raise ValueError(
                f"gate is {rows} and the pass has {batch} sequences of {sequence} rows; accepted is an int for one sequence, "
                f"up to its number of rows, or a boolean tensor of shape {(batch, sequence)}"
            )
        rows = rows if rows < sequence else None
    _thread.state.gate = rows
    return args, kwargs


def _close(module: nn.Module, args: tuple, output: object) -> None:
    _thread.state.gate = None
