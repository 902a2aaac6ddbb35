"""What merging costs beside copying: time against a copy of the same bytes, and the most memory it ever holds.

    python benchmarks/merge.py --shape llama-3-1b                   # 2.5 GB
    python benchmarks/merge.py --shape llama-3-8b --work /tmp       # 16 GB in, 13 GB out, twice at a time

The checkpoint is random (benchmarks/shapes.py). A quarter of the layers goes: pairs become weighted sums. Each round
merges in a process of its own and copies what was written, in turns, both down to the disk (fsync), from a cold page
cache where this user may drop it. The copy reads and writes 8 MiB at a time through one buffer; beside it runs `cp`,
which leaves that to the system. A merge reads both layers of a pair, so about a quarter more than the copy.
Verification by a stock loader, and hashing the source, are timed apart: a copy has nothing like them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import describe_ratio, peak_memory, time_rounds
from benchmarks.shapes import SHAPES, make_checkpoint
from mka.model.checkpoint import open_checkpoint
from mka.model.shards import BLOCK_BYTES
from mka.plan.grouping import join_layers
from mka.plan.plan import MergePlan, identity_layers
from mka.transforms.merge import merge_checkpoint

CACHE = Path("/proc/sys/vm/drop_caches")
MARGIN = 700_000_000


def plan_pairs(count: int) -> MergePlan:
    """Merge a quarter of the layers in pairs in the middle, each with weights 0.6 and 0.4."""
    layers = list(identity_layers(count))
    for first in range(count - 3, 1, -2)[: count // 4]:
        layers[first : first + 2] = [join_layers(layers[first], layers[first + 1], 0.6)]
    return MergePlan("benchmark", "pairs in the middle", count, tuple(layers))


def run_merge(source: Path, output: Path) -> None:
    """Merge in this process and print what it took."""
    from mka.model.verification import inspect_checkpoint, require_sound

    checkpoint = open_checkpoint(source)
    clock = [time.perf_counter()]
    merge_checkpoint(plan_pairs(checkpoint.layers), checkpoint, output)
    facts: dict[str, Any] = {"peak": peak_memory()}
    clock.append(time.perf_counter())
    require_sound(inspect_checkpoint(output), output)
    clock.append(time.perf_counter())
    facts["digest"] = checkpoint.digest
    clock.append(time.perf_counter())
    seconds = dict(zip(("seconds", "verify", "hash"), (b - a for a, b in pairwise(clock))))
    print(json.dumps(facts | seconds | {"all": peak_memory()}))


def drop_cache() -> bool:
    """Empty the page cache; returns whether this user may."""
    os.sync()
    try:
        CACHE.write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


def copy_blocks(source: Path, target: Path) -> None:
    """Copy a file by plain reads and writes through one buffer."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while found := read.readinto(buffer):
            written.write(buffer[:found])


def call_cp(source: Path, target: Path) -> None:
    """Copy a file with the system's own command."""
    subprocess.run(["cp", source, target], check=True)


def copy_folder(source: Path, target: Path, copy: Callable[[Path, Path], None]) -> float:
    """Copy every file and wait for the disk; returns the seconds."""
    drop_cache()
    started = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        copy(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description="Time and memory of a merge, beside a copy of the same bytes.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-1b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("--source", type=Path, help="a checkpoint to merge instead of a random one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-merge", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_merge:
        run_merge(given.source, given.only_merge)
        return
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        source = given.source or Path(work) / "source"
        if given.source is None:
            make_checkpoint(given.shape, source)
        compare(source, Path(work), given.rounds)


def compare(source: Path, work: Path, rounds: int) -> None:
    """Merge and copy in turns, and print both."""
    checkpoint = open_checkpoint(source)
    kept, facts = work / "kept", []

    def merge(output: Path) -> float:
        drop_cache()
        command = [sys.executable, __file__, "--source", str(source), "--only-merge", str(output)]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        facts.append(found)
        return float(found["seconds"])

    def merge_and_remove() -> float:
        seconds = merge(work / "merged")
        shutil.rmtree(work / "merged")
        return seconds

    merge(kept)
    facts.clear()
    calls = {
        "merge": merge_and_remove,
        "copy": lambda: copy_folder(kept, work / "copy", copy_blocks),
        "cp": lambda: copy_folder(kept, work / "copy", call_cp),
    }
    seconds = time_rounds(calls, rounds, warm=False)
    written = sum(file.stat().st_size for file in kept.iterdir())
    shards = sorted(file.stat().st_size for file in kept.glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    peak, bound = max(found["peak"] for found in facts), 2 * largest + MARGIN
    rates = {name: f"{written / min(taken) / 1e9:.2f} GB/s" for name, taken in seconds.items()}
    print(f"{source.name}: {checkpoint.nbytes / 1e9:.2f} GB in, {written / 1e9:.2f} GB out in {len(shards)} shards")
    rows = [[name, *(f"{s:.1f}" for s in taken), rates[name]] for name, taken in seconds.items()]
    rows.append(["verify", *(f"{found['verify']:.1f}" for found in facts), ""])
    print(
        tabulate(rows, headers=["seconds", *(f"round {n + 1}" for n in range(rounds)), "best"], disable_numparse=True)
    )
    print(f"merge / copy of the same bytes: {describe_ratio(seconds['merge'], seconds['copy'])}, n = {rounds} rounds")
    print(f"page cache dropped before each: {'yes' if drop_cache() else 'no, not permitted'}")
    print(
        f"peak memory of a merge: {peak / 1e6:,.0f} MB; 2 x largest tensor ({largest / 1e6:,.0f} MB) + 700 MB = "
        f"{bound / 1e6:,.0f} MB: {peak / bound:.2f} of it; with verification "
        f"{max(found['all'] for found in facts) / 1e6:,.0f} MB"
    )
    print(f"largest shard: {shards[-1] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
