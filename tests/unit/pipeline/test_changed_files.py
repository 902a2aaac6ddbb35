"""Files that change while a run uses them: what was made of them is not kept, and nothing of it is published."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.bench import TINY, make_bench_folder

from mka.errors import StoreError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.compress import compress
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import PIPELINE
from mka.pipeline.recipes import validate_recipe
from mka.pipeline.stage import Stage
from mka.store.manifests import MANIFEST
from mka.store.products import produce, reading
from mka.terminal import showing

LOOKING = yaml.safe_load(TINY.read_text())["calibration"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def delete(file: Path) -> None:
    file.unlink()


def put_beside(file: Path) -> None:
    (file.parent / "added.safetensors").write_bytes(file.read_bytes())


# What is harmed, and after which stage.
MOMENTS = (
    ("observe", "observe"),
    ("score", "score"),
    ("plan", "plan"),
    ("merge", "merge"),
    ("quantize", "quantize"),
    ("quantize", "evaluate candidate"),
    ("quantize", "gate"),
    ("quantize", "report"),
    ("control", "control"),
    ("report", "report"),
    ("evaluate", "evaluate candidate"),
    ("evaluate", "compare speed"),
    ("base", "observe"),
    ("base", "merge"),
    ("base", "evaluate candidate"),
    ("base", "report"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which one run was made to its end, its recipe, and the digest of what it published."""
    root = make_bench_folder(tmp_path_factory.mktemp("changed"))
    raw = {
        "name": "tiny",
        "method": {"name": "mka"},
        "model": {"folder": str(root / "base")},
        "calibration": {**LOOKING, "path": str(root / LOOKING["path"]), "rev": None},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "quantize": {"scheme": "int8", "group_size": 8},
        "evaluation": {"text": str(root / "heldout.jsonl"), "overlap_index": None, "context": 32, "text_tokens": 128},
        "gate": {"perplexity_recovery": 0.001},
    }
    recipe = validate_recipe(raw)
    with showing(False):
        compress(prepare(recipe, root / "work"), root / "work/stages", root / "out", tell=lambda name, product: None)
    return root, recipe, open_checkpoint(root / "out").digest


def list_results(root: Path) -> dict[str, Path]:
    """Return stage -> folder; the three evaluations are told apart by nothing and left out."""
    found = sorted(f for f in (root / "work/stages").iterdir() if (f / MANIFEST).exists())
    return {f.name.rpartition("-")[0]: f for f in found if not f.name.startswith("evaluate-")}


def rerun(root, recipe, store, output, monkeypatch, *, after, harm):
    """Compress, doing harm when a stage is done."""
    produce_stage = Stage.produce

    def produce_then_harm(self, *args, **options):
        product = produce_stage(self, *args, **options)
        if self.name == after:
            harm()
        return product

    monkeypatch.setattr(Stage, "produce", produce_then_harm)
    with showing(False):
        compress(prepare(recipe, root / "work"), store, output, tell=lambda name, product: None)


@pytest.mark.parametrize(
    ("stage", "after", "change"),
    [(*moment, (flip, truncate, delete, put_beside)[(place + place // 4) % 4]) for place, moment in enumerate(MOMENTS)],
)
def test_what_changes_during_a_run_ends_it_before_anything_is_published(
    finished, tmp_path, monkeypatch, stage, after, change
):
    root, recipe, digest = finished
    store, output = tmp_path / "stages", tmp_path / "out"
    shutil.copytree(root / "work/stages", store)
    # Everything up to `after` is there; what comes later is made, so that it reads.
    names = [s.name for s in PIPELINE]
    for later in PIPELINE[names.index(after) + 1 :]:
        for folder in store.glob(f"{later.stored or later.name}-*"):
            if later.stored != "evaluate":
                shutil.rmtree(folder)
    base, kept = root / "base", tmp_path / "base"
    shutil.copytree(base, kept)

    def harm() -> None:
        if stage == "base":
            change(base / "model.safetensors")
            return
        for folder in store.glob(f"{stage}-*"):
            files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
            change(max(files, key=lambda file: (file.suffix == ".safetensors", file.name == "README.md", file.name)))

    try:
        with pytest.raises(StoreError) as refused:
            rerun(root, recipe, store, output, monkeypatch, after=after, harm=harm)
    finally:
        shutil.rmtree(base)
        shutil.copytree(kept, base)
    assert "\n" not in str(refused.value)
    assert not output.exists()
    monkeypatch.undo()
    # The same call then makes again what was harmed, and ends where an undisturbed run does.
    with showing(False):
        compress(prepare(recipe, root / "work"), store, output, tell=lambda name, product: None)
    assert open_checkpoint(output).digest == digest


def test_a_result_measured_on_files_that_changed_meanwhile_is_not_stored(tmp_path):
    first = produce(
        tmp_path, "merge", version=1, settings={}, inputs={}, make=lambda f: (f / "w").write_text("1") and {}
    )

    def measure(folder):
        read = (first.open() / "w").read_text()
        (first.folder / "w").write_text("2")
        return {"read": read}

    with pytest.raises(StoreError, match="has changed since stage 'merge' wrote it"):
        produce(tmp_path, "evaluate", version=1, settings={}, inputs={"m": first.digest}, make=measure)
    assert not list(tmp_path.glob("evaluate-*"))


def test_what_nobody_opens_may_be_gone(tmp_path):
    first = produce(
        tmp_path, "merge", version=1, settings={}, inputs={}, make=lambda f: (f / "w").write_text("1") and {}
    )
    shutil.rmtree(first.folder)
    with reading():
        assert first.digest and first.facts == {}
    with pytest.raises(StoreError, match="is gone"):
        first.open()


def test_a_manifest_that_was_edited_is_not_believed(tmp_path):
    def make():
        return produce(tmp_path, "gate", version=1, settings={}, inputs={}, make=lambda folder: {"verdict": "fail"})

    manifest = make().folder / MANIFEST
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"facts": {"verdict": "pass"}}))
    again = make()
    assert (again.reused, again.facts["verdict"], again.why) == (
        False,
        "fail",
        "the stored result's manifest is damaged",
    )
