"""Calibrated rounding as a transform: what stock loading gets back, what is refused, what is left behind."""

import pytest
import torch
from support.models import FAMILY_NAMES, make_byte_tokenizer, make_texts, make_tiny_model, save_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mka.alignment.rounding import Rounding
from mka.errors import CalibrationError, CheckpointError, RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.quantize import check_quantizer, describe_rounding, key_rounding, write_quantized
from mka.recipe import ModelSource, QuantizeSettings
from mka.texts.calibration import CalibrationSet
from mka.transforms import BASE, CALIBRATION, get_transform
from mka.transforms.rtn import quantize_checkpoint


def settings(scheme="int4", rounding="gptq", **more):
    return QuantizeSettings(scheme=scheme, rounding=rounding, group_size=16, tokens=2048, **more)


def evidence(count=120, low=5, high=24):
    texts = tuple(make_texts(count, low=low, high=high))
    return {
        BASE: (None, ModelSource(folder="unused", dtype="float32")),
        CALIBRATION: (CalibrationSet(texts, ("x",) * count, "d", "texts"), None),
    }


def load_weights(folder):
    """Linear weights of the layers as a stranger has them after a forward pass."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        model.eval()(torch.arange(3, 15)[None], use_cache=False)
    modules = model.model.layers.named_modules()
    return {name: module.weight.detach() for name, module in modules if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int3", "int2", "w8a8"])
def test_stock_loading_gets_back_what_the_walk_rounded_to(scheme, rounding, tmp_path, monkeypatch):
    folder, walked = save_model(make_tiny_model("llama"), tmp_path / "base"), []
    walk = Rounding.round_layers

    def note(self, on_layer=None):
        for made in walk(self, on_layer):
            walked.append({name: weight.clone() for name, (weight, _) in made.items()})
            yield made

    monkeypatch.setattr(Rounding, "round_layers", note)
    asked = settings(scheme, rounding)
    facts = write_quantized(open_checkpoint(folder), asked, tmp_path / "out", evidence())
    assert facts["generation_mismatches"] == 0
    after = load_weights(tmp_path / "out")
    assert len(after) == sum(map(len, walked))
    for index, made in enumerate(walked):
        for name, weight in made.items():
            assert_close(after[f"{index}.{name}"], weight, atol=1e-6, rtol=1e-5)
    # Size and keys are those of rounding to the nearest.
    quantize_checkpoint(open_checkpoint(folder), tmp_path / "nearest", asked.model_copy(update={"rounding": "nearest"}))
    specs = [
        {name: (info.dtype, info.shape) for name, info in open_checkpoint(tmp_path / at).tensors.items()}
        for at in ("out", "nearest")
    ]
    assert specs[0] == specs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "nearest", "out"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family(family, tmp_path):
    model = make_tiny_model(family, vocab_size=320)
    folder = save_model(model, tmp_path / "base", tokenizer=make_byte_tokenizer())
    facts = write_quantized(open_checkpoint(folder), settings(embeddings="off"), tmp_path / "out", evidence())
    assert facts["generation_mismatches"] == 0


def test_half_precision_keeps_scales_that_its_loader_reads(tmp_path):
    folder = save_model(make_tiny_model("llama", dtype=torch.bfloat16), tmp_path / "base")
    write_quantized(open_checkpoint(folder), settings(), tmp_path / "out", evidence())
    kept = open_checkpoint(tmp_path / "out").tensors
    assert {info.dtype for name, info in kept.items() if name.endswith("scale")} == {"BF16"}


@pytest.mark.parametrize("shards", [20_000, 5_000_000_000])
def test_shards_and_progress(shards, tmp_path):
    source, ticks = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base")), []
    gptq, options = get_transform("gptq"), {"on_tensor": ticks.append, "max_shard_bytes": shards}
    gptq.apply(source, settings(), evidence(), tmp_path / "out", **options)
    assert sum(ticks) == gptq.foresee(source, settings()) == open_checkpoint(tmp_path / "out").nbytes


def test_refusals(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    with pytest.raises(RecipeError, match="rounding gptq: gptq looks at base, calibration; none given"):
        check_quantizer(source, settings())
    with pytest.raises(RecipeError, match="does not divide"):
        check_quantizer(source, settings().model_copy(update={"group_size": 24}), (BASE, CALIBRATION))
    with pytest.raises(CalibrationError, match=r"make no window of 128 tokens; give more text"):
        write_quantized(source, settings(), tmp_path / "out", evidence(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    write_quantized(source, settings(), tmp_path / "once", evidence())
    with pytest.raises(CheckpointError, match="already quantized"):
        write_quantized(open_checkpoint(tmp_path / "once"), settings(), tmp_path / "twice", evidence())
    with pytest.raises(ValueError, match="rounding gptq is of a scheme"):
        QuantizeSettings(rounding="gptq")


def test_what_is_said_of_it_and_what_decides_it():
    assert describe_rounding(settings()) == "int4 in groups of 16, gptq on 2,048 tokens"
    assert key_rounding(settings()) == {"scheme": "int4", "group_size": 16, "rounding": "gptq", "tokens": 2048}
    # Results of before there was a rounding to choose are found again.
    assert key_rounding(settings(rounding="nearest")) == {"scheme": "int4", "group_size": 16}
