"""A tokenizer's settings, in words that transformers 4 has, too."""

import json

import pytest
from support.field import edit, save
from support.models import make_tokenizer
from transformers import AutoTokenizer

from mka.model.companions import copy_companions, spell_tokenizer

TEXT = "w5 <mark> w6 w96"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "LlamaTokenizerFast"}),
        ({"extra_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<a>"]}),
        ({"extra_special_tokens": {"image": "<a>"}}, {"extra_special_tokens": {"image": "<a>"}}),
        *[({key: ["<a>"] for key in ("extra_special_tokens", "additional_special_tokens")},) * 2],
        ({}, {}),
    ],
)
def test_only_what_is_new_is_spelled_in_older_words(given, expected):
    before = dict(given)
    assert spell_tokenizer(given) == expected and given == before


def test_a_copied_tokenizer_is_the_same_tokenizer(tmp_path):
    folder = save(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<mark>"]})
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend" and settings["extra_special_tokens"] == ["<mark>"]
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    copied = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert copied["additional_special_tokens"] == ["<mark>"] and "TokenizersBackend" not in copied.values()
    before, after = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out"))
    assert type(before) is type(after) and before(TEXT) == after(TEXT)
    assert before.all_special_ids == after.all_special_ids and len(before.all_special_ids) == 4


def test_settings_that_are_not_new_are_copied_byte_for_byte(tmp_path):
    folder = save(tmp_path / "m")
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    written = (folder / "tokenizer_config.json").read_bytes() + b"\n\n"
    (folder / "tokenizer_config.json").write_bytes(written)
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == written
