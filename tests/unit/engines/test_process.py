"""Programs that answer, die, hang, are killed or take too much: bounded, told in one line, nothing left behind."""

import sys
import time
from pathlib import Path

import psutil
import pytest
from support.engines import make_engine

from mka.engines import ENGINES, get_engine
from mka.engines.exchange import Request
from mka.engines.process import Bounds, run_program
from mka.errors import EngineError, EngineFault, RecipeError

MANY = 10**12


@pytest.fixture
def run(tmp_path):
    """Run a body as an engine's program, by this interpreter."""

    def start(body, seconds=60, memory=MANY, **options):
        engine = make_engine(tmp_path, body, **options)
        request = Request("model", "float32", 1, 64, 1, 1 << 20, str(tmp_path / "log"))
        return run_program(engine, Path(sys.executable), request, tmp_path, Bounds(seconds, memory))

    return start


def test_an_answer_is_read_and_memory_was_watched(run):
    answer, peak = run("time.sleep(0.5); answer()")
    assert (answer.stage, answer.error, answer.version, answer.kv_tokens) == ("run", None, "1.0", 100)
    assert peak is not None and 1e6 < peak < 1e9


def test_a_work_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    request = Request("model", "float32", 1, 64, 1, 1 << 20, str(tmp_path / "log"))
    answer, _ = run_program(
        make_engine(tmp_path, "answers"), Path(sys.executable), request, Path("work"), Bounds(60, MANY)
    )
    assert answer.version


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("has no kernel", EngineFault, "does not load the model: ValueError: Failed to find a kernel for WNA16"),
        ("fails later", EngineFault, "loads the model and fails on it: RuntimeError: shapes do not match"),
        ("dies", EngineError, "ended with code 3 and no answer; it last said: assertion failed: heads"),
        ("is killed", EngineError, "was killed by SIGKILL; a system that runs out of memory does that"),
        ("is not installed", EngineError, "No module named 'vllm'; run `make engines`"),
        ("says memory", EngineError, "ran out of memory: OutOfMemoryError: CUDA out of memory"),
        ("babbles", EngineError, "gave an answer that cannot be read"),
        ("answers nonsense", EngineError, "gave an answer that cannot be read"),
    ],
)
def test_what_goes_wrong_is_one_line_with_the_engines_own_reason(run, body, kind, said):
    with pytest.raises(kind) as caught:
        run(body)
    line = str(caught.value)
    assert line.startswith("vllm ") and said in line and "\n" not in line
    assert caught.value.exit_code == (1 if kind is EngineFault else 2)


def test_a_hanging_engine_is_ended_in_time(run):
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 3 s and was ended; it last said: compiling"):
        run("hangs", seconds=3)
    assert time.monotonic() - started < 30


def test_an_engine_that_takes_too_much_is_ended(run):
    with pytest.raises(EngineError, match=r"ran out of memory: 0\.\d GB are resident and 0\.2 allowed"):
        run("takes memory", memory=200_000_000)


def test_children_end_with_their_engine(run, tmp_path):
    run("leaves children")
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_former_answer_is_not_taken_for_the_new_one(run):
    run("answers")
    with pytest.raises(EngineError, match="code 3"):
        run("dies")


def test_a_log_may_say_better_why(run):
    with pytest.raises(EngineFault, match="does not load the model: unknown model architecture: 'x'"):
        run("says why in its log", reasons=ENGINES["llama.cpp"].reasons)


def test_programs_see_nothing_of_this_projects_path(run, monkeypatch, tmp_path):
    """Else a file named as the engine would be imported in its place."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer, _ = run("answer(version=' '.join(sys.path + [n for n in os.environ if n.startswith('PYTHON')]))")
    assert str(tmp_path) not in answer.version and "PYTHON" not in answer.version.split()


def test_an_engine_that_is_not_there_is_refused(monkeypatch, tmp_path):
    engine = get_engine("vllm")
    monkeypatch.setenv(engine.variable, str(tmp_path / "gone"))
    with pytest.raises(EngineError, match=f"vllm is not installed: {tmp_path / 'gone'} .*make engines.*--python"):
        engine.find_python()
    with pytest.raises(EngineError, match="not installed"):
        engine.find_python(tmp_path)
    assert engine.find_python(Path(sys.executable)) == Path(sys.executable).absolute()
    monkeypatch.setenv(engine.variable, sys.executable)
    assert engine.find_python() == Path(sys.executable).absolute()
    with pytest.raises(RecipeError, match=r"unknown engine 'vlm' \(did you mean 'vllm'\?\)"):
        get_engine("vlm")


def test_the_version_is_that_of_the_environment(tmp_path, monkeypatch):
    engine = make_engine(tmp_path, "answers")
    monkeypatch.setenv(engine.variable, sys.executable)
    assert engine.find_version() == pytest.__version__
    monkeypatch.setenv(engine.variable, "gone")
    assert engine.find_version() is None


def test_a_file_that_is_no_program_is_told(tmp_path):
    engine, request = (
        make_engine(tmp_path, "answers"),
        Request("m", "float32", 1, 64, 1, 1, str(tmp_path / "log")),
    )
    place = tmp_path / "python"
    place.write_text("no program")
    place.chmod(0o700)
    with pytest.raises(EngineError, match="cannot be run"):
        run_program(engine, place, request, tmp_path, Bounds(9, MANY))


def test_every_engines_program_is_there():
    for engine in ENGINES.values():
        assert engine.path.is_file()
