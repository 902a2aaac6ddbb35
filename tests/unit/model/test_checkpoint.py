"""A model folder on disk: its facts and digest, and what is refused when it is opened."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import LAYERS, make_tiny_model, save_model

from mka.errors import CheckpointError, MkaError
from mka.model.checkpoint import open_checkpoint
from mka.model.companions import copy_companions
from mka.model.families import FAMILIES
from mka.model.verification import inspect_checkpoint, require_sound
from mka.plan.plan import MergePlan, identity_layers
from mka.store.sums import write_sums
from mka.transforms.merge import merge_checkpoint

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("single") / "m")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("sharded") / "m", max_shard_size="60KB")


@pytest.fixture
def folder(single, tmp_path):
    return Path(shutil.copytree(single, tmp_path / "m"))


@pytest.fixture
def shards(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def header_size(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def refusal(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_facts_of_a_whole_folder_match_what_a_stock_loader_sees(single, sharded):
    state = make_tiny_model("llama").state_dict()
    for path in (single, sharded):
        checkpoint = open_checkpoint(path)
        assert checkpoint.layers == LAYERS and checkpoint.dtype == "F32" and not checkpoint.is_quantized
        assert {n: t.shape for n, t in checkpoint.tensors.items()} == {n: tuple(t.shape) for n, t in state.items()}
        assert checkpoint.nbytes == sum(t.nbytes for t in state.values())
        one = sum(t.nbytes for n, t in state.items() if n.startswith("model.layers.0."))
        assert checkpoint.layer_nbytes == (one,) * LAYERS
        with checkpoint.reader() as read:
            assert all(torch.equal(read(name), tensor) for name, tensor in state.items())


def test_a_missing_folder_and_a_file_are_no_folder(tmp_path):
    assert "no such model folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "no such model folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", b"\xff\xfe"])
def test_a_missing_or_unreadable_config_is_refused(folder, content):
    path = folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(folder)
    assert "config.json" in message
    assert any(words in message for words in ("is missing", "not readable as JSON", "not a JSON object"))


@pytest.mark.parametrize("claimed", [LAYERS + 1, LAYERS - 1, 0, None, str(LAYERS)])
def test_a_config_with_more_or_fewer_layers_than_the_checkpoint_is_refused(folder, claimed):
    set_config(folder, num_hidden_layers=claimed)
    message = refusal(folder)
    assert f"num_hidden_layers={claimed}, the checkpoint holds {LAYERS} layers (0 to {LAYERS - 1})" in message


def test_a_layer_missing_in_the_middle_is_refused(folder):
    tensors = load_file(folder / MODEL)
    kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.2.")}
    save_file(kept, folder / MODEL, metadata={"format": "pt"})
    message = refusal(folder)
    assert f"num_hidden_layers={LAYERS}, the checkpoint holds {LAYERS - 1} layers (0 to {LAYERS - 1})" in message


@pytest.mark.parametrize("model_type", ["gpt2", "lama", None, ["llama"], 3])
def test_an_unsupported_architecture_is_refused_with_the_list(folder, model_type):
    set_config(folder, model_type=model_type)
    message = refusal(folder)
    assert f"architecture {model_type!r} is not supported" in message
    assert f"supported: {', '.join(sorted(FAMILIES))}" in message
    if model_type == "lama":
        assert "did you mean 'llama'" in message


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 5}])
def test_a_config_that_transformers_refuses_is_refused_in_one_line(folder, changes):
    set_config(folder, **changes)
    assert "config.json is refused" in refusal(folder)


@pytest.mark.parametrize(
    ("family", "name", "values"),
    [
        ("smollm3", "no_rope_layers", [1] * (LAYERS - 1)),
        ("smollm3", "no_rope_layers", [1] * (LAYERS + 1)),
        ("gemma3_text", "layer_types", ["full_attention"] * (LAYERS - 1)),
    ],
)
def test_a_per_layer_list_of_another_length_is_refused(tmp_path, family, name, values):
    folder = save_model(make_tiny_model(family), tmp_path / "m")
    set_config(folder, **{name: values})
    message = refusal(folder)
    assert name in message and str(len(values)) in message and str(LAYERS) in message


def test_a_missing_shard_is_named_and_counted(shards):
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) >= 3
    files[1].unlink()
    assert f"missing shard {files[1].name} (1 of {len(files)} missing); fetch the model again" in refusal(shards)


def test_a_folder_without_weights_is_refused(folder):
    (folder / MODEL).unlink()
    assert "missing shard model.safetensors (1 of 1 missing)" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_pickled_and_foreign_weights_are_named_and_not_read(folder, name):
    (folder / MODEL).rename(folder / name)
    assert f"found {name}, but only safetensors are read" in refusal(folder)


@pytest.mark.parametrize("body", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_usable_weight_map_is_refused(shards, body):
    (shards / INDEX).write_text(json.dumps(body))
    assert f"{INDEX}: has no weight_map" in refusal(shards)


def test_an_index_that_is_no_json_is_refused(shards):
    (shards / INDEX).write_text("{")
    assert "not readable as JSON" in refusal(shards)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_shard_is_refused(folder, shards, kept):
    for path in (folder / MODEL, sorted(shards.glob("*.safetensors"))[-1]):
        path.write_bytes(path.read_bytes()[:kept])
        assert f"{path}: damaged or truncated safetensors shard" in refusal(path.parent)


def test_a_shard_cut_within_its_header_or_grown_is_refused(folder):
    path = folder / MODEL
    whole = path.read_bytes()
    for content in (whole[: header_size(path) - 7], whole[: header_size(path)], whole + b"\0"):
        path.write_bytes(content)
        assert "damaged or truncated safetensors shard" in refusal(folder)


def test_garbage_and_pickles_in_the_place_of_a_shard_are_refused(folder):
    for content in (b"", b"garbage" * 100, b"\0" * 1000, b"\xff" * 1000):
        (folder / MODEL).write_bytes(content)
        assert "damaged or truncated safetensors shard" in refusal(folder)
    torch.save({"model.norm.weight": torch.zeros(3)}, folder / MODEL)
    assert "damaged or truncated safetensors shard" in refusal(folder)


def test_a_flipped_bit_inside_a_tensor_is_found_by_the_sums_and_only_there(folder):
    write_sums(folder)
    assert open_checkpoint(folder).verified
    flip(folder / MODEL, header_size(folder / MODEL) + 12345)
    assert f"{MODEL} is altered: expected sha256" in refusal(folder)
    assert not open_checkpoint(folder, verify=False).verified


def test_no_flipped_bit_in_a_header_gets_as_far_as_a_published_folder(tmp_path):
    """Without sums a flip may give a valid header of other names; the stranger's loader has to notice."""
    folder = save_model(make_tiny_model("llama", num_hidden_layers=2), tmp_path / "m")
    path, plan = folder / MODEL, MergePlan("test", "", 2, identity_layers(2))
    whole, reference, end = path.read_bytes(), load_file(path), header_size(path)
    rng = random.Random(0)

    def verify(partial):
        require_sound(inspect_checkpoint(partial), partial)

    refused = 0
    for trial in range(80):
        flip(path, rng.randrange(end), rng.randrange(8))
        output = tmp_path / f"out{trial}"
        try:
            merge_checkpoint(plan, open_checkpoint(folder), output, verify=verify)
        except MkaError as error:
            assert "\n" not in str(error)
            assert not output.exists()
            refused += 1
        else:  # harmless, e.g. in the metadata: the same tensors under the same names
            written = load_file(output / MODEL)
            assert written.keys() == reference.keys() and all(torch.equal(written[n], reference[n]) for n in written)
        path.write_bytes(whole)
    assert refused > 70


def test_shards_swapped_for_one_another_are_noticed_before_anything_is_published(shards, tmp_path):
    files = sorted(shards.glob("*.safetensors"))
    shutil.copyfile(files[-1], files[0])
    output = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"two shards hold it|does not list it"):
        merge_checkpoint(
            MergePlan("test", "", LAYERS, identity_layers(LAYERS)),
            open_checkpoint(shards),
            output,
            verify=lambda partial: require_sound(inspect_checkpoint(partial), partial),
        )
    assert not output.exists()


def test_the_digest_follows_every_byte_but_not_the_card(folder):
    before = open_checkpoint(folder).digest
    (folder / "README.md").write_text("a card")
    write_sums(folder)
    assert open_checkpoint(folder).digest == open_checkpoint(folder, verify=False).digest == before
    for name in (MODEL, "tokenizer.json", "generation_config.json"):
        whole = (folder / name).read_bytes()
        flip(folder / name, -2)
        assert open_checkpoint(folder, verify=False).digest != before
        (folder / name).write_bytes(whole)
    set_config(folder, rope_theta=5000.0)
    assert open_checkpoint(folder, verify=False).digest != before


def test_the_digest_follows_names_and_added_files_but_not_the_place(folder, tmp_path):
    before = open_checkpoint(folder).digest
    assert open_checkpoint(shutil.copytree(folder, tmp_path / "copy")).digest == before
    (folder / "extra.txt").write_text("x")
    added = open_checkpoint(folder).digest
    (folder / "extra.txt").rename(folder / "other.txt")
    assert len({before, added, open_checkpoint(folder).digest}) == 3


def test_companions_are_what_is_neither_weights_nor_their_description(folder, tmp_path):
    for name in (
        "LICENSE",
        "chat_template.jinja",
        "modeling_x.py",
        "old.bin",
        INDEX,
        "SHA256SUMS",
        "README.md",
        ".git",
    ):
        (folder / name).write_text("x")
    (folder / "subfolder").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(folder, target)
    expected = {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in target.iterdir()} == expected
