"""Model and adapter directories by name: on this machine, or in a repository of the Hugging Face Hub, of which a copy is kept."""

import re
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+(?:/[\w.-]+)*))?")
MODEL = ("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")


def local_directory(name: str | Path, files: Sequence[str], revision: str | None = None) -> Path:
    """The directory `name`, or else a copy of `files` (patterns) of the Hub's repository `name`, "owner/name", as of `revision` (a branch, tag or
    commit; default: its newest), which "owner/name@revision" has in it.

    What is downloaded stands where other packages of Hugging Face find it too; private and gated repositories need its login. A name whose first
    part is a directory here is none of the Hub's. Raises ValueError if there is neither.
    """
    directory = Path(name)
    if directory.is_dir():
        if revision is not None:
            raise ValueError(f"revision is {revision!r} and {directory} is a directory; accepted is one of a repository of the Hugging Face Hub")
        return directory
    found = REPOSITORY.fullmatch(directory.as_posix())
    if directory.exists() or directory.parent.is_dir() or not found:
        raise ValueError(f"{directory} is not a directory")
    repository, named = found.groups()
    if named is not None and revision is not None:
        raise ValueError(f"revision is {revision!r} and {directory} names one too; accepted is one of the two")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or named, allow_patterns=list(files)))
    except Exception as error:  # of many kinds
        why = " ".join(str(error).split())
        raise ValueError(f"{directory} is not a directory, and the Hugging Face Hub gave nothing for this name ({type(error).__name__}: {why})") from None
