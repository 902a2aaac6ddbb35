"""Every key of every YAML file decides something: another value changes what is done, and some code reads it."""

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from support.models import make_tiny_model, save_model

from mka.alignment.table import AlignmentTable
from mka.bench.recipe import BenchRecipe, validate_bench
from mka.corpora.params import Params
from mka.healing.table import HealingTable
from mka.methods import resolve_method
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.inputs import Inputs
from mka.pipeline.job import open_job
from mka.pipeline.pipeline import PIPELINE
from mka.pipeline.recipes import validate_recipe
from mka.recipe import BOUNDS, DEPTHS, Bound, Recipe
from mka.store.products import Product
from mka.texts.calibration import CalibrationSet

ROOT = Path(__file__).parents[3]
# Where keys are spelled, checked and typed; reading them there decides nothing.
SPELLED = {ROOT / path for path in ("mka/recipe.py", "mka/bench/recipe.py", "mka/corpora/params.py")}
SPELLED |= set((ROOT / "mka/cli").glob("*.py"))

RECIPE: dict[str, Any] = {
    "name": "one",
    "model": {"folder": "models/one"},
    "target": {"layers": 4},
    # Of its settings the one that makes a method look at the model again while it plans.
    "method": {"name": "mka", "settings": {"weights": "line-search"}},
    "alignment": {"enabled": True},
    "heal": {"mode": "distil"},
    "engines": [{"engine": "vllm"}],
}
# Stages whose result is a model.
MODELS = ("merge", "heal", "transform", "quantize", "control")
HUB = {"folder": None, "hub": "org/one"}
PACKAGE = {"folder": None, "package": "p==1"}
# Key -> another valid value; where that needs company, a mapping of all that has to change with it.
OTHER: dict[str, Any] = {
    "name": "other",
    "model.hub": {"model": HUB},
    "model.revision": {"model": HUB | {"revision": "main"}},
    "model.folder": "models/other",
    "model.package": {"model": PACKAGE},
    "model.sha256": {"model": PACKAGE | {"sha256": "0" * 64}},
    "model.registered": {"model": {"folder": None, "registered": "models:/one@champion"}},
    "model.dtype": "bfloat16",
    "model.trust_remote_code": True,
    "calibration.path": "other.jsonl",
    "calibration.samples": 99,
    "calibration.max_tokens": 99,
    "calibration.pooling": "mean",
    "calibration.batch_size": 99,
    "calibration.search_tokens": 99,
    "calibration.rev": "v1",
    "method.name": {"method": {"name": "shortgpt", "settings": {}}},
    "method.settings": {"method": {"name": "mka", "settings": {"coordinates": 3}}},
    "target.layers": 5,
    "target.layer_ratio": {"target": {"layers": None, "layer_ratio": 0.5}},
    "target.size_ratio": {"target": {"layers": None, "size_ratio": 0.5}},
    "target.bytes": {"target": {"layers": None, "bytes": "150kB"}},
    "target.cache_bytes_per_token": {"target": {"layers": None, "cache_bytes_per_token": 200}},
    "target.decode_speed": {"target": {"layers": None, "decode_speed": 1.5}},
    "target.prefill_speed": {"target": {"layers": None, "prefill_speed": 1.5}},
    "target.protect_first": 0,
    "target.protect_last": 0,
    "alignment.enabled": False,
    "alignment.path": "other.jsonl",
    "alignment.tokens": 999,
    "alignment.context": 99,
    "alignment.copies": 0.9,
    "alignment.penalty": 9.0,
    "alignment.heldout_source": "one",
    "alignment.rev": "v1",
    "heal.path": "other.jsonl",
    "heal.tokens": 999,
    "heal.train": "lora",
    "heal.rate": 0.5,
    "heal.context": 99,
    "heal.batch": 9,
    "heal.positions": 0.5,
    "heal.heldout_source": "one",
    "heal.heldout_tokens": 999,
    "heal.patience": 9,
    "heal.checkpointing": True,
    "heal.mode": "local",
    "heal.rev": "v1",
    "transforms.name": {"transforms": [{"name": "cast", "settings": {"dtype": "float16"}}]},
    "transforms.settings": {"transforms": [{"name": "cast", "settings": {"dtype": "bfloat16"}}]},
    "quantize.scheme": {"quantize": {"scheme": "int8", "group_size": 32}},
    "quantize.rounding": {"quantize": {"scheme": "int8", "group_size": 32, "rounding": "gptq"}},
    "quantize.tokens": {"quantize": {"scheme": "int8", "group_size": 32, "rounding": "gptq", "tokens": 999}},
    "quantize.bits_per_weight": {
        "quantize": {"scheme": "mixed", "group_size": 32, "rounding": "gptq", "bits_per_weight": 4}
    },
    "quantize.bytes": {"quantize": {"scheme": "mixed", "group_size": 32, "rounding": "gptq", "bytes": "150kB"}},
    "quantize.group_size": {"quantize": {"scheme": "int8", "group_size": 16}},
    "quantize.embeddings": {"quantize": {"scheme": "int8", "group_size": 32, "embeddings": "int8"}},
    "quantize.serve_on": "cpu",
    "evaluation.text": "other.jsonl",
    "evaluation.text_tokens": 1500,
    "evaluation.context": 99,
    "evaluation.tasks": {"evaluation": {"tasks": {"piqa": 4}}},
    "evaluation.tasks_folder": None,
    "evaluation.include_path": "other",
    "evaluation.overlap_index": None,
    "evaluation.shots": 3,
    "evaluation.chat_template": "auto",
    "evaluation.system_instruction": "other",
    "evaluation.batch_size": 99,
    "evaluation.generation": 9,
    "evaluation.model": "vllm",
    "evaluation.model_args.tensor_parallel_size": 2,
    "evaluation.model_args.gpu_memory_utilization": {
        "evaluation": {"model": "vllm", "model_args": {"gpu_memory_utilization": 0.5}}
    },
    "evaluation.model_args.dtype": {"evaluation": {"model": "vllm", "model_args": {"dtype": "bfloat16"}}},
    "evaluation.model_args.max_model_len": {"evaluation": {"model": "vllm", "model_args": {"max_model_len": 99}}},
    "evaluation.prompts": ["other"],
    "evaluation.new_tokens": 99,
    "engines.engine": {"engines": [{"engine": "llama.cpp"}]},
    "engines.concurrency": {"engines": [{"engine": "vllm", "concurrency": [9]}]},
    "engines.prompt_tokens": {"engines": [{"engine": "vllm", "prompt_tokens": 9}]},
    "engines.new_tokens": {"engines": [{"engine": "vllm", "new_tokens": 9}]},
    "engines.rounds": {"engines": [{"engine": "vllm", "rounds": 9}]},
    "engines.file_type": {"engines": [{"engine": "llama.cpp", "file_type": "q8_0"}]},
    "engines.limit": {"engines": [{"engine": "vllm", "limit": 9.0}]},
    "engines.memory": {"engines": [{"engine": "vllm", "memory": 9.0}]},
    "gate.perplexity_recovery": 0.25,
    "gate.task_recovery": 0.25,
    "gate.champion_recovery": 0.25,
    "gate.rules.metric": {"gate": {"rules": [{"metric": "bytes", "most": 1.0}]}},
    "gate.rules.recovery": {"gate": {"rules": [{"metric": "perplexity", "recovery": 0.25}]}},
    "gate.rules.most": {"gate": {"rules": [{"metric": "bytes", "most": "2MB"}]}},
    "gate.rules.least": {"gate": {"rules": [{"metric": "layers", "least": 2}]}},
    "gate.rules.engine": {"gate": {"rules": [{"metric": "decode_speed", "engine": "vllm", "least": 1.1}]}},
    "gate.rules.must": {"gate": {"rules": [{"metric": "engine", "engine": "vllm", "must": "load"}]}},
    "gate.rules.better_than": {"gate": {"rules": [{"metric": "bytes", "better_than": "control"}]}},
    "registry.name": "other",
    "registry.tracking_uri": "http://other",
    "registry.promote": "manual",
    "registry.approvers": ["somebody"],
    "registry.signature": "public.pem",
    "seed": 9,
}

BENCH = yaml.safe_load((ROOT / "tests/support/bench_tiny.yaml").read_text(encoding="utf-8"))
METHOD, TEXT = BENCH["methods"][0], BENCH["texts"][0]
TASKS = {"tasks": {"piqa": 4}, "task_targets": [4]}
# The same for a comparison. Sections that both recipes share are changed in the same way.
ROUNDED = {"scheme": "int8"}
OTHER_BENCH: dict[str, Any] = {key: value for key, value in OTHER.items() if key.startswith("model.")} | {
    "name": "other",
    "calibration.path": "other.jsonl",
    "calibration.samples": 99,
    "calibration.max_tokens": 99,
    "calibration.pooling": "mean",
    "calibration.batch_size": 99,
    "calibration.search_tokens": 99,
    "alignment.path": "other.jsonl",
    "alignment.tokens": 999,
    "alignment.context": 99,
    "alignment.copies": 0.9,
    "alignment.penalty": 9.0,
    "alignment.heldout_source": "one",
    "heal.path": "other.jsonl",
    "heal.tokens": 999,
    "heal.train": "lora",
    "heal.rate": 0.5,
    "heal.context": 99,
    "heal.batch": 9,
    "heal.positions": 0.5,
    "heal.heldout_source": "one",
    "heal.heldout_tokens": 999,
    "heal.patience": 9,
    "heal.checkpointing": True,
    "protect_first": 0,
    "protect_last": 0,
    "targets": [4, 3],
    "methods.name": {"methods": [METHOD | {"name": "uidl"}]},
    "methods.settings": {"methods": [METHOD | {"name": "mka", "settings": {"coordinates": 3}}]},
    "methods.label": {"methods": [METHOD | {"label": "other"}]},
    "methods.alignment": {"methods": [METHOD | {"alignment": [True]}]},
    "methods.heal": {"methods": [METHOD | {"heal": [512]}]},
    "methods.quantize.scheme": {"methods": [METHOD | {"quantize": [ROUNDED | {"scheme": "int4"}]}]},
    "methods.quantize.rounding": {"methods": [METHOD | {"quantize": [ROUNDED | {"rounding": "gptq"}]}]},
    "methods.quantize.tokens": {"methods": [METHOD | {"quantize": [ROUNDED | {"rounding": "gptq", "tokens": 999}]}]},
    "methods.quantize.bits_per_weight": {
        "methods": [METHOD | {"quantize": [{"scheme": "mixed", "rounding": "gptq", "bits_per_weight": 4}]}]
    },
    "methods.quantize.bytes": {
        "methods": [METHOD | {"quantize": [{"scheme": "mixed", "rounding": "gptq", "bytes": "150kB"}]}]
    },
    "methods.quantize.group_size": {"methods": [METHOD | {"quantize": [ROUNDED | {"group_size": 16}]}]},
    "methods.quantize.embeddings": {"methods": [METHOD | {"quantize": [ROUNDED | {"embeddings": "int8"}]}]},
    "methods.quantize.serve_on": {
        "methods": [METHOD | {"quantize": [ROUNDED | {"serve_on": "cuda", "group_size": 32}]}]
    },
    "methods.targets": {"methods": [METHOD | {"targets": [3]}]},
    "methods.ours": {"methods": [METHOD | {"ours": True}]},
    "texts.name": {"texts": [TEXT | {"name": "other"}]},
    "texts.path": {"texts": [TEXT | {"path": "other.jsonl"}]},
    "texts.source": {"texts": [TEXT | {"source": None}]},
    "texts.seen": {"texts": [TEXT | {"seen": False}]},
    "texts.origin": {"texts": [TEXT | {"origin": "elsewhere"}]},
    "evaluation.text_tokens": 1500,
    "evaluation.context": 99,
    "evaluation.tasks": {"evaluation": TASKS},
    "evaluation.task_targets": {"evaluation": TASKS | {"task_targets": [5]}},
    "evaluation.tasks_folder": None,
    "evaluation.include_path": "other",
    "evaluation.overlap_index": None,
    "evaluation.shots": 3,
    "evaluation.chat_template": "auto",
    "evaluation.system_instruction": "other",
    "evaluation.batch_size": 99,
    "evaluation.generation": {"evaluation": {"generation": 9, "task_targets": [4]}},
    "resamples": 999,
    "output": "docs/other.md",
    "picture": "docs/other.png",
    "seed": 9,
    "fan_out.engine": "dask",
    "fan_out.workers": 3,
    "fan_out.address": {"fan_out": {"engine": "dask", "address": "tcp://10.0.0.5:8786"}},
}


# Keys that name what is read (its digest is in the keys then), where the model comes from, how fast it goes, or what a
# way in does with the result: no stage's result depends on how they are spelled.
ELSEWHERE = {
    *("name", "calibration.path", "calibration.samples", "calibration.batch_size", "calibration.rev"),
    *("heal.path", "heal.rev", "heal.checkpointing", "engines.limit", "engines.memory"),
    *("alignment.path", "alignment.rev", "evaluation.text", "evaluation.tasks_folder", "evaluation.overlap_index"),
    "evaluation.include_path",
    *(
        "gate.champion_recovery",
        "model.hub",
        "model.revision",
        "model.folder",
        "model.package",
        "model.sha256",
        "model.registered",
    ),
    "quantize.serve_on",
    *("model.trust_remote_code", "registry.name", "registry.tracking_uri", "registry.promote", "registry.approvers"),
    "registry.signature",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_checkpoint(
        save_model(make_tiny_model("llama", max_position_embeddings=512), tmp_path_factory.mktemp("keys") / "base")
    )


def list_stage_keys(recipe: Recipe, base: Any) -> dict[str, str]:
    """Return what keys the result of every stage that a recipe's job has, the report's apart: it shows the recipe."""
    table = AlignmentTable({"words": ["w1"]}, recipe.alignment) if recipe.alignment.enabled else None
    texts = CalibrationSet(("w1 " * 512,), ("words",), "digest", "texts.jsonl")  # a window of what rounds by texts
    healing = HealingTable({"words": ["w1"]}, recipe.heal)
    inputs = Inputs(texts, table, healing, {"words": ["w1 " * 2048]}, recipe.evaluation.tasks)
    job = open_job(recipe, resolve_method(recipe.method), base, "revision", inputs)
    # Products whose digests are the keys they were made under: a change goes on to what is made of them.
    found: dict[str, Product] = {}
    for stage in PIPELINE[:-1]:
        if stage.wanted(job):
            key = stage.key(job, found)
            model = {"model_type": "llama", "digest": key} if stage.name in MODELS else {}
            found[stage.name] = Product(stage.name, key, Path(), {}, key, model, 0.0, False, "")
    return {name: product.key for name, product in found.items()}


def list_leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted keys of a section that hold no section; entries of a list have its key."""
    leaves = []
    for name, field in model.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        sections = [t for t in inner if issubclass(t, BaseModel)]
        leaves += list_leaves(sections[0], f"{prefix}{name}.") if sections else [prefix + name]
    return leaves


def change(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a recipe with one key changed, and with what has to change with it."""
    *parents, name = key.split(".")
    changes = value if isinstance(value, dict) else {name: value}
    for parent in () if isinstance(value, dict) else reversed(parents):
        changes = {parent: changes}
    merged = dict(raw)
    for name, inner in changes.items():
        merged[name] = {**raw.get(name, {}), **inner} if isinstance(inner, dict) else inner
    return merged


@pytest.mark.parametrize(("model", "table"), [(Recipe, OTHER), (BenchRecipe, OTHER_BENCH)])
def test_the_tables_of_this_file_have_every_key_and_no_other(model, table):
    assert sorted(table) == sorted(list_leaves(model))


@pytest.mark.parametrize("key", OTHER)
def test_every_key_of_a_recipe_changes_what_a_stage_is_stored_by(key, base):
    """Of those that must not, the next test sees that somebody reads them."""
    before, after = (validate_recipe(raw) for raw in (RECIPE, change(RECIPE, key, OTHER[key])))
    assert before != after
    assert (list_stage_keys(before, base) != list_stage_keys(after, base)) == (key not in ELSEWHERE)


@pytest.mark.parametrize("key", OTHER_BENCH)
def test_every_key_of_a_comparison_decides_something(key):
    before, after = (validate_bench(raw) for raw in (BENCH, change(BENCH, key, OTHER_BENCH[key])))
    assert before != after
    jobs = [[r.recipe_for(cell) for cell in r.cells] for r in (before, after)]
    shown = ("output", "picture", "resamples", "fan_out", "texts", "methods", "seed", "evaluation")
    assert jobs[0] != jobs[1] or key.partition(".")[0] in shown


@pytest.fixture(scope="module")
def read_names():
    """Names that code reads as attributes, outside of where keys are spelled."""
    names = set()
    for room in ("mka", "tasks", "flows"):
        for path in (ROOT / room).rglob("*.py"):
            if path not in SPELLED:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                if path.name == "metrics.py":  # a row names the settings that ask for it
                    names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
                nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
                names |= {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}
    return names


def read_by_spelling(model):
    """Names that a section's own module reads, in a property say, of fields that nobody else needs to know."""
    path = Path(*model.__module__.split(".")).with_suffix(".py")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("model", [Recipe, BenchRecipe, Params])
def test_every_key_is_read_by_some_code(model, read_names):
    unread = [key for key in list_leaves(model) if key.rpartition(".")[2] not in read_names]
    if model is Params:  # the mixture reads the counts of its sources by name: `getattr(counts, source)`
        from mka.corpora.mixture import SOURCES

        unread = [key for key in unread if key.removeprefix("alignment.") not in SOURCES]
    # A rule reads its bound by name, `getattr(rule, rule.bound)`, and a target what it asks for.
    known = read_by_spelling(model) | set(get_args(Bound)) | set(DEPTHS + BOUNDS)
    assert [key for key in unread if key.rpartition(".")[2] not in known] == []
