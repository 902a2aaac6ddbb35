"""The recipe of a comparison: the grid it spans, and what it refuses."""

from pathlib import Path

import pytest
import yaml

from mka.bench.recipe import load_bench, validate_bench
from mka.errors import RecipeError

ROOT = Path(__file__).parents[3]
TINY = yaml.safe_load((ROOT / "tests/support/bench_tiny.yaml").read_text())


def test_the_grid_is_methods_in_order_then_targets_from_most_layers_then_alignment_off_first():
    methods = [
        {"name": "sleb", "targets": [3]},
        {"name": "mka", "alignment": [True, False], "label": "ours"},
        {"name": "mka", "settings": {"weights": "fixed", "weight": 0.5}},
    ]
    cells = validate_bench({**TINY, "methods": methods}).cells
    assert [(cell.row, cell.layers, cell.aligned) for cell in cells] == [
        ("sleb", 3, False),
        ("ours", 5, False),
        ("ours, aligned", 5, True),
        ("ours", 4, False),
        ("ours, aligned", 4, True),
        ("mka (weights=fixed, weight=0.5)", 5, False),
        ("mka (weights=fixed, weight=0.5)", 4, False),
    ]


def test_a_cell_is_a_plain_recipe():
    bench = validate_bench({**TINY, "methods": [{"name": "mka", "alignment": [False, True]}], "seed": 3})
    plain, aligned = (bench.recipe_for(cell) for cell in bench.cells[:2])
    assert (plain.method.name, plain.target.layers, plain.seed) == ("mka", 5, 3)
    assert (plain.target.protect_first, plain.target.protect_last) == (1, 1)
    assert not plain.alignment.enabled and aligned.alignment.enabled
    assert plain.calibration.model_dump(exclude={"rev"}) == bench.calibration.model_dump()
    assert plain.model == bench.model
    assert plain.evaluation.context == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metods": []}, "unknown key 'metods' (did you mean 'methods'?)"),
        ({"methods": [{"name": "mka", "setings": {}}]}, "'methods.0.setings' (did you mean 'settings'?)"),
        ({"evaluation": {"contxt": 32}}, "'evaluation.contxt' (did you mean 'context'?)"),
        ({"texts": [{"name": "a", "path": "a.txt", "sen": True}]}, "(did you mean 'seen'?)"),
        ({"methods": [{"name": "shortgp"}]}, "unknown method 'shortgp' (did you mean 'shortgpt'?)"),
        ({"methods": [{"name": "mka", "settings": {"weihts": 1}}]}, "(did you mean 'weights'?)"),
        ({"methods": [{"name": "mka"}, {"name": "mka"}]}, "'mka at 4' is there twice"),
        ({"methods": [{"name": "mka", "alignment": [True, True]}]}, "names the same twice"),
        ({"texts": TINY["texts"][:1] * 2}, "'words' is there twice"),
        ({"texts": [{**TINY["texts"][1], "source": "x"}]}, "a .txt file has none"),
        ({"evaluation": {"tasks": {"piqa": 5}}}, "tasks and task_targets go together"),
        ({"evaluation": {"generation": 5}}, "and so do generation and task_targets"),
        ({"evaluation": {"generation": 1, "task_targets": [5]}}, "one item has no error bar, got 1"),
        ({"evaluation": {"tasks": {"piqa": 5}, "task_targets": [2]}}, "2 is the target of no method"),
        ({"evaluation": {"text": "heldout.jsonl"}}, "'evaluation.text'"),
        # What only one recompression reads is no key of a comparison.
        ({"evaluation": {"new_tokens": 8}}, "unknown key 'evaluation.new_tokens' (did you mean 'text_tokens'?)"),
        ({"evaluation": {"prompts": ["a"]}}, "unknown key 'evaluation.prompts'"),
        ({"alignment": {"enabled": True}}, "unknown key 'alignment.enabled'"),
        ({"alignment": {"rev": None}}, "unknown key 'alignment.rev'"),
        ({"calibration": {"rev": None}}, "unknown key 'calibration.rev'"),
        ({"targets": []}, "'targets'"),
        ({"fan_out": {"engine": "ray"}}, "'fan_out.engine': Input should be 'threads' or 'dask', got 'ray'"),
        ({"fan_out": {"engine": "dask", "wrokers": 2}}, "'fan_out.wrokers' (did you mean 'workers'?)"),
        ({"fan_out": {"workers": 0}}, "'fan_out.workers'"),
        ({"fan_out": {"engine": "dask", "address": "host:8786"}}, "must be tcp://HOST:PORT or tls://HOST:PORT"),
        ({"fan_out": {"address": "tcp://host:8786"}}, "engine is 'threads'; give engine: dask"),
        ({"fan_out": {"engine": "dask", "address": "tcp://host:8786", "workers": 2}}, "exclude each other"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(RecipeError) as refusal:
        validate_bench({**TINY, **change})
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_where_cells_run_is_no_part_of_any_cell():
    """Parts are stored by what `recipe_for` returns: spreading cells out must not change a key."""
    plain, spread = (validate_bench({**TINY, **more}) for more in ({}, {"fan_out": {"engine": "dask", "workers": 4}}))
    assert plain.fan_out.engine == "threads" and plain.fan_out.workers is None
    assert [plain.recipe_for(cell) for cell in plain.cells] == [spread.recipe_for(cell) for cell in spread.cells]


def test_an_absent_or_unreadable_recipe_is_refused_in_one_line(tmp_path):
    with pytest.raises(RecipeError, match="recipe not found"):
        load_bench(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_bench(tmp_path / "list.yaml")


def test_the_recipe_on_smollm2_takes_4_7_10_and_13_layers_out_on_seen_and_unseen_text():
    bench = load_bench(ROOT / "recipes/bench_smollm2.yaml")
    assert sorted(30 - target for target in bench.targets) == [4, 7, 10, 13]
    assert {text.seen for text in bench.texts} == {True, False}
    assert bench.evaluation.text_tokens >= 8192 and bench.evaluation.context == 512
    measured = [text.path.resolve() for text in bench.texts]
    assert not {bench.calibration.path.resolve(), bench.alignment.path.resolve()} & set(measured)


def test_the_recipe_on_gemma_differs_from_that_on_smollm2_in_model_and_size_only():
    gemma, smollm2 = (load_bench(ROOT / f"recipes/bench_{name}.yaml") for name in ("gemma3", "smollm2"))
    (target,) = gemma.targets
    assert target == round(18 * 23 / 30)  # as much of it as 7 of 30
    assert [text.path for text in gemma.texts] == [text.path for text in smollm2.texts]
    # And in one row more: what a command does by itself.
    assert {entry.row for entry in gemma.methods} - {entry.row for entry in smollm2.methods} == {"one block"}
    assert [entry.name for entry in gemma.methods if entry.ours] == ["aligned", "uidl"]
    assert len(gemma.model.packages) == len(gemma.model.digests) == 5
    outputs = [path for bench in (gemma, smollm2) for path in (bench.output, bench.picture)]
    assert len(set(outputs)) == len(outputs)
