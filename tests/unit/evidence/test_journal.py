"""What was measured once is not measured again, also after a killed search."""

import pytest

from mka.errors import OutputError
from mka.evidence.journal import Journal, RecalledRepairs
from mka.plan.plan import MergedLayer, keep_layers


class Counting:
    """Repairs that count, and whose numbers have no short decimal form."""

    def __init__(self):
        self.asked = []

    def observe(self):
        return "states"

    def divergence(self, layers, tokens):
        self.asked.append((layers, tokens))
        return 1 / 3 + tokens

    def aligned(self, layers):
        self.asked.append((layers, "aligned"))
        return 2 / 3

    def healed(self, layers):
        self.asked.append((layers, "healed"))
        return 1 / 7


A, B = keep_layers([0, 2]), (MergedLayer((0, 1), (0.25, 0.75)), *keep_layers([2]))


def test_a_journal_gives_back_every_bit_of_what_was_measured(tmp_path):
    first, second = Counting(), Counting()
    measured = RecalledRepairs(first, Journal(tmp_path / "j"))
    values = [measured.divergence(A, 16), measured.divergence(A, 32), measured.divergence(B, 16), measured.aligned(A)]
    assert [measured.healed(A), measured.healed(A)] == [1 / 7] * 2 and first.asked.pop() == (A, "healed")
    assert [measured.divergence(A, 16), measured.aligned(A)] == [values[0], values[3]]
    assert first.asked == [(A, 16), (A, 32), (B, 16), (A, "aligned")]
    again = RecalledRepairs(second, Journal(tmp_path / "j"))
    assert [again.divergence(A, 16), again.divergence(A, 32), again.divergence(B, 16), again.aligned(A)] == values
    assert again.healed(A) == 1 / 7
    assert second.asked == [] and again.observe() == "states"
    assert again.aligned(B) == 2 / 3 and second.asked == [(B, "aligned")]


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_was_cut_off_is_measured_again(left, tmp_path):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.recall("a", lambda: 1.5)
    whole = path.stat().st_size
    journal.recall("b", lambda: 2.5)
    written = path.read_bytes()
    path.write_bytes(written[: whole + left] if left > 0 else written[:left])
    again = Journal(path)
    assert again.recall("a", lambda: pytest.fail("it is there")) == 1.5
    assert again.recall("b", lambda: 3.5) == 3.5
    assert Journal(path).recall("b", lambda: pytest.fail("it is there")) == 3.5
    assert path.read_bytes().count(b"\n") == 2


def test_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "j"
    Journal(path).recall("a", lambda: 1.5)
    path.write_bytes(path.read_bytes() + b"garbage\n")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="is damaged in line 2; remove it"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"journal .* cannot be written: (Not a directory|File exists)") as refused:
        Journal(tmp_path / "file" / "j")
    assert "\n" not in str(refused.value)
