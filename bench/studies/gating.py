"""What the gate is for (Fig. 6): gated against ordinary (ungated) LoRA, trained alike.

At intervals, the model with the adapter on reads held-out source: its loss and accuracy at the next token. The gated one must not
change by a bit, and where a digest of its logits says that it did, the exit status is 1. Beside it, tokens per step.
"""

import hashlib
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from bench.report import table
from bench.studies.common import DECODE_BATCH, TRAINING, Result, Study
from mtp_model import MTPConfig, MTPModel
from mtp_model.cache import KVCache
from mtp_model.layout import prefill_layout
from mtp_model.train import Evaluation, World

TITLE = "Gated against ordinary LoRA"
FLAGS = (*TRAINING, "rank", "seed")
DEFAULTS = {"steps": 400}
QUICK = {"prompts": 1, "new_tokens": 8, "batch_size": 2, "anchors": 4, "max_length": 64, "rounds": 1, "steps": 2}
INTERVALS = 8
PAPER = {"task": "ARC-Challenge, % right, after 25,000 steps", "gated": 53.9, "ordinary": 32.3}


@torch.inference_mode()
def next_token(model: MTPModel, texts) -> dict:
    """The model's mean loss (nats) and share of right guesses at the texts' next tokens, in passes with its masks, if it has any,
    after the last token; and a digest of all its logits."""
    loss, right, count, seen = 0.0, 0, 0, hashlib.sha256()
    k = model.mtp.num_masks if model.mtp else 0
    for text in texts:
        ids = torch.tensor(text, device=model.device)
        rows = prefill_layout([len(text)], k, model.device).at(ids.unsqueeze(1), [0])
        z = model(rows, KVCache(model.config, 1, len(text) + k, model.device, model.dtype))
        logits = model.logits(z[: len(text) - 1, 0]).float().cpu()
        seen.update(logits.numpy().tobytes())
        labels = ids[1:].cpu()
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {"next_token_loss": loss / count, "next_token_right": right / count, "logits": seen.hexdigest()[:16]}


@dataclass(frozen=True)
class WithQuality(Evaluation):
    """Tokens per step and, of the same prompts as text, the next token."""

    def run(self, model: MTPModel, world: World, *interrupted) -> dict | None:
        found = super().run(model, world, *interrupted)
        return None if found is None else found | next_token(model, self.prompts)


def run(study: Study) -> Result:
    args, model, examples = study.args, study.model, study.examples(study.args.data)
    texts = tuple(map(tuple, study.prompts))
    if max(map(len, texts)) < 2:
        raise ValueError(f"prompts of {args.held_out} have one token; accepted is one of two or more")
    config, gated = study.recipe(seed=args.seed), MTPConfig(args.masks, args.rank)
    config = replace(config, steps=study.steps(gated, config, examples))
    evaluation = WithQuality(texts, max(1, config.steps // INTERVALS), max_new_tokens=args.new_tokens, batch=DECODE_BATCH)
    model.remove_adapter()
    base, records = next_token(model, texts), {}
    for name, mtp in (("gated", gated), ("ordinary", replace(gated, gated=False))):
        directory = study.train(name, mtp, config, examples, evaluation)
        model.remove_adapter()
        model.add_adapter(mtp, seed=args.seed, dtype=torch.float32)
        start = study.once(f"{name} at the start", [asdict(mtp), repr(evaluation), model.fingerprint, str(model.dtype)], lambda: evaluation.run(model, World()))
        records[name] = [{"step": 0} | start] + [{"step": r["step"]} | r["evaluation"] for r in study.log(directory) if "evaluation" in r]

    lines = [["the model without an adapter", "-", f"{base['next_token_loss']:.6f}", f"{100 * base['next_token_right']:.2f} %", "1", "-"]]
    for name, values in records.items():
        for r in values:
            same = "yes" if r["logits"] == base["logits"] else "no"
            lines.append([name, str(r["step"]), f"{r['next_token_loss']:.6f}", f"{100 * r['next_token_right']:.2f} %", f"{r['tokens_per_step']:.3f}", same])
    constant = len({r["logits"] for r in records["gated"]}) == 1
    as_base = constant and records["gated"][0]["logits"] == base["logits"]
    text = table(["LoRA", "step", "next-token loss, nats", "right at the next token", "tokens per step", "logits the base's, to the bit"], lines)
    notes = [f"Gated: the logits at {sum(len(t) - 1 for t in texts)} held-out positions "
             + ("are the same to the last bit at every step" if constant else "CHANGED while it was trained, which must not be")
             + (", and the base model's." if as_base else ", but not the base model's in a pass without masks." if constant else "."),
             f"Rank {args.rank}, {args.masks} masks, {config.steps} steps. The ordinary one's tokens per step are of a changed model's text."]  # fmt: skip

    def draw(figure):
        names = {"next_token_loss": "next-token loss, nats", "next_token_right": "share right at the next token", "tokens_per_step": "tokens per step"}
        for axis, (key, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
            for name, values in records.items():
                axis.plot([r["step"] for r in values], [r[key] for r in values], "o-", label=name)
            axis.set(xlabel="step", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)

    values = {"base": base, "rows": records, "constant": constant, "as_base": as_base, "steps": config.steps, "paper": PAPER}
    return Result(values, text, notes, draw, size=(12, 3.6), good=constant)
