"""What the documentation shows of the library runs as it is printed."""

import re
from pathlib import Path

from support.project import Project
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[3]


def test_the_librarys_example_runs(tmp_path, monkeypatch, capsys):
    project = Project(tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    project.write_recipe(calibration__rev=None).rename(tmp_path / "recipe.yaml")
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
    exec(compile(example, "docs/library.md", "exec"), {})
    *_, layers, ratio, verdict = capsys.readouterr().out.splitlines()
    assert layers == "4 layers"
    assert float(ratio) > 0
    assert verdict in ("pass", "undecided")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").config.num_hidden_layers == 4
