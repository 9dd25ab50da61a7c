"""Train the demo's base model: a tokenizer and a small Llama, from scratch, on the demo corpus.

    python -m mtp_model.demo.base --out runs/base --minutes 75

The result is an ordinary Hugging Face directory. Training is `transformers`' own model under PyTorch's own optimizers;
nothing of this package takes part, so the base model is what a user would bring.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mtp_model.arguments import default_device, default_dtype, device_name
from mtp_model.demo.corpus import read_corpus

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts, vocab_size: int, out: Path):
    """Byte-level BPE of `vocab_size` entries, saved as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    fast.clean_up_tokenization_spaces = False
    fast.save_pretrained(out)
    return fast


def encode(tokenizer, texts) -> np.ndarray:
    """All `texts` as one array of ids, an end-of-text after each."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array(e.ids + [end], dtype=np.uint16) for e in encoded])


def windows(data: np.ndarray, batch: int, length: int, generator: np.random.Generator) -> torch.Tensor:
    starts = generator.integers(0, len(data) - length, size=batch)
    return torch.from_numpy(np.stack([data[s : s + length] for s in starts]).astype(np.int64))


@torch.no_grad()
def held_out_loss(model, data: np.ndarray, length: int, batches: int = 8, batch: int = 16) -> float:
    """Mean next-token loss in nats on fixed windows of `data`."""
    generator = np.random.default_rng(0)
    total = 0.0
    for _ in range(batches):
        ids = windows(data, batch, length, generator).to(model.device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return total / batches


def make_optimizers(model, lr: float, muon_lr: float):
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mtp_model.demo.base", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write: tokenizer, base model, checkpoint, log")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time; the schedule decays to zero over it")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--mlp", type=int, default=768)
    parser.add_argument("--length", type=int, default=384, help="tokens per window")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="AdamW, embeddings and norms")
    parser.add_argument("--muon-lr", type=float, default=4e-3, help="Muon, the layers' matrices")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the time spent decaying to zero")
    parser.add_argument("--device", type=device_name, default=default_device(), help="default: %(default)s; on a GPU products are bfloat16's where it has it")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler on a CPU)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = read_corpus()
    if (args.out / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(train_texts.values(), args.vocab, args.out)
    train, held = encode(tokenizer, train_texts.values()), encode(tokenizer, held_texts.values())
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    characters = sum(map(len, train_texts.values()))
    print(f"train {len(train_texts)} files, {characters / 1e6:.1f} M characters, {len(train) / 1e6:.2f} M tokens; "
          f"held out {len(held_texts)} files, {len(held) / 1e6:.2f} M tokens")

    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.hidden // args.heads,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        rms_norm_eps=1e-5, initializer_range=0.02,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device)
    mixed = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=default_dtype(args.device) == "bfloat16")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    step, tokens, spent = 0, 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, tokens, spent = state["step"], state["tokens"], state["spent"]
        print(f"resuming at step {step}, {spent / 60:.1f} of {args.minutes} minutes spent")
    run = torch.compile(model) if args.compile else model
    budget = args.minutes * 60
    base_lrs = [args.lr, args.muon_lr]
    log = open(args.out / "log.jsonl", "a", buffering=1)

    def save():
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": step, "tokens": tokens, "spent": spent}  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    progress = tqdm(total=round(budget), initial=round(spent), unit="s", mininterval=5)
    average = None
    try:
        while spent < budget:
            started = time.perf_counter()
            share = spent / budget
            scale = min(1.0, (step + 1) / args.warmup, max(0.02, (1 - share) / args.decay))
            for optimizer, lr in zip(optimizers, base_lrs, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * scale
            ids = windows(train, args.batch, args.length, np.random.default_rng([args.seed, step])).to(args.device)
            with mixed:
                loss = run(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += ids.numel()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if not math.isfinite(average):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            elapsed = time.perf_counter() - started
            spent += elapsed
            progress.update(round(spent) - progress.n)
            progress.set_postfix(step=step, loss=f"{average:.3f}", tok_s=f"{ids.numel() / elapsed:.0f}")
            if step % 100 == 0:
                log.write(json.dumps({"step": step, "tokens": tokens, "seconds": round(spent, 1), "loss": round(average, 4)}) + "\n")
            if step % 500 == 0:
                save()
    finally:
        save()
        progress.close()
    model = model.to(torch.bfloat16)  # the shipped weights are the rounded ones, in every dtype they are run in
    model.save_pretrained(args.out)
    model = model.float().eval()
    result = {"step": step, "tokens": tokens, "seconds": round(spent, 1), "train_loss": round(average, 4),
              "held_out_loss": round(held_out_loss(model, held, args.length), 4)}  # fmt: skip
    log.write(json.dumps(result) + "\n")
    print(result)


if __name__ == "__main__":
    main()
