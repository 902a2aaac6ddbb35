"""Distillation: the student's weights follow the base's logits, carried by transformers' Trainer.

The loss is the forward divergence KL(base || student) at temperature 1 (Hinton et al., arXiv 1503.02531), averaged over
the positions or a share of them. Precision, accumulation, checkpoints and resuming are the Trainer's; what is trained,
and that a source of text which is not trained on stops it, is said here.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from mka.errors import NumericsError, OutputError
from mka.healing.curve import has_diverged, read_curve
from mka.healing.student import Student
from mka.healing.table import HealingWindows
from mka.model.checkpoint import Checkpoint
from mka.model.families import get_family
from mka.model.loading import load_model
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.plan.budget import LAST_TRAINED
from mka.recipe import HealFit, ModelSource
from mka.terminal import quiet_libraries, show_progress

VERSION = 2
TREATS = (ATTENTION, MLP)
# Peak learning rates by what is trained; they rise over the first steps and fall to a tenth along a cosine.
RATES = {"changed": 3e-4, "all": 3e-4, "lora": 1e-3, "head-and-last": 3e-4}
WARMUP, LOWEST = 0.1, 0.1
# Of AdamW. Few steps: the second moment has to forget its first ones.
BETAS = (0.9, 0.95)
RANK = 16
# Measurements of the held-out source, each with a checkpoint to go on from.
MEASUREMENTS = 8
# Steps from one to the next: a checkpoint takes as long as a step.
LEAST = 2


@dataclass(frozen=True)
class Distilled:
    """What a distillation made.

    Attributes:
        tensors: tensor name -> trained values; empty if nothing was better than the start.
        facts: tokens, rate, why it ended, the curve, seconds.
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
    """
    check_parts(base.family.parts, TREATS, "healing", base.family.model_type)
    teacher, _ = load_model(base.path, source.dtype, source.trust_remote_code)
    pupil, _ = load_model(student.path, "float32", source.trust_remote_code)
    first = find_first_trained(student.layers, settings.train, shared)
    torch.manual_seed(seed)  # low-rank additions are drawn
    trained, finish = choose_trained(pupil, settings.train, first)
    module = Student(
        teacher,
        pupil,
        None if shared is None else min(shared, first),
        trained,
        positions=settings.positions,
        length=settings.context,
    )
    found = run_trainer(module, windows, settings, scratch, seed=seed, measurements=measurements)
    finish()
    tensors = {} if found["kept"] == "start" else _read_trained(pupil, trained)
    return Distilled(tensors, {"train": settings.train, "first_layer": first} | found)


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


def run_trainer(
    module: Student,
    windows: HealingWindows,
    settings: HealFit,
    scratch: Path,
    *,
    seed: int = 0,
    measurements: int = MEASUREMENTS,
) -> dict[str, Any]:
    """Train a student; its best weights are in it afterwards.

    Args:
        module: teacher and student.
        windows: what it is trained and measured on.
        settings: tokens, rate, windows per step, patience.
        scratch: folder of checkpoints.
        seed: of everything random.
        measurements: of the held-out source after the start.

    Returns:
        The facts of the training: tokens, rate, why it ended, the curve, seconds, and under "kept" whether the best
        measurement or the start is what is left.

    Raises:
        NumericsError: if it diverges before anything is better than the start.
        OutputError: if a checkpoint cannot be written.
    """
    rate = settings.rate or RATES[settings.train]
    batch = min(settings.batch, len(windows.train))
    steps, tokens = len(windows.train) // batch, batch * windows.train.shape[1]
    every = max(min(LEAST, steps), math.ceil(steps / measurements))
    # Where the end alone is measured there is nothing to go back to, and no checkpoint is written.
    keeping = every < steps
    before = find_last(scratch)
    # What had ended when it was killed is not trained on: without a window left the Trainer only loads the best.
    last = find_end(before) or steps
    started = time.perf_counter()
    with quiet_libraries(), show_progress("heal", steps * tokens, "tok") as advance:
        watch = _Watch(tokens, advance)
        trainer = Trainer(
            model=module,
            args=_arguments(scratch, settings, batch, rate, last, every, seed, keeping=keeping, first=before is None),
            train_dataset=[{"input_ids": row} for row in windows.train[: last * batch]],  # type: ignore[arg-type]
            eval_dataset=[{"input_ids": row} for row in windows.heldout],  # type: ignore[arg-type]
            callbacks=[watch, *([EarlyStoppingCallback(settings.patience)] if keeping else [])],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if before is None else str(before))
        except RuntimeError as error:
            if "inline_container" not in str(error):  # what torch calls a disk that is full
                raise
            raise OutputError(f"checkpoint in {scratch} cannot be written; is the disk full?") from None
    state = trainer.state
    curve = read_curve(state.log_history, tokens)
    start = next(point["heldout"] for point in curve if point["step"] == 0)
    best = math.inf if state.best_metric is None else state.best_metric
    if watch.diverged and not best < start:
        shutil.rmtree(scratch, ignore_errors=True)
        raise NumericsError(
            f"healing diverged at step {state.global_step} of {steps}: peak rate {rate:g}, held-out divergence "
            f"{start:.4f} nats at the start and {curve[-1].get('heldout', math.nan):.4f} now; lower heal.rate"
        )
    ended = "diverged" if watch.diverged else "all text read" if state.global_step >= steps else "no more gain"
    return {
        "tokens": state.global_step * tokens,
        "rate": rate,
        "steps": state.global_step,
        "ended": ended,
        "kept": "best" if best < start else "start",
        "start": start,
        "best": min(best, start),
        "curve": curve,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _arguments(
    scratch: Path,
    settings: HealFit,
    batch: int,
    rate: float,
    steps: int,
    every: int,
    seed: int,
    *,
    keeping: bool,
    first: bool,
) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": LOWEST},
        # A step that warms up from nothing trains nothing; of a single one there would be no other.
        warmup_steps=min(math.ceil(WARMUP * steps), steps - 1),
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        activation_checkpointing=settings.checkpointing,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=first,
        save_strategy="steps" if keeping else "no",
        save_steps=every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=keeping,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        label_names=["input_ids"],
        prediction_loss_only=True,
        remove_unused_columns=False,
        logging_steps=max(1, every // 8),
        logging_nan_inf_filter=False,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )


class _Watch(TrainerCallback):
    """Moves the bar, and stops a training that diverges."""

    def __init__(self, tokens: int, advance: Callable[[int], Any]) -> None:
        self.tokens, self.advance = tokens, advance
        self.diverged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.diverged = has_diverged(state.log_history)
        self.advance(state.global_step * self.tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(self.tokens)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if has_diverged(state.log_history):
            self.diverged = control.should_training_stop = True


def find_last(scratch: Path) -> Path | None:
    """Return the last whole checkpoint of a training that was killed, and remove those after it; None if there is none.

    The Trainer writes a checkpoint's state last.
    """
    there = sorted(scratch.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    while there and _read_state(there[-1]) is None:
        shutil.rmtree(there.pop())
    return there[-1] if there else None


def find_end(checkpoint: Path | None) -> int | None:
    """Return the step at which a training had stopped by itself when a checkpoint was written; None if it had not."""
    state = None if checkpoint is None else _read_state(checkpoint)
    if state is None or not state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
        return None
    return int(state["global_step"])


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
