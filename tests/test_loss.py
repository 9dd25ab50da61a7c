"""The loss and every gradient against a dense double-precision Llama that runs ordinary and mask rows in one pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mtp_model.cache import KVCache
from mtp_model.checkpoint import export_adapter
from mtp_model.data import Example, collate
from mtp_model.layout import prefill_layout
from mtp_model.loss import choose_anchors, mtp_loss, report

LENGTHS = (9, 6, 12)


def make_examples(seed=0, vocab=6, answers=None):
    rng = np.random.default_rng(seed)
    examples = []
    for i, n in enumerate(LENGTHS):
        answer = np.arange(n) >= (1, 3, 5)[i]
        if i == 2:
            answer[8:10] = False  # a second turn
        examples.append(Example(rng.integers(0, vocab, n).astype(np.int32), answer))
    return examples


def dense_llama(base, adapter, config, scale, ids, masks, gated=True):
    """Final states (T, d) of tokens `ids` and of mask rows, given as (anchor, j) pairs."""
    n, total = len(ids), len(ids) + len(masks)
    position = torch.tensor(list(range(n)) + [a + j for a, j in masks])
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for r in range(total):
        last = r if r < n else masks[r - n][0]
        allowed[r, : last + 1] = True
        if r >= n:
            for c, (a, j) in enumerate(masks):
                allowed[r, n + c] = a == masks[r - n][0] and j <= masks[r - n][1]
    on = (torch.arange(total) >= (n if gated else 0)).unsqueeze(1)
    rotary = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    angle = torch.cat([position.unsqueeze(1) * rotary] * 2, dim=1)

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weight

    def linear(x, i, module, name):
        y = x @ base[f"model.layers.{i}.{module}.{name}.weight"].T
        a, b = adapter[f"layers.{i}.{name}.lora_A"], adapter[f"layers.{i}.{name}.lora_B"]
        return y + on * scale * (x @ a.T @ b.T)

    def rotate(x):
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angle.cos().unsqueeze(1) + turned * angle.sin().unsqueeze(1)

    table = base["model.embed_tokens.weight"]
    x = torch.cat([table[list(ids)]] + [adapter["masks"][j - 1 : j] for _, j in masks])
    for i in range(config.num_hidden_layers):
        h = norm(x, base[f"model.layers.{i}.input_layernorm.weight"])
        q, k, v = (linear(h, i, "self_attn", f"{p}_proj").view(total, -1, config.head_dim) for p in "qkv")
        q, k = rotate(q), rotate(k)
        groups = q.shape[1] // k.shape[1]
        heads = []
        for head in range(q.shape[1]):
            scores = (q[:, head] @ k[:, head // groups].T / config.head_dim**0.5).masked_fill(~allowed, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, head // groups])
        x = x + linear(torch.cat(heads, dim=-1), i, "self_attn", "o_proj")
        h = norm(x, base[f"model.layers.{i}.post_attention_layernorm.weight"])
        h = F.silu(linear(h, i, "mlp", "gate_proj")) * linear(h, i, "mlp", "up_proj")
        x = x + linear(h, i, "mlp", "down_proj")
    return norm(x, base["model.norm.weight"])


def oracle_loss(base, adapter, model, examples, anchors, mask_decay=1.0, lcm_weight=1.0, soft_targets=0.0, masks=None):
    """anchors[b]: the anchors of sequence b. Everything by loops over rows, in double precision."""
    k, scale = masks or model.mtp.num_masks, model.mtp.alpha / model.mtp.rank
    table, head = base["model.embed_tokens.weight"], base["lm_head.weight"]
    d = table.shape[1]

    def sampler(previous, z):
        h = torch.cat([table[previous], z])
        for part in "12":
            h = F.silu(adapter[f"sampler.linear{part}.weight"] @ h + adapter[f"sampler.linear{part}.bias"])
            h = F.layer_norm(h, (d,), adapter[f"sampler.norm{part}.weight"], adapter[f"sampler.norm{part}.bias"])
        return h

    def entropy(state, label, teacher=None):
        logs = (head @ state).log_softmax(-1)
        hard = -logs[label]
        if teacher is None or not soft_targets:
            return hard
        return (1 - soft_targets) * hard - soft_targets * ((head @ teacher.detach()).softmax(-1) * logs).sum()

    weighted, divisor, lcm = 0.0, 0.0, []
    for example, chosen in zip(examples, anchors, strict=True):
        ids, answer, n = example.ids.tolist(), example.answer.tolist(), len(example.ids)
        masks = [(a, j) for a in chosen for j in range(1, k + 1)]
        z = dense_llama(base, adapter, model.config, scale, ids, masks, model.mtp.gated)
        rows = [(t, t, 1.0) for t in range(n)]
        rows += [(n + i, a + j, mask_decay ** (j - 1)) for i, (a, j) in enumerate(masks)]
        errors = {}
        for row, position, weight in rows:
            if position + 1 >= n or not answer[position + 1]:
                continue
            label = ids[position + 1]
            value = entropy(z[row], label, z[position] if row >= n else None)
            if model.sampler is not None:
                value = value + entropy(sampler(ids[position], z[row]), label, z[position])
            weighted, divisor = weighted + weight * value, divisor + weight
            if row >= n:
                errors.setdefault(position, []).append((z[position].detach() - z[row]).pow(2).mean())
        lcm += [sum(e) / len(e) for e in errors.values()]
    return weighted / divisor + lcm_weight * sum(lcm) / len(lcm)


def candidates(example):
    n, answer = len(example.ids), example.answer
    return [p for p in range(n - 2) if (answer[p] or answer[p + 1]) and answer[p + 2]]


@pytest.mark.parametrize(
    "k, options, config",
    [
        (3, {}, {}),
        (1, {}, dict(num_key_value_heads=4)),
        (2, dict(mask_decay=0.5, lcm_weight=0.25), dict(num_key_value_heads=1)),
        (3, dict(anchors_per_sequence=2), {}),
        (2, dict(anchors_per_sequence=5, mask_decay=0.8), dict(num_key_value_heads=4)),
        (3, dict(sampler=False, lcm_weight=0.0), {}),
        (16, dict(lcm_weight=3.0), {}),
        (3, dict(soft_targets=1.0), {}),
        (2, dict(soft_targets=0.25, mask_decay=0.5), dict(num_key_value_heads=1)),
        (3, dict(masks=2, mask_decay=0.7), {}),
        (2, {}, dict(adapter=dict(gated=False))),
        (2, dict(soft_targets=0.5, anchors_per_sequence=2), dict(adapter=dict(gated=False))),
    ],
)
def test_loss_and_gradients(toy_adapter_model, tmp_path, k, options, config):
    options = dict(options)
    model = toy_adapter_model(k=k, rank=3, sampler=options.pop("sampler", True), train_masks=True, **config)
    examples = make_examples()
    batch = collate(examples)
    limit = options.pop("anchors_per_sequence", None)
    if limit is None:
        anchors = [candidates(e) for e in examples]
    else:
        options["anchors"] = chosen, real = choose_anchors(batch, limit, torch.Generator().manual_seed(4))
        anchors = [chosen[real[:, b], b].tolist() for b in range(len(examples))]
        assert min(map(len, anchors)) >= min(2, limit) and max(map(len, anchors)) == limit
    losses = mtp_loss(model, batch, **options)
    losses.total.backward()

    base = {n: t.double() for n, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    adapter = {n: t.double().requires_grad_() for n, t in export_adapter(model).items()}
    options.pop("anchors", None)
    expected = oracle_loss(base, adapter, model, examples, anchors, **options)
    expected.backward()
    torch.testing.assert_close(losses.total.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the gradients in the parameters' places, to have them by the adapter's names
        for parameter in model.adapter_parameters().values():
            parameter.copy_(parameter.grad)
    for name, gradient in export_adapter(model).items():
        wanted = adapter[name].grad
        if k <= max(LENGTHS) and "masks" not in options:
            assert wanted.abs().max() > 0, name
        tolerance = 2e-4 * float(wanted.abs().max()) + 1e-6
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_logged_numbers(toy_adapter_model):
    model = toy_adapter_model(k=3, rank=3)
    examples = make_examples()
    total = mtp_loss(model, collate(examples))
    losses = report(total.sums, sampler=True)
    assert losses.loss == pytest.approx(float(total.total.detach()))
    pairs = [(e, p, j) for e in examples for p in candidates(e) for j in (1, 2, 3)]
    labelled = [(e, p, j) for e, p, j in pairs if p + j + 1 < len(e.ids) and e.answer[p + j + 1]]
    assert losses.rows == len(labelled)
    assert len(losses.right_base) == len(losses.right_sampler) == 3
    counts = [sum(1 for *_, j in labelled if j == slot) for slot in (1, 2, 3)]
    for share in (losses.right_base, losses.right_sampler):
        for value, count in zip(share, counts, strict=True):
            assert 0 <= value <= 1 and abs(value * count - round(value * count)) < 1e-3 * count
    parts = losses.base * losses.rows + losses.sampler * losses.rows
    assert losses.loss > parts / (losses.rows + 40) and losses.ntp > 0 and losses.lcm > 0


def test_report_divides_each_sum_by_its_own_count():
    counts = [[4, 2], [3, 1], [2, 2]]  # labels of each mask, the base's right guesses, the sampler's
    found = report(torch.tensor([9.0, 6.0, 12.0, 18.0, 0.5, 3.0, *sum(counts, [])], dtype=torch.float64), sampler=True)
    assert (found.loss, found.ntp, found.base, found.sampler, found.lcm, found.rows) == (9.0, 2.0, 2.0, 3.0, 0.5, 6)
    assert (found.right_base, found.right_sampler) == ([0.75, 0.5], [0.5, 1.0])


def test_padding_does_not_matter(toy_adapter_model):
    """What stands behind a sequence's end changes nothing."""
    model = toy_adapter_model(k=2)
    batch = collate(make_examples())
    before = mtp_loss(model, batch).total
    for b, n in enumerate(batch.lengths.tolist()):
        batch.ids[n:, b] = 5
    assert torch.equal(mtp_loss(model, batch).total, before)


def test_ordinary_rows_never_change(toy_adapter_model):
    model = toy_adapter_model(k=2, train_masks=True)
    ids = torch.tensor([[1], [3], [5], [2]])

    @torch.no_grad()
    def logits():
        return model.logits(model(prefill_layout([4], 2).at(ids, [0]), KVCache(model.config, 1, 8)))

    before = logits()
    optimizer = torch.optim.AdamW([p for p in model.adapter_parameters().values() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        mtp_loss(model, collate(make_examples())).total.backward()
        optimizer.step()
    after = logits()
    assert torch.equal(after[:4], before[:4])
    assert not torch.allclose(after[4:], before[4:], atol=1e-2)


def test_the_loss_without_gradients_is_the_same(toy_adapter_model):
    model, batch = toy_adapter_model(k=3), collate(make_examples())
    trained = mtp_loss(model, batch)
    with torch.no_grad():
        alone = mtp_loss(model, batch)
    torch.testing.assert_close(alone.sums, trained.sums, rtol=1e-6, atol=1e-6)


def test_no_anchor_is_an_error(toy_adapter_model):
    batch = collate([Example(np.array([1, 2, 3], dtype=np.int32), np.array([True, True, False]))])
    with pytest.raises(ValueError, match="no position"):
        choose_anchors(batch, None, None)
    with pytest.raises(ValueError, match="no position"):
        mtp_loss(toy_adapter_model(k=1), batch)


answers = st.lists(st.lists(st.booleans(), min_size=3, max_size=14), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(answers=answers, limit=st.one_of(st.none(), st.integers(1, 6)), seed=st.integers(0, 3))
def test_anchors(answers, limit, seed):
    examples = [Example(np.zeros(len(a), dtype=np.int32), np.array(a)) for a in answers]
    possible = [candidates(e) for e in examples]
    batch = collate(examples)
    if not any(possible):
        with pytest.raises(ValueError, match="no position"):
            choose_anchors(batch, limit, torch.Generator().manual_seed(seed))
        return
    chosen, real = choose_anchors(batch, limit, torch.Generator().manual_seed(seed))
    assert chosen.shape == real.shape and chosen.dtype == torch.int64
    assert 0 <= int(chosen.min()) and int(chosen.max()) < batch.ids.shape[0]
    for b, wanted in enumerate(possible):
        got = chosen[real[:, b], b].tolist()
        assert len(set(got)) == len(got) and set(got) <= set(wanted)
        assert len(got) == (len(wanted) if limit is None else min(limit, len(wanted)))
    again, _ = choose_anchors(batch, limit, torch.Generator().manual_seed(seed))
    assert torch.equal(chosen, again)


def test_subsets_differ_between_seeds():
    batch = collate([Example(np.zeros(60, dtype=np.int32), np.ones(60, dtype=bool))])
    subsets = {tuple(choose_anchors(batch, 5, torch.Generator().manual_seed(s))[0][:, 0].tolist()) for s in range(8)}
    assert len(subsets) == 8
    assert all(tuple(sorted(s)) == s for s in subsets)


def test_packed_documents_are_documents(toy_adapter_model):
    """Several documents in one sequence give the loss and the gradients of each in one of its own."""
    model = toy_adapter_model(k=3, rank=3, train_masks=True)
    one, two, three = make_examples()
    results = []
    for sequences in ([[one], [two], [three]], [[one, two], [three]], [[three, one, two]]):
        losses = mtp_loss(model, collate(sequences), soft_targets=0.5)
        losses.total.backward()
        results.append((losses.sums, {n: p.grad.clone() for n, p in model.adapter_parameters().items()}))
        model.zero_grad()
    for sums, gradients in results[1:]:
        torch.testing.assert_close(sums, results[0][0], rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_anchors_of_packed_documents_are_the_documents():
    """None where the first mask's label would be another document's."""
    one, two, three = make_examples()
    examples, starts = (two, one, three), (0, len(two.ids), len(two.ids) + len(one.ids))
    wanted = [start + p for start, e in zip(starts, examples, strict=True) for p in candidates(e)]
    for limit in (None, 99):
        chosen, real = choose_anchors(collate([list(examples)]), limit)
        assert chosen[real].tolist() == wanted


def test_parts_of_a_batch_add_up(toy_adapter_model):
    """What two processes with a part of the sequences each would add is the batch's loss, counts and gradient."""
    model = toy_adapter_model(k=2)
    batch = collate(make_examples() + make_examples(1))
    chosen, real = choose_anchors(batch)
    whole = mtp_loss(model, batch)
    whole.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.adapter_parameters().items() if p.grad is not None}
    model.zero_grad()
    parts, counts = [slice(0, 2), slice(2, 6)], []
    for number in (0, 1):  # the first round learns what all_sum has to give
        sums = torch.zeros_like(whole.sums)
        for part in parts:
            share = type(batch)(batch.ids[:, part], batch.answer[:, part], None, batch.lengths[part])
            add = (lambda tensor: counts.append(tensor.clone()) or tensor) if not number else lambda tensor: sum(counts)
            losses = mtp_loss(model, share, anchors=(chosen[:, part], real[:, part]), all_sum=add)
            sums += losses.sums
            if number:
                losses.total.backward()
    torch.testing.assert_close(sums, whole.sums, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.adapter_parameters()[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_change_no_gradient(toy_adapter_model):
    model = toy_adapter_model(k=2)
    gradients = []
    for on in (False, True):
        model.recompute_activations(on)
        mtp_loss(model, collate(make_examples())).total.backward()
        gradients.append({n: p.grad.clone() for n, p in model.adapter_parameters().items() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_an_ungated_adapter_changes_ordinary_rows(toy_adapter_model):
    model = toy_adapter_model(k=2, adapter=dict(gated=False))
    rows = prefill_layout([4], 0).at(torch.tensor([[1], [3], [5], [2]]), [0])
    with torch.no_grad():
        changed = model(rows, KVCache(model.config, 1, 8))
        model.remove_adapter()
        assert not torch.allclose(changed, model(rows, KVCache(model.config, 1, 8)), atol=1e-2)
