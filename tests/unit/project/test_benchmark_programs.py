"""Programs of benchmarks/ that no other test runs: they start, say what they do, and those for GPUs need little."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import GPU_PACKAGES, link_packages

ROOT = Path(__file__).parents[3]
# What programs share.
SHARED = ("limits.py", "own_text.py", "resumable.py", "rounds.py")
PROGRAMS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name not in SHARED)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_what_it_does_and_is_named_with_its_command(program):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage:" in done.stdout
    assert f"    python benchmarks/{program}" in (ROOT / "benchmarks" / program).read_text(encoding="utf-8")


def test_the_gpu_program_runs_with_nothing_but_the_packages_it_names(tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    link_packages(GPU_PACKAGES, packages)
    assert not {"accelerate", "tabulate", "pandas", "prefect"} & {path.name for path in packages.iterdir()}
    options = ("--shape", "tiny", "--windows", "4", "--context", "24")
    done = subprocess.run(
        [sys.executable, "-S", "benchmarks/gpu.py", *options, "--work", str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \|", done.stdout, re.M)
    steps = ("observe from disk", "score: NPIB", "align and merge", "merge", "prefill", "decode")
    assert all(any(name.startswith(step) for name, _ in rows) for step in steps)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
