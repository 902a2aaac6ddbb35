"""Disks that are full or read-only, a database that somebody holds: one line, and the same command goes on after it."""

import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import yaml
from support.bench import TINY, make_bench_folder
from support.project import Project

from mka.cli.main import main
from mka.model.checkpoint import open_checkpoint

pytestmark = pytest.mark.operations


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own; ``mount("size=1m")`` and ``mount("remount,ro")`` change it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    if shutil.which("mount") is None or not sys.platform.startswith("linux"):
        pytest.skip("no mount")
    mount("size=64m")
    yield place, mount
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.fixture
def compress(tmp_path, monkeypatch, capsys):
    """Run ``mka compress`` into an output; returns its exit code and what it said on stderr."""
    root = make_bench_folder(tmp_path / "root")
    monkeypatch.chdir(root)
    looking = yaml.safe_load(TINY.read_text())["calibration"]
    recipe = {
        "name": "tiny",
        "method": {"name": "mka"},
        "model": {"folder": str(root / "base")},
        "calibration": {**looking, "rev": None},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "quantize": {"scheme": "int8", "group_size": 8},
        "evaluation": {"text": "heldout.jsonl", "overlap_index": None, "context": 32, "text_tokens": 128},
        "gate": {"perplexity_recovery": 0.001},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(output, work):
        monkeypatch.setenv("MKA_WORK", str(work))
        capsys.readouterr()
        code = main(["--no-progress", "compress", "--recipe", "recipe.yaml", "--output", str(output)])
        refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mka: ")]
        return code, refused

    return run


@pytest.mark.parametrize("full", ["work", "output"])
def test_a_full_disk_is_one_line_and_with_room_the_same_command_ends(compress, disk, tmp_path, full):
    place, mount = disk
    work = place / "work" if full == "work" else tmp_path / "work"
    output = place / "out" if full == "output" else tmp_path / "out"
    code, _ = compress(tmp_path / "wanted", tmp_path / "undisturbed")
    assert code == 0
    ends = []
    for size in (16, 64, 128, 256, 512, 1024, 2048, 4096, 65536):  # KiB
        used = sum(f.stat().st_blocks * 512 for f in place.rglob("*")) // 1024
        mount(f"remount,size={max(size, used + 8)}k")
        code, refused = compress(output, work)
        ends.append(code)
        if code == 0:
            break
        assert code == 2 and len(refused) == 1 and ("disk full" in refused[0] or "cannot be written" in refused[0]), (
            refused
        )
        assert not output.exists()
    assert code == 0 and len(ends) > 2
    assert open_checkpoint(output).digest == open_checkpoint(tmp_path / "wanted").digest


@pytest.mark.parametrize("fixed", ["work", "output"])
def test_a_read_only_disk_is_one_line(compress, disk, tmp_path, fixed):
    place, mount = disk
    work = place / "work" if fixed == "work" else tmp_path / "work"
    output = place / "out" if fixed == "output" else tmp_path / "out"
    (place / "work").mkdir()
    mount("remount,ro")
    code, refused = compress(output, work)
    assert code == 2 and len(refused) == 1 and "cannot be written" in refused[0]
    mount("remount,rw")
    assert compress(output, work)[0] == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [8, 60])
def test_a_database_that_somebody_holds_is_waited_for(tmp_path, monkeypatch, capsys, seconds):
    from prefect.testing.utilities import prefect_test_harness

    project = Project(tmp_path)
    monkeypatch.setenv("MKA_WORK", str(project.work))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    held = threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(project.work / "mlflow.db", isolation_level=None, timeout=60)
        connection.execute("begin exclusive")
        held.set()
        time.sleep(seconds)
        connection.execute("rollback")

    with prefect_test_harness(server_startup_timeout=120):
        assert project.run() == 0
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(60)
        capsys.readouterr()
        code = project.run(gate__perplexity_recovery=0.02)
        said = capsys.readouterr().err
        holder.join()
        assert code == 0 and "Traceback" not in said, said
    versions = project.client.search_model_versions("name = 'tiny'")
    assert len(versions) == 2
    with capsys.disabled():
        print(f"\ndatabase held for {seconds} s: waited")
