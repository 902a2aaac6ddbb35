"""What planned models do to calibration text, against transformers' own figures on models built afresh."""

import pytest
import torch
from support.candidates import build_candidate
from support.models import LAYERS, make_texts, make_tiny_model, make_tokenizer

from mka.errors import CalibrationError, NumericsError
from mka.evidence.oracles import Divergence, Loss, OutputSimilarity
from mka.plan.plan import MergedLayer, identity_layers, keep_layers

TOKENIZER = make_tokenizer()
TEXTS = make_texts(7, seed=3)
MERGED = (*identity_layers(2), MergedLayer((2, 3, 4), (-1.0, 1.0, 1.0)), *keep_layers([5]))
# In the order of a search that deletes from the deepest layer up, then on from one of its results, then elsewhere.
ROUND = [
    *(keep_layers([i for i in range(LAYERS) if i != gone]) for gone in (5, 4, 3, 2, 1)),
    *(keep_layers([i for i in range(LAYERS) if i not in (3, gone)]) for gone in (5, 4, 2)),
    MERGED,
    (*MERGED[:3],),
    identity_layers(LAYERS),
    keep_layers([5]),
]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3_text"])
def model(request):
    return make_tiny_model(request.param, seed=3)


def each_text(count):
    for text in TEXTS[:count]:
        yield torch.tensor([TOKENIZER(text)["input_ids"]])


def count_texts(tokens):
    """Texts that are taken whole until there are that many tokens."""
    taken = 0
    for number, ids in enumerate(each_text(len(TEXTS)), 1):
        taken += ids.shape[1]
        if taken >= tokens:
            return number
    return len(TEXTS)


def plain_loss(candidate):
    """transformers' own loss, text by text without padding, weighted by predicted tokens."""
    total, predicted = 0.0, 0
    with torch.inference_mode():
        for ids in each_text(count_texts(60)):
            total += float(candidate(ids, labels=ids).loss) * (ids.shape[1] - 1)
            predicted += ids.shape[1] - 1
    return total / predicted


def plain_similarity(model, candidate):
    cosines = []
    with torch.inference_mode():
        for ids in each_text(count_texts(60)):
            base, other = (m.model(ids).last_hidden_state[0, -1].double() for m in (model, candidate))
            cosines.append(float(torch.cosine_similarity(base, other, dim=0)))
    return sum(cosines) / len(cosines)


def plain_divergence(model, candidate):
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in each_text(count_texts(60)):
            base, other = (torch.log_softmax(m(ids).logits[0].double(), -1) for m in (model, candidate))
            total += float((base.exp() * (base - other)).sum())
            count += ids.shape[1]
    return total / count


@pytest.mark.parametrize("measure", ["loss", "similarity", "divergence"])
def test_a_search_reads_what_models_built_afresh_give(measure, model):
    """The same object all along: what it keeps of one model must not show in the next."""
    oracle = {"loss": Loss, "similarity": OutputSimilarity, "divergence": Divergence}[measure]
    oracle = oracle(model, TOKENIZER, TEXTS, max_tokens=64, tokens=60)
    values = []
    for layers in ROUND:
        candidate = build_candidate(model, layers)
        if measure == "loss":
            expected = plain_loss(candidate)
        else:
            expected = {"similarity": plain_similarity, "divergence": plain_divergence}[measure](model, candidate)
        values.append(oracle(layers))
        assert values[-1] == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert len(set(values)) == len(ROUND)


def test_the_base_resembles_itself_and_a_deletion_does_not(model):
    similarity = OutputSimilarity(model, TOKENIZER, TEXTS, max_tokens=64, tokens=60)
    assert similarity(identity_layers(LAYERS)) == pytest.approx(1.0, abs=1e-9)
    assert similarity(keep_layers([0, 1, 2])) < 0.999


def test_a_search_from_the_deepest_layer_up_runs_each_shared_layer_once():
    model = make_tiny_model("llama")
    loss = Loss(model, TOKENIZER, TEXTS, max_tokens=64, tokens=60)
    runs = []
    kind = type(model.model.layers[0])
    original = kind.forward

    def counted(self, *args, **kwargs):
        runs.append(1)
        return original(self, *args, **kwargs)

    kind.forward = counted
    try:
        counts = []
        for gone in range(LAYERS - 1, -1, -1):
            before = len(runs)
            loss(keep_layers([i for i in range(LAYERS) if i != gone]))
            counts.append(len(runs) - before)
    finally:
        kind.forward = original
    # All but the last layer; then one, two, ... layers behind the one left out.
    assert counts == [5, 1, 2, 3, 4, 5]


def test_a_loss_needs_a_second_token():
    loss = Loss(make_tiny_model("llama"), TOKENIZER, ["w5", "w6"], max_tokens=64, tokens=60)
    with pytest.raises(CalibrationError, match="one token only"):
        loss(identity_layers(LAYERS))


@pytest.mark.parametrize("oracle", [Loss, OutputSimilarity, Divergence])
def test_a_model_that_overflows_is_refused(oracle):
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(NumericsError, match="NaN or infinite; the merge destroyed the model"):
        oracle(model, TOKENIZER, TEXTS, max_tokens=64, tokens=60)(identity_layers(LAYERS))
