"""Evidence gathered for a method: states observed, oracles and trials opened with the model."""

from collections.abc import Sequence
from typing import Any

from mka.errors import CalibrationError, PlanError
from mka.evidence.needs import DIVERGENCE, LOSS, OUTPUT_SIMILARITY, REOBSERVE, TRIALS
from mka.evidence.states import HiddenStates
from mka.model.checkpoint import Checkpoint
from mka.recipe import CalibrationSettings, ModelSource
from mka.terminal import show_progress
from mka.texts.calibration import CalibrationSet


def observe_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], settings: CalibrationSettings, description: str
) -> HiddenStates:
    """Observe a model's layers on texts, under a progress bar.

    Raises:
        NumericsError: if hidden states are not finite.
    """
    from mka.evidence.observe import observe_tokens
    from mka.model.decoder import as_decoder
    from mka.texts.tokens import tokenize

    decoder, sequences = as_decoder(model), tokenize(tokenizer, texts, settings.max_tokens)
    with show_progress(description, len(decoder.layers) * sum(map(len, sequences)), "tok") as advance:
        return observe_tokens(
            decoder, sequences, pooling=settings.pooling, batch_size=settings.batch_size, on_layer=advance
        )


def open_oracles(
    method: str,
    needs: frozenset[str],
    options: Any,
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    settings: CalibrationSettings,
    source: ModelSource,
) -> dict[str, Any]:
    """Return the parts of `Evidence` that run planned models, by their names; loads the model only for such parts.

    Raises:
        PlanError: if the method wants one and there is no calibration set.
    """
    wanted = needs & {REOBSERVE, DIVERGENCE, LOSS, OUTPUT_SIMILARITY, TRIALS}
    if not wanted:
        return {}
    if calibration is None:
        raise PlanError(f"method {method!r} with these settings needs a calibration set; give one")
    from mka.evidence.candidate import build_candidate
    from mka.evidence.oracles import Divergence, Loss, OutputSimilarity
    from mka.model.loading import load_model

    texts = calibration.texts
    model, tokenizer = load_model(checkpoint.path, source.dtype, source.trust_remote_code)
    oracles = {DIVERGENCE: Divergence, LOSS: Loss, OUTPUT_SIMILARITY: OutputSimilarity}
    opened: dict[str, Any] = {
        need: oracle(model, tokenizer, texts, max_tokens=settings.max_tokens, tokens=settings.search_tokens)
        for need, oracle in oracles.items()
        if need in wanted
    }
    if TRIALS in wanted:
        opened[TRIALS] = _open_trials(model, tokenizer, texts, options)
    if REOBSERVE in wanted:
        opened[REOBSERVE] = lambda layers: observe_texts(
            build_candidate(model, layers), tokenizer, texts, settings, f"observe {len(layers)} layers"
        )
    return opened


def _open_trials(model: Any, tokenizer: Any, texts: Sequence[str], options: Any) -> Any:
    import torch

    from mka.alignment.trials import COPIES, AlignedTrials
    from mka.texts.windows import make_copies, pack_windows

    fitted, heldout = (max(1, tokens // options.context) for tokens in (options.tokens, options.heldout_tokens))
    windows = pack_windows(tokenizer, texts, options.context, fitted + heldout)
    if len(windows) < fitted + heldout:
        raise CalibrationError(
            f"{len(windows)} windows of {options.context} tokens in the calibration set, {fitted + heldout} needed; "
            f"give more samples, or lower the method's tokens, heldout_tokens or context"
        )
    # A trial is not fitted on copies: fitted on one, it hides which layers copy (DECISIONS.md).
    copies = make_copies(torch.tensor(windows[:fitted]), COPIES if options.copying else 0)
    windows = torch.cat([torch.tensor(windows), copies])
    return AlignedTrials(model, windows, heldout + len(copies), copies=len(copies), copying=options.copying)
