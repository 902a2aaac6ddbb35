"""Folders written here mean the same to an older transformers and to the one that vLLM brings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import LAYERS, make_tiny_model, save_model

from mka.engines import ENGINES
from mka.model.checkpoint import open_checkpoint
from mka.model.config import find_reader
from mka.model.families import FAMILIES
from mka.model.stock import open_base
from mka.model.verification import verify_checkpoint
from mka.plan.plan import MergePlan, identity_layers
from mka.transforms.merge import merge_checkpoint

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
OLD = Path("build/engines/transformers")
IDS = [[1, 5, 9, 33, 7, 12, 96, 3, 44, 2, 61]]
TEXT = "w5 w6 w96"
# What a config may say that older readers have other words for.
SAID = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
}
# Python and what it finds first.
READERS = {"4.51": (Path(sys.executable), OLD), "vllm": (ENGINES["vllm"].environment, None)}


def read(reader, folder):
    python, first = READERS[reader]
    if not python.is_file() or (first and not (first / ".installed").is_file()):
        pytest.skip(f"transformers of {reader} is not installed: make engines")
    environment = {**os.environ, "PYTHONPATH": str(first.absolute()) if first else ""}
    program = str(Path(__file__).with_name("read_logits.py"))
    command = [str(python), program, str(folder), json.dumps(IDS), TEXT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[-1].removeprefix("READ "))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("reader", READERS)
def test_a_written_folder_has_the_same_logits(reader, family, tmp_path):
    base = save_model(make_tiny_model(family, **SAID.get(family, {})), tmp_path / "base")
    copies = identity_layers(LAYERS)
    plan = MergePlan("test", "", LAYERS, (copies[0], *copies[3:]))  # two: kinds of layers go on alternating
    merge_checkpoint(plan, open_base(base), tmp_path / "out", verify=verify_checkpoint)
    needed = find_reader(json.loads((tmp_path / "out/config.json").read_text()))
    if reader == "4.51" and (needed is None or tuple(map(int, needed.split("."))) > (4, 51)):
        pytest.skip(f"its card says that {family} needs {needed}")
    found = read(reader, tmp_path / "out")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(IDS), use_cache=False).logits
    assert found["keys"] == [] and open_checkpoint(tmp_path / "out").layers == LAYERS - 2
    # A word-level tokenizer is none that transformers 5 takes of a Qwen 2: it reads this base by a class of its own.
    assert family == "qwen2" or found["tokens"] == AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1  # else anything would be close
