"""What is looked at in a folder before it is published: that it speaks as soundly with a cache as without."""

import pytest
import torch
from support.models import make_tiny_model, save_model

from mka.errors import CheckpointError
from mka.model.verification import verify_checkpoint


def test_logits_that_are_no_numbers_are_refused_though_every_weight_is_one(tmp_path):
    model = make_tiny_model("llama", dtype=torch.float16)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.fill_(60000.0)
        layer.mlp.up_proj.weight.data.fill_(60000.0)
        layer.mlp.gate_proj.weight.data.fill_(60000.0)
    folder = save_model(model, tmp_path / "base")
    with pytest.raises(CheckpointError, match="generat"):
        verify_checkpoint(folder)


def test_a_sound_folder_has_no_mismatch(tmp_path):
    found = verify_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    assert (found["generation_mismatches"], found["nonfinite_tensors"]) == (0, 0)
