"""Write training data and held-out prompts for the demo adapter from the demo corpus.

    python -m mtp_model.demo.answers --model runs/base --out runs/data

`source.jsonl`: windows of the training files as they are. `answers.jsonl`: the frozen model's own greedy continuations of
random places in the training files, the text that the adapter will have to foresee. `heldout.jsonl`: prompts from held-out
files, each starting at the start of a line.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mtp_model.answers import AnswerOptions, write_answers
from mtp_model.arguments import default_device, device_name
from mtp_model.checkpoint import load_model
from mtp_model.demo.base import encode
from mtp_model.demo.corpus import read_corpus


def held_out_prompts(tokenizer, held_out: dict[str, str], count: int, length: int, seed: int) -> list[dict]:
    """`count` prompts of `length` tokens from different places, spread evenly over the held-out files."""
    generator = np.random.default_rng(seed)
    names = generator.permutation(sorted(name for name, text in held_out.items() if len(text) > 2000))
    prompts = []
    for i in range(20 * count):  # rounds over the files, until there are enough
        if len(prompts) == count:
            break
        name = str(names[i % len(names)])
        lines = held_out[name].splitlines(keepends=True)
        first = int(generator.integers(0, max(1, len(lines) - 30)))
        ids = tokenizer("".join(lines[first : first + 60]))["input_ids"][:length]
        text = tokenizer.decode(ids)
        known = any(p["prompt"] == text for p in prompts)
        if len(ids) == length and tokenizer(text)["input_ids"] == ids and not known:
            prompts.append({"file": name, "line": first + 1, "prompt": text})
    return prompts


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mtp_model.demo.answers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12_000, help="continuations to write")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts to pick from")
    parser.add_argument("--prompt-length", type=int, default=96, help="tokens of a held-out prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", type=device_name, default=default_device(), help="default: %(default)s")
    args = parser.parse_args(argv)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, held_out = read_corpus()
    data = encode(tokenizer, train.values())
    generator = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    with open(args.out / "heldout.jsonl", "w", encoding="utf-8") as file:
        for record in held_out_prompts(tokenizer, held_out, args.prompts, args.prompt_length, args.seed):
            file.write(json.dumps(record) + "\n")

    with open(args.out / "source.jsonl", "w", encoding="utf-8") as file:
        for start in generator.integers(0, len(data) - 256, size=args.count).tolist():
            file.write(json.dumps({"prompt_ids": data[start : start + 32].tolist(), "response_ids": data[start + 32 : start + 256].tolist()}) + "\n")

    model = load_model(args.model, device=args.device, dtype=torch.float32)
    prompts = []
    for number in range(-(-args.count // args.batch)):
        generator = np.random.default_rng([args.seed, number])
        length = int(generator.integers(24, 161))  # one length per batch keeps its cache aligned
        starts = generator.integers(0, len(data) - length, size=args.batch)
        prompts += [data[s : s + length].tolist() for s in starts]
    options = AnswerOptions(args.batch, max_new_tokens=args.new_tokens)
    with tqdm(total=len(prompts), desc="answers", unit="prompt") as bar:
        for count in write_answers(model, prompts, args.out / "answers.jsonl", options):
            bar.update(count - bar.n)


if __name__ == "__main__":
    main()
