"""The suites of a decoding step, of the sampler and of the losses: their counts by hand, and a check that finds what is wrong."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import counts, kernels, measure, suite_sampler, suite_step, suite_training
from bench.cases import CHUNKED, EAGER, LOSS, MODELS, OURS, SETTINGS, TOY, Provider, Scope, Setting
from bench.sampler_counts import least
from bench.suites import SUITES
from bench.timing import CPUClock

CPU = torch.device("cpu")
NEW = (
    "rotary_write", "linear_argmax", "linear_sample", "accept_and_commit", "drafting_states", "lookup_drafts", "sampler_draft", "latent_consistency",
    "linear_cross_entropy",
)  # fmt: skip
SHORT = Scope((16,), short=True)
SMALL = Setting("linear, k = 2", 5, 2, mode="linear", k=2), Setting(LOSS, 3, 0, True, LOSS)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def selected(*arguments):
    args = kernels.build_parser().parse_args(arguments)
    args.rank = args.rank or list(kernels.RANKS)
    return kernels.select(args)


def cases(operation, settings=SMALL, scope=SHORT, model=TOY):
    return list(SUITES[operation](model, settings, scope))


# ---- counts


def test_counts_of_a_step_by_hand():
    assert counts.rotary_write(3, 4, 2, 8, 2) == counts.Count(2 * (2 * 3 * 8 * 8 + 2 * 3 * 8), 3 * 3 * 6 * 8)  # q, k, v twice, two tables
    assert counts.linear_argmax(3, 100, 8, 2) == counts.Count(2 * (800 + 24) + 24, 2 * 3 * 800)
    assert counts.linear_argmax(3, 100, 8, 2, drawn=True) == counts.Count(2 * (800 + 24) + 48, 2 * 3 * 800)
    # 2 sequences, 4 drafts, 3 ends: 8 + 10 + 2 + 3 read, 4 state numbers and 6 results, twice 2 flags; 8 + 10 x 3 comparisons
    assert counts.accept_and_commit(2, 4, 3) == counts.Count(8 * (8 + 10 + 2 + 3 + 8 + 6) + 4, 38)
    assert counts.drafting_states(4, 5, 8, 2) == counts.Count(2 * 4 * 8 * 2 + 8 * (5 + 1 + 1), 5)
    assert counts.lookup_drafts(2, 3, 100, 2) == counts.Count(8 * 2 * (100 + 1 + 3 + 3) + 2, 2 * 100 * 2)
    assert counts.latent_consistency(5, 8, 2) == counts.Count(2 * 80 + 12 * 5 + 4, 120)
    assert counts.latent_consistency(5, 8, 2, backward=True) == counts.Count(2 * (160 + 64) + 80, 200)


def test_counts_of_cross_entropy_by_hand():
    """Five rows of 8 numbers, 100 tokens, two bytes: labels of 8 bytes, losses of 4, guesses of 8."""
    assert counts.linear_cross_entropy(5, 100, 8, 2) == counts.Count(80 + 1600 + 100, 2 * 4000 + 500)
    taught = counts.linear_cross_entropy(5, 100, 8, 2, teacher=True)
    assert taught == counts.Count(160 + 1600 + 100, 2 * (2 * 4000 + 500))
    # W again for the rows' gradients, which are written, read and multiplied into the result
    assert counts.linear_cross_entropy(5, 100, 8, 2, True, True) == counts.Count(taught.bytes + 1600 + 3 * 80 + 20, taught.operations + 2 * 4000 + 40)
    (case,) = [c for c in selected("--operation", "linear_cross_entropy", "--rows", "16384", "--model", "Llama-3.2-1B") if "teacher" in c.shape]
    assert case.count(2, True) == counts.linear_cross_entropy(16384, 128_256, 2048, 2, True, True)


def test_least_of_drafting_by_hand():
    """Llama-3.1-8B, k = 8: lm_head 1,050,673,152 bytes, the sampler's layers 570,425,344, a candidate's row 8,192."""
    exact, listed = (case.count(2, True) for case in reversed(cases("sampler_draft", SETTINGS[1:3], model=MODELS["Llama-3.1-8B"])))
    assert exact.bytes == 8 * 1_050_673_152 + 570_425_344 and listed.bytes == 1_050_673_152 + 570_425_344 + 8 * 64 * 8192
    assert exact.operations == 2 * 8 * (3 * 4096**2 + 128_256 * 4096) and listed.operations == exact.operations + 2 * 8 * 64 * 4096
    assert least(4, 10, 2, 3, batch=3).operations == 2 * 6 * (3 * 16 + 13 * 4)


# ---- which cases


def test_cases_are_those_of_the_settings():
    found = {name: cases(name, SETTINGS, Scope((16,)), MODELS["Llama-3.1-8B"]) for name in NEW}
    assert {name: len(each) for name, each in found.items()} == dict(zip(NEW, (5, 5, 5, 5, 4, 5, 8, 2, 4), strict=True))
    assert [c.setting.rows for c in found["rotary_write"]] == [1, 9, 17, 25, 81]
    assert [(c.setting.rows, c.backward) for c in found["linear_cross_entropy"]] == [(2048, True)] * 2 + [(16384, True)] * 2
    assert {c.shape.split("128256, ")[1] for c in found["sampler_draft"]} == {
        f"k = {k}, batch {b}, {which}" for k in (4, 8) for b in (1, 4) for which in ("64 candidates", "all tokens")
    }
    short = {name: cases(name, SETTINGS, SHORT) for name in NEW}
    assert [c.setting.rows for c in short["linear_argmax"]] == [1, 81] and [c.setting.rows for c in short["sampler_draft"]] == [8, 8]
    assert not any(c.setting.mode == LOSS for name in ("gated_lora_linear", "rms_norm", "attention") for c in cases(name, SETTINGS))


def test_what_no_model_decides_is_measured_once():
    assert [c.model for c in selected("--operation", "accept_and_commit", "--rows", "9")] == ["any model"]
    assert [c.model for c in selected("--operation", "lookup_drafts", "--context", "2048")] == ["any model"]


def test_rank_and_context_choose_apart():
    assert len(selected("--operation", "attention", "--rank", "128")) == len(selected("--operation", "attention")) > 200
    assert {c.shape.split("128, ")[1] for c in selected("--operation", "attention", "--context", "512", "--rows", "17", "1024", "--model", "Qwen3-4B")} == {
        f"context 512, batch {b}" for b in (1, 4, 16)
    }


def test_what_has_no_suite():
    """`accept_and_commit`, `linear_argmax` and `linear_sample` run their kernels."""
    pytest.importorskip("triton")
    assert kernels.uncovered() == ["accept", "argmax", "sample"]


# ---- the check


@pytest.mark.parametrize("operation", NEW)
def test_competitors_are_right(operation):
    rows = list(measure.check_toys(cases(operation), torch.float32, kernels.interpreted()))
    assert {r["provider"] for r in rows} == {EAGER, OURS} | ({CHUNKED} if operation == "linear_cross_entropy" else set())
    assert {r["status"] for r in rows} <= {"ok", "skipped"}, rows


@pytest.mark.parametrize("operation", ["rotary_embedding", "rotary_write"])
def test_a_model_with_normalised_heads_is_measured_with_them(operation):
    """And its kernel's backward, where it has one, against float64."""
    normed = cases(operation, model=replace(TOY, qk_norm=True))
    assert all(case.shape.endswith(", normed") and case.make(CPU, torch.float32)["norm"] is not None for case in normed)
    rows = list(measure.check_toys(normed, torch.bfloat16, kernels.interpreted()))
    assert {r["status"] for r in rows if r["provider"] == OURS} == {"ok" if kernels.interpreted() else "skipped"}, rows
    assert normed[0].count(2, False).bytes > cases(operation)[0].count(2, False).bytes


def column_late(i):
    return suite_step.write_eager(i | dict(start=i["start"] + 1))


def room_left(i):
    return suite_step.accept_eager(i | dict(room=i["room"].clone()))


def first_block(i):
    return suite_step.states_eager(i | dict(accepted=i["accepted"] * 0))


def newest_left_out(i):
    return suite_step.lookup_eager(i | dict(newest=i["newest"] - 1))


def second_best(i):
    return (i["hidden"] @ i["weight"].t()).topk(2, -1).indices[:, 1]


def not_from_the_list(i):
    return suite_sampler.draft_eager(i | dict(candidates=None))


def last_draft_wrong(i):
    drafts = suite_sampler.draft_eager(i)
    drafts[:, -1] = (drafts[:, -1] + 1) % i["lm_head"].shape[0]
    return drafts


def without_noise(i):
    return suite_step.argmax_eager(i)


def without_teacher(i):
    return suite_training.entropy_chunked({name: x for name, x in i.items() if name != "teacher"})


def next_target(i):
    return suite_training.consistency_eager(i | dict(index=i["index"].roll(1)))


@pytest.mark.parametrize(
    "operation, call, shape",
    [("rotary_write", column_late, ""), ("accept_and_commit", room_left, ""), ("linear_argmax", second_best, ""),
     ("drafting_states", first_block, ""), ("lookup_drafts", newest_left_out, ""),
     ("linear_sample", without_noise, ""), ("sampler_draft", not_from_the_list, "64"),
     ("sampler_draft", last_draft_wrong, "all"), ("linear_cross_entropy", without_teacher, "teacher"), ("latent_consistency", next_target, "")],
)  # fmt: skip
def test_what_is_wrong_is_found(operation, call, shape):
    case = [c for c in cases(operation) if shape in c.shape][0]
    if shape == "64":
        case = replace(case, make=partial(suite_sampler._make, 4, 8, TOY, 16))
    eager = case.providers[0]
    check = measure.Check(case, case.make(CPU, torch.float32))
    assert check(eager)[0] and not check(Provider("wrong", call, eager.plain))[0]


def test_a_near_tie_is_no_error():
    """Two equal logits but for a rounding step in bfloat16: either token is right, and the error is told in rounding steps."""
    (case,) = cases("linear_argmax")
    inputs = dict(hidden=torch.ones(1, 4, dtype=torch.bfloat16), weight=torch.tensor([[1.0] * 4, [1.0, 1.0, 1.0, 1.0078125], [0.5] * 4]).bfloat16())
    check = measure.Check(case, inputs)
    for token, right in ((1, True), (0, True), (2, False)):
        good, error = check(Provider("fixed", lambda i, token=token: torch.tensor([token]), case.providers[0].plain))
        assert good == right and error < 200
    assert error > 2


def test_inputs_that_a_call_changes_are_compared_and_stay():
    (case,) = cases("rotary_write")
    inputs = case.make(CPU, torch.float32)
    keys = inputs["keys"].clone()
    q, new_keys, new_values = case.results(suite_step.write_eager, inputs)
    assert torch.equal(inputs["keys"], keys) and not torch.equal(new_keys, keys) and q.shape == (5, 1, 4, 16)
    changed = (new_keys != keys).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == list(range(1024, 1029)) and torch.equal(new_values[1024:1029], inputs["qkv"][:, :, 6:])


# ---- peak memory


def test_peak_is_what_a_call_allocates_beyond_what_was_there(monkeypatch):
    (case,) = cases("latent_consistency")
    inputs, memory = case.make(CPU, torch.float32), SimpleNamespace(now=5 * 2**20, peak=9 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(memory, "peak", memory.now))

    def call(i):
        memory.peak += 3 * 2**20
        return suite_training.consistency_eager(i)

    provider = Provider("x", call, call)
    assert measure.peak_mib(case, provider, inputs, torch.device("cuda")) == 3.0 and measure.peak_mib(case, provider, inputs, CPU) is None


def test_measured_rows_of_the_new_suites():
    """As on a GPU, by the CPU's clock; calls that change their inputs too."""
    for operation in ("accept_and_commit", "linear_argmax"):
        (case,) = cases(operation)
        (row,) = measure.measure(case, list(case.providers[:1]), torch.float32, CPU, counts.GPU("roof", 1e9, 1e12), 2**10, CPUClock(), 0.0)
        assert row["status"] == "ok" and row["seconds"] > 0 and row["peak MiB"] is None
