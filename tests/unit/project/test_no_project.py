"""Tables of a recipe where no project of DVC's is: read as they lie there, or refused with what else there is."""

from pathlib import Path

import pytest

from mka.errors import CalibrationError
from tasks.machine.workplace import Workplace
from tasks.versioned import resolve_versions


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"text": "one"}\n')
    return Workplace(tmp_path, tmp_path / "work")


@pytest.mark.parametrize("rev", [None, "HEAD"])
def test_tables_are_read_as_they_are(place, rev):
    found = resolve_versions(place, [Path("mine.jsonl")], rev)
    assert found["mine.jsonl"].rev is None and len(found["mine.jsonl"].digest) == 64


def test_a_revision_that_was_named_is_refused(place):
    with pytest.raises(CalibrationError, match=r"calibration.rev 'v1': .* no project of DVC's.* give null"):
        resolve_versions(place, [Path("mine.jsonl")], "v1")


def test_a_table_that_is_missing_names_the_text_of_the_base_and_no_make(place):
    with pytest.raises(CalibrationError, match=r"table not found: data/prepared/x.jsonl .*`base`") as refused:
        resolve_versions(place, [Path("data/prepared/x.jsonl")], "HEAD")
    assert "make" not in str(refused.value)
