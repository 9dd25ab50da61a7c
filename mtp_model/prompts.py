"""Prompts, from files of the forms that training data has."""

from collections.abc import Iterable
from pathlib import Path

from mtp_model.data import encode_prompt, records


def read_prompts(
    paths: Iterable[str | Path], tokenizer, *, vocab_size: int, text_tokens: int = 32, limit: int | None = None
) -> list[list[int]]:
    """The first `limit` prompts (default: all) of JSON-lines or .parquet files, as token ids.

    Of {"prompt"} and {"prompt_ids"} that; of {"messages"} all of them, without an assistant turn at the end, with the chat template's
    opening of an answer; of {"text"} the first `text_tokens` tokens. Raises ValueError with file and line number for another form, an
    empty prompt or ids outside the vocabulary, and if there is none at all.
    """
    if text_tokens < 1 or limit is not None and limit < 1:
        raise ValueError(f"text_tokens is {text_tokens} and limit {limit}; accepted are 1 or more")
    prompts: list[list[int]] = []
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        for where, record in records(path):
            try:
                ids = encode_prompt(record, tokenizer, text_tokens)
                if not ids or min(ids) < 0 or max(ids) >= vocab_size:
                    raise ValueError(f"the prompt's token ids are {ids[:8]}...; accepted are one or more from 0 to {vocab_size - 1}")
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            prompts.append(ids)
            if len(prompts) == limit:
                return prompts
    if not prompts:
        raise ValueError(f"no prompt in {', '.join(map(str, paths))}")
    return prompts
