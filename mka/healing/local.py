"""Healing layer by layer: each layer's own weights follow the base's hidden states by gradient.

Teacher (the base) and student (the merged model) walk in lockstep over hidden states kept in memory, as in
`mka.alignment.lockstep`. From the first change on, each layer of the student, given what the healed layers in front of
it really feed it, is trained to give the base's state h after the source layer it answers for:
``sum_t w_t |f(x_t) - h_t|^2`` with ``w_t = 1/|h_t|^2``, clipped. A closed form fits what a layer writes with what it
reads held fixed; here all its weights move together.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from mka.alignment.lockstep import BATCH_TOKENS, WRITERS, Alignment
from mka.alignment.refit import relative_error, token_weights
from mka.errors import NumericsError, PlanError
from mka.model.checkpoint import Checkpoint
from mka.model.decoder import Decoder
from mka.model.parts import check_parts
from mka.model.walk import own_context, run_layer
from mka.recipe import HealFit

VERSION = 1
# Where the recipe says null.
RATE = 1e-4
# Times each layer reads the windows, and measurements on those held out meanwhile.
PASSES = 4
MEASUREMENTS = 12
# The rate rises over this share of the steps and falls to this share of its peak by half a cosine.
WARM_UP, FLOOR = 0.1, 0.1
BETAS = (0.9, 0.95)
MOST_GRADIENT = 1.0
# Of an error above this many times the error at the start, or that of no output at all, the training has diverged.
DIVERGED = 10.0


@dataclass(frozen=True)
class HealedLayer:
    """One layer of the student.

    Attributes:
        position: its index.
        tensors: tensor name within the layer -> trained float32 values; empty if the layer stays as it is.
        facts: relative squared error on the held-out windows ``before`` and ``after``, ``steps`` and ``seconds`` taken,
            and why it ``stopped``: "patience" or "end". Empty in front of the first change.
    """

    position: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lesson:
    """What one layer is trained on; the windows held out come last.

    Attributes:
        given: the student's states in front of the layer, (S + H, T, D).
        wanted: the base's states to follow, (S + H, T, D).
        context: what the decoder hands to the layer beside its states.
        fitted: S, the windows trained on.
    """

    given: torch.Tensor
    wanted: torch.Tensor
    context: Mapping[str, Any]
    fitted: int


# Whoever writes the layers may ask for them in inference mode, where nothing can be trained.
@torch.inference_mode(False)
def heal_locally(
    base: Decoder,
    student: Decoder,
    ends: Sequence[int],
    windows: torch.Tensor,
    heldout: torch.Tensor,
    settings: HealFit,
    *,
    seed: int = 0,
    on_tokens: Callable[[int], Any] | None = None,
) -> Iterator[HealedLayer]:
    """Yield the student's layers in order, trained.

    Memory: some six arrays of hidden states (S + H, T, D), and one layer with what its training keeps. Of streamed
    decoders one layer each.

    Args:
        base: the teacher.
        student: what was made of it, with the base's hidden size.
        ends: the source layer whose output each layer of the student has to reproduce; see
            `mka.alignment.lockstep.find_ends`.
        windows: token ids that are trained on, (S, T), without padding.
        heldout: token ids that decide when to stop and what to keep, (H, T).
        settings: rate, windows per step and patience.
        seed: of the order in which windows are read.
        on_tokens: called with tokens times source layers passed, in all ``len(base.layers) * windows.numel()``.

    Raises:
        PlanError: if layers have parts that cannot be healed, or ``ends`` does not fit base and student.
        NumericsError: if a training diverges.
    """
    check_parts(student.family.parts, WRITERS, "healing", student.family.model_type)
    _check_ends(base, student, ends)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        every = torch.cat([windows, heldout])
        walk = Alignment(base, every, heldout=len(heldout))
        _, contexts = student.enter(windows[:1])
        states, teacher = _by_batches(lambda ids: student.enter(ids)[0], every), walk.start
    # As long as the student is the base, the two are one tensor.
    states = teacher if torch.equal(states, teacher) else states
    first = 0
    for position, end in enumerate(ends):
        with torch.no_grad():
            after = walk.run_teacher(teacher, first, end, ()).after
        with student.hold(position):
            layer = student.layers[position]
            same = states is teacher and end == first and _is_copy(base, end, layer)
            module = None if same else deepcopy(layer).float()
        if module is None:
            states, made = after, HealedLayer(position, {})
        else:
            lesson = Lesson(states, after, own_context(contexts[position], torch.float32), len(windows))
            tensors, facts = train_layer(module, lesson, settings, generator, f"layer {position}")
            states, made = _run(module, states, lesson.context), HealedLayer(position, tensors, facts)
            del module, lesson
        teacher = after
        if on_tokens:
            on_tokens((end + 1 - first) * windows.numel())
        first = end + 1
        student.tidy()
        yield made


def train_layer(
    layer: torch.nn.Module, lesson: Lesson, settings: HealFit, generator: torch.Generator, name: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train a layer in place, and leave it as it was best on the windows held out.

    Args:
        layer: float32; called with states (s, T, D) and the lesson's context.
        lesson: what it is trained on.
        settings: rate, windows per step and patience.
        generator: of the order in which windows are read.
        name: how refusals call it.

    Returns:
        Its tensors, none if nothing was better than the start; and the facts of `HealedLayer`.

    Raises:
        NumericsError: if the training diverges.
    """
    started, rate = time.perf_counter(), settings.rate or RATE
    count, per_pass = lesson.fitted, math.ceil(lesson.fitted / settings.batch)
    steps = PASSES * per_pass
    every = max(1, steps // MEASUREMENTS)
    weights = token_weights(lesson.wanted[:count])  # (S, T)
    before = best = _measure(layer, lesson)
    kept, waited, step = _copy_state(layer), 0, 0
    layer.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_peak(step, steps))
    while step < steps and waited < settings.patience:
        if step % per_pass == 0:
            order = torch.randperm(count, generator=generator).split(settings.batch)
        rows = order[step % per_pass]
        with torch.enable_grad():
            output = run_layer(layer, lesson.given[rows].float(), lesson.context)
            loss = relative_error(output, lesson.wanted[rows].float(), weights[rows])
            _refuse_diverged(loss.item(), before, name, rate)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(layer.parameters(), MOST_GRADIENT)
        optimizer.step()
        schedule.step()
        step += 1
        if step % every == 0 or step == steps:
            error = _measure(layer, lesson)
            _refuse_diverged(error, before, name, rate)
            waited = 0 if error < best else waited + 1
            if error < best:
                best, kept = error, _copy_state(layer)
    layer.requires_grad_(False)
    layer.load_state_dict(kept)
    facts = {"before": before, "after": best, "steps": step, "seconds": time.perf_counter() - started}
    stopped = "patience" if waited == settings.patience else "end"
    return kept if best < before else {}, facts | {"stopped": stopped}


def estimate_memory(tokens: int, checkpoint: Checkpoint, dtype: str) -> int:
    """Estimate what a healing holds beside two streamed decoders, in bytes.

    Six arrays of hidden states, tokens x D, in the precision of the forward passes, and one layer in float32 six
    times: its weights, their gradients, two moments, the best so far, and the layer before it while it is written.

    Args:
        tokens: trained on and held out.
        checkpoint: of base or student.
        dtype: precision of the forward passes.
    """
    parameters = max(sum(t.parameters for t in checkpoint.layer_tensors(i).values()) for i in range(checkpoint.layers))
    return 6 * tokens * int(checkpoint.config["hidden_size"]) * (4 if dtype == "float32" else 2) + 6 * 4 * parameters


def _check_ends(base: Decoder, student: Decoder, ends: Sequence[int]) -> None:
    if len(ends) != len(student.layers) or ends[-1] != len(base.layers) - 1:
        raise PlanError(
            f"healing: a plan of {ends[-1] + 1} layers made {len(ends)}, the base has {len(base.layers)} and the "
            f"student {len(student.layers)}; give the plan and the base it was made of"
        )


def _is_copy(base: Decoder, source: int, layer: torch.nn.Module) -> bool:
    """Whether a layer is one of the base's, to the bit."""
    with base.hold(source):
        theirs, ours = base.layers[source].state_dict(), layer.state_dict()
        return theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


@torch.no_grad()
def _run(layer: torch.nn.Module, states: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """Return the states behind a float32 layer, (S, T, D), in the dtype they have in front of it."""
    return _by_batches(lambda given: run_layer(layer, given.float(), context).to(states.dtype), states)


def _by_batches(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    # (s, T, …) each -> (S, T, D)
    return torch.cat([function(batch) for batch in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))])


def _measure(layer: torch.nn.Module, lesson: Lesson) -> float:
    """Return the relative squared error on the windows held out."""
    wanted = lesson.wanted[lesson.fitted :].float()
    output = _run(layer, lesson.given[lesson.fitted :], lesson.context).float()
    return float(relative_error(output, wanted, token_weights(wanted)))


def _copy_state(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in layer.state_dict().items()}


def _share_of_peak(step: int, steps: int) -> float:
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _refuse_diverged(error: float, before: float, name: str, rate: float) -> None:
    if not error <= DIVERGED * max(1.0, before):  # NaN is not
        raise NumericsError(
            f"{name}: healing diverges at rate {rate:g}, the relative error went from {before:.4g} to {error:.4g}; "
            f"lower heal.rate (the default is {RATE:g})"
        )
