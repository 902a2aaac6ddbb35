"""What killed processes leave beside an output goes with the next one that is written there."""

import os
import subprocess
import sys

import pytest

from mka.store.publishing import publish, write_text


def leave(path, how):
    """Start to write in a path's place in another process, and end it there; returns what it left."""
    writing = f"""
import os
from pathlib import Path
from mka.store.publishing import publish, replace_file
path = Path({str(path)!r})
def die(aside):
    (aside / "x" if aside.is_dir() else aside).write_text("half")
    os.kill(os.getpid(), 9)
if {how!r} == "file":
    replace_file(path, die)
else:
    with publish(path) as partial:
        die(partial)
"""
    assert subprocess.run([sys.executable, "-c", writing], check=False).returncode == -9
    (left,) = path.parent.glob(f".{path.name}.partial-*")
    return left


@pytest.mark.parametrize("how", ["file", "folder"])
def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path, how):
    left = leave(tmp_path / "out", how)
    alive = tmp_path / left.name.replace(left.name.split("-")[-2], str(os.getppid()))
    of_another = tmp_path / ".out2.partial-x-1-00000000"
    alive.mkdir()
    of_another.mkdir()
    if how == "file":
        write_text(tmp_path / "out", "whole")
    else:
        with publish(tmp_path / "out") as partial:
            (partial / "x").write_text("whole")
    assert {f.name for f in tmp_path.iterdir()} == {"out", alive.name, of_another.name}
