"""The table of what vLLM runs on a CPU is true: every row's tiny model is loaded there, or refused as the row says."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from support.models import make_tiny_model, save_model
from transformers import AutoModelForCausalLM

from mka.kernels import EMBEDDINGS, VLLM_CPU, list_rows
from mka.model.checkpoint import open_checkpoint
from mka.recipe import QuantizeSettings
from mka.transforms import SCHEMES
from mka.transforms.rtn import quantize_checkpoint

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build/engines/vllm/bin/python"
PROMPT = [3, 17, 45, 60, 9]
# What it says of a row that does not load.
SAID = {
    "int8": "Failed to find a kernel that can implement the WNA16 linear layer",
    # It asserts that whole numbers stored as bytes have rounded inputs, and says no more than that.
    EMBEDDINGS: "assertion_error",
}
# Sizes for which it has attention on a CPU, and matrix products in 4 bits.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM; make engines installs it"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = make_tiny_model("llama", dtype=torch.bfloat16, **SIZES, **HEADS)
    return save_model(model, tmp_path_factory.mktemp("engines") / "base")


def write(base, folder, scheme, embeddings="off"):
    settings = QuantizeSettings(scheme=scheme, group_size=32, embeddings=embeddings)
    return quantize_checkpoint(open_checkpoint(base), folder, settings) or folder


def generate(folder, tokens=6):
    program = str(Path(__file__).with_name("generate_in_vllm.py"))
    return subprocess.run(
        [str(PYTHON), program, str(folder), "bfloat16", json.dumps(PROMPT), str(tokens)],
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.mark.parametrize("row", list_rows(VLLM_CPU.serve_on), ids=lambda row: row.scheme)
def test_a_row_is_what_happens(row, base, tmp_path):
    """Where it loads, the first token's log-probabilities are stock's, to what bfloat16 and rounding leave of them.

    bfloat16 keeps 8 bits: 0.4 % of a value at every step, of which the engine takes others than stock does. Log-
    probabilities of this model span some 0.5, so that 0.05 is ten such steps of the largest, and a tenth of the span.
    """
    folder = base
    if row.scheme != "off":
        asked = {"scheme": "w8a8", "embeddings": "int8"} if row.scheme == EMBEDDINGS else {"scheme": row.scheme}
        folder = write(base, tmp_path / "out", **asked)
    done = generate(folder)
    if not row.loads:
        assert done.returncode != 0 and SAID[row.scheme] in done.stdout + done.stderr, done.stderr[-2000:]
        return
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MADE "))
    made = json.loads(line.removeprefix("MADE "))
    assert len(made["tokens"]) == 6
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = stock(torch.tensor([PROMPT]), use_cache=False).logits[0, -1].float().log_softmax(-1)
    found = {int(token): value for token, value in made["first"].items()}
    assert len(found) >= 10
    assert max(abs(value - float(expected[token])) for token, value in found.items()) < 0.05
    assert float(expected.max() - expected[made["tokens"][0]]) < 0.05


@pytest.mark.parametrize("embeddings", ["off", "int8"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_written_config_parses_in_the_engines_compressed_tensors(scheme, embeddings, base, tmp_path):
    """The engine has another release than the one that wrote it."""
    config = json.loads((write(base, tmp_path / "out", scheme, embeddings) / "config.json").read_text())
    program = (
        "import json, sys; from compressed_tensors.quantization import QuantizationConfig as Q; "
        "c = json.load(sys.stdin); unknown = ('version', 'sparsity_config', 'transform_config'); "
        "q = Q.model_validate({k: v for k, v in c.items() if k not in unknown}); "
        "print(json.dumps([[g.weights.num_bits, str(g.format)] for g in q.config_groups.values()]))"
    )
    told = {"input": json.dumps(config["quantization_config"]), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([str(PYTHON), "-c", program], **told)
    assert done.returncode == 0, done.stderr[-2000:]
    groups = json.loads(done.stdout.strip().splitlines()[-1])
    assert groups[-1][0] == SCHEMES[scheme].bits and len(groups) == (2 if embeddings == "int8" else 1)
