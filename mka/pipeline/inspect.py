"""What a model is and what could be done with it, by its config, its headers and this machine; no tensor is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mka.errors import MkaError
from mka.kernels import EMBEDDINGS, ENGINES, list_rows
from mka.methods import check_alignment, get_method, method_names, resolve_method
from mka.model.checkpoint import Checkpoint, describe_headers, open_checkpoint
from mka.model.config import build_config
from mka.model.device import find_device
from mka.model.outline import build_outline, find_pieces
from mka.outside.machine import count_cores, find_disk, find_memory
from mka.pipeline.draft import GROUPS, draft_recipe, foresee_memory
from mka.plan.target import Aim
from mka.recipe import MethodChoice, ModelSource, QuantizeSettings, Target
from mka.sources.fetch import materialize
from mka.terminal import quiet_libraries
from mka.transforms import get_quantizer
from mka.transforms.unpacking import find_rounded, rounds_inputs


def open_headers(source: ModelSource, work: Path) -> Checkpoint:
    """Bring a model here and open it by config and headers: no tensor is read, so no altered bit is seen.

    Raises:
        CheckpointError: if it cannot be had, or config and headers are not those of one supported model.
    """
    checkpoint = open_checkpoint(materialize(source, work, verify=False), verify=False)
    if not checkpoint.is_quantized:
        with quiet_libraries():
            find_pieces(checkpoint, build_outline(checkpoint, torch.float32))
    return checkpoint


def inspect_checkpoint(checkpoint: Checkpoint, source: ModelSource, work: Path) -> dict[str, Any]:
    """Return what is known of a model without running it, as JSON types.

    Args:
        checkpoint: see `open_headers`.
        source: how it is called, and the precision of forward passes.
        work: folder that a run would write to.

    Returns:
        model (family, layers, kinds, parameters, bytes, vocabulary, context), removable (which layers, and the fewest
        each method can leave), machine (what is here, and what each stage of a first recipe takes), engines.
    """
    return {
        "model": describe_model(checkpoint, source),
        "removable": describe_removable(checkpoint),
        "machine": describe_machine(checkpoint, source, work),
        "engines": list_engines(checkpoint),
    }


def describe_model(checkpoint: Checkpoint, source: ModelSource) -> dict[str, Any]:
    """Return the facts of config and headers; ``bytes_bf16`` is what its parameters take in 16 bits."""
    facts, config = describe_headers(checkpoint), build_config(checkpoint.config, checkpoint.path)
    return {
        "name": source.label,
        "path": str(checkpoint.path),
        **facts,
        "bytes_bf16": 2 * facts["parameters"],
        "layer_bytes": list(checkpoint.layer_nbytes),
        "kinds": list_kinds(checkpoint),
        "vocabulary": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "context": getattr(config, "max_position_embeddings", None),
        "quantized": checkpoint.is_quantized,
    }


def list_kinds(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the kinds of layers: how each is called, and which layers have it; one without a name where all agree."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for layer, kind in enumerate(checkpoint.kinds):
        found.setdefault(kind, []).append(layer)
    names = checkpoint.family.per_layer_config
    return [
        {"kind": {n: value for n, value in zip(names, kind) if value is not None}, "layers": layers}
        for kind, layers in found.items()
    ]


def describe_removable(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return which layers the default protection leaves free, and the fewest layers that each method can leave.

    A method that runs only while layers are refitted, or never then, says so under ``alignment``.
    """
    if checkpoint.is_quantized:
        return {"layers": [], "methods": [], "why_not": "its weights are rounded already; name the original model"}
    target = Target(layers=checkpoint.layers)
    first, last = target.protect_first, target.protect_last
    aim = Aim(1, first, last)
    free = range(first, max(first, checkpoint.layers - last))
    methods = []
    for name in method_names():
        method = get_method(name)
        fewest = method.fewest(checkpoint.kinds, aim, method.settings())
        entry = {"name": name, "summary": method.summary, "fewest": fewest, "alignment": _ask_alignment(name)}
        methods.append(entry)
    return {"layers": list(free), "protect_first": first, "protect_last": last, "methods": methods}


def _ask_alignment(name: str) -> str:
    planner = resolve_method(MethodChoice(name=name))
    refused = []
    for enabled in (False, True):
        try:
            check_alignment(planner, enabled)
        except MkaError:
            refused.append(enabled)
    return {(): "either", (False,): "needed", (True,): "none"}[tuple(refused)]


def describe_machine(checkpoint: Checkpoint, source: ModelSource, work: Path) -> dict[str, Any]:
    """Return what is here, and what each demanding stage of a first recipe would hold of it.

    ``fits`` is against the memory of where models run: the accelerator if there is one, else what is free here.
    """
    most, free = find_memory()
    there = find_room()
    facts: dict[str, Any] = {
        "memory_bytes": most,
        "memory_free_bytes": free,
        "disk_free_bytes": find_disk(work),
        "cpus": count_cores(),
        "accelerator": _find_accelerator(),
    }
    if checkpoint.is_quantized or checkpoint.layers < 2:
        return facts | {"recipe": None, "stages": []}
    recipe = draft_recipe(checkpoint, source, there)
    needed = foresee_memory(checkpoint, recipe)
    stages = [{"stage": name, "memory_bytes": size, "fits": size <= there} for name, size in needed.items()]
    return facts | {"recipe": recipe.model_dump(mode="json"), "stages": stages}


def find_room() -> int:
    """Return the bytes that a model may take where models run: on the accelerator if there is one, else here."""
    accelerator = _find_accelerator()
    return accelerator["memory_free_bytes"] if accelerator else find_memory()[1]


def _find_accelerator() -> dict[str, Any] | None:
    if find_device().type != "cuda":
        return None
    free, most = torch.cuda.mem_get_info()
    return {"name": torch.cuda.get_device_name(), "memory_bytes": most, "memory_free_bytes": free}


def list_engines(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return, per engine, the schemes of rounding that it would load of this model's layers, and why not the others.

    What an engine has kernels for is `mka.kernels`; widths and groups are this model's. Of a model that is rounded
    already only its own schemes count; of one rounded by others nothing is known.
    """
    try:
        own = list_schemes(checkpoint)
    except MkaError:
        return []
    return [
        {"engine": engine.name, "device": engine.device, "version": engine.version}
        | _ask_engine(engine.serve_on, checkpoint, own)
        for engine in ENGINES
    ]


def list_schemes(checkpoint: Checkpoint) -> list[str] | None:
    """Return the schemes that a model is rounded to already, the most bits first; None if it is not.

    Raises:
        CheckpointError: if it was rounded by something else than is read here.
    """
    if not checkpoint.is_quantized:
        return None
    family, rounded = checkpoint.family, find_rounded(checkpoint)
    bits = sorted({one.bits for name, one in rounded.items() if family.split_tensor(name)}, reverse=True)
    layers = ["w8a8"] if rounds_inputs(checkpoint) else [f"int{number}" for number in bits]
    return layers + ([EMBEDDINGS] if rounded.keys() & {family.embedding_tensor, family.head_tensor} else [])


def _ask_engine(serve_on: str | None, checkpoint: Checkpoint, own: Sequence[str] | None) -> dict[str, Any]:
    loads: list[str] = []
    refused: dict[str, str] = {}
    for row in list_rows(serve_on):
        if row.scheme == EMBEDDINGS if own is None else row.scheme not in own:
            continue
        why = None if row.loads else row.how
        if row.loads and row.scheme != "off" and own is None:
            why = _refuse_widths(serve_on, row.scheme, checkpoint)
        if why is None:
            loads.append(row.scheme)
        else:
            refused[row.scheme] = why
    return {"loads": loads, "not": refused}


def _refuse_widths(serve_on: str | None, scheme: str, checkpoint: Checkpoint) -> str | None:
    """Say why no size of groups lets an engine run a scheme on a model's widths; None if one does."""
    why = None
    for size in GROUPS:
        settings = QuantizeSettings.model_validate({"scheme": scheme, "serve_on": serve_on, "group_size": size})
        try:
            get_quantizer(settings).check(checkpoint, settings)
        except MkaError as error:
            why = str(error)
            continue
        return None
    return why


def tell_kinds(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per kind of layers, e.g. "layer_types sliding_attention: 0-4, 6-10"; none where all agree."""
    if len(kinds) < 2:
        return []
    told = []
    for entry in kinds:
        name = ", ".join(f"{key} {value}" for key, value in entry["kind"].items())
        told.append(f"{name}: {join_ranges(entry['layers'])}")
    return told


def join_ranges(layers: Sequence[int]) -> str:
    """Write sorted layers as runs, e.g. "0-4, 6"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)
