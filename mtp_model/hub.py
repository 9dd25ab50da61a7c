"""Model and adapter directories by name: on this machine, or in a repository of the Hugging Face Hub, of which a copy is kept."""

import re
from pathlib import Path

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "model*.safetensors", "adapter_model.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]  # no weights in other forms


def local_directory(name: str | Path, revision: str | None = None) -> Path:
    """The directory `name`, or else a copy of the Hub's repository `name`, "owner/name", as of `revision` (default: its newest).

    What is downloaded stands where other packages of Hugging Face find it too; private and gated repositories need its login.
    Raises ValueError if there is neither.
    """
    directory = Path(name)
    if directory.is_dir():
        if revision is not None:
            raise ValueError(f"revision is {revision!r} and {directory} is a directory; accepted is one of a repository of the Hugging Face Hub")
        return directory
    if not REPOSITORY.fullmatch(directory.as_posix()):
        raise ValueError(f"{directory} is not a directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(directory.as_posix(), revision=revision, allow_patterns=FILES, ignore_patterns="original/*"))
    except Exception as error:  # of many kinds
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"{directory} is not a directory, and the Hugging Face Hub gave no repository of this name ({why})") from None
