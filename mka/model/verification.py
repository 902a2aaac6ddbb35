"""A stranger's look at a finished folder: does stock transformers load it, whole, and does it generate soundly?"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mka.errors import CheckpointError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.tensors import TRIM_BYTES, give_memory_back, is_finite
from mka.terminal import quiet_libraries, without_first_values

PROBE_TOKENS = 8
# Of a model with more bytes than this, whose every further token costs one more pass over the disk.
FEW_PROBE_TOKENS, LARGE = 2, 2_000_000_000


def inspect_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Load a folder as any user would and report what was found; judges nothing.

    Weights stay on disk and are read when a layer needs them (transformers' ``device_map="disk"``), so that memory is
    a few tensors whatever the size. Those of a quantized folder are unpacked one matrix at a time into a temporary
    folder beside it, which for that while takes the disk space of the unpacked model.

    Args:
        folder: the folder.
        trust_remote_code: passed to transformers.

    Returns:
        JSON-able facts: model_type, layers, config_layers, parameters, bytes, dtype, missing_keys, unexpected_keys,
        mismatched_keys, nonfinite_tensors (counts) and generation_mismatches: of `PROBE_TOKENS` tokens generated
        greedily with the key-value cache (`FEW_PROBE_TOKENS` of a large model), how many are not the best choice of
        a forward pass without cache; all of them if keys do not match, since nothing can be generated then.
    """
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(folder, verify=False)
    # The system's own temporary folder may be memory.
    beside = Path(folder).absolute().parent if checkpoint.is_quantized else None
    with TemporaryDirectory(dir=beside) as offloaded, quiet_libraries(checkpoint.is_quantized):
        options: dict[str, Any] = {"dtype": "auto", "device_map": {"": "disk"}, "offload_folder": offloaded}
        with without_first_values():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, trust_remote_code=trust_remote_code, **options
            )
        model.eval()
        facts: dict[str, Any] = {
            "model_type": checkpoint.family.model_type,
            "layers": len(checkpoint.family.get_layers(model)),
            "config_layers": checkpoint.layers,
            "bytes": checkpoint.nbytes,
            "dtype": checkpoint.dtype,
            "missing_keys": len(info["missing_keys"]),
            "unexpected_keys": len(info["unexpected_keys"]),
            "mismatched_keys": len(info["mismatched_keys"]),
        }
        tokens = PROBE_TOKENS if checkpoint.nbytes <= LARGE else FEW_PROBE_TOKENS
        whole = not any(facts[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        with torch.inference_mode():
            if checkpoint.is_quantized:
                _unpack(checkpoint, model)
            facts["generation_mismatches"] = _count_generation_mismatches(model, tokens) if whole else tokens
            return facts | _count_parameters(checkpoint, model)


def _unpack(checkpoint: Checkpoint, model: Any) -> None:
    """Unpack a quantized model on disk now, one matrix at a time, as its first forward pass would.

    That pass does it by a hook, which changes how weights are fetched; for a model on disk it comes too late, after
    the pass has begun in the old way (compressed-tensors 0.20, transformers 5.23).
    """
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.offload import from_accelerate

    from_accelerate(model)
    if model.config.tie_word_embeddings:
        _part_head(checkpoint.family.get_head(model), checkpoint.family.get_embedding(model))
    passed = 0
    for module in model.modules():
        decompress_module(module)
        if hasattr(module, "quantization_scheme"):
            passed += _weight_nbytes(module)
        if passed > TRIM_BYTES:
            passed = 0
            give_memory_back()
    model.hf_quantizer.compressor.remove_decompression_hook(model)


def _part_head(head: Any, embedding: Any) -> None:
    """Give a rounded tied head bytes of its own on disk: the embedding's go when it is unpacked.

    In memory both keep what they share; on disk compressed-tensors 0.20 forgets it with the first of them.
    """
    import torch
    from compressed_tensors.offload import disable_onloading

    if hasattr(head, "quantization_scheme"):
        weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        with disable_onloading():
            head._parameters["weight"] = None
        head._parameters["weight"] = weight


def _weight_nbytes(module: Any) -> int:
    """Bytes of the float32 weight of a linear layer or an embedding, by its shape: its values are on disk."""
    if hasattr(module, "in_features"):
        return 4 * module.in_features * module.out_features
    return 4 * module.num_embeddings * module.embedding_dim


def _count_parameters(checkpoint: Checkpoint, model: Any) -> dict[str, int]:
    """Count parameters, and tensors with NaN or infinity; of a quantized model once it is unpacked."""
    if checkpoint.is_quantized:
        from compressed_tensors.offload import disable_onloading

        with disable_onloading():
            sizes = {n: p.numel() for n, p in model.named_parameters() if n.endswith((".weight", ".bias"))}
        if model.config.tie_word_embeddings:  # once unpacked, a rounded head is no longer the embedding itself
            sizes.pop(checkpoint.family.head_tensor, None)
        # By name: an iterator over parameters keeps all of them.
        nonfinite = sum(not is_finite(model.get_parameter(name)) for name in sizes)
        return {"parameters": sum(sizes.values()), "nonfinite_tensors": nonfinite}
    # A tied head that is stored beside the embedding is no parameter of its own.
    family = checkpoint.family
    tied = model.config.tie_word_embeddings and family.embedding_tensor in checkpoint.tensors
    own = [t for name, t in checkpoint.tensors.items() if not (tied and name == family.head_tensor)]
    with checkpoint.reader() as read:
        nonfinite = sum(not is_finite(read(tensor.name)) for tensor in own)
    return {"parameters": sum(t.parameters for t in own), "nonfinite_tensors": nonfinite}


def _count_generation_mismatches(model: Any, tokens: int) -> int:
    import torch

    vocabulary = model.config.vocab_size
    prompt = (torch.arange(1, 7) * 7919 % vocabulary).unsqueeze(0)
    model.generation_config.eos_token_id = None
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    logits = model(generated, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, generated[0, prompt.shape[1] :].unsqueeze(1)).squeeze(1)
    # Rounding may swap two equally good tokens; a wrong cache moves logits by far more.
    slack = max(1e-3, 4 * torch.finfo(model.dtype).eps) * (logits.max() - logits.min())
    # What is not a number is no match either.
    return int((~(logits.max(dim=1).values - chosen <= slack)).sum())


def require_sound(facts: dict[str, Any], where: str | Path) -> None:
    """Refuse a folder that does not load whole or does not generate soundly.

    Raises:
        CheckpointError: naming the first fact that is wrong.
    """
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "nonfinite_tensors", "generation_mismatches"):
        if facts[name]:
            raise CheckpointError(
                f"{where}: {facts[name]} {name.replace('_', ' ')} after writing; nothing was published"
            )
    if facts["layers"] != facts["config_layers"]:
        raise CheckpointError(f"{where}: loads {facts['layers']} layers, config.json says {facts['config_layers']}")


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Inspect a folder and refuse it unless it is sound; returns what was found. Refusals of `require_sound`."""
    facts = inspect_checkpoint(folder)
    require_sound(facts, folder)
    return facts
