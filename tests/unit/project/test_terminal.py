"""What is kept off the terminal, and how."""

import io
import re
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
from support.lines import split_stages

import mka
from mka.terminal import (
    REPLACED,
    quiet_libraries,
    quiet_lm_eval,
    say,
    say_stage,
    show_progress,
    showing,
    without_first_values,
)

NAMES = [name for names in REPLACED.values() for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_replaced_is_still_there_in_the_installed_library(name):
    found = resolve_name(name)
    assert callable(found) or found is re


def test_what_was_replaced_is_put_back():
    before = {name: resolve_name(name) for name in NAMES}
    with quiet_libraries(quantized=True), quiet_lm_eval(progress=False), without_first_values():
        assert all(resolve_name(name) is not before[name] for name in NAMES)
    assert {name: resolve_name(name) for name in NAMES} == before


def test_no_other_module_replaces_a_name_of_a_library():
    found = [
        path.name for path in Path(mka.__file__).parent.rglob("*.py") if "mock" in path.read_text(encoding="utf-8")
    ]
    assert found == ["terminal.py"]


class Screen(io.StringIO):
    """A stream that says it is a terminal, or that it is none."""

    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched


def run_stage(monkeypatch, watched, shown=None):
    """Let one stage show its bar and end; returns what stderr has then."""
    screen = Screen(watched)
    monkeypatch.setattr(sys, "stderr", screen)
    with showing(shown):
        with show_progress("observe", 10, "tok") as advance:
            advance(10)
        say_stage("observe", 1234.56, False, "no result of this stage is stored")
        say("by the way")
    return screen.getvalue()


LINE = "observe               1,234.6 s  computed: no result of this stage is stored\n"


def test_a_log_has_lines_and_no_bars(monkeypatch):
    assert run_stage(monkeypatch, watched=False) == f"{LINE}by the way\n"
    assert split_stages(LINE) == (["observe"], "")


def test_a_terminal_has_a_bar_with_a_rate_while_a_stage_runs_and_the_same_line_in_its_place(monkeypatch):
    drawn = run_stage(monkeypatch, watched=True)
    before, after = drawn.split("\r")[:-1], drawn.split("\r")[-1]
    assert any("10/10" in bar or "0/10" in bar for bar in before) and "tok" in drawn and "\n" not in "".join(before)
    assert after == f"{LINE}by the way\n" and not before[-1].strip()  # what was drawn is overwritten


def test_what_was_asked_for_wins(monkeypatch):
    assert run_stage(monkeypatch, watched=True, shown=False) == ""
    drawn = run_stage(monkeypatch, watched=False, shown=True)
    assert "10/10" in drawn and drawn.endswith(f"{LINE}by the way\n")


def test_what_was_reused_took_no_time(monkeypatch):
    screen = Screen(False)
    monkeypatch.setattr(sys, "stderr", screen)
    say_stage("a name that is longer than the column", 5.0, True, "same inputs\x1b[2J")
    assert screen.getvalue() == "a name that is longer than the column          –  reused: same inputs\n"
