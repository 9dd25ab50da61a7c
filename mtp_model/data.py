"""Training data: JSON lines to token sequences that know which of their tokens are answers.

Each line is one of

    {"prompt": "...", "response": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"text": "..."}                                              every token is an answer
    {"prompt_ids": [1, 2], "response_ids": [3, 4]}               tokens as they are, e.g. a model's own continuation

Messages go through the tokenizer's chat template. End-of-text is appended to responses and texts.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FORMS = '{"prompt", "response"}, {"messages"}, {"text"} or {"prompt_ids", "response_ids"}'


@dataclass(frozen=True)
class Example:
    """ids: (n,) int32. answer: (n,) bool, the tokens that bear a loss as labels."""

    ids: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class Batch:
    """ids (L, B) int64, padded with 0 at the end; answer (L, B) bool, False in the padding; lengths (B,)."""

    ids: Tensor
    answer: Tensor
    lengths: Tensor


def _pieces(record: dict, tokenizer, end: list[int]) -> list[tuple[list[int], bool]]:
    """A record as (ids, is_answer) pieces in order."""

    def encode(text, special: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"found a {type(text).__name__} where text is expected")
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    if "prompt_ids" in record and "response_ids" in record:
        for name in ("prompt_ids", "response_ids"):
            if not isinstance(record[name], list) or not all(type(t) is int for t in record[name]):
                raise ValueError(f"{name} is not a list of integers")
        return [(record["prompt_ids"], False), (record["response_ids"], True)]
    if "prompt" in record and "response" in record:
        return [(encode(record["prompt"], special=True), False), (encode(record["response"]) + end, True)]
    if "text" in record:
        return [(encode(record["text"], special=True) + end, True)]
    if "messages" in record:
        messages = record["messages"]
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError('found "messages", but the tokenizer has no chat template')
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages):
            raise ValueError('"messages" must be a list of {"role", "content"}')
        pieces, done = [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError("the chat template rewrites earlier turns, so answers cannot be told from prompts")
            pieces += [(encode(before[len(done) :]), False), (encode(after[len(before) :]), True)]
            done = after
        if not pieces:
            raise ValueError('"messages" has no assistant turn')
        return pieces
    raise ValueError(f"found keys {sorted(record)}; accepted are {FORMS}")


def read_examples(
    paths: Iterable[str | Path], tokenizer, *, max_length: int, vocab_size: int, eos: int | None = None
) -> list[Example]:
    """Read JSON-lines files. A sequence longer than `max_length` tokens is cut into several that are not.

    Pieces without an answer token to predict are dropped. Raises ValueError with file and line number for a line that is
    none of the accepted forms or has ids outside the vocabulary, and if nothing at all remains.
    """
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}; accepted is 3 or more")
    end = [] if eos is None else [eos]
    examples: list[Example] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"found a {type(record).__name__}; accepted are {FORMS}")
                    pieces = _pieces(record, tokenizer, end)
                    ids = np.array([t for piece, _ in pieces for t in piece], dtype=np.int32)
                    if len(ids) and not (0 <= ids.min() and ids.max() < vocab_size):
                        raise ValueError(f"token ids reach {ids.max()}; the model's vocabulary has {vocab_size}")
                except (ValueError, TypeError, OverflowError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                answer = np.array([a for piece, a in pieces for _ in piece], dtype=bool)
                for i in range(0, len(ids), max_length):
                    example = Example(ids[i : i + max_length], answer[i : i + max_length])
                    if example.answer[2:].any():
                        examples.append(example)
    if not examples:
        raise ValueError(f"no sequence with an answer to predict in {', '.join(map(str, paths))}")
    return examples


def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """Which examples make batch number `step`: consecutive ones of a stream of shuffled epochs. Depends on nothing else."""
    picked, orders = [], {}
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(n)
        picked.append(int(orders[epoch][offset]))
    return picked


def collate(examples: list[Example], device: torch.device | str = "cpu") -> Batch:
    """Pad examples to the longest."""
    length = max(len(e.ids) for e in examples)
    ids = torch.zeros(length, len(examples), dtype=torch.int64)
    answer = torch.zeros(length, len(examples), dtype=torch.bool)
    for b, example in enumerate(examples):
        ids[: len(example.ids), b] = torch.from_numpy(example.ids.astype(np.int64))
        answer[: len(example.ids), b] = torch.from_numpy(example.answer)
    lengths = torch.tensor([len(e.ids) for e in examples])
    return Batch(ids.to(device), answer.to(device), lengths.to(device))
