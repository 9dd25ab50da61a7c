"""Drafts copied from the text itself: what followed the last place where its newest tokens stood before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) needs no adapter, and is strong where a text repeats itself or
its prompt. It is a drafter like any other: what it proposes is verified, so it changes how fast a text is written and never the text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lookup:
    """tokens: how many are copied, 1 to 16. match: how many of the newest tokens must have stood before, 1 to 16.

    Raises ValueError for anything else.
    """

    tokens: int
    match: int = 2

    def __post_init__(self):
        for name, value in (("lookup", self.tokens), ("lookup_match", self.match)):
            if type(value) is not int or not 1 <= value <= 16:
                raise ValueError(f"{name} is {value!r}; accepted are 1 to 16 tokens")

    def drafts(self, text: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts behind each text's newest token, and which texts have any, without the host.

        text: (B, S) int64, tokens at their positions. newest: (B,) int64, the newest token's position, below S; what stands behind it is
        not looked at. Returns (drafts (B, tokens) int64, found (B,) bool). A copy that comes to the newest token goes on where it began, for
        a text that repeats itself with this period. Where nothing was found the drafts are some tokens of the text.
        """
        position = torch.arange(text.shape[1], device=text.device)
        same = (position >= self.match - 1) & (position < newest.unsqueeze(1))  # (B, S): places at which the matching tokens may end
        for i in range(self.match):
            token = text.gather(1, (newest - i).clamp(min=0).unsqueeze(1))
            same = same & (text == token).roll(i, 1)  # what comes around stands below match - 1
        place = torch.where(same, position, -1).amax(1)
        period = (newest - place).unsqueeze(1)
        ahead = torch.arange(self.tokens, device=text.device) % period
        return text.gather(1, place.unsqueeze(1) + 1 + ahead), place >= 0


def lookup_of(tokens: int | None, match: int | None = None) -> Lookup | None:
    """What `Decoding` takes as `lookup` and `lookup_match`. Raises ValueError for a match without tokens to copy."""
    if tokens is None:
        if match is not None:
            raise ValueError(f"lookup_match is {match!r} and lookup None, which copies nothing; accepted are both, or lookup alone")
        return None
    return Lookup(tokens) if match is None else Lookup(tokens, match)
