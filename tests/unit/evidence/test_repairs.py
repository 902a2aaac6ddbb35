"""What whole configurations lose, before and after a refit, against transformers' own figures on models built anew."""

import copy
from itertools import pairwise

import pytest
import torch
from support.alignments import draw_windows, make_sharp_model
from support.candidates import build_candidate
from support.models import LAYERS, make_texts, make_tiny_model, make_tokenizer

from mka.alignment.lockstep import Alignment
from mka.errors import CalibrationError, NumericsError
from mka.evidence.gather import make_oracles
from mka.evidence.needs import REPAIRS
from mka.evidence.repairs import MeasuredRepairs
from mka.methods import method_settings
from mka.plan.budget import count_run
from mka.plan.plan import MergedLayer, identity_layers, keep_layers
from mka.recipe import CalibrationSettings
from mka.texts.windows import pack_windows

T = 16
MEASURED, FITTED = draw_windows(4, length=T, seed=1), draw_windows(12, length=T, seed=2)
MERGED = (*identity_layers(2), MergedLayer((2, 3), attention=(3,), mlp=(2,)), *keep_layers([5]))
CANDIDATES = {
    "nothing in front": keep_layers([1, 2, 3, 4, 5]),
    "two deleted": keep_layers([0, 1, 4, 5]),
    "the last deleted": keep_layers([0, 1, 2, 3]),
    "halves": MERGED,
    "base": identity_layers(LAYERS),
}
every_candidate = pytest.mark.parametrize("layers", CANDIDATES.values(), ids=CANDIDATES)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    return make_sharp_model(request.param, seed=3)


@pytest.fixture(scope="module")
def repairs(model):
    return MeasuredRepairs(model, MEASURED, FITTED)


@torch.inference_mode()
def plain_divergence(model, candidate, windows):
    base, other = (m(windows, use_cache=False).logits.double().log_softmax(dim=-1) for m in (model, candidate))
    return float((base.exp() * (base - other)).sum(dim=-1).mean())


@every_candidate
@pytest.mark.parametrize("tokens", [T, 3 * T, 4 * T])
def test_divergence_is_that_of_the_model_built_whole(layers, tokens, model, repairs):
    expected = plain_divergence(model, build_candidate(model, layers), MEASURED[: tokens // T])
    assert repairs.divergence(layers, tokens) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@every_candidate
def test_aligned_is_the_divergence_of_what_an_alignment_writes(layers, model, repairs):
    candidate = copy.deepcopy(build_candidate(model, layers))  # of what it shares with the base, too
    for made in Alignment(model, FITTED).walk(layers):
        candidate.model.layers[made.position].load_state_dict(dict(made.tensors), strict=False)
    expected = plain_divergence(model, candidate, MEASURED)
    assert repairs.aligned(layers) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_hidden_states_are_those_of_the_base(model, repairs):
    raw = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))
    with torch.inference_mode():
        hidden = model.model(MEASURED, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    stream = [*hidden[:-1], raw[0]]
    states = repairs.observe()
    assert states.pooled.shape == (LAYERS + 1, 4, 32) and states.tokens.tolist() == [T] * 4
    for found, expected in zip(states.pooled, stream):
        torch.testing.assert_close(torch.tensor(found), expected[:, -1], rtol=1e-4, atol=1e-4)
    turned = [1 - float(torch.cosine_similarity(x, y, dim=-1).double().mean()) for x, y in pairwise(stream)]
    assert states.block_influence.tolist() == pytest.approx(turned, abs=1e-5)


def count_tokens(monkeypatch, act):
    """Tokens that pass a norm in front of attention: once per layer, whoever runs it."""
    passed = []
    real = torch.nn.Module.__call__

    def call(module, *args, **options):
        if getattr(module, "is_counted", False):
            passed.append(args[0].shape[:-1].numel())
        return real(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", call)
    act()
    monkeypatch.undo()
    return sum(passed)


@pytest.mark.parametrize("layers", [keep_layers([0, 1, 4, 5]), MERGED, keep_layers([0, 1, 2, 3])])
def test_a_measurement_runs_the_tokens_it_is_charged_for(layers, monkeypatch):
    model = make_tiny_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm.is_counted = True
    repairs = MeasuredRepairs(model, MEASURED, FITTED)
    assert count_tokens(monkeypatch, repairs.observe) == MEASURED.numel() * LAYERS
    assert count_tokens(monkeypatch, lambda: repairs.divergence(layers, 2 * T)) == count_run(layers, 2 * T)


def test_what_destroys_the_model_is_named(model):
    broken = make_tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[5].mlp.down_proj.weight.fill_(float("inf"))
    repairs = MeasuredRepairs(broken, MEASURED, FITTED)
    with pytest.raises(NumericsError):
        repairs.divergence(keep_layers([0, 1, 2, 3, 5]), T)


def test_windows_are_dealt_without_overlap_and_too_little_text_is_refused():
    model, settings = make_tiny_model("llama"), CalibrationSettings()
    texts = make_texts(40, seed=4)
    given = {"context": 16, "tokens": [16, 32], "aligned_tokens": 48, "finalists": 0}
    options = method_settings("evolution", given)
    made = make_oracles(frozenset({REPAIRS}), options, model, make_tokenizer(), texts, settings)[REPAIRS]
    expected = torch.tensor(pack_windows(make_tokenizer(), texts, 16, 5))
    assert torch.equal(made.measured, expected[:2]) and torch.equal(made.fitted, expected[2:])
    unrepaired = options.model_copy(update={"repair": "none"})
    made = make_oracles(frozenset({REPAIRS}), unrepaired, model, make_tokenizer(), texts, settings)[REPAIRS]
    assert torch.equal(made.measured, expected[:2]) and made.fitted.shape == (0, 16)
    with pytest.raises(CalibrationError, match="windows of 16 tokens in the calibration set, 5 needed") as refused:
        make_oracles(frozenset({REPAIRS}), options, model, make_tokenizer(), texts[:2], settings)
    assert "\n" not in str(refused.value)
