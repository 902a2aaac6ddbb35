"""Distillation: what it trains, what it measures, what it keeps, and that a killed one goes on."""

import json
from dataclasses import replace

import pytest
import torch
from support.models import make_texts, make_tiny_model, save_model
from transformers import AutoModelForCausalLM, TrainerCallback

from mka.errors import CalibrationError, CheckpointError, NumericsError, OutputError, RecipeError
from mka.healing import distil as distilling
from mka.healing import training
from mka.healing.distil import choose_trained, distil, find_first_trained, list_rates, read_tried
from mka.healing.student import Student, check_student, count_shared
from mka.healing.table import HealingTable, cut_healing
from mka.healing.training import find_last
from mka.model.checkpoint import open_checkpoint
from mka.plan.plan import MergePlan, keep_layers
from mka.recipe import HealFit, ModelSource
from mka.transforms.merge import merge_checkpoint
from mka.transforms.rewrite import replace_tensors

SOURCE = ModelSource(folder="base")
SETTINGS = HealFit(tokens=1024, context=16, batch=4, heldout_tokens=256, rate=3e-3)
TEXTS = {"one": make_texts(120, seed=1), "two": make_texts(60, seed=2)}


def table(**changes):
    return HealingTable(TEXTS, SETTINGS.model_copy(update=changes))


def make_pair(folder, family="llama", kept=(0, 1, 3, 4, 5), **overrides):
    base = open_checkpoint(save_model(make_tiny_model(family, **overrides), folder / "base"))
    plan = MergePlan("test", "", base.layers, keep_layers(kept))
    merge_checkpoint(plan, base, folder / "student")
    return base, open_checkpoint(folder / "student")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def heal(base, student, scratch, **changes):
    given = table(**changes)
    check_student(base, student)
    shared = count_shared(base, student)
    return distil(base, student, cut_healing(given, base), given.settings, SOURCE, scratch, shared=shared)


def divergence(base, student, windows):
    """KL(base || student) by the stock models alone."""
    models = [AutoModelForCausalLM.from_pretrained(c.path, dtype=torch.float32).eval() for c in (base, student)]
    with torch.no_grad():
        p, q = (torch.log_softmax(model(windows).logits.double(), -1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "smollm3"])
@pytest.mark.parametrize("kept", [(0, 1, 4, 5), (2, 3, 4, 5), (0, 1, 2, 3)])
def test_the_loss_is_the_divergence_of_the_stock_models(tmp_path, family, kept):
    base, student = make_pair(tmp_path, family, kept)
    windows = cut_healing(table(), base)
    shared = count_shared(base, student)
    assert shared == next(i for i in range(5) if i == 4 or kept[i] != i)
    assert find_first_trained(4, "changed", shared) == min(shared, 1)
    assert find_first_trained(4, "all", shared) == 0
    models = [AutoModelForCausalLM.from_pretrained(c.path, dtype=torch.float32).eval() for c in (base, student)]
    trained, _ = choose_trained(models[1], "all", shared)
    module = Student(*models, shared, trained, positions=1.0, length=16)
    with torch.no_grad():
        measured = module(windows.heldout)["loss"].item()
    assert measured == pytest.approx(divergence(base, student, windows.heldout), rel=1e-4)
    # Where a gradient is wanted all positions are compared, too.
    assert module(windows.heldout)["loss"].item() == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("batch", [5, 24])
def test_every_heldout_window_measures_whatever_the_windows_per_step(pair, tmp_path, batch):
    """There are 16: not a multiple of 5, and fewer than 24."""
    base, student = pair
    made = heal(base, student, tmp_path, batch=batch)
    windows = cut_healing(table(), base)
    assert len(windows.heldout) == 16
    assert made.facts["start"] == pytest.approx(divergence(base, student, windows.heldout), rel=1e-4)
    assert made.facts["steps"] == 64 // batch


def test_healing_brings_the_student_nearer_on_text_it_was_not_trained_on(pair, tmp_path):
    base, student = pair
    made = heal(base, student, tmp_path / "scratch")
    windows = cut_healing(table(), base)
    assert made.facts["start"] == pytest.approx(divergence(base, student, windows.heldout), rel=1e-4)
    replace_tensors(student, made.tensors, tmp_path / "healed")
    after = divergence(base, open_checkpoint(tmp_path / "healed"), windows.heldout)
    assert made.facts["best"] == pytest.approx(after, rel=1e-4)
    assert after < 0.9 * made.facts["start"]
    assert made.facts["kept"] == "best" and made.facts["tokens"] == 1024
    assert min(p["heldout"] for p in made.facts["curve"] if "heldout" in p) == made.facts["best"]


def test_measured_at_the_end_alone_it_writes_no_checkpoint(pair, tmp_path):
    base, student = pair
    given = table(tokens=512)
    windows, shared = cut_healing(given, base), count_shared(base, student)
    options = {"shared": shared, "measurements": 1}
    made = distil(base, student, windows, given.settings, SOURCE, tmp_path / "scratch", **options)
    assert [point["step"] for point in made.facts["curve"] if "heldout" in point] == [0, 8]
    assert not list(tmp_path.rglob("*.safetensors"))
    replace_tensors(student, made.tensors, tmp_path / "healed")
    after = divergence(base, open_checkpoint(tmp_path / "healed"), windows.heldout)
    assert made.facts["best"] == pytest.approx(after, rel=1e-4) and after < made.facts["start"]


def test_only_what_comes_after_the_first_change_is_trained(pair, tmp_path):
    base, student = pair
    made = heal(base, student, tmp_path / "scratch")
    names = {name.split(".")[2] for name in made.tensors if ".layers." in name}
    assert names == {"2", "3", "4"} and "model.norm.weight" in made.tensors
    assert not any("embed" in name or "lm_head" in name for name in made.tensors)


def test_all_layers_are_trained_where_that_is_asked_for(pair, tmp_path):
    base, student = pair
    made = heal(base, student, tmp_path / "scratch", train="all", rate=1e-3)
    names = {name.split(".")[2] for name in made.tensors if ".layers." in name}
    assert names == {"0", "1", "2", "3", "4"} and "model.norm.weight" in made.tensors
    assert not any("embed" in name or "lm_head" in name for name in made.tensors)
    replace_tensors(student, made.tensors, tmp_path / "healed")
    after = divergence(base, open_checkpoint(tmp_path / "healed"), cut_healing(table(), base).heldout)
    assert made.facts["best"] == pytest.approx(after, rel=1e-4) and after < 0.95 * made.facts["start"]


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_last_leaves_a_tied_head(tmp_path, tied):
    base, student = make_pair(tmp_path, kept=(0, 1, 4, 5), tie_word_embeddings=tied)
    made = heal(base, student, tmp_path / "scratch", train="head-and-last")
    assert {name.split(".")[2] for name in made.tensors if ".layers." in name} == {"1", "2", "3"}
    assert ("lm_head.weight" in made.tensors) is not tied


def test_low_rank_additions_are_folded_and_of_low_rank(pair, tmp_path):
    base, student = pair
    made = heal(base, student, tmp_path / "scratch", train="lora", tokens=512)
    assert made.tensors.keys() <= student.tensors.keys()
    with student.reader() as read:
        name = "model.layers.3.mlp.up_proj.weight"
        change = made.tensors[name] - read(name)
    assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= distilling.RANK
    with student.reader() as read:
        assert torch.equal(made.tensors["model.norm.weight"], read("model.norm.weight"))


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_from_its_last_checkpoint(pair, tmp_path, monkeypatch):
    base, student = pair
    whole = heal(base, student, tmp_path / "whole")
    steps = []

    class Kill(TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)
            if state.global_step == self.at:
                raise Killed

    class Watch(training._Watch):
        at = 11

        def on_step_end(self, args, state, control, **options):
            Kill(self.at).on_step_end(args, state, control)
            super().on_step_end(args, state, control, **options)

    monkeypatch.setattr(training, "_Watch", Watch)
    with pytest.raises(Killed):
        heal(base, student, tmp_path / "killed")
    # Killed once more in the middle of a checkpoint.
    (tmp_path / "killed" / "checkpoint-12").mkdir()
    assert find_last(tmp_path / "killed").name == "checkpoint-10"
    assert steps == list(range(1, 12))
    Watch.at = -1
    again = heal(base, student, tmp_path / "killed")
    assert steps[11:] == list(range(11, 17))
    assert [(p["step"], p.get("heldout")) for p in again.facts["curve"]] == [
        (p["step"], p.get("heldout")) for p in whole.facts["curve"]
    ]
    for name, value in whole.tensors.items():
        assert torch.equal(value, again.tensors[name]), name


def test_the_same_seed_gives_the_same_weights(pair, tmp_path):
    base, student = pair
    first, second = (heal(base, student, tmp_path / name, positions=0.5, tokens=512) for name in "ab")
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def test_a_rate_that_diverges_is_one_line(pair, tmp_path):
    base, student = pair
    with pytest.raises(NumericsError, match=r"diverged at step \d+ of 16: peak rate 10000.*lower heal\.rate"):
        heal(base, student, tmp_path / "scratch", rate=1e4)


def test_rates_are_the_usual_one_and_two_lower_or_the_recipes_alone():
    assert list_rates(HealFit()) == [3e-4, 1e-4, 3e-5]
    assert list_rates(HealFit(train="lora")) == [1e-3, 3e-4, 1e-4]
    assert list_rates(HealFit(rate=0.5)) == [0.5]


def test_where_the_first_measurement_is_worse_it_begins_again_with_a_lower_rate(pair, tmp_path, monkeypatch):
    base, student = pair
    monkeypatch.setitem(distilling.RATES, "changed", 0.03)
    made = heal(base, student, tmp_path / "scratch", rate=None)
    (given_up,) = made.facts["tried"]
    assert given_up["rate"] == 0.03 and given_up["heldout"] > made.facts["start"]
    assert given_up["tokens"] == 2 * 64  # two steps, to the first measurement
    # What it then is owes nothing to the rate before.
    asked = heal(base, student, tmp_path / "asked", rate=0.01)
    assert asked.facts["kept"] == "best" and asked.facts["tried"] == []
    assert {**made.facts, "tried": [], "seconds": 0} == {**asked.facts, "seconds": 0}
    assert all(torch.equal(value, made.tensors[name]) for name, value in asked.tensors.items())
    # A rate that was asked for is held, however bad.
    held = heal(base, student, tmp_path / "held", rate=0.03)
    assert held.facts["rate"] == 0.03 and held.facts["tokens"] > given_up["tokens"]
    assert held.facts["curve"][:2] == [point for point in held.facts["curve"] if point["tokens"] <= 64]


def test_killed_after_it_gave_up_a_rate_it_does_not_try_it_again(pair, tmp_path, monkeypatch):
    base, student = pair
    monkeypatch.setitem(distilling.RATES, "changed", 0.03)
    whole = heal(base, student, tmp_path / "whole", rate=None)
    steps, at = [], [2 + 7]

    class Watch(training._Watch):
        def on_step_end(self, args, state, control, **options):
            steps.append(state.global_step)
            if len(steps) == at[0]:
                raise Killed
            super().on_step_end(args, state, control, **options)

    monkeypatch.setattr(training, "_Watch", Watch)
    with pytest.raises(Killed):
        heal(base, student, tmp_path / "killed", rate=None)
    assert [tried["rate"] for tried in read_tried(tmp_path / "killed")] == [0.03]
    assert find_last(tmp_path / "killed").name == "checkpoint-6"
    again = heal(base, student, tmp_path / "killed", rate=None)
    assert steps == [1, 2, *range(1, 8), *range(7, whole.facts["steps"] + 1)]
    assert all(torch.equal(value, again.tensors[name]) for name, value in whole.tensors.items())
    assert [tried["rate"] for tried in again.facts["tried"]] == [0.03]


def test_where_every_rate_diverges_the_last_is_named(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(distilling.RATES, "changed", 1e5)
    with pytest.raises(NumericsError, match=r"diverged at step \d+ of 16: peak rate 10000.*lower heal\.rate"):
        heal(*pair, tmp_path / "scratch", rate=None)


def test_without_gain_the_start_is_kept(pair, tmp_path):
    base, student = pair
    made = heal(base, student, tmp_path / "scratch", rate=1e-12, patience=2)
    assert made.facts["kept"] == "start" or made.facts["best"] <= made.facts["start"]


def test_the_base_itself_is_refused(pair, tmp_path):
    base, _ = pair
    with pytest.raises(CheckpointError, match="equals its base"):
        heal(base, base, tmp_path / "scratch")


def test_another_base_is_refused(pair, tmp_path):
    base, student = pair
    other = open_checkpoint(save_model(make_tiny_model("llama", hidden_size=64), tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"hidden_size 32 and the base .* 64"):
        heal(other, student, tmp_path / "scratch")
    with pytest.raises(CheckpointError, match="the other way round"):
        heal(student, base, tmp_path / "scratch")


def test_too_little_text_is_refused(pair):
    base, _ = pair
    with pytest.raises(CalibrationError, match=r"heal\.tokens asks for 1,000,000"):
        cut_healing(table(tokens=1_000_000), base)
    with pytest.raises(RecipeError, match="'one' is all there is"):
        cut_healing(HealingTable({"one": TEXTS["one"]}, SETTINGS), base)
    with pytest.raises(RecipeError, match=r"'onr' is not in the table.*one, two"):
        cut_healing(table(heldout_source="onr"), base)
    with pytest.raises(CalibrationError, match="makes 0 windows of 16 tokens"):
        cut_healing(HealingTable({"one": TEXTS["one"], "two": ["w3 w4"]}, SETTINGS), base)


def test_windows_are_cut_from_the_end_of_each_source(pair):
    base, _ = pair
    cut = cut_healing(table(), base)
    assert cut.source == "two" and cut.train.shape == (64, 16)
    last = [int(word[1:]) for word in TEXTS["one"][-1].split()]
    assert cut.train[0, : len(last)].tolist()[:10] == last[:10]


def test_checkpoints_hold_only_what_is_trained(pair, tmp_path):
    from safetensors import safe_open

    base, student = pair
    heal(base, student, tmp_path / "scratch", tokens=512)
    last = find_last(tmp_path / "scratch")
    with safe_open(last / "model.safetensors", framework="pt") as file:
        assert {key.split(".")[1] for key in file.keys()}  # noqa: SIM118 == {"layer_2", "layer_3", "layer_4", "norm"}
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] in (7, 8)


def test_fewer_windows_than_a_step_takes_are_one_step_that_trains(pair, tmp_path):
    base, student = pair
    made = heal(base, student, tmp_path / "scratch", tokens=512, batch=64)
    assert made.facts["steps"] == 1 and made.facts["tokens"] == 512
    assert made.facts["curve"][-1]["rate"] == SETTINGS.rate
    assert made.facts["curve"][-1]["heldout"] != made.facts["start"]


def kill_when_done(monkeypatch):
    """Have the process killed when the training is over and nothing of it is returned yet."""

    class Killing(training.Trainer):
        def train(self, *args, **options):
            super().train(*args, **options)
            raise Killed

    monkeypatch.setattr(training, "Trainer", Killing)


@pytest.mark.parametrize("changes", [{}, {"rate": 0.01, "patience": 1}])
def test_killed_after_its_end_it_ends_alike(pair, tmp_path, monkeypatch, changes):
    base, student = pair
    whole = heal(base, student, tmp_path / "whole", **changes)
    assert whole.facts["kept"] == "best" and (whole.facts["steps"] < 16) is bool(changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_when_done(patch)
        heal(base, student, tmp_path / "killed", **changes)
    again = heal(base, student, tmp_path / "killed", **changes)
    assert {**again.facts, "seconds": 0} == {**whole.facts, "seconds": 0}
    for name, value in whole.tensors.items():
        assert torch.equal(value, again.tensors[name]), name


def test_the_patience_that_was_used_up_is_remembered(pair, tmp_path, monkeypatch):
    base, student = pair
    changes = {"rate": 0.02, "patience": 3}
    whole = heal(base, student, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):

        class Watch(training._Watch):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == whole.facts["steps"] - 1:
                    raise Killed

        patch.setattr(training, "_Watch", Watch)
        heal(base, student, tmp_path / "killed", **changes)
    again = heal(base, student, tmp_path / "killed", **changes)
    assert whole.facts["steps"] < 16
    assert {**again.facts, "seconds": 0} == {**whole.facts, "seconds": 0}


def test_what_diverged_before_it_was_killed_is_refused_again(pair, tmp_path, monkeypatch):
    base, student = pair
    # The only measurement is at the last step, so that nothing is left to train on.
    changes = {"rate": 10.0, "tokens": 512, "batch": 16}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_when_done(patch)
        heal(base, student, tmp_path / "scratch", **changes)
    with pytest.raises(NumericsError, match="diverged at step 2 of 2"):
        heal(base, student, tmp_path / "scratch", **changes)
    assert not (tmp_path / "scratch").exists()


def test_a_checkpoint_whose_state_was_cut_off_is_not_whole(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find_last(tmp_path).name == "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_low_rank_additions_hang_on_the_seed_and_on_nothing_before(pair, tmp_path):
    base, student = pair
    first = heal(base, student, tmp_path / "a", train="lora", tokens=512)
    torch.manual_seed(99)
    second = heal(base, student, tmp_path / "b", train="lora", tokens=512)
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


@pytest.mark.parametrize("count", [2, 5])
def test_every_window_held_out_is_measured_however_many_a_step_takes(pair, tmp_path, count):
    base, student = pair
    texts = {"one": TEXTS["one"], "two": ["w3 w4 w5 w6 w7 w8 w9 w10"] * 2 * count}
    given = HealingTable(texts, SETTINGS.model_copy(update={"tokens": 512, "heldout_source": "two"}))
    windows = cut_healing(given, base)
    torch.manual_seed(0)
    # Windows that are unlike one another, so that a mean over some of them is another.
    windows = replace(windows, heldout=torch.randint(3, 97, (count, 16)))
    made = distil(base, student, windows, given.settings, SOURCE, tmp_path / "scratch", shared=2)
    assert made.facts["start"] == pytest.approx(divergence(base, student, windows.heldout), rel=1e-4)


def test_a_disk_that_is_full_is_one_line(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 194176 vs 194064")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"checkpoint in .*scratch cannot be written; is the disk full\?"):
        heal(*pair, tmp_path / "scratch", tokens=512)
