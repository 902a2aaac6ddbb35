"""Tokenizers in GGUF files, read back by transformers: the same tokens for the same text, or refused."""

import gguf
import pytest
from gguf import TokenType
from support.models import (
    make_byte_tokenizer,
    make_sentencepiece_tokenizer,
    make_tiny_model,
    make_tokenizer,
    save_model,
)
from transformers import AutoTokenizer

from mka.errors import CheckpointError
from mka.export.gguf import write_gguf
from mka.export.vocabulary import read_vocabulary

TEXTS = ["the cat sat", "  then 2025 cats!\n\nI've 12: she'll", "thé \U0001f408 <think>mat", "<s>the</s>"]


@pytest.fixture
def write(tmp_path):
    def write(tokenizer, family="llama", **overrides):
        model = make_tiny_model(family, vocab_size=320, num_hidden_layers=1, **overrides)
        target = tmp_path / "out"
        target.mkdir()
        return write_gguf(save_model(model, tmp_path / "base", tokenizer=tokenizer), target, "q8_0")

    return write


def read_back(file):
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), fields


CUTS = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"]


@pytest.mark.parametrize(("cut", "add_bos"), [("gpt-2", True), *((cut, False) for cut in CUTS)])
def test_byte_level_text_is_cut_and_merged_alike(cut, add_bos, write):
    tokenizer = make_byte_tokenizer(cut, add_bos=add_bos)
    found, fields = read_back(write(tokenizer))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", cut)
    assert fields["tokenizer.ggml.add_bos_token"] == add_bos and fields["tokenizer.ggml.add_eos_token"] is False
    if cut != "smollm":  # transformers has no cut of that name, and reads digits together
        seen = [found(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        assert seen == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.CONTROL] * 3 and types[3] == TokenType.NORMAL
    last = len(tokenizer) - 1
    assert fields["tokenizer.ggml.tokens"][last : last + 2] == ["<think>", f"[PAD{last + 1}]"]
    assert types[last : last + 2] == [TokenType.USER_DEFINED, TokenType.UNUSED] and len(types) == 320
    said = {"bos": 1, "eos": 2, "padding": 0}
    assert {kind: fields[f"tokenizer.ggml.{kind}_token_id"] for kind in said} == said


@pytest.mark.parametrize(("family", "prefix"), [("llama", True), ("phi3", True), ("gemma2", False)])
def test_sentencepiece_merges_become_scores(family, prefix, write):
    tokenizer = make_sentencepiece_tokenizer(prefix=prefix)
    found, fields = read_back(write(tokenizer, family))
    assert fields["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in fields
    assert fields["tokenizer.ggml.add_space_prefix"] == prefix and fields["tokenizer.ggml.add_bos_token"] is True
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    texts = ["the cat sat", "cats! 12", "th\u00e9 \U0001f408"]
    if prefix:  # of others, transformers' reader keeps no decoder
        assert [found.decode(found(text)["input_ids"], skip_special_tokens=True) for text in texts] == texts
    seen = [found(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert seen == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_chat_templates_go_along(write):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "{{ tools }}"}
    found, fields = read_back(write(tokenizer))
    assert found.chat_template == "{{ messages[0].content }}"
    assert fields["tokenizer.chat_template.tools"] == "{{ tools }}"


def test_tokenizers_that_llama_cpp_lacks_are_refused():
    with pytest.raises(CheckpointError, match="of kind WordLevel"):
        read_vocabulary(make_tokenizer(), 97, "here")
    with pytest.raises(CheckpointError, match="token 299 has no row among the embedding's 299"):
        read_vocabulary(make_byte_tokenizer(), 299, "here")
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = make_byte_tokenizer()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    with pytest.raises(CheckpointError, match=r"cuts text by Split, ByteLevel .* llama-bpe"):
        read_vocabulary(tokenizer, 320, "here")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(CheckpointError, match="changes text by Lowercase"):
        read_vocabulary(tokenizer, 320, "here")
