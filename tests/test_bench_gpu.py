"""The one command for a GPU: its steps exist, failures and time limits are recorded, and without a GPU it says so."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import pytest_collection_modifyitems

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


@pytest.mark.parametrize("name", ["kernels", "check_bfloat16", "check_drawn", "check_lookup", "decode", "decode_shapes", "train"])
def test_the_steps_flags_are_accepted(tmp_path, monkeypatch, capsys, name):
    """Each command with its flags, stopped by a flag that does not exist: the parser must complain of that one only."""
    (step,) = [s for s in gpu.steps(tmp_path, tmp_path / "texts.jsonl") if s.name == name]
    python, minus_m, module, *flags = step.command
    assert (python, minus_m) == (sys.executable, "-m")
    monkeypatch.setattr(sys, "argv", [module, *flags, "--no-such-flag"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 2 and "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_copies_share_the_tests(tmp_path):
    """Side by side, each with its part: together all of the tests, each once; a failure of one is the step's."""
    step = gpu.Step("tests", ("pytest",), 1.0, copies=3)
    shards = [command[-1] for command, _ in step.commands(tmp_path)]
    parts = []
    for shard in shards:
        parts.append(list(range(7)))
        pytest_collection_modifyitems(SimpleNamespace(getoption={"--shard": shard}.get), parts[-1])
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    code = "import sys; print(sys.argv[-2:]); raise SystemExit(sys.argv[-1] == '1/2')"
    (outcome,) = gpu.run([gpu.Step("one fails", (sys.executable, "-c", code), 1.0, copies=2)], tmp_path, 60)
    assert outcome.status == "failed" and "['--shard', '0/2']" in (tmp_path / "one fails.0.txt").read_text()


def test_texts(tmp_path):
    gpu.write_texts(tmp_path / "texts.jsonl", 3)
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(len(json.loads(line)["text"]) > 500 for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err
