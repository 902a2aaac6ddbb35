"""Targets in bytes, keys and values and speed: as layers, worked out by hand from the sizes of a tiny model."""

import pytest
import torch
from support.models import make_tiny_model, save_model

from mka.errors import RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.recipes import validate_recipe
from mka.pipeline.target import WORTH_BITS, expect_gains, foresee_rounded, resolve_aim
from mka.plan.target import Aim
from mka.recipe import QuantizeSettings, Target
from mka.transforms.rtn import quantize_checkpoint

# hidden 64, 4 heads of 16 with 2 of keys and values, 96 in the MLP, 128 words, the head tied; in float32.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 6, "tie_word_embeddings": True}
LINEAR = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
LAYER = LINEAR + 2 * 64
HEAD, NORM = 128 * 64, 64
KEYS_AND_VALUES = 2 * 2 * 16 * 2  # bytes of a layer, in 16 bits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_checkpoint(save_model(make_tiny_model("llama", **SIZES), tmp_path_factory.mktemp("target") / "base"))


def aim(base, rounding=None, **target):
    given = QuantizeSettings(**(rounding or {}))
    return resolve_aim(Target(protect_first=1, protect_last=1, **target), base, given).layers_out


@pytest.mark.parametrize("layers", [5, 3, 2])
def test_bytes_leave_as_many_layers_as_they_hold(base, layers):
    needed = 4 * (layers * LAYER + HEAD + NORM)
    assert base.nbytes == 4 * (6 * LAYER + HEAD + NORM)
    assert aim(base, bytes=needed) == layers
    assert aim(base, bytes=f"{needed / 1000}kB") == layers
    assert aim(base, bytes=needed + 4 * LAYER - 1) == layers


@pytest.mark.parametrize("layers", [5, 2])
def test_keys_and_values_are_counted_in_sixteen_bits(base, layers):
    assert aim(base, cache_bytes_per_token=layers * KEYS_AND_VALUES) == layers
    assert aim(base, cache_bytes_per_token=(layers + 1) * KEYS_AND_VALUES - 1) == layers


def test_speeds_are_those_of_what_is_read_and_multiplied(base):
    decode = (6 * LAYER + HEAD) / (4 * LAYER + HEAD)
    assert aim(base, decode_speed=decode - 1e-9) == 4
    assert aim(base, decode_speed=decode + 1e-9) == 3
    prefill = (6 * LAYER + HEAD / 256) / (4 * LAYER + HEAD / 256)
    assert aim(base, prefill_speed=prefill - 1e-9) == 4
    assert aim(base, prefill_speed=prefill + 1e-9) == 3


def test_every_bound_is_kept(base):
    assert aim(base, cache_bytes_per_token=5 * KEYS_AND_VALUES, bytes=4 * (4 * LAYER + HEAD + NORM)) == 4
    assert aim(base, layer_ratio=0.5, cache_bytes_per_token=3 * KEYS_AND_VALUES) == 3
    with pytest.raises(RecipeError, match=r"cache_bytes_per_token 200 B cannot be reached: with 3 layers it is 384 B"):
        aim(base, layer_ratio=0.5, cache_bytes_per_token=200)


ROUNDED = [
    {"scheme": "int8", "group_size": 32},
    {"scheme": "int4", "group_size": 16},
    {"scheme": "int8", "group_size": 32, "embeddings": "int8"},
    {"scheme": "w8a8"},
]


@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("layers", [6, 4])
def test_rounded_bytes_are_those_that_are_written(rounding, layers, tmp_path):
    model = make_tiny_model("llama", **SIZES | {"num_hidden_layers": layers})
    written, settings = save_model(model, tmp_path / "cut"), QuantizeSettings(**rounding)
    quantize_checkpoint(open_checkpoint(written), tmp_path / "rounded", settings)
    made = open_checkpoint(tmp_path / "rounded")
    base = open_checkpoint(save_model(make_tiny_model("llama", **SIZES), tmp_path / "base"))
    assert foresee_rounded(base, settings, layers) == made.nbytes
    # What is read of it to decode: its layers as they are stored, and the head in 16 bits unless that is rounded, too.
    in_layers = sum(made.layer_nbytes)
    rounded_head = [info.nbytes for name, info in made.tensors.items() if name.startswith("model.embed_tokens.")]
    head = sum(rounded_head) if settings.embeddings != "off" else 2 * HEAD
    served = settings.model_copy(update={"serve_on": "cpu"})
    found = expect_gains(base, served, layers)["decode_speed"]
    # Unrounded norms are counted as stored.
    assert found == pytest.approx(2 * (6 * LAYER + HEAD) / (in_layers + head), rel=0.02)


def test_what_no_named_engine_runs_is_unpacked_and_no_faster(base):
    gains = [expect_gains(base, QuantizeSettings(**one), 4) for one in ({}, {"scheme": "int8", "group_size": 32})]
    assert gains[0] == gains[1]


MIXED = {"scheme": "mixed", "rounding": "gptq", "group_size": 32}


@pytest.mark.parametrize(
    ("rounding", "bits"),
    [
        # Rows of 64 and 96 fill no block of 256, so that 6, 3 and 2 bits go into the next larger type.
        ({"scheme": "int8"}, 8.5),
        ({"scheme": "int7"}, 8.5),
        ({"scheme": "int6"}, 8.5),
        ({"scheme": "int5"}, 5.5),
        ({"scheme": "int4"}, 4.5),
        ({"scheme": "int3"}, 4.5),
        ({"scheme": "int2"}, 4.5),
        ({"scheme": "int4", "embeddings": "int8"}, 4.5),
        # A scale of float32 in groups of 32 is one bit more per weight: half way between 5 bits and 6.
        ({**MIXED, "bits_per_weight": 6.5}, (5.5 + 8.5) / 2),
    ],
)
def test_llama_cpp_reads_what_a_gguf_file_holds(rounding, bits, base):
    settings = QuantizeSettings(**{"group_size": 32} | rounding, serve_on="llama.cpp")
    found = expect_gains(base, settings, 4)["decode_speed"]
    head = HEAD * 8.5 / 8 if settings.embeddings != "off" else 2 * HEAD
    # Norms are float32, and each of a layer's seven matrices has its shape beside it, two integers.
    in_layers = 4 * (LINEAR * bits / 8 + 4 * 128 + 7 * 16)
    assert found == pytest.approx(2 * (6 * LAYER + HEAD) / (in_layers + head), rel=1e-3)


def test_bytes_for_mixed_bits_come_from_bits_first_and_from_layers_where_those_are_worth_more(tmp_path):
    """Scales of bfloat16 in groups of 32 take half a bit: the smallest rounding has two and a half."""
    model = make_tiny_model("llama", **SIZES, dtype=torch.bfloat16)
    base, asked = open_checkpoint(save_model(model, tmp_path / "base")), MIXED | {"bytes": 1}

    def total(layers, bits):  # all else as it is, and two integers for the shape of each of a layer's seven matrices
        return 2 * (128 * layers + HEAD + NORM) + 16 * 7 * layers + bits * layers * LINEAR / 8

    assert aim(base, asked, bytes=total(6, 8.0)) == 6
    assert aim(base, asked, bytes=total(6, WORTH_BITS)) == 6
    assert aim(base, asked, bytes=total(6, WORTH_BITS) - 1) == 5
    assert aim(base, asked, bytes=total(3, WORTH_BITS)) == 3
    # With the fewest layers, and where layers are asked for outright, there may be as few bits as there are.
    assert aim(base, asked, bytes=total(2, 2.5)) == 2
    assert aim(base, asked, layers=6, bytes=total(6, 2.5)) == 6
    with pytest.raises(RecipeError, match=r"target\.bytes 76\.3\d* kB cannot be reached: with 6 layers it is"):
        aim(base, asked, layers=6, bytes=total(6, 2.5) - 1)
    with pytest.raises(RecipeError, match=r"target\.bytes 1 kB cannot be reached: with 2 layers, the fewest"):
        aim(base, asked, bytes=1000)


def test_the_targets_bytes_are_shared_out_as_bits_where_schemes_are_mixed():
    raw = {"name": "one", "model": {"folder": "m"}, "target": {"bytes": "3MB"}, "quantize": MIXED}
    assert validate_recipe(raw).quantize.bytes == 3e6
    own = validate_recipe(raw | {"quantize": MIXED | {"bits_per_weight": 4}}).quantize
    assert (own.bytes, own.bits_per_weight) == (None, 4)
    assert validate_recipe(raw | {"quantize": {"scheme": "int8"}}).quantize.bytes is None
    with pytest.raises(RecipeError, match="or the target's bytes, got none"):
        validate_recipe(raw | {"quantize": MIXED, "target": {"layers": 3}})


def test_what_is_no_size_is_refused_once():
    raw = {"name": "one", "model": {"folder": "m"}, "target": {"bytes": "many"}, "quantize": MIXED}
    with pytest.raises(RecipeError) as caught:
        validate_recipe(raw)
    assert "'target.bytes': must be a size like 90MB" in str(caught.value) and "quantize" not in str(caught.value)


def test_without_bounds_a_target_is_what_it_was(base):
    assert resolve_aim(Target(layers=4), base) == Aim(4, 2, 1)
