"""Model folders that are refused, each a small one with one fault of folders people have."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.field import (
    INDEX,
    SINGLE,
    cast,
    edit,
    move,
    reindex,
    rewrite,
    save,
    save_backbone,
    save_configured,
    save_shards,
    save_tied_head,
)
from support.models import make_tokenizer


def save_foreign_index(folder: Path) -> Path:
    """An index of shards that were never uploaded; all tensors lie under other names."""
    return reindex(save_shards(folder), lambda m: m.update({k: f"part-{i % 9}.safetensors" for i, k in enumerate(m)}))


def save_large_tokenizer(folder: Path) -> Path:
    """A tokenizer that was given tokens the embedding never was."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<PRE>", "<SUF>"])
    tokenizer.save_pretrained(save(folder))
    return folder


def save_adapter(folder: Path) -> Path:
    """A full model with an adapter beside it."""
    (save(folder) / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    return folder


def save_classifier(folder: Path) -> Path:
    """A reward model: no head, a score in its place."""
    save(folder)
    return rewrite(
        folder, lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"} | {"score.weight": torch.ones(1, 32)}
    )


def _swap(weight_map):
    first = next(iter(weight_map))
    last = next(name for name, file in weight_map.items() if file != weight_map[first])
    weight_map[first], weight_map[last] = weight_map[last], weight_map[first]


def _repeat(folder: Path) -> Path:
    first, *_ = sorted(save_shards(folder).glob("*.safetensors"))
    name = "model.norm.weight"
    tensors = load_file(first) | {name: torch.ones(32)}
    save_file(tensors, first, metadata={"format": "pt"})
    return folder


def _in_subfolder(folder: Path) -> Path:
    shard = sorted(save_shards(folder).glob("*.safetensors"))[0].name
    (folder / "deep").mkdir()
    (folder / shard).rename(folder / "deep" / shard)
    return reindex(folder, lambda m: m.update({k: f"deep/{v}" for k, v in m.items() if v == shard}))


def _point(name: str) -> Callable[[Path], Path]:
    return lambda f: reindex(save_shards(f), lambda m: m.update({"lm_head.weight": name}))


def _link(name: str) -> Callable[[Path], Path]:
    return lambda f: move((save_shards if name == INDEX else save)(f), name, f.parent / "elsewhere" / name)


def _link_shard(folder: Path) -> Path:
    name = sorted(save_shards(folder).glob("*.safetensors"))[1].name
    return move(folder, name, folder.parent / "elsewhere" / name)


def _drop_metadata(folder: Path) -> Path:
    edit(save_shards(folder) / INDEX, metadata=...)
    return folder


# Folders that are refused, with words of the one line that says why.
REFUSED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "index of other files": (
        save_foreign_index,
        ("missing shard part-0.safetensors", "all tensors lie in other files"),
    ),
    "index swaps": (lambda f: reindex(save_shards(f), _swap), ("disagree on", "the index lists it in", "holds it")),
    "index lists too much": (
        lambda f: reindex(save_shards(f), lambda m: m.update(ghost=min(m.values()))),
        ("disagree on ghost", "no shard holds it"),
    ),
    "index lists too little": (
        lambda f: reindex(save_shards(f), lambda m: m.pop("model.norm.weight")),
        ("disagree on model.norm.weight", "the index does not list it"),
    ),
    "two shards hold it": (_repeat, ("disagree on model.norm.weight", "two shards hold it", "model-00001")),
    "subfolder": (_in_subfolder, ("'deep/model-00001", "names of files in the folder itself")),
    "parent": (_point("../other/model.safetensors"), ("'../other/model.safetensors'", "allowed")),
    "absolute": (_point("/etc/model.safetensors"), ("'/etc/model.safetensors'", "allowed")),
    "no index metadata": (_drop_metadata, (INDEX, "has no metadata")),
    "linked weights": (_link(SINGLE), (SINGLE, "is a link out of the model folder")),
    "linked index": (_link(INDEX), (INDEX, "is a link out of the model folder")),
    "linked shard": (_link_shard, ("model-00002", "is a link out of the model folder")),
    "linked config": (_link("config.json"), ("config.json", "is a link out of the model folder")),
    "linked tokenizer": (_link("tokenizer.json"), ("tokenizer.json", "is a link out of the model folder")),
    "headless backbone": (
        lambda f: save_backbone(f, False),
        ("keys such as", "lack 'model' in front", "no file holds the head"),
    ),
    "more tokens than rows": (save_large_tokenizer, ("2 tokens", "97 rows", "'<PRE>' (97)", "'<SUF>' (98)")),
    "adapter beside": (save_adapter, ("adapter_config.json", "merge it", "take adapter_config.json out")),
    "other weights named": (
        lambda f: save_configured(f, transformers_weights="other.safetensors"),
        ("transformers_weights 'other.safetensors'",),
    ),
    "classifier": (save_classifier, ("1 missing keys", "lm_head.weight")),
    "left over": (
        lambda f: rewrite(save(f), lambda w: w | {"extra.weight": torch.ones(2)}),
        ("1 unexpected keys", "extra.weight"),
    ),
    "other shape": (
        lambda f: rewrite(save(f), lambda w: w | {"model.norm.weight": torch.ones(31)}),
        ("1 mismatched keys", "model.norm.weight"),
    ),
    "tied head of its own": (
        lambda f: save_tied_head(f, lambda w: w + 1),
        ("ties lm_head.weight to model.embed_tokens.weight", "differ", "tie_word_embeddings"),
    ),
    "fp8": (
        lambda f: cast(save(f), lambda name: "up_proj" in name, torch.float8_e4m3fn),
        ("up_proj.weight is stored as F8_E4M3", "fp8", "allowed: F64, F32, F16, BF16"),
    ),
    "whole numbers": (
        lambda f: cast(save(f), lambda name: name == "model.norm.weight", torch.int32),
        ("model.norm.weight is stored as I32", "allowed"),
    ),
    "truth values": (
        lambda f: cast(save(f), lambda name: name == "model.norm.weight", torch.bool),
        ("model.norm.weight is stored as BOOL", "allowed"),
    ),
}
