"""GGUF files as stock safetensors folders."""

from pathlib import Path
from typing import Any

from mka.errors import CheckpointError, OutputError
from mka.model.config import write_config
from mka.model.families import FAMILIES
from mka.model.weights import read_json
from mka.terminal import quiet_libraries

GGUF = ".gguf"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a stock safetensors folder: config, dequantized float32 weights, tokenizer.

    Raises:
        CheckpointError: if transformers cannot read the file, or weights are missing from it.
        OutputError: if ``folder`` cannot be written.
    """
    import copy

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any
    with quiet_libraries():
        try:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"{gguf.name} cannot be read: {' '.join(str(error).split())[:300]}") from None
        tied = set(getattr(loaded, "_tied_weights_keys", None) or ())
        missing = sorted(set(info["missing_keys"]) - tied)
        if missing:
            raise CheckpointError(f"{gguf.name} lacks {len(missing)} weights, first {missing[0]}")
        # A model loaded from GGUF refuses to be saved: its config still says it is quantized.
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config = type(config).from_dict(_tidy_floats(config.to_dict()))
        model = type(loaded)(config).to(torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.generation_config = loaded.generation_config
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if (body := read_json(folder / "config.json")).get("model_type") in FAMILIES:
                write_config(folder, body)
        except SafetensorError as error:  # what a full disk looks like from inside safetensors
            raise OutputError(f"{folder} cannot be written: {error}") from None


def _tidy_floats(value: Any) -> Any:
    """Replace floats that came through float32 (9.999999747378752e-06) by their shortest spelling (1e-05)."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _tidy_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tidy_floats(item) for item in value]
    if isinstance(value, float) and np.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
