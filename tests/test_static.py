"""Steps of fixed shape write the same text as steps laid out by the host, with the same counts, and never wait for the device."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_kernels import Sampling
from mtp_kernels.packed import kept
from mtp_model import Decoding, generate, load_adapter, load_model, save_adapter, static
from mtp_model.layout import MODES
from mtp_model.lookup import Lookup
from mtp_model.static import StaticStep, StepOptions, keep_step, take_step

PROMPTS = [[1, 2, 3, 4, 5], [0], [5, 5, 1], [2, 0, 4, 1, 3, 3, 2, 5, 0]]


def both_ways(model, prompts=PROMPTS, **options):
    """Results of steps of fixed shape, recorded where they can be, and of steps laid out by the host."""
    return generate(model, prompts, static=True, **options), generate(model, prompts, static=False, **options)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_text_and_counts(shared, mode, k, batch):
    fixed, host = both_ways(shared.model, PROMPTS[-batch:], mode=mode, k=k, max_new_tokens=24)
    assert fixed.tokens == host.tokens
    for name in ("passes", "tokens", "offered", "accepted"):
        assert getattr(fixed.stats, name) == getattr(host.stats, name), name
    assert mode == "autoregressive" or batch == 1 or sum(host.stats.accepted) > 0


@pytest.mark.parametrize("options", [dict(use_sampler=False), dict(draft_candidates=2), dict(max_new_tokens=1), dict(max_new_tokens=7)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_options(shared, mode, options):
    fixed, host = both_ways(shared.model, mode=mode, k=3, **{"max_new_tokens": 15} | options)
    assert fixed.tokens == host.tokens and fixed.stats.accepted == host.stats.accepted and fixed.stats.passes == host.stats.passes


@pytest.mark.parametrize("mode", MODES)
def test_end_of_text(shared, mode):
    text = generate(shared.model, PROMPTS, mode="autoregressive", max_new_tokens=24).tokens
    fixed, host = both_ways(shared.model, mode=mode, k=4, max_new_tokens=24, eos=[text[0][4], text[1][9]])
    assert fixed.tokens == host.tokens and len({len(t) for t in host.tokens}) > 1
    assert fixed.stats.tokens == host.stats.tokens and fixed.stats.passes == host.stats.passes


def test_a_step_serves_again(shared, monkeypatch):
    """A kept step is taken for the next text of its shape, whatever the last one left in its cache."""
    made = []
    original = StaticStep.__init__
    monkeypatch.setattr(StaticStep, "__init__", lambda self, *a, **o: made.append(a) or original(self, *a, **o))
    model = shared.model
    model.kept_steps.clear()
    texts = sorted([*PROMPTS, PROMPTS[0] * 8], key=len)
    for prompt in texts + texts[::-1]:  # a longer text after a shorter one, and the other way round
        fixed, host = both_ways(model, [prompt], mode="linear", k=2, max_new_tokens=11)
        assert fixed.tokens == host.tokens
    assert len(made) == 1
    for k in (1, 3, 4):
        generate(model, PROMPTS[:1], mode="linear", k=k, max_new_tokens=3, static=True)
    assert len(made) == 4 == len(model.kept_steps)
    generate(model, [PROMPTS[0] * 200], mode="linear", k=4, max_new_tokens=3, static=True)  # longer than the kept step's cache
    assert len(made) == 5


def test_a_changed_adapter_needs_a_new_step(toy_adapter_model):
    model = toy_adapter_model(k=2)
    generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True)
    (before,) = model.kept_steps
    generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True)
    assert list(model.kept_steps) == [before]
    with torch.no_grad():
        model.layers[0].o_proj.lora_B.add_(1)
    generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True)
    (after,) = model.kept_steps  # the step of the adapter as it was serves nobody any more
    assert after != before


def test_a_callback_that_raises_ends_the_decoding(toy_adapter_model):
    """At once, and not when its exception is forgotten: what it recorded serves the next text."""
    model = toy_adapter_model(k=2)
    with pytest.raises(ZeroDivisionError) as caught:
        generate(model, PROMPTS, mode="linear", max_new_tokens=12, static=True, on_tokens=lambda new: 1 / (len(new[0]) - 1))
    assert len(model.kept_steps) == 1 and caught.value.__traceback__


def test_what_is_written_through_data_counts_after_train_and_eval(toy_adapter_model):
    model, other = toy_adapter_model(k=2).eval(), toy_adapter_model(k=2, name="other", seed=8).eval()
    options = dict(mode="linear", max_new_tokens=12)
    before, expected = (generate(each, PROMPTS, **options).tokens for each in (model, other))
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        old.data.copy_(new.data)
    model.eval()
    assert len(model.kept_steps) == 1
    model.train().eval()
    assert not model.kept_steps and not kept(model.parameters())
    for fixed in (True, False):
        assert generate(model, PROMPTS, static=fixed, **options).tokens == expected != before


@pytest.mark.parametrize("kind", ["module", "everywhere"])
def test_forward_hooks_are_called_at_every_step(toy_adapter_model, kind):
    model, calls = toy_adapter_model(k=2), []
    plain = generate(model, PROMPTS[:1], mode="linear", max_new_tokens=12)
    assert len(model.kept_steps) == 1
    if kind == "module":
        handle = model.layers[1].register_forward_hook(lambda module, args, out: calls.append(1) or -out)
    else:
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: calls.append(1) if module is model.layers[1] else None)
    result = generate(model, PROMPTS[:1], mode="linear", max_new_tokens=12)
    assert len(calls) == result.stats.passes[0] and (result.tokens == plain.tokens) == (kind == "everywhere")
    with pytest.raises(ValueError, match="have forward hooks, which a recorded step would not call"):
        generate(model, PROMPTS[:1], static=True)
    handle.remove()
    assert generate(model, PROMPTS[:1], mode="linear", max_new_tokens=12, static=True).tokens == plain.tokens


def test_a_fused_optimizers_step_needs_a_new_step(toy_adapter_model):
    model = toy_adapter_model(k=2)
    generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True)
    (before,) = model.kept_steps
    optimizer = torch.optim.SGD(model.adapter_parameters().values(), lr=0.5, fused=True)
    for parameter in model.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    fixed, host = both_ways(model, mode="linear", k=2, max_new_tokens=12)
    assert fixed.tokens == host.tokens and fixed.stats.accepted == host.stats.accepted and before not in model.kept_steps


def test_another_number_of_threads_or_dtype_makes_other_copies(toy_adapter_model):
    model, before = toy_adapter_model(k=2), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            generate(model, PROMPTS[:1], mode="linear", max_new_tokens=5, static=True)
            (key,) = model.kept_steps  # the former's went
            assert key[-1][0] == threads
        assert kept(model.parameters())
        assert not kept(model.double().parameters())
    finally:
        torch.set_num_threads(before)


def test_under_autocast_the_model_keeps_its_dtype(shared):
    expected = generate(shared.model, PROMPTS, mode="linear", k=2, max_new_tokens=9)
    shared.model.kept_steps.clear()
    for fixed in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found = generate(shared.model, PROMPTS, mode="linear", k=2, max_new_tokens=9, static=fixed)
        assert found.tokens == expected.tokens and found.stats.accepted == expected.stats.accepted


def test_several_threads(toy_adapter_model):
    """The adapter's parameters require gradients, which a trace takes away from all of the model for a moment."""
    model = toy_adapter_model(k=2)
    expected = [generate(model, [p], mode="linear", max_new_tokens=9, static=False).tokens for p in PROMPTS]
    model.kept_steps.clear()
    wrong = []

    def run(index):
        for k in (1, 2, 1, 2):
            if generate(model, [PROMPTS[index]], mode="linear", k=k, max_new_tokens=9, static=True).tokens != expected[index]:
                wrong.append(index)

    with ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(run, i % len(PROMPTS)) for i in range(12)]:
            result.result()
    assert not wrong and all(p.requires_grad for n, p in model.adapter_parameters().items() if n != "masks")


def test_a_changed_base_needs_a_new_step(toy_adapter_model):
    model = toy_adapter_model(k=2)
    before, _ = both_ways(model, mode="linear", max_new_tokens=12)
    model.lm_head = torch.nn.Parameter(-model.lm_head.data, requires_grad=False)
    fixed, host = both_ways(model, mode="linear", max_new_tokens=12)
    assert fixed.tokens == host.tokens != before.tokens
    with torch.no_grad():
        model.lm_head.neg_()
    fixed, host = both_ways(model, mode="linear", max_new_tokens=12)
    assert fixed.tokens == host.tokens == before.tokens and len(model.kept_steps) == 1


def test_steps_are_kept_up_to_a_number_and_a_size(toy_adapter_model, monkeypatch):
    model = toy_adapter_model(k=8)

    def keep(ks):
        for k in ks:
            generate(model, PROMPTS[:1], mode="linear", k=k, max_new_tokens=2, static=True)
        return [key[1].k for key in model.kept_steps]

    assert keep(range(1, 7)) == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(static, "KEPT", 4)
    assert keep([7]) == [4, 5, 6, 7]
    size = next(iter(model.kept_steps.values())).cache.bytes
    assert size == 2 * model.config.num_hidden_layers * 256 * model.config.num_key_value_heads * model.config.head_dim * 4
    monkeypatch.setattr(static, "KEPT_BYTES", 3 * size)
    assert keep([8]) == [6, 7, 8]
    monkeypatch.setattr(static, "KEPT_BYTES", 0)
    assert keep([1]) == [8, 1]


def test_a_recorded_step_runs_without_python(toy_adapter_model, monkeypatch):
    """The model is called while a step is rehearsed and recorded, for each number of columns that a text comes to, and never by a replay."""
    model = toy_adapter_model(k=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    passes = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda rows, cache: passes.append(rows.num_keys) or original(rows, cache))
    options = dict(mode="quadratic", max_new_tokens=280, eos=(), static=True)
    first = generate(model, PROMPTS[:1], **options)
    assert passes[1:] == [256, 256, 512, 512] and passes[0] < 256  # the prefill, and what the text's length rounds up to
    assert first.tokens[0] == generate(model, PROMPTS[:1], mode="autoregressive", max_new_tokens=280, eos=(), static=False).tokens[0]
    passes.clear()
    second = generate(model, PROMPTS[:1], **options)
    assert len(passes) == 1 and second.tokens == first.tokens
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_a_recorded_constant_is_nothing_that_changes(toy_adapter_model):
    """What follows from constants is computed once: a view of the cache among them would do, a copy of it would go stale."""
    model = toy_adapter_model(k=2)
    generate(model, PROMPTS, mode="quadratic", lookup=3, max_new_tokens=5, static=True)
    (step,) = model.kept_steps.values()
    changing = {x.untyped_storage().data_ptr() for x in step._changing if x.numel()}
    for recorded in step._recorded.values():
        nodes = [node for node in recorded.func.graph.findAllNodes("prim::Constant") if node.hasAttribute("value")]  # None has none
        constants = [node.t("value") for node in nodes if node.kindOf("value") == "t"]
        assert constants and not changing & {x.untyped_storage().data_ptr() for x in constants}


def test_what_layers_have_in_common_is_recorded_once(toy_adapter_model):
    """Which columns they write to, for one; and what follows from parameters, such as their transposes, not at all."""
    model = toy_adapter_model(k=2, num_hidden_layers=3)
    generate(model, PROMPTS[:1], mode="quadratic", max_new_tokens=5, static=True)
    (step,) = model.kept_steps.values()
    (recorded,) = step._recorded.values()
    written = [list(node.inputs())[2].debugName() for node in recorded.func.graph.findAllNodes("aten::index_copy_")]
    assert len(written) == 2 * 3 and len(set(written)) == 1
    assert len(recorded.func.graph.findAllNodes("aten::t")) < 2 * 3  # an adapter's expansion has one in each of a layer's four modules


def test_a_dropped_step_is_freed(toy_adapter_model):
    model = toy_adapter_model(k=2)
    generate(model, PROMPTS, mode="quadratic", lookup=3, max_new_tokens=5, static=True)
    (step,) = model.kept_steps.values()
    held = [weakref.ref(x) for x in (step.cache.keys[0], step._changing[-1], step.text)]  # torch keeps the object while it needs the tensor
    assert step._recorded and all(ref() is not None for ref in held)
    model.kept_steps.clear()
    del step
    gc.collect()
    assert [ref() for ref in held] == [None, None, None]


def test_a_copy_has_steps_of_its_own(toy_adapter_model):
    model = toy_adapter_model(k=2)
    expected = generate(model, PROMPTS, mode="linear", max_new_tokens=5, static=True).tokens
    again = copy.deepcopy(model)
    assert not again.kept_steps and len(model.kept_steps) == 1
    assert generate(again, PROMPTS, mode="linear", max_new_tokens=5, static=True).tokens == expected


def test_a_long_context_of_many_lengths(toy_adapter_model):
    model = toy_adapter_model(k=3)
    prompts = [[1, 2, 3] * 90, [4, 5], [0, 5, 2, 1] * 150]
    fixed, host = both_ways(model, prompts, mode="quadratic", max_new_tokens=12, eos=())
    assert fixed.tokens == host.tokens and fixed.stats.accepted == host.stats.accepted
    (step,) = model.kept_steps.values()
    assert set(step._recorded) == {(step.cache.columns, 3, True)} == {(768, 3, True)}  # no more than there are


def test_a_step_whose_cache_is_too_small_is_not_taken(toy_adapter_model):
    model = toy_adapter_model(k=2)
    options = StepOptions("linear", 2)
    step = take_step(model, 1, 200, options)
    keep_step(step)
    assert take_step(model, 1, 256, options) is step
    keep_step(step)
    assert take_step(model, 1, 257, options).cache.capacity == 512


@pytest.mark.parametrize("mode", ["autoregressive", "quadratic"])
def test_every_row_of_a_step_is_within_its_columns(toy_adapter_model, monkeypatch, mode):
    """From lengths at which only a step's last rows stand behind the first 256 columns, to one at which all of them do."""
    model = toy_adapter_model(k=2)
    monkeypatch.setattr(static, "TRACES", False)
    ends = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda rows, cache: ends.append((rows, original(rows, cache))) or ends[-1][1])
    generate(model, [[1, 2, 3, 4] * 60], mode=mode, max_new_tokens=24, eos=(), static=True)
    steps = [rows for rows, _ in ends[1:]]
    assert {rows.num_keys for rows in steps} == {256, 512}
    assert all(int(rows.mask_start.max()) + rows.num_masks <= rows.num_keys for rows in steps)


def test_a_step_of_other_options_is_not_taken(toy_adapter_model):
    model = toy_adapter_model(k=3)
    drawn = dict(temperature=1.0, seed=3)
    copies = dict(lookup=4), dict(lookup=4, lookup_match=1)
    for options in ({}, dict(draft_candidates=1), dict(use_sampler=False), dict(eos=[2]), drawn, drawn | dict(top_k=2), *copies):
        fixed, host = both_ways(model, mode="quadratic", **dict(max_new_tokens=20, eos=()) | options)
        assert fixed.tokens == host.tokens and fixed.stats.accepted == host.stats.accepted, options
    assert len(model.kept_steps) == 8
    fixed, host = both_ways(model, mode="quadratic", max_new_tokens=20, eos=(), temperature=1.0, seed=4)  # of another seed it is taken
    assert fixed.tokens == host.tokens and len(model.kept_steps) == 8


def test_without_torchscript(toy_adapter_model, monkeypatch):
    model = toy_adapter_model(k=3)
    assert Decoding(model, PROMPTS).static
    monkeypatch.setattr(static, "TRACES", False)
    assert not Decoding(model, PROMPTS).static
    fixed, host = both_ways(model, mode="quadratic", max_new_tokens=20)
    assert fixed.tokens == host.tokens and not any(step._recorded for step in model.kept_steps.values())


def test_streaming_and_a_loop_that_was_left(shared):
    decoding = Decoding(shared.model, PROMPTS, mode="quadratic", k=3, max_new_tokens=20, static=True)
    seen = [[] for _ in PROMPTS]
    for i, new in enumerate(decoding):
        for b, tokens in enumerate(new):
            seen[b] += tokens
        if i == 2:
            break
    for new in decoding:
        for b, tokens in enumerate(new):
            seen[b] += tokens
    assert seen == decoding.tokens == generate(shared.model, PROMPTS, mode="quadratic", k=3, max_new_tokens=20, static=False).tokens


def test_a_text_given_up_leaves_its_step(toy_adapter_model):
    model = toy_adapter_model(k=2)
    decoding = Decoding(model, PROMPTS, mode="quadratic", max_new_tokens=20, static=True)
    for _ in range(3):
        next(iter(decoding))
    decoding.close()
    assert len(model.kept_steps) == 1 and not all(decoding.finished) and list(decoding) == []
    fixed, host = both_ways(model, mode="quadratic", max_new_tokens=20)
    assert fixed.tokens == host.tokens and all(a[: len(b)] == b for a, b in zip(fixed.tokens, decoding.tokens, strict=True))


def test_a_text_that_ends_at_its_first_token_leaves_its_step(toy_adapter_model):
    model = toy_adapter_model(k=2)
    first = generate(model, PROMPTS, mode="linear", max_new_tokens=20, eos=(), static=True).tokens
    (step,) = model.kept_steps.values()
    generate(model, PROMPTS, mode="linear", max_new_tokens=1, eos=(), static=True)
    decoding = Decoding(model, PROMPTS, mode="linear", max_new_tokens=20, eos=(), static=True)
    assert next(iter(decoding)) == [text[:1] for text in first]
    decoding.close()
    assert list(model.kept_steps.values()) == [step] and step._recorded


@pytest.mark.parametrize("mode", MODES)
def test_with_the_kernels(toy_adapter_model, make_hf_dir, tmp_path, device, mode):
    pytest.importorskip("triton")
    save_adapter(toy_adapter_model(k=2, rank=4, num_hidden_layers=1), tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter").apply(load_model(tmp_path / "base", device=device, implementation="triton"))
    lookup = 3 if mode in ("autoregressive", "linear") else None
    fixed, host = both_ways(model, PROMPTS[1:3], mode=mode, max_new_tokens=3, eos=(), lookup=lookup)
    assert fixed.tokens == host.tokens and fixed.stats.passes == host.stats.passes
    plain = load_model(tmp_path / "base", device=device, implementation="reference")
    assert fixed.tokens == generate(plain, PROMPTS[1:3], mode="autoregressive", max_new_tokens=3, eos=()).tokens


class _NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: reading a value, data-dependent shapes, tensors from the host. Counts the package's operators."""

    operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::is_nonzero"), name
        self.operators += name.startswith("mtp_kernels::")
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor) and x.ndim]  # a number is no transfer
        assert all(x.device.type == "meta" for x in tensors), f"{name} leaves the device"
        return out


@pytest.mark.parametrize("options", [dict(draft_candidates=2), dict(use_sampler=False), dict(draft_candidates=3, temperature=0.7, top_k=4, seed=5)], ids=str)
@pytest.mark.parametrize("mode, fused", [("linear", False), ("linear", True), ("quadratic", True)])
def test_one_pass_over_lm_head_serves_both(toy_adapter_model, monkeypatch, device, mode, fused, options):
    """The same text and the same drafts as where the masks' logits are made by themselves."""
    model = toy_adapter_model(k=2, num_hidden_layers=1)
    if fused:
        pytest.importorskip("triton")
        model = model.to(device).use("triton")
    prompts, new = [[1, 2, 3], [4, 1]], 6

    def run(static):
        passes, drafts, own, linear, draft = [], [], [], model.operations.gated_lora_linear, model.draft
        with monkeypatch.context() as patch:
            patch.setattr(model.operations, "gated_lora_linear", lambda x, w, *a, **o: passes.append(w is model.lm_head) or linear(x, w, *a, **o))
            for name in ("linear_argmax", "linear_sample"):
                original = getattr(model.operations, name)
                patch.setattr(model.operations, name, lambda *a, original=original: own.append(a) or original(*a))
            patch.setattr(model, "draft", lambda *args: drafts.append(draft(*args)) or drafts[-1])
            result = generate(model, prompts, mode=mode, max_new_tokens=new, eos=(), static=static, **options)
        return result.tokens, result.stats.accepted, [] if static else [each.tolist() for each in drafts], sum(passes), len(own)

    kinds = (False,) if fused else (False, True)
    shared = [run(static) for static in kinds]
    monkeypatch.setattr(StepOptions, "shares_logits", lambda *_: False)
    apart = [run(static) for static in kinds]
    assert [way[:3] for way in shared] == [way[:3] for way in apart] and all(way[:2] == shared[0][:2] for way in shared)
    assert all(way[3] > 0 for way in shared) and all(way[4] <= 2 for way in shared)  # the latter in the prefill
    assert all(way[3] == 0 for way in apart)  # whose products are within argmax and the sampler


def test_which_steps_share_a_pass_over_lm_head(toy_adapter_model, device):
    model = toy_adapter_model(k=8, num_hidden_layers=1)

    def shares(mode, batch=1, k=8, **options):
        step = StepOptions(mode, k, **options)
        return step.shares_logits(model, step.layout((k,) * batch))

    assert shares("linear", draft_candidates=3) and shares("linear", 40, use_sampler=False)  # the very rows that are drafted from
    assert not shares("linear") and not shares("linear", draft_candidates=6)  # the sampler reads all of lm_head
    assert not shares("autoregressive", draft_candidates=3)
    assert not shares("quadratic", draft_candidates=3)  # nine times as many rows, which a CPU takes time for
    assert shares("quadratic", k=3, draft_candidates=3) and not shares("quadratic", 3, 3, draft_candidates=3)  # 16 and 48 rows
    pytest.importorskip("triton")
    model.to(device).use("triton")
    assert shares("quadratic", draft_candidates=3) and not shares("quadratic", 2, draft_candidates=3)  # 81 and 162 rows


@pytest.mark.parametrize(
    "candidates, sampling, lookup", [(None, None, Lookup(4)), (3, None, None), (None, Sampling(0.7), None), (3, Sampling(0.7, 5, 0.9), Lookup(1, 3))], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(toy_adapter_model, monkeypatch, mode, candidates, sampling, lookup):
    """A step on tensors without values: whatever would read one fails."""
    pytest.importorskip("triton")
    from mtp_kernels.triton import _device

    model = toy_adapter_model(k=2)
    model.implementation = "triton"
    model.to("meta")
    launches = []  # attention's, which is not called through its operator without gradients
    monkeypatch.setattr(_device, "launch", lambda kernel, grid, *args, **options: launches.append(kernel))
    options = StepOptions(mode, 0 if mode == "autoregressive" else 2, True, candidates, frozenset({1}), sampling, lookup)
    step = StaticStep(model, 2, 300, options)
    with torch.inference_mode():
        step._step()  # what is made once, as in the runs before a capture
    launches.clear()
    monkeypatch.setattr(torch, "tensor", None)  # whose numbers come from the host, unseen below
    with torch.inference_mode(), _NoWaiting() as mode_of_calls:
        step._step()
        step._step()
    layers = model.config.num_hidden_layers
    assert len(launches) == 2 * 2 * layers  # pieces and merge
    assert mode_of_calls.operators >= 2 * (6 * layers + 3)
    with pytest.raises((RuntimeError, NotImplementedError)), _NoWaiting():  # the check does see a value that is read
        int(step.lengths[0])
