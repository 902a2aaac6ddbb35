"""A folder of rounded weights as a GGUF file: the same whole numbers, in types as small as they fit, or refused."""

import json
from collections import Counter

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gguf_files import REGULAR, load_by_hand, logits_of, read_fields, read_logits, read_tensors
from support.models import FAMILY_NAMES, make_byte_tokenizer, make_tiny_model, save_model
from support.rounded import write_mixed
from transformers import AutoModelForCausalLM

from mka.cli.main import main
from mka.errors import CheckpointError, OutputError
from mka.export.gguf import write_gguf
from mka.model.checkpoint import open_checkpoint
from mka.recipe import QuantizeSettings
from mka.transforms.rtn import quantize_checkpoint

# All widths are multiples of 256, so that every type can be had.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture
def make(tmp_path):
    """Make a rounded folder, and the model it was rounded from.

    Scales in bfloat16 are numbers of float16, too: what is kept is kept to the last bit then.
    """

    def make(scheme, family="llama", group_size=32, embeddings="off", dtype=torch.bfloat16, shard=5 << 30, **overrides):
        special = REGULAR.get(family, {}) if "num_hidden_layers" not in overrides else {}
        model = make_tiny_model(family, **{"vocab_size": 320, "dtype": dtype, **special, **overrides})
        base = save_model(model, tmp_path / f"base-{shard}", tokenizer=make_byte_tokenizer())
        folder, source = tmp_path / f"{scheme}-{shard}" / "tiny", open_checkpoint(base)
        common = {"group_size": group_size, "embeddings": embeddings}
        if scheme != "mixed":
            quantize_checkpoint(source, folder, QuantizeSettings(scheme=scheme, **common), max_shard_bytes=shard)
            return model, folder
        write_mixed(source, folder, **common, shard=shard)
        return model, folder

    return make


def load_stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read_kinds(file):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_stock_reads_of_the_file_what_it_unpacks_of_a_folder_of_mixed_bits(family, make, target):
    model, folder = make("mixed", family)
    file = write_gguf(folder, target, "rounded")
    stock = load_stock(folder)
    expected = logits_of(stock)
    found = (
        logits_of(load_by_hand(file, model.float()))
        if family == "smollm3"
        else read_logits(file, None if family in ("llama", "mistral") else model.config)
    )
    assert (found - expected).abs().max() < 1e-4
    # Rounding itself moves them by a thousand times as much and more.
    assert (logits_of(model.float()) - expected).abs().max() > 0.1
    assert set(read_kinds(file).values()) == {"F32", "BF16", "Q8_0", "Q5_0", "Q4_0"}


def test_every_tensor_has_the_type_of_its_bits_and_the_file_says_so(make, target):
    # Three layers of four units: 8, 7, 6, 5 bits; 4, 3, 2, 8; 7, 6, 5, 4.
    _, folder = make("mixed", **WIDE | {"num_hidden_layers": 3})
    file = write_gguf(folder, target, "rounded")
    kinds = read_kinds(file)
    units = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
    due = ("Q8_0", "Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q3_K", "Q2_K", "Q8_0", "Q8_0", "Q6_K", "Q5_0", "Q4_0")
    for place, kind in enumerate(due):
        assert {kinds[f"blk.{place // 4}.{name}.weight"] for name in units[place % 4]} == {kind}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"
    assert {kind for name, kind in kinds.items() if name.endswith("norm.weight")} == {"F32"}
    fields, counted = read_fields(file), Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        counted[tensor.tensor_type.name] += int(tensor.n_elements) if tensor.tensor_type.name[0] == "Q" else 0
    assert counted.most_common(1)[0][0] == "Q8_0"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert file.name == "tiny-ROUNDED.gguf"


@pytest.mark.parametrize(
    ("scheme", "kind", "said", "most"),
    [
        ("int6", "Q6_K", "MOSTLY_Q6_K", 0.04),
        ("int3", "Q3_K", "MOSTLY_Q3_K_M", 0.02),
        ("int2", "Q2_K", "MOSTLY_Q2_K", 0.02),
    ],
)
def test_where_scales_are_rounded_too_little_is_added_to_what_rounding_lost(scheme, kind, said, most, make, target):
    """Squared errors are a twelfth of a weight's step, and of its scale's step times the mean square of the numbers.

    Of groups of 64 normal weights the largest is some 2.4 deviations. So the numbers' mean square is (31.5 / 2.4)**2,
    (3.5 / 2.4)**2 and (1.5 / 2.4)**2, and the largest scale of a block has 127, 31 and 15 steps: 1.1 %, 0.2 % and 0.2 %
    are added, and more for scales that are smaller than the largest.
    """
    model, folder = make(scheme, dtype=torch.float32, group_size=64, **WIDE)
    file = write_gguf(folder, target, "rounded")
    assert set(read_kinds(file).values()) == {"F32", kind}
    assert read_fields(file)["general.file_type"] == gguf.LlamaFileType[said]
    stock, base = load_stock(folder), model.state_dict()
    logits_of(stock)
    for name, place in (("o_proj", "attn_output"), ("v_proj", "attn_v")):
        unpacked = stock.state_dict()[f"model.layers.1.self_attn.{name}.weight"]
        off = torch.tensor(read_tensors(file)[f"blk.1.{place}.weight"]) - unpacked
        own = unpacked - base[f"model.layers.1.self_attn.{name}.weight"]
        assert 0 < off.pow(2).mean() < most * own.pow(2).mean()
    found, expected = read_logits(file), logits_of(stock)
    assert (found - expected).std() < 0.25 * (logits_of(model) - expected).std()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8"])
def test_a_rounded_embedding_and_head_are_kept_too(scheme, tied, make, target):
    _, folder = make(scheme, embeddings="int8", tie_word_embeddings=tied)
    file = write_gguf(folder, target, "rounded")
    kinds = read_kinds(file)
    assert kinds["token_embd.weight"] == "Q8_0" and kinds.get("output.weight") == (None if tied else "Q8_0")
    assert "BF16" not in kinds.values()
    stored = load_file(folder / "model.safetensors")
    rows = stored["model.embed_tokens.weight"].float() * stored["model.embed_tokens.weight_scale"].float()
    assert (torch.tensor(read_tensors(file)["token_embd.weight"]) == rows).all()
    if scheme == "w8a8":  # stock rounds what goes in as well
        down = "model.layers.3.mlp.down_proj.weight"
        found = torch.tensor(read_tensors(file)["blk.3.ffn_down.weight"])
        assert (found == stored[down].float() * stored[f"{down}_scale"].float()).all()
    else:
        assert (read_logits(file) - logits_of(load_stock(folder))).abs().max() < 1e-4


def test_a_constant_of_attention_goes_into_the_scales_of_the_queries(make, target):
    """Readers take 1/sqrt(8) for six layers; 1/sqrt(2) is twice that."""
    _, folder = make("int4", "gemma2", query_pre_attn_scalar=2)
    found = read_tensors(write_gguf(folder, target, "rounded"))["blk.2.attn_q.weight"]
    stock = load_stock(folder)
    logits_of(stock)
    assert (torch.tensor(found) == 2 * stock.model.layers[2].self_attn.q_proj.weight).all()


def test_groups_that_no_type_has_are_unpacked_to_float16(make, target):
    _, folder = make("int4", group_size=16)
    file = write_gguf(folder, target, "rounded")
    kinds = read_kinds(file)
    assert kinds["blk.0.ffn_up.weight"] == "F16" and kinds["token_embd.weight"] == "BF16"
    assert read_fields(file)["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    expected = logits_of(load_stock(folder))
    # Eleven digits of float16 instead of the twelve that four bits times eight have.
    assert (read_logits(file) - expected).abs().max() < 0.01 * expected.abs().max()


def test_shards_and_blocks_of_rows_make_the_same_file(make, target, tmp_path, monkeypatch):
    _, folder = make("mixed")
    _, parts = make("mixed", shard=20_000)
    assert len(list(parts.glob("*.safetensors"))) > 2
    (tmp_path / "other").mkdir()
    whole = write_gguf(folder, target, "rounded")
    monkeypatch.setattr("mka.export.placing.BLOCK_BYTES", 1000)
    pieces = write_gguf(parts, tmp_path / "other", "rounded")
    assert read_kinds(whole) == read_kinds(pieces)
    found = read_tensors(pieces)
    assert all((found[name] == rows).all() for name, rows in read_tensors(whole).items())


def test_the_command_keeps_what_is_rounded_and_tells_the_types(make, tmp_path, capsys, monkeypatch):
    # llama.cpp's quantizer is not asked.
    monkeypatch.setattr("mka.export.ggml._find_quantizer", lambda: None)
    _, folder = make("int3", **WIDE)
    output = tmp_path / "published"
    assert main(["export", str(folder), "--format", "gguf", "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["type"] == "rounded"
    # Two layers of 256 x (256 + 128 + 128 + 256) and 3 of 256 x 512; twice 320 x 256; five norms of 256.
    linear, rest, norms = 2 * (256 * 768 + 3 * 256 * 512), 2 * 320 * 256, 5 * 256
    every = linear + rest + norms
    assert list(facts["types"]) == ["Q3_K", "BF16", "F32"]
    shares = {kind: found["share"] for kind, found in facts["types"].items()}
    assert shares == pytest.approx({"Q3_K": linear / every, "BF16": rest / every, "F32": norms / every})
    nbytes = {kind: found["bytes"] for kind, found in facts["types"].items()}
    assert nbytes == {"Q3_K": linear * 110 / 256, "BF16": 2 * rest, "F32": 4 * norms}
    assert main(["export", str(folder), "--format", "gguf", "--output", str(tmp_path / "again")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["type", "of", "the", "weights", "MB"]
    assert lines[3].split() == ["Q3_K", f"{linear / every:.1%}", f"{linear * 110 / 256 / 1e6:.1f}"]


def test_numbers_that_are_not_the_folders_are_not_kept(make, target, monkeypatch):
    from mka.export import gguf as module

    _, folder = make("int4")
    carry_rows = module.carry_rows

    def shift(numbers, scales, kind, name):
        wrong = name.endswith("layers.3.mlp.up_proj.weight")
        return carry_rows(numbers[::-1] if wrong else numbers, scales, kind, name)

    monkeypatch.setattr(module, "carry_rows", shift)
    with pytest.raises(OutputError, match=r"blk\.3\.ffn_up\.weight reads back further"):
        write_gguf(folder, target, "rounded")
    assert list(target.iterdir()) == []


def test_a_second_rounding_and_a_first_that_was_none_are_refused(make, tmp_path, target):
    _, folder = make("int4")
    for name in ("q8_0", "f32"):
        with pytest.raises(CheckpointError, match=f"rounded already, and type '{name}' .* take type 'rounded'"):
            write_gguf(folder, target, name)
    with pytest.raises(CheckpointError, match="its weights are not rounded"):
        write_gguf(next(tmp_path.glob("base-*")), target, "rounded")
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "rounded by 'gptq'; allowed: 'compressed-tensors'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "keys and values"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotates"),
        ({"config_groups": {"group_0": {"targets": 5}}}, r"quantization_config\.config_groups"),
        ({"weights": {"symmetric": False}}, "asymmetric int, one scale per group"),
        ({"weights": {"type": "float"}}, "symmetric float, one scale per group"),
        ({"weights": {"num_bits": 5}}, "not stored as config.json says, 5 bits"),
        ({"weights": {"group_size": 16}}, "a scale per 16 weights"),
        ({"targets": ["re:.*mlp.*"]}, r"self_attn\.\w+\.weight is rounded, and no group"),
    ],
)
def test_what_was_rounded_otherwise_is_refused_in_a_line(change, message, make, target):
    _, folder = make("int4")
    config = json.loads((folder / "config.json").read_text())
    told = config["quantization_config"]
    group = told["config_groups"]["group_0"]
    if "weights" in change:
        group["weights"] |= change["weights"]
    elif "targets" in change:
        group |= change
    else:
        told |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as refusal:
        write_gguf(folder, target, "rounded")
    assert "\n" not in str(refusal.value) and list(target.iterdir()) == []


def test_tensors_beside_the_numbers_that_are_not_read_are_refused(make, target):
    _, folder = make("int4", embeddings="int8", tie_word_embeddings=True)
    weights = folder / "model.safetensors"
    stored = load_file(weights)
    stored["lm_head.weight_scale"] = 2 * stored["lm_head.weight_scale"]
    save_file(stored, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weight_scale is not .*, which it is tied to"):
        write_gguf(folder, target, "rounded")
    stored["lm_head.weight_scale"] = stored["model.embed_tokens.weight_scale"].clone()
    stored["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(32, dtype=torch.int32)
    save_file(stored, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="weight_g_idx has no place"):
        write_gguf(folder, target, "rounded")
