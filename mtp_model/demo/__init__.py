"""The demo: a small Llama trained on the Python standard library, its adapter, and held-out prompts.

`base.py` trains the model, `answers.py` writes its own continuations, `python -m mtp_model train` trains the adapter; the
README has the recipe. The library's source is under the Python Software Foundation License; `heldout.jsonl` quotes it.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
ADAPTER = Path(__file__).parent / "adapter"
# A shorter training, with and without the consistency loss and alike in all else: what that loss brings.
ABLATION = tuple(Path(__file__).parent / "ablation" / name for name in ("with-lcm", "without-lcm"))
HELD_OUT = Path(__file__).parent / "heldout.jsonl"
