"""The project as a whole: the lock agrees with pyproject.toml, imports are declared, no folder shadows a package."""

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("mka", "tasks", "flows")
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, UV = CONFIGURATION["project"], CONFIGURATION["tool"]["uv"]
# What a room imports beside the library's own dependencies, only where it is asked for.
ROOM_EXTRAS = {"mka": ("eval", "gguf", "sign"), "tasks": ("flow", "dask"), "flows": ("flow",)}
LOCK_LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
LOCK = [Requirement(line) for line in LOCK_LINES]
# What runs in environments of engines and rivals, which have nothing of ours.
PROGRAMS = {*(ROOT / "mka/engines/programs").glob("*.py"), *(ROOT / "tests/engines").glob("generate_*.py")}
PROGRAMS.add(ROOT / "benchmarks/llmcompressor_gptq.py")
EXTRA_REQUIREMENTS = {
    # What `all` holds are other extras.
    name: [Requirement(text) for text in texts if not text.startswith(PROJECT["name"])]
    for name, texts in PROJECT["optional-dependencies"].items()
}
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
REQUIREMENTS += [requirement for extra in EXTRA_REQUIREMENTS.values() for requirement in extra]
# Where the lock has to hold: what requires-python allows, on Linux and macOS.
PLATFORMS = [
    {
        "python_version": python,
        "python_full_version": full,
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": machine,
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for python, full in (("3.11", "3.11.2"), ("3.11", "3.11.9"), ("3.12", "3.12.1"), ("3.13", "3.13.0"))
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


def pins_on(platform: dict[str, str]) -> dict[str, list[str]]:
    """Versions the lock pins of each package on one platform."""
    pins: dict[str, list[str]] = {}
    for entry in LOCK:
        if entry.marker is None or entry.marker.evaluate({**default_environment(), **platform}):
            [specifier] = entry.specifier
            pins.setdefault(canonicalize_name(entry.name), []).append(specifier.version)
    return pins


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: f"{p['python_full_version']}-{p['sys_platform']}")
def test_lock_satisfies_pyproject(platform):
    pins = pins_on(platform)
    assert [name for name, versions in pins.items() if len(versions) != 1] == []
    wanting = [
        f"{requirement} (locked: {', '.join(pins.get(canonicalize_name(requirement.name), ['nothing']))})"
        for requirement in REQUIREMENTS
        if not any(
            requirement.specifier.contains(version, prereleases=True)
            for version in pins.get(canonicalize_name(requirement.name), [])
        )
    ]
    assert wanting == [], "requirements.lock does not meet pyproject.toml; run `make lock`"


def test_every_lock_line_is_one_exact_version_and_nothing_else():
    """No hashes, URLs, paths, options: plain pip decides where from, and which build of torch."""
    pattern = re.compile(r"[a-z0-9][a-z0-9-]*==[A-Za-z0-9.!]+( ; [a-zA-Z0-9_'\".<>=!() -]+)?")
    assert [line for line in LOCK_LINES if not pattern.fullmatch(line)] == []
    [torch] = [entry for entry in LOCK if entry.name == "torch"]
    assert torch.url is None and torch.marker is None
    assert UV["constraint-dependencies"] == [str(torch)]
    assert [f"{entry['name']}=={entry['version']}" for entry in UV["dependency-metadata"]] == [str(torch)]
    assert [entry.name for entry in LOCK if re.match(r"nvidia|cuda|triton|pytorch-triton", entry.name)] == []
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|--[a-z]|/", text)


def test_every_import_is_declared():
    """What a module imports, pyproject.toml names; a dependency of a dependency may go away."""
    providers = importlib.metadata.packages_distributions()
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    optional = {
        name: {canonicalize_name(requirement.name) for requirement in requirements}
        for name, requirements in EXTRA_REQUIREMENTS.items()
    }
    everything = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    undeclared = []
    shared = {"benchmarks", "support"}
    rooms = {room: core.union(*(optional[extra] for extra in extras)) for room, extras in ROOM_EXTRAS.items()}
    rooms |= dict.fromkeys(("tests", "benchmarks"), everything)
    for room, declared in rooms.items():
        for path in sorted(set((ROOT / room).rglob("*.py")) - PROGRAMS):
            for name in sorted(imported_packages(path) - sys.stdlib_module_names - {*ROOMS, *shared}):
                if not {canonicalize_name(provider) for provider in providers.get(name, [name])} & declared:
                    undeclared.append(f"{path.relative_to(ROOT)}: {name}")
    assert undeclared == []


def test_what_extras_bring_is_what_refusals_say():
    """Every library of an extra that is imported, and none of another."""
    from mka.errors import EXTRAS

    providers = importlib.metadata.packages_distributions()
    for extra, names in EXTRAS.items():
        declared = {canonicalize_name(requirement.name) for requirement in EXTRA_REQUIREMENTS[extra]}
        brought = {name: {canonicalize_name(p) for p in providers.get(name, [name])} & declared for name in names}
        assert all(brought.values()), brought
        assert set().union(*brought.values()) == declared
    assert set(EXTRAS) == set(Requirement(PROJECT["optional-dependencies"]["all"][0]).extras)


def test_programs_of_engines_import_the_standard_library_and_their_engine():
    """They run in environments that have nothing else."""
    found = {path.stem: imported_packages(path) - sys.stdlib_module_names for path in PROGRAMS}
    known = {"__init__": set(), "vllm": {"vllm"}, "llama_cpp": {"xllamacpp"}, "generate_in_vllm": {"vllm"}}
    known["llmcompressor_gptq"] = {"llmcompressor", "torch", "datasets", "transformers"}
    assert found == known


def imported_packages(path: Path) -> set[str]:
    """Top-level names a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_configuration_rooms_hold_no_python():
    assert list((ROOT / "mlflow").rglob("*.py")) == []
    assert list((ROOT / "data").glob("*.py")) == []
    for name in ("datasets", "evaluate"):
        assert not (ROOT / name).exists(), f"a folder {name}/ shadows the package of that name"


def test_mlflow_is_the_installed_package():
    """From the project's root, where the folder mlflow/ comes first on the path."""
    code = "import importlib.util as u; print(u.find_spec('mlflow').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    installed = Path(str(importlib.metadata.distribution("mlflow").locate_file("mlflow/__init__.py")))
    assert Path(done.stdout.strip()).resolve() == installed.resolve()


def test_server_settings_stay_on_this_machine():
    lines = (ROOT / "mlflow/server.env").read_text(encoding="utf-8").splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings["MLFLOW_HOST"] == "127.0.0.1"
    assert settings["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_console_scripts_are_importable():
    for target in PROJECT["scripts"].values():
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_every_method_is_listed_and_every_listed_method_exists():
    from mka.methods import get_method, method_names

    files = {path.stem for path in (ROOT / "mka/methods").glob("*.py")} - {"__init__"}
    assert set(method_names()) == files
    assert all(get_method(name).name == name for name in files)


def test_recipes_are_valid_and_say_how_to_run_them():
    from mka.bench.recipe import load_bench
    from mka.pipeline.recipes import load_recipe

    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        (load_bench if path.name.startswith("bench_") else load_recipe)(path)
        assert path.relative_to(ROOT).as_posix() in path.read_text(encoding="utf-8").splitlines()[0]


def test_makefile_silences_telemetry():
    make = subprocess.run(
        ["make", "--no-print-directory", "-f", "-", "show"],
        input=f"include {ROOT / 'Makefile'}\nshow:\n\t@env\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
    )
    shown = dict(line.split("=", 1) for line in make.stdout.splitlines() if "=" in line)
    expected = {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "GX_ANALYTICS_ENABLED": "false",
        "DVC_NO_ANALYTICS": "1",
    }
    assert {name: shown.get(name) for name in expected} == expected


def test_what_the_makefile_imports_is_there():
    found = re.findall(r"from (mka[\w.]*) import (\w+)", (ROOT / "Makefile").read_text())
    assert found and all(hasattr(importlib.import_module(module), name) for module, name in found)
