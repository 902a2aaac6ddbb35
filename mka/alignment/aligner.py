"""An alignment from texts: windows dealt over sources, the penalty chosen on one left out, then the walk itself."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mka.alignment.lockstep import Alignment
from mka.alignment.table import find_heldout
from mka.plan.plan import MergedLayer
from mka.recipe import AlignmentFit
from mka.terminal import show_progress
from mka.texts.windows import deal_windows, make_copies

# Tried where the recipe says 'auto', on this share of the tokens.
PENALTIES = (0.3, 1.0, 3.0)
PROBE = 0.125

Written = TypeVar("Written")


class Aligner:
    """Aligns plans of one model on one table of texts."""

    def __init__(self, model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], settings: AlignmentFit) -> None:
        """Cut the windows; the model may be a `mka.model.decoder.Decoder`.

        Raises:
            CalibrationError: if there is too little text.
        """
        self.model, self.settings = model, settings
        self.windows = deal_windows(tokenizer, texts, context=settings.context, tokens=settings.tokens)
        every = torch.cat(list(self.windows.values()))
        self.copies = make_copies(every, round(settings.copies * len(every)))

    def align(
        self, layers: Sequence[MergedLayer], write: Callable[[Iterator[Mapping[str, torch.Tensor]]], Written]
    ) -> tuple[Written, dict[str, Any]]:
        """Refit the output layers while they are written.

        Args:
            layers: of a plan.
            write: given the refitted tensors of each output layer, in order, by name within the layer; uses them all.

        Returns:
            What ``write`` returned, and the facts of the fit.

        Raises:
            RecipeError: if the source to leave out is not in the table, or is all there is.
            NumericsError: if a fit is not finite.
        """
        facts: dict[str, Any] = {}
        written = write(self._refit(layers, facts))
        return written, facts

    @torch.inference_mode()
    def _refit(self, layers: Sequence[MergedLayer], facts: dict[str, Any]) -> Iterator[Mapping[str, torch.Tensor]]:
        """Yield the refitted tensors of each output layer; with the last, note the facts of the fit.

        The penalty is chosen when the first is asked for, after whoever writes them has refused what cannot be written.
        """
        started = time.perf_counter()
        penalty, probes = self._choose_penalty(layers)
        chosen_at = time.perf_counter()
        windows = torch.cat([*self.windows.values(), self.copies])
        walk = Alignment(self.model, windows)
        count, records = len(walk.contexts), []
        with show_progress("align layers", count * windows.numel(), "tok") as advance:
            for made in walk.walk(layers, penalty=penalty, on_layer=lambda passed: advance(passed * windows.numel())):
                records.append(dict(made.facts))
                if made.position == len(layers) - 1:
                    facts |= {
                        "tokens": windows.numel() - self.copies.numel(),
                        "windows": {source: len(rows) for source, rows in self.windows.items()},
                        "copies": len(self.copies),
                        "context": windows.shape[1],
                        "penalty": penalty,
                        "probes": probes,
                        "probe_seconds": chosen_at - started,
                        "seconds": time.perf_counter() - chosen_at,
                        "teacher_seconds": walk.teacher_seconds,
                        "layers": records,
                    }
                yield made.tensors

    def _choose_penalty(self, layers: Sequence[MergedLayer]) -> tuple[float, dict[str, Any]]:
        given = self.settings.penalty
        if given != "auto":
            return float(given), {}
        heldout = find_heldout({source: len(rows) for source, rows in self.windows.items()}, self.settings)
        fitted = [rows for source, rows in self.windows.items() if source != heldout]
        fitted = [rows[: max(1, round(PROBE * len(rows)))] for rows in fitted]
        fitted.append(self.copies[: round(PROBE * len(self.copies))])
        measured = self.windows[heldout][: max(1, round(PROBE * sum(map(len, fitted)) / 2))]
        walk = Alignment(self.model, torch.cat([*fitted, measured]), heldout=len(measured))
        with show_progress("choose penalty", len(walk.contexts), "layer") as advance:
            for _ in walk.walk_students(layers, PENALTIES, on_layer=advance):
                pass
        found = {penalty: walk.measure_divergence(index) for index, penalty in enumerate(PENALTIES)}
        best = min(found, key=found.__getitem__)
        facts = {"source": heldout, "tokens": sum(map(torch.Tensor.numel, fitted)), "heldout": measured.numel()}
        return best, facts | {"divergence": {str(penalty): value for penalty, value in found.items()}}
