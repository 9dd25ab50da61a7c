"""python -m mtp_model {train, answers, choose, generate, plot}"""

import argparse
import os
import sys
from pathlib import Path

from mtp_model import answers, choose, plot
from mtp_model.arguments import (
    add_lookup_arguments,
    add_model_arguments,
    add_sampling_arguments,
    load_asked_model,
    load_tokenizer,
    lookup_options,
    refuse_masks,
    sampling_options,
)
from mtp_model.checkpoint import Adapter, load_adapter
from mtp_model.decode import Decoding
from mtp_model.demo import ADAPTER, BASE
from mtp_model.layout import MODES
from mtp_model.records import encode_prompt
from mtp_model.train import TrainingFailed, command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtp_model", description="Train multi-token adapters and decode with them.")
    commands = parser.add_subparsers(dest="command", required=True)
    command.add_arguments(
        commands.add_parser(
            "train", formatter_class=argparse.RawDescriptionHelpFormatter, description=command.DESCRIPTION,
            help="train an adapter (masks, gated LoRA, sampler) for a frozen model",
        )
    )  # fmt: skip

    write = commands.add_parser("answers", help="write a model's own answers to the prompts of a data set, to train on")
    add_model_arguments(write)
    answers.add_arguments(write)

    pick = commands.add_parser("choose", help="measure which mode and how many masks decode fastest on this machine")
    add_model_arguments(pick)
    choose.add_arguments(pick)

    plot.add_arguments(commands.add_parser("plot", help="draw the curves of one or several training runs"))

    speak = commands.add_parser("generate", help="continue a prompt")
    add_model_arguments(speak)
    speak.add_argument("--adapter", type=Path, metavar="DIR", help="directory, or owner/name on the Hub (default: the demo adapter, for the demo model)")
    speak.add_argument("--mode", choices=MODES, help="default: linear with 2 masks on a CPU, quadratic on a GPU; `choose` measures which is fastest")
    speak.add_argument("--k", type=int, help="masks per block (default: the adapter's)")
    speak.add_argument("--max-new-tokens", type=int, default=100)
    speak.add_argument("--draft-candidates", type=int, metavar="C", help="tokens that the sampler chooses from (default: 64 of a large vocabulary, else all)")
    add_lookup_arguments(speak)
    add_sampling_arguments(speak)
    speak.add_argument("--seed", type=int, help="of what is drawn: the same seed, the same text, in every mode (default: another each time)")
    speak.add_argument("--chat", action="store_true", help="the prompt is a user's message, put through the tokenizer's chat template")
    speak.add_argument("prompt", help="text to continue; - reads standard input")
    return parser


def asked_adapter(args) -> Adapter:
    if args.adapter is None and args.model != BASE:
        raise ValueError(f"--model is {args.model} and no --adapter was given; accepted is one that was trained for it")
    return load_adapter(args.adapter or ADAPTER)


def run_answers(args) -> int:
    model = load_asked_model(args)
    if args.adapter:
        load_adapter(args.adapter).apply(model)
    return answers.run(args, model, load_tokenizer(args.model))


def run_choose(args) -> int:
    return choose.run(args, asked_adapter(args).apply(load_asked_model(args)), load_tokenizer(args.model))


def run_generate(args) -> int:
    options = sampling_options(args) | lookup_options(args)
    refuse_masks(args.mode, args.k)
    model = load_asked_model(args)
    if args.adapter or args.mode != "autoregressive":
        asked_adapter(args).apply(model)
    tokenizer = load_tokenizer(args.model)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = encode_prompt({"messages": [{"role": "user", "content": prompt}]} if args.chat else {"prompt": prompt}, tokenizer, 0)
    decoding = Decoding(
        model, [ids], mode=args.mode, k=args.k, max_new_tokens=args.max_new_tokens, draft_candidates=args.draft_candidates, seed=args.seed, **options
    )
    written = text = ""
    for _ in decoding:
        tokens = decoding.tokens[0]
        text = tokenizer.decode(tokens[:-1] if tokens[-1] in decoding.eos else tokens)
        if not text.endswith("\ufffd"):  # a character may be spread over tokens
            print(text[len(written) :], end="", flush=True)
            written = text
    print(text[len(written) :])
    seed = f", seed {decoding.seeds[0]}" if args.temperature else ""
    print(f"{decoding.stats.tokens_per_step:.2f} tokens per step, {sum(decoding.stats.tokens)} tokens{seed}", file=sys.stderr)
    return 0


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    runs = {"train": command.run, "answers": run_answers, "choose": run_choose, "generate": run_generate, "plot": plot.run}
    try:
        return runs[args.command](args)
    except BrokenPipeError:  # what was printed has no reader any more, as before `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
