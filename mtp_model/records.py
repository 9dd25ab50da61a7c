"""Records of training data and prompts, as they lie in files: JSON lines or parquet.

Each line (parquet: row) is one of

    {"prompt": "...", "response": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"text": "..."}                                              every token is an answer
    {"prompt_ids": [1, 2], "response_ids": [3, 4]}               tokens as they are, e.g. a model's own continuation

Messages go through the tokenizer's chat template; a content may be a list of {"type": "text", "text": "..."}. Where the template writes
earlier answers otherwise once a turn follows, as Qwen 3's does without their thoughts, the conversation up to each such answer is a
sequence of its own, for so the model reads it when it answers. Of several of these forms in one record the first of

    {"prompt_ids", "response_ids"}, {"prompt", "response"}, {"text"}, {"messages"}, a bare "prompt_ids", a bare "prompt"

counts, as training data and as a prompt; the last two are prompts alone. Other keys and nulls are ignored. End-of-text is appended to
responses and texts that do not end with it. Files are read one line at a time.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

FORMS = '{"prompt", "response"}, {"messages"}, {"text"} or {"prompt_ids", "response_ids"}'
KEYS = ("prompt", "response", "messages", "text", "prompt_ids", "response_ids")


def _plain(message: dict) -> dict:
    """A message with its content's text parts put together: many templates know text only."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError('a list as "content" must be of {"type": "text", "text"}')
    return message | {"content": "".join(part["text"] for part in content)}


def _text(text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"found a {type(text).__name__} where text is expected")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ValueError(f"found text that is not Unicode: {error}") from None
    return text


def _encode(tokenizer, text, special: bool = False) -> list[int]:
    return tokenizer(_text(text), add_special_tokens=special)["input_ids"]


def _encode_parts(tokenizer, texts: Iterable[str], special: bool = False) -> list[list[int]]:
    """The tokens of texts that follow one another, each begun as the tokenizer ends what stands before it; so the first ones are those of a
    prompt by itself, and the last ones what follows it in the whole (some tokenizers begin every text that they are given with a space). A text
    whose first token would reach back into the one before is tokenized as at the beginning of a line."""
    parts, before, ids = [], "", []
    for text in map(_text, texts):
        whole = _encode(tokenizer, before + text, special)
        if whole[: len(ids)] == ids:
            parts.append(whole[len(ids) :])
            before, ids = before + text, whole
        else:
            special, line = False, _encode(tokenizer, "\n")
            before, ids = "\n" + text, _encode(tokenizer, "\n" + text)
            if ids[: len(line)] != line:  # it begins with spaces
                before, line, ids = text, [], _encode(tokenizer, text)
            parts.append(ids[len(line) :])
    return parts


def _chat(record: dict, tokenizer):
    """The messages of a record, and a function that renders some of them."""
    from jinja2 import TemplateError

    messages = record["messages"]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError('found "messages", but the tokenizer has no chat template')
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in messages):
        raise ValueError('"messages" must be a list of {"role", "content"}')

    def render(messages: list[dict], **options) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:  # a template's own refusal, e.g. of roles that do not alternate
            raise ValueError(f"the chat template says: {error}") from None

    return [_plain(message) for message in messages], render


def _ids(record: dict, name: str) -> list[int]:
    if not isinstance(record[name], list) or not all(type(t) is int and abs(t) < 2**63 for t in record[name]):
        raise ValueError(f"{name} is not a list of token ids, integers")
    return record[name]


def _form(record: dict) -> str | None:
    """Which of the forms counts: the key of its prompt."""
    for keys in (("prompt_ids", "response_ids"), ("prompt", "response"), ("text",), ("messages",)):
        if all(key in record for key in keys):
            return keys[0]
    return None


def encode_sequences(record: dict, tokenizer, end: list[int]) -> list[list[tuple[list[int], bool]]]:
    """A record as sequences, mostly one, of (ids, is_answer) pieces in order."""

    def ended(ids: list[int]) -> list[int]:
        return ids if ids[-1:] == end else ids + end

    form = _form(record)
    if form == "prompt_ids":
        return [[(_ids(record, "prompt_ids"), False), (_ids(record, "response_ids"), True)]]
    if form == "prompt":
        prompt, response = _encode_parts(tokenizer, (record["prompt"], record["response"]), special=True)
        return [[(prompt, False), (ended(response), True)]]
    if form == "text":
        return [[(ended(_encode(tokenizer, record["text"], special=True)), True)]]
    if form == "messages":
        messages, render = _chat(record, tokenizer)
        sequences, done = [[]], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:  # an assistant's greeting answers nothing
                continue
            before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
            if not after.startswith(before):
                raise ValueError("the chat template does not write an answer behind the opening that it gives of one, so the two cannot be told apart")
            if not before.startswith(done):  # the answers so far are written otherwise from here on
                sequences, done = [*sequences, []], ""
            sequences[-1] += [before[len(done) :], after[len(before) :]]
            done = after
        if not sequences[0]:
            raise ValueError('"messages" has no assistant turn that answers another')
        return [[(ids, i % 2 == 1) for i, ids in enumerate(_encode_parts(tokenizer, texts))] for texts in sequences]
    raise ValueError(f"found keys {sorted(record)}; accepted are {FORMS}")


def encode_prompt(record: dict, tokenizer, text_tokens: int) -> list[int]:
    """The token ids of a record's prompt, of the form that training takes where it has one; an answer beside it is not looked at.

    Of {"messages"} all of them, without an assistant turn at the end, with the chat template's opening of an answer; of {"text"} the
    first `text_tokens` tokens. Raises ValueError for anything else.
    """
    try:
        form = _form(record) or next((key for key in ("prompt_ids", "prompt") if key in record), None)
        if form == "prompt_ids":
            return _ids(record, "prompt_ids")
        if form == "prompt":
            return _encode(tokenizer, record["prompt"], special=True)
        if form == "text":
            return _encode(tokenizer, record["text"], special=True)[:text_tokens]
        if form == "messages":
            messages, render = _chat(record, tokenizer)
            if messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return _encode(tokenizer, render(messages, add_generation_prompt=True))
    except TypeError as error:  # of a tokenizer or a template, about text that it cannot take
        raise ValueError(error) from None
    raise ValueError(f"found keys {sorted(record)}; accepted are {FORMS}")


def read_rows(path: Path) -> Iterator[tuple[str, bytes | dict, float]]:
    """What a file holds, in order: where it stands, a line as it is or a row as a record, and how many bytes of the file it took."""
    if path.suffix.lower() != ".parquet":
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"{path}, line {number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, len(line)
        return
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path} is read with pyarrow, which cannot be imported ({error}); pip install pyarrow") from None
    number = 0
    try:
        # With both settings a row group is read in small parts; a file may be a single one.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if not set(names) & set(KEYS):
                raise ValueError(f"{path} has columns {sorted(names)}; accepted are {FORMS}")
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[name for name in names if name in KEYS]):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 (counts on from batch to batch)
                    yield f"{path}, row {number}", row, share
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {number}: {error}") from None


def present(row: dict) -> dict:
    """A record without its nulls: a column that another form of record needs, or a key that only some messages have."""
    row = {name: value for name, value in row.items() if value is not None}
    if isinstance(row.get("messages"), list):
        row["messages"] = [
            {k: v for k, v in m.items() if v is not None or k == "content"} if isinstance(m, dict) else m for m in row["messages"]
        ]  # fmt: skip
    return row


def parse(row: bytes | dict) -> dict:
    """A line, or a row, as a record. Raises ValueError for what is no JSON object."""
    record = json.loads(row.decode()) if isinstance(row, bytes) else row
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__}; accepted are {FORMS}")
    return present(record)


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """The records of a JSON-lines or .parquet file, each with "FILE, line N". Raises ValueError with that for a line that is none."""
    for where, row, _ in read_rows(path):
        if not isinstance(row, bytes) or row.strip():
            try:
                record = parse(row)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from None
            yield where, record


def read_prompts(
    paths: Iterable[str | Path], tokenizer, *, vocab_size: int, text_tokens: int = 32, limit: int | None = None
) -> list[list[int]]:
    """The first `limit` prompts (default: all) of JSON-lines or .parquet files, as token ids.

    Of {"prompt"} and {"prompt_ids"} that; of {"messages"} all of them, without an assistant turn at the end, with the chat template's
    opening of an answer; of {"text"} the first `text_tokens` tokens. Raises ValueError with file and line number for another form, an
    empty prompt or ids outside the vocabulary, and if there is none at all.
    """
    if text_tokens < 1:
        raise ValueError(f"{text_tokens} tokens of a text are asked for as a prompt; accepted are 1 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} prompts are asked for; accepted are 1 or more")
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
