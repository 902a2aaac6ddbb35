"""`mka` killed at file-system operations of every kind, then asked again: it ends as if it had never been killed.

MKA_KILLS=200 kills more often than CI does.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from support.bench import TINY, make_bench_folder
from support.killing import draw_kills, run_killed
from support.models import make_texts, make_tiny_model, save_model

from mka.cli.main import main
from mka.model.checkpoint import open_checkpoint
from mka.store.manifests import MANIFEST

pytestmark = pytest.mark.operations

HEAL = {"tokens": 1024, "context": 32, "heldout_tokens": 256}
KILLS = int(os.environ.get("MKA_KILLS", "20"))
# Flows have the rest (test_killed_flows.py).
SHARES = {"compress": 0.3, "heal": 0.15, "bench": 0.15}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, its tables and recipes, and a merged model to heal."""
    root = make_bench_folder(tmp_path_factory.mktemp("killed"))
    save_model(make_tiny_model("llama", max_position_embeddings=512), root / "base")
    texts = enumerate(make_texts(1200, seed=4))
    mixed = [json.dumps({"text": text, "source": "two" if number % 3 == 0 else "one"}) for number, text in texts]
    (root / "mixture.jsonl").write_text("\n".join(mixed) + "\n")
    looking = yaml.safe_load(TINY.read_text())["calibration"]
    recipe = {
        "name": "tiny",
        "method": {"name": "mka"},
        "model": {"folder": str(root / "base")},
        "calibration": {**looking, "path": str(root / looking["path"]), "rev": None},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "heal": {"mode": "distil", "path": str(root / "mixture.jsonl"), "rev": None, **HEAL},
        "quantize": {"scheme": "int8", "group_size": 8},
        "evaluation": {"text": str(root / "heldout.jsonl"), "overlap_index": None, "context": 32, "text_tokens": 128},
        "gate": {"perplexity_recovery": 0.001},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    raw = yaml.safe_load(TINY.read_text()) | {"methods": [{"name": "mka"}], "targets": [4]}
    (root / "bench.yaml").write_text(yaml.safe_dump(raw))
    return root


def command(root: Path, name: str) -> list[str]:
    """What a person types."""
    if name == "compress":
        return ["mka.cli.main", "compress", "--recipe", "recipe.yaml", "--output", "out"]
    if name == "heal":
        table = ["--table", "mixture.jsonl", "--tokens", "2048"]
        return ["mka.cli.main", "heal", "merged", "--base", "base", *table, "--output", "out"]
    return ["mka.cli.main", "bench", "bench.yaml"]


def read_result(root: Path, name: str) -> object:
    """What must be the same whether it was killed or not; times and dates are left out."""
    if name == "bench":
        page = (root / "docs/benchmarks.md").read_text().partition("\n## Costs")[0]
        return [line for line in page.splitlines() if line.startswith("|")]
    return open_checkpoint(root / "out").digest


def forget(root: Path) -> None:
    for left in ("work", "out", "docs"):
        shutil.rmtree(root / left, ignore_errors=True)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SHARES)
def test_a_killed_command_ends_as_if_it_had_never_been_killed(place, name, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MKA_WORK", str(place / "work"))
    log = place / f"{name}.log"
    if name == "heal":
        cut = ["--method", "uidl", "--layers", "4", "--no-evaluate", "--output", "merged"]
        assert main(["compress", "base", *cut]) == 0

    def run(at: int | None) -> tuple[int, list[str]]:
        folders = [place / "work", place / "out", place / ".out", place / "docs"]
        return run_killed(command(place, name), folders, at, log, os.environ)

    forget(place)
    code, operations = run(None)
    assert code == 0, log.read_text()
    wanted = read_result(place, name)

    killed: Counter[str] = Counter()
    for at, kind in draw_kills(operations, max(1, round(KILLS * SHARES[name]))):
        forget(place)
        code, came_to = run(at)
        assert code == -9, f"operation {at} of {len(operations)} was not reached: {log.read_text()}"
        killed[came_to[-1]] += 1
        for manifest in (place / "work/stages").glob(f"[!.]*/{MANIFEST}"):
            body = json.loads(manifest.read_text())
            assert all((manifest.parent / file).is_file() for file in body["files"])
        assert not (place / "out").exists() or open_checkpoint(place / "out").digest == wanted
        if (place / "out").exists():  # killed after it had published
            continue
        code, _ = run(None)
        assert code == 0, f"killed at operation {at} ({kind}): {log.read_text()}"
        assert read_result(place, name) == wanted, f"killed at operation {at} ({kind})"
        assert not [f.name for f in place.glob(".out*")]
    with capsys.disabled():
        told = ", ".join(f"{count} at {kind}" for kind, count in sorted(killed.items()))
        print(f"\nmka {name}: {sum(killed.values())} kills among {len(operations)} operations: {told}")
