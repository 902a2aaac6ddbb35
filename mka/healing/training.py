"""The training itself, carried by transformers' Trainer: precision, accumulation, checkpoints and resuming are its own.

Here is said what it is told, what it is measured by, when it stops, and from which checkpoint it goes on.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from mka.errors import NumericsError, OutputError
from mka.healing.curve import has_diverged, is_worse, read_curve
from mka.healing.student import Student
from mka.healing.table import HealingWindows
from mka.model.device import find_device
from mka.recipe import HealFit
from mka.terminal import quiet_libraries, show_progress

WARMUP, LOWEST = 0.1, 0.1
# Of AdamW. Few steps: the second moment has to forget its first ones.
BETAS = (0.9, 0.95)
# Measurements of the held-out source, each with a checkpoint to go on from.
MEASUREMENTS = 8
# Steps from one to the next: a checkpoint takes as long as a step.
LEAST = 2
# How a training ends that may begin again with a lower rate, and has to.
RETREATED = "worse than the start"


def run_trainer(
    module: Student,
    windows: HealingWindows,
    settings: HealFit,
    rate: float,
    scratch: Path,
    *,
    seed: int = 0,
    measurements: int = MEASUREMENTS,
    may_retreat: bool = False,
) -> dict[str, Any]:
    """Train a student; its best weights are in it afterwards.

    Args:
        module: teacher and student.
        windows: what it is trained and measured on.
        settings: tokens, windows per step, patience.
        rate: the peak; it rises over the first steps and falls to a tenth along a cosine.
        scratch: folder of checkpoints.
        seed: of everything random.
        measurements: of the held-out source after the start.
        may_retreat: end, without a checkpoint, where the first of several measurements is worse than the start.

    Returns:
        The facts of the training: tokens, rate, why it ended (`RETREATED` among it), the curve, seconds, and under
        "kept" whether the best measurement or the start is what is left.

    Raises:
        NumericsError: if it diverges before anything is better than the start.
        OutputError: if a checkpoint cannot be written.
    """
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
        watch = _Watch(tokens, advance, may_retreat and keeping)
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
    retreated = watch.retreated or (watch.diverged and watch.may_retreat and not best < start)
    if retreated:
        for left in scratch.glob("checkpoint-*"):
            shutil.rmtree(left)
    elif watch.diverged and not best < start:
        shutil.rmtree(scratch, ignore_errors=True)
        raise NumericsError(
            f"healing diverged at step {state.global_step} of {steps}: peak rate {rate:g}, held-out divergence "
            f"{start:.4f} nats at the start and {curve[-1].get('heldout', math.nan):.4f} now; lower heal.rate"
        )
    if retreated:
        ended = RETREATED
    else:
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
    device = find_device().type
    cuda = device == "cuda"
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
        use_cpu=device == "cpu",
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
    """Moves the bar, and stops a training that diverges, or that has to begin again with smaller steps."""

    def __init__(self, tokens: int, advance: Callable[[int], Any], may_retreat: bool) -> None:
        self.tokens, self.advance, self.may_retreat = tokens, advance, may_retreat
        self.diverged = self.retreated = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.diverged = has_diverged(state.log_history)
        self.advance(state.global_step * self.tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(self.tokens)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if has_diverged(state.log_history):
            self.diverged = control.should_training_stop = True
        if self.may_retreat and is_worse(state.log_history):
            self.retreated = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # What is left behind is not gone on from.
        control.should_save = control.should_save and not self.retreated


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
