"""Transfer of states, attention and relations against loops in fp64; layer maps against the published lists."""

import math

import pytest
import torch

from penjing.methods.distillation.attention import Attended, attention_loss, attention_scores, visible_pairs
from penjing.methods.distillation.hidden_states import cosine_loss, hidden_state_loss, new_projection
from penjing.methods.distillation.layer_map import select_layers, watched_layers, watched_states
from penjing.methods.distillation.minilm import minilm_loss, minilm_v2_loss, relation_kl, relations

B, T = 2, 4
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attended(heads, key_heads, width, seed):
    return Attended(
        states(B, heads, T, width, seed=seed).requires_grad_(),
        states(B, key_heads, T, width, seed=seed + 1).requires_grad_(),
        states(B, key_heads, T, width, seed=seed + 2).requires_grad_(),
        width**-0.5,
    )


def test_layers_are_those_of_the_papers():
    assert select_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert watched_states(12, 4) == [0, 3, 6, 9, 12] and watched_layers(12, 4) == [2, 5, 8, 11]
    assert watched_states(24, 4) == [0, 6, 12, 18, 24]
    for choice in ("spread", "first", "last", "middle-out"):
        for count in range(1, 8):
            chosen = select_layers(7, count, choice)
            assert chosen == sorted(set(chosen)) and len(chosen) == count and set(chosen) <= set(range(7))
    assert select_layers(30, 15)[:3] == [0, 2, 4] and select_layers(30, 15)[-1] == 29
    assert select_layers(6, 3, "middle-out") == [0, 1, 5] and select_layers(6, 2, "last") == [4, 5]
    with pytest.raises(ValueError, match="7 layers cannot be taken out of 6"):
        select_layers(6, 7)


def test_hidden_states_through_a_projection():
    student, teacher, projection = states(B, T, 3), states(B, T, 5, seed=1), states(3, 5, seed=2).requires_grad_()
    slow = 0.0
    for row in range(B):
        for token in range(T):
            if MASK[row, token]:
                guess = [sum(student[row, token, i] * projection[i, j] for i in range(3)) for j in range(5)]
                slow += sum((guess[j] - teacher[row, token, j]) ** 2 for j in range(5)) / 5
    loss = hidden_state_loss([student], [teacher], MASK, projection)
    assert torch.allclose(loss, slow / MASK.sum())
    assert torch.allclose(hidden_state_loss([student] * 2, [teacher] * 2, MASK, projection), 2 * loss)
    assert torch.autograd.gradcheck(lambda w: hidden_state_loss([student], [teacher], MASK, w), projection)
    with pytest.raises(ValueError, match="need a trained projection"):
        hidden_state_loss([student], [teacher], MASK)
    assert new_projection(3, 5).shape == (3, 5) and new_projection(3, 5).requires_grad


def test_states_of_padding_do_not_count():
    student, teacher = states(B, T, 3), states(B, T, 3, seed=1)
    spoiled = student.clone()
    spoiled[0, 3] = math.nan
    assert torch.equal(cosine_loss(student, teacher, MASK), cosine_loss(spoiled, teacher, MASK))
    assert cosine_loss(2 * teacher, teacher, MASK) < 1e-12
    assert hidden_state_loss([teacher], [teacher], MASK) == 0


@pytest.mark.parametrize("causal", [True, False])
def test_attention_maps_count_only_pairs_that_exist(causal):
    student, teacher = attended(4, 2, 3, seed=0), attended(4, 4, 5, seed=9)
    slow, count = 0.0, 0
    for row in range(B):
        for query in range(T):
            for key in range(T):
                if MASK[row, query] and MASK[row, key] and (key <= query or not causal):
                    count += 1
                    for head in range(4):
                        ours = student.query[row, head, query] @ student.key[row, head // 2, key] * 3**-0.5
                        theirs = teacher.query[row, head, query] @ teacher.key[row, head, key] * 5**-0.5
                        slow += (ours - theirs) ** 2 / 4
    pairs = visible_pairs(MASK, causal)
    loss = attention_loss(student, teacher, pairs)
    assert int(pairs.sum()) == count and torch.allclose(loss, slow / count)
    loss.backward()
    assert teacher.query.grad is None and (student.query.grad[0, :, 3] == 0).all()
    with pytest.raises(ValueError, match="4 and 2 heads"):
        attention_loss(student, attended(2, 2, 3, seed=1), pairs)


def slow_relation(x, heads, row, head, query, causal):
    """Probabilities over tokens, from states (B, H, T, d), computed with lists."""
    joined = torch.cat([x[row, h] for h in range(x.shape[1])], -1)
    width = joined.shape[-1] // heads
    cut = joined[:, head * width : (head + 1) * width]
    seen = [key for key in range(T) if MASK[row, key] and (key <= query or not causal)]
    weights = [math.exp(float(cut[query] @ cut[key]) / math.sqrt(width)) for key in seen]
    return {key: weight / sum(weights) for key, weight in zip(seen, weights, strict=True)}


@pytest.mark.parametrize("causal", [True, False])
def test_relations_and_their_divergence(causal):
    student, teacher = states(B, 2, T, 6, seed=1).requires_grad_(), states(B, 4, T, 3, seed=2)
    pairs = visible_pairs(MASK, causal)
    slow = 0.0
    for row in range(B):
        for query in range(T):
            for head in range(3):
                if MASK[row, query]:
                    p, q = (slow_relation(x.detach(), 3, row, head, query, causal) for x in (teacher, student))
                    slow += sum(p[key] * math.log(p[key] / q[key]) for key in p) / 3
    ours, theirs = relations(student, 3, pairs), relations(teacher, 3, pairs)
    loss = relation_kl(ours, theirs, pairs)
    assert float(loss) == pytest.approx(slow / int(MASK.sum()))
    loss.backward()
    assert torch.isfinite(student.grad).all() and (student.grad[0, :, 3] == 0).all()
    assert torch.autograd.gradcheck(lambda x: relation_kl(relations(x, 3, pairs), theirs, pairs), student)
    with pytest.raises(ValueError, match="12 channels cannot be cut into 5"):
        relations(student, 5, pairs)


def test_minilm_of_equal_models_is_zero_and_heads_must_fit():
    pairs = visible_pairs(MASK, True)
    one, other = attended(4, 2, 3, seed=0), attended(2, 2, 6, seed=5)
    assert minilm_loss(one, one, pairs).abs() < 1e-12 < minilm_loss(one, attended(4, 2, 3, seed=7), pairs)
    assert (
        minilm_v2_loss(one, other, pairs, heads=3)
        > 0
        == minilm_v2_loss(one, one, pairs, heads=3).detach().round(decimals=12)
    )
    with pytest.raises(ValueError, match="4 and 2 need relation heads"):
        minilm_loss(one, other, pairs)


def test_scores_are_those_of_torch():
    layer = attended(4, 4, 3, seed=0)
    weights = attention_scores(layer).masked_fill(
        ~visible_pairs(torch.ones(B, T, dtype=bool), True)[:, None], -math.inf
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(*layer[:3], is_causal=True)
    assert torch.allclose(weights.softmax(-1) @ layer.value, wanted)
