"""python -m mtp_model {train, generate}"""

import argparse
import sys
from pathlib import Path

import torch

from mtp_model.checkpoint import load_adapter, load_model
from mtp_model.config import MTPConfig
from mtp_model.data import read_examples
from mtp_model.decode import Decoding
from mtp_model.demo import ADAPTER, BASE
from mtp_model.layout import MODES
from mtp_model.train import TrainConfig, Trainer, field_defaults

IMPLEMENTATIONS = ("triton", "reference")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, else float32."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def load_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=BASE, metavar="DIR", help="Hugging Face directory, Llama family (default: the demo model)")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU that has it, else float32")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: triton on a GPU, reference on a CPU")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtp_model", description="Train multi-token adapters and decode with them.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="train an adapter (masks, gated LoRA, sampler) for a frozen model",
        description="Train an adapter (masks, gated LoRA, sampler) for a frozen model of the Llama family.\n\n"
        "Data are JSON lines, each one of\n"
        '  {"prompt": ..., "response": ...}\n'
        '  {"messages": [{"role": ..., "content": ...}, ...]}   through the tokenizer\'s chat template\n'
        '  {"text": ...}\n'
        '  {"prompt_ids": [...], "response_ids": [...]}         tokens as they are\n\n'
        "OUT receives the adapter (adapter_model.safetensors, adapter_config.json), checkpoint.safetensors\n"
        "and log.jsonl. Ctrl-C saves and stops; --resume goes on to the same result.",
    )
    add_model_arguments(train)
    train.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="JSON-lines files")
    train.add_argument("--out", type=Path, required=True, metavar="OUT", help="directory to write")
    train.add_argument("--resume", action="store_true", help="continue the run in OUT; its settings must be the same")
    train.add_argument("--masks", type=int, default=8, metavar="K", help="masks per block, 1 to 16 (default 8)")
    train.add_argument("--rank", type=int, default=128, help="LoRA rank, 1 to 512 (default 128)")
    train.add_argument("--alpha", type=float, help="LoRA is scaled by alpha / rank (default: the rank)")
    train.add_argument("--no-sampler", action="store_true", help="train no sampler head")
    train.add_argument("--max-length", type=int, default=1024, help="longer sequences are cut into several (default 1024)")
    helps = {
        "steps": "optimizer steps",
        "batch_size": "sequences per pass",
        "accumulate": "passes per step",
        "lr": "AdamW's learning rate, after warm-up",
        "warmup": "steps to reach it",
        "decay": "share of the steps, at the end, over which it falls to zero",
        "weight_decay": "AdamW's",
        "clip": "bound of the gradient norm",
        "anchors_per_sequence": "masks after a random subset of that many positions (default: all)",
        "lcm_weight": "weight of the consistency loss",
        "mask_decay": "mask j weighs mask_decay ** (j - 1)",
        "train_masks": "learn the masks' embeddings too",
        "seed": "of the adapter's start, the order of data, the anchors",
        "save_every": "steps between checkpoints",
        "log_every": "steps between log lines",
    }
    for name, default in field_defaults().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            train.add_argument(flag, action="store_true", help=helps[name])
        else:
            kind = int if default is None else type(default)
            shown = "" if default is None else f" (default {default})"
            train.add_argument(flag, type=kind, default=default, help=helps[name] + shown)

    write = commands.add_parser("generate", help="continue a prompt")
    add_model_arguments(write)
    write.add_argument("--adapter", type=Path, default=ADAPTER, metavar="DIR", help="default: the demo adapter")
    write.add_argument("--mode", choices=MODES, default="quadratic")
    write.add_argument("--k", type=int, help="masks per block (default: the adapter's)")
    write.add_argument("--max-new-tokens", type=int, default=100)
    write.add_argument("--draft-candidates", type=int, metavar="C", help="tokens that the sampler chooses from for each mask (default: all)")
    write.add_argument("prompt", help="text to continue; - reads standard input")
    return parser


def run_train(args) -> int:
    device, dtype = args.device, DTYPES[args.dtype or default_dtype(args.device)]
    config = TrainConfig(**{name: getattr(args, name) for name in field_defaults()})
    mtp = MTPConfig(args.masks, args.rank, args.alpha, not args.no_sampler)
    model = load_model(args.model, device=device, dtype=dtype, implementation=args.implementation)
    tokenizer = load_tokenizer(args.model)
    eos = model.config.eos_token_ids[0] if model.config.eos_token_ids else None
    examples = read_examples(args.data, tokenizer, max_length=args.max_length, vocab_size=model.config.vocab_size, eos=eos)
    notes = {"data": [path.name for path in args.data], "max_length": args.max_length, "dtype": str(dtype).split(".")[1]}
    trainer = Trainer(model, examples, mtp, config, args.out, resume=args.resume, notes=notes)
    print(f"{len(examples)} sequences, {sum(int(e.answer.sum()) for e in examples)} answer tokens; "
          f"{sum(p.numel() for p in trainer.parameters.values()) / 1e6:.2f} M parameters to train on {device} in {dtype}")  # fmt: skip
    if trainer.run():
        print(f"done: {config.steps} steps, adapter in {args.out}")
        return 0
    print(f"stopped after step {trainer.step} of {config.steps}; --resume continues")
    return 130


def run_generate(args) -> int:
    dtype = DTYPES[args.dtype or default_dtype(args.device)]
    model = load_model(args.model, device=args.device, dtype=dtype, implementation=args.implementation)
    if args.mode != "autoregressive":
        load_adapter(args.adapter).apply(model)
    tokenizer = load_tokenizer(args.model)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = tokenizer(prompt)["input_ids"]
    decoding = Decoding(model, [ids], mode=args.mode, k=args.k, max_new_tokens=args.max_new_tokens, draft_candidates=args.draft_candidates)
    written = ""
    for _ in decoding:
        text = tokenizer.decode(decoding.tokens[0])
        if not text.endswith("\ufffd"):  # a character may be spread over tokens
            print(text[len(written) :], end="", flush=True)
            written = text
    print()
    print(f"{decoding.stats.tokens_per_step:.2f} tokens per step, {sum(decoding.stats.tokens)} tokens", file=sys.stderr)
    return 0


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return {"train": run_train, "generate": run_generate}[args.command](args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
