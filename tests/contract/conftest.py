"""A tiny model of every family and some texts, made once per module."""

import pytest
from support.models import FAMILY_NAMES, make_texts, make_tiny_model


@pytest.fixture(scope="module")
def models():
    return {family: make_tiny_model(family) for family in FAMILY_NAMES}


@pytest.fixture(scope="module")
def texts():
    return make_texts(40, seed=1)
