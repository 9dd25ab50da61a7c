"""The one command for a GPU: its steps exist, failures and time limits are recorded, and without a GPU it says so."""

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu


def test_steps_are_recorded_whatever_becomes_of_them(tmp_path, capsys):
    def step(name, code, share=1.0):
        return gpu.Step(name, (sys.executable, "-c", code), share)

    todo = [step("good", "print('fine')"), step("bad", "raise SystemExit('broken')"), step("slow", "import time; time.sleep(60)", 0.1)]
    outcomes = gpu.run(todo, tmp_path, 20)
    assert [o.status for o in outcomes] == ["passed", "failed", "out of time"]
    assert (tmp_path / "good.txt").read_text() == "fine\n" and outcomes[2].seconds < 15
    assert "broken" in capsys.readouterr().out


def test_every_step_names_a_command_that_exists(tmp_path):
    todo = gpu.steps(tmp_path, tmp_path / "texts.jsonl")
    assert any("tests/test_triton_gated_lora.py" in part for part in todo[0].command)
    assert len({step.name for step in todo}) == len(todo)
    for step in todo:
        for part in step.command:
            assert not part.startswith("tests/") or (gpu.ROOT / part).exists(), part


@pytest.mark.parametrize("name", ["kernels", "check_bfloat16", "decode", "decode_shapes", "train"])
def test_the_steps_flags_are_accepted(tmp_path, name):
    """Each command with its flags, stopped by a flag that does not exist: the parser must complain of that one only."""
    (step,) = [s for s in gpu.steps(tmp_path, tmp_path / "texts.jsonl") if s.name == name]
    result = subprocess.run([*step.command, "--no-such-flag"], cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "unrecognized arguments: --no-such-flag" in result.stderr


def test_copies_share_the_tests(tmp_path):
    """Side by side, each with its part: together all of the file's tests, each once; a failure of one is the step's."""
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "tests/test_layout.py")
    (outcome,) = gpu.run([gpu.Step("collect", command, 1.0, copies=3)], tmp_path, 200)
    parts = [[line for line in (tmp_path / f"collect.{i}.txt").read_text().splitlines() if "::" in line] for i in range(3)]
    whole = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True).stdout.splitlines()
    assert outcome.status == "passed" and sorted(sum(parts, [])) == sorted(line for line in whole if "::" in line) and min(map(len, parts)) > 5
    code = "import sys; raise SystemExit(sys.argv[-1] == '1/2')"
    assert gpu.run([gpu.Step("one fails", (sys.executable, "-c", code), 1.0, copies=2)], tmp_path, 60)[0].status == "failed"


def test_texts(tmp_path):
    gpu.write_texts(tmp_path / "texts.jsonl", 3)
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(len(json.loads(line)["text"]) > 500 for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err
