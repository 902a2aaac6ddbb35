"""A stranger's look at a finished folder: does stock transformers load it, whole, and does it generate soundly?"""

from pathlib import Path
from typing import Any

from mka.checkpoint import open_checkpoint
from mka.errors import CheckpointError
from mka.quiet import quiet_libraries

PROBE_TOKENS = 8


def inspect_checkpoint(folder: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Load a folder as any user would and report what was found; judges nothing.

    Args:
        folder: the folder.
        trust_remote_code: passed to transformers.

    Returns:
        JSON-able facts: model_type, layers, config_layers, parameters, bytes, dtype, missing_keys, unexpected_keys,
        mismatched_keys, nonfinite_tensors (counts) and generation_mismatches: of `PROBE_TOKENS` tokens generated
        greedily with the key-value cache, how many are not the best choice of a forward pass without cache.
    """
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(folder, verify=False)
    with quiet_libraries(checkpoint.is_quantized):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
        )
        model.eval()
    facts: dict[str, Any] = {
        "model_type": checkpoint.family.model_type,
        "layers": len(model.model.layers),
        "config_layers": checkpoint.layers,
        "bytes": checkpoint.nbytes,
        "dtype": checkpoint.dtype,
        "missing_keys": len(info["missing_keys"]),
        "unexpected_keys": len(info["unexpected_keys"]),
        "mismatched_keys": len(info["mismatched_keys"]),
    }
    with quiet_libraries(checkpoint.is_quantized), torch.inference_mode():
        facts["generation_mismatches"] = _count_generation_mismatches(model)
    # Counted after the first forward pass, when packed weights have been unpacked.
    facts["parameters"] = sum(p.numel() for n, p in model.named_parameters() if n.endswith((".weight", ".bias")))
    facts["nonfinite_tensors"] = sum(not bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())
    return facts


def _count_generation_mismatches(model: Any) -> int:
    import torch

    vocabulary = model.config.vocab_size
    prompt = (torch.arange(1, 7) * 7919 % vocabulary).unsqueeze(0)
    model.generation_config.eos_token_id = None
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=PROBE_TOKENS,
        min_new_tokens=PROBE_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    logits = model(generated, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, generated[0, prompt.shape[1] :].unsqueeze(1)).squeeze(1)
    # Rounding may swap two equally good tokens; a wrong cache moves logits by far more.
    slack = max(1e-3, 4 * torch.finfo(model.dtype).eps) * (logits.max() - logits.min())
    return int((logits.max(dim=1).values - chosen > slack).sum())


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
