"""Tiny random models of every family, a tokenizer for them, and texts of its words."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
LAYERS = 6
_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIAL = {
    # Two kinds of layers in families that have them, so that mixing kinds can be refused.
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 2,
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
}


def make_tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random model whose norm gains and biases are random too: ones and zeros would hide mistakes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_COMMON, **_SPECIAL.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif "layers" in name:
                parameter.mul_(4.0)
    model.generation_config.eos_token_id = 2
    return model.to(dtype)


def make_tokenizer(vocab_size: int = 97, *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over w3, w4, ...; optionally one that prepends a BOS token by default."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def make_texts(count: int, *, seed: int = 0, low: int = 5, high: int = 24) -> list[str]:
    """Random sentences of the word-level vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator)
    return [" ".join(f"w{i}" for i in torch.randint(3, 97, (int(n),), generator=generator)) for n in lengths]


def save_model(model, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    """Save model and tokenizer as a stock folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder
