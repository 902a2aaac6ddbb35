"""The evolutionary search against tables: what it finds, what it spends, and that a killed search goes on."""

from itertools import combinations

import numpy as np
import pytest

from mka.errors import NumericsError, PlanError, RecipeError
from mka.evidence.journal import Journal, RecalledRepairs
from mka.evidence.needs import Evidence
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import method_settings, resolve_method
from mka.methods.evolution import propose
from mka.plan.configurations import Space
from mka.plan.plan import MergedLayer, MergePlan, identity_layers
from mka.plan.target import Aim
from mka.plan.wording import describe_steps
from mka.recipe import MethodChoice

LAYERS = 10
SMALL = {"context": 16, "tokens": [32, 64], "aligned_tokens": 48, "largest": 1, "budget": 20_000}
SMALL |= {"finalists": 0, "heal_tokens": 80}
AIM = Aim(7, 1, 1)


def gone(layers):
    return set(range(LAYERS)) - {source for layer in layers for source in layer.sources}


class Tables:
    """Repairs whose numbers are sums over the deleted layers; what was asked for is kept, and may end in a crash."""

    def __init__(self, raw, repaired=None, most=None, after=None):
        self.raw, self.repaired, self.most, self.asked = raw, repaired or raw, most, []
        self.after = after or self.repaired

    def observe(self):
        rng = np.random.default_rng(0)
        return HiddenStates(rng.normal(size=(LAYERS + 1, 5, 4)).astype(np.float32), np.ones(LAYERS), np.full(5, 16))

    def ask(self, level, layers, table):
        if self.most is not None and len(self.asked) >= self.most:
            raise KeyboardInterrupt
        self.asked.append((level, layers))
        return sum(table[i] for i in gone(layers))

    def divergence(self, layers, tokens):
        return self.ask(tokens, layers, self.raw)

    def aligned(self, layers):
        return self.ask("aligned", layers, self.repaired)

    def healed(self, layers):
        return self.ask("healed", layers, self.after)


# No two neighbours are cheap, so no block is the best; whole numbers, so that sums are exact.
COSTS = [0, 9, 1, 8, 7, 2, 9, 8, 3, 0]


def search(repairs, aim=AIM, on_progress=None, similarity=None, **given):
    planner = resolve_method(MethodChoice(name="evolution", settings=SMALL | given))
    values = np.eye(LAYERS) if similarity is None else similarity
    scores = LayerScores("pairwise-similarity", values, "", "evolution", {})
    evidence = Evidence(LAYERS, [None] * LAYERS, repairs=repairs, on_progress=on_progress)
    return planner.plan(evidence, scores, aim)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_of_all_deletions_is_found(seed):
    plan = search(Tables(COSTS), seed=seed)
    assert set(plan.removed) == {2, 5, 8}
    best = min(combinations(range(1, 9), 3), key=lambda set_: sum(COSTS[i] for i in set_))
    assert plan.removed == best and plan.search["divergence"] == 6
    assert [(step.left, step.right, step.score) for step in plan.steps] == [((i,), (), 6.0) for i in (2, 5, 8)]
    assert describe_steps(plan)[0] == "layer 2 deleted (score 6)"


def test_what_is_left_after_the_repair_decides_among_survivors():
    """Before a repair layers 2, 5, 8 lose least; after it the block 3 to 5, which is second to none but those."""
    raw = [0, 9, 1, 2, 2, 2, 9, 9, 3, 0]
    repaired = [0, 9, 9, 0, 0, 0, 9, 9, 9, 0]
    assert search(Tables(raw, repaired)).removed == (3, 4, 5)
    assert sum(raw[i] for i in search(Tables(raw, repaired), repair="none").removed) == 5


def test_each_step_takes_fewer_and_the_best():
    repairs = Tables(COSTS)
    search(repairs, offspring=8, survivors=4, budget=2500)
    levels = [level for level, _ in repairs.asked]
    first = levels.index(64)
    assert set(levels[:first]) == {32} and levels[first : first + 6] == [64] * 4 + ["aligned"] * 2
    values = {layers: sum(COSTS[i] for i in gone(layers)) for _, layers in repairs.asked[:first]}
    taken = [values[layers] for _, layers in repairs.asked[first : first + 4]]
    assert taken == sorted(values.values())[:4]
    assert [layers for _, layers in repairs.asked[first + 4 : first + 6]] == [
        layers for _, layers in repairs.asked[first : first + 2]
    ]


def plain_cost(level, layers):
    """Tokens through one layer, counted layer by layer."""
    front = 0
    while front < len(layers) and layers[front] == MergedLayer((front,), (1.0,)):
        front += 1
    if level not in ("aligned", "healed"):
        return level * (len(layers) - front)
    # A copy whose successor is missing is refitted to make up for it.
    behind = front < len(layers) and layers[front].sources[0] != front
    own = len(layers) - (front - 1 if behind and front else front)
    if level == "aligned":
        return (48 + 64) * (LAYERS + own)
    walked, trained = 48 * (LAYERS + own), max(3, own)  # the last three are trained in any case
    forwards, backwards = 80 * (LAYERS + trained), 80 * trained
    return walked + forwards + 2 * backwards + 2 * 64 * (LAYERS + trained)


@pytest.mark.parametrize(
    ("finalists", "budget"),
    [*((0, n) for n in (330, 331, 400, 777, 3000)), *((2, n) for n in (1450, 1500, 1777, 3000)), (3, 3000)],
)
@pytest.mark.parametrize("proposal", ["evolution", "random"])
@pytest.mark.parametrize("largest", [1, 3])
def test_the_budget_is_counted_to_the_token_and_kept(finalists, budget, proposal, largest):
    repairs, told = Tables(COSTS), []
    given = {"budget": budget, "proposal": proposal, "largest": largest, "finalists": finalists}
    plan = search(repairs, on_progress=told.append, **given)
    used = 64 * LAYERS + sum(plain_cost(*asked) for asked in repairs.asked)
    assert plan.search["spent"] == pytest.approx(used / LAYERS, abs=1e-3)
    assert used <= budget * LAYERS and sum(told) == used // LAYERS
    assert plan.search["budget"] == budget
    counts = {f"divergence:{n}": sum(level == n for level, _ in repairs.asked) for n in (32, 64)}
    counts["aligned"] = sum(level == "aligned" for level, _ in repairs.asked)
    healed = sum(level == "healed" for level, _ in repairs.asked)
    assert healed == (min(finalists, counts["aligned"]) if counts["aligned"] > 1 else 0)
    counts |= {"healed": healed} if healed else {}
    assert plan.search["measurements"] == {"base": 1, **counts}
    tried = [layers for level, layers in repairs.asked if level == 32]
    assert plan.search["configurations"] == len(tried) == len(set(tried))
    # Whatever went up the first step, somebody of it reached the top.
    assert counts["aligned"] >= plan.search["generations"] >= 1


def test_a_budget_too_small_for_one_candidate_says_how_much_it_needs():
    """The base 64 tokens; at worst 6 of 10 layers on 32 and 64 tokens, and 10 + 7 layers on 112: 64 + 57.6 + 190.4."""
    with pytest.raises(PlanError) as refused:
        search(Tables(COSTS), budget=311)
    assert str(refused.value) == (
        "budget of 311 forward tokens: the base and one candidate need 312; raise the method's budget, or lower its "
        "tokens, aligned_tokens, heal_tokens or finalists"
    )
    repairs = Tables(COSTS)
    plan = search(repairs, budget=312)
    assert plan.layers_out == 7 and len(repairs.asked) >= 3


def test_the_healings_are_set_aside_from_the_start():
    """At worst 10 + 7 layers on 48 and twice 64 tokens, and 10 + 3 times 7 on 80: 547.2 each, beside 312."""
    with pytest.raises(
        PlanError, match="the base and one candidate and 2 short healings need 1407; raise the method's"
    ):
        search(Tables(COSTS), budget=1406, finalists=2)
    repairs = Tables(COSTS)
    assert search(repairs, budget=1407, finalists=2).search["spent"] <= 1407


# Healed, layer 8 costs more than layer 4.
AFTER = [0, 9, 1, 8, 2, 2, 9, 8, 6, 0]


def test_a_healing_that_turns_two_finalists_round_changes_the_plan():
    """Of all deletions of three, {2, 5, 8} costs 6 and is the best, {2, 4, 5} costs 10 and is the second."""
    ranked = sorted(combinations(range(1, 9), 3), key=lambda set_: sum(COSTS[i] for i in set_))
    assert ranked[:2] == [(2, 5, 8), (2, 4, 5)]
    repairs = Tables(COSTS, after=AFTER)
    plan = search(repairs, finalists=2)
    assert plan.removed == (2, 4, 5)
    assert plan.search["finalists"] == [{"divergence": 6, "healed": 9}, {"divergence": 10, "healed": 5}]
    assert plan.search["divergence"] == 10 == plan.steps[0].score
    assert [gone(layers) for level, layers in repairs.asked if level == "healed"] == [{2, 5, 8}, {2, 4, 5}]
    assert [level for level, _ in repairs.asked][-2:] == ["healed", "healed"]
    assert MergePlan.from_json(plan.to_json()) == plan


def test_without_finalists_nothing_is_healed():
    repairs = Tables(COSTS, after=AFTER)
    plan = search(repairs, finalists=0)
    assert set(plan.removed) == {2, 5, 8} and "finalists" not in plan.search
    assert "healed" not in {level for level, _ in repairs.asked}


@pytest.mark.parametrize("number", [2, 3, 5])
def test_finalists_are_the_best_of_all_generations(number):
    repairs = Tables(COSTS)
    plan = search(repairs, finalists=number, budget=6000)
    top = {layers: sum(COSTS[i] for i in gone(layers)) for level, layers in repairs.asked if level == "aligned"}
    healed = [layers for level, layers in repairs.asked if level == "healed"]
    assert [top[layers] for layers in healed] == sorted(top.values())[:number] and len(set(healed)) == number
    assert plan.search["generations"] > 1 and plan.layers == healed[0]


def test_a_finalist_whose_healing_diverges_loses():
    class Diverging(Tables):
        lost = ({2, 5, 8},)

        def healed(self, layers):
            value = super().healed(layers)
            if gone(layers) in self.lost:
                raise NumericsError("healing diverged")
            return value

    plan = search(Diverging(COSTS), finalists=2)
    assert plan.removed == (2, 4, 5)
    assert plan.search["finalists"] == [{"divergence": 6, "healed": None}, {"divergence": 10, "healed": 10}]
    Diverging.lost = ({2, 5, 8}, {2, 4, 5})
    assert search(Diverging(COSTS), finalists=2).removed == (2, 5, 8)


def test_one_that_stands_alone_at_the_top_is_not_healed():
    class Fragile(Tables):
        def aligned(self, layers):
            value = super().aligned(layers)
            if gone(layers) != {3, 4, 5}:
                raise NumericsError("not finite")
            return value

    repairs = Fragile([0, 9, 9, 0, 0, 0, 9, 9, 9, 0])
    assert search(repairs, finalists=2).removed == (3, 4, 5)
    assert "healed" not in {level for level, _ in repairs.asked}


@pytest.mark.parametrize("proposal", ["evolution", "random"])
def test_one_seed_is_one_search(proposal):
    asked = []
    for seed in (3, 3, 4):
        repairs = Tables(COSTS)
        plan = search(repairs, seed=seed, proposal=proposal, largest=3, budget=4000)
        asked.append((repairs.asked, plan.to_json()))
    assert asked[0] == asked[1]
    assert asked[0][0] != asked[2][0]


@pytest.mark.parametrize("survived", [0, 1, 7, 40])
def test_a_killed_search_measures_the_rest_only_and_finds_the_same(survived, tmp_path):
    whole = Tables(COSTS)
    expected = search(whole, largest=3, budget=4000)
    assert len(whole.asked) > 40
    killed, rest = Tables(COSTS, most=survived), Tables(COSTS)
    with pytest.raises(KeyboardInterrupt):
        search(RecalledRepairs(killed, Journal(tmp_path / "j")), largest=3, budget=4000)
    found = search(RecalledRepairs(rest, Journal(tmp_path / "j")), largest=3, budget=4000)
    assert found.to_json() == expected.to_json()
    assert killed.asked + rest.asked == whole.asked and len(killed.asked) == survived


def test_killed_while_finalists_are_healed_it_heals_the_rest_only(tmp_path):
    whole = Tables(COSTS, after=AFTER)
    expected = search(whole, finalists=2, budget=4000)
    killed, rest = (Tables(COSTS, after=AFTER, most=most) for most in (len(whole.asked) - 1, None))
    with pytest.raises(KeyboardInterrupt):
        search(RecalledRepairs(killed, Journal(tmp_path / "j")), finalists=2, budget=4000)
    assert killed.asked[-1][0] == "healed"
    assert search(RecalledRepairs(rest, Journal(tmp_path / "j")), finalists=2, budget=4000) == expected
    assert rest.asked == whole.asked[-1:] and rest.asked[0][0] == "healed"


def test_what_destroys_the_model_is_no_candidate():
    class Fragile(Tables):
        def divergence(self, layers, tokens):
            value = super().divergence(layers, tokens)
            if not {2, 5} <= gone(layers):
                raise NumericsError("not finite")
            return value

    assert set(search(Fragile(COSTS)).removed) == {2, 5, 8}

    class Broken(Tables):
        def aligned(self, layers):
            raise NumericsError("not finite")

    with pytest.raises(NumericsError, match="configurations that were tried destroy the model"):
        search(Broken(COSTS), budget=400)


def test_a_search_ends_where_there_is_nothing_left_to_try():
    repairs = Tables(COSTS)
    plan = search(repairs, Aim(9, 4, 4), budget=10**9)  # layer 4 or layer 5
    assert plan.removed == (5,) and plan.search["configurations"] == 2


def test_a_random_search_asks_no_scores():
    class Blind(Tables):
        def observe(self):
            raise AssertionError("it looks")

    assert search(Blind(COSTS), proposal="random", budget=2000).layers_out == 7


# Proposals


def test_every_score_proposes_what_it_stands_for():
    rng = np.random.default_rng(1)
    # Layers 3 and 4 turn nothing; layer 7 turns little; the influence, told apart from it, names 1, 5 and 6.
    points = [rng.normal(size=(5, 8))]
    for layer in range(LAYERS):
        turn = {3: 0.0, 4: 0.0, 7: 0.1}.get(layer, 3.0)
        points.append(points[-1] + turn * rng.normal(size=(5, 8)))
    influence = np.full(LAYERS, 0.5)
    influence[[1, 5, 6]] = 0.1
    similarity = np.full((LAYERS, LAYERS), 0.1)
    for a, b in ((2, 3), (6, 7), (6, 8), (7, 8)):
        similarity[a, b] = similarity[b, a] = 0.9
    states = HiddenStates(np.stack(points).astype(np.float32), influence, np.full(5, 16))
    space = Space("a" * LAYERS, AIM, 3)
    by_influence, by_block, by_blocks, by_similarity, by_merging, *blocks = propose(space, states, similarity)
    assert gone(by_influence) == {1, 5, 6}
    assert len(gone(by_block)) == 3 and {3, 4} <= gone(by_block)
    assert gone(by_blocks) == {3, 4, 7}
    assert gone(by_similarity) == {2, 6, 7}  # the last of each group stays
    assert by_merging[2].sources == (2, 3) and by_merging[5].weights == (1 / 3, 1 / 3, 1 / 3)
    assert blocks == space.list_blocks()


def test_groups_that_cannot_make_up_the_target_are_not_proposed():
    states = Tables(COSTS).observe()
    tight = Space("a" * LAYERS, Aim(3, 1, 1), 2)  # pairs alone leave 6
    proposed = list(propose(tight, states, np.eye(LAYERS)))
    assert all(layer.is_copy for layers in proposed for layer in layers)
    assert len(proposed) == 4 + len(tight.list_blocks())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": [64, 32]}, "every step takes more tokens than the one before it"),
        ({"tokens": [40]}, "whole windows of context 16, not 40"),
        ({"aligned_tokens": 50}, "whole windows of context 16, not 50"),
        ({"heal_tokens": 60}, "whole windows of context 16, not 60"),
        ({"finalists": 1}, "one finalist is compared with nothing; give 2 or more, or 0"),
        ({"tokens": []}, "at least 1 item"),
        ({"budget": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_search_are_refused(given, said):
    with pytest.raises(RecipeError, match=said) as refused:
        method_settings("evolution", SMALL | given)
    assert "\n" not in str(refused.value)


def test_a_target_of_all_layers_spends_nothing():
    repairs = Tables(COSTS)
    plan = search(repairs, Aim(LAYERS))
    assert plan.layers == identity_layers(LAYERS) and plan.search == {} and repairs.asked == []


def test_scores_of_another_model_are_refused():
    with pytest.raises(PlanError, match="scores are of 4 layers, the model has 10"):
        search(Tables(COSTS), similarity=np.eye(4))
