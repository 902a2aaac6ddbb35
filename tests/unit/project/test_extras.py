"""What an extra brings is asked for by name where it is not installed."""

import pytest

from mka.cli.main import main
from mka.errors import EXTRAS, ExtraError, explain_missing, require_extra


def test_an_extra_that_is_there_is_no_refusal():
    for extra in EXTRAS:
        require_extra(extra, "this")


def test_one_that_is_not_is_named_with_what_is_missing(monkeypatch):
    monkeypatch.setitem(EXTRAS, "flow", ("json", "no_such_library"))
    with pytest.raises(ExtraError, match=r"a run needs no_such_library, .*pip install 'mka-compress\[flow\]'"):
        require_extra("flow", "a run")
    require_extra("flow", "a part of it", ["json"])


def test_a_folder_of_that_name_is_no_library(monkeypatch, tmp_path):
    (tmp_path / "no_such_library").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXTRAS, "flow", ("no_such_library",))
    with pytest.raises(ExtraError, match="no_such_library"):
        require_extra("flow", "a run")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 'lm_eval.api'", name="lm_eval.api"), "mka-compress[eval]"),
        (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), None),
        (ModuleNotFoundError("No module named None"), None),
        (ImportError("cannot import name", name="lm_eval"), None),
    ],
)
def test_an_import_that_fails_is_explained_where_an_extra_would_help(error, expected):
    found = explain_missing(error)
    assert (found is None) if expected is None else (expected in str(found))


def test_a_command_that_meets_it_says_one_line_and_keeps_no_traceback(work, monkeypatch, capsys, llama_folder):
    def lacks(*_):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr("mka.export.get_export", lacks)
    assert main(["export", str(llama_folder), "--format", "gguf", "--output", str(work / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "mka: this needs gguf, which is not installed; pip install 'mka-compress[gguf]' brings it"
    assert list(work.iterdir()) == []
