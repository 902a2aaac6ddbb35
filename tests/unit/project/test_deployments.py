"""prefect.yaml and the workflows say only what exists."""

import importlib
import importlib.metadata
import inspect
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["entrypoint"])
def test_every_deployment_names_a_flow_and_parameters_it_takes(deployment):
    path, _, name = deployment["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    taken = inspect.signature(flow.fn).parameters
    given = deployment.get("parameters", {})
    assert set(given) <= set(taken)
    for recipe in [given["recipe"]] if "recipe" in given else given.get("recipes", []):
        assert (ROOT / recipe).is_file()
    assert deployment["work_pool"]["name"] == "mka" and deployment["description"]


def test_no_workflow_pastes_what_somebody_typed_into_a_command():
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(workflow.read_text())["jobs"].values():
            for step in job["steps"]:
                assert not re.search(r"\$\{\{\s*(inputs|github\.event)", step.get("run", "")), workflow.name


def test_the_recompress_workflow_installs_what_it_types():
    """Less would fail there, and more would bring torch to a machine that only waits."""
    steps = yaml.safe_load((ROOT / ".github/workflows/recompress.yml").read_text())["jobs"]["recompress"]["steps"]
    commands = "\n".join(step.get("run", "") for step in steps)
    assert 'mka ci "$RECIPE"' in commands and "pip install --no-deps ." in commands
    (pattern,) = re.findall(r"grep -E '([^']+)'", commands)
    locked = [line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]
    installed = closure(name for name in locked if re.match(pattern, f"{name}=="))
    done = subprocess.run(
        [sys.executable, "-c", ASK_AND_SAY_WHAT_WAS_IMPORTED, "recipes/smollm2_135m.yaml"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"},
    )
    assert "does not answer" in done.stderr, done.stderr
    providers = importlib.metadata.packages_distributions()
    imported = {canonicalize_name(found) for name in done.stdout.split() for found in providers.get(name, [])}
    assert "prefect" in imported
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    own = {canonicalize_name(Requirement(text).name) for text in wanted}
    assert sorted(imported & own - installed - {"mka-compress"}) == []
    assert "torch" not in installed


ASK_AND_SAY_WHAT_WAS_IMPORTED = """
import sys
import flows.ci
flows.ci.main(sys.argv[1:])
print(*{name.partition(".")[0] for name in sys.modules})
"""


def closure(names):
    """Distributions that pip installs for some, of those that are installed here."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found
