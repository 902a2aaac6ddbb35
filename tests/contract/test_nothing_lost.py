"""Nothing of a base is lost on the way: files beside the weights, and tensors outside the layers, byte for byte."""

import pytest
import torch
from support.field import SINGLE, edit, rewrite
from support.models import LAYERS, make_tiny_model, save_model

from mka.errors import CheckpointError
from mka.model.checkpoint import open_checkpoint
from mka.model.stock import open_base
from mka.model.tensors import TensorReader
from mka.model.verification import verify_checkpoint
from mka.plan.plan import MergedLayer, MergePlan, identity_layers
from mka.recipe import QuantizeSettings
from mka.transforms.cast import Settings, cast_checkpoint
from mka.transforms.merge import merge_checkpoint
from mka.transforms.rtn import quantize_checkpoint

COMPANIONS = {
    "added_tokens.json": '{"w5":   5}\n',
    "special_tokens_map.json": '{"bos_token":   "<s>"}',
    "chat_template.jinja": "{% for m in messages %}\r\n{{ m.content }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "tokenizer.model": "\x00\x01 sentencepiece",
    "SYSTEM_PROMPT.txt": "You are terse.\n",
    "preprocessor_config.json": '{"image_size": 224}',
    "video_preprocessor_config.json": "{}",
    "processor_config.json": '{"processor_class": "X"}',
    "LICENSE": "Terms.\r\n",
    "Licence.txt": "Terms.",
    "LICENSE_weights.md": "Terms.",
    "Notice": "By whom.",
    "THIRD_PARTY_NOTICES.txt": "By whom else.",
    "ACCEPTABLE_USE_POLICY.md": "What for.",
    "gemma_terms_of_use.md": "Terms.",
}
# What models of other kinds store beside the layers: heads that predict several tokens, towers, projectors, numbers.
FURTHER = {
    "mtp.layers.0.mlp.up_proj.weight": torch.arange(48.0).reshape(6, 8),
    "mtp.norm.weight": torch.full((8,), 0.3, dtype=torch.float64),
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight": torch.linspace(-1, 1, 64).reshape(8, 8).half(),
    "multi_modal_projector.linear.bias": torch.full((4,), 1e30, dtype=torch.bfloat16),
    "model.layers_seen": torch.tensor([7, 8]),
}


def save_rich(model, folder):
    """A base with every file that models come with, whose final norm and embedding are in more bits than it says."""
    save_model(model, folder)
    (folder / "additional_chat_templates").mkdir()
    for name, text in COMPANIONS.items():
        (folder / name).write_bytes(text.encode())
    edit(folder / "generation_config.json", temperature=0.6, top_p=0.95, do_sample=True)
    precise = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    rewrite(folder, lambda w: {name: v if name in precise else v.bfloat16() for name, v in w.items()})
    edit(folder / "config.json", dtype="bfloat16")
    return folder


def read_outside(checkpoint):
    """The stored bytes of all tensors outside the layers, with dtype and shape."""
    outside = {n: t for n, t in checkpoint.tensors.items() if checkpoint.family.split_tensor(n) is None}
    with TensorReader(checkpoint.path, outside) as read:
        return {n: (t.dtype, t.shape, read(n).view(torch.uint8).numpy().tobytes()) for n, t in outside.items()}


def write_all(source, folder, **options):
    """Write what merge, cast and quantize make of a base, each from the one before where that is allowed."""
    layers = (*identity_layers(LAYERS)[:3], MergedLayer((3,), (1.0,)), MergedLayer((5,), (1.0,)))
    merge_checkpoint(MergePlan("test", "", LAYERS, layers), source, folder / "merged", **options)
    merged = open_checkpoint(folder / "merged")
    for scheme in ("int8", "int4"):
        settings = QuantizeSettings(scheme=scheme, group_size=16)
        quantize_checkpoint(merged, folder / scheme, settings, **options)
        quantize_checkpoint(source, folder / f"control-{scheme}", settings, **options)
    return [open_checkpoint(place) for place in sorted(folder.iterdir())]


def test_files_and_outer_tensors_are_the_bases_byte_for_byte(family_model, tmp_path):
    folder = save_rich(make_like(family_model), tmp_path / "base")
    # As transformers 4 and most hubs have it; this one's own name for the class is spelled anew.
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    base = open_base(folder)
    written = {"config.json", "SHA256SUMS", SINGLE}
    wanted = {p.relative_to(base.path).as_posix() for p in base.path.rglob("*") if p.is_file()} - written
    assert len(wanted) == len(COMPANIONS) + 3
    outside = read_outside(base)
    assert {dtype for dtype, _, _ in outside.values()} == {"F32"} and len(outside) in (2, 3)
    made = write_all(base, tmp_path / "made", verify=verify_checkpoint)
    assert len(made) == 5
    for checkpoint in made:
        found = {p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*") if p.is_file()}
        assert found - written == wanted
        assert [n for n in wanted if (checkpoint.path / n).read_bytes() != (base.path / n).read_bytes()] == []
        assert read_outside(checkpoint) == outside


def test_tensors_that_no_layer_has_are_refused_or_kept_whole(family_model, tmp_path):
    """Stock's classes leave them out, so that a base with them is refused; what is written all the same has them."""
    folder = save_model(make_like(family_model), tmp_path / "base")
    rewrite(folder, lambda w: w | FURTHER)
    with pytest.raises(CheckpointError, match=r"model\.layers_seen is stored as I64"):
        open_base(folder)
    rewrite(folder, lambda w: {n: v for n, v in w.items() if n != "model.layers_seen"})
    refusal = r"4 unexpected keys, e\.g\. mtp\.layers\.0.*they would be lost"
    with pytest.raises(CheckpointError, match=refusal) as caught:
        open_base(folder)
    assert "\n" not in str(caught.value)
    rewrite(folder, lambda w: w | FURTHER)
    base = open_checkpoint(folder)
    outside = read_outside(base)
    assert FURTHER.keys() < outside.keys()
    for checkpoint in write_all(base, tmp_path / "made"):
        assert read_outside(checkpoint) == outside
    with pytest.raises(CheckpointError, match="5 unexpected keys after writing"):
        write_all(base, tmp_path / "verified", verify=verify_checkpoint)
    assert not list((tmp_path / "verified").iterdir())


def test_a_cast_to_the_dtype_there_is_moves_no_byte(family_model, tmp_path):
    base = open_base(save_model(make_like(family_model), tmp_path / "base"))
    cast_checkpoint(base, Settings(dtype="float32"), tmp_path / "cast")
    assert read_outside(open_checkpoint(tmp_path / "cast")) == read_outside(base)


def make_like(model):
    """A new model of a family: the session's own must stay as it is."""
    return make_tiny_model(model.config.model_type)
