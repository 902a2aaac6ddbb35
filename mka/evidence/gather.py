"""Evidence gathered for a method: states observed, oracles and trials opened with the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mka.errors import CalibrationError
from mka.evidence.needs import DIVERGENCE, LOSS, OUTPUT_SIMILARITY, REOBSERVE, REPAIRS, RUNNING, TRIALS
from mka.evidence.states import HiddenStates
from mka.model.checkpoint import Checkpoint
from mka.plan.plan import MergedLayer
from mka.recipe import CalibrationSettings, ModelSource
from mka.terminal import show_progress
from mka.texts.positions import check_context


def observe_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    settings: CalibrationSettings,
    description: str,
    layers: Sequence[MergedLayer] | None = None,
) -> HiddenStates:
    """Observe a model's layers on texts, or the output layers planned of it, under a progress bar.

    Raises:
        NumericsError: if hidden states are not finite.
    """
    from mka.evidence.observe import observe_tokens
    from mka.model.decoder import as_decoder
    from mka.texts.tokens import tokenize

    decoder, sequences = as_decoder(model), tokenize(tokenizer, texts, settings.max_tokens)
    count = len(decoder.layers if layers is None else layers)
    options: dict[str, Any] = {"pooling": settings.pooling, "batch_size": settings.batch_size}
    with show_progress(description, count * sum(map(len, sequences)), "tok") as advance:
        return observe_tokens(decoder, sequences, layers=layers, on_layer=advance, **options)


@contextmanager
def open_oracles(
    needs: frozenset[str],
    options: Any,
    checkpoint: Checkpoint,
    texts: Sequence[str],
    settings: CalibrationSettings,
    source: ModelSource,
    scratch: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the parts of `Evidence` that run planned models, by their names; opens the model only for such parts.

    They read its layers when they walk them, and serve within the block only. For the arguments see `make_oracles`;
    candidates that are healed are written into a folder of their own in ``scratch``, by default the system's.

    Raises:
        CalibrationError: if there is too little text.
        CheckpointError: if the model does not load whole.
    """
    if not needs & RUNNING:
        yield {}
        return
    from mka.model.loading import open_decoder

    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        base = (checkpoint, source, scratch)
        yield make_oracles(needs, options, decoder, tokenizer, texts, settings, base)


def make_oracles(
    needs: frozenset[str],
    options: Any,
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    settings: CalibrationSettings,
    base: tuple[Checkpoint, ModelSource, Path | None] | None = None,
) -> dict[str, Any]:
    """Return the parts of `Evidence` that run models planned of this one, by their names.

    Args:
        needs: parts of `Evidence` a method wants.
        options: its settings.
        model: the base, of transformers or a `mka.model.decoder.Decoder`.
        tokenizer: the base's.
        texts: calibration texts.
        settings: how they are cut.
        base: the base on disk, how it is called, and where candidates are written; needed where they are healed.

    Raises:
        CalibrationError: if there is too little text.
    """
    from mka.evidence.oracles import Divergence, Loss, OutputSimilarity

    oracles = {DIVERGENCE: Divergence, LOSS: Loss, OUTPUT_SIMILARITY: OutputSimilarity}
    made: dict[str, Any] = {
        need: oracle(model, tokenizer, texts, max_tokens=settings.max_tokens, tokens=settings.search_tokens)
        for need, oracle in oracles.items()
        if need in needs
    }
    if TRIALS in needs:
        made[TRIALS] = _make_trials(model, tokenizer, texts, options)
    if REPAIRS in needs:
        made[REPAIRS] = _make_repairs(model, tokenizer, texts, options, base)
    if REOBSERVE in needs:
        made[REOBSERVE] = lambda layers: observe_texts(
            model, tokenizer, texts, settings, f"observe {len(layers)} layers", layers
        )
    return made


def _make_trials(model: Any, tokenizer: Any, texts: Sequence[str], options: Any) -> Any:
    import torch

    from mka.alignment.trials import COPIES, AlignedTrials
    from mka.texts.windows import make_copies

    windows = _pack_enough(tokenizer, texts, options, TRIALS)
    fitted, heldout = _count_windows(options, TRIALS)
    # A trial is not fitted on copies: fitted on one, it hides which layers copy (DECISIONS.md).
    copies = make_copies(windows[:fitted], COPIES if options.copying else 0)
    windows = torch.cat([windows, copies])
    return AlignedTrials(model, windows, heldout + len(copies), copies=len(copies), copying=options.copying)


def _make_repairs(model: Any, tokenizer: Any, texts: Sequence[str], options: Any, base: Any) -> Any:
    from mka.evidence.repairs import Healing, MeasuredRepairs

    windows = _pack_enough(tokenizer, texts, options, REPAIRS)
    measured, fitted, healed = windows.split(_count_windows(options, REPAIRS))
    return MeasuredRepairs(model, measured, fitted, Healing(healed, *base) if options.finalists else None)


# Parts of `Evidence` that read windows, and the method's settings that ask for fewer of them.
_ASKED_BY = {TRIALS: "tokens, heldout_tokens or context", REPAIRS: "tokens, aligned_tokens, heal_tokens or context"}


def count_searched(needs: frozenset[str], tokenizer: Any, texts: Sequence[str], settings: CalibrationSettings) -> int:
    """Return the calibration tokens that a search measures every model on; 0 if it measures none."""
    from mka.texts.tokens import take_tokens

    if not needs & {DIVERGENCE, LOSS, OUTPUT_SIMILARITY}:
        return 0
    return sum(map(len, take_tokens(tokenizer, texts, settings.max_tokens, settings.search_tokens)))


def check_texts(needs: frozenset[str], options: Any, checkpoint: Checkpoint, tokenizer: Any, texts: Any) -> None:
    """Refuse, before a model is opened, what `make_oracles` would refuse: windows too long, or too little text.

    Raises:
        RecipeError: if windows are longer than the model reads.
        CalibrationError: if there is too little text.
    """
    for need in needs & _ASKED_BY.keys():
        check_context(options.context, checkpoint.config.get("max_position_embeddings"), "method.settings.context")
        _pack_enough(tokenizer, texts, options, need)


def _count_windows(options: Any, need: str) -> list[int]:
    """Return the windows of each kind that trials (fitted, held out) or repairs (measured, fitted, healed) read."""
    if need == TRIALS:
        return [max(1, tokens // options.context) for tokens in (options.tokens, options.heldout_tokens)]
    fits = options.aligned_tokens if options.repair == "aligned" else 0
    heals = options.heal_tokens if options.finalists else 0
    return [tokens // options.context for tokens in (options.tokens[-1], fits, heals)]


def _pack_enough(tokenizer: Any, texts: Sequence[str], options: Any, need: str) -> Any:
    """Cut as many windows as are read, (S, T); refuses fewer, naming the settings that ask for less."""
    import torch

    from mka.texts.windows import pack_windows

    needed = sum(_count_windows(options, need))
    windows = pack_windows(tokenizer, texts, options.context, needed)
    if len(windows) < needed:
        raise CalibrationError(
            f"{len(windows)} windows of {options.context} tokens in the calibration set, {needed} needed; "
            f"give more samples, or lower the method's {_ASKED_BY[need]}"
        )
    return torch.tensor(windows)
