"""Calibrated rounding as a transform: what stock loading gets back, what is refused, what is left behind."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import FAMILY_NAMES, make_byte_tokenizer, make_texts, make_tiny_model, save_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mka.alignment.rounding import Rounding
from mka.errors import CalibrationError, CheckpointError, NumericsError, RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import load_tokenizer
from mka.pipeline.quantize import check_quantizer, describe_rounding, key_rounding, write_quantized
from mka.recipe import ModelSource, QuantizeSettings
from mka.texts.calibration import CalibrationSet
from mka.texts.windows import pack_windows
from mka.transforms import BASE, CALIBRATION, get_transform, list_options
from mka.transforms.packing import find_linear
from mka.transforms.rtn import quantize_checkpoint


def settings(scheme="int4", rounding="gptq", **more):
    looked_at = {} if rounding == "nearest" else {"tokens": 2048}
    return QuantizeSettings(scheme=scheme, rounding=rounding, group_size=16, **looked_at, **more)


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


@pytest.mark.parametrize(
    ("scheme", "rounding", "name", "said"),
    [
        ("int4", "gptq", "model.layers.2.mlp.down_proj", "the rounded model's hidden states behind layer 2's mlp"),
        ("int4", "gptaq", "model.layers.2.mlp.down_proj", "rounding: hidden states behind layer 2's mlp"),
        ("int4", "gptaq", "model.layers.4.self_attn.o_proj", "rounding: hidden states behind layer 4's attention"),
        ("int4", "gptaq", "model.embed_tokens", "rounding: hidden states behind the embedding"),
        ("int4", "gptaq", "lm_head", "logits"),
        ("mixed", "gptaq", "model.layers.2.mlp.down_proj", "mixed bits: hidden states behind layer 2"),
    ],
)
def test_what_overflows_float16_is_named_with_what_to_do(scheme, rounding, name, said, tmp_path):
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1e7)
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    asked = settings(scheme, rounding, **({"bits_per_weight": 5.0} if scheme == "mixed" else {}))
    given = evidence() | {BASE: (None, ModelSource(folder="unused", dtype="float16"))}
    with pytest.raises(NumericsError, match=rf"^[^/]*{said} are NaN or infinite; .* float32 or bfloat16 \(--dtype"):
        write_quantized(source, asked, tmp_path / "out", given)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_rounded_weight_beyond_the_dtype_it_is_unpacked_to_is_named(tmp_path):
    model = make_tiny_model("llama")
    with torch.no_grad():
        # Alone in its row and group: the lowest of sixteen steps is then at 8 / 7.5 of it.
        model.get_submodule("model.layers.3.mlp.down_proj").weight[0] = -65000.0
    source = open_checkpoint(save_model(model.to(torch.float16), tmp_path / "base"))
    with pytest.raises(NumericsError, match=r"^model\.layers\.3\.mlp\.down_proj\.weight: .* beyond float16"):
        write_quantized(source, settings("int4", "gptaq"), tmp_path / "out", evidence())
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_in_every_precision_of_the_walk(family, dtype, rounding, tmp_path):
    model = make_tiny_model(family, vocab_size=320)
    folder = save_model(model, tmp_path / "base", tokenizer=make_byte_tokenizer())
    asked, given = settings(rounding=rounding), evidence()
    given[BASE] = (None, ModelSource(folder="unused", dtype=dtype))
    facts = write_quantized(open_checkpoint(folder), asked, tmp_path / "out", given)
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
    with pytest.raises(ValueError, match="rounding gptq needs a scheme, and it is off"):
        QuantizeSettings(rounding="gptq")
    with pytest.raises(ValueError, match="tokens 999 are of rounding gptq and gptaq"):
        QuantizeSettings(scheme="int4", tokens=999)


def test_what_is_said_of_it_and_what_decides_it():
    assert describe_rounding(settings()) == "int4 in groups of 16, gptq on at most 2,048 tokens"
    assert key_rounding(settings()) == {"scheme": "int4", "group_size": 16, "rounding": "gptq", "tokens": 2048}
    # Results of before there was a rounding to choose are found again.
    assert key_rounding(settings(rounding="nearest")) == {"scheme": "int4", "group_size": 16}


def test_layers_stored_in_several_precisions_keep_scales_in_their_own(tmp_path):
    """As nearest does, where config.json names none for all."""
    folder = save_model(make_tiny_model("llama"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    half = {name: value.bfloat16() if ".layers.0." in name else value for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    write_quantized(open_checkpoint(folder), settings(rounding="gptaq"), tmp_path / "out", evidence())
    kept = {n: info.dtype for n, info in open_checkpoint(tmp_path / "out").tensors.items() if n.endswith("_scale")}
    assert {dtype for name, dtype in kept.items() if ".layers.0." in name} == {"BF16"}
    assert {dtype for name, dtype in kept.items() if ".layers.0." not in name} == {"F32"}


def test_what_was_looked_at_is_told_and_not_what_was_allowed(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    facts = write_quantized(source, settings(), tmp_path / "out", evidence())["rounding"]
    text = sum(len(text.split()) for text in evidence()[CALIBRATION][0].texts)
    lost = facts.pop("lost")
    assert facts == {"tokens": text // 128 * 128, "context": 128, "bits": {"int4": 1.0}}
    assert lost.keys() == {"measured", "tokens"} and lost["tokens"] == 2 * 128


@pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
@pytest.mark.parametrize("scheme", ["int2", "mixed"])
def test_what_is_said_to_be_lost_is_the_divergence_of_the_stock_models(scheme, rounding, tmp_path):
    folder = save_model(make_tiny_model("llama"), tmp_path / "base")
    asked = settings(scheme, rounding, **({"bits_per_weight": 4.5} if scheme == "mixed" else {}))
    lost = write_quantized(open_checkpoint(folder), asked, tmp_path / "out", evidence())["rounding"]["lost"]
    windows = torch.tensor(pack_windows(load_tokenizer(folder), evidence()[CALIBRATION][0].texts, 128, 2))
    models = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval() for at in (folder, tmp_path / "out")]
    with torch.no_grad():
        p, q = (torch.log_softmax(model(windows).logits.double(), -1) for model in models)
    measured = float((p.exp() * (p - q)).sum(-1).mean())
    assert lost["measured"] == pytest.approx(measured, rel=1e-3) and measured > 1e-5
    # Rounding to the nearest, with the noise of each layer adding up; of the order of what it is.
    assert ("expected" in lost) is (scheme == "mixed")
    if scheme == "mixed" and rounding == "gptq":
        assert 0.2 < lost["expected"] / measured < 20


def mixed(bits, **more):
    return settings("mixed", "gptaq", bits_per_weight=bits, **more)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_mixed_bits_keep_the_budget_and_load_in_stock(family, tmp_path):
    model = make_tiny_model(family, vocab_size=320)
    source = open_checkpoint(save_model(model, tmp_path / "base", tokenizer=make_byte_tokenizer()))
    write_quantized(source, mixed(5.5), tmp_path / "out", evidence())
    made = open_checkpoint(tmp_path / "out")
    kept = [info for name, info in made.tensors.items() if name.endswith(("_packed", "_scale"))]
    weights = sum(info.parameters for info in find_linear(source))
    assert 5.0 < 8 * sum(info.nbytes for info in kept) / weights <= 5.5
    after, groups = load_weights(tmp_path / "out"), made.config["quantization_config"]["config_groups"]
    assert len(groups) > 1 and [group["targets"] for group in groups.values()][-1] == ["Linear"]
    # What each has is what its own name says, readers of one norm alike.
    levels, names = {}, [name for name, _ in model.model.layers.named_modules() if name in after]
    for name in names:
        stem = f"model.layers.{name}"
        packed, scale = (made.tensors[f"{stem}.{kind}"] for kind in ("weight_packed", "weight_scale"))
        levels[name] = 32 * packed.shape[1] // (16 * scale.shape[1])
    assert len(set(levels.values())) == len(groups)
    fused = {
        tuple(sorted({levels[f"{i}.{name}"] for name in part.readers}))
        for part in source.family.parts
        for i in range(6)
    }
    assert all(len(each) == 1 for each in fused)
    # The patterns say it, too, one for all readers of a norm.
    for group in groups.values():
        for pattern in group["targets"]:
            if pattern != "Linear":
                matched = [name for name in names if re.match(pattern.removeprefix("re:"), f"model.layers.{name}")]
                assert matched and {levels[name] for name in matched} == {group["weights"]["num_bits"]}


def test_all_bits_alike_where_the_budget_asks_for_the_ends(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    # float32 scales in groups of 16: two bits more.
    for bits, name in ((4.0, "int2"), (10.0, "int8")):
        write_quantized(source, mixed(bits), tmp_path / name, evidence())
        config = open_checkpoint(tmp_path / name).config["quantization_config"]
        assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [int(name[3:])]


def test_a_budget_that_nothing_reaches_is_refused_with_what_there_is(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    for bits in (3.9, 10.1):
        with pytest.raises(RecipeError, match=r"in groups of 16 weights take 4\.000 to 10\.000 bits, scales included"):
            check_quantizer(source, mixed(bits), (BASE, CALIBRATION))
    with pytest.raises(ValueError, match=r"scheme mixed takes exactly one of bits_per_weight and bytes, .*got none"):
        settings("mixed", "gptq")
    with pytest.raises(ValueError, match="scheme mixed takes exactly one of bits_per_weight and bytes"):
        settings("mixed", "gptq", bits_per_weight=4, bytes=99)
    with pytest.raises(ValueError, match="bits_per_weight goes with scheme mixed, and it is int4"):
        settings("int4", "gptq", bits_per_weight=4)
    with pytest.raises(ValueError, match="bytes goes with scheme mixed, and it is int4"):
        settings("int4", "gptq", bytes="4MB")
    with pytest.raises(ValueError, match="scheme mixed looks at texts"):
        settings("mixed", "nearest", bits_per_weight=4)


@pytest.mark.parametrize(("embeddings", "nbytes"), [("off", 90_000), ("int8", 70_000)])
def test_a_budget_of_bytes_is_one_of_all_that_is_written(embeddings, nbytes, tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    asked = settings("mixed", "gptaq", bytes=nbytes, embeddings=embeddings)
    write_quantized(source, asked, tmp_path / "out", evidence())
    made = open_checkpoint(tmp_path / "out")
    # A unit of the tiny model holds up to 4,096 weights; none of the others could have a bit more.
    assert nbytes - 4096 / 8 < made.nbytes <= nbytes
    # More than the most bits take buys nothing more than the most bits.
    write_quantized(source, asked.model_copy(update={"bytes": 1e9}), tmp_path / "most", evidence())
    alike = asked.model_copy(update={"scheme": "int8", "bytes": None})
    write_quantized(source, alike, tmp_path / "int8", evidence())
    assert open_checkpoint(tmp_path / "most").nbytes == open_checkpoint(tmp_path / "int8").nbytes


def test_bytes_that_no_bits_come_down_to_are_refused_with_what_is_needed(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    with pytest.raises(
        RecipeError, match=r"quantize\.bytes 9,000: 6 layers in groups of 16 take [0-9,]+ at least"
    ) as said:
        check_quantizer(source, settings("mixed", "gptaq", bytes=9000), (BASE, CALIBRATION))
    needed = float(str(said.value).split(" take ")[1].split()[0].replace(",", ""))
    write_quantized(source, settings("mixed", "gptaq", bytes=needed), tmp_path / "out", evidence())
    assert open_checkpoint(tmp_path / "out").nbytes == needed


def test_the_ends_of_what_there_is_are_allowed_as_they_are_told(tmp_path):
    """Of a width of 96 in groups of 48 and bfloat16 the smallest takes two and a third: no end is a round number."""
    model = make_tiny_model("llama", hidden_size=96, intermediate_size=96, head_dim=24, dtype=torch.bfloat16)
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    with pytest.raises(RecipeError, match=r"take 2\.334 to 8\.333 bits"):
        check_quantizer(source, mixed(2.333).model_copy(update={"group_size": 48}), (BASE, CALIBRATION))
    for bits in (2.334, 8.333, 2 + 16 / 48, 8 + 16 / 48):
        check_quantizer(source, mixed(bits).model_copy(update={"group_size": 48}), (BASE, CALIBRATION))


@pytest.mark.parametrize("dead", ["layers", "head"])
def test_where_no_noise_costs_anything_the_fewest_bits_are_taken(dead, tmp_path):
    model = make_tiny_model("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("proj" in name) if dead == "layers" else name == "lm_head.weight":
                weight.zero_()
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    found = write_quantized(source, mixed(6), tmp_path / "out", evidence())
    assert found["rounding"]["bits"] == {"int2": 1.0}


def test_where_it_runs_decides_what_is_stored_where_bits_are_mixed():
    """Bits there are to mix are in the key; for one scheme an engine only refuses."""
    assert key_rounding(mixed(5)) != key_rounding(mixed(5, serve_on="cuda"))
    assert key_rounding(settings()) == key_rounding(settings(serve_on="cuda"))


def test_an_engine_limits_what_is_mixed():
    assert list_options(mixed(5)) == [f"int{bits}" for bits in range(8, 1, -1)]
    assert list_options(mixed(5, serve_on="cuda")) == ["int8", "int4"]
    with pytest.raises(ValueError, match=r"scheme mixed: vLLM on CPU .* runs int4 of the schemes there are to mix"):
        mixed(5, serve_on="cpu")
    assert list_options(mixed(5, serve_on="llama.cpp")) == list_options(mixed(5))


def test_dear_layers_have_more_bits(tmp_path, monkeypatch):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    monkeypatch.setattr(
        "mka.alignment.sensitivity.measure_sensitivity",
        lambda decoder, windows, on_layer: {
            (i, names): 1000.0 if i == 2 else 1.0
            for i in range(6)
            for part in source.family.parts
            for names in (part.readers, (part.writer,))
        },
    )
    write_quantized(source, mixed(6), tmp_path / "out", evidence())
    packed = {
        name: info.shape[1]
        for name, info in open_checkpoint(tmp_path / "out").tensors.items()
        if "q_proj.weight_packed" in name
    }
    assert packed["model.layers.2.self_attn.q_proj.weight_packed"] > max(
        width for name, width in packed.items() if ".2." not in name
    )
