"""A small project folder: a tiny model, tables and a recipe."""

import json
from pathlib import Path

import torch
import yaml

from support.models import make_texts, make_tiny_model, save_model


def write_rows(path: Path, texts: list[str], source: str) -> Path:
    rows = [json.dumps({"source": source, "text": text}) for text in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


class Project:
    """A tiny model, tables and a recipe in one folder, with a work folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.work = folder / "work"
        self.base = save_model(make_tiny_model("llama"), folder / "base")
        self.calibration = write_rows(folder / "calibration.jsonl", make_texts(60, seed=1), "words")
        self.heldout = write_rows(folder / "heldout.jsonl", make_texts(60, seed=2), "words")

    write_rows = staticmethod(write_rows)

    def recipe(self, **changes) -> dict:
        recipe = {
            "name": "tiny",
            "method": {"name": "mka"},
            "model": {"folder": str(self.base)},
            "calibration": {"path": str(self.calibration), "rev": None, "samples": 60, "max_tokens": 16},
            "target": {"layers": 5, "protect_first": 1, "protect_last": 1},
            "quantize": {"scheme": "int8", "group_size": 16},
            "evaluation": {
                "text": str(self.heldout),
                "overlap_index": None,
                "text_tokens": 256,
                "context": 32,
                "prompts": ["w5 w6 w7"],
                "new_tokens": 4,
            },
            "gate": {"perplexity_recovery": 0.01},
        }
        for dotted, value in changes.items():
            node = recipe
            *parents, key = dotted.split("__")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = value
        return recipe

    def write_recipe(self, **changes) -> Path:
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(self.recipe(**changes)), encoding="utf-8")
        return path

    def run(self, **changes) -> int:
        """Run the command line's main in this process; return its exit code."""
        from flows.recompress import main

        return main([str(self.write_recipe(**changes))])

    def teach_base_its_own_text(self) -> None:
        """Hold out what a sharpened base writes itself, window by window, so that losing layers costs it dearly."""
        model = make_tiny_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(20.0)
        save_model(model, self.base)
        torch.manual_seed(0)
        start = torch.randint(3, 97, (12, 1))
        options = {"do_sample": True, "top_k": 0, "suppress_tokens": [0, 1, 2], "pad_token_id": 0}
        written = model.generate(start, max_new_tokens=31, min_new_tokens=31, **options)
        self.write_rows(self.heldout, [" ".join(f"w{token}" for token in row) for row in written.tolist()], "words")

    @property
    def client(self):
        """MLflow client on the store that runs use."""
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.work / 'mlflow.db'}")

    @property
    def last_run(self) -> dict:
        return json.loads((self.work / "last_run.json").read_text())
