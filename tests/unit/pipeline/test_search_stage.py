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
from mka.plan.plan import MergePlan

SETTINGS = {"context": 16, "tokens": [32, 64], "aligned_tokens": 64, "offspring": 4, "survivors": 2, "budget": 3000}
SETTINGS |= {"finalists": 2, "heal_tokens": 64}


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
    """Compress in a work folder; return the plan, and what was measured until there was one."""
    monkeypatch.setenv("MKA_WORK", str(root / work))
    asked = []
    for name in ("divergence", "aligned", "healed"):
        real = MeasuredRepairs.__dict__[name]

        def measure(self, layers, *rest, real=real, name=name):
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append((name, layers))
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
    return done, json.loads(plan.read_text()) if plan.exists() else None, asked


def journals(root, work):
    return [path.parent.name for path in (root / work / "stages").glob(".*.scratch/journal.jsonl")]


def test_a_killed_search_goes_on_and_plans_the_same(root, monkeypatch, capsys):
    done, expected, measured = compress(root, "whole", monkeypatch, work="work1")
    assert done == 0 and len(measured) > 10
    assert expected["search"]["budget"] == 3000 >= expected["search"]["spent"]
    assert [name for name, _ in measured].count("healed") == 2 == expected["search"]["measurements"]["healed"]
    finalists = expected["search"]["finalists"]
    assert all(finalist["healed"] <= 1.01 * finalist["divergence"] for finalist in finalists)
    least = min(range(2), key=lambda place: finalists[place]["healed"])
    assert list(measured[-2:][least][1]) == list(MergePlan.load(root / "whole/evidence/plan.json").layers)
    done, plan, first = compress(root, "out", monkeypatch, work="work2", most=7)
    assert done != 0 and plan is None and len(first) == 7
    (journal,) = journals(root, "work2")
    assert journal.startswith(".plan-")
    more = len(measured) - 7 - 1  # killed again with one finalist to go
    done, plan, second = compress(root, "out", monkeypatch, work="work2", most=more)
    assert done != 0 and plan is None and second[-1][0] == "healed"
    done, plan, rest = compress(root, "out", monkeypatch, work="work2")
    assert done == 0 and plan == expected and first + second + rest == measured
    assert journals(root, "work2") == journals(root, "work1") == []
    assert not list((root / "work2" / "stages").glob(".healed-*"))


def test_memory_is_foreseen_with_what_decides_it(root):
    (stage,) = (stage for stage in PIPELINE if stage.name == "plan")

    def look(**settings):
        return stage.foresee(prepare(make_recipe(root, **settings), root / "work", evaluate=False))

    def foresee(**settings):
        return look(**{"finalists": 0, **settings}).memory

    assert foresee(repair="none") < foresee() < foresee(aligned_tokens=128) < foresee(tokens=[32, 128])
    # (L + 1) x tokens x D x 4 bytes more to keep, where nothing is refitted.
    assert foresee(repair="none", tokens=[32, 128]) - foresee(repair="none") == (6 + 1) * 64 * 32 * 4
    # A finalist's healing: float32 weights of both models, the student's with gradient and two moments, and on disk.
    base = prepare(make_recipe(root), root / "work", evaluate=False).base
    weights = sum(tensor.parameters for tensor in base.tensors.values())
    kept = weights - 2 * sum(tensor.parameters for tensor in base.layer_tensors(0).values())
    logits = 5 * 16 * 97 * 4
    entering = (6 + 1) * 64 * 32 * 4
    search = foresee(repair="none") - entering - 2 * 4 * 16 * 97
    assert look(finalists=2).memory == search + entering + 4 * weights + 4 * 4 * kept + logits
    assert look(finalists=2).disk == 4 * kept and look(finalists=0).disk == 0
