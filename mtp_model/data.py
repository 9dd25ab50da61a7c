"""Training data: records to token sequences that know which of their tokens are answers.

What the sources give (see `records` for their forms) is three arrays: tokens, answer flags, and where each sequence begins, in memory
or, for more than fits there, in a directory that is mapped into memory and opened again without reading the sources.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from operator import index
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtp_model.records import encode_sequences, parse, read_rows

REPORTED = 10  # broken lines that are reported one by one
STORE = "store.json"


@dataclass(frozen=True)
class Example:
    """ids: (n,) int32. answer: (n,) bool, the tokens that bear a loss as labels."""

    ids: np.ndarray
    answer: np.ndarray


class Examples:
    """A sequence of `Example`, as views of one array of tokens and one of answer flags, in memory or mapped from a store; read-only.

    lengths: (n,) int64. answers: how many tokens are answers. fingerprint: 16 hex digits of tokens, flags and lengths; the same
    data has the same one, wherever it lies. skipped: "FILE, line N: why" of each line that was left out.
    """

    def __init__(self, tokens: np.ndarray, flags: np.ndarray, offsets: np.ndarray, *, answers: int, fingerprint: str, skipped: Iterable[str] = ()):
        self._tokens, self._flags, self._offsets = tokens, flags, offsets
        self.lengths = np.diff(offsets)
        self.answers, self.fingerprint, self.skipped = answers, fingerprint, list(skipped)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """The given examples, in memory. Raises ValueError for one whose ids and answer differ in length."""
        sink = _Sink(BytesIO(), BytesIO())
        for example in examples:
            sink.add(example)
        return sink.in_memory([])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:
        i = index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        part = slice(self._offsets[i % len(self)], self._offsets[i % len(self) + 1])
        return Example(self._tokens[part], self._flags[part])


class _Sink:
    """Examples to two binary files, one of tokens and one of flags, keeping count and digests on the way."""

    def __init__(self, tokens, flags):
        self.tokens, self.flags = tokens, flags
        self.digests = hashlib.sha256(), hashlib.sha256()
        self.offsets, self.answers = array("q", [0]), 0

    def add(self, example: Example) -> None:
        ids, answer = np.asarray(example.ids, np.int32), np.asarray(example.answer, bool)
        if ids.ndim != 1 or ids.shape != answer.shape:
            raise ValueError(f"ids have shape {ids.shape}, answer {answer.shape}; accepted are (n,) and (n,)")
        for file, digest, values in zip((self.tokens, self.flags), self.digests, (ids, answer), strict=True):
            data = values.tobytes()
            file.write(data)
            digest.update(data)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.answers += int(answer.sum())

    def facts(self) -> dict:
        whole = hashlib.sha256(self.offsets.tobytes() + b"".join(d.digest() for d in self.digests))
        return {"answers": self.answers, "fingerprint": whole.hexdigest()[:16]}

    def in_memory(self, skipped: list[str]) -> Examples:
        tokens, flags = np.frombuffer(self.tokens.getvalue(), np.int32), np.frombuffer(self.flags.getvalue(), bool)
        return Examples(tokens, flags, np.array(self.offsets), skipped=skipped, **self.facts())


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, each of one document or, packed, of several in a row.

    ids (L, B) int64, padded with 0 at the end. answer (L, B) bool, False in the padding and at the first token of each document
    but a sequence's first (no token of a document predicts it). first (L, B) int64: the row at which the document of that row
    begins, in the padding the row's own number; None if no sequence holds more than one document. lengths (B,) int64.
    """

    ids: Tensor
    answer: Tensor
    first: Tensor | None
    lengths: Tensor


def _examples(record: dict, tokenizer, end: list[int], vocab_size: int) -> list[Example]:
    examples = []
    for pieces in encode_sequences(record, tokenizer, end):
        ids = np.array([t for piece, _ in pieces for t in piece], dtype=np.int64)  # before it is known that they fit into 32 bits
        if len(ids) and not (0 <= ids.min() and ids.max() < vocab_size):
            raise ValueError(f"token ids are {ids.min()} to {ids.max()}; the model's vocabulary has {vocab_size}")
        examples.append(Example(ids.astype(np.int32), np.array([a for piece, a in pieces for _ in piece], dtype=bool)))
    return examples


def has_anchor(answer: np.ndarray) -> bool:
    """Whether masks can stand in the sequence: at an answer token, or just before one, with another of them two further on."""
    return bool(((answer[:-2] | answer[1:-1]) & answer[2:]).any())


def _report(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # does not tear a progress bar


def read_examples(
    paths: Iterable[str | Path], tokenizer, *, max_length: int, vocab_size: int, eos: int | None = None,
    skip_broken: bool = False, store: str | Path | None = None, progress: bool = False,
) -> Examples:  # fmt: skip
    """Read JSON lines and .parquet files. A sequence longer than `max_length` tokens is cut into several that are not.

    Pieces without a place for masks are dropped (see `has_anchor`; an answer of one token has none), and how many is reported on standard
    error, as is how many sequences are cut, and how many answers from their prompt. skip_broken: leave out lines that cannot be read, report them on standard
    error (the first ten and how many) and in `skipped`. store: a directory for the tokens, so that memory does not grow with
    them; a later call with the same sources (names, sizes, times) and settings opens it without reading, any other writes it anew,
    and it counts only once it is whole. One process at a time may write it. progress: a bar over the bytes of the sources.

    Raises ValueError with file and line number for a line that is none of the accepted forms or has ids outside the vocabulary,
    and if nothing at all remains.
    """
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}; accepted is 3 or more")
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")

    def fill(sink: _Sink) -> tuple[list[str], list[str]]:
        """What was left out, line by line, and what is to be said of it."""
        skipped, dropped, cut, parted = [], 0, 0, 0
        with tqdm(total=sum(p.stat().st_size for p in paths), desc="read", unit="B", unit_scale=True, disable=not progress) as bar:
            for path in paths:
                for where, row, size in read_rows(path):
                    bar.update(size)
                    if isinstance(row, bytes) and not row.strip():
                        continue
                    try:
                        examples = _examples(parse(row), tokenizer, [] if eos is None else [eos], vocab_size)
                    except (ValueError, TypeError, OverflowError, RecursionError) as error:
                        if not skip_broken:
                            raise ValueError(f"{where}: {error}") from None
                        skipped.append(f"{where}: {error}")
                        if len(skipped) <= REPORTED:
                            _report(f"left out: {skipped[-1]}")
                        continue
                    for example in examples:
                        for i in range(0, len(example.ids), max_length):
                            piece = Example(example.ids[i : i + max_length], example.answer[i : i + max_length])
                            if has_anchor(piece.answer):
                                sink.add(piece)
                            else:
                                dropped += 1
                        cut += len(example.ids) > max_length
                        parted += len(example.ids) > max_length and not example.answer[:max_length].any()
        notes = [f"{count} {what}" for count, what in (
            (len(skipped), "broken lines left out"),
            (dropped, "pieces left out, with no answer of two tokens or more"),
            (cut, f"sequences of more than {max_length} tokens (max_length) cut, the later pieces without what stands before them"),
            (parted, f"prompts fill the {max_length} tokens of a sequence (max_length): their answers are trained on without them"),
        ) if count]  # fmt: skip
        for note in notes:
            _report(note)
        if len(sink.offsets) == 1:
            raise ValueError(f"no sequence with an answer of two tokens or more in {', '.join(map(str, paths))}")
        return skipped, notes

    if store is None:
        sink = _Sink(BytesIO(), BytesIO())
        return sink.in_memory(fill(sink)[0])
    store = Path(store)
    if store.exists() and not store.is_dir():
        raise ValueError(f"store is {store}, which is not a directory; accepted is a directory, or the name of a new one")
    made_of = {
        "format": 3, "sources": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths], "tokenizer": _identity(tokenizer),
        "max_length": max_length, "vocab_size": vocab_size, "eos": eos, "skip_broken": skip_broken,
    }  # fmt: skip
    found = _open_store(store, made_of)
    if found is None:
        _write_store(store, made_of, fill)
        return _open_store(store, made_of)[0]
    examples, notes = found
    for line in (*(f"left out: {line}" for line in examples.skipped[:REPORTED]), *notes):  # as when it was written
        _report(line)
    return examples


def _identity(tokenizer) -> str:
    """A digest of what decides a tokenizer's output: rules or, without them, vocabulary; special tokens and chat template."""
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # of the last call, not of the tokenizer
    else:
        rules = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    parts = [type(tokenizer).__qualname__, rules, *(getattr(tokenizer, name, None) for name in ("special_tokens_map", "chat_template"))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _open_store(store: Path, made_of: dict) -> tuple[Examples, list[str]] | None:
    """The examples of a store and what was said of them, or None if it is not whole or made of something else."""
    try:
        state = json.loads((store / STORE).read_text(encoding="utf-8"))
        if state.pop("made_of") != made_of:
            return None
        notes = state.pop("notes")
        offsets = np.load(store / "offsets.npy")
        tokens, flags = (np.asarray(np.memmap(store / f"{n}.bin", t, "r")) for n, t in (("tokens", np.int32), ("answers", bool)))
    except (OSError, ValueError, KeyError):
        return None
    return (Examples(tokens, flags, offsets, **state), notes) if len(tokens) == len(flags) == offsets[-1] else None


def _write_store(store: Path, made_of: dict, fill) -> None:
    """Write all files under temporary names and then rename them, the one that makes the store whole last."""
    store.mkdir(parents=True, exist_ok=True)
    names = ("tokens.bin", "answers.bin", "offsets.npy", STORE)
    temporary = {name: store / (name + ".tmp") for name in names}
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary[name], "wb")) for name in names}
            sink = _Sink(files["tokens.bin"], files["answers.bin"])
            skipped, notes = fill(sink)
            np.save(files["offsets.npy"], np.array(sink.offsets))
            files[STORE].write(json.dumps({"made_of": made_of, "skipped": skipped, "notes": notes, **sink.facts()}).encode())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        (store / STORE).unlink(missing_ok=True)  # an older store's must not vouch for the new files
        for name in names:
            os.replace(temporary[name], store / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def collate(sequences: list[list[Example]] | list[Example], device: torch.device | str = "cpu") -> Batch:
    """Put sequences side by side, padded to the longest. A sequence is a list of documents, or one document.

    Raises ValueError if there is no sequence, or one without a document.
    """
    packed = [[sequence] if isinstance(sequence, Example) else sequence for sequence in sequences]
    if not packed or not all(packed):
        raise ValueError("sequences are empty; accepted are one or more, each of one or more documents")
    lengths = np.array([sum(len(e.ids) for e in documents) for documents in packed])
    shape = (lengths.max(), len(packed))
    ids, answer = np.zeros(shape, np.int64), np.zeros(shape, bool)
    first = np.repeat(np.arange(shape[0])[:, None], shape[1], axis=1)
    for b, documents in enumerate(packed):
        start = 0
        for example in documents:
            end = start + len(example.ids)
            ids[start:end, b], answer[start:end, b], first[start:end, b] = example.ids, example.answer, start
            if 0 < start < end:
                answer[start, b] = False
            start = end
    several = any(len(documents) > 1 for documents in packed)
    tensors = [torch.from_numpy(a).to(device) for a in (ids, answer, first, lengths)]
    return Batch(tensors[0], tensors[1], tensors[2] if several else None, tensors[3])
