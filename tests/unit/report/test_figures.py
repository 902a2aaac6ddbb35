"""The figures of a run as numbers, for machines."""

import json
import math

from mka.evaluation.scores import EvalReport, Score
from mka.report.figures import collect_figures

SPEED = {"prefill_tokens_per_second": 400.0, "decode_tokens_per_second": 20.0}


def report(nats, solved, **facts):
    windows = tuple((100 * (nats + shift), 100) for shift in (-0.2, -0.1, 0.0, 0.1, 0.2))
    scores = (
        Score("a", "perplexity", math.exp(nats), 0.5, 5, False, windows),
        Score("boolq", "acc", solved / 10, 0.1, 10, True, (1,) * solved + (0,) * (10 - solved)),
    )
    facts = {"layers": 6, "parameters": 1000, "bytes": 4000, "dtype": "F32", "path": "/somewhere"} | facts
    return EvalReport(facts, scores, SPEED, {"a prompt": "goes on"}, {"device": "cpu"})


def test_they_hold_sizes_scores_with_intervals_and_speeds_of_all_three():
    base, candidate, control = report(2.0, 8), report(2.2, 7, layers=4, bytes=900), report(2.1, 8, bytes=1000)
    figures = json.loads(json.dumps(collect_figures(base, candidate, control, seed=0)))
    assert set(figures) == {"base", "candidate", "control", "against_control"}
    ours = figures["candidate"]
    assert (ours["layers"], ours["bytes"], ours["dtype"], ours["speed"]) == (4, 900, "F32", SPEED)
    text, task = ours["scores"]
    assert (text["name"], text["metric"], text["n"], text["stderr"]) == ("a", "perplexity", 5, 0.5)
    # No resample is below the best window or above the worst one.
    assert math.exp(2.0) - 1e-9 <= text["lower"] < text["value"] < text["upper"] <= math.exp(2.4) + 1e-9
    assert 0 <= task["lower"] < 0.7 == task["value"] < task["upper"] <= 1
    assert figures["control"]["bytes"] == 1000 and "10 % fewer bytes" in figures["against_control"]


def test_where_the_base_is_the_control_there_is_none_of_its_own():
    base = report(2.0, 8)
    assert collect_figures(base, report(2.2, 7), base, seed=0)["control"] is None
