"""Distillation: the student's weights follow the base's logits.

The loss is the forward divergence KL(base || student) at temperature 1 (Hinton et al., arXiv 1503.02531), averaged over
the positions or a share of them. What is trained and how fast is said here; `mka.healing.training` trains it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mka.healing.student import Student
from mka.healing.table import HealingWindows
from mka.healing.training import MEASUREMENTS, RETREATED, run_trainer
from mka.model.checkpoint import Checkpoint
from mka.model.families import get_family
from mka.model.loading import load_model
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.plan.budget import LAST_TRAINED
from mka.recipe import HealFit, ModelSource
from mka.store.publishing import write_text

VERSION = 3
TREATS = (ATTENTION, MLP)
# Peak learning rates by what is trained.
RATES = {"changed": 3e-4, "all": 3e-4, "lora": 1e-3, "head-and-last": 3e-4}
# Where the recipe names no rate and the first measurement is worse than the start, steps are too large for what a refit
# has brought near: it begins again with a part of that rate, and once more.
PARTS = (1.0, 1 / 3, 1 / 10)
TRIED_FILE = "tried.json"
RANK = 16


@dataclass(frozen=True)
class Distilled:
    """What a distillation made.

    Attributes:
        tensors: tensor name -> trained values; empty if nothing was better than the start.
        facts: tokens, rate, why it ended, the curve, seconds; under "tried" the rates given up before, each with its
            own tokens and seconds and the held-out divergence it ended at.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


def distil(
    base: Checkpoint,
    student: Checkpoint,
    windows: HealingWindows,
    settings: HealFit,
    source: ModelSource,
    scratch: Path,
    *,
    shared: int | None,
    seed: int = 0,
    measurements: int = MEASUREMENTS,
) -> Distilled:
    """Train a student to follow its base's logits.

    Both models are in memory as a whole: the base in the precision of its forward passes, the student in float32.

    Args:
        base: the teacher.
        student: made of it; see `mka.healing.student.check_student`.
        windows: of `mka.healing.table.cut_healing`.
        settings: what is trained, how fast.
        source: how the base is loaded.
        scratch: folder of the Trainer's checkpoints; a run that was killed goes on from the last one in it.
        shared: of `mka.healing.student.count_shared`.
        seed: of the order of the windows and of the positions compared.
        measurements: as `run_trainer` takes them.

    Raises:
        PlanError: if the layers have parts that cannot be healed.
        NumericsError: if the training diverges before anything is better than the start.
        OutputError: if a checkpoint cannot be written.
    """
    check_parts(base.family.parts, TREATS, "healing", base.family.model_type)
    teacher, _ = load_model(base.path, source.dtype, source.trust_remote_code)
    first = find_first_trained(student.layers, settings.train, shared)
    equal = None if shared is None else min(shared, first)

    def train(rate: float, *, may_retreat: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        pupil, _ = load_model(student.path, "float32", source.trust_remote_code)
        torch.manual_seed(seed)  # low-rank additions are drawn
        trained, finish = choose_trained(pupil, settings.train, first)
        module = Student(teacher, pupil, equal, trained, positions=settings.positions, length=settings.context)
        options: dict[str, Any] = {"seed": seed, "measurements": measurements, "may_retreat": may_retreat}
        found = run_trainer(module, windows, settings, rate, scratch, **options)
        finish()
        return found, {} if found["kept"] == "start" else _read_trained(pupil, trained)

    rates, tried = list_rates(settings), read_tried(scratch)
    while True:
        found, tensors = train(rates[len(tried)], may_retreat=len(tried) + 1 < len(rates))
        if found["ended"] != RETREATED:
            return Distilled(tensors, {"train": settings.train, "first_layer": first, "tried": tried} | found)
        last = found["curve"][-1].get("heldout")  # nothing, where the loss is not finite
        tried.append({"rate": found["rate"], "tokens": found["tokens"], "heldout": last, "seconds": found["seconds"]})
        _write_tried(scratch, tried)


def find_first_trained(layers: int, train: str, shared: int | None) -> int:
    """Return the first of the student's layers that is trained.

    Where that is the first that is not the base's own and only the end was cut off, or where the last layers alone are
    asked for, it begins the last three.
    """
    if train == "all":
        return 0
    last = max(0, layers - LAST_TRAINED)
    return last if train == "head-and-last" else min(shared or 0, last)


def choose_trained(model: Any, train: str, first: int) -> tuple[torch.nn.ModuleDict, Callable[[], Any]]:
    """Say which weights of a model have a gradient.

    The embedding stays as it is, and with it a head that is tied to it.

    Args:
        model: the student.
        train: as in the recipe.
        first: the first layer that is trained.

    Returns:
        The modules that hold them, and what has to be called after the training: it folds low-rank additions.
    """
    family = get_family(model.config.model_type, "model")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers, count = family.get_layers(model), len(family.get_layers(model))
    held: dict[str, torch.nn.Module] = {f"layer_{index}": layers[index] for index in range(first, count)}
    held["norm"] = family.get_norm(model)
    if train == "head-and-last" and not model.config.tie_word_embeddings:
        held["head"] = family.get_head(model)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        linear = [name for part in family.parts for name in part.linear]
        names = [f"{family.layers}.{index}.{name}" for index in range(first, count) for name in linear]
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))
        return torch.nn.ModuleDict(held), adapted.merge_and_unload
    for module in held.values():
        module.requires_grad_(True)
    return torch.nn.ModuleDict(held), lambda: None


def _read_trained(model: Any, trained: torch.nn.ModuleDict) -> dict[str, torch.Tensor]:
    wanted = {id(parameter) for parameter in trained.parameters()}
    return {name: value.detach().cpu() for name, value in model.named_parameters() if id(value) in wanted}


def list_rates(settings: HealFit) -> list[float]:
    """Return the peak rates to try, in order: the recipe's alone, or the usual one and two lower ones."""
    usual = RATES[settings.train]
    return [settings.rate] if settings.rate else [float(f"{usual * part:.1g}") for part in PARTS]


def read_tried(scratch: Path) -> list[dict[str, Any]]:
    """Return what a killed distillation had tried and left: of each rate its tokens, seconds and the divergence."""
    path = scratch / TRIED_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _write_tried(scratch: Path, tried: list[dict[str, Any]]) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    write_text(scratch / TRIED_FILE, json.dumps(tried))
