"""`python -m bench.train` at toy size: the plain way is the same training, a wrong way is refused, and the command writes what it says."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import gpu, train
from bench.plain_training import Sequences, dense, flex, plain_loss, states
from bench.training_job import PLAIN, WAYS, Case, Job, Way, check, check_case, found, make_batches, make_model
from mtp_kernels.reference import allowed_keys
from mtp_model.data import Example, collate
from mtp_model.layout import training_layout
from mtp_model.loss import choose_anchors

TINY = ["--batch-size", "2", "--length", "24", "--anchors", "2", "--rounds", "2", "--seconds", "0", "--steps", "1", "--device", "cpu"]


def make_batch(limit=None, lengths=(9, 6, 12)):
    """Sequences of different lengths, with prompts and a second turn; anchors of which some are padding."""
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(0, 6, n).astype(np.int32), np.arange(n) >= first) for n, first in zip(lengths, (1, 3, 5), strict=True)]
    examples[2].answer[8:10] = False
    batch = collate(examples)
    return batch, choose_anchors(batch, limit, torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "k, limit, recipe, config",
    [
        (3, None, {}, {}),
        (1, None, {}, dict(num_key_value_heads=4)),
        (2, 5, dict(mask_decay=0.5, lcm_weight=0.25), dict(num_key_value_heads=1, tie_word_embeddings=True)),
        (3, 2, dict(lcm_weight=3.0), dict(attention_bias=True)),
        (2, None, {}, dict(family="qwen3")),
        (16, None, dict(mask_decay=0.9), {}),
    ],
)
def test_the_plain_way_is_the_same_training(toy_adapter_model, k, limit, recipe, config):
    """In float64 it differs from ours, and in float32 from itself in float64, by float32's rounding alone."""
    model = toy_adapter_model(k=k, rank=3, train_masks=True, **config)
    batches = [make_batch(limit)]
    results = {way: found(Job(model, batches, recipe), WAYS[way]) for way in ("ours", "ours-recompute", PLAIN)}
    numbers, gradients = found(Job(model.double(), batches, recipe), WAYS[PLAIN])
    assert gradients.keys() == model.adapter_parameters().keys() and numbers["lcm"] > 0 and numbers["base"] != numbers["ntp"]
    for way, (got, each) in results.items():
        assert got == pytest.approx(numbers, rel=1e-5), way
        for name, gradient in each.items():
            bound = 1e-4 * float(gradients[name].abs().max()) + 1e-12
            torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=bound, msg=lambda m, at=(way, name): f"{at}: {m}")


@pytest.mark.parametrize("limit", [None, 2])
def test_dense_and_flex_masks_are_the_rule(toy_adapter_model, limit):
    batch, anchors = make_batch(limit)
    model = toy_adapter_model(k=3)
    rows = Sequences.of(batch, anchors, 3)
    layout = training_layout(len(batch.ids), anchors[0], 3).at(batch.ids, [0] * 3)
    at = torch.arange(rows.last.shape[1])
    assert torch.equal(rows.rule()(torch.arange(3).view(-1, 1, 1), None, at.view(-1, 1), at), allowed_keys(layout.rule))
    assert torch.equal(rows.positions.t(), layout.positions)
    with torch.no_grad():
        torch.testing.assert_close(states(model, rows, flex(rows)), states(model, rows, dense(rows)), rtol=1e-4, atol=1e-4)


def test_packed_sequences_are_refused():
    example = Example(np.array([1, 2, 3, 4], np.int32), np.ones(4, bool))
    batch = collate([[example, example]])
    with pytest.raises(ValueError, match="packed"):
        Sequences.of(batch, choose_anchors(batch), 2)


def wrong_gradient(model, *args, **recipe):
    """The loss is right, and so is every gradient but one."""
    total, numbers = plain_loss(model, *args, **recipe)
    extra = 1e-3 * model.layers[-1].down_proj.lora_B.sum()
    return total + extra - extra.detach(), numbers


def wrong_number(*args, **recipe):
    total, numbers = plain_loss(*args, **recipe)
    return total, numbers | {"lcm": 1.001 * numbers["lcm"]}


def no_number(*args, **recipe):
    total, numbers = plain_loss(*args, **recipe)
    return total * float("nan"), numbers


def test_check_refuses_what_is_wrong():
    case = Case("demo", 2, 24, 3, 4, 8)
    model = make_model(case, torch.device("cpu"), torch.float32, None)
    ways = [WAYS["ours"], WAYS[PLAIN], Way("gradient", wrong_gradient), Way("number", wrong_number), Way("nan", no_number)]
    results = check(model, case, {"mask_decay": 0.9}, ways)
    assert {name: good for name, (good, _) in results.items()} == {"ours": True, PLAIN: True, "gradient": False, "number": False, "nan": False}
    assert results["ours"][1] < 2e-5


def test_check_in_16_bits():
    case = Case("demo", 2, 24, 3, 4, 8)
    model = make_model(case, torch.device("cpu"), torch.bfloat16, None)
    results = check(model, case, {}, [WAYS["ours"], Way("nan", no_number)])
    assert results["ours"][0] and not results["nan"][0]


def test_other_shapes_are_checked_small():
    small, config = check_case(Case("Llama-3.1-8B", 1, 2048, None, 8, 128))
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 2) and small.length <= 64
    model = make_model(small, torch.device("cpu"), torch.float32, None, replace(config, hidden_size=64, intermediate_size=96, num_attention_heads=8))
    assert check(model, replace(small, rank=4), {}, [WAYS["ours"]])["ours"][0]


def test_a_way_by_itself(monkeypatch):
    """In a process of its own, with the settings of the one that asks."""
    commands, start = [], subprocess.Popen
    monkeypatch.setattr(train.subprocess, "Popen", lambda command, **options: commands.append(command) or start(command, **options))
    args = train.build_parser().parse_args([*TINY, "--masks", "4"])
    train.settle(args)
    (case,) = train.cases(args)
    with train.Apart(case, WAYS["ours"], args) as apart:
        for _ in range(3):
            apart()
        measured = apart.close()
    asked = train.build_parser().parse_args(commands[0][3:])
    assert train.cases(asked) == [case] and asked.only == "ours"
    assert measured["peak_mib"] > measured["above_mib"] > 0 and len(measured["seconds"]) == 3 and apart.process.returncode == 0


def test_a_way_that_ends_says_why():
    args = train.build_parser().parse_args(TINY)
    train.settle(args)
    (case,) = train.cases(args)
    with pytest.raises(RuntimeError, match="ours by itself ended with 2: .*--masks is 0"), train.Apart(replace(case, masks=0), WAYS["ours"], args):
        pass
    with train.Apart(case, WAYS["ours"], args) as run:
        run.process.kill()
        with pytest.raises(RuntimeError, match="ours by itself ended with -9"):
            run()


class Beside:
    """In the place of `Apart`: no process, and no step."""

    asked = []

    def __init__(self, case, way, args):
        self.way = way

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self):
        self.asked.append(self.way.name)

    def close(self):
        return {"peak_mib": 300.0, "above_mib": 100.0, "seconds": [1.0]}


def test_peak_is_of_steps(monkeypatch):
    monkeypatch.setattr(train, "Apart", Beside)
    monkeypatch.setattr(Beside, "asked", [])
    assert train.peak_apart(None, WAYS["ours"], None) == 300 and Beside.asked == ["ours"] * 2


def test_the_command(tmp_path, capsys, monkeypatch):
    path = tmp_path / "train.json"
    monkeypatch.setattr(train, "Apart", Beside)
    monkeypatch.setattr(Beside, "asked", [])
    assert train.main([*TINY, "--ways", "ours", "plain", "flex", "--json", str(path)]) == 0
    values, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert {"date", "device", "commit", "versions", "cpu_threads"} <= values["environment"].keys()
    assert values["settings"]["dtype"] == "float32" and values["settings"]["length"] == 24 and "json" not in values["settings"]
    ours, plain = values["records"]
    assert (ours["way"], plain["way"], ours["shape"], ours["batch_size"], ours["anchors"]) == ("ours", "plain", "demo", 2, 2)
    for record in (ours, plain):
        assert record["status"] == "ok" and record["error"]["float32"] < 1e-4 and len(record["seconds"]) == 2
        assert record["peak_mib"] == 300 and record["above_mib"] == 100
        assert record["tokens_per_second"] > 0 and record["mask_rows_per_second"] > 0
    assert Beside.asked[:2] == ["ours", "plain"] and Beside.asked.count("ours") == Beside.asked.count("plain") > 2
    assert plain["over_plain"] == [1, 1, 1] and ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert shown.count("(best)") == 1 and "Left out: flex" in shown and all(line in shown for line in values["table"])


def test_a_wrong_way_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(WAYS, PLAIN, Way(PLAIN, wrong_gradient))
    monkeypatch.setattr(train, "Apart", Beside)
    assert train.main([*TINY, "--ways", "ours", "plain", "--json", "-"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [record["status"] for record in shown["records"]] == ["ok", "wrong"] and "seconds" not in shown["records"][1]
    (line,) = [line for line in shown["table"] if ": plain" in line]
    assert "wrong" in line and line.count(" - ") >= 5


def test_a_way_that_is_wrong_at_full_size_only_is_not_timed(monkeypatch, capsys):
    def loss(model, batch, *args, **recipe):
        return (wrong_number if batch.ids.shape[1] > 2 else plain_loss)(model, batch, *args, **recipe)

    monkeypatch.setitem(WAYS, PLAIN, Way(PLAIN, loss))
    monkeypatch.setattr(train, "Apart", Beside)
    assert train.main([*TINY, "--batch-size", "3", "--ways", "ours", "plain"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_longest():
    for room in (0, 63, 64, 100, 640, 5000):
        found = train.longest(lambda length, room=room: length <= room)
        assert found % 64 == 0 and found <= room and (found + max(64, found // 10) > room - 64)


def test_fit_on_a_cpu_looks_at_the_process(monkeypatch, capsys):
    monkeypatch.setattr(train, "peak_apart", lambda case, way, args: 100 + case.length * (1 if way.name == "ours" else 2))
    assert train.main(["--fit", "--memory", "1", "--ways", "ours", "plain", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    ours, plain = (int(line.split("|")[2]) for line in shown.splitlines() if "demo, batch" in line)
    assert 832 <= ours <= 924 and 384 <= plain <= 462


def test_the_gpu_command_takes_its_flags(tmp_path):
    (step,) = [s for s in gpu.steps(tmp_path, tmp_path / "texts.jsonl") if s.name == "train_step"]
    assert step.command[1:3] == ("-m", "bench.train")
    assert train.build_parser().parse_args(step.command[3:]).json == str(tmp_path / "train.json")


@pytest.mark.parametrize(
    "arguments, word",
    [(["--length", "3"], "--length"), (["--fit"], "--memory"), (["--fit", "--memory", "0"], "--memory"), (["--anchors", "-1"], "--anchors")],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        train.main(["--device", "cpu", *arguments])


def test_batches_are_of_the_length_and_differ():
    case = Case("demo", 4, 40, 5, 8, 4)
    batches = make_batches(case, 1024, torch.device("cpu"))
    assert all(batch.ids.shape == (40, 4) and int(batch.lengths.max()) == 40 and int(batch.lengths.min()) >= 30 for batch, _ in batches)
    assert all(anchors[0].shape == (5, 4) for _, anchors in batches)
    assert not torch.equal(batches[0][0].ids, batches[1][0].ids)
