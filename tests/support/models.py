"""Tiny random models of every family, a tokenizer for them, and texts of its words."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
LAYERS = 6
# What tokenizers that learn merges learn them from.
WORDS = ["the cat sat on the mat and then the other cat sat there", "I've 2025 reasons, she'll have 12: cats!"]
# Engines have kernels for a few widths of heads only.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 256}
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


def save_model(model, folder: Path, *, max_shard_size: str = "5GB", tokenizer=None) -> Path:
    """Save model and tokenizer as a stock folder."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (tokenizer or make_tokenizer(model.config.vocab_size)).save_pretrained(folder)
    return folder


def make_byte_tokenizer(cut: str = "gpt-2", *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 300 tokens, learnt from a few words; text is cut as llama.cpp calls ``cut``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in GGUF_PRE_TOKENIZER_SPLITS)
    if cut in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[cut]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    elif cut == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    else:
        tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_sentencepiece_tokenizer(*, prefix: bool = True, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE with a token per byte to fall back on, spaces written as U+2581, at most 310 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    bytewise = [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = [normalizers.Replace(" ", "\u2581")]
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *spaces] if prefix else spaces)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=[*special, *bytewise], show_progress=False)
    learnt.train_from_iterator([word for text in WORDS for word in text.split()], trainer)
    body = json.loads(learnt.to_str())
    body["model"]["byte_fallback"] = True
    body["added_tokens"] = body["added_tokens"][: len(special)]
    tokenizer = Tokenizer.from_str(json.dumps(body))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
