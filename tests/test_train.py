"""Training can be interrupted at any moment and resumed to the same result, bit for bit."""

import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batch_indices, save_hf
from resumed_training import go_on
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from mtp_model import MTPConfig, TrainConfig, Trainer, checkpoint, generate, load_adapter, load_model
from mtp_model.__main__ import main
from mtp_model.cache import KVCache
from mtp_model.data import Example, collate, read_examples
from mtp_model.layout import prefill_layout
from mtp_model.loss import mtp_loss, report
from mtp_model.train import Evaluation, TrainingFailed, trainer, watch
from mtp_model.train.parallel import World

ROOT = Path(__file__).resolve().parents[1]
MTP = MTPConfig(2, 3)


def examples(n=7):
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 6, size).astype(np.int32), np.arange(size) >= 2) for size in rng.integers(6, 14, n)]


def settings(**changes):
    usual = dict(steps=12, batch_size=2, lr=5e-3, warmup=3, decay=0.3, anchors_per_sequence=3)
    usual |= dict(save_every=4, log_every=1)
    return TrainConfig(**usual | changes)


def log_of(directory):
    """The log's records without what the machine decides."""
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second", "memory_mib")} for record in records]


def same_adapter(a, b):
    left, right = (load_file(d / "adapter_model.safetensors") for d in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train") / "model"
    save_hf(directory, seed=2)
    model = load_model(directory)
    model.directory = directory
    return model


def steps_done(out):
    """As the last checkpoint has it."""
    return json.loads(path.read_text())["notes"]["training"]["steps_done"] if (path := out / "adapter_config.json").exists() else 0


def fresh(model):
    return load_model(model.directory)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert Trainer(model, examples(), MTP, settings(), out).run()
    return out


@pytest.mark.parametrize("saved, lost", [(0, 3), (1, 0), (4, 2), (5, 5), (11, 1), (12, 0)])
def test_resume_is_bit_exact(model, uninterrupted, tmp_path, saved, lost):
    trainer = Trainer(model, examples(), MTP, settings(), tmp_path)
    records = [trainer.train_step() for _ in range(saved)]
    if saved:
        trainer.save()
    records += [trainer.train_step() for _ in range(lost)]
    with open(tmp_path / "log.jsonl", "w") as log:
        log.writelines(json.dumps(record) + "\n" for record in records)
        log.write('{"step": 9')  # a line cut short
    resumed = Trainer(model, examples(), MTP, settings(), tmp_path, resume=True)
    assert resumed.step == saved
    assert resumed.run()
    assert same_adapter(tmp_path, uninterrupted)
    assert log_of(tmp_path) == log_of(uninterrupted)
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, 13))


def test_saving_and_logging_rhythm_changes_nothing(model, uninterrupted, tmp_path):
    assert Trainer(model, examples(), MTP, settings(save_every=5, log_every=5), tmp_path).run()
    assert same_adapter(tmp_path, uninterrupted)
    assert [record["step"] for record in log_of(tmp_path)] == [5, 10, 12]


def test_checkpoints_are_written_on_the_way(model, tmp_path, monkeypatch):
    saved, original = [], Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: saved.append(self.step) or original(self))
    assert Trainer(model, examples(), MTP, settings(save_every=4), tmp_path / "a").run()
    assert Trainer(model, examples(), MTP, settings(save_every=5), tmp_path / "b").run()
    assert saved == [4, 8, 12, 5, 10, 12]


def test_the_run_did_train(model, uninterrupted):
    tensors = load_file(uninterrupted / "adapter_model.safetensors")
    assert all(tensors[n].any() for n in tensors if n.endswith("lora_B"))
    notes = json.loads((uninterrupted / "adapter_config.json").read_text())["notes"]
    assert notes["training"]["steps_done"] == 12
    assert not list(uninterrupted.glob("*.tmp"))


def test_existing_run_needs_resume(model, uninterrupted):
    before = (uninterrupted / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match="resume"):
        Trainer(model, examples(), MTP, settings(), uninterrupted)
    assert (uninterrupted / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "changes, name",
    [(dict(lr=1e-3), "lr"), (dict(seed=1), "seed"), (dict(steps=13), "steps"), (dict(mtp=MTPConfig(3, 3)), "mtp"),
     (dict(examples=6), "examples"), (dict(train_masks=True), "train_masks")],
)  # fmt: skip
def test_other_settings_are_refused(model, uninterrupted, changes, name):
    changes = dict(changes)
    mtp, data = changes.pop("mtp", MTP), examples()[: changes.pop("examples", 7)]
    with pytest.raises(ValueError, match=rf"\b{name}: "):
        Trainer(model, data, mtp, settings(**changes), uninterrupted, resume=True)


def test_every_setting_that_changes_the_result_is_held(model, uninterrupted):
    """And what was read: as many examples of other tokens are another run."""
    other = dict(accumulate=2, clip=2.0, weight_decay=0.1, drop_masks=0.5, lcm_weight=0.5, mask_decay=0.5, soft_targets=0.5, pack_length=30, buckets=True,
                 batch_size=3, warmup=4, decay=0.1, anchors_per_sequence=2, lr=1e-3, seed=1, steps=13, train_masks=True)  # fmt: skip
    assert other.keys() == {f.name for f in dataclasses.fields(TrainConfig)} - {"save_every", "log_every", "recompute"}
    for name, value in other.items():
        with pytest.raises(ValueError, match=rf"\b{name}: "):
            Trainer(model, examples(), MTP, settings(**{name: value}), uninterrupted, resume=True)
    changed = examples()
    changed[3].ids[0] ^= 1
    with pytest.raises(ValueError, match=r"\bdata: "):
        Trainer(model, changed, MTP, settings(), uninterrupted, resume=True)


def test_another_base_is_refused(uninterrupted, toy_model):
    with pytest.raises(ValueError, match="base"):
        Trainer(toy_model, examples(), MTP, settings(), uninterrupted, resume=True)


@pytest.mark.parametrize("train_masks", [False, True])
def test_masks_are_trained_by_option(model, tmp_path, train_masks):
    trainer = Trainer(model, examples(), MTP, settings(train_masks=train_masks), tmp_path)
    before = model.masks.detach().clone()
    trainer.train_step()
    assert torch.equal(model.masks, before) != train_masks


@pytest.mark.parametrize("train_masks", [False, True])
def test_an_adapter_is_trained_further(model, uninterrupted, tmp_path, train_masks):
    start, config = load_adapter(uninterrupted), settings(steps=4, lr=1e-3, train_masks=train_masks)
    whole = Trainer(model, examples(), start, config, tmp_path / "whole")
    with torch.no_grad():
        assert all(torch.equal(tensor, start.tensors[name]) for name, tensor in checkpoint.export_adapter(model).items())
    assert whole.run()
    further = load_adapter(tmp_path / "whole")
    changed = {name for name, tensor in further.tensors.items() if not torch.equal(tensor, start.tensors[name])}
    assert changed == set(start.tensors) - (set() if train_masks else {"masks"})
    assert further.config == start.config and further.notes["before"] == start.notes

    interrupted = Trainer(model, examples(), start, config, tmp_path / "parts")
    interrupted.train_step()
    interrupted.save()
    assert Trainer(model, examples(), start, config, tmp_path / "parts", resume=True).run()
    assert same_adapter(tmp_path / "parts", tmp_path / "whole")
    for other in (MTP, further):
        with pytest.raises(ValueError, match="other settings .*start: '"):
            Trainer(model, examples(), other, config, tmp_path / "parts", resume=True)


def test_an_adapter_of_another_base_is_not_trained_further(uninterrupted, toy_model, tmp_path):
    with pytest.raises(ValueError, match="another base model"):
        Trainer(toy_model, examples(), load_adapter(uninterrupted), settings(), tmp_path)


def test_ordinary_logits_are_untouched(model, tmp_path):
    ids = torch.tensor([[1], [3], [5], [2], [0]])

    @torch.no_grad()
    def logits():
        return model.logits(model(prefill_layout([5], 0).at(ids, [0]), KVCache(model.config, 1, 8)))

    if model.mtp is not None:
        model.remove_adapter()
    before = logits()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    Trainer(model, examples(), MTP, settings(), tmp_path).run()
    assert torch.equal(logits(), before)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_loss_falls_on_repetitive_text(model, tmp_path):
    text = [Example(np.array([0, 1, 2, 3] * 5, dtype=np.int32), np.ones(20, dtype=bool))]
    config = TrainConfig(steps=60, batch_size=1, warmup=5, lr=2e-2, lcm_weight=0.0)
    trainer = Trainer(model, text, MTP, config, tmp_path)
    records = [trainer.train_step() for _ in range(60)]
    assert records[-1]["base"] < 0.5 * records[0]["base"]
    assert records[-1]["sampler"] < 0.5 * records[0]["sampler"]
    assert min(records[-1]["right_sampler"]) == 1.0
    assert records[-1]["ntp"] == records[0]["ntp"]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "up_proj", "down_proj"), ("gate_proj",)])
def test_target_modules(model, tmp_path, targets):
    """Only the projections asked for are trained and written; an adapter of them loads and decodes as the trained model does."""
    mtp = MTPConfig(2, 3, target_modules=targets)
    trainer = Trainer(model, examples(), mtp, settings(), tmp_path / "run")
    assert trainer.run()
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors if "lora_" in name} == set(targets)
    assert all(tensors[n].any() for n in tensors if n.endswith("lora_B"))
    expected = generate(model, [[1, 2, 3]], max_new_tokens=9)
    again = load_adapter(tmp_path / "run").apply(fresh(model))
    assert again.mtp.target_modules == mtp.target_modules
    result = generate(again, [[1, 2, 3]], max_new_tokens=9)
    assert result.tokens == expected.tokens and result.stats.accepted == expected.stats.accepted
    resumed = Trainer(model, examples(), mtp, settings(), tmp_path / "run", resume=True)
    assert resumed.run()


@pytest.mark.parametrize("recipe", [dict(soft_targets=0.5, drop_masks=0.7), dict(pack_length=20, buckets=False), dict(buckets=True, train_masks=True)], ids=str)
def test_recipes_resume_to_the_same_bits(model, tmp_path, recipe):
    whole = Trainer(model, examples(), MTP, settings(**recipe), tmp_path / "whole")
    assert whole.run()
    trainer = Trainer(model, examples(), MTP, settings(**recipe), tmp_path / "cut")
    for _ in range(5):
        trainer.train_step()
    trainer.save()
    assert Trainer(model, examples(), MTP, settings(**recipe), tmp_path / "cut", resume=True).run()
    assert same_adapter(tmp_path / "cut", tmp_path / "whole")


def test_dropped_masks(model, tmp_path):
    trainer = Trainer(model, examples(), MTPConfig(4, 2), settings(drop_masks=0.5), tmp_path)
    masks = [trainer._pass(number)[1]["masks"] for number in range(60)]
    assert 15 <= sum(k < 4 for k in masks) <= 45 and set(masks) == {1, 2, 3, 4}
    always = Trainer(model, examples(), MTPConfig(4, 2), settings(drop_masks=1.0), tmp_path)
    assert {always._pass(number)[1]["masks"] for number in range(60)} == {1, 2, 3}


def test_anchors_are_drawn_from_the_seed(model, tmp_path):
    """Of one long example, which every seed's batches hold alike."""
    long = [Example(np.zeros(60, np.int32), np.ones(60, bool))]
    drawn = set()
    for seed in (0, 1, 2):
        run = Trainer(model, long, MTP, settings(batch_size=1, seed=seed), tmp_path)
        drawn |= {tuple(run._pass(number)[1]["anchors"][0].flatten().tolist()) for number in (0, 1, 0)}
    assert len(drawn) == 6


def test_mask_rows_are_counted_over_the_run(model, tmp_path):
    """Of one example with all of its anchors, every step has as many."""
    run = Trainer(model, examples()[:1], MTP, settings(batch_size=1, anchors_per_sequence=None), tmp_path)
    rows = [run.train_step()["mask_rows"] for _ in range(2)]
    run.save()
    rows.append(Trainer(model, examples()[:1], MTP, settings(batch_size=1, anchors_per_sequence=None), tmp_path, resume=True).train_step()["mask_rows"])
    assert rows == [rows[0], 2 * rows[0], 3 * rows[0]] and rows[0] > 0


@pytest.mark.parametrize("recompute", [True, False])
def test_recompute_is_by_option(model, tmp_path, recompute):
    Trainer(model, examples(), MTP, settings(recompute=recompute), tmp_path)
    assert all(layer.recompute == recompute for layer in model.layers)


def test_the_recipe_reaches_the_loss(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "mtp_loss", lambda *args, **options: asked.append(options) or mtp_loss(*args, **options))
    recipe = dict(lcm_weight=0.25, mask_decay=0.75, soft_targets=0.5)
    Trainer(model, examples(), MTP, settings(**recipe), tmp_path).train_step()
    assert {name: asked[0][name] for name in recipe} == recipe


def test_weight_decay(model, tmp_path):
    """At the first step A has no gradient, for B is zero: all that moves it is its decay."""
    run = Trainer(model, examples(), MTP, settings(weight_decay=0.5, lr=0.1, warmup=0), tmp_path)
    before = model.layers[0].o_proj.lora_A.detach().clone()
    run.train_step()
    torch.testing.assert_close(model.layers[0].o_proj.lora_A.detach(), before * (1 - 0.1 * 0.5))


def test_logged_time_goes_on_when_resumed(model, tmp_path, monkeypatch):
    """Seconds are of the whole run, tokens per second of the step."""
    run = Trainer(model, examples(), MTP, settings(), tmp_path)
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(ticks))
    records = [run.train_step() for _ in range(2)]
    run.save()
    records.append(Trainer(model, examples(), MTP, settings(), tmp_path, resume=True).train_step())
    assert [record["seconds"] for record in records] == [2, 4, 6]
    for number, record in enumerate(records):
        assert record["tokens_per_second"] == sum(len(examples()[i].ids) for i in batch_indices(7, 2, number, 0)) / 2


def test_held_out_evaluation(model, tmp_path):
    """Real decoding of the prompts: what generate() would say of the adapter at that step; the training is not disturbed."""
    evaluation = Evaluation(((1, 2, 3), (4, 0), (5, 5, 1)), every=5, max_new_tokens=8, batch=2)
    trainer = Trainer(model, examples(), MTP, settings(), tmp_path / "with", evaluation=evaluation)
    assert trainer.run()
    assert Trainer(model, examples(), MTP, settings(), tmp_path / "without").run()
    assert same_adapter(tmp_path / "with", tmp_path / "without")
    found = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    found = {record["step"]: record["evaluation"] for record in found if "evaluation" in record}
    assert list(found) == [5, 10, 12]
    stats = generate(model, [[1, 2, 3], [4, 0], [5, 5, 1]], max_new_tokens=8).stats
    assert found[12]["tokens_per_step"] == pytest.approx(stats.tokens_per_step, abs=1e-4)
    assert found[12]["mean_tokens_per_step"] == pytest.approx(stats.mean_tokens_per_step, abs=1e-4)
    with pytest.raises(ValueError, match="no prompts"):
        Evaluation((), 5)


@pytest.mark.parametrize("at", [5, 12])
def test_an_interrupted_evaluation_is_made_anew(model, tmp_path, monkeypatch, at):
    def made(name, **options):
        evaluation = Evaluation(((1, 2, 3), (4, 0), (5, 5, 1)), every=5, max_new_tokens=8, batch=2)
        return Trainer(model, examples(), MTP, settings(), tmp_path / name, evaluation=evaluation, **options)

    assert made("whole").run()
    run = made("parts")

    def interrupted(*args, **options):
        if run.step == at:
            signal.raise_signal(signal.SIGINT)
        return generate(*args, **options)

    monkeypatch.setattr(watch, "generate", interrupted)
    training = model.training
    assert not run.run() and run.step == steps_done(tmp_path / "parts") == at and model.training == training and not model.kept_steps
    assert at not in [record["step"] for record in log_of(tmp_path / "parts") if "evaluation" in record]
    monkeypatch.undo()
    assert made("parts", resume=True).run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole") and same_adapter(tmp_path / "parts", tmp_path / "whole")
    resumed = Trainer(model, examples(), MTP, settings(), tmp_path / "parts", resume=True)
    assert resumed.run() and not resumed.unevaluated


@pytest.mark.skipif(trainer.fcntl is None, reason="a system without these locks")
def test_one_run_in_a_directory_at_a_time(model, tmp_path):
    run = Trainer(model, examples(), MTP, settings(), tmp_path)
    first = [run.train_step() for _ in range(2)]
    run.save()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*first, {"step": 3}]))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Trainer(model, examples(), MTP, settings(), tmp_path, resume=True)
    with trainer._alone(tmp_path), pytest.raises(ValueError, match="holds a run that another process is at"):
        other.run()
    run.train_step()
    run.save()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="was trained beyond step 2 by another process meanwhile"):
        other.run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert Trainer(model, examples(), MTP, settings(), tmp_path, resume=True).run()
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, 13))


def test_an_evaluation_decodes_as_asked_and_leaves_the_model_as_it_was(toy_adapter_model, monkeypatch):
    model, seen = toy_adapter_model(k=2), []
    monkeypatch.setattr(watch, "generate", lambda model, prompts, **options: seen.append((model.training, options)) or generate(model, prompts, **options))
    prompts = ((1, 2, 3), (4, 0))
    for training in (True, False):
        model.train(training)
        found = Evaluation(prompts, 1, mode="linear", k=1, max_new_tokens=9).run(model, World())
        assert model.training == training and not model.kept_steps
        stats = generate(model.eval(), prompts, mode="linear", k=1, max_new_tokens=9).stats
        assert (found["tokens"], found["k"], found["tokens_per_step"]) == (18, 1, round(stats.tokens_per_step, 4))
        model.kept_steps.clear()
    assert [(was, o["mode"], o["k"], o["max_new_tokens"]) for was, o in seen] == [(False, "linear", 1, 9)] * 2


def test_evaluations_that_are_none():
    with pytest.raises(ValueError, match="every is 0"):
        Evaluation(((1,),), 0)


def test_tensorboard_where_it_is_installed(model, tmp_path, monkeypatch):
    """What would be written, by a writer that keeps it."""
    written = []

    class Writer:
        def __init__(self, directory, purge_step):
            written.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name == "tensorboard" else found(name, *rest))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    evaluation = Evaluation(((1, 2, 3),), every=10, max_new_tokens=4)
    assert Trainer(model, examples(), MTP, settings(log_every=5), tmp_path, evaluation=evaluation).run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written[0] == (str(tmp_path / "tensorboard"), 1) and written[-1] == "closed"
    scalars = {(name, step): value for name, value, step in written[1:-1]}
    for record in records:
        if "evaluation" in record:
            assert scalars["tokens_per_step", record["step"]] == record["evaluation"]["tokens_per_step"]
        else:
            assert scalars["loss", record["step"]] == record["loss"] and scalars["right_base/2", record["step"]] == record["right_base"][1]


def test_bfloat16_with_float32_weights(model, tmp_path):
    """The base computes in bfloat16; what is trained, its moments and its file are float32."""
    half = load_model(model.directory, dtype=torch.bfloat16)
    trainer = Trainer(half, examples(), MTP, settings(), tmp_path)
    assert trainer.run()
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32} and all(t.isfinite().all() for t in tensors.values())
    assert half.layers[0].o_proj.weight.dtype == torch.bfloat16
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_no_number_ends_the_run(model, tmp_path):
    trainer = Trainer(model, examples(), MTP, settings(save_every=2), tmp_path)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    with torch.no_grad():
        model.layers[0].o_proj.lora_A[0, 0] = float("nan")
    with pytest.raises(TrainingFailed, match="the loss is nan .* at step 4"):
        trainer.run()
    assert Trainer(model, examples(), MTP, settings(save_every=2), tmp_path, resume=True).step == 3


def test_a_gradient_that_is_no_number_ends_the_run(model, tmp_path):
    run = Trainer(model, examples(), MTP, settings(), tmp_path)
    model.layers[0].o_proj.lora_B.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingFailed, match="the gradient norm (inf|nan) at step 1"):
        run.run()


def test_a_full_disk_ends_the_run_and_says_what_is_kept(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    def run(directory):
        monkeypatch.setattr(checkpoint, "save_file", full)
        with pytest.raises(TrainingFailed) as failed:
            Trainer(model, examples(), MTP, settings(), directory, resume=True).run()
        monkeypatch.undo()
        assert "checkpoint.safetensors cannot be written: No space left on device" in str(failed.value)
        return str(failed.value)

    assert "there is no checkpoint in" in run(tmp_path / "new")
    trainer = Trainer(model, examples(), MTP, settings(), tmp_path / "old")
    trainer.train_step()
    trainer.save()
    assert f"--resume continues from the last checkpoint in {tmp_path / 'old'}" in run(tmp_path / "old")


def test_shares_of_passes_without_the_later_masks(model, tmp_path):
    """A mask's share of right guesses is of the passes that had it."""
    trainer = Trainer(model, examples(), MTP, settings(accumulate=4, drop_masks=0.5), tmp_path)
    records = [trainer.train_step() for _ in range(4)]
    assert any(trainer._pass(number)[1]["masks"] == 1 for number in range(16))
    assert all(math.isfinite(share) for record in records for share in record["right_base"] + record["right_sampler"])


@pytest.mark.parametrize("sampler", [True, False])
def test_the_bar_tells_what_is_known(model, tmp_path, capsys, sampler):
    """A mask that the pass had not, and a sampler that the adapter has not, have no figures."""
    trainer = Trainer(model, examples(), MTPConfig(3, 2, sampler=sampler), settings(drop_masks=0.9), tmp_path)
    number = next(n for n in range(20) if trainer._pass(n)[1]["masks"] == 2)
    trainer.step = number
    with watch.Watch(tmp_path, 20, number, trainer.world) as outlets:
        outlets.step(trainer.train_step(), True)
    told = capsys.readouterr().err
    assert re.search(r"right \d+ \d+ - %, \d+ tokens/s", told) and "nan" not in told and ("sampler" in told) is sampler


def test_signals_are_the_callers_again(model, tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    assert Trainer(model, examples(), MTP, settings(steps=1), tmp_path).run()
    assert [signal.getsignal(number) for number in numbers] == before


def test_accumulation(model, tmp_path):
    """A step of two passes reports the mean loss of both, and moves along the mean of their gradients."""
    config = settings(accumulate=2, clip=1e9, anchors_per_sequence=None)
    trainer = Trainer(model, examples(), MTP, config, tmp_path)
    model_parameters = trainer.parameters
    start = {n: p.detach().clone() for n, p in model_parameters.items()}
    totals, reports, gradients = [], [], {n: torch.zeros_like(p) for n, p in start.items()}
    for number in (0, 1):
        batch = collate([examples()[i] for i in batch_indices(7, 2, number, config.seed)])
        total = mtp_loss(model, batch).total
        for name, gradient in zip(
            gradients, torch.autograd.grad(total, list(model_parameters.values()), allow_unused=True), strict=True
        ):
            gradients[name] += gradient / 2
        totals.append(float(total.detach()))
        reports.append(report(mtp_loss(model, batch).sums, sampler=True))
    record = trainer.train_step()
    assert record["loss"] == pytest.approx(sum(totals) / 2, rel=1e-6)
    for name in ("right_base", "right_sampler"):
        assert record[name] == pytest.approx([sum(pair) / 2 for pair in zip(*(getattr(r, name) for r in reports), strict=True)], abs=1e-4)
    norm = sum(float(g.pow(2).sum()) for g in gradients.values()) ** 0.5
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_clipping_bounds_the_step(model, tmp_path):
    record = Trainer(model, examples(), MTP, settings(clip=1e-3), tmp_path).train_step()
    assert record["grad_norm"] > 1e-3
    for bound, scale in ((2.5, 0.5), (5.0, 1.0), (10.0, 1.0)):  # the norm is returned as it was; a smaller one is left alone
        one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        one.grad, two.grad = torch.tensor([3.0]), torch.tensor([-4.0])
        assert World().clip_gradients([one, torch.nn.Parameter(torch.zeros(2)), two], bound) == 5.0
        assert (one.grad.item(), two.grad.item()) == (3 * scale, -4 * scale)


def test_learning_rate():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.2)
    assert [config.lr_at(step) for step in (0, 4, 9, 10, 50, 80)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert [config.lr_at(step) for step in (85, 90, 99)] == pytest.approx([0.75, 0.5, 0.05])
    assert TrainConfig().warmup == 5000 and TrainConfig(steps=1000).warmup == 100  # the paper's share
    both = TrainConfig(steps=10, lr=1.0, warmup=8, decay=0.8)  # where the two meet, the lower one
    assert [both.lr_at(step) for step in (3, 4, 5)] == pytest.approx([0.5, 0.625, 0.625])
    flat = TrainConfig(steps=5, lr=3.0, warmup=0)
    assert [flat.lr_at(step) for step in range(5)] == [3.0] * 5


def test_learning_rate_is_used(model, tmp_path):
    trainer = Trainer(model, examples(), MTP, settings(lr=1e-2, warmup=10, decay=0.0), tmp_path)
    before = model.layers[0].o_proj.lora_B.detach().clone()
    record = trainer.train_step()
    assert record["lr"] == pytest.approx(1e-3)
    # AdamW's first step moves each entry by the learning rate, whatever the gradient's size.
    assert float((model.layers[0].o_proj.lora_B.detach() - before).abs().max()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("batch_size", 0), ("accumulate", 0), ("save_every", 0), ("log_every", 0),
     ("anchors_per_sequence", 0), ("lr", 0.0), ("lr", float("nan")), ("clip", 0.0), ("mask_decay", 0.0),
     ("lr", float("inf")), ("lcm_weight", float("inf")), ("seed", 2**40),
     ("mask_decay", 1.5), ("warmup", -1), ("soft_targets", 1.1), ("drop_masks", -0.1), ("pack_length", 2),
     ("steps", 1.5), ("seed", 1.0), ("anchors_per_sequence", 2.0), ("decay", -0.1), ("decay", 1.1), ("weight_decay", -1.0), ("lcm_weight", -1.0)],
)  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


@pytest.fixture(scope="module")
def command_line(tmp_path_factory):
    """A model directory with a tokenizer, a data file, and an uninterrupted run of the command line."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = tmp_path_factory.mktemp("cli")
    save_hf(place / "model", seed=2)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<u>", "a", "b", "c", "d", "e"])}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<u>").save_pretrained(place / "model")
    rng = np.random.default_rng(1)
    texts = [(" ".join(rng.choice(list("abc"), 4)), " ".join(rng.choice(list("de"), 8))) for _ in range(9)]
    rows = [{"prompt": prompt, "response": response} for prompt, response in texts]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train", "--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--device", "cpu",
                 "--masks", "2", "--rank", "2", "--steps", "150", "--batch-size", "2", "--lr", "0.003", "--warmup", "5",
                 "--anchors-per-sequence", "3", "--save-every", "20", "--log-every", "1",
                 "--dtype", "float32"]  # fmt: skip
    assert main([*arguments, "--out", str(place / "whole")]) == 0
    return place, arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_killed_and_resumed(command_line, tmp_path, number):
    place, arguments = command_line
    out = tmp_path / "run"
    threads = str(torch.get_num_threads())  # the same sums need the same number of them
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    child = subprocess.Popen(
        [sys.executable, "-m", "mtp_model", *arguments, "--out", str(out)], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # else a run behind nohup ignores it, as it should
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while child.poll() is None and time.monotonic() < deadline:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes().count(b"\n") >= 25:
            child.send_signal(number)
            break
        time.sleep(0.002)
    output = child.communicate(timeout=60)[0]
    steps = len((out / "log.jsonl").read_text().splitlines())
    assert 25 <= steps < 150, output
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
    else:
        assert child.returncode == 130
        assert f"stopped after step {steps} of 150" in output
    assert main([*arguments, "--out", str(out)]) == 2  # not without --resume
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert same_adapter(out, place / "whole")
    assert log_of(out) == log_of(place / "whole")
    assert [record["step"] for record in log_of(out)] == list(range(1, 151))


def test_killed_ten_times_at_random_moments(model, tmp_path, monkeypatch):
    """Each time without warning, wherever the process is: in a pass, in the optimizer, writing the log or the checkpoint."""
    config, out = settings(steps=150, save_every=3, soft_targets=0.5, train_masks=True), tmp_path / "killed"
    assert Trainer(model, examples(), MTP, config, tmp_path / "whole").run()
    # A server that has imported everything forks the processes: they start at once, and have none of this one's threads.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([go_on.__module__])
    again = model.directory, examples(), MTP, config, out
    random, longest, killed, done = np.random.default_rng(), 0.3, 0, 0
    for _ in range(60):
        child = processes.Process(target=go_on, args=again)
        child.start()
        child.join(float(random.uniform(0.05, longest)))
        killed += child.is_alive()
        child.kill()
        child.join()
        if killed == 10:
            break
        before, done = done, steps_done(out)
        longest *= 1.3 if done == before else 0.6 if done > before + 10 else 1.0  # a machine may be busy, or be so no longer
    assert killed == 10 and 0 < steps_done(out) < 150
    assert go_on(*again)
    assert same_adapter(out, tmp_path / "whole")
    assert log_of(out) == log_of(tmp_path / "whole")


def test_generate_command(command_line, capsys):
    place, _ = command_line
    texts = []
    for mode in ("autoregressive", "quadratic"):
        options = ["--model", str(place / "model"), "--adapter", str(place / "whole"), "--device", "cpu"]
        assert main(["generate", *options, "--mode", mode, "--max-new-tokens", "12", "a b c"]) == 0
        captured = capsys.readouterr()
        assert "12 tokens" in captured.err
        texts.append(captured.out)
    assert texts[0] == texts[1] and len(texts[0].split()) == 12
    assert main(["generate", *options, "--mode", "autoregressive", "--lookup", "4", "--lookup-match", "1", "--max-new-tokens", "12", "a b c"]) == 0
    captured = capsys.readouterr()
    assert captured.out == texts[0] and not captured.err.startswith("1.00 tokens per step")
    assert main(["generate", *options, "--lookup-match", "1", "a b c"]) == 2 and "lookup_match is 1 and lookup None" in capsys.readouterr().err
    assert main(["generate", *options, "--chat", "a b c"]) == 2 and "no chat template" in capsys.readouterr().err
    assert main(["generate", *options, "--mode", "autoregressive", "--k", "2", "a b c"]) == 2 and "--k is 2 and mode" in capsys.readouterr().err
    options[options.index("--adapter") + 1] = str(place / "none")
    assert main(["generate", *options, "--mode", "autoregressive", "a b c"]) == 2 and "none is not a directory" in capsys.readouterr().err
    for device in ("meta", "mps", "nonsense"):
        with pytest.raises(SystemExit):
            main(["generate", "--device", device, "a b c"])
        assert "accepted are cpu, cuda" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_read(command_line, tmp_path, capsys):
    shutil.copytree(command_line[0] / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    for content in ("{", "{}", None):
        file.unlink() if content is None else file.write_text(content)
        assert main(["generate", "--model", str(tmp_path / "model"), "--mode", "autoregressive", "--device", "cpu", "a b c"]) == 2
        assert f"{tmp_path / 'model'} has no tokenizer that transformers can load" in capsys.readouterr().err


def test_train_further_command(command_line, tmp_path, capsys):
    place, arguments = command_line
    given = ["--adapter", str(place / "whole"), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*arguments, *given]) == 2
    assert f"--masks and --rank with --adapter {place / 'whole'}, which has its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    save_hf(tmp_path / "other", seed=9)
    assert main(["train", "--model", str(tmp_path / "other"), "--data", "none.jsonl", "--device", "cpu", *given]) == 2
    assert "trained for another base model: fingerprint" in capsys.readouterr().err  # found out before the data are read
    without = [word for i, word in enumerate(arguments) if not {"--masks", "--rank"} & set(arguments[max(i - 1, 0) : i + 1])]
    assert main([*without, *given]) == 0
    further, before = load_adapter(tmp_path / "out"), load_adapter(place / "whole")
    assert further.config == before.config == MTPConfig(2, 2)
    assert further.notes["before"] == before.notes and further.notes["training"]["steps"] == 2
    distance = max(float((further.tensors[name] - tensor).abs().max()) for name, tensor in before.tensors.items())
    assert 0 < distance < 0.02  # two small steps from it, not from a new one


def test_settings_of_an_evaluation_without_data(tmp_path, capsys):
    for name in ("every", "prompts", "new-tokens"):
        assert main(["train", "--data", "none.jsonl", "--out", str(tmp_path / "out"), f"--eval-{name}", "3"]) == 2
        assert f"--eval-{name} without --eval-data" in capsys.readouterr().err


def test_generate_draws(command_line, capsys):
    """The seed that served is told, and gives the same text again, in another mode too."""
    place, _ = command_line
    arguments = ["generate", "--model", str(place / "model"), "--adapter", str(place / "whole"), "--device", "cpu", "--max-new-tokens", "12", "a b c"]
    assert main([*arguments, "--temperature", "2", "--top-k", "9"]) == 0
    first = capsys.readouterr()
    seed = first.err.split("seed ")[1].strip()
    assert main([*arguments, "--temperature", "2", "--top-k", "9", "--seed", seed, "--mode", "quadratic"]) == 0
    again = capsys.readouterr()
    assert again.out == first.out and f"seed {seed}" in again.err
    assert main(arguments) == 0
    greedy = capsys.readouterr()
    assert greedy.out != first.out and "seed" not in greedy.err
    assert main([*arguments, "--seed", "3"]) == 2 and "seed is 3 and temperature 0" in capsys.readouterr().err


def test_generate_writes_its_last_words(command_line, capsys, monkeypatch):
    """All of the text, a character that is not whole at its end too; the end-of-text token is none of it."""
    place, _ = command_line
    options = ["generate", "--model", str(place / "model"), "--adapter", str(place / "whole"), "--device", "cpu", "--max-new-tokens", "6", "a b"]
    assert main(options) == 0
    words = capsys.readouterr().out.split()
    original = PreTrainedTokenizerFast.decode
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda self, ids, **o: original(self, ids, **o) + "\ufffd")
    assert main(options) == 0
    assert capsys.readouterr().out == " ".join(words) + "\ufffd\n"
    monkeypatch.undo()
    ends = words.index(words[3])
    (place / "ends").mkdir()
    for file in (place / "model").iterdir():
        (place / "ends" / file.name).write_bytes(file.read_bytes())
    token = PreTrainedTokenizerFast.from_pretrained(place / "model")(words[3])["input_ids"]
    (place / "ends" / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))
    options[2] = str(place / "ends")
    assert main(options) == 0
    assert capsys.readouterr().out.split() == words[:ends]


def test_another_model_needs_its_own_adapter(command_line, capsys):
    for command in ("generate", "choose"):
        assert main([command, "--model", str(command_line[0] / "model"), *(["hello"] if command == "generate" else [])]) == 2
        assert "no --adapter was given" in capsys.readouterr().err


def test_sequences_are_no_longer_than_the_model_was_made_for(command_line, tmp_path, capsys):
    place, arguments = command_line
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 7}))
    arguments = [*arguments, "--model", str(tmp_path / "model"), "--steps", "1", "--out"]
    assert main([*arguments, str(tmp_path / "longer"), "--max-length", "8"]) == 2
    assert "max_length is 8; accepted is up to the 7" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert load_adapter(tmp_path / "out").notes["max_length"] == 7 and "18 sequences" in capsys.readouterr().out


def test_the_adapter_says_what_it_was_trained_on(command_line):
    notes = load_adapter(command_line[0] / "whole").notes
    assert (notes["data"], notes["max_length"], notes["dtype"]) == (["data.jsonl"], 1024, "float32")


def test_examples_end_as_the_models_texts_do(command_line, tmp_path, monkeypatch):
    place, arguments = command_line
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    asked = []
    monkeypatch.setattr("mtp_model.train.command.read_examples", lambda *args, **options: asked.append(options["eos"]) or read_examples(*args, **options))
    assert main([*arguments, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--steps", "1"]) == 0
    assert asked == [4]


def test_train_help_names_every_setting():
    result = subprocess.run(
        [sys.executable, "-m", "mtp_model", "train", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 0
    flags = set(re.findall(r"--[a-z-]+", result.stdout))
    assert {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)} <= flags


def test_out_is_no_place_for_a_run(model, tmp_path):
    """Refused before any work, and nothing is changed: a run without --resume, an adapter without its checkpoint with it, a file."""
    run = tmp_path / "run"
    assert Trainer(model, examples(), MTP, settings(), run).run()
    (run / "checkpoint.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for resume, word in ((False, "holds a run already"), (True, "no checkpoint.safetensors to go on from")):
        with pytest.raises(ValueError, match=word):
            Trainer(model, examples(), MTP, settings(), run, resume=resume)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    early = tmp_path / "early"
    early.mkdir()
    (early / "log.jsonl").touch()  # a run that was stopped before its first line
    Trainer(model, examples(), MTP, settings(), early)
    with pytest.raises(ValueError, match="cannot be made or written to"):
        Trainer(model, examples(), MTP, settings(), run / "log.jsonl" / "deeper")
    (run / "checkpoint.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        Trainer(model, examples(), MTP, settings(), run, resume=True)


def test_another_dtype_is_another_run(model, tmp_path):
    assert Trainer(model, examples(), MTP, settings(steps=2), tmp_path).run()
    with pytest.raises(ValueError, match="dtype: 'float32', now 'bfloat16'"):
        Trainer(load_model(model.directory, dtype=torch.bfloat16), examples(), MTP, settings(steps=2), tmp_path, resume=True)


def test_examples_without_a_place_for_masks(model, tmp_path):
    short = Example(np.arange(5).astype(np.int32), np.arange(5) >= 4)
    with pytest.raises(ValueError, match=r"examples \[7\] have no place for masks"):
        Trainer(model, [*examples(), short], MTP, settings(), tmp_path)


def test_the_log_is_json(model, tmp_path):
    """Also where a mask had no label and the run no sampler: JSON has no nan."""
    short = [Example(np.arange(4).astype(np.int32), np.arange(4) >= 2)]
    assert Trainer(model, short, dataclasses.replace(MTP, sampler=False), settings(steps=1, batch_size=1), tmp_path).run()

    def refuse(constant):
        raise AssertionError(constant)

    (record,) = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert record["sampler"] is None and record["right_base"][1] is None


@pytest.mark.parametrize("command", ["train", "generate"])
def test_errors_end_with_status_two(command, tmp_path, capsys):
    rest = ["--data", str(tmp_path / "d"), "--out", str(tmp_path / "o")] if command == "train" else ["hello"]
    assert main([command, "--model", str(tmp_path / "nothing"), *rest]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "o").exists()


def test_a_device_that_is_not_there(capsys):
    for device, word in (("foo", "is no device"), *(() if torch.cuda.is_available() else (("cuda", "finds no GPU"),))):
        with pytest.raises(SystemExit):
            main(["generate", "--device", device, "hello"])
        assert word in capsys.readouterr().err
