"""Which examples make which batch."""

import time

import numpy as np
import pytest
from conftest import batch_indices
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_model.batches import Batches, pack


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_plain_batches_are_shuffled_epochs(n, batch, seed):
    steps = -(-3 * n // batch)
    stream = [i for step in range(steps) for i in batch_indices(n, batch, step, seed)]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert batch_indices(n, batch, steps - 1, seed) == stream[-batch:]


def test_epochs_and_seeds_differ():
    epochs = {tuple(batch_indices(20, 20, step, seed)) for step in range(4) for seed in range(4)}
    assert len(epochs) == 16 and tuple(range(20)) not in epochs


def test_the_plain_order_is_fixed():
    """Runs of earlier versions go on: these numbers must never change."""
    assert [batch_indices(7, 3, step, 5) for step in range(4)] == [[1, 4, 2], [3, 6, 5], [0, 4, 2], [0, 6, 5]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 30), seed=st.integers(0, 5), numbers=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_without_options_the_order_is_the_plain_one(n, batch, seed, numbers):
    batches = Batches(np.full(n, 4), batch, seed)
    for number in numbers:
        picked = batches(number)
        assert picked == [[i] for i in batch_indices(n, batch, number, seed)]
        assert all(type(i) is int for (i,) in picked)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=60))
    pack_length = draw(st.none() | st.integers(max(3, *lengths), 50))
    options = dict(pack_length=pack_length, buckets=draw(st.booleans()))
    return np.array(lengths), draw(st.integers(1, 9)), draw(st.integers(0, 3)), options


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_example_once_per_epoch(case):
    lengths, size, seed, options = case
    batches = Batches(lengths, size, seed, **options)
    per_epoch = batches.sequences
    stream = [sequence for number in range(-(-3 * per_epoch // size)) for sequence in batches(number)]
    for epoch in range(3):
        sequences = stream[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
        assert sorted(map(sorted, sequences)) == sorted(map(sorted, stream[:per_epoch]))  # the same sequences in every epoch
    for sequence in stream:
        if options["pack_length"] is None:
            assert len(sequence) == 1
        else:
            assert 1 <= len(sequence) and lengths[sequence].sum() <= options["pack_length"]


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_batch_depends_on_its_number_only(case, numbers):
    lengths, size, seed, options = case
    one_after_another = Batches(lengths, size, seed, **options)
    sequential = [one_after_another(number) for number in range(31)]
    assert all(len(batch) == size for batch in sequential)
    anywhere = Batches(lengths.tolist(), size, seed, **options)
    for number in numbers:
        assert anywhere(number) == sequential[number]
        assert Batches(lengths, size, seed, **options)(number) == sequential[number]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50))
def test_packing_is_the_tightest_fit(lengths, limit):
    """Against the obvious loop: longest first, each into the sequence with the least room that is enough."""
    members, offsets = pack(np.array(lengths), limit, 0)
    packed = sorted(sorted(lengths[i] for i in members[a:b]) for a, b in zip(offsets, offsets[1:], strict=False))
    sequences: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [s for s in sequences if sum(s) + length <= limit]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            sequences.append([length])
    assert len(packed) == len(sequences)
    assert sorted(map(sum, packed)) == sorted(map(sum, sequences))


def test_who_shares_a_sequence_is_drawn_from_the_seed():
    lengths = np.full(60, 4)
    assert len({str(pack(lengths, 12, seed)) for seed in (0, 0, 1, 2)}) == 3


@pytest.mark.parametrize("options", [dict(), dict(buckets=True), dict(pack_length=64), dict(pack_length=64, buckets=True)])
def test_epochs_and_seeds_have_orders_of_their_own(options):
    lengths = np.random.default_rng(0).integers(3, 40, 400)
    epochs = set()
    for seed in range(3):
        batches = Batches(lengths, 1, seed, **options)
        for epoch in range(3):
            epochs.add(str([batches(epoch * batches.sequences + number) for number in range(batches.sequences)]))
    assert len(epochs) == 9


def padding(lengths, batches, numbers):
    """Share of padded sequences that is tokens, by making the batches."""
    tokens = padded = 0
    for number in numbers:
        sizes = [lengths[sequence].sum() for sequence in batches(number)]
        tokens, padded = tokens + sum(sizes), padded + max(sizes) * len(sizes)
    return tokens / padded


def test_buckets_and_packing_save_padding():
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 8 * 400), 3, 512).astype(np.int64)
    share = {}
    for name, options in dict(plain={}, buckets=dict(buckets=True), packed=dict(pack_length=512)).items():
        batches = Batches(lengths, 8, 0, **options)
        share[name] = batches.efficiency
        if name != "packed":
            assert batches.efficiency == padding(lengths, batches, range(400))
    assert share["plain"] < 0.5 < 0.85 < share["buckets"] and share["packed"] > 0.98


def test_efficiency_of_a_last_batch_that_is_not_full():
    assert Batches([7] * 5, 2, 0).efficiency == 1


def test_buckets_stay_whole_in_every_epoch():
    """Epochs that do not end with a batch: only what shares a batch with the next epoch is mixed."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 8 * 100 + 3), 3, 512).astype(np.int64)
    batches = Batches(lengths, 8, 0, buckets=True)
    for epoch in range(1, 5):
        first, last = -(-epoch * len(lengths) // 8), (epoch + 1) * len(lengths) // 8
        assert padding(lengths, batches, range(first, last)) > 0.8
    assert 0.8 < batches.efficiency < 1


def test_batches_of_a_window_are_shuffled():
    """A run must not see short sequences first and long ones last."""
    lengths = np.arange(3, 403)
    batches = Batches(lengths, 8, 0, buckets=True)
    means = [np.mean([lengths[i] for (i,) in batches(number)]) for number in range(50)]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5 and means != sorted(means)


@pytest.mark.parametrize(
    "lengths, changes, words",
    [([], {}, r"lengths have shape \(0,\)"), ([[3]], {}, r"lengths have shape \(1, 1\)"), ([3], dict(batch_size=0), "batch_size is 0"),
     ([3], dict(seed=-1), "seed is -1"), ([3], dict(pack_length=2), "pack_length is 2; accepted is 3 or more"),
     ([3, 9, 7], dict(pack_length=8), r"example 1 has 9 tokens; accepted are 8 \(pack_length\)")],
)  # fmt: skip
def test_settings_are_checked(lengths, changes, words):
    with pytest.raises(ValueError, match=words):
        Batches(lengths, **dict(batch_size=2, seed=0) | changes)


def test_negative_number():
    with pytest.raises(ValueError, match="number is -1"):
        Batches([3], 1, 0)(-1)


def test_many_examples():
    """300,000 are packed in seconds, not in minutes, and a batch takes no time."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 300_000), 3, 4096).astype(np.int64)
    began = time.perf_counter()
    batches = Batches(lengths, 8, 0, pack_length=4096)
    batches(0)
    made = time.perf_counter()
    for number in range(1, 200):
        batches(number)
    assert made - began < 10 and time.perf_counter() - made < 2
    assert batches.efficiency > 0.99
