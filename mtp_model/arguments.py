"""What the command lines share: which model, on what device, in what dtype."""

import argparse
from pathlib import Path

import torch

from mtp_model.checkpoint import load_model
from mtp_model.decode import sampling_of
from mtp_model.demo import BASE
from mtp_model.hub import TOKENIZER, local_directory
from mtp_model.layout import MODES
from mtp_model.lookup import lookup_of
from mtp_model.model import MTPModel

IMPLEMENTATIONS = ("triton", "reference")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_name(text: str) -> str:
    """An argument that names a device of this machine."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device for this; accepted are cpu, cuda, cuda:1 and their like")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} is asked for and torch {torch.__version__} finds no GPU; accepted here is cpu")
    return text


def positive(text: str) -> int:
    """An argument that is an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted is an integer from 1")
    return int(text)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, else float32."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def load_tokenizer(directory: str | Path):
    """transformers' tokenizer of what `load_model` opens. Raises ValueError naming the directory."""
    from transformers import AutoTokenizer

    directory = local_directory(directory, TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # of many kinds, and few name a file
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"{directory} has no tokenizer that transformers can load ({why}); accepted is a directory with a tokenizer.json") from None


def refuse_masks(mode: str, k: int | None) -> None:
    """Raises ValueError for a number of masks in a mode without them."""
    if mode == MODES[0] and k is not None:
        raise ValueError(f"--k is {k} and mode {mode!r} has no masks; accepted is another --mode, or no --k")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=BASE, metavar="DIR",
        help="Hugging Face directory, or owner/name or owner/name@revision on the Hub: Llama, Mistral or Qwen (default: the demo model)",
    )  # fmt: skip
    parser.add_argument("--device", type=device_name, default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU that has it, else float32")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: triton on a GPU, reference on a CPU")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="draw tokens, from softmax(logits / T) (default 0: greedy)")
    parser.add_argument("--top-k", type=int, metavar="N", help="of the N most likely alone")
    parser.add_argument("--top-p", type=float, metavar="P", help="of the fewest most likely alone whose probabilities add up to P")
    parser.add_argument("--min-p", type=float, metavar="P", help="of those alone that have at least P times the most likely one's probability")


def sampling_options(args: argparse.Namespace) -> dict:
    """What `Decoding` takes, of `add_sampling_arguments`' arguments; refused as it would."""
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
    sampling_of(**options)
    return options


def add_lookup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lookup", type=int, metavar="N", help="copy N tokens as drafts from where the text's newest tokens stood before (default: none)")
    parser.add_argument("--lookup-match", type=int, metavar="N", help="how many of the newest tokens, with --lookup (default 2)")


def lookup_options(args: argparse.Namespace) -> dict:
    """What `Decoding` takes, of `add_lookup_arguments`' arguments; refused as it would."""
    lookup_of(args.lookup, args.lookup_match)
    return {"lookup": args.lookup, "lookup_match": args.lookup_match}


def load_asked_model(args: argparse.Namespace, device: str | None = None) -> MTPModel:
    """The model that `add_model_arguments`' arguments name; device: where to put it, if not where they say."""
    dtype = DTYPES[args.dtype or default_dtype(args.device)]
    return load_model(args.model, device=device or args.device, dtype=dtype, implementation=args.implementation)
