"""Which failures of a task are tried again."""

import pytest

from mka.errors import CalibrationError, CheckpointError, RegistryError, UnreachableError
from tasks.base_model import is_worth_retrying


class Ended:
    """A task's final state, as far as a retry condition looks at it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def result(self):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [UnreachableError("hub"), RegistryError("registry"), ConnectionError("reset")])
def test_what_a_network_may_have_broken_is_tried_again(error):
    assert is_worth_retrying(None, None, Ended(error))


@pytest.mark.parametrize("error", [CheckpointError("damaged"), CalibrationError("empty"), None])
def test_refusals_and_successes_are_not(error):
    assert not is_worth_retrying(None, None, Ended(error))
