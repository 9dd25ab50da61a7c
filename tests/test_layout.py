"""The layouts' pictures, and the attention rule, against loops over labelled rows and keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_kernels.reference import allowed_keys
from mtp_model.layout import MODES, decoding_layout, prefill_layout, training_layout

PICTURES = {
    "autoregressive": """
        0 | 0""",
    "linear": """
        0 | 0      |
        1 | 0 0    |
        2 | 0 0 0  |
        3 | 0 0 0  | 0
        4 | 0 0 0  | 0 0""",
    "quadratic": """
        0 | 0      |     |     |
        1 | 0 0    |     |     |
        2 | 0 0 0  |     |     |
        1 | 0      | 0   |     |
        2 | 0      | 0 0 |     |
        2 | 0 0    |     | 0   |
        3 | 0 0    |     | 0 0 |
        3 | 0 0 0  |     |     | 0
        4 | 0 0 0  |     |     | 0 0""",
    "quadratic-printed": """
        0 | 0      |     |
        1 | 0 0    |     |
        2 | 0 0 0  |     |
        2 | 0 0    | 0   |
        3 | 0 0    | 0 0 |
        3 | 0 0 0  |     | 0
        4 | 0 0 0  |     | 0 0""",
}
PICTURES["prefill"] = PICTURES["linear"]
PICTURES["training"] = PICTURES["quadratic"]
UNDRAFTED = """
        0 | 0 |
        1 | 0 | 0
        2 | 0 | 0 0"""


def drawn(picture, widths):
    """Positions and allowed columns of a picture; widths: how many keys each of its fields stands for."""
    positions, allowed = [], []
    for line in picture.strip().splitlines():
        position, *fields = line.split("|")
        positions.append(int(position))
        row = []
        for field, width in zip(fields, widths, strict=True):
            count = len(field.split())
            row += [True] * count + [False] * (width - count)
        allowed.append(row)
    return positions, allowed


def check_picture(layout, picture, widths):
    positions, allowed = drawn(picture, widths)
    for batch, start in ((layout.batch, 0), (layout.batch, 5)):
        rows = layout.at(torch.zeros(layout.num_ntp, batch, dtype=torch.int64), [start] * batch)
        assert rows.positions[:, 0].tolist() == [p + start for p in positions]
        table = allowed_keys(rows.rule)[0]
        assert bool(table[:, :start].all())
        assert table[:, start:].tolist() == allowed


@pytest.mark.parametrize("mode", MODES)
def test_decoding_pictures(mode):
    blocks = {"autoregressive": 0, "linear": 1, "quadratic": 3, "quadratic-printed": 2}[mode]
    layout = decoding_layout(mode, 2, (0,) if mode == "autoregressive" else (2,))
    check_picture(layout, PICTURES[mode], [3 if blocks else 1] + [2] * blocks)
    assert layout.num_rows == {"autoregressive": 1, "linear": 5, "quadratic": 9, "quadratic-printed": 7}[mode]


@pytest.mark.parametrize("mode", MODES[1:])
def test_step_without_drafts(mode):
    check_picture(decoding_layout(mode, 2, (0,)), UNDRAFTED, [1, 2])


def test_prefill_and_training_pictures():
    check_picture(prefill_layout([3], 2), PICTURES["prefill"], [3, 2])
    check_picture(prefill_layout([1], 0), PICTURES["autoregressive"], [1])
    check_picture(training_layout(3, torch.tensor([[0], [1], [2]]), 2), PICTURES["training"], [3, 2, 2, 2])


@pytest.mark.parametrize("k", [1, 2, 5, 8, 16])
def test_rows_per_step(k):
    """The table of the method: 1, 1 + 2 k, (k + 1)^2 and 1 + k + k^2 rows."""
    counts = [decoding_layout(mode, k, (0 if mode == "autoregressive" else k, 0)).num_rows for mode in MODES]
    assert counts == [1, 1 + 2 * k, (k + 1) ** 2, 1 + k + k * k]
    counts = [decoding_layout(mode, k, (9, 0)).num_rows for mode in MODES]  # copied drafts may be more, or fewer, than the masks
    assert counts == [10, 10 + k, 10 * (k + 1), 10 + 9 * k]


def check_rows(rows, starts, num_ntp, anchors, k):
    """anchors[b]: the anchors of sequence b, in order. Every row and key is labelled, and labels are compared."""
    allowed = allowed_keys(rows.rule)
    assert rows.num_masks == len(anchors[0]) * k and rows.num_ntp == num_ntp
    for b, n in enumerate(starts):
        labels = [("ntp", n + i, 0) for i in range(num_ntp)]
        labels += [(block, n + anchor + j, j) for block, anchor in enumerate(anchors[b]) for j in range(1, k + 1)]
        columns = {i: ("ntp", i) for i in range(n + num_ntp)}
        for m, (block, _, j) in enumerate(labels[num_ntp:]):
            columns[n + num_ntp + m] = (block, j)
        for t, (kind, position, j) in enumerate(labels):
            assert int(rows.positions[t, b]) == position
            assert int(rows.slot[t]) == j
            last = position - j  # the newest ordinary token that the row sees: itself, or its anchor
            for column in range(rows.rule.num_keys):
                owner = columns.get(column)
                if owner is None:
                    expected = False
                elif owner[0] == "ntp":
                    expected = owner[1] <= last
                else:
                    expected = owner[0] == kind and owner[1] <= j
                assert bool(allowed[b, t, column]) == expected, (b, t, column)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_training_layouts(data):
    length, k, batch = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    count = data.draw(st.integers(0, 4))
    column = st.lists(st.integers(0, length - 1), min_size=count, max_size=count)
    anchors = [data.draw(column) for _ in range(batch)]
    starts = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    table = torch.tensor(anchors, dtype=torch.int64).view(batch, count).t()
    ids = torch.zeros(length, batch, dtype=torch.int64)
    check_rows(training_layout(length, table, k).at(ids, starts), starts, length, anchors, k)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_decoding_layouts(data):
    mode, k = data.draw(st.sampled_from(MODES)), data.draw(st.integers(1, 4))
    drafts = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    starts = [data.draw(st.integers(1, 9)) for _ in drafts]
    most = max(drafts)
    usual = {"autoregressive": [], "linear": [most], "quadratic": list(range(most + 1)), "quadratic-printed": list(range(1, most + 1)) or [0]}[mode]
    anchors = [[min(row, count) for row in usual] for count in drafts]
    num_ntp = most + 1
    rows = decoding_layout(mode, k, drafts).at(torch.zeros(num_ntp, len(drafts), dtype=torch.int64), starts)
    check_rows(rows, starts, num_ntp, anchors, k if mode != "autoregressive" else 1)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), k=st.integers(0, 4))
def test_prefill_layouts(lengths, k):
    anchors = [[n - 1] if k else [] for n in lengths]
    ids = torch.zeros(max(lengths), len(lengths), dtype=torch.int64)
    rows = prefill_layout(lengths, k).at(ids, [0] * len(lengths))
    check_rows(rows, [0] * len(lengths), max(lengths), anchors, max(k, 1))


def test_parts_of_a_pass():
    ids = torch.tensor([[3, 4], [1, 0], [2, 2]])
    rows = decoding_layout("quadratic", 2, (2, 2)).at(ids, [6, 4])
    whole = allowed_keys(rows.rule)
    ntp, masks = rows.ntp_rows(), rows.mask_rows()
    assert ntp.gate is None and ntp.num_masks == 0 and torch.equal(ntp.ids, ids) and ntp.start == (6, 4)
    assert masks.gate == 0 and masks.num_ntp == 0 and masks.start == (9, 7)
    assert rows.gate == 6 and rows.start == (6, 4)
    assert torch.equal(allowed_keys(ntp.rule), whole[:, :3, : ntp.rule.num_keys])
    assert not whole[:, :3, ntp.rule.num_keys :].any()
    assert torch.equal(allowed_keys(masks.rule), whole[:, 3:])
    assert torch.equal(torch.cat([ntp.positions, masks.positions]), rows.positions)
    assert torch.equal(rows.ids, ids) and masks.ids.shape == (0, 2)
    assert masks.rule.block_size == 2 and ntp.rule.block_size == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_window_hides_what_is_too_far_behind(data):
    """Of any pass: a row sees what it saw, but tokens `window` positions or more before its own; also where lengths are on the device."""
    k, window, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    starts = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    if data.draw(st.booleans()):
        length, first = 6, torch.tensor([[0, 0], [0, 1], [0, 1], [3, 1], [3, 4], [3, 4]]) if data.draw(st.booleans()) else None
        batch, starts = (2, [0, 0]) if first is not None else (batch, starts)
        layout = training_layout(length, torch.tensor([[1] * batch, [5] * batch]), k, first)
    else:
        layout = decoding_layout(data.draw(st.sampled_from(MODES)), k, tuple(data.draw(st.integers(0, 4)) for _ in range(batch)))
    ids = torch.zeros(layout.num_ntp, batch, dtype=torch.int64)
    rows = layout.at(ids, starts)
    whole, mask_start = allowed_keys(rows.rule), rows.rule.mask_start
    columns = torch.arange(rows.num_keys)
    position = rows.visible.t() + layout.slot - 1  # by column; documents begin anew, at the same distance
    near = columns > position.unsqueeze(-1) - window
    begins = 0 if layout.first is None else torch.cat([layout.first, layout.first.gather(0, layout.anchors).repeat_interleave(k, 0)])
    assert torch.equal(rows.positions, position.t() - begins)
    expected = whole & (near | (columns >= mask_start[:, None, None]))
    assert torch.equal(allowed_keys(rows.rule_within(window)), expected)
    assert rows.rule_within(None) is rows.rule and rows.rule_within(10**9) is rows.rule and rows.rule_within(window) is rows.rule_within(window)
    on_device = layout.at(ids, torch.tensor(starts), num_keys=rows.num_keys + 3)
    assert torch.equal(allowed_keys(on_device.rule_within(window))[..., : rows.num_keys], expected)
    ntp = layout.at(ids, [0] * batch).ntp_rows()
    assert ntp.rule_within(window).causal == (layout.first is None and ntp.num_keys <= window)


@pytest.mark.parametrize("start, packed, causal", [([0, 0], False, True), ([0, 1], False, False), ([0, 0], True, False), ("device", False, False)])
def test_ntp_rows_of_whole_texts_are_causal(start, packed, causal):
    first = torch.zeros(4, 2, dtype=torch.int64) if packed else None
    keys = {"num_keys": 12} if start == "device" else {}
    start = torch.zeros(2, dtype=torch.int64) if start == "device" else start
    rows = training_layout(4, torch.tensor([[1, 2]]), 3, first).at(torch.zeros(4, 2, dtype=torch.int64), start, **keys)
    assert not rows.rule.causal and not rows.mask_rows().rule.causal and rows.ntp_rows().rule.causal is causal
    if causal:
        rule = rows.ntp_rows().rule
        assert torch.equal(allowed_keys(rule), torch.ones(4, 4, dtype=torch.bool).tril().expand(2, -1, -1))


@pytest.mark.parametrize(
    "build, word",
    [
        (lambda: decoding_layout("cubic", 2, (2,)), "mode"),
        (lambda: decoding_layout("linear", 0, (2,)), "k is 0"),
        (lambda: decoding_layout("linear", 17, (2,)), "k is 17"),
        (lambda: prefill_layout([], 2), "prompt lengths"),
        (lambda: prefill_layout([3, 0], 2), "prompt lengths"),
        (lambda: prefill_layout([3], -1), "k is -1"),
        (lambda: training_layout(3, torch.tensor([0, 1]), 2), r"\(A, B\)"),
        (lambda: training_layout(3, torch.tensor([[0.0]]), 2), "torch.int64"),
        (lambda: training_layout(3, torch.tensor([[3]]), 2), "rows 0 to 2"),
        (lambda: training_layout(3, torch.tensor([[-1]]), 2), "rows 0 to 2"),
        (lambda: training_layout(3, torch.tensor([[1]]), 17), "k is 17"),
        (lambda: prefill_layout([3], 2).at(torch.zeros(2, 1, dtype=torch.int64), [0]), "ids have shape"),
        (lambda: training_layout(3, torch.tensor([[1]]), 2, torch.tensor([[0], [2], [2]])), "each entry from 0 to its own row"),
        (lambda: training_layout(3, torch.tensor([[1]]), 2, torch.tensor([[0], [-1], [2]])), "each entry from 0 to its own row"),
        (lambda: prefill_layout([3], 2).at(torch.zeros(3, 1, dtype=torch.int64), [0, 0]), "start has 2"),
        (lambda: prefill_layout([3], 2).at(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([0])), "num_keys is None"),
        (lambda: prefill_layout([3], 2).at(torch.zeros(3, 1, dtype=torch.int64), [0], num_keys=9), "num_keys is 9"),
    ],
)
def test_errors(build, word):
    with pytest.raises(ValueError, match=word):
        build()
