"""Recompressions in a row in one process: what each leaves in memory, handles, processes and on the disk is bounded.

Asked for by MKA_SOAK=50, alone: it wants a process in which nothing has run before.
"""

import os
from pathlib import Path

import psutil
import pytest
from support.project import Project

pytestmark = pytest.mark.operations

RUNS = int(os.environ.get("MKA_SOAK", "0"))
# The first runs load libraries and make databases.
WARM = 4
# Per run, after those. Disk: the stored results of one tiny run and its registered version.
MOST = {"memory": 4e6, "handles": 0.5, "processes": 0.0, "threads": 0.5, "disk": 6e6, "database": 1.5e6}


def measure(work: Path) -> dict[str, float]:
    process = psutil.Process()
    sizes = {f: f.stat().st_size for f in work.rglob("*") if f.is_file()}
    return {
        "memory": process.memory_info().rss,
        "handles": process.num_fds(),
        "processes": len(process.children(recursive=True)),
        "threads": process.num_threads(),
        "disk": sum(sizes.values()),
        "database": sum(size for file, size in sizes.items() if file.suffix == ".db"),
    }


@pytest.mark.timeout(3600)
@pytest.mark.skipif(RUNS <= WARM, reason="MKA_SOAK says how many runs")
def test_a_run_leaves_no_more_than_its_results(tmp_path, monkeypatch, capsys):
    from prefect.testing.utilities import prefect_test_harness

    project = Project(tmp_path)
    monkeypatch.setenv("MKA_WORK", str(project.work))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seen = []
    with prefect_test_harness(server_startup_timeout=120):
        for number in range(RUNS):
            assert project.run(seed=number) == 0, capsys.readouterr().err
            seen.append(measure(project.work))
    growth = {name: (seen[-1][name] - seen[WARM - 1][name]) / (RUNS - WARM) for name in MOST}
    with capsys.disabled():
        told = ", ".join(f"{name} {value:+,.1f}" for name, value in growth.items())
        print(f"\n{RUNS} recompressions; growth per run after {WARM}: {told}; at the end {seen[-1]}")
    assert {name: value for name, value in growth.items() if value > MOST[name]} == {}
