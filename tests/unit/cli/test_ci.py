"""What a job of CI gets to read: exit code, summary, outputs."""

import json
from importlib import import_module
from uuid import UUID

import pytest

from flows.ci import Run, conclude, follow
from flows.told import Told, read_told
from mka.errors import MkaError

RUN_ID = UUID(int=7)
httpx = import_module("httpx")  # Prefect's, not ours to declare
STAGES = [
    {"stage": "observe", "seconds": 1.5, "reused": False, "why": "no result yet"},
    {"stage": "merge", "seconds": 9.0, "reused": True, "why": "same inputs and settings"},
]
RESULTS = [{"": "perplexity words", "base": "10.00", "candidate": "11.00"}]


def make_run(verdict="pass", **outcome) -> Run:
    told = {"verdict": verdict, "model": "tiny", "version": "3", "address": "models:/tiny/3", **outcome}
    return Run("tiny-1", RUN_ID, "Completed", "", "http://host/runs/flow-run/7", Told(STAGES, RESULTS, told))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    return tmp_path


@pytest.mark.parametrize(("verdict", "code"), [("pass", None), ("fail", 1), ("undecided", 3)])
def test_the_verdict_decides_the_exit_code(files, verdict, code):
    made = conclude(make_run(verdict))
    assert getattr(made.refusal, "exit_code", None) == code
    assert made.document["verdict"] == verdict and made.document["results"] == RESULTS
    assert "perplexity words" in made.text and "models:/tiny/3" in made.text
    outputs = dict(line.split("=", 1) for line in (files / "output").read_text().splitlines())
    assert outputs["verdict"] == verdict and outputs["version"] == "3" and outputs["address"] == "models:/tiny/3"
    summary = (files / "summary.md").read_text()
    assert summary.startswith(f"## tiny-1: {verdict}\n")
    assert "| perplexity words | 10.00 | 11.00 |" in summary and "| observe | 1.5 | no result yet |" in summary


def test_files_are_added_to_and_what_stands_there_is_text(files):
    (files / "output").write_text("before=1\n")
    conclude(make_run(promotion="none: a | b\nverdict=forged\n<img src=x>"))
    lines = (files / "output").read_text().splitlines()
    assert lines[0] == "before=1" and [line for line in lines if line.startswith("verdict=")] == ["verdict=pass"]
    summary = (files / "summary.md").read_text()
    assert "<img" not in summary and "a \\| b" in summary
    assert not any(line.startswith("verdict=") for line in summary.splitlines())


def test_a_run_that_ended_before_its_gate_is_a_refusal_with_its_message(files):
    run = Run("tiny-1", RUN_ID, "Crashed", "worker was\nkilled", None, Told(STAGES[:1], [], {}))
    with pytest.raises(MkaError, match="tiny-1 ended as Crashed before the gate spoke: worker was killed") as refused:
        conclude(run)
    assert refused.value.exit_code == 2
    assert "state=Crashed" in (files / "output").read_text()
    assert "## tiny-1: Crashed" in (files / "summary.md").read_text()


class Server:
    """A stand-in of Prefect's client: states that a run goes through, and what it has told by then."""

    def __init__(self, *answers):
        self.answers, self.asked = answers, 0

    def read_flow_run(self, run_id):
        from types import SimpleNamespace as Namespace

        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        name, self.stages = answer
        state = Namespace(name=name, message="", is_final=lambda: name in ("Completed", "Refused"))
        return Namespace(name="tiny-1", state=state)

    def read_artifacts(self, artifact_filter):
        from types import SimpleNamespace as Namespace

        assert artifact_filter.flow_run_id.any_ == [RUN_ID]
        return [Namespace(key="stages", data=json.dumps(self.stages)), Namespace(key="tiny-similarity", data="data:")]


def test_each_stage_is_told_once_and_a_server_that_was_away_is_waited_for(monkeypatch):
    monkeypatch.setattr("flows.ci.POLL_SECONDS", 0)
    request = httpx.Request("GET", "http://host")
    starting, gone = (httpx.HTTPStatusError("", request=request, response=httpx.Response(n)) for n in (503, 404))
    away = httpx.ConnectError("away")
    server = Server(("Scheduled", []), ("Late", []), away, starting, ("Running", STAGES[:1]), ("Completed", STAGES))
    lines = []
    run = follow(server, RUN_ID, None, lines.append)
    assert run.state == "Completed" and run.told.stages == STAGES
    late, observe, merge = lines
    assert "no worker has taken it yet" in late
    assert observe.split() == ["observe", "1.5", "s", "computed:", "no", "result", "yet"]
    assert merge.split()[:3] == ["merge", "–", "reused:"]
    with pytest.raises(httpx.HTTPStatusError):
        follow(Server(gone), RUN_ID, None, lines.append)


def test_a_run_that_told_nothing_reads_as_nothing():
    server = Server(("Running", []))
    server.read_flow_run(RUN_ID)
    assert read_told(server, RUN_ID) == Told()
