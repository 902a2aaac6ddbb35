"""What is kept off the terminal, and how."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

import mka
from mka.terminal import REPLACED, quiet_libraries, quiet_lm_eval, without_first_values

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
