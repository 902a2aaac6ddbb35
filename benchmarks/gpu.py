"""A model of Llama-3-8B's shape end to end on one GPU: observe, score, plan, align, merge, and what the result gains.

    python benchmarks/gpu.py --work /tmp                       # 16 GB in, two times 12 GB out; meant for 8 minutes
    python benchmarks/gpu.py --work /tmp --shape tiny          # to try it out; runs on a CPU as well

Needs torch, transformers, safetensors, numpy and scipy, no network, and 60 GB of disk. The weights are random: what is
measured is time, memory and bytes. Prints one Markdown table, with the device's name above it.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import describe_ratio, time_rounds
from benchmarks.shapes import SHAPES, make_checkpoint
from mka.alignment.lockstep import Alignment
from mka.evaluation.speed import compare_speed
from mka.evidence.observe import observe_tokens
from mka.evidence.states import HiddenStates
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.decoder import StreamedDecoder
from mka.model.shards import BLOCK_BYTES
from mka.plan.grouping import merge_adjacent
from mka.plan.plan import MergePlan, take_layers
from mka.similarity.diffusion import diffusion_map
from mka.similarity.information import npib_matrix
from mka.texts.tokens import batch_by_length
from mka.transforms.merge import merge_checkpoint

TEXTS, TOKENS = 256, 64
ROUNDS = 5


class Table:
    """Rows of what was done: seconds, what that is a rate of, and a ratio where there is something to compare with."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str, str]] = []

    @contextmanager
    def time(self, name: str, rate: Callable[[float], str] = lambda seconds: "", beside: float = 0.0) -> Iterator[None]:
        """Time a block, down to the end of what it started on the device."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.rows.append((name, seconds, rate(seconds), f"{seconds / beside:.2f}" if beside else ""))
        print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)

    @property
    def last(self) -> float:
        """Seconds of the last row."""
        return self.rows[-1][1]

    def show(self) -> str:
        """The table as Markdown."""
        lines = ["| | seconds | rate | ratio |", "|---|--:|---|--:|"]
        return "\n".join([*lines, *(f"| {name} | {s:.2f} | {rate} | {ratio} |" for name, s, rate, ratio in self.rows)])


def per_second(count: float, unit: str) -> Callable[[float], str]:
    """Return what turns seconds into a rate."""
    return lambda seconds: f"{count / seconds:,.1f} {unit}/s"


def wait_for(call: Callable[[], Any]) -> None:
    """Call, and wait for all that the device was given to do."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def draw_ids(rows: int, columns: int, vocabulary: int) -> torch.Tensor:
    """Random token ids, (rows, columns)."""
    return torch.randint(vocabulary, (rows, columns), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: str) -> Any:
    """Load a folder as any user would, on the GPU if there is one; refuse it unless every key matches."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"{folder}: {wrong}")
    model.generation_config.eos_token_id = None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def run_plainly(model: Any, sequences: list[list[int]]) -> None:
    """Run a model over all sequences, without its head."""
    for _, ids, mask in batch_by_length(sequences, 16, model.device):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)


def observe_and_compare(checkpoint: Checkpoint, read: Any, dtype: str, table: Table) -> HiddenStates:
    """Observe from disk beside loading and a plain pass, and in memory beside the plain pass alone."""
    sequences = draw_ids(TEXTS, TOKENS, checkpoint.config["vocab_size"]).tolist()
    count, gigabytes = TEXTS * TOKENS, checkpoint.nbytes / 1e9
    with table.time("load with transformers", per_second(gigabytes, "GB")):
        model = load(checkpoint.path, dtype)
    loaded = table.last
    # In turns and warmed up: a kernel's first call loads it, which at these times would be most of a row.
    calls = {
        "plain forward, no head": partial(run_plainly, model, sequences),
        "observe, model in memory": partial(observe_tokens, model, sequences),
    }
    seconds = time_rounds({name: partial(wait_for, call) for name, call in calls.items()}, ROUNDS)
    plain = statistics.median(seconds["plain forward, no head"])
    for name, taken in seconds.items():
        ratio = describe_ratio(taken, seconds["plain forward, no head"]) if name.startswith("observe") else ""
        median = statistics.median(taken)
        table.rows.append((f"{name} (n = {ROUNDS})", median, per_second(count, "tokens")(median), ratio))
    del model, calls
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with table.time("observe from disk (beside load and forward)", per_second(gigabytes, "GB"), beside=loaded + plain):
        return observe_tokens(StreamedDecoder(checkpoint, read, dtype), sequences)


def score(states: HiddenStates, table: Table) -> np.ndarray:
    """NPIB similarity of all pairs of layers."""
    with table.time("score: diffusion maps"):
        maps = [diffusion_map(layer.astype(np.float64), coordinates=2, exponent=0.5) for layer in states.outputs]
    with table.time("score: NPIB of all pairs", per_second(states.layers * (states.layers + 1) / 2, "pairs")):
        return npib_matrix(np.stack([embedded.coordinates for embedded in maps]))


def copy_bytes(source: Path, target: Path) -> None:
    """Copy a folder by plain reads and writes, down to the disk."""
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (target / file.name).open("wb") as written:
            shutil.copyfileobj(read, written, BLOCK_BYTES)
            os.fsync(written.fileno())


def run_all(shape: str, work: Path, dtype: str, windows: int, context: int) -> Table:
    """Everything, in the order of a run."""
    table, on_gpu = Table(), torch.cuda.is_available()
    base, device = work / "base", "cuda" if on_gpu else "cpu"
    with table.time("write the random checkpoint"):
        make_checkpoint(shape, base, device=device)
    checkpoint = open_checkpoint(base)
    with checkpoint.reader() as read:
        similarity = score(observe_and_compare(checkpoint, read, dtype, table), table)
        kinds = [None] * checkpoint.layers
        target = checkpoint.layers - max(1, checkpoint.layers // 4)
        options: dict[str, Any] = {"kinds": kinds, "protect_first": 2, "protect_last": 1}
        options["choose_weight"] = lambda layers, position, similarity: min(max(similarity, 0.0), 1.0)
        layers = merge_adjacent(similarity, target, **options).layers
        plan = MergePlan("benchmark", "sums of the most similar neighbours", checkpoint.layers, layers)
        # What the method `aligned` makes of the same groups: one attention, the best neurons of all.
        taken = [x if x.is_copy else take_layers(x.sources, x.sources[-1:], x.sources) for x in layers]
        ids = draw_ids(windows, context, checkpoint.config["vocab_size"])
        with table.time(f"align and merge, {windows * context:,} tokens", per_second(windows * context, "tokens")):
            walk = Alignment(StreamedDecoder(checkpoint, read, dtype), ids)
            aligned = (made.tensors for made in walk.walk(taken))
            merge_checkpoint(replace(plan, layers=tuple(taken)), checkpoint, work / "aligned", aligned=aligned)
    shutil.rmtree(work / "aligned")
    del walk, aligned
    with table.time("merge", per_second(checkpoint.nbytes / 1e9, "GB read")):
        merge_checkpoint(plan, checkpoint, work / "merged")
    merged = table.last
    with table.time("copy of the merged bytes (ratio: the merge beside it)"):
        copy_bytes(work / "merged", work / "copy")
    table.rows[-1] = (*table.rows[-1][:3], f"{merged / table.last:.2f}")
    shutil.rmtree(work / "copy")
    models = {"base": load(base, dtype), "merged": load(work / "merged", dtype)}
    speed = compare_speed(models, new_tokens=64 if on_gpu else 8, seed=0).rates
    for name in ("prefill", "decode"):
        rates = [speed[role][f"{name}_tokens_per_second"] for role in ("base", "merged")]
        shown = f"{rates[0]:,.0f} -> {rates[1]:,.0f} tokens/s"
        table.rows.append(
            (
                f"{name}, merged / base (layers: {checkpoint.layers / target:.2f})",
                0.0,
                shown,
                f"{rates[1] / rates[0]:.2f}",
            )
        )
    return table


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description="An 8B-shaped model end to end on one GPU.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("--windows", type=int, default=16, help="windows an alignment is fitted on")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        dtype = "bfloat16" if on_gpu else "float32"
        table = run_all(given.shape, Path(work), dtype, given.windows, given.context)
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    peak = f"; peak on the device {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if on_gpu else ""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    seconds = time.perf_counter() - started
    print(f"{device}, {dtype}, {given.shape}; {seconds:.0f} s in all; resident {resident:.1f} GB{peak}\n")
    print(table.show())


if __name__ == "__main__":
    main()
