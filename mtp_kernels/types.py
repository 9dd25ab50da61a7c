"""The structured arguments of the contract: the attention rule of a pass, the sampler head's weights, how tokens are drawn."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

MAX_TEMPERATURE = 1e30


class SamplerWeights(NamedTuple):
    """Two blocks of Linear -> SiLU -> LayerNorm, widths 2d -> d -> d (arXiv 2507.11851, section 2.3).

    `w1` is (d, 2d): its first d columns take the previous token's embedding, the others the mask's hidden state.
    """

    w1: Tensor
    b1: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    w2: Tensor
    b2: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """Which keys each row of a pass attends (arXiv 2507.11851, Fig. 4), as four integers per row.

    A pass has T rows for each of B sequences, NTP rows first, then `num_masks` mask rows. Keys are addressed by column:
    column i < mask_start[b] is the key of NTP token i; columns `mask_start[b] + j`, j < num_masks, are the keys of the
    pass's own mask rows. Row t of sequence b attends

        column i                    if  first[t, b] <= i < visible[t, b]
        column mask_start[b] + j    if  block[m] == block[t] and slot[m] <= slot[t],  m = T - num_masks + j

    visible: (T, B) integer, at least 1 for an NTP row and at most `mask_start[b]`.
    block: (T,) integer, the mask row's block; -1 for NTP rows.
    slot: (T,) integer, 1..k inside a block; 0 for NTP rows.
    mask_start: (B,) integer.
    num_masks: how many of the last rows are masks.
    num_keys: columns to look at; every column a row may attend is below it.
    block_size: k when the mask rows are whole blocks in order (slots 1..k, 1..k, ...), as every layout's are; 0 if not
        known. An implementation may use it to skip other blocks' keys; it never changes what a row attends.
    first: (T, B) integer, below `visible` for an NTP row; None: 0 for every row.
    causal: the rows are NTP rows alone, of a text from its beginning, so row t sees columns 0 to t; and their bits may depend on how many
        there are. An implementation may use it.

    `first` is for documents packed one behind the other into a sequence, none of which sees another: it is the column of
    the document's first token. Documents a0 a1 and b0 b1 b2, and a block of one mask after a1 and after b1:

        row    first  visible | a0 a1 b0 b1 b2 | m of a1 | m of b1
        a0       0       1    | 0              |         |
        a1       0       2    | 0  0           |         |
        b0       2       3    |       0        |         |
        b1       2       4    |       0  0     |         |
        b2       2       5    |       0  0  0  |         |
        a1:m1    0       2    | 0  0           | 0       |
        b1:m1    2       4    |       0  0     |         | 0
    """

    visible: Tensor
    block: Tensor
    slot: Tensor
    mask_start: Tensor
    num_masks: int
    num_keys: int
    block_size: int = 0
    first: Tensor | None = None
    causal: bool = False
    _cache: dict = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: from softmax(logits / temperature), of the top_k most likely tokens (default: all), of
    those the fewest most likely whose probabilities add up to top_p (default: all), and of those the ones that have at least min_p times the
    most likely one's probability (default: all; Nguyen et al. 2024, arXiv 2407.01082). Tokens of equal logits stay or go together.

    temperature: above 0, at most 1e30, for it is multiplied with noise in float32; kept as a float. top_k: an integer from 1. top_p, min_p:
    above 0, at most 1. Raises ValueError for others. The probabilities that top_p adds up are among the top_k, in transformers' order.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        def number(value) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        if not number(self.temperature) or not 0 < self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature!r}; accepted is a number above 0 and at most {MAX_TEMPERATURE:g}")
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k!r}; accepted is an integer from 1, or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not (number(value) and 0 < value <= 1):
                raise ValueError(f"{name} is {value!r}; accepted is a number above 0 and at most 1, or None")
