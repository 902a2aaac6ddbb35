"""Storing in another dtype: every tensor is what torch's own cast makes of it, and stock loaders see the dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import FAMILY_NAMES, make_tiny_model, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from mka.errors import CheckpointError, NumericsError
from mka.model.checkpoint import open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.recipe import QuantizeSettings
from mka.transforms.cast import Settings, cast_checkpoint, outline
from mka.transforms.rtn import quantize_checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cast(folder, output, dtype="bfloat16", **options):
    return cast_checkpoint(open_checkpoint(folder), Settings(dtype=dtype), output, **options)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_stock_loader_gets_every_tensor_as_torch_casts_it(family, tmp_path):
    model = make_tiny_model(family)
    base = save_model(model, tmp_path / "base")
    cast(base, tmp_path / "out", verify=verify_checkpoint)
    written, before = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    assert list(written) == list(before)
    assert all(torch.equal(written[name], before[name].to(torch.bfloat16)) for name in before)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("after", DTYPES)
@pytest.mark.parametrize("before", DTYPES)
def test_between_any_two_dtypes(before, after, tmp_path):
    base = save_model(make_tiny_model("llama", dtype=DTYPES[before]), tmp_path / "base")
    cast(base, tmp_path / "out", after)
    written, read = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(written[name], read[name].to(DTYPES[after])) for name in read)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == DTYPES[after]


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_config_names_the_dtype_by_the_keys_it_had_and_changes_no_meaning(keys, tmp_path):
    base = save_model(make_tiny_model("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
    cast(base, tmp_path / "out")
    found = json.loads((tmp_path / "out/config.json").read_text())
    older = {"rope_theta": 10000.0, "rope_scaling": None}  # what is in rope_parameters, spelled for older readers
    assert found == config | dict.fromkeys(keys or ("dtype",), "bfloat16") | older
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_what_is_no_floating_point_number_stays(tmp_path):
    base = save_model(make_tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors") | {"counts": torch.arange(5), "mask": torch.tensor([True, False])}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    cast(base, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["counts"], torch.arange(5)) and written["mask"].dtype == torch.bool


@pytest.mark.parametrize(("value", "said"), [(70000.0, "values up to 7e+04 do not fit float16"), (float("nan"), "NaN")])
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_tensor(value, said, tmp_path):
    base = save_model(make_tiny_model("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name][1, 2] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError) as refused:
        cast(base, tmp_path / "out", "float16")
    assert name in str(refused.value) and said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_shards_are_the_same_tensors(tmp_path):
    base = save_model(make_tiny_model("llama"), tmp_path / "base", max_shard_size="40KB")
    cast(base, tmp_path / "out", max_shard_bytes=20_000, verify=verify_checkpoint)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    with before.reader() as read, after.reader() as reread:
        assert all(torch.equal(reread(name), read(name).to(torch.bfloat16)) for name in before.tensors)
    assert outline(before, Settings(dtype="bfloat16")).nbytes == after.nbytes == before.nbytes / 2


def test_packed_weights_are_refused(tmp_path):
    base = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    quantize_checkpoint(base, tmp_path / "int8", QuantizeSettings(scheme="int8", group_size=16))
    with pytest.raises(CheckpointError, match="already quantized; name the original model"):
        cast(tmp_path / "int8", tmp_path / "out")
