"""`python -m bench.kernels`: its counts by hand, its check that can fail, its clock under a fake, its files; on a CPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import counts, kernels, measure, render, suite_attention, suites, timing
from bench.cases import BASE, COMPILED, EAGER, FLEX, GATHER, MODELS, OURS, SDPA, SETTINGS, TOY, Scope, Setting
from bench.counts import DATASHEETS, GPU

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
QKV = (1024, 256, 256)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command in a process of its own, which interprets: (finished process, directory of its files)."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("kernels")
    arguments = ["--quick", "--rows", "17", "--operation", "gated_lora_swiglu", "rms_norm", "attention", "--out", str(out)]
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=places)
    code = "import interpreter_speed, sys; interpreter_speed.apply(); from bench.kernels import main; sys.exit(main())"
    process = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return process, out


def test_command_checks_and_counts(command):
    process, out = command
    assert process.returncode == 0, process.stderr
    values = json.loads((out / "kernels.json").read_text())
    assert process.stdout.startswith(render.markdown(values)) and (out / "kernels.md").read_text() == render.markdown(values) + "\n"
    assert "Peak memory was not measured" in process.stdout and "measured here by itself: accept, argmax, sample.\n" in process.stdout
    assert "Counts, not measurements." in process.stdout and not values["measured"]
    assert {"date", "commit", "device", "versions"} <= set(values["environment"]) and values["settings"]["dtype"] == "bfloat16"
    assert {r["provider"] for r in values["rows"]} >= {EAGER, GATHER, BASE, SDPA, OURS} and {r["status"] for r in values["rows"]} == {"ok"}
    assert all(r["seconds"] is None and r["peak MiB"] is None for r in values["rows"])  # nothing was timed
    assert [r["layer"] for r in values["counts"]] == ["gate_up", "rms_norm", "attention", "attention"]
    assert {r["name"] for r in values["plans"]} == {"one launch", "project, finish", "shrink, product"}


@pytest.mark.parametrize("name, key", [("kernels", "rows"), ("counts", "counts"), ("plans", "plans")])
def test_csv_holds_what_the_json_holds(command, name, key):
    rows = json.loads((command[1] / "kernels.json").read_text())[key]
    with (command[1] / f"{name}.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert written == [{column: "" if value is None else str(value) for column, value in row.items()} for row in rows]


def test_report_renders_the_json_again(command, tmp_path, capsys):
    assert kernels.main(["--report", str(command[1] / "kernels.json")]) == 0
    assert capsys.readouterr().out == (command[1] / "kernels.md").read_text()
    (tmp_path / "other.json").write_text('{"rows": []}')
    for path, word in ((tmp_path / "other.json", "environment"), (tmp_path / "none.json", "none.json")):
        with pytest.raises(ValueError, match=word):
            kernels.main(["--report", str(path)])


@pytest.mark.parametrize("arguments, word", [(["--rows", "18"], "--rows"), (["--rank", "0"], "--rank"), (["--context", "1000"], "--context")])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        kernels.main(arguments)


# ---- counts


def test_settings_are_the_layouts_rows():
    for k in (4, 8):
        by_name = {s.name: (s.rows, s.on) for s in SETTINGS}
        assert by_name[f"linear, k = {k}"] == (k + 1 + k, k)
        assert by_name[f"quadratic, k = {k}"] == ((k + 1) * (k + 1), k * (k + 1))
    assert all(s.on == 0 or s.rows - s.on == -(-s.rows // 9) for s in SETTINGS if s.rows > 100)


def test_counts_by_hand():
    """Llama-3.1-8B's q/k/v at linear, k = 8, rank 128, two bytes."""
    count = counts.gated_lora(17, 8, 6144, 4096, 128, 3, 2)
    assert count.bytes == 2 * (25_165_824 + 69_632 + 1_572_864 + 786_432 + 104_448)  # W, x, A, B, y
    assert count.operations == 855_638_016 + 8 * 2 * 128 * (3 * 4096 + 6144)
    h100 = DATASHEETS[0]
    assert count.bound(h100) == "memory" and count.seconds(h100) == pytest.approx(16.54e-6, rel=1e-3)
    assert counts.gated_lora(8192, 0, 6144, 4096, 128, 3, 2).bound(h100) == "matmul"
    assert counts.gated_lora(17, 0, 6144, 4096, 128, 3, 2).bytes == 2 * (25_165_824 + 69_632 + 104_448)  # no adapter is read
    # y halves, and forward + backward, m 3, on 2, n 8, k 5, rank 1, 2 groups; 40 W, 15 x, 10 + 8 adapter, 12 y, 24 kept, 4 of s
    forward, both = (counts.gated_lora(3, 2, 8, 5, 1, 2, 4, swiglu=True, backward=backward) for backward in (False, True))
    assert forward.bytes == 4 * (40 + 15 + 18 + 12)
    assert both.bytes == forward.bytes + 4 * (2 * 24 + 2 * 4 + 12 + 40 + 18 + 2 * 5 + 15 + 18)
    assert (forward.operations, both.operations) == (240 + 72, 480 + 216)
    assert counts.rms_norm(2, 10, 2) == counts.Count(2 * (4 * 20 + 10), 100)
    assert counts.swiglu(2, 10, 2, backward=True).bytes == 2 * (3 * 20 + 5 * 20)
    assert counts.rotary_embedding(2, 3, 4, 2).bytes == 2 * (2 * 24 + 2 * 8)


def test_attention_counts_by_hand():
    """Llama-3.1-8B at linear, k = 8 behind 512 tokens, two bytes; and training's mask rows of a small shape, forward and backward."""
    (case,) = [c for c in suites.SUITES["attention"](MODELS["Llama-3.1-8B"], SETTINGS, Scope((16,))) if c.setting.rows == 17 and "512, batch 4" in c.shape]
    pairs = 4 * (sum(range(513, 522)) + 8 * 521 + sum(range(1, 9)))  # nine tokens, eight masks behind all of them, each behind the masks before
    count = case.count(2, True)
    assert count.bytes == 2 * (2 * 17 * 4 * 4096 + 2 * 4 * (512 + 17) * 1024)  # q and o; K and V of 529 columns, eight key heads
    assert count.operations == 32 * pairs * (4 * 128 + 1) + 17 * 4 * 4096
    # 4 tokens, k = 2: rows behind 2, 2, 4, 4 tokens with 1, 2, 1, 2 masks: 18 pairs over 8 columns; 3 heads of 1, d = 5
    assert suite_attention.attended(suite_attention.training_rows(4, 2, CPU)) == (8, 18)
    forward, both = (counts.attention(4, 1, 3, 1, 5, 8, 18, 4, backward) for backward in (False, True))
    assert forward == counts.Count(4 * (2 * 60 + 80), 54 * 21 + 60)
    assert both.bytes == forward.bytes + 4 * (4 * 60 + 2 * 80) + 2 * 4 * 2 * 12  # o, dy, q, dq; K, V, dK, dV; two sums, written and read
    assert both.operations == forward.operations + 54 * 51 + 2 * 60


def test_attention_cases_are_those_of_the_layouts():
    def cases(settings, scope):
        return list(suites.SUITES["attention"](MODELS["Llama-3.1-8B"], settings, scope))

    every = cases(SETTINGS, Scope((128,)))
    assert len(every) == 5 * 5 * 3 + 3 * 2 * 2
    for case in every[::15] + every[-1:]:
        rows = case.make.args[0](device=CPU)
        assert (rows.visible.shape[0], rows.num_masks) == (case.setting.rows, case.setting.on)
    quick = kernels.QUICK
    short = cases([s for s in SETTINGS if s.rows in quick["rows"]], Scope(tuple(quick["rank"]), tuple(quick["context"]), short=True))
    assert [(c.setting.rows, c.shape.split("128, ")[1]) for c in short[:4]] == [
        (rows, f"context {context}, batch 1") for rows in (1, 81) for context in (2048, 32768)
    ]
    assert [(c.shape.split("128, ")[1], c.backward) for c in short[4:]] == [("1024 tokens, k = 8", False), ("1024 tokens, k = 8", True)]
    assert not cases([Setting("few rows", 128, 114)], Scope((16,))) and len(cases(SETTINGS[:1], Scope((16,)))) == 15
    some = cases(SETTINGS, Scope((16,), (2048, 4096)))
    assert {c.shape.split("128, ")[1] for c in some} == {f"context 2048, batch {b}" for b in (1, 4, 16)} | {f"4096 tokens, k = {k}" for k in (4, 8)}


def test_flex_attention_competes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    first, second = list(suites.SUITES["attention"](TOY, SETTINGS[:2], Scope((16,), short=True)))
    assert [p.name for p in first.providers] == [SDPA, FLEX, OURS]
    assert first.providers[1].call is not second.providers[1].call  # each compiles for its own shapes


def test_attention_in_a_batch():
    """The toy checks of a short run have no batch."""
    found = [c for c in suites.SUITES["attention"](TOY, [Setting("quadratic, k = 4", 25, 20, mode="quadratic", k=4)], Scope((16,))) if "batch 4" in c.shape]
    rows = list(measure.check_toys(found, torch.float32, kernels.interpreted()))
    assert [r["provider"] for r in rows] == [SDPA, OURS] and all(r["status"] in ("ok", "skipped") for r in rows)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows", [suite_attention.decoding_rows("quadratic", 3, 40, 2, CPU), suite_attention.training_rows(24, 4, CPU)])
def test_flex_attention_has_the_rule(rows):
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    t, b = rows.visible.shape
    modified, allowed = suite_attention.mask_mod(rows.rule, 64), suites.reference.allowed_keys(rows.rule, 64)
    assert torch.equal(create_mask(modified, b, None, t, 64, device="cpu")[:, 0], allowed)
    randn = suite_attention.random_tensors(CPU, torch.float32)
    inputs = dict(q=randn(t, b, 4, 16), k=randn(b, 2, 64, 16), v=randn(b, 2, 64, 16), mask=allowed.unsqueeze(1))
    inputs["block_mask"] = create_block_mask(modified, b, None, t, 64, device="cpu")
    assert torch.allclose(suite_attention.flex(inputs), suite_attention.plain(inputs), atol=1e-5)


def test_readme_shows_what_the_command_prints():
    arguments = kernels.build_parser().parse_args(
        ["--operation", "gated_lora_linear", "gated_lora_swiglu", "--model", "Llama-3.1-8B", "--rows", "17", "81", "--rank", "128"]
    )
    printed = render.counts_table([kernels.count_row(case, 2) for case in kernels.select(arguments)])
    assert printed in (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


def test_projections_touched_by_tiles():
    assert counts.touched((128, 64, 64), 64, False) == 4  # each tile lies in one projection
    assert counts.touched((96, 96), 64, False) == 4  # the tile in the middle touches both
    assert counts.touched((96, 96), 64, True) == 4  # two halves of two tiles each


@pytest.mark.parametrize("rows, on, splits", [(1, 0, QKV), (17, 8, QKV), (81, 72, QKV), (1024, 1000, QKV), (1024, 0, QKV), (17, 8, (768, 768))])
def test_the_counted_plan_is_the_one_launched(monkeypatch, rows, on, splits):
    """Launches, programs and what is left in between, as the launcher asks for them; nothing runs."""
    pytest.importorskip("triton")
    from mtp_kernels import triton
    from mtp_kernels.triton import _device

    launched = []
    monkeypatch.setattr(_device, "launch", lambda kernel, grid, *args, **options: launched.append((kernel.__name__, grid, options)))
    n, k, rank, swiglu = sum(splits), 1024, 64, len(splits) == 2

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    arguments = empty(rows, k), empty(n, k), empty(len(splits) * rank, k), empty(n, rank), rows - on
    if swiglu:
        triton.gated_lora_swiglu(*arguments)
    else:
        triton.gated_lora_linear(*arguments, splits=splits)
    (plan,) = [p for p in counts.plans(rows, on, n, k, rank, splits, 2, swiglu) if p.chosen]
    few = ("project_kernel", "finish_kernel")
    names = {few: "project, finish", (*few, "product_kernel"): "shrink, product", ("product_kernel",): "product"}
    assert plan.name == names[tuple(name for name, *_ in launched)]
    assert plan.programs == tuple(torch.Size(grid).numel() for _, grid, _ in launched)
    left = [options["sums_ptr" if name == "finish_kernel" else "s_ptr"] for name, _, options in launched[1:]]
    if plan.name == "shrink, product":  # allocated for all rows; counted are those of tiles with a gate-on row
        assert plan.intermediate <= sum(t.numel() * t.element_size() for t in left)
    else:
        assert plan.intermediate == sum(t.numel() * t.element_size() for t in left)


# ---- the check


def wrong(i):
    return tuple(y * 1.01 for y in suites.linear_eager(i))


def not_a_number(i):
    return tuple(y * torch.nan for y in suites.linear_eager(i))


def without_adapter(i):
    return suites.linear_base(i)


def raising(i):
    raise RuntimeError("no such thing")


@pytest.mark.parametrize("function, status", [(wrong, "wrong"), (not_a_number, "wrong: error is nan"), (raising, "failed: RuntimeError: no such thing")])
def test_a_competitor_that_is_wrong_is_reported(monkeypatch, capsys, tmp_path, function, status):
    monkeypatch.setattr(suites, "linear_gather", function)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    arguments = ["--quick", "--rows", "1", "--operation", "gated_lora_linear", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    for row in rows:
        assert row["status"] == {GATHER: status, OURS: "skipped"}.get(row["provider"], "ok"), row
    assert all(r["error"] > 2 for r in rows if r["status"] == "wrong")
    text = capsys.readouterr().out
    assert status.split(":")[0] in text and "TRITON_INTERPRET=1" in text and f"{len(rows) // 4} not" in text


# ---- the clock


class FakeClock:
    """Time passes only in runs, which say how much."""

    now = 0.0
    waited = 0

    def begin(self):
        return self.now

    end = begin

    def seconds(self, begin, end):
        return end - begin

    def wait(self):
        self.waited += 1


def test_rounds_take_all_in_turn_and_keep_to_the_budget():
    clock, order = FakeClock(), []

    def run(name, seconds):
        def go():
            order.append(name)
            clock.now += seconds

        return go

    taken = timing.interleave({"a": run("a", 0.001), "b": run("b", 0.003)}, clock, budget=0.04, rounds=(3, 50))
    assert [round(s, 6) for s in taken["a"]] == [0.001] * 10 and [round(s, 6) for s in taken["b"]] == [0.003] * 10
    assert order == ["a", "b"] * 2 + ["a", "b", "b", "a"] * 5  # two rounds to warm up, then another one first each time
    assert len(timing.interleave({"a": run("a", 9.0)}, clock, 0.01, (3, 50))["a"]) == 3 and timing.interleave({}, clock, 1.0) == {}
    assert timing.percentiles([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))


def test_copies_exceed_the_cache_and_every_one_is_called():
    inputs = dict(x=torch.ones(256, requires_grad=True), m=3)
    rotated, cold = timing.copies(inputs, cache_bytes=4096)
    assert cold and len(rotated) == 13 and len({i["x"].data_ptr() for i in rotated}) == 13
    assert all(i["x"].is_leaf and i["x"].requires_grad and i["m"] == 3 for i in rotated)
    assert not timing.copies(inputs, cache_bytes=2**30)[1] and len(timing.copies(inputs, 0)[0]) == 2
    called = []
    run, calls = timing.run_of(lambda i: called.append(id(i)), rotated[:3], captured=False)
    run()
    assert calls == len(called) == 9 and called == 3 * [id(i) for i in rotated[:3]]


@pytest.fixture
def measured(monkeypatch):
    """Rows as a GPU gives them, of a toy case on the CPU: one competitor wrong, torch.compile left out."""
    monkeypatch.setattr(suites, "linear_gather", wrong)
    case = [c for c in suites.SUITES["gated_lora_linear"](TOY, [Setting("training", 18, 16, True)], Scope((8,))) if c.backward][0]
    providers = [p for p in case.providers if p.name not in (COMPILED, OURS)]
    return measure.measure(case, providers, torch.float32, CPU, GPU("roof", 1e9, 1e12), 2**16, timing.CPUClock(), 0.01)


def test_ratios_say_who_is_faster(monkeypatch):
    """Eager takes twice the base's time: over itself 1, of the base 2; the base is twice as fast as eager."""
    monkeypatch.setattr(measure, "interleave", lambda runs, *_: {p: [{EAGER: 0.2, BASE: 0.1}[p.name]] * 3 for p in runs})
    case = next(suites.SUITES["gated_lora_linear"](TOY, [Setting("rows", 2, 1)], Scope((8,))))
    providers = [p for p in case.providers if p.name in (EAGER, BASE)]
    eager, base = measure.measure(case, providers, torch.float32, CPU, GPU("roof", 1e9, 1e12), 1, timing.CPUClock(), 0.0)
    assert (eager["over_eager"], eager["of_base"], base["over_eager"], base["of_base"]) == (1, 2, 2, 1)


def test_the_worst_case_is_the_slowest():
    blank = dict(operation="swiglu", rows=9, on=0, rank=0, backward=False, provider=OURS, seconds=1e-6, error=None)
    cases = [blank | {"share_of_roof": a, "over_eager": b, "of_base": c, "peak MiB": d} for a, b, c, d in ((0.25, 3.0, 1.5, 2.0), (0.75, 1.0, 1.0, 8.0))]
    line = render.summary_table(cases).splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[5:9]] == ["0.50 (0.25)", "2.00 (1.00)", "1.25 (1.50)", "5.00 (8.00)"]


def test_only_right_competitors_are_timed(measured):
    eager, gather, base = measured
    assert (eager["status"], gather["status"], base["status"]) == ("ok", "wrong", "ok") and gather["seconds"] is None
    assert eager["over_eager"] == base["of_base"] == 1 and eager["of_base"] == pytest.approx(base["over_eager"])
    assert eager["p20"] <= eager["seconds"] <= eager["p80"] and eager["bound"] == "memory"
    assert eager["share_of_roof"] == pytest.approx(eager["bytes"] / 1e9 / eager["seconds"]) and base["bytes"] < eager["bytes"]


def test_measured_rows_are_rendered_and_drawn(measured, command, tmp_path):
    values = json.loads((command[1] / "kernels.json").read_text())
    ours = measured[0] | {"provider": OURS, "peak MiB": 12.5}
    values |= dict(measured=True, rows=[*measured, ours], roofs=dict(bandwidth=1e9, matmul=1e12))
    text = render.markdown(values)
    assert " 12.5 |" in text and " 12.50 (12.50) |" in text and measured[0]["peak MiB"] is None
    assert f"{ours['seconds'] * 1e6:.1f} (" in text and "copy 0.00 TB/s" in text and "3 of 4 rows right, 1 not" in text
    assert len(render.markdown(values, short=True)) < len(text)
    written = render.write(values, tmp_path)
    assert all(path.stat().st_size for path in written)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert tmp_path / "kernels.png" in written


def test_one_case_that_fails_leaves_the_others(monkeypatch):
    cases = list(suites.SUITES["swiglu"](TOY, [Setting("rows", 1, 0), Setting("rows", 2, 0)], Scope((8,))))

    def fails(case, providers, *_):
        if case.setting.rows == 1:
            raise torch.OutOfMemoryError("too large")
        return [measure.row(case, p, 2, "ok", 1.0) for p in providers]

    monkeypatch.setattr(measure, "measure", fails)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: type("GPU", (), {"L2_cache_size": 1}))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = measure.measure_all(cases, torch.bfloat16, DATASHEETS[0], False, 0.1, minutes=1)
    assert [r["status"] for r in rows] == ["out of memory"] * 2 + ["ok"] * 2
    late = measure.measure_all(cases, torch.bfloat16, DATASHEETS[0], False, 0.1, minutes=-1)
    assert {r["status"] for r in late} == {"not run: out of time"}


def test_a_place_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "check_toys", None)
    with pytest.raises(OSError, match="file"):
        kernels.main(["--out", str(tmp_path / "file")])
