"""A tiny comparison: model and texts in a folder, for the recipe bench_tiny.yaml."""

import json
from pathlib import Path

import yaml

from support.models import make_texts, make_tiny_model, save_model

TINY = Path(__file__).parent / "bench_tiny.yaml"


def make_bench_folder(folder: Path) -> Path:
    """Write what the tiny recipe names; returns the folder."""
    save_model(make_tiny_model("llama"), folder / "base")
    for number, name in enumerate(("calibration", "heldout", "alignment")):
        rows = [json.dumps({"text": text, "source": "words"}) for text in make_texts(60, seed=number)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "prose.txt").write_text("\n\n".join(make_texts(60, seed=7)))
    return folder


def write_bench_recipe(folder: Path, **changes) -> Path:
    """Write the tiny recipe, changed, into its folder."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(TINY.read_text()), **changes}))
    return path


def write_absolute_recipe(folder: Path, **changes) -> Path:
    """Write it for the sweep flow, which starts relative paths at the project's root."""
    tiny = yaml.safe_load(TINY.read_text()) | {"output": str(folder / "page.md"), "picture": None}
    tiny["model"] = {"folder": str(folder / "base")}
    tiny["calibration"]["path"] = str(folder / "calibration.jsonl")
    tiny["texts"] = [{**text, "path": str(folder / text["path"])} for text in tiny["texts"]]
    return write_bench_recipe(folder, **{**tiny, **changes})
