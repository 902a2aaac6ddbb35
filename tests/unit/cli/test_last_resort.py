"""What nobody foresaw: one line on stderr, the traceback in a file, exit code 2."""

import re
import stat
import tempfile
from importlib import import_module
from pathlib import Path

import click
import pytest

import mka.methods
from flows.cli.console import carries_out
from mka.cli.main import main
from mka.errors import MkaError
from mka.outside.printable import one_line
from mka.terminal import KEPT_TRACEBACKS

UNFORESEEN = re.compile(r"(\S+): unforeseen: (.*); traceback in (\S+); please report it\n")


def fail(error):
    def run(*_, **__):
        raise error

    return run


def end_command(program, error):
    """Let a command of production end by an exception; returns its exit code."""
    return main([], click.command()(carries_out()(fail(error))), program)


@pytest.fixture(params=["mka", "a flow"])
def end(request, monkeypatch, capsys, work):
    """Let a command fail by an exception; returns its exit code and what it said on stderr."""

    def run(error):
        if request.param == "mka":
            monkeypatch.setattr(mka.methods, "method_names", fail(error))
            code = main(["methods"])
        else:
            code = end_command("watch", error)
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return code, err

    return run


@pytest.mark.parametrize(
    "error",
    [
        TypeError("first\nsecond line"),
        RuntimeError("x" * 10_000),
        KeyError("a"),
        RecursionError(),
        ValueError("\x1b[2J"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_line_and_a_traceback_in_the_work_folder(end, work, error):
    code, line = end(error)
    assert code == 2 and line[:-1].isprintable() and len(line) < 600
    found = UNFORESEEN.fullmatch(line)
    assert found is not None and found[2].startswith(f"{type(error).__name__}: ")
    file = Path(found[3])
    assert file.parent == work.resolve() and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "Traceback (most recent call last)" in file.read_text() and "in run" in file.read_text()


def test_without_a_work_folder_it_is_in_the_temporary_one(end, work, tmp_path, monkeypatch):
    work.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Path(UNFORESEEN.fullmatch(end(TypeError("x"))[1])[3]).parent == tmp_path
    assert not work.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert end(TypeError("x"))[1].endswith("its traceback could not be written anywhere; please report it\n")


def test_passwords_are_in_neither(end, work):
    _, line = end(ValueError("cannot reach https://me:secret@example.org/x"))
    assert "https://me:***@example.org" in line
    (file,) = work.glob("*.txt")
    assert "secret" not in file.read_text()


def test_old_tracebacks_go(end, work):
    for number in range(KEPT_TRACEBACKS + 3):
        end(TypeError(str(number)))
    assert len(list(work.glob("traceback-*.txt"))) == KEPT_TRACEBACKS


def test_refusals_and_interruptions_leave_no_traceback(end, work):
    assert end(MkaError("no"))[0] == 2 and end(OSError("no"))[0] == 2
    assert end(KeyboardInterrupt())[0] == 130
    assert not list(work.iterdir())


def test_what_a_library_makes_of_an_interruption_is_one(end, work):
    error = ValueError("half closed")
    error.__context__ = KeyboardInterrupt()
    assert end(error)[0] == 130 and not list(work.iterdir())
    error.__context__ = OSError("no")
    assert end(error)[0] == 2


def test_sigterm_that_prefect_trips_over_is_an_interruption(capsys, work):
    """Its engine, ended before it knew which task it runs, raises that the task run is not set."""
    from prefect.exceptions import TerminationSignal

    error = ValueError("Task run is not set")
    error.__context__ = TerminationSignal(15)
    assert end_command("recompress", error) == 130
    assert capsys.readouterr().err == "recompress: interrupted\n" and not list(work.iterdir())


def test_what_stood_in_the_way_of_leaving_is_told(end):
    """A disk that is full is more than the ^C before it."""
    error = OSError("No space left on device")
    error.__context__ = KeyboardInterrupt()
    code, line = end(error)
    assert code == 2 and "No space left" in line


def test_servers_that_fail_meanwhile(capsys, work):
    from mlflow.exceptions import MlflowException
    from prefect.exceptions import PrefectHTTPStatusError
    from sqlalchemy.exc import OperationalError

    httpx = import_module("httpx")  # Prefect's own
    request = httpx.Request("POST", "http://127.0.0.1:4200/api/x")
    answer = httpx.Response(500, request=request)
    for error, service in (
        (httpx.ConnectError("All connection attempts failed"), "the Prefect server"),
        (PrefectHTTPStatusError("500\nInternal", request=request, response=answer), "the Prefect server"),
        (MlflowException("API request failed"), "the MLflow server"),
        (OperationalError("select 1", {}, Exception("database is locked")), "a database of MLflow or Prefect"),
    ):
        assert end_command("promote", error) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"promote: {service} failed meanwhile: ") and line.count("\n") == 1
        assert "run the same command again" in line and len(list(work.glob("traceback-*.txt"))) > 0


def test_a_refusal_is_one_printable_line_of_bounded_length():
    assert str(MkaError("a\n  b\x1b[2J")) == "a b"
    long = str(MkaError("begin" + "x" * 10_000 + "end; what to do"))
    assert len(long) == 480 and long.startswith("begin") and long.endswith("end; what to do") and " … " in long
    assert [len(one_line("x" * count, 30)) for count in (0, 29, 30, 31, 32, 33, 34, 1000)] == [0, 29, *[30] * 6]
