"""prefect.yaml and the workflows say only what exists."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

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
    steps = yaml.safe_load((ROOT / ".github/workflows/recompress.yml").read_text())["jobs"]["recompress"]["steps"]
    commands = "\n".join(step.get("run", "") for step in steps)
    assert "prefect deployment run recompress/default" in commands and "--watch" in commands
    (pattern,) = re.findall(r"grep -E '([^']+)'", commands)
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    assert {line.partition("==")[0] for line in locked if re.match(pattern, line)} == {
        "prefect",
        "fastapi",
        "sqlalchemy",
    }
