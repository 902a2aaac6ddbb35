"""A model from disk: whole or refused. Nothing is filled with random weights, nothing is left over."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError, MkaError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.config import build_config
from mka.model.device import find_device
from mka.model.families import FAMILIES
from mka.model.weights import read_json
from mka.terminal import quiet_libraries

if TYPE_CHECKING:
    from mka.model.decoder import Decoder


DTYPES = ("float32", "bfloat16", "float16")


def load_model(folder: str | Path, dtype: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder, in eval mode, where models are run.

    The class is stock's, and how it attends and what it returns are the library's defaults, whatever the config names.

    Quantized folders (compressed-tensors) load as what they are; ``dtype`` is then that of the rest.

    Args:
        folder: stock folder with config.json, safetensors and tokenizer files.
        dtype: "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        CheckpointError: if the folder cannot be read, or if a weight is missing, left over or of another shape
            than the config says.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if dtype not in DTYPES:
        raise CheckpointError(f"{folder}: unknown dtype {dtype!r}, allowed: {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(folder, verify=False)
    options: dict[str, Any] = {"local_files_only": True, "config": build_config(checkpoint.config, folder)}
    options |= {"dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
    with _refusing(folder), quiet_libraries(checkpoint.is_quantized):
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = load_tokenizer(folder, trust_remote_code)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted({str(key) for key in info.get(kind) or ()} - set(checkpoint.left_out)):
            raise CheckpointError(
                f"{folder}: config and weights disagree: {len(found)} {kind.replace('_', ' ')}, e.g. {found[0]}; "
                "fetch or write the model again"
            )
    model = model.to(find_device()).eval()
    if getattr(model.config, "quantization_config", None) is not None:
        # Packed weights are unpacked by the first forward pass; now, so that no measurement pays for it.
        with quiet_libraries(quantized=True), torch.inference_mode():
            model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    return model, tokenizer


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a local folder.

    Raises:
        CheckpointError: if it cannot be read.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    body = read_json(Path(folder) / "config.json")
    if body.get("model_type") in FAMILIES:
        # The library looks at a model's config to find its tokenizer, which would run the model's own code.
        options["config"] = build_config(body, folder)
    with _refusing(Path(folder)):
        return AutoTokenizer.from_pretrained(folder, **options)


@contextmanager
def open_decoder(
    checkpoint: Checkpoint, dtype: str, trust_remote_code: bool = False
) -> Iterator[tuple["Decoder", Any]]:
    """Open a model to be walked layer by layer within the block; yields it and its tokenizer.

    Weights are read when a layer is held. A quantized model, whose weights have to be unpacked, is loaded as a whole.

    Raises:
        CheckpointError: as `load_model`.
    """
    from mka.model.decoder import Decoder, StreamedDecoder

    if checkpoint.is_quantized:
        model, tokenizer = load_model(checkpoint.path, dtype, trust_remote_code)
        yield Decoder(model), tokenizer
        return
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code)
    with checkpoint.reader() as read:
        with _refusing(checkpoint.path), quiet_libraries():
            decoder = StreamedDecoder(checkpoint, read, dtype)
        yield decoder, tokenizer


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Loaders raise whatever their parsers raise; a person needs the folder's name and the reason, in one line."""
    try:
        yield
    except MkaError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: does not load: {' '.join(str(error).split())[:300]}") from None
