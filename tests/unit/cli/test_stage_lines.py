"""What `mka compress` says while it works, and how it ends."""

import json

import pytest
from support.lines import split_stages
from support.models import make_texts
from support.project import write_rows

from mka.cli.main import main

STAGES = (
    *("observe", "score", "plan", "merge", "quantize", "control", "evaluate base", "evaluate candidate"),
    *("evaluate control", "compare speed", "gate", "report"),
)


@pytest.fixture
def arguments(llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "cal.jsonl", make_texts(60, seed=1), "words")
    write_rows(tmp_path / "held.jsonl", make_texts(60, seed=2), "words")
    made = ["compress", str(llama_folder), "--method", "mka", "--calibration", "cal.jsonl", "--samples", "60"]
    return [*made, "--text", "held.jsonl", "--context", "32", "--quantize", "int8", "--group-size", "16", "--json"]


def test_a_log_gets_a_line_per_stage_and_stdout_one_document(arguments, capsys):
    assert main([*arguments, "--layers", "5", "--output", "out"]) in (0, 1, 3)
    out, err = capsys.readouterr()
    told, rest = split_stages(err)
    assert told == list(STAGES) and not rest.removeprefix("mka: the gate ").count("mka: ") and "\r" not in err
    assert json.loads(out)["output"] == "out"
    assert main([*arguments, "--layers", "5", "--output", "again"]) in (0, 1, 3)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("mka: ")]
    # The report names the folder it is for.
    assert ["reused: same inputs and settings" in line for line in lines] == [name != "report" for name in STAGES]
    assert "report-" in lines[-1] and 'output ("out", now "again")' in lines[-1]
    assert main(["--no-progress", *arguments, "--layers", "5", "--output", "quiet"]) in (0, 1, 3)
    assert split_stages(capsys.readouterr().err)[0] == []


def test_an_undecided_gate_publishes_and_ends_with_3(arguments, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\nmodel: {folder: none}\ntarget: {layers: 4, protect_first: 1}\ngate: {perplexity_recovery: 0.999}\n"
    )
    assert main([*arguments, "--recipe", "recipe.yaml", "--output", "out"]) == 3
    out, err = capsys.readouterr()
    line = split_stages(err)[1]
    assert json.loads(out)["verdict"] == "undecided" and line.startswith("mka: the gate is undecided (perplexity words")
    assert "windows would" in line and "evidence/report.html" in line and line.count("\n") == 1
    evidence = tmp_path / "out" / "evidence"
    assert "Gate: **undecided**" in (tmp_path / "out" / "README.md").read_text() and evidence.is_dir()
    report = ["report", "--plan", evidence / "plan.json", "--base", evidence / "base.json", "--recipe", "recipe.yaml"]
    report += ["--candidate", evidence / "candidate.json", "--output", "page"]
    assert main([str(argument) for argument in report]) == 3
    assert capsys.readouterr().err.startswith("mka: the gate is undecided")
