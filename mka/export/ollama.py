"""The Modelfile that tells Ollama which file to run, and how its model wants to be sampled."""

from pathlib import Path
from typing import Any

from mka.errors import CheckpointError
from mka.model.loading import load_tokenizer
from mka.model.weights import read_json

# What a generation config says -> Ollama's parameter.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def list_stops(folder: Path) -> list[int]:
    """List the tokens that end an answer, as the generation config has them, else the config."""
    for body in (_read_generation(folder), read_json(folder / "config.json")):
        stops = body.get("eos_token_id")
        if stops is not None:
            return list(stops) if isinstance(stops, list) else [stops]
    return []


def write_modelfile(path: Path, file: str, folder: Path) -> None:
    """Write a Modelfile.

    The prompt's template is the file's own: Ollama reads it there.

    Args:
        path: where to.
        file: name of the GGUF file beside it.
        folder: of the model.
    """
    lines = [f"FROM ./{file}"]
    body = _read_generation(folder)
    if body.get("do_sample"):
        lines += [f"PARAMETER {name} {body[key]}" for key, name in _SAMPLING.items() if body.get(key) is not None]
    for stop in load_tokenizer(folder).convert_ids_to_tokens(list_stops(folder)):
        if stop and '"' not in stop and stop.isprintable():
            lines.append(f'PARAMETER stop "{stop}"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_generation(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "generation_config.json")
    except CheckpointError:
        return {}
