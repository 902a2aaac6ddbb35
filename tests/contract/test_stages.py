"""The same methods through the stages, on disk: plan, merge, quantize, and what is refused on the way."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.evidence import TOKENIZER, every_family, every_method, look, score_and_plan
from support.models import LAYERS, make_tiny_model, save_model

from mka.alignment.aligner import Aligner
from mka.alignment.lockstep import Alignment
from mka.alignment.table import AlignmentTable
from mka.errors import CheckpointError, NumericsError, PlanError, RecipeError
from mka.evidence.needs import HIDDEN_STATES
from mka.evidence.states import HiddenStates
from mka.methods import get_method, resolve_method
from mka.model.checkpoint import open_checkpoint
from mka.model.verification import inspect_checkpoint, require_sound
from mka.pipeline.merge import write_merged
from mka.pipeline.observe import observe_checkpoint
from mka.pipeline.plan import fit_folds, open_planner_oracles, plan_layers
from mka.pipeline.quantize import write_quantized
from mka.pipeline.score import score_layers
from mka.pipeline.target import resolve_aim
from mka.plan.plan import MergedLayer, MergePlan, identity_layers, keep_layers, take_layers
from mka.plan.target import Aim
from mka.recipe import AlignmentSettings, CalibrationSettings, MethodChoice, ModelSource, QuantizeSettings, Target
from mka.terminal import showing
from mka.texts.calibration import CalibrationSet
from mka.texts.rows import digest_texts
from mka.texts.windows import make_copies
from mka.transforms.fold import bind_folds
from mka.transforms.merge import merge_checkpoint


@pytest.fixture(scope="module")
def calibration(texts):
    return CalibrationSet(tuple(texts), ("test",) * len(texts), digest_texts(texts), "texts.jsonl")


@pytest.fixture(scope="module")
def on_disk(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return {family: save_model(models[family], folder / family) for family in ("llama", "gemma3_text")}


LOOKING = CalibrationSettings(samples=40, max_tokens=24, search_tokens=200)


def resolve(name, settings=None):
    return resolve_method(MethodChoice(name=name, settings=settings or {}))


def look_again(planner, checkpoint, calibration, source):
    return open_planner_oracles(planner, checkpoint, calibration, LOOKING, source)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@every_method
def test_stages_plan_what_the_method_plans_and_write_it(
    name, settings, family, on_disk, models, texts, calibration, tmp_path
):
    planner, source = resolve(name, settings), ModelSource(folder=on_disk[family])
    checkpoint = open_checkpoint(on_disk[family])
    aim = Aim(5, 1, 1)
    with showing(False):
        states = None
        if HIDDEN_STATES in planner.needs:
            states = observe_checkpoint(checkpoint, calibration, LOOKING, source)
        scores = score_layers(planner, checkpoint, states)
        with look_again(planner, checkpoint, calibration, source) as oracles:
            plan = plan_layers(planner, aim, checkpoint, scores, source, oracles)
        folds = fit_folds(planner, plan, checkpoint, calibration, LOOKING, source)
        plan = bind_folds(plan, folds)
        if any(layer.selects for layer in plan.layers):
            with pytest.raises(PlanError, match="decided by an alignment; merge this plan with alignment enabled"):
                write_merged(plan, checkpoint, tmp_path / "out", folds)
            assert not list(tmp_path.iterdir())
            fitting = AlignmentSettings(tokens=256, context=16, penalty=1.0)
            facts = write_merged(
                plan, checkpoint, tmp_path / "out", None, AlignmentTable({"test": texts}, fitting), source
            )
        else:
            facts = write_merged(plan, checkpoint, tmp_path / "out", folds)
    assert (folds is None) == (get_method(name).fit is None) == (plan.folds is None)
    assert plan.base == {"model": str(on_disk[family]), "digest": checkpoint.digest, "model_type": family}
    _, expected = score_and_plan(models[family], name, settings, Aim(5, 1, 1), texts)
    assert [layer.sources for layer in plan.layers] == [layer.sources for layer in expected.layers]
    assert facts["layers"] == 5

    with showing(False):
        quantized = write_quantized(
            open_checkpoint(tmp_path / "out"), QuantizeSettings(scheme="int8", group_size=16), tmp_path / "int8"
        )
    assert quantized["parameters"] == facts["parameters"] and quantized["bytes"] < facts["bytes"]


def test_a_plan_is_bound_to_the_checkpoint_it_was_made_for(on_disk, calibration, tmp_path):
    checkpoint = open_checkpoint(on_disk["llama"])
    source, planner = ModelSource(folder=on_disk["llama"]), resolve("reference_code")
    with showing(False):
        plan = plan_layers(planner, Aim(4, 2, 1), checkpoint, None, source, {})
    other = open_checkpoint(save_model(make_tiny_model("llama", seed=1), tmp_path / "other"))
    with pytest.raises(PlanError, match=r"plan was made for digest .* has .*; plan again"):
        merge_checkpoint(plan, other, tmp_path / "out")
    shorter = open_checkpoint(save_model(make_tiny_model("llama", num_hidden_layers=5), tmp_path / "shorter"))
    with pytest.raises(PlanError, match=r"plan is for 6 layers, .* has 5"):
        merge_checkpoint(plan, shorter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_stage_lacks_is_refused_in_one_line(on_disk, models, texts):
    states = look(models["llama"], texts)
    checkpoint, source = open_checkpoint(on_disk["llama"]), ModelSource(folder=on_disk["llama"])
    with pytest.raises(PlanError, match="'mka' needs hidden states of 6 layers, got none"):
        score_layers(resolve("mka"), checkpoint, None)
    shorter = HiddenStates(states.pooled[:-1], states.block_influence[:-1], states.tokens)
    with pytest.raises(PlanError, match="'shortgpt' needs hidden states of 6 layers, got 5 layers"):
        score_layers(resolve("shortgpt"), checkpoint, shorter)
    for settings in ({"weights": "line-search"}, {"selection": "iterative"}):
        with pytest.raises(PlanError, match="needs a calibration set; give one"):
            look_again(resolve("mka", settings), checkpoint, None, source)


@pytest.mark.parametrize(
    ("target", "layers_out"),
    [({"layers": 6}, 6), ({"layer_ratio": 0.5}, 3), ({"size_ratio": 0.29}, 4), ({"size_ratio": 0.3}, 3)],
)
def test_targets_are_resolved_with_the_bytes_on_disk(target, layers_out, on_disk):
    """A layer of the tiny model holds 9,280 of its 61,920 parameters (embedding and head 3,104 each): 14.987 %."""
    aim = resolve_aim(Target(**target, protect_first=1, protect_last=2), open_checkpoint(on_disk["llama"]))
    assert aim == Aim(layers_out, 1, 2)


@pytest.mark.parametrize("target", [{"layers": 0}, {"layers": 7}, {"layers": -3}, {"size_ratio": 0.8}])
def test_targets_out_of_reach_are_refused(target, on_disk):
    with pytest.raises(RecipeError, match="target"):
        resolve_aim(Target(**target), open_checkpoint(on_disk["llama"]))


def test_hidden_states_that_overflow_are_refused_with_the_layer(tmp_path, calibration):
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    checkpoint = open_checkpoint(save_model(model, tmp_path / "m"))
    with (
        pytest.raises(NumericsError, match="hidden states of layer 2 hold NaN or infinity in 40 of 40 texts"),
        showing(False),
    ):
        observe_checkpoint(checkpoint, calibration, LOOKING, ModelSource(folder=tmp_path / "m"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(value, tmp_path):
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[3, 5] = value
    checkpoint = open_checkpoint(save_model(model, tmp_path / "m"))
    plan = MergePlan("test", "", LAYERS, (*keep_layers([0, 1, 2]), MergedLayer((3, 4), (0.5, 0.5))))
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.mlp\.up_proj\.weight: NaN or infinite weights"):
        merge_checkpoint(plan, checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_lost_a_tensor_is_refused_by_the_strangers_look(tmp_path):
    folder = save_model(make_tiny_model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = inspect_checkpoint(folder)
    assert facts["missing_keys"] == 1
    with pytest.raises(CheckpointError, match="1 missing keys after writing; nothing was published"):
        require_sound(facts, folder)


@every_family
def test_aligning_a_plan_that_changes_nothing_leaves_every_tensor_byte_equal(family, models, texts, tmp_path):
    source = open_checkpoint(save_model(models[family], tmp_path / "base"))
    settings = AlignmentSettings(tokens=256, context=16)
    aligner = Aligner(models[family], TOKENIZER, {"a": texts[:30], "b": texts[30:]}, settings)
    plan = MergePlan("test", "", LAYERS, identity_layers(LAYERS))
    with showing(False):
        _, facts = aligner.align(
            plan.layers, lambda tensors: merge_checkpoint(plan, source, tmp_path / "out", aligned=tensors)
        )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert facts["layers"] == [{}] * LAYERS
    assert facts["probes"]["source"] == "b" and set(facts["probes"]["divergence"].values()) == {0.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_aligned_bfloat16_checkpoint_stays_bfloat16(dtype, texts, tmp_path):
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    folder = save_model(model, tmp_path / "base")
    group = take_layers((2, 3), (2,), (2, 3))
    plan = MergePlan("test", "", LAYERS, (*keep_layers([0, 1]), group, *keep_layers([4, 5])))
    settings, source = AlignmentSettings(tokens=256, context=16, penalty=1.0), ModelSource(folder=folder, dtype=dtype)
    with showing(False):
        facts = write_merged(
            plan, open_checkpoint(folder), tmp_path / "out", None, AlignmentTable({"a": texts}, settings), source
        )
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    require_sound(facts, "out")
    state, name = model.state_dict(), "mlp.down_proj.weight"
    for new, old in ((0, 0), (1, 1), (3, 4), (4, 5)):  # refitted from the first change on
        same = torch.equal(after[f"model.layers.{new}.{name}"], state[f"model.layers.{old}.{name}"])
        assert same == (new < 2)
    assert sum(facts["alignment"]["layers"][2]["mlp units"].values()) == 64


@pytest.mark.parametrize(("copies", "count"), [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_a_fit_on_text_and_its_copies_is_the_fit_on_all_those_windows(copies, count, models, texts):
    settings = AlignmentSettings(tokens=256, context=16, penalty=1.0, copies=copies)
    aligner = Aligner(models["llama"], TOKENIZER, {"a": texts[:30], "b": texts[30:]}, settings)
    plan = (*keep_layers([0, 1]), take_layers((2, 3), (2,), (2, 3)), *keep_layers([4, 5]))
    with showing(False):
        made, facts = aligner.align(plan, list)
    assert (facts["copies"], facts["tokens"], sum(facts["windows"].values())) == (count, 256, 16)
    windows = torch.cat(list(aligner.windows.values()))
    windows = torch.cat([windows, make_copies(windows, count)])
    assert len(windows) == 16 + count
    for layer, alone in zip(Alignment(models["llama"], windows).walk(plan, penalty=1.0), made, strict=True):
        assert layer.tensors.keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in layer.tensors.items())
