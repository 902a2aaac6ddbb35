"""The one sentence that says which wins, candidate or control, and the column beside both."""

import re

import pytest

from mka.evaluation.scores import EvalReport, Score
from mka.plan.plan import MergePlan, keep_layers
from mka.report.control import describe_control, tell_against_control
from mka.report.data import ReportData
from mka.report.page import write_card, write_report
from mka.report.table import result_table


def report(layers=30, size=100.0, decode=20.0, prefill=None, texts=(("boolq", 10.0),), tasks=(), **facts):
    speed = {"decode_tokens_per_second": decode, "prefill_tokens_per_second": prefill}
    return EvalReport(
        {"layers": layers, "bytes": size * 1e6, "parameters": 1e6 * layers, "dtype": "F32", **facts},
        (
            *(Score(name, "perplexity", value, 0.1, 8, False) for name, value in texts),
            *(Score(name, "acc", value, 0.1, 40, True) for name, value in tasks),
        ),
        {name: value for name, value in speed.items() if value is not None},
        {},
        {},
    )


BASE = report(size=400.0, texts=(("boolq", 9.9),))
CONTROL = report(treatment="int8 in groups of 64")
WHO = "Against the control (same rounding, all layers kept): "


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (
            report(28, 94.0, 23.6, texts=(("boolq", 12.1),)),
            "6 % fewer bytes, decoding 1.18 times as fast, perplexity 1.21 times as high; "
            "the candidate wins on bytes and time.",
        ),
        (
            report(28, 94.0, 20.0, texts=(("boolq", 12.1),)),
            "6 % fewer bytes, decoding 1.00 times as fast, perplexity 1.21 times as high; "
            "the candidate wins on bytes, not on time.",
        ),
        (
            report(28, 103.0, 25.0, texts=(("boolq", 12.1),)),
            "3 % more bytes, decoding 1.25 times as fast, perplexity 1.21 times as high; "
            "the candidate wins on time, not on bytes.",
        ),
        (
            report(28, 100.2, 19.0, texts=(("boolq", 12.1),)),
            "the same bytes, decoding 0.95 times as fast, perplexity 1.21 times as high; "
            "the candidate wins neither bytes nor time: the control is the better choice.",
        ),
        (
            report(28, 110.0, 19.0, texts=(("boolq", 9.0),)),
            "10 % more bytes, decoding 0.95 times as fast, perplexity 0.90 times as high; "
            "the candidate wins neither bytes nor time, only quality.",
        ),
        (
            report(28, 110.0, None, texts=(("boolq", 12.1),)),
            "10 % more bytes, perplexity 1.21 times as high; "
            "the candidate wins no bytes, and nothing was timed: the control is the better choice.",
        ),
        (
            report(28, 94.0, None, texts=(("boolq", 12.1),)),
            "6 % fewer bytes, perplexity 1.21 times as high; the candidate wins on bytes.",
        ),
    ],
)
def test_which_wins(candidate, said):
    assert tell_against_control(BASE, candidate, CONTROL) == WHO + said


def test_several_texts_tasks_and_speeds():
    control = report(prefill=200.0, texts=(("a", 10.0), ("b", 20.0)), tasks=(("piqa", 0.6), ("boolq", 0.4)))
    candidate = report(
        24, 90.0, 19.6, prefill=240.0, texts=(("a", 12.0), ("b", 30.0)), tasks=(("piqa", 0.5), ("boolq", 0.4))
    )
    assert tell_against_control(BASE, candidate, control) == (
        f"{WHO}10 % fewer bytes, prefill 1.20 and decoding 0.98 times as fast, perplexity 1.20 to 1.50 times as high, "
        "mean of 2 tasks 0.90 times as high; the candidate wins on bytes and prefill, not on decoding."
    )


def test_a_control_that_is_the_base_and_what_was_not_measured():
    candidate = report(28, 372.0, 21.0, texts=(("boolq", 10.89),))
    assert tell_against_control(BASE, candidate, BASE) == (
        "Against the base, which is the control where nothing is rounded: 7 % fewer bytes, decoding 1.05 times as "
        "fast, perplexity 1.10 times as high; the candidate wins on bytes and time."
    )
    assert "control" not in result_table(BASE, candidate, BASE)[0]
    bare = EvalReport(candidate.checkpoint, (), {}, {}, {})
    for sides in ((BASE, candidate, None), (BASE, bare, bare), (None, None, None)):
        assert tell_against_control(*sides) == ""


def test_what_the_control_is():
    assert describe_control(CONTROL) == "int8 in groups of 64, all 30 layers"
    assert describe_control(report(12)) == "F32, all 12 layers"


def test_the_column_stands_between_base_and_candidate():
    candidate = report(28, 94.0, 23.6, texts=(("boolq", 12.1),))
    rows = {row["quantity"]: list(row.items())[1:] for row in result_table(BASE, candidate, CONTROL)}
    sides = ("base", "control", "candidate", "ratio")
    assert rows["size"] == list(zip(sides, ("400.0 MB", "100.0 MB", "94.0 MB", "0.235")))
    assert rows["layers"] == list(zip(sides, ("30", "30", "28", "0.933")))
    assert rows["decode speed"][1] == ("control", "20.0 tokens/s")


def test_page_and_card_show_column_meaning_and_sentence(tmp_path):
    candidate = report(28, 94.0, 23.6, texts=(("boolq", 12.1),))
    plan = MergePlan("shortgpt", "deleted", 30, keep_layers([*range(20), *range(22, 30)]), ())
    data = ReportData({"name": "tiny"}, plan, base=BASE, candidate=candidate, control=CONTROL)
    page = " ".join(re.sub(r"<[^>]+>", " ", write_report(data, tmp_path).read_text()).split())
    card = write_card(data, tmp_path).read_text()
    sentence = tell_against_control(BASE, candidate, CONTROL)
    for shown in (page, card):
        assert shown.count(sentence) == 1 and "int8 in groups of 64, all 30 layers" in shown
    assert "quantity base control candidate candidate ÷ base" in page
    assert "size 400.0 MB 100.0 MB 94.0 MB 0.235" in page
    table = card[card.index("| quantity") : card.index("± is")].strip().splitlines()
    assert table[0] == "| quantity | base | control | candidate | candidate ÷ base |"
    assert "| size | 400.0 MB | 100.0 MB | 94.0 MB | 0.235 |" in table
    assert {line.count("|") for line in table} == {6}
    # Without one, everything is as it was.
    alone = write_card(ReportData({"name": "tiny"}, plan, base=BASE, candidate=candidate), tmp_path).read_text()
    assert "| quantity | base | candidate | candidate ÷ base |" in alone and "ontrol" not in alone
