"""The command line of a training run."""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from mtp_model.arguments import add_model_arguments, load_asked_model, load_tokenizer
from mtp_model.checkpoint import Adapter, load_adapter
from mtp_model.config import PROJECTIONS, MTPConfig
from mtp_model.data import Examples, read_examples
from mtp_model.records import read_prompts
from mtp_model.train.config import TrainConfig
from mtp_model.train.parallel import World
from mtp_model.train.trainer import Trainer, check_out
from mtp_model.train.watch import Evaluation

DESCRIPTION = """Train an adapter (masks, gated LoRA, sampler) for a frozen model (Llama, Mistral, Qwen).

Data are JSON lines or parquet, each line or row one of
  {"prompt": ..., "response": ...}
  {"messages": [{"role": ..., "content": ...}, ...]}   through the tokenizer's chat template
  {"text": ...}
  {"prompt_ids": [...], "response_ids": [...]}         tokens as they are (`python -m mtp_model answers` writes them)

OUT receives the adapter (adapter_model.safetensors, adapter_config.json), checkpoint.safetensors
and log.jsonl. Ctrl-C saves and stops; --resume goes on to the same result.

On several devices: torchrun --nproc-per-node N -m mtp_model.train, with the same arguments."""

HELPS = {
    "steps": "optimizer steps",
    "batch_size": "sequences per pass, of all processes together",
    "accumulate": "passes per step",
    "lr": "AdamW's learning rate, after warm-up",
    "warmup": "steps to reach it (default: a tenth of the steps)",
    "decay": "share of the steps, at the end, over which it falls to zero",
    "weight_decay": "AdamW's",
    "clip": "bound of the gradient norm",
    "anchors_per_sequence": "masks after a random subset of that many positions (default: all)",
    "drop_masks": "share of the passes that train only the first masks, a random number of them",
    "lcm_weight": "weight of the consistency loss",
    "mask_decay": "mask j weighs mask_decay ** (j - 1)",
    "soft_targets": "share of the frozen model's own next-token distribution in the targets",
    "train_masks": "learn the masks' embeddings too",
    "pack_length": "put documents together into sequences of up to that many tokens (default: one each)",
    "buckets": "make batches of sequences of like length",
    "recompute": "activation checkpointing: less memory, more time",
    "seed": "of the adapter's start, the order of data, the anchors",
    "save_every": "steps between checkpoints",
    "log_every": "steps between log lines",
}

ADAPTER = {"masks": 8, "rank": 128, "alpha": None, "target_modules": PROJECTIONS, "no_sampler": False, "ungated": False}  # without --adapter
EVALUATION = {"eval_every": 500, "eval_prompts": 32, "eval_new_tokens": 100}  # what they are with --eval-data alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lines (or .parquet) files")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="directory to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT, if it holds one; its settings must be the same")
    parser.add_argument("--max-length", type=int, help="longer sequences are cut into several (default --pack-length or 1024, at most what the model has)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep the tokens in this directory instead of in memory")
    parser.add_argument("--skip-broken", action="store_true", help="leave out lines that cannot be read, and report them")
    adapter = parser.add_argument_group("the adapter")
    adapter.add_argument("--adapter", type=Path, metavar="DIR", help="train this one further, a directory or owner/name on the Hub, instead of a new one")
    adapter.add_argument("--masks", type=int, metavar="K", help="masks per block, 1 to 16 (default 8)")
    adapter.add_argument("--rank", type=int, help="LoRA rank, 1 to 512 (default 128)")
    adapter.add_argument("--alpha", type=float, help="LoRA is scaled by alpha / rank (default: the rank)")
    adapter.add_argument("--target-modules", nargs="+", metavar="NAME", help=f"of {', '.join(PROJECTIONS)} (default: all)")
    adapter.add_argument("--no-sampler", action="store_true", default=None, help="train no sampler head")
    adapter.add_argument("--ungated", action="store_true", default=None, help="ordinary LoRA, which changes the model itself; for comparison")
    held_out = parser.add_argument_group("held-out evaluation, by real decoding")
    held_out.add_argument("--eval-data", type=Path, nargs="+", metavar="FILE", help="prompts, in the same forms as data; their answers are not used")
    held_out.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations (default 500)")
    held_out.add_argument("--eval-prompts", type=int, metavar="N", help="how many of the prompts (default 32)")
    held_out.add_argument("--eval-new-tokens", type=int, metavar="N", help="tokens written for each (default 100)")
    parser.add_argument("--shard", action="store_true", help="under torchrun: leave each process a part of the model (FSDP2) instead of all of it")
    recipe = parser.add_argument_group("the recipe")
    for field in dataclasses.fields(TrainConfig):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            recipe.add_argument(flag, action="store_true", help=HELPS[field.name])
        else:
            kind = int if default is None else type(default)
            shown = "" if default is None else f" (default {default})"
            recipe.add_argument(flag, type=kind, default=default, help=HELPS[field.name] + shown)


def _flags(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the flags that were given."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def run(args: argparse.Namespace) -> int:
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    given = _flags(args, ADAPTER)
    if given and args.adapter:
        raise ValueError(f"{' and '.join(given)} with --adapter {args.adapter}, which has its own; accepted is one of the two")
    masks, rank, alpha, targets, no_sampler, ungated = (default if getattr(args, name) is None else getattr(args, name) for name, default in ADAPTER.items())
    mtp = load_adapter(args.adapter) if args.adapter else MTPConfig(masks, rank, alpha, not no_sampler, tuple(targets), not ungated)
    given = _flags(args, EVALUATION)
    if given and not args.eval_data:
        raise ValueError(f"{' and '.join(given)} without --eval-data; accepted is --eval-data with it")
    world, args.device = World.start(args.device)
    try:
        return _run(args, config, mtp, world)
    finally:
        world.close()


def _run(args: argparse.Namespace, config: TrainConfig, mtp: MTPConfig | Adapter, world: World) -> int:
    if args.shard and world.size == 1:
        raise ValueError("--shard is of several processes; start them with torchrun --nproc-per-node N -m mtp_model.train")
    if world.rank == 0:
        check_out(args.out, args.resume)
    shard = args.device if args.shard else None
    model = load_asked_model(args, "cpu" if shard else None)  # a model that is to be sharded may not fit one device
    if isinstance(mtp, Adapter):
        mtp.check_base(model)  # before the data are read
    tokenizer = load_tokenizer(args.model)
    dtype = str(model.dtype).split(".")[1]
    eos, longest = model.config.eos_token_ids[0] if model.config.eos_token_ids else None, model.config.max_position_embeddings
    max_length = min(args.pack_length or 1024, longest) if args.max_length is None else args.max_length
    if max_length > longest:
        raise ValueError(f"max_length is {max_length}; accepted is up to the {longest} that the model was made for")

    def read() -> Examples:
        return read_examples(
            args.data, tokenizer, max_length=max_length, vocab_size=model.config.vocab_size, eos=eos,
            skip_broken=args.skip_broken, store=args.store, progress=world.rank == 0,
        )  # fmt: skip

    evaluation = None
    if args.eval_data:
        every, limit, new_tokens = (value if getattr(args, name) is None else getattr(args, name) for name, value in EVALUATION.items())
        prompts = read_prompts(args.eval_data, tokenizer, vocab_size=model.config.vocab_size, limit=limit)
        evaluation = Evaluation(tuple(map(tuple, prompts)), every, max_new_tokens=new_tokens)
    examples = world.one_by_one(read) if args.store else read()
    notes = {"data": [path.name for path in args.data], "max_length": max_length, "dtype": dtype}
    trainer = Trainer(model, examples, mtp, config, args.out, resume=args.resume, notes=notes, evaluation=evaluation, world=world, shard=shard)
    if world.rank == 0:
        where = args.device if world.size == 1 else f"{world.size} processes{' (sharded)' if shard else ''}"
        print(f"{len(examples)} sequences, {examples.answers} answer tokens, {100 * trainer.batches.efficiency:.0f} % of a batch tokens, the rest padding; "
              f"{sum(p.numel() for p in trainer.parameters.values()) / 1e6:.2f} M parameters to train on {where} in {dtype}")  # fmt: skip
    finished = trainer.run()
    if world.rank == 0:
        print(f"done: {config.steps} steps, adapter in {args.out}" if finished else f"stopped after step {trainer.step} of {config.steps}; --resume continues")
    return 0 if finished else 130
