"""`mka tasks`: names, what they are asked on, whether they can be run here."""

import json

import pytest
from support.task_tables import define

from mka.cli.main import main


@pytest.fixture
def listed(capsys, tmp_path):
    def run(*arguments, code=0):
        assert main(["tasks", "--tasks-folder", str(tmp_path), *arguments]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


def test_a_task_is_found_by_its_name_with_what_is_known_of_it(listed, tmp_path):
    (row,) = (row for row in json.loads(listed("gsm8k", "--json"))["tasks"] if row["name"] == "gsm8k")
    assert (row["kind"], row["output_type"], row["data"]) == ("task", "generate_until", "openai/gsm8k:main")
    assert row["runs"].startswith("safe; its data are not")
    found = {row["name"]: row for row in json.loads(listed("*", "--json"))["tasks"]}
    assert len(found) > 10_000
    assert found["humaneval"]["runs"].startswith("no: ") and found["mmlu_stem"]["kind"] == "group"
    (tmp_path / "piqa.jsonl").write_text("{}")
    (row,) = json.loads(listed("piqa", "--json", "--runs"))["tasks"]
    assert (row["name"], row["data"], row["runs"]) == ("piqa", f"tables in {tmp_path}", "yes")


def test_ones_own_are_among_them(listed, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.jsonl").write_text("{}")
    define(folder, "zzmine")
    text = listed("zzmine", "--include-path", str(folder))
    assert text.splitlines()[0].split()[:2] == ["task", "kind"]
    assert "zzmine" in text and "own task" in text and "mine.jsonl" in text and "yes" in text


def test_many_are_cut_and_none_is_answered_with_the_nearest(listed):
    text = listed("mmlu*")
    assert len(text.splitlines()) < 70 and "in all; narrow the pattern" in text
    assert "did you mean 'gsm8k'" in listed("gsm8kk", code=2)
