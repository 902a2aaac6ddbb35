"""A flow whose recipe asks an engine: what it says is judged, shown and registered."""

import subprocess
import sys

import pytest
from support.models import WIDE, make_tiny_model, save_model
from support.project import Project
from support.servers import ROOT, fresh_environment

from mka.engines import ENGINES

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
SHORT = {"concurrency": [1, 2], "prompt_tokens": 16, "new_tokens": 6, "rounds": 1, "limit": 300}


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    save_model(make_tiny_model("llama", **WIDE), made.base)
    return made


def run_flow(project, name, *arguments):
    environment = fresh_environment(project.work)
    command = [sys.executable, "-m", f"flows.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def require_vllm():
    if not ENGINES["vllm"].environment.is_file():
        pytest.skip("vllm is not installed: make engines")


def write_recipe(project, scheme, *rules):
    return project.write_recipe(
        quantize__scheme=scheme,
        engines=[{"engine": "vllm", **SHORT}],
        registry__promote="manual",
        gate={"rules": [{"metric": "perplexity", "recovery": 0.01}, *rules]},
    )


def test_what_vllm_serves_is_registered_with_what_it_said_and_asked_again_when_promoted(project):
    require_vllm()
    rule = {"metric": "engine", "engine": "vllm", "must": "load"}
    done = run_flow(project, "recompress", write_recipe(project, "off", rule))
    assert done.returncode == 0, done.stderr
    version = project.client.get_model_version("tiny", "1")
    assert version.tags["engine.vllm"].startswith("pass")
    metrics = project.client.get_run(version.run_id).data.metrics
    assert {f"engine/vllm/decode_tokens_per_second_ratio_at_{count}" for count in (1, 2)} <= metrics.keys()
    page = next(project.work.glob("stages/report-*/**/report.html")).read_text(encoding="utf-8")
    assert "what its size allows" in page and f"vllm {ENGINES['vllm'].find_version()}" in page
    promoted = run_flow(project, "promote", "tiny", "--version", "1", "--because", "tried")
    assert promoted.returncode == 0, promoted.stderr


def test_what_vllm_has_no_kernel_for_is_refused_by_the_gate_and_never_registered(project):
    require_vllm()
    done = run_flow(
        project, "recompress", write_recipe(project, "int8", {"metric": "engine", "engine": "vllm", "must": "load"})
    )
    assert done.returncode == 1 and "engine vllm" in done.stdout and "gate refused tiny" in done.stderr, done.stdout
    assert not project.client.search_registered_models()
