"""GPTQ by llm-compressor on given windows of tokens; `benchmarks/rounding.py` runs it in an environment of its own.

    python benchmarks/llmcompressor_gptq.py JOB.json

The job names ``model``, ``windows`` (token ids), ``bits``, ``group_size``, ``observer`` ("memoryless_minmax" or
"mse") and ``output``. Imports nothing of this project.
"""

import argparse
import json
import resource
import time
from pathlib import Path


def main() -> None:
    """Write the rounded folder, and seconds and memory as JSON on the last line."""
    parser = argparse.ArgumentParser(description="Round a model by llm-compressor's GPTQ.")
    parser.add_argument("job", type=Path, help="JSON file")
    job = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    windows = job["windows"]
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]})
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": job["group_size"],
        "observer": job["observer"],
    }
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(job["output"], save_compressed=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "bytes": memory}), flush=True)


if __name__ == "__main__":
    main()
