"""Drafts copied from the text itself: what followed the last place where its newest tokens stood before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) needs no adapter, and is strong where a text repeats itself or
its prompt. It is a drafter like any other: what it proposes is verified, so it changes how fast a text is written and never the text.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lookup:
    """What `ops.lookup_drafts` takes. tokens: how many are copied, 1 to 16. match: how many of the newest tokens must have stood before, 1 to 16.

    Raises ValueError for anything else.
    """

    tokens: int
    match: int = 2

    def __post_init__(self):
        for name, value in (("lookup", self.tokens), ("lookup_match", self.match)):
            if type(value) is not int or not 1 <= value <= 16:
                raise ValueError(f"{name} is {value!r}; accepted are 1 to 16 tokens")


def lookup_of(tokens: int | None, match: int | None = None) -> Lookup | None:
    """What `Decoding` takes as `lookup` and `lookup_match`. Raises ValueError for a match without tokens to copy."""
    if tokens is None:
        if match is not None:
            raise ValueError(f"lookup_match is {match!r} and lookup None, which copies nothing; accepted are both, or lookup alone")
        return None
    return Lookup(tokens) if match is None else Lookup(tokens, match)
