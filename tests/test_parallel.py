"""Several processes train what one trains: the same losses and weights within rounding, in every form."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_hf
from safetensors.torch import load_file

from mtp_model import load_adapter
from mtp_model.__main__ import main
from mtp_model.train import World

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "--device", "cpu", "--dtype", "float32", "--masks", "2", "--rank", "3", "--steps", "6", "--batch-size", "4", "--lr", "0.01", "--warmup", "2",
    "--anchors-per-sequence", "3", "--save-every", "3", "--log-every", "1", "--train-masks", "--accumulate", "2", "--drop-masks", "0.5",
    "--soft-targets", "0.5", "--pack-length", "24", "--eval-every", "4", "--eval-prompts", "3", "--eval-new-tokens", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("parallel")
    save_hf(place / "model", seed=2)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<u>", "a", "b", "c", "d", "e"])}, unk_token="<u>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<u>").save_pretrained(place / "model")
    random = np.random.default_rng(1)
    with open(place / "data.jsonl", "w") as file:
        for size in random.integers(6, 14, 24):
            ids = random.integers(0, 6, size).tolist()
            file.write(json.dumps({"prompt_ids": ids[:3], "response_ids": ids[3:]}) + "\n")
    return place


def arguments(place, out, *more):
    data = ["--data", str(place / "data.jsonl"), "--eval-data", str(place / "data.jsonl")]
    return ["--model", str(place / "model"), *data, "--out", str(out), *SETTINGS, *more]


def start(place, out, *more, processes=2):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(29500 + os.getpid() % 2000)]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "mtp_model.train", *arguments(place, out, *more)], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(place):
    assert main(["train", *arguments(place, place / "alone")]) == 0
    return place / "alone"


def records(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def assert_same_run(got, expected):
    """The same log and adapter within rounding: AdamW makes of a rounding error in a small gradient a visible step."""
    for one, other in zip(records(got), records(expected), strict=True):
        assert one["step"] == other["step"]
        if "evaluation" in one:
            assert one["evaluation"] == other["evaluation"]
            continue
        for name in ("loss", "ntp", "base", "sampler", "lcm", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
        assert one["mask_rows"] == other["mask_rows"]
    left, right = (load_file(d / "adapter_model.safetensors") for d in (got, expected))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].shape == right[name].shape
        assert (left[name] - right[name]).abs().max() <= 2e-3 * right[name].abs().max(), name
    assert load_adapter(got).config == load_adapter(expected).config


@pytest.mark.parametrize("shard", [[], ["--shard", "--recompute"]], ids=["data-parallel", "sharded"])
def test_two_processes(place, alone, tmp_path, shard):
    process = start(place, tmp_path / "run", *shard)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "2 processes" in output
    assert output.count("done: 6 steps") == 1  # only the first process speaks
    assert_same_run(tmp_path / "run", alone)


def test_resumed_by_another_number(place, alone, tmp_path):
    """Three steps sharded over two processes, the rest in one."""
    out = tmp_path / "run"
    process = start(place, out, "--shard")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if (out / "checkpoint.safetensors").exists():
            break
    process.send_signal(signal.SIGINT)
    output = "".join(lines) + process.communicate(timeout=60)[0]
    assert (out / "checkpoint.safetensors").exists(), output
    assert main(["train", *arguments(place, out, "--resume")]) == 0
    assert_same_run(out, alone)


def test_a_lost_process_ends_the_run(place, tmp_path):
    out = tmp_path / "run"
    process = start(place, out, "--steps", "100000", "--save-every", "5")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (out / "checkpoint.safetensors").exists():
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in children if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "cannot go on after step" in output and f"--resume continues from the last checkpoint in {out}" in output
    assert not list(out.glob("*.tmp")) or (out / "checkpoint.safetensors").exists()
    adapter = load_adapter(out)
    steps = adapter.notes["training"]["steps_done"]
    assert steps >= 5 and steps % 5 == 0
    assert records(out)[-1]["step"] >= steps


def test_batch_must_divide():
    assert World(1, 2).part(4) == slice(2, 4)
    with pytest.raises(ValueError, match="batch_size is 3 for 2 processes; accepted is a multiple"):
        World(0, 2).part(3)


def test_one_process_needs_no_others():
    world = World()
    assert torch.equal(world.all_sum(torch.ones(2)), torch.ones(2))
    calls = []
    assert world.one_by_one(lambda: calls.append(7) or 7) == 7 and calls == [7]
