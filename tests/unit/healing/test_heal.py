"""One healing of either kind, as stage and command do it."""

import json

import pytest
import torch
from support.models import make_texts, make_tiny_model, save_model
from transformers import AutoModelForCausalLM

from mka.cli.main import main
from mka.model.checkpoint import open_checkpoint
from mka.plan.plan import MergePlan, keep_layers
from mka.transforms.merge import merge_checkpoint

KEPT = (0, 1, 3, 4, 5)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base, a cut model with its plan, and a table; the command line runs there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    base = open_checkpoint(save_model(make_tiny_model("llama", max_position_embeddings=512), tmp_path / "base"))
    plan = MergePlan("test", "", base.layers, keep_layers(KEPT), base={"digest": base.digest, "model": "base"})
    merge_checkpoint(plan, base, tmp_path / "cut")
    (tmp_path / "plan.json").write_text(plan.to_json())
    rows = [
        json.dumps({"text": text, "source": f"source {number % 2}"})
        for number, text in enumerate(make_texts(1200, seed=4))
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


ARGUMENTS = ["heal", "cut", "--base", "base", "--table", "table.jsonl", "--tokens", "2048", "--rate", "0.003"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("mode", ["distil", "local"])
def test_the_command_leaves_a_stock_folder_nearer_to_the_base(place, capsys, mode):
    given = [*ARGUMENTS, "--mode", mode, "--plan", "plan.json", "--output", "healed", "--json"]
    assert main(given) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["healing"]["mode"] == mode and facts["healing"]["best"] < facts["healing"]["start"]
    ids = torch.randint(3, 97, (8, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        base, cut, healed = (
            torch.log_softmax(load(place / name)(ids).logits, -1) for name in ("base", "cut", "healed")
        )
    apart = [float((base.exp() * (base - other)).sum(-1).mean()) for other in (cut, healed)]
    assert apart[1] < 0.95 * apart[0]
    assert not list((place / "work" / "stages").glob(".*.scratch"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--mode", "local"], "no evidence/plan.json says what its layers answer for; give --plan FILE"),
        (["--base", "cut"], "equals its base"),
        (["--tokens", "90000000"], "heal.tokens asks for 90,000,000: lower it to 8,192 or give more text"),
        (["--table", "none.jsonl"], "text table not found: none.jsonl"),
        (["--mode", "off"], "--mode off leaves nothing to do"),
        (["--rate", "1e9", "--tokens", "6144"], "lower heal.rate"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(place, capsys, changed, message):
    assert main([*ARGUMENTS, "--output", "healed", *changed]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert message in said and not (place / "healed").exists()


def test_another_plan_of_as_many_layers_is_another_healing(place, capsys):
    # What the layers answer for differs, though nothing else does: the layer behind the first, or the first itself.
    other = MergePlan("test", "", 6, keep_layers((0, 2, 3, 4, 5)))
    (place / "other.json").write_text(other.to_json())
    starts = []
    for plan in ("plan.json", "other.json"):
        assert main([*ARGUMENTS, "--mode", "local", "--plan", plan, "--output", f"by-{plan}", "--json"]) == 0
        starts.append([layer.get("before") for layer in json.loads(capsys.readouterr().out)["healing"]["layers"]])
    assert starts[0] != starts[1]


def test_a_dry_run_does_not_count_the_source_that_only_measures(place, capsys):
    given = ["compress", "base", "--layers", "5", "--method", "shortgpt", "--no-evaluate", "--dry-run", "--json"]
    assert main([*given, "--heal-tokens", "2048", "--heal-table", "table.jsonl", "--output", "small"]) == 0
    assert json.loads(capsys.readouterr().out)["healing"]["sources"] == 1


def test_a_plan_of_another_base_is_refused(place, capsys):
    save_model(make_tiny_model("llama", max_position_embeddings=512, seed=1), place / "other")
    given = [*ARGUMENTS, "--base", "other", "--plan", "plan.json", "--output", "healed"]
    assert main(given) == 2
    assert "give the base it was made of" in capsys.readouterr().err
