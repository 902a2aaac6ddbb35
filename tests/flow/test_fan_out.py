"""Cells on worker processes of Dask: the figures of threads, each part made once, and workers that die."""

import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.bench import make_bench_folder, write_absolute_recipe

from mka.bench.prepare import prepare
from mka.bench.recipe import load_bench
from mka.cli.main import main as run_command
from mka.errors import EXTRAS, RecipeError
from tasks.sweep import fan_out
from tasks.sweep.sent_bench import open_bench, send_bench

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]
DASK = {"engine": "dask", "workers": 2}
WITNESS = Path(__file__).parents[1] / "support/witness.py"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(make_bench_folder(tmp_path))
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    return tmp_path


@pytest.fixture
def one_thread():
    """Each of two workers gets half of what this process has: alike for all, so that figures are alike to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def watch_workers(root, monkeypatch):
    """Return a function that names the candidates whose workers die, and how often; see tests/support/witness.py."""
    import dask
    import distributed  # noqa: F401  its defaults have to be there, else dask.config.set takes them away again

    monkeypatch.setenv("MKA_WITNESS", str(root))

    def watch(deadly, **config):
        (root / "deadly.json").write_text(json.dumps(deadly))
        return dask.config.set({"distributed.worker.preload": [str(WITNESS)], **config})

    return watch


def read_figures(recipe, capsys):
    capsys.readouterr()
    assert run_command(["bench", str(recipe), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = [(cell["row"], cell["layers"], cell["scores"], cell["checkpoint"]["digest"]) for cell in document["cells"]]
    return rows, document["base"]["scores"], document["conditions"]


def test_two_workers_of_which_one_is_killed_find_what_threads_find(
    root, one_thread, watch_workers, capsys, monkeypatch
):
    """Killed with a candidate half done and its locks held; another worker then does that cell."""
    from flows.sweep import main

    monkeypatch.setenv("MKA_WORK", str(root / "alone"))
    recipe = write_absolute_recipe(root)
    assert main([str(recipe), "--workers", "2"]) == 0
    text = capsys.readouterr().out
    expected = read_figures(recipe, capsys)

    monkeypatch.setenv("MKA_WORK", str(root / "work"))
    before = dict(os.environ)
    recipe = write_absolute_recipe(root, fan_out=DASK)
    with watch_workers({"mka at 4": 1}):
        assert main([str(recipe)]) == 0
    said = capsys.readouterr()
    assert said.out == text and len(said.err.strip().splitlines()) >= 5
    assert dict(os.environ) == before
    assert (root / "mka at 4 died 0").exists()

    made = [line.split() for line in (root / "made.txt").read_text().splitlines()]
    assert set(Counter(part for _, part in made).values()) == {1}
    candidates = [worker for worker, part in made if part.startswith("bench-facts")]
    assert len(candidates) == 4 and set(candidates) == {"0", "1"}
    assert not list((root / "work/bench").glob("[!.]*"))

    everything = sorted(path.name for path in (root / "work/stages").glob("*-*"))
    assert read_figures(recipe, capsys) == expected
    # `mka bench` reads what is stored under the same keys, whatever the recipe says about workers.
    assert sorted(path.name for path in (root / "work/stages").glob("*-*")) == everything


def test_a_cell_that_always_kills_its_worker_is_one_line_and_the_same_command_resumes(root, watch_workers, capsys):
    from flows.sweep import main

    recipe = write_absolute_recipe(root, methods=[{"name": "mka"}], fan_out=DASK)
    with watch_workers({"mka at 5": 9}, **{"distributed.scheduler.allowed-failures": 0}):
        assert main([str(recipe)]) == 1
    said = capsys.readouterr()
    line = "mka at 5 failed: worker processes that died while they had it: 1; out of memory?"
    assert line in said.out
    assert said.err.splitlines()[-1].startswith("sweep: 1 of 2 cells failed unexpectedly; first mka at 5: worker")
    assert len(list((root / "work/stages").glob("bench-facts-*"))) == 1

    recipe = write_absolute_recipe(root, methods=[{"name": "mka"}])
    assert main([str(recipe)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[0].split() == ["base", "stored"] and [line.split()[:2] for line in lines[1:]] == [["1/1", "mka"]]


def test_what_cannot_fan_out_is_one_line_before_anything_is_computed(root, capsys, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.sweep import main

    def refuse(*arguments, **section):
        assert main([str(write_absolute_recipe(root, fan_out=section)), *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("sweep: ")
        return line

    elsewhere = {"engine": "dask", "address": "tcp://127.0.0.1:9"}
    assert "has its own workers; leave one of the two out" in refuse("--workers", "2", **elsewhere)
    monkeypatch.setattr(fan_out, "CONNECT_SECONDS", 1)
    line = refuse(**elsewhere)
    assert "Dask scheduler tcp://127.0.0.1:9 (fan_out.address) does not answer: " in line and "`dask scheduler`" in line
    with temporary_settings({PREFECT_API_URL: None}):
        assert "set PREFECT_API_URL to a server that they reach" in refuse(**elsewhere)
    monkeypatch.setitem(EXTRAS, "dask", ("no_such_library",))
    line = refuse(engine="dask")
    assert "no_such_library, which is not installed; pip install 'mka-compress[dask]' brings it" in line
    assert main([str(write_absolute_recipe(root)), "--workers", "2"]) == 0  # threads need no extra


def test_what_is_sent_is_small_and_whoever_opens_it_has_to_find_the_same(root, monkeypatch):
    from mka.bench.cells import measure_base

    recipe = load_bench(write_absolute_recipe(root, methods=[{"name": "mka"}]))
    bench = prepare(recipe, root / "work")
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(bench)
    sent = send_bench(recipe, bench)
    body = pickle.dumps((sent, recipe.cells[0]))
    assert len(body) < 10_000
    sent, cell = pickle.loads(body)  # noqa: S301
    assert cell == recipe.cells[0]

    with pytest.raises(RecipeError, match=r"there is no such folder; all workers must share the sweep's work folder"):
        open_bench(sent)
    (root / "work/stages").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"no measurements of the base; all workers must share"):
        open_bench(sent)
    measure_base(bench)
    opened = open_bench(sent)
    assert open_bench(pickle.loads(pickle.dumps(sent))) is opened and opened is not bench  # noqa: S301
    assert [part.part("text", {}, {}).key for part in (opened, bench)] == [bench.part("text", {}, {}).key] * 2

    with pytest.raises(RecipeError, match=r"another model or other texts than the sweep"):
        open_bench(replace(sent, digest="0" * 64))
    with (root / "prose.txt").open("a") as prose:
        prose.write("\n\nw3 w4")
    with pytest.raises(RecipeError, match=r"another model or other texts than the sweep"):
        open_bench(sent)
