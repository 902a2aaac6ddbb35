"""What finalists lose after a short healing, against models that transformers builds of what the healing made."""

import copy

import pytest
import torch
from support.alignments import assemble, diverge, draw_windows, make_sharp_model, run_walk
from support.candidates import build_candidate
from support.models import LAYERS, make_texts, make_tokenizer, save_model

from mka.errors import CalibrationError, NumericsError
from mka.evidence.gather import make_oracles, open_oracles
from mka.evidence.needs import REPAIRS
from mka.evidence.repairs import Healing, MeasuredRepairs
from mka.healing import distil as distilling
from mka.methods import method_settings
from mka.model.checkpoint import open_checkpoint
from mka.plan.budget import count_healing
from mka.plan.plan import MergedLayer, identity_layers, keep_layers
from mka.recipe import CalibrationSettings, ModelSource
from mka.texts.windows import pack_windows

T = 16
MEASURED, FITTED = draw_windows(4, length=T, seed=1), draw_windows(12, length=T, seed=2)
# Random tokens teach nothing of other random tokens, so what is measured is trained on as well.
TRAINED = torch.cat([draw_windows(2, length=T, seed=3), MEASURED.repeat(5, 1)])
NONE = FITTED[:0]
HALVES = (*identity_layers(2), MergedLayer((2, 3), attention=(3,), mlp=(2,)), *keep_layers([4, 5]))
CANDIDATES = {
    "two deleted": keep_layers([0, 1, 4, 5]),
    "the last deleted": keep_layers([0, 1, 2, 3]),
    "halves": HALVES,
}
every_candidate = pytest.mark.parametrize("layers", CANDIDATES.values(), ids=CANDIDATES)
every_repair = pytest.mark.parametrize("fitted", [FITTED, NONE], ids=["aligned", "none"])


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    return make_sharp_model(request.param, seed=3)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    return open_checkpoint(save_model(model, folder))


def make_repairs(model, base, fitted, scratch):
    source = ModelSource(folder=base.path)
    return MeasuredRepairs(model, MEASURED, fitted, Healing(TRAINED, base, source, scratch))


def build_start(model, layers, fitted):
    """What is healed, built by transformers."""
    return (
        assemble(model, layers, run_walk(model, fitted, layers)[1]) if len(fitted) else build_candidate(model, layers)
    )


@every_candidate
@every_repair
def test_healed_is_the_divergence_of_what_the_healing_made(layers, fitted, model, base, tmp_path, monkeypatch):
    made, read = [], []
    real = distilling.distil

    def watch(teacher, student, windows, *rest, **options):
        read.append(windows)
        made.append(real(teacher, student, windows, *rest, **options))
        return made[0]

    monkeypatch.setattr(distilling, "distil", watch)
    monkeypatch.setitem(distilling.RATES, "all", 1e-3)
    found = make_repairs(model, base, fitted, tmp_path).healed(layers)
    assert torch.equal(read[0].train, TRAINED) and torch.equal(read[0].heldout, MEASURED)
    healed = copy.deepcopy(build_start(model, layers, fitted))  # of what it shares with the base, too
    before = diverge(model, healed, MEASURED)
    assert made[0].facts["start"] == pytest.approx(before, rel=2e-3)
    assert made[0].facts["steps"] == len(TRAINED) and made[0].tensors
    healed.load_state_dict(dict(made[0].tensors), strict=False)
    assert found == pytest.approx(diverge(model, healed.eval(), MEASURED), rel=2e-3)
    assert found < 0.97 * before
    assert not list(tmp_path.iterdir())  # neither the candidate nor checkpoints are left


def test_a_healing_runs_the_tokens_it_is_charged_for(model, base, tmp_path, monkeypatch):
    layers = CANDIDATES["two deleted"]
    passed = {"walk": 0, "forwards": 0, "with gradient": 0}
    real, load = torch.nn.Module.__call__, distilling.load_model

    def mark(model, role):
        for layer in model.model.layers:
            layer.input_layernorm.counted_as = role

    def load_marked(*given):
        loaded = load(*given)
        mark(loaded[0], "forwards")
        return loaded

    def call(module, *args, **options):
        if role := module.__dict__.get("counted_as"):
            if role == "forwards" and torch.is_grad_enabled():
                role = "with gradient"
            passed[role] += args[0].shape[:-1].numel()
        return real(module, *args, **options)

    mark(model, "walk")
    monkeypatch.setattr(distilling, "load_model", load_marked)
    monkeypatch.setattr(torch.nn.Module, "__call__", call)
    make_repairs(model, base, NONE, tmp_path).healed(layers)
    counted = passed["forwards"] + 3 * passed["with gradient"]
    assert passed["walk"] == 0
    assert counted == count_healing(layers, LAYERS, TRAINED.numel(), MEASURED.numel())


def test_what_is_begun_is_tidied_up_after(model, base, tmp_path, monkeypatch):
    def fail(*given, **options):
        raise NumericsError("healing diverged")

    monkeypatch.setattr(distilling, "run_trainer", fail)
    with pytest.raises(NumericsError):
        make_repairs(model, base, FITTED, tmp_path).healed(CANDIDATES["halves"])
    assert not list(tmp_path.iterdir())


def test_windows_that_heal_neither_fit_nor_measure(model, base):
    texts, settings, source = make_texts(40, seed=4), CalibrationSettings(), ModelSource(folder=base.path)
    given = {"context": 16, "tokens": [16, 32], "aligned_tokens": 48, "heal_tokens": 64}
    expected = torch.tensor(pack_windows(make_tokenizer(), texts, 16, 9))
    options = method_settings("evolution", given)
    with open_oracles(frozenset({REPAIRS}), options, base, texts, settings, source) as made:
        repairs = made[REPAIRS]
        parts = [repairs.measured, repairs.fitted, repairs.healing.windows]
        assert [len(part) for part in parts] == [2, 3, 4] and torch.equal(torch.cat(parts), expected)
        assert repairs.healing.base is base and repairs.healing.scratch is None
    unrepaired = options.model_copy(update={"repair": "none"})
    with open_oracles(frozenset({REPAIRS}), unrepaired, base, texts, settings, source) as made:
        assert torch.equal(made[REPAIRS].healing.windows, expected[2:6])
    alone = options.model_copy(update={"finalists": 0})
    assert make_oracles(frozenset({REPAIRS}), alone, model, make_tokenizer(), texts, settings)[REPAIRS].healing is None
    few = (options, model, make_tokenizer(), texts[:8], settings, (base, source, None))
    with pytest.raises(CalibrationError, match="windows of 16 tokens in the calibration set, 9 needed") as refused:
        make_oracles(frozenset({REPAIRS}), *few)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("lower the method's tokens, aligned_tokens, heal_tokens or context")
