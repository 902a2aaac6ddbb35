"""Model folders as they come in real life, each a small one with one habit or fault of folders people have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.models import LAYERS, make_tiny_model, make_tokenizer, save_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLASH = {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
KERNEL = {"attn_implementation": "kernels-community/flash-attn3"}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]}
SCALED = {"max_position_embeddings": 128, "original_max_position_embeddings": 16}


def edit(path: Path, **changes) -> Path:
    """Change entries of a JSON file; `...` takes one out."""
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not ...}))
    return path


def save(folder: Path, kind: str = "llama", **options) -> Path:
    """Save a tiny model in one file."""
    return save_model(make_tiny_model(kind, **options), folder)


def save_shards(folder: Path, **options) -> Path:
    """Save a tiny model in several files."""
    return save_model(make_tiny_model("llama", **options), folder, max_shard_size="60KB")


def rewrite(folder: Path, change: Callable, **metadata: str) -> Path:
    """Change what a folder's single file holds: ``change(tensors) -> tensors``; its metadata are those given."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata=metadata or None)
    return folder


def reindex(folder: Path, change: Callable) -> Path:
    """Change the index of a sharded folder: ``change(weight_map)``, in place."""
    body = json.loads((folder / INDEX).read_text())
    change(body["weight_map"])
    (folder / INDEX).write_text(json.dumps(body))
    return folder


def cast(folder: Path, wanted: Callable, dtype: torch.dtype) -> Path:
    """Store some tensors of a folder in another dtype."""
    return rewrite(folder, lambda w: {k: v.to(dtype) if wanted(k) else v for k, v in w.items()})


def move(folder: Path, name: str, place: Path) -> Path:
    """Put a file elsewhere and a link in its place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / name, place)
    (folder / name).symlink_to(place)
    return folder


def save_dvc_links(folder: Path) -> Path:
    """A folder that DVC tracks and has checked out as links into its cache."""
    import logging

    # DVC's handlers keep the stream they were made with; under a test that captures, it is closed by now.
    logging.getLogger("dvc").setLevel(logging.ERROR)
    from dvc.repo import Repo

    save(folder)
    with Repo.init(str(folder.parent), no_scm=True) as made, made.config.edit("repo") as settings:
        settings["cache"]["type"] = ["symlink"]
    with Repo(str(folder.parent)) as repo:
        repo.add(str(folder))
    assert (folder / SINGLE).is_symlink()
    return folder


def save_hub_cache(folder: Path) -> Path:
    """A snapshot whose files are links to blobs, as the hub's client leaves them."""
    source, snapshot = save_shards(folder / "source"), folder / "models--a--b/snapshots/0123abc"
    blobs = folder / "models--a--b/blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def save_two_generations(folder: Path) -> Path:
    """Old shards with their index, and a newer single file."""
    save_shards(folder, seed=1)
    shutil.copy(save(folder.with_name("newer")) / SINGLE, folder / SINGLE)
    return folder


def save_stale_shards(folder: Path) -> Path:
    """A single file with shards that no index names."""
    (save_two_generations(folder) / INDEX).unlink()
    return folder


def save_frequencies(folder: Path) -> Path:
    """Each layer stores its rotary frequencies, as Llamas once did."""
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 8, 2).float() / 8))
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": inverse.clone() for i in range(LAYERS)}
    return rewrite(save(folder), lambda w: w | extra)


def save_own_code(folder: Path) -> Path:
    """The makers' code beside a model that stock knows; here it must not run at all."""
    names = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    edit(save(folder, "phi3") / "config.json", auto_map=names)
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text("raise RuntimeError('ran')\n")
    return folder


def save_tied_head(folder: Path, change: Callable = torch.clone) -> Path:
    """A head stored beside the embedding it is tied to."""
    save(folder, tie_word_embeddings=True)
    return rewrite(folder, lambda w: w | {"lm_head.weight": change(w["model.embed_tokens.weight"])})


def save_backbone(folder: Path, tied: bool) -> Path:
    """Keys without the part in front, as embedding models are published."""
    save(folder, "qwen3", tie_word_embeddings=tied)
    return rewrite(folder, lambda w: {k.removeprefix("model."): v for k, v in w.items() if k != "lm_head.weight"})


def save_configured(folder: Path, kind: str = "llama", **changes) -> Path:
    """A model whose config.json was changed."""
    edit(save(folder, kind) / "config.json", **changes)
    return folder


def save_training(folder: Path) -> Path:
    """The folder of a training's step."""
    save(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "latest"):
        (folder / name).write_bytes(b"{}")
    (folder / "global_step500").mkdir()
    return folder


def save_scaled(folder: Path, kind: str, scaling: dict) -> Path:
    """A model whose rotary scaling is spelled in the old way."""
    extra = {"original_max_position_embeddings": 16} if kind == "phi3" else {}
    return save_configured(folder, kind, rope_scaling=scaling, rope_theta=10000.0, rope_parameters=..., **extra)


def save_marked(folder: Path) -> Path:
    """A tokenizer with a special mark that the embedding has no row for, as Gemma 3's text models have one."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    tokenizer.save_pretrained(save(folder))
    return folder


# Folders that work, with what makes the model they mean.
WORKING: dict[str, tuple[Callable[[Path], Path], Callable]] = {
    "two generations": (save_two_generations, lambda: make_tiny_model("llama")),
    "stale shards": (save_stale_shards, lambda: make_tiny_model("llama")),
    "links of DVC": (save_dvc_links, lambda: make_tiny_model("llama")),
    "hub cache": (save_hub_cache, lambda: make_tiny_model("llama")),
    "tied backbone": (
        lambda f: save_backbone(f, True),
        lambda: make_tiny_model("qwen3", tie_word_embeddings=True),
    ),
    "rotary frequencies": (save_frequencies, lambda: make_tiny_model("llama")),
    "no metadata": (lambda f: rewrite(save(f), dict), lambda: make_tiny_model("llama")),
    "mlx metadata": (lambda f: rewrite(save(f), dict, format="mlx"), lambda: make_tiny_model("llama")),
    "own code": (save_own_code, lambda: make_tiny_model("phi3")),
    "tied head stored": (save_tied_head, lambda: make_tiny_model("llama", tie_word_embeddings=True)),
    "flash attention": (lambda f: save_configured(f, **FLASH), lambda: make_tiny_model("llama")),
    "kernel package": (lambda f: save_configured(f, **KERNEL), lambda: make_tiny_model("llama")),
    "tuples": (
        lambda f: save_configured(f, return_dict=False, output_hidden_states=True, output_attentions=True),
        lambda: make_tiny_model("llama"),
    ),
    "no cache": (lambda f: save_configured(f, use_cache=False), lambda: make_tiny_model("llama")),
    "negative padding": (lambda f: save_configured(f, pad_token_id=-1), lambda: make_tiny_model("llama")),
    "no architecture": (lambda f: save_configured(f, architectures=..., dtype=...), lambda: make_tiny_model("llama")),
    "mark without a row": (save_marked, lambda: make_tiny_model("llama")),
    "training step": (save_training, lambda: make_tiny_model("llama")),
    "norms in double": (
        lambda f: cast(save(f), lambda name: "norm" in name, torch.float64),
        lambda: make_tiny_model("llama"),
    ),
    "linear scaling": (
        lambda f: save_scaled(f, "llama", {"type": "linear", "factor": 4.0}),
        lambda: make_tiny_model("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    ),
    "su": (
        lambda f: save_scaled(f, "phi3", {"type": "su", **LONGROPE}),
        lambda: make_tiny_model(
            "phi3", rope_scaling={"rope_type": "longrope", **LONGROPE}, original_max_position_embeddings=16
        ),
    ),
}
