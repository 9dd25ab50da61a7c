"""The demo corpus: the source of the running Python's standard library, split by file.

The split is a hash of a file's path inside the library, so it is the same on every machine and a file that only
some Python versions have lands on a definite side. Held-out files are never trained on, by the tokenizer, the base
model or the adapter.
"""

import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_PERCENT = 4

# Generated tables, not source that somebody wrote: character maps, the text of the documentation, lexer fixtures.
_EXCLUDED = ("site-packages/", "encodings/", "pydoc_data/", "lib2to3/tests/", "test/encoded_modules/", "ensurepip/")
_MAX_BYTES = 400_000


def is_held_out(name: str) -> bool:
    """Whether the file `name` (a path relative to the library, with forward slashes) belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def read_corpus(root: Path | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Read the library below `root` (default: this Python's) as `(train, held_out)`, each from file name to text."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(_EXCLUDED) or path.stat().st_size > _MAX_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test fixtures are deliberately in other encodings
            continue
        if text.strip():
            (held_out if is_held_out(name) else train)[name] = text
    if not train:
        raise ValueError(f"no Python source found below {root}; expected a directory that holds a standard library")
    return train, held_out
