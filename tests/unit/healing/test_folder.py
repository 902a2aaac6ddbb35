"""A healed model as a folder: what changed is stored as the rest is, what did not is there byte for byte."""

import pytest
import torch
from safetensors.torch import load_file
from support.alignments import draw_windows, make_sharp_model, without
from support.candidates import build_candidate
from support.models import FAMILY_NAMES, LAYERS, make_tiny_model, save_model
from transformers import AutoModelForCausalLM

from mka.alignment.lockstep import find_ends
from mka.errors import CheckpointError, NumericsError
from mka.healing.folder import write_healed
from mka.healing.local import heal_locally
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import open_decoder
from mka.model.verification import verify_checkpoint
from mka.recipe import HealFit, QuantizeSettings
from mka.transforms.rtn import quantize_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_stock_loader_gets_what_was_healed_and_the_rest_as_it_was(family, dtype, tmp_path):
    """From disk to disk, streamed; sharded, so that layers 10 and 2 do not come in the order of their names."""
    model, layers = make_sharp_model(family, dtype=dtype), without(3)
    base = open_checkpoint(save_model(model, tmp_path / "base"))
    source = open_checkpoint(save_model(build_candidate(model, layers), tmp_path / "student", max_shard_size="40KB"))
    made = []

    def follow():
        with open_decoder(base, "float32") as (teacher, _), open_decoder(source, "float32") as (student, _):
            settings = HealFit(rate=3e-3, patience=1)
            ends = find_ends(layers, LAYERS)
            for layer in heal_locally(teacher, student, ends, draw_windows(8), draw_windows(4, seed=1), settings):
                made.append(layer.tensors)
                yield layer.tensors

    written = []
    write_healed(source, follow(), tmp_path / "out", verify=verify_checkpoint, on_tensor=written.append)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    before = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto").state_dict()
    assert made[:2] == [{}, {}] and made[2]
    wanted = before | {
        f"model.layers.{position}.{name}": value.to(dtype)
        for position, tensors in enumerate(made)
        for name, value in tensors.items()
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == dtype for name in wanted)
    assert sum(written) == source.nbytes
    assert (tmp_path / "out/SHA256SUMS").is_file() and (tmp_path / "out/tokenizer.json").is_file()


def test_nothing_healed_is_the_source_byte_for_byte(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama", num_hidden_layers=12), tmp_path / "student"))
    write_healed(source, [{}] * 12, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source.path, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_more_than_ten_layers_each_get_their_own(tmp_path):
    """In the folder's order of names layer 10 comes before layer 2."""
    source = open_checkpoint(save_model(make_tiny_model("llama", num_hidden_layers=12), tmp_path / "student"))
    name = "mlp.down_proj.weight"
    write_healed(source, ({name: torch.full((32, 64), float(i))} for i in range(12)), tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert [float(after[f"model.layers.{i}.{name}"].mean()) for i in range(12)] == list(range(12))


def test_a_tensor_that_does_not_fit_publishes_nothing(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama", dtype=torch.float16), tmp_path / "student"))
    layers = [{}] * 3 + [{"mlp.down_proj.weight": torch.full((32, 64), 7e4)}] + [{}] * 2
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp\.down_proj\.weight: NaN or infinite"):
        write_healed(source, layers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_weights_are_refused(tmp_path):
    base = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    quantize_checkpoint(base, tmp_path / "int8", QuantizeSettings(scheme="int8", group_size=16))
    with pytest.raises(CheckpointError, match="already quantized; name the original model"):
        write_healed(open_checkpoint(tmp_path / "int8"), [{}] * LAYERS, tmp_path / "out")
