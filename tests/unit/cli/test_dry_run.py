"""What a run would refuse the dry run refuses, in the same words, before any stage has run."""

import json

import pytest
import yaml
from support.lines import split_stages
from support.models import make_texts, make_tiny_model, save_model
from support.project import write_rows

from mka.cli.main import main

ALIGNED = {"path": "align.jsonl", "rev": None, "tokens": 512, "context": 32}
HEALED = ALIGNED | {"heldout_tokens": 256}
RECIPE = {
    "name": "tiny",
    "method": {"name": "shortgpt"},
    "model": {"folder": "llama"},
    "calibration": {"path": "cal.jsonl", "rev": None, "samples": 60, "max_tokens": 16},
    "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
    "evaluation": {"text": "held.jsonl", "overlap_index": None, "text_tokens": 256, "context": 32, "new_tokens": 4},
    "gate": {"perplexity_recovery": 0.01},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(make_tiny_model(family), folder / family) for family in ("llama", "gemma2")]


@pytest.fixture
def ask(models, tmp_path, monkeypatch, capsys):
    """Run `mka compress` on a recipe with sections changed; returns exit code, and what was said but for stages."""
    monkeypatch.chdir(tmp_path)
    for model in models:
        (tmp_path / model.name).symlink_to(model)
    write_rows(tmp_path / "cal.jsonl", make_texts(60, seed=1), "words")
    write_rows(tmp_path / "held.jsonl", make_texts(60, seed=2), "words")
    write_rows(tmp_path / "short.jsonl", make_texts(2, seed=3), "words")
    rows = [
        json.dumps({"source": source, "text": text})
        for source, seed in (("a", 5), ("b", 6), ("c", 7))
        for text in make_texts(200, seed=seed)
    ]
    (tmp_path / "align.jsonl").write_text("\n".join(rows) + "\n")

    def run(*options, **changes):
        changed = {name: RECIPE.get(name, {}) | section for name, section in changes.items()}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changed))
        code = main(["compress", "--recipe", "recipe.yaml", "--output", "out", *options])
        return code, split_stages(capsys.readouterr().err)

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Merging leaves one layer of what protection does not keep, deletion none; of alternating kinds none merge.
        ({"method": {"name": "mka"}, "target": {"layers": 2}}, "no mergeable pair is left at 3 layers"),
        ({"target": {"layers": 1}}, "no mergeable pair is left at 2 layers"),
        ({"method": {"name": "mka"}, "model": {"folder": "gemma2"}}, "no mergeable pair is left at 6 layers"),
        ({"method": {"name": "laco"}, "target": {"layers": 2}}, "no mergeable pair is left at 3 layers"),
        (
            {"method": {"name": "replaceme"}, "target": {"layers": 1, "protect_first": 0, "protect_last": 1}},
            "no mergeable pair is left at 2 layers",
        ),
        (
            {
                "method": {"name": "aligned", "settings": {"largest": 2, "operator": "keep", "context": 32}},
                "alignment": ALIGNED | {"enabled": True},
                "target": {"layers": 3},
            },
            "no mergeable pair is left at 4 layers",
        ),
        ({"target": {"layers": 6}}, "nothing to do: all 6 layers remain (target.layers 6)"),
        ({"target": {"layers": 6}, "heal": HEALED | {"mode": "distil"}}, "nothing to do: all 6 layers remain"),
        (
            {"target": {"layers": None, "bytes": "1GB"}},
            "nothing to do: all 6 layers remain (target.bytes 1 GB)",
        ),
        (
            {"gate": {"rules": [{"metric": "tasks", "recovery": 0.5}], "perplexity_recovery": 0.9}},
            "tasks is not measured; ask for it by evaluation.tasks",
        ),
        (
            {
                "gate": {"rules": [{"metric": "perplexity", "recovery": 0.5}], "perplexity_recovery": 0.9},
                "evaluation": {"text": None, "generation": 2, "context": 64},
            },
            "perplexity is not measured; ask for it by evaluation.text",
        ),
        (
            {
                "gate": {"rules": [{"metric": "bytes", "most": "1GB"}], "perplexity_recovery": 0.9},
                "evaluation": {"text": None},
            },
            "'gate.rules' judge nothing where nothing is measured",
        ),
        ({"evaluation": {"text": "short.jsonl"}}, "make 1 windows of 32 tokens, at least 2 are needed"),
        ({"evaluation": {"text_tokens": 64, "context": 64}}, "windows of 64 tokens, at least 2 are needed"),
        ({"evaluation": {"generation": 2, "context": 16}}, "facts and a question are"),
        ({"evaluation": {"tasks": {"hellaswagg": 4}}}, "did you mean 'hellaswag'?"),
        ({"evaluation": {"tasks": {"piqa": 4}, "tasks_folder": "nowhere"}}, "task 'piqa': no table in nowhere"),
        (
            {
                "method": {"name": "aligned", "settings": {"context": 32}},
                "alignment": ALIGNED | {"enabled": True},
            },
            "windows of 32 tokens in the calibration set",
        ),
        (
            {"method": {"name": "policy_gradient", "settings": {"budget": 1000}}},
            "two rounds of 4 models, each measured on",
        ),
        (
            {"heal": HEALED | {"mode": "distil", "tokens": 512, "path": "short.jsonl"}},
            "'words' is all there is",
        ),
    ],
)
def test_the_dry_run_refuses_what_the_run_does_and_neither_begins(ask, tmp_path, work, changes, message):
    code, (_, dry) = ask("--dry-run", **changes)
    assert code == 2 and message in dry and dry.count("\n") == 1
    code, (stages, said) = ask(**changes)
    assert (code, stages, said) == (2, [], dry)
    assert not (tmp_path / "out").exists() and not list(work.glob("stages/*-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "mka"}, "target": {"layers": 3}},
        # The authors' code deletes the last layers, whatever is protected.
        {"method": {"name": "reference_code"}, "target": {"layers": 1}},
        {"target": {"layers": 2}},
        {"target": {"layers": 6}, "quantize": {"scheme": "int8", "group_size": 8}},
        {"evaluation": {"generation": 2, "context": 128, "text_tokens": 256}},
    ],
)
def test_what_it_lets_pass_runs(ask, changes):
    assert ask("--dry-run", **changes) == (0, ([], ""))
    code, (stages, said) = ask(**changes)
    assert code == 0 and stages and said == ""
