"""Why a result was made: in what it differs from the stored one that is nearest to it."""

import os

import pytest

from mka.store.manifests import MANIFEST
from mka.store.products import produce

STORED = {
    "version": 1,
    "settings": {"method": "mka", "aim": {"layers_out": 5, "protect_first": 1}, "texts": list(range(50))},
    "inputs": {"base": "d1", "scores": "d2"},
}


def make(store, stage="plan", **changes):
    return produce(store, stage, **STORED | changes, make=lambda folder: {})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"settings": STORED["settings"] | {"aim": {"layers_out": 4, "protect_first": 1}}},
            "aim.layers_out (5, now 4)",
        ),
        ({"inputs": {"base": "d1", "scores": "d3"}}, "input scores"),
        ({"version": 2}, "version of the stage (1, now 2)"),
        # What is too long to be told is named.
        ({"settings": STORED["settings"] | {"texts": [1]}}, "texts"),
        ({"settings": {"method": "mka", "aim": STORED["settings"]["aim"]}}, "texts"),
        ({"settings": STORED["settings"] | {"dtype": "float32"}}, 'dtype (nothing, now "float32")'),
        (
            {"version": 2, "inputs": {"base": "d3", "scores": "d4"}, "settings": STORED["settings"] | {"method": "x"}},
            'input base, input scores, method ("mka", now "x") and 1 more',
        ),
    ],
)
def test_it_names_the_result_and_what_is_another(tmp_path, changes, told):
    before = make(tmp_path)
    after = make(tmp_path, **changes)
    assert after.why == f"{before.folder.name}, the nearest stored, has another {told}"
    assert make(tmp_path, **changes).why == "same inputs and settings"


def test_the_nearest_is_the_one_with_fewest_differences_whenever_it_was_used(tmp_path):
    near = make(tmp_path)
    far = make(tmp_path, version=2, inputs={"base": "d3", "scores": "d4"})
    os.utime(near.folder / MANIFEST, (1, 1))
    why = make(tmp_path, version=3).why
    assert near.folder.name in why and far.folder.name not in why


def test_of_those_as_near_it_is_the_one_used_last(tmp_path):
    first, last = make(tmp_path, version=2), make(tmp_path, version=3)
    os.utime(first.folder / MANIFEST, (1, 1))
    assert last.folder.name in make(tmp_path, version=4).why


def test_results_of_other_stages_and_damaged_ones_are_no_neighbours(tmp_path):
    (make(tmp_path, "plan-b").folder / "x").mkdir()
    make(tmp_path, "score")
    damaged = make(tmp_path, version=2)
    (damaged.folder / MANIFEST).write_text("{")
    assert make(tmp_path).why == "no result of this stage is stored"
