"""What a model knows of its future (Fig. 1): where the right token stands in the order of each mask's logits.

The right token of mask j after position p is the token at p + j + 1 of the model's own greedy continuation of held-out prompts. Three
readings: placeholder masks on the untouched model (random embeddings, B = 0), the trained adapter's masks through the model's own
head, and through the sampler, given the true previous token. Nothing is trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.report import quartiles, table
from bench.studies.common import DECODE_BATCH, Result, Study
from mtp_model import MTPModel, generate
from mtp_model.cache import KVCache
from mtp_model.layout import training_layout

TITLE = "Rank of the right future token in the masks' logits"
FLAGS = ("adapter", "held_out", "prompts", "new_tokens", "seed")
DEFAULTS: dict = {}
QUICK = {"prompts": 2, "new_tokens": 16}
READINGS = {
    "frequency": "tokens by their frequency",
    "untouched": "untouched model, placeholder masks",
    "trained": "after training",
    "sampler": "after training, sampler",
}
PAPER = {"untouched": "right token in the top 200 of about 128,000", "trained": "right token in the top 10"}


def rank(logits: Tensor, right: Tensor) -> Tensor:
    """(N,) rank from 1 of the tokens right (N,) in logits (N, V); of equal logits the lower id comes first, as in argmax."""
    own = logits.gather(1, right.unsqueeze(1))
    earlier = torch.arange(logits.shape[1], device=logits.device) < right.unsqueeze(1)
    return 1 + ((logits > own) | ((logits == own) & earlier)).sum(1)


@torch.inference_mode()
def future_ranks(model: MTPModel, text: list[int], prompt_length: int, frequency: Tensor) -> dict[str, Tensor]:
    """(A, k) ranks in the logits of the heads "own" and, if there is one, "sampler", and in the order of "frequency" (V,): at the A
    positions of the text, from the last of the prompt on, after which all k masks have a token to predict."""
    k = model.mtp.num_masks
    anchors = torch.arange(prompt_length - 1, len(text) - k - 1, device=model.device)
    ids = torch.tensor(text, device=model.device)
    rows = training_layout(len(text), anchors.unsqueeze(1), k).at(ids.unsqueeze(1), [0])
    z = model(rows, KVCache(model.config, 1, len(text) + rows.num_masks, model.device, model.dtype))[len(text) :, 0]  # (A * k, d)
    at = (anchors.unsqueeze(1) + torch.arange(1, k + 1, device=model.device)).flatten()  # the masks' positions
    heads = {"own": z}
    if model.sampler is not None:
        heads["sampler"] = model.sampler(F.embedding(ids[at], model.embed), z)
    scores = {head: model.logits(states).float() for head, states in heads.items()} | {"frequency": frequency.expand(len(at), -1)}
    return {head: rank(values, ids[at + 1]).view(-1, k) for head, values in scores.items()}


def probe(model: MTPModel, texts: list[tuple[list[int], int]], frequency: Tensor, name: str) -> dict[str, Tensor]:
    parts = [future_ranks(model, text, length, frequency) for text, length in tqdm(texts, desc=name, disable=None, leave=False)]
    return {head: torch.cat([part[head] for part in parts]) for head in parts[0]}


def run(study: Study) -> Result:
    model, args = study.model, study.args
    mtp = study.use(args.adapter).mtp
    k, vocab = mtp.num_masks, model.config.vocab_size
    kept = []
    for i in tqdm(range(0, len(study.prompts), DECODE_BATCH), desc="continuations", disable=None, leave=False):
        prompts = study.prompts[i : i + DECODE_BATCH]
        written = generate(model, prompts, mode="autoregressive", max_new_tokens=args.new_tokens).tokens
        kept += [(prompt + new, len(prompt)) for prompt, new in zip(prompts, written, strict=True) if len(new) >= k + 1]
    if not kept:
        raise ValueError(f"new_tokens is {args.new_tokens}; accepted are {k + 1} or more, for each of {k} masks to have a token to predict")
    counts = torch.bincount(torch.tensor([token for prompt in study.prompts for token in prompt]), minlength=vocab)
    trained = probe(model, kept, counts.to(model.device), "trained")
    model.remove_adapter()
    model.add_adapter(mtp, seed=args.seed)
    untouched = probe(model, kept, counts.to(model.device), "untouched")
    ranks = {"frequency": trained["frequency"], "untouched": untouched["own"], "trained": trained["own"]}
    if "sampler" in trained:
        ranks["sampler"] = trained["sampler"]

    tops = {"top 1": 1, "top 10": 10, f"top 5 % ({max(1, vocab // 20)})": max(1, vocab // 20), "top 200": 200}
    records, lines = [], []
    for reading, values in ranks.items():
        for j in range(k):
            column = values[:, j]
            middle, low, high = quartiles(column.tolist())
            shares = {name: float((column <= top).double().mean()) for name, top in tops.items()}
            records.append({"reading": reading, "mask": j + 1, "positions": len(column), "median": middle, "quartiles": [low, high], "shares": shares})
            lines.append([READINGS[reading], str(j + 1), f"{middle:g} ({low:g} to {high:g})", *(f"{100 * share:.1f} %" for share in shares.values())])
    chance = {name: min(1.0, top / vocab) for name, top in tops.items()}
    lines.append(["a rank drawn at random", "any", f"{(vocab + 1) / 2:g}", *(f"{100 * share:.1f} %" for share in chance.values())])
    text = table(["masks", "mask", "median rank (quartiles)", *tops], lines)
    notes = [f"The vocabulary is {vocab:,}, so the top 200 are {100 * min(1, 200 / vocab):.1f} % of it (of the paper's 128,256: 0.16 %): top 10 and top 5 % "
             f"say more here. {len(ranks['trained'])} positions in {len(kept)} continuations. By their frequency: as if every mask "
             "ordered all tokens by how often they stand in the prompts."]  # fmt: skip
    if len(kept) < len(study.prompts):
        notes.append(f"{len(study.prompts) - len(kept)} continuations ended before {k + 1} tokens and are left out.")

    def draw(figure):
        for axis, what in zip(figure.subplots(1, 2), ("median", "top 10"), strict=True):
            for reading in ranks:
                mine = [r for r in records if r["reading"] == reading]
                values = [r["median"] if what == "median" else r["shares"][what] for r in mine]
                axis.plot([r["mask"] for r in mine], values, "o-", label=READINGS[reading])
            axis.axhline((vocab + 1) / 2 if what == "median" else chance[what], color="grey", linestyle=":", label="at random")
            axis.set(xlabel="mask", ylabel="median rank" if what == "median" else "share of right tokens in the top 10")
            axis.grid(alpha=0.3)
            if what == "median":
                axis.set_yscale("log")
                figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)

    return Result({"vocabulary": vocab, "rows": records, "chance": chance, "paper": PAPER}, text, notes, draw, size=(9, 4.2))
