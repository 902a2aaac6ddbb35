"""What is left of a model bounds its speed: worked out by hand from the sizes of its weights."""

import pytest
from support.models import make_byte_tokenizer, make_tiny_model, save_model

from mka.engines.expected import expect_ratios
from mka.export.ggml import ROUNDED
from mka.export.gguf import write_gguf
from mka.model.checkpoint import open_checkpoint
from mka.recipe import QuantizeSettings
from mka.transforms.rtn import quantize_checkpoint

# hidden 64, 4 heads of 16 with 2 of keys and values, 96 in the MLP, 128 words; norms as they are counted.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"intermediate_size": 96, "vocab_size": 128}
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64
HEAD = 128 * 64


@pytest.fixture
def save(tmp_path):
    def make(layers, tied=True):
        model = make_tiny_model("llama", **SIZES, num_hidden_layers=layers, tie_word_embeddings=tied)
        return save_model(model, tmp_path / f"{layers}-{tied}")

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_fewer_layers_allow_their_share_beside_the_head(save, dtype, tied):
    base, small = (open_checkpoint(save(layers, tied)) for layers in (6, 4))
    found = expect_ratios(base, small, dtype, prompt_tokens=32)
    assert found["decode_tokens_per_second"] == pytest.approx((6 * LAYER + HEAD) / (4 * LAYER + HEAD))
    assert found["prefill_tokens_per_second"] == pytest.approx((6 * LAYER + HEAD / 32) / (4 * LAYER + HEAD / 32))


def test_smaller_numbers_allow_faster_decoding_only(save, tmp_path):
    base = open_checkpoint(save(6))
    quantize_checkpoint(base, tmp_path / "int8", QuantizeSettings(scheme="int8", group_size=32))
    found = expect_ratios(base, open_checkpoint(tmp_path / "int8"), "float32", prompt_tokens=32)
    assert found["prefill_tokens_per_second"] == pytest.approx(1)
    # A byte for each of four of the layers' weights; scales, and norms and head as they are, take something off.
    assert 2.5 < found["decode_tokens_per_second"] < 4 * (6 * LAYER + HEAD) / (6 * LAYER + 4 * HEAD)


def test_of_files_what_they_hold_counts(tmp_path):
    """The base has 16 bits per weight, the candidate 4.5 in its layers and its own 32 in the head; norms have 32."""
    model = make_tiny_model("llama", **SIZES | {"vocab_size": 320}, num_hidden_layers=6, tie_word_embeddings=True)
    base = open_checkpoint(save_model(model, tmp_path / "base", tokenizer=make_byte_tokenizer()))
    quantize_checkpoint(base, tmp_path / "int4", QuantizeSettings(scheme="int4", group_size=32))
    candidate = open_checkpoint(tmp_path / "int4")
    files = {"base": write_gguf(base.path, tmp_path, "f16"), "candidate": write_gguf(candidate.path, tmp_path, ROUNDED)}
    found = expect_ratios(base, candidate, "float16", 32, files)
    norms, linear, head = 6 * 2 * 64 * 4, 6 * (LAYER - 2 * 64), 320 * 64
    due = (2 * linear + norms + 2 * head) / (linear * 4.5 / 8 + norms + 4 * head)
    assert found["decode_tokens_per_second"] == pytest.approx(due)
    assert found["prefill_tokens_per_second"] == pytest.approx(1)


def test_the_same_model_is_expected_to_be_as_fast(save):
    base = open_checkpoint(save(6))
    assert expect_ratios(base, base, "float32", 32) == pytest.approx(
        {"prefill_tokens_per_second": 1, "decode_tokens_per_second": 1}
    )
