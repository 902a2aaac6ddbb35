"""Hidden states and layer scores: what they refuse to be, and that files give back what was written."""

import json

import numpy as np
import pytest

from mka.errors import NumericsError
from mka.evidence.states import HiddenStates, LayerScores

LAYERS, TEXTS, WIDTH = 3, 4, 5


def make_states(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "pooled": rng.normal(size=(LAYERS + 1, TEXTS, WIDTH)).astype(np.float32),
        "block_influence": rng.uniform(size=LAYERS),
        "tokens": np.arange(3, 3 + TEXTS),
    }
    return HiddenStates(**fields | changes)


def make_scores(values, kind="pairwise-similarity"):
    return LayerScores(kind, np.asarray(values, dtype=float), "high means alike", "mka", {"neighbours": 5})


def test_layers_are_counted_without_the_embedding():
    states = make_states()
    assert states.layers == LAYERS
    assert np.array_equal(states.outputs, states.pooled[1:])


@pytest.mark.parametrize(
    ("index", "where"), [(0, "of the embedding hold"), (1, "of layer 0 hold"), (LAYERS, f"of layer {LAYERS - 1} hold")]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_layer_that_is_not_finite_is_named(index, where, value):
    pooled = make_states().pooled.copy()
    pooled[index:, 1:3, 2] = value
    with pytest.raises(NumericsError) as caught:
        make_states(pooled=pooled)
    assert where in str(caught.value)
    assert f"NaN or infinity in 2 of {TEXTS} texts" in str(caught.value)
    assert "dtype: float32" in str(caught.value)


def test_hidden_states_of_single_tokens_are_refused_as_unpooled():
    with pytest.raises(NumericsError, match=r"shape \(4, 4, 7, 5\), expected \(L\+1, N, D\)"):
        make_states(pooled=np.zeros((4, 4, 7, 5), dtype=np.float32))


def test_hidden_states_survive_the_disk(tmp_path):
    states = make_states()
    states.save(tmp_path / "states.safetensors")
    loaded = HiddenStates.load(tmp_path / "states.safetensors")
    for name in ("pooled", "block_influence", "tokens"):
        before, after = getattr(states, name), getattr(loaded, name)
        assert np.array_equal(before, after) and before.dtype == after.dtype
    assert loaded.digest == states.digest


def test_a_view_is_saved_as_what_it_shows(tmp_path):
    wide = np.arange(2.0 * (LAYERS + 1) * TEXTS * WIDTH, dtype=np.float32).reshape(LAYERS + 1, WIDTH, 2 * TEXTS)
    states = make_states(pooled=wide.transpose(0, 2, 1)[:, ::2])
    states.save(tmp_path / "states.safetensors")
    assert np.array_equal(HiddenStates.load(tmp_path / "states.safetensors").pooled, states.pooled)


@pytest.mark.parametrize("name", ["pooled", "block_influence", "tokens"])
def test_the_digest_follows_every_number(name):
    states = make_states()
    changed = getattr(states, name).copy()
    changed[-1] += 1
    assert make_states(**{name: changed}).digest != states.digest == make_states().digest


@pytest.mark.parametrize("content", [None, b"garbage", b""])
def test_a_file_that_holds_no_hidden_states_is_refused(tmp_path, content):
    path = tmp_path / "states.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NumericsError, match=r"hidden states .*states\.safetensors cannot be read"):
        HiddenStates.load(path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(NumericsError, match="cannot be read"):
        HiddenStates.load(tmp_path / "other.safetensors")


def test_nan_on_disk_is_named_when_read_back(tmp_path):
    from safetensors.numpy import save_file

    states = make_states()
    pooled = states.pooled.copy()
    pooled[2, 0, 0] = np.nan
    save_file({"pooled": pooled, "block_influence": states.block_influence, "tokens": states.tokens}, tmp_path / "s")
    with pytest.raises(NumericsError, match="of layer 1 hold"):
        HiddenStates.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("pairwise-similarity", (3,)),
        ("pairwise-similarity", (3, 4)),
        ("pairwise-similarity", (2, 2, 2)),
        ("block-distance", (3, 4)),
        ("layer-importance", (3, 3)),
        ("layer-importance", ()),
    ],
)
def test_scores_of_the_wrong_shape_are_refused(kind, shape):
    with pytest.raises(NumericsError) as caught:
        make_scores(np.zeros(shape), kind)
    assert f"{kind} scores have shape {shape}" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_counted(value):
    values = np.eye(3)
    values[0, 1] = values[1, 0] = value
    with pytest.raises(NumericsError, match="mka: 2 scores are NaN or infinite"):
        make_scores(values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [("pairwise-similarity", [[1.0, 0.1 + 0.2], [0.3, 1.0]]), ("layer-importance", [1 / 3, 1e-300, -0.0])],
)
def test_scores_survive_the_disk_to_the_last_bit(tmp_path, kind, values):
    scores = make_scores(values, kind)
    scores.save(tmp_path / "scores.json")
    loaded = LayerScores.load(tmp_path / "scores.json")
    assert np.array_equal(loaded.values, scores.values)
    assert (loaded.kind, loaded.meaning, loaded.method) == (kind, scores.meaning, "mka")
    assert loaded.settings == {"neighbours": 5}
    assert json.loads((tmp_path / "scores.json").read_text())["format"] == "mka-scores/1"
    assert loaded.layers == len(values)


GOOD = {"format": "mka-scores/1", "kind": "layer-importance", "method": "m", "meaning": "", "settings": {}}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "3",
        json.dumps(GOOD),
        json.dumps(GOOD | {"values": "words"}),
        json.dumps(GOOD | {"values": [[1], [1, 2]]}),
        json.dumps(GOOD | {"values": [1], "kind": "guesses"}),
        json.dumps(GOOD | {"values": [1], "format": "mka-scores/9"}),
        json.dumps({"values": [1]}),
    ],
)
def test_a_file_that_holds_no_scores_is_refused(tmp_path, content):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NumericsError) as caught:
        LayerScores.load(path)
    assert f"scores {path} cannot be read" in str(caught.value)


def test_nan_in_a_scores_file_is_refused(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(GOOD | {"values": [1, float("nan")]}))
    with pytest.raises(NumericsError, match="values must be finite numbers, got nan"):
        LayerScores.load(tmp_path / "scores.json")
