"""Every unit test has a work folder of its own: what one made, another must not find."""

import pytest


@pytest.fixture(autouse=True)
def work(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.setenv("MKA_WORK", str(folder))
    return folder
