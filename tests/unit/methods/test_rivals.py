"""Random deletion, UIDL, LaCo and SLEB against cases solved by hand and what their sources state."""

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from support.candidates import build_candidate
from support.evidence import gather, neutralise, score_and_plan
from support.models import LAYERS, make_tiny_model

from mka.errors import NumericsError, PlanError
from mka.evidence.needs import LOSS, Evidence
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import resolve_method
from mka.methods.laco import collapse_layers
from mka.methods.uidl import angular_distance
from mka.plan.plan import MergedLayer, Step, identity_layers, keep_layers
from mka.plan.target import Aim
from mka.recipe import MethodChoice


def plan_with(name, count, aim, *, scores=None, kinds=None, **evidence):
    settings = evidence.pop("settings", {})
    given = Evidence(count, kinds or ["same"] * count, **evidence)
    return resolve_method(MethodChoice(name=name, settings=settings)).plan(given, scores, aim)


def groups(layers):
    return [layer.sources for layer in layers]


# Random deletion


def draw(seed, layers_out, *, count=8, first=2, last=1):
    return plan_with("random_deletion", count, Aim(layers_out, first, last), settings={"seed": seed})


def test_random_deletion_is_reproducible_nested_and_leaves_protected_layers():
    for seed in range(20):
        assert draw(seed, 5) == draw(seed, 5)
        removed = [set(draw(seed, out).removed) for out in range(8, 2, -1)]
        assert [len(r) for r in removed] == [0, 1, 2, 3, 4, 5]
        assert all(fewer < more for fewer, more in pairwise(removed))
        assert removed[-1] == {2, 3, 4, 5, 6}
    assert len({draw(seed, 5).removed for seed in range(20)}) > 5


def test_every_set_of_unprotected_layers_is_equally_likely():
    sets = list(combinations(range(2, 7), 2))
    seen = Counter(tuple(sorted(draw(seed, 6).removed)) for seed in range(1000))
    assert set(seen) == set(sets)
    expected = 1000 / len(sets)
    # Chi-square with 9 degrees of freedom: above 27.88 with probability 0.001.
    assert sum((seen[s] - expected) ** 2 / expected for s in sets) < 27.88


# UIDL


def turning_states(angles, *, texts=3, seed=0):
    """Hidden states in random planes that turn by the given angles (radians), layer by layer, and grow."""
    rng = np.random.default_rng(seed)
    pooled = np.empty((len(angles) + 1, texts, 8))
    for text in range(texts):
        (u, v), _ = (q.T for q in np.linalg.qr(rng.normal(size=(8, 2))))
        for index, angle in enumerate(np.cumsum([0.0, *angles])):
            pooled[index, text] = (1 + index) * (np.cos(angle) * u + np.sin(angle) * v)
    return HiddenStates(pooled.astype(np.float32), np.zeros(len(angles)), np.full(texts, 4))


def plan_uidl(states, aim):
    planner = resolve_method(MethodChoice(name="uidl"))
    evidence = Evidence(states.layers, "a" * states.layers, states)
    scores = planner.method.score(evidence, planner.settings)
    return scores, planner.plan(Evidence(states.layers, "a" * states.layers), scores, aim)


def test_angular_distance_is_the_arccosine_over_pi():
    x = np.array([[1.0, 0.0]] * 4)
    y = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.5, np.sqrt(0.75)]])
    assert_allclose(angular_distance(x, y), [0.0, 0.5, 1.0, 1 / 3], atol=1e-15)
    assert angular_distance(x[:1], x[:1])[0] == 0.0
    rng = np.random.default_rng(0)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.normal(size=(2, 50, 6)))
    assert_allclose(angular_distance(x, y), np.arccos((x * y).sum(axis=1)) / np.pi, rtol=1e-12)


def test_uidl_scores_every_block_by_the_angle_between_its_two_ends():
    angles = np.array([0.5, 0.3, -0.3, 0.2, 0.4])
    scores, _ = plan_uidl(turning_states(angles), Aim(5))
    for first in range(5):
        for last in range(first, 5):
            # Turning back counts: what matters is where the block ends, not how far it went.
            expected = abs(angles[first : last + 1].sum()) / np.pi
            assert scores.values[first, last] == pytest.approx(expected, abs=1e-6)
            assert scores.values[last, first] == scores.values[first, last]


def test_uidl_deletes_the_block_that_turns_least_as_a_whole():
    # One layer: 0.05 at layer 4 is least. Two: layers 1 and 2 turn there and back.
    states = turning_states([0.5, 0.3, -0.3, 0.4, 0.05, 0.6])
    _, one = plan_uidl(states, Aim(5))
    assert one.removed == (4,)
    assert one.steps[0].score == pytest.approx(0.05 / np.pi, abs=1e-6)
    _, two = plan_uidl(states, Aim(4))
    assert two.removed == (1, 2) and two.layers == keep_layers([0, 3, 4, 5])
    assert len(two.steps) == 1 and two.steps[0].left == (1, 2) and two.steps[0].right == ()
    assert two.steps[0].score == pytest.approx(0.0, abs=1e-6)
    # Three: 0.3 - 0.3 + 0.4 = 0.4 in layers 1 to 3, 0.15 in layers 2 to 4, more elsewhere.
    assert plan_uidl(states, Aim(3))[1].removed == (2, 3, 4)


def test_uidl_keeps_protected_layers_and_breaks_ties_to_the_deeper_block():
    states = turning_states([0.5, 0.3, -0.3, 0.4, 0.05, 0.6])
    # Without layer 1 the pair (2, 3) turns by 0.1 and (3, 4) by 0.45.
    assert plan_uidl(states, Aim(4, 2, 1))[1].removed == (2, 3)
    assert plan_uidl(states, Aim(3, 2, 1))[1].removed == (2, 3, 4)
    with pytest.raises(PlanError, match=r"target of 2 layers cannot be reached: .* at 3 layers with the first 2 and"):
        plan_uidl(states, Aim(2, 2, 1))
    level = LayerScores("block-distance", np.full((6, 6), 0.25), "", "uidl", {})
    assert plan_with("uidl", 6, Aim(4, 1, 1), scores=level).removed == (3, 4)
    assert plan_with("uidl", 6, Aim(4), scores=level).removed == (4, 5)
    assert plan_with("uidl", 6, Aim(1, 0, 1), scores=level).removed == (0, 1, 2, 3, 4)


def test_a_hidden_state_at_the_origin_has_no_direction():
    states = turning_states([0.5, 0.3, 0.2])
    states.pooled[2, 1] = 0.0
    with pytest.raises(NumericsError, match=r"uidl: .* scores are NaN"):
        plan_uidl(states, Aim(2))


# LaCo


@pytest.mark.parametrize("others", [1, 2, 3])
def test_a_collapse_adds_the_differences_to_the_first_layer(others):
    theta = np.random.default_rng(others).normal(size=(6, 4))
    layer = collapse_layers(identity_layers(6)[1 : 2 + others])
    assert layer.sources == tuple(range(1, 2 + others))
    assert layer.weights == (1.0 - others, *[1.0] * others)
    assert sum(layer.weights) == 1.0
    collapsed = sum(w * theta[i] for i, w in zip(layer.sources, layer.weights))
    assert_allclose(collapsed, theta[1] + sum(theta[1 + k] - theta[1] for k in range(1, others + 1)), atol=1e-15)
    # The released loop subtracts the running sum instead, which leaves the last layer alone.
    running = theta[1].copy()
    for k in range(1, others + 1):
        running += theta[1 + k] - running
    assert_allclose(running, theta[1 + others], atol=1e-15)
    assert np.allclose(collapsed, running) == (others == 1)


def test_a_collapse_of_collapsed_layers_is_the_formula_on_what_they_are():
    theta = np.random.default_rng(0).normal(size=(6, 4))
    inner = collapse_layers(identity_layers(6)[2:5])
    outer = collapse_layers([MergedLayer((1,), (1.0,)), inner, MergedLayer((5,), (1.0,))])
    assert outer == MergedLayer((1, 2, 3, 4, 5), (-1.0, -1.0, 1.0, 1.0, 1.0))
    merged = theta[2] + (theta[3] - theta[2]) + (theta[4] - theta[2])
    expected = theta[1] + (merged - theta[1]) + (theta[5] - theta[1])
    assert_allclose(sum(w * theta[i] for i, w in zip(outer.sources, outer.weights)), expected, atol=1e-15)


def test_identical_layers_collapse_to_that_layer():
    model = make_tiny_model("llama", seed=5)
    for index in (2, 3, 4):
        model.model.layers[index].load_state_dict(model.model.layers[1].state_dict())
    base = identity_layers(LAYERS)
    collapsed = build_candidate(model, [base[0], collapse_layers(base[1:5]), base[5]])
    kept = build_candidate(model, keep_layers([0, 1, 5]))
    ids = (torch.arange(1, 13) * 31 % 97)[None]
    with torch.inference_mode():
        torch.testing.assert_close(collapsed(ids).logits, kept(ids).logits, atol=1e-4, rtol=1e-4)


class Similarity:
    """A cosine by rule, and what was asked."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, layers):
        self.asked.append(groups(layers))
        return self.rule(layers)


def plan_laco(count, aim, rule, *, kinds=None, **settings):
    similarity = Similarity(rule)
    return plan_with("laco", count, aim, kinds=kinds, output_similarity=similarity, settings=settings), similarity


def test_laco_walks_from_the_deepest_window_by_the_interval():
    plan, similarity = plan_laco(12, Aim(6), lambda layers: 0.9, merge_layers=3, interval=4)
    # Windows of three: 9-11 from position 9, then four up from position 5: 5-7, then 1-3.
    assert groups(plan.layers) == [(0,), (1, 2, 3), (4,), (5, 6, 7), (8,), (9, 10, 11)]
    assert all(layer.weights == (-1.0, 1.0, 1.0) for layer in plan.merged)
    assert plan.steps[0] == Step((9,), (10, 11), 0.9, -1.0)
    assert len(similarity.asked) == 3
    # The interval may be shorter than the window: a collapsed layer then collapses again.
    plan, _ = plan_laco(6, Aim(3), lambda layers: 0.9, merge_layers=3, interval=1)
    assert plan.layers == (*identity_layers(2), MergedLayer((2, 3, 4, 5), (0.0, -1.0, 1.0, 1.0)))


def test_laco_moves_one_layer_up_after_a_refusal():
    def rule(layers):
        return 0.9 if (3, 4, 5) in groups(layers) else 0.1

    plan, similarity = plan_laco(9, Aim(7), rule, merge_layers=3)
    assert groups(plan.layers) == [(0,), (1,), (2,), (3, 4, 5), (6,), (7,), (8,)]
    tried = [next(g for g in asked if len(g) > 1) for asked in similarity.asked]
    assert tried == [(6, 7, 8), (5, 6, 7), (4, 5, 6), (3, 4, 5)]


def test_laco_shortens_the_last_collapse_to_meet_the_target():
    plan, _ = plan_laco(10, Aim(6), lambda layers: 0.9, merge_layers=4, interval=4)
    assert groups(plan.layers) == [(0,), (1,), (2, 3), (4,), (5,), (6, 7, 8, 9)]
    assert plan.layers[2].weights == (0.0, 1.0)


def test_laco_lowers_the_threshold_and_starts_again_from_the_base():
    cosines = {(6, 7, 8): 0.5, (3, 4, 5): 0.55, (0, 1, 2): 0.58}

    def rule(layers):
        return min(cosines.get(g, 0.0) for g in groups(layers) if len(g) > 1)

    # 0.8 and 0.8 * 0.7 = 0.56 are too high for two collapses, 0.392 is not; the deepest then come first.
    plan, similarity = plan_laco(9, Aim(5), rule, merge_layers=3, interval=3, threshold=0.8, relax=0.7)
    assert groups(plan.layers) == [(0,), (1,), (2,), (3, 4, 5), (6, 7, 8)]
    assert [step.score for step in plan.steps] == [0.5, 0.5]
    # Nothing is measured twice.
    assert len({tuple(asked) for asked in similarity.asked}) == len(similarity.asked)
    # A threshold that already does is not lowered: the first to exceed it is the shallowest here.
    plan, _ = plan_laco(9, Aim(7), rule, merge_layers=3, interval=3, threshold=0.8, relax=0.7)
    assert groups(plan.layers) == [(0, 1, 2), (3,), (4,), (5,), (6,), (7,), (8,)]


@pytest.mark.parametrize("cosine", [0.0, -0.9])
def test_laco_meets_the_target_even_if_nothing_is_similar(cosine):
    kinds = ["a"] * 5 + ["b"] * 2 + ["a"] * 3
    for out in range(10, 4, -1):
        plan, _ = plan_laco(10, Aim(out, 1, 1), lambda layers: cosine, kinds=kinds, interval=7)
        assert plan.layers_out == out
        assert all(len({kinds[i] for i in layer.sources}) == 1 for layer in plan.layers)
        assert {0, 9} <= {layer.sources[0] for layer in plan.layers if layer.is_copy}
    assert groups(plan.layers) == [(0,), (1, 2, 3, 4), (5, 6), (7, 8), (9,)]
    with pytest.raises(PlanError, match=r"target of 4 layers cannot be reached: .* at 5 layers"):
        plan_laco(10, Aim(4, 1, 1), lambda layers: cosine, kinds=kinds)


def test_laco_counts_layers_gone_for_the_progress_bar():
    ticks = []
    similarity = Similarity(lambda layers: 0.3)
    plan_with("laco", 12, Aim(5, 1, 1), output_similarity=similarity, on_progress=ticks.append)
    assert sum(ticks) == 7 and min(ticks) > 0


# SLEB


def additive(costs, extra=None):
    """Loss of a model: the cost of every layer it lacks, and of some pairs together."""

    def loss(layers):
        gone = set(range(len(costs))) - {layer.sources[0] for layer in layers}
        return 3.0 + sum(costs[i] for i in gone) + sum(c for pair, c in (extra or {}).items() if set(pair) <= gone)

    return loss


def test_sleb_deletes_in_the_order_of_the_least_loss_and_nested():
    loss = additive([0.9, 0.1, 0.5, 0.2, 0.4, 0.0])
    plan = plan_with("sleb", 6, Aim(3, 1, 1), loss=loss)
    assert [step.left for step in plan.steps] == [(1,), (3,), (4,)]
    assert_allclose([step.score for step in plan.steps], [3.1, 3.3, 3.7])
    assert plan.layers == keep_layers([0, 2, 5])
    for out in range(3, 7):
        assert plan_with("sleb", 6, Aim(out, 1, 1), loss=loss).steps == plan.steps[: 6 - out]


def test_sleb_sees_what_is_gone_already():
    # Alone, 1 and 2 are the cheapest; together they are dear, and the ranking of single layers would take both.
    loss = additive([0.5, 0.1, 0.2, 0.4, 0.6], {(1, 2): 1.0})
    assert [step.left for step in plan_with("sleb", 5, Aim(3), loss=loss).steps] == [(1,), (3,)]


def test_sleb_ties_go_deeper_and_progress_counts_deletions():
    ticks = []
    plan = plan_with("sleb", 6, Aim(3, 1, 1), loss=additive([0.0] * 6), on_progress=ticks.append)
    assert [step.left for step in plan.steps] == [(4,), (3,), (2,)] and ticks == [1, 1, 1]


def write_texts(model, count, length=16):
    """Greedy continuations in the tokenizer's words: text this model predicts well, so that what it lacks shows."""
    ids = torch.arange(3, 3 + count)[:, None]
    with torch.inference_mode():
        for _ in range(length):
            following = model(ids).logits[:, -1, 3:].argmax(dim=-1) + 3
            ids = torch.cat([ids, following[:, None]], dim=1)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def test_sleb_deletes_neutral_layers_first_and_without_loss():
    model = neutralise(neutralise(make_tiny_model("llama", seed=5), 1), 3)
    texts = write_texts(model, 30)
    _, plan = score_and_plan(model, "sleb", {}, Aim(3, 1, 1), texts)
    assert {step.left for step in plan.steps[:2]} == {(1,), (3,)}
    loss = gather(model, {LOSS}, texts).loss
    base = loss(identity_layers(LAYERS))
    assert_allclose([step.score for step in plan.steps[:2]], base, rtol=1e-6)
    assert abs(plan.steps[2].score - base) > 1e-3
    assert plan.steps[2].score == pytest.approx(min(loss(keep_layers([0, i, 5])) for i in (2, 4)), rel=1e-6)
