"""A search through the stages: killed while it plans, it goes on with what it has measured."""

import json

import pytest
import yaml
from support.bench import TINY, make_bench_folder

from mka.cli.main import main
from mka.evidence.repairs import MeasuredRepairs
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import PIPELINE
from mka.pipeline.recipes import validate_recipe

SETTINGS = {"context": 16, "tokens": [32, 64], "aligned_tokens": 64, "offspring": 4, "survivors": 2, "budget": 2000}


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = make_bench_folder(tmp_path / "root")
    monkeypatch.chdir(folder)
    return folder


def make_recipe(root, **settings):
    raw = {
        "name": "tiny",
        "model": {"folder": str(root / "base")},
        "calibration": {**yaml.safe_load(TINY.read_text())["calibration"], "rev": None},
        "method": {"name": "evolution", "settings": SETTINGS | settings},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "evaluation": {"text": "heldout.jsonl", "overlap_index": None, "context": 32, "text_tokens": 128},
    }
    return validate_recipe(raw)


def compress(root, output, monkeypatch, *, work, most=None):
    """Compress in a work folder; return the plan, and how many divergences were measured until there was one."""
    monkeypatch.setenv("MKA_WORK", str(root / work))
    asked = []
    for name in ("divergence", "aligned"):
        real = MeasuredRepairs.__dict__[name]

        def measure(self, layers, *rest, real=real):
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(layers)
            return real(self, layers, *rest)

        monkeypatch.setattr(MeasuredRepairs, name, measure)
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(root).model_dump(mode="json")))
    try:
        done = main(["compress", "--recipe", str(recipe), "--output", str(root / output), "--no-evaluate", "--json"])
    except KeyboardInterrupt:
        done = 130
    finally:
        monkeypatch.undo()
        monkeypatch.chdir(root)
    plan = root / output / "evidence/plan.json"
    return done, json.loads(plan.read_text()) if plan.exists() else None, len(asked)


def journals(root, work):
    return [path.parent.name for path in (root / work / "stages").glob(".*.scratch/journal.jsonl")]


def test_a_killed_search_goes_on_and_plans_the_same(root, monkeypatch, capsys):
    done, expected, measured = compress(root, "whole", monkeypatch, work="work1")
    assert done == 0 and measured > 10
    assert expected["search"]["budget"] == 2000 >= expected["search"]["spent"]
    done, plan, first = compress(root, "out", monkeypatch, work="work2", most=7)
    assert done != 0 and plan is None and first == 7
    (journal,) = journals(root, "work2")
    assert journal.startswith(".plan-")
    done, plan, rest = compress(root, "out", monkeypatch, work="work2")
    assert done == 0 and plan == expected and rest == measured - 7
    assert journals(root, "work2") == journals(root, "work1") == []


def test_memory_is_foreseen_with_what_decides_it(root):
    (stage,) = (stage for stage in PIPELINE if stage.name == "plan")

    def foresee(**settings):
        return stage.foresee(prepare(make_recipe(root, **settings), root / "work", evaluate=False)).memory

    assert foresee(repair="none") < foresee() < foresee(aligned_tokens=128) < foresee(tokens=[32, 128])
    # (L + 1) x tokens x D x 4 bytes more to keep, where nothing is refitted.
    assert foresee(repair="none", tokens=[32, 128]) - foresee(repair="none") == (6 + 1) * 64 * 32 * 4
