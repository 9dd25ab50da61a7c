"""The acceptance kernel against a loop; interpreted where there is no GPU."""

import functools
import sys

import pytest
import torch

pytest.importorskip("triton")

import mtp_kernels.triton  # noqa: E402, F401
import mtp_model.decode  # noqa: E402
from mtp_kernels import accept, accept_and_commit, reference  # noqa: E402
from mtp_kernels.testing import guarded, guarded_outputs  # noqa: E402
from mtp_model import generate  # noqa: E402

KERNELS = sys.modules["mtp_kernels.triton.accept"]  # the package's attribute of this name is the function
INTEGERS = [torch.int32, torch.int64]
fused = functools.partial(accept, implementation="triton")


def by_loop(drafts, predictions, counts=None):
    accepted, following = [], []
    for b, (d, y) in enumerate(zip(drafts.tolist(), predictions.tolist(), strict=True)):
        a = 0
        while a < (len(d) if counts is None else min(len(d), int(counts[b]))) and d[a] == y[a]:
            a += 1
        accepted.append(a)
        following.append(y[a])
    return accepted, following


def case(b, k, dtype, device, seed=0):
    """Two tokens, so that every length of prefix and matches after a mismatch occur; beyond every tensor, drafts would go on matching."""
    generator = torch.Generator().manual_seed(seed)
    drafts, predictions = (guarded((b, columns), dtype, device)[0].copy_(torch.randint(2, (b, columns), generator=generator)) for columns in (k, k + 1))
    counts = guarded((b,), dtype, device)[0].copy_(torch.randint(k + 1, (b,), generator=generator))
    same = torch.rand(b, k, generator=generator).to(device) < 0.7
    return torch.where(same, predictions[:, :k], drafts, out=drafts), predictions, counts


def check(got, drafts, predictions, counts=None):
    accepted, following = got
    assert accepted.dtype == torch.int64 and following.dtype == predictions.dtype
    assert (accepted.tolist(), following.tolist()) == by_loop(drafts, predictions, counts)
    assert all(map(torch.equal, got, reference.accept(drafts, predictions, counts)))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 8, 16, 17])
@pytest.mark.parametrize("b", [1, 3, 130])
def test_against_a_loop(b, k, with_counts, dtype, device):
    for seed in range(2):
        drafts, predictions, counts = case(b, k, dtype, device, seed)
        counts = counts if with_counts else None
        with guarded_outputs(KERNELS):
            got = fused(drafts, predictions, counts)
        check(got, drafts, predictions, counts)


def test_a_match_after_a_mismatch_counts_for_nothing(device):
    drafts = torch.tensor([[5, 6, 7, 8]] * 4, device=device)
    predictions = torch.tensor([[5, 0, 7, 8, 9], [0, 6, 7, 8, 9], [5, 6, 7, 0, 9], [5, 6, 7, 8, 9]], device=device)
    accepted, following = fused(drafts, predictions)
    assert accepted.tolist() == [1, 0, 3, 4] and following.tolist() == [0, 0, 0, 9]
    accepted, following = fused(drafts, predictions, torch.tensor([4, 4, 2, 0], device=device))
    assert accepted.tolist() == [1, 0, 2, 0] and following.tolist() == [0, 0, 7, 5]


def test_counts_beyond_the_drafts_and_below_zero(device):
    drafts, predictions = torch.ones(3, 2, dtype=torch.int64, device=device), torch.ones(3, 3, dtype=torch.int64, device=device)
    for dtype in INTEGERS:
        counts = torch.tensor([3, 100, -1], dtype=dtype, device=device)
        assert fused(drafts, predictions, counts)[0].tolist() == reference.accept(drafts, predictions, counts)[0].tolist() == [2, 2, 0]


def test_two_dtypes_and_large_ids(device):
    large = torch.iinfo(torch.int32).max
    drafts = torch.tensor([[large, large], [-1, 3]], dtype=torch.int32, device=device)
    predictions = torch.tensor([[large, large + 2**32, 1], [-1, 3, 2**40]], device=device)
    check(fused(drafts, predictions), drafts, predictions)
    check(fused(drafts.long(), predictions.int()), drafts.long(), predictions.int())


@pytest.mark.parametrize("b, k", [(0, 3), (0, 0)])
def test_no_sequence(b, k, device):
    accepted, following = fused(*(torch.zeros(b, columns, dtype=torch.int32, device=device) for columns in (k, k + 1)))
    assert accepted.shape == following.shape == (0,) and (accepted.dtype, following.dtype) == (torch.int64, torch.int32)


def test_strides(device):
    drafts, predictions, counts = case(5, 4, torch.int64, device)
    expected = by_loop(drafts, predictions, counts)
    views = (lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, -1)[..., ::2], lambda x: torch.cat([x, x])[: len(x)])
    for view in views:
        got = fused(view(drafts), view(predictions), counts.repeat_interleave(2)[::2])
        assert tuple(x.tolist() for x in got) == expected
    one = [x[:1].expand(3, *x.shape[1:]) for x in (drafts, predictions, counts)]
    check(fused(*one), *one)


def test_the_batch_is_one_launch_without_waiting(device, monkeypatch):
    launches = []
    launch = KERNELS._device.launch
    monkeypatch.setattr(KERNELS._device, "launch", lambda *args, **options: launches.append(args) or launch(*args, **options))
    drafts, predictions, counts = case(300, 8, torch.int64, device)
    fused(drafts, predictions, counts)  # compiled
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = fused(drafts, predictions, counts)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(launches) == 2
    check(got, drafts, predictions, counts)


def test_operator(device):
    drafts, predictions, counts = case(3, 4, torch.int32, device)
    for arguments in ((drafts, predictions, counts), (drafts, predictions, None)):
        torch.library.opcheck(torch.ops.mtp_kernels.accept.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *args: fused(*args), fullgraph=True, backend="aot_eager")
    check(compiled(drafts, predictions, counts), drafts, predictions, counts)


@pytest.mark.parametrize("mode", ["linear", "quadratic", "quadratic-printed"])
def test_decoding(shared, monkeypatch, mode):
    """The shared model is on the CPU, where there is a kernel only in the interpreter."""
    if not mtp_kernels.triton.INTERPRETED:
        pytest.skip("Triton is not interpreted")
    prompts, options = [[1, 2, 3], [0]], dict(mode=mode, k=3, max_new_tokens=12)
    expected = generate(shared.model, prompts, **options)
    monkeypatch.setattr(mtp_model.decode, "accept", fused)
    got = generate(shared.model, prompts, **options)
    assert got.tokens == expected.tokens and got.stats.accepted == expected.stats.accepted


def state_by_loop(drafts, predictions, counts, lengths, room, finished, eos):
    accepted, following = by_loop(drafts, predictions, counts)
    lengths, room, finished, written = lengths.tolist(), room.tolist(), finished.tolist(), []
    for b, a in enumerate(accepted):
        tokens = []
        for token in [] if finished[b] else predictions[b, : a + 1].tolist():
            tokens.append(token)
            if token in eos.tolist() or len(tokens) == room[b]:
                finished[b] = True
                break
        room[b] -= len(tokens)
        lengths[b] += 0 if finished[b] else a + 1
        written.append(len(tokens))
    return [accepted, following, written], [lengths, room, finished]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("b, k, ends", [(40, 0, [1]), (3, 1, []), (40, 2, [1]), (130, 5, [1]), (9, 16, [7, 1, 9, 3, 5]), (40, 8, [2, 3])])
def test_commit_against_a_loop(b, k, ends, implementation, device):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drafts, predictions, counts = case(b, k, torch.int64, device, seed)
        predictions = torch.where(torch.rand(b, k + 1, generator=generator).to(device) < 0.2, 2 + predictions, predictions)
        finished = guarded((b,), torch.bool, device)[0].copy_(torch.rand(b, generator=generator) < 0.2)
        room = torch.randint(1, k + 3, (b,), generator=generator).to(device).masked_fill(finished, 0)
        lengths, eos = torch.randint(50, (b,), generator=generator).to(device), torch.tensor(ends, dtype=torch.int64, device=device)
        outputs, state = state_by_loop(drafts, predictions, counts, lengths, room, finished, eos)
        got = accept_and_commit(drafts, predictions, counts, lengths, room, finished, eos, implementation=implementation)
        assert [x.tolist() for x in got] == outputs
        assert [x.tolist() for x in (lengths, room, finished)] == state


def test_commit_is_an_operator(device):
    drafts, predictions, counts = case(3, 2, torch.int64, device)
    state = [torch.zeros(3, dtype=torch.int64, device=device), torch.full((3,), 4, device=device), torch.zeros(3, dtype=torch.bool, device=device)]
    torch.library.opcheck(torch.ops.mtp_kernels.accept_and_commit.default, (drafts, predictions, counts, *state, torch.tensor([1], device=device)))


def test_commit_and_strides(device):
    drafts, predictions, counts = case(2, 3, torch.int64, device)
    state = {"lengths": torch.tensor([3, 4]), "room": torch.tensor([9, 9]), "finished": torch.tensor([False, True])}
    state = {name: x.to(device) for name, x in state.items()}
    eos = torch.tensor([7, 1, 8, 1], device=device)[::2]  # ends of which the elements between are none
    got = accept_and_commit(drafts, predictions, counts, **{n: x.clone() for n, x in state.items()}, eos=eos, implementation="triton")
    assert all(map(torch.equal, got, accept_and_commit(drafts, predictions, counts, **{n: x.clone() for n, x in state.items()}, eos=eos.contiguous())))
    for name, x in state.items():
        with pytest.raises(ValueError, match=f"{name} has stride 2; accepted is contiguous memory"):
            accept_and_commit(drafts, predictions, counts, **state | {name: torch.stack([x, x], 1)[:, 0]}, eos=eos)
