"""What tests of exports share."""

import pytest


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path
