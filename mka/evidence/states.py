"""What observation and scoring hand on: pooled hidden states, and layer scores."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from mka.errors import NumericsError
from mka.outside.reading import STRICT, UnreadableError, build_from, give_reason, is_number, quote, read_json

SCORES_FORMAT = "mka-scores/1"
ScoreKind = Literal["pairwise-similarity", "layer-importance", "block-distance"]


@dataclass(frozen=True)
class HiddenStates:
    """One vector per layer and calibration text.

    Attributes:
        pooled: (L+1, N, D) float32. Index 0 is the input of layer 0 (the embedding), index l+1 the raw output of
            layer l; the last one is not final-normed.
        block_influence: (L,) float64, ``1 - mean_t cos(x_t, y_t)`` between the input x and the output y of each
            layer over all real tokens t (ShortGPT, arXiv 2403.03853, eq. 1).
        tokens: (N,) int64, real tokens of each text.
    """

    pooled: np.ndarray
    block_influence: np.ndarray
    tokens: np.ndarray

    def __post_init__(self) -> None:
        """Check shapes and that every number is finite.

        Raises:
            NumericsError: naming the first layer that holds NaN or infinity.
        """
        if self.pooled.ndim != 3:
            raise NumericsError(f"hidden states have shape {self.pooled.shape}, expected (L+1, N, D)")
        bad = ~np.isfinite(self.pooled).all(axis=(1, 2))
        if bad.any():
            index = int(np.argmax(bad))
            where = "the embedding" if index == 0 else f"layer {index - 1}"
            rows = int((~np.isfinite(self.pooled[index]).all(axis=1)).sum())
            raise NumericsError(
                f"hidden states of {where} hold NaN or infinity in {rows} of {self.pooled.shape[1]} texts; "
                "the checkpoint is damaged or the dtype overflows (try dtype: float32)"
            )

    @property
    def layers(self) -> int:
        """Number of decoder layers, L."""
        return self.pooled.shape[0] - 1

    @property
    def outputs(self) -> np.ndarray:
        """Raw layer outputs only, (L, N, D)."""
        return self.pooled[1:]

    def take_texts(self, rows: np.ndarray) -> "HiddenStates":
        """Return the vectors of some of the texts; Block Influence, which is kept of all tokens only, stays theirs."""
        return HiddenStates(self.pooled[:, rows], self.block_influence, self.tokens[rows])

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        parts = (self.pooled, self.block_influence, self.tokens)
        return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts)).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        from safetensors.numpy import save_file

        arrays = {"pooled": self.pooled, "block_influence": self.block_influence, "tokens": self.tokens}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote.

        Raises:
            NumericsError: if the file is not a hidden-states file.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(path)
            _check_arrays(arrays)
        # What the library raises of a damaged header, of a dtype numpy has not, and of a name that is none.
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NumericsError(f"hidden states {path} cannot be read: {error}") from None
        return cls(**arrays)


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that `HiddenStates.save` would not have written."""
    wanted = {"pooled": (3, "f"), "block_influence": (1, "f"), "tokens": (1, "iu")}
    if arrays.keys() != wanted.keys():
        raise ValueError(f"it holds {quote(sorted(arrays))}; expected {', '.join(wanted)}")
    for name, (rank, kinds) in wanted.items():
        if arrays[name].ndim != rank or arrays[name].dtype.kind not in kinds or not arrays[name].size:
            raise ValueError(f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}")
    layers, texts = arrays["pooled"].shape[0] - 1, arrays["pooled"].shape[1]
    if (len(arrays["block_influence"]), len(arrays["tokens"])) != (layers, texts) or layers < 1:
        shapes = ", ".join(f"{name} {arrays[name].shape}" for name in wanted)
        raise ValueError(f"its arrays do not fit each other: {shapes}")
    if not np.isfinite(arrays["block_influence"]).all() or (arrays["tokens"] < 1).any():
        raise ValueError("a Block Influence is not finite, or a text has no tokens")


@dataclass(frozen=True)
class Stability:
    """How far the order of neighbouring layers hangs on the texts; see `mka.similarity.stability`.

    Attributes:
        texts: N of the full set.
        halves: half-samples scored, of N // 2 texts each.
        correlation: mean rank correlation (Spearman) of a half-sample's order with the full set's, -1 to 1.
        correlation_least, correlation_most: its range.
        best: half-samples whose most similar pair of neighbours is the full set's.
        best_two: half-samples whose two most similar pairs are the full set's, in either order.
    """

    __pydantic_config__ = STRICT

    texts: int
    halves: int
    correlation: float
    correlation_least: float
    correlation_most: float
    best: int
    best_two: int


@dataclass(frozen=True)
class LayerScores:
    """What a method thinks of the layers.

    Attributes:
        kind: "pairwise-similarity": values (L, L), high means alike; "layer-importance": values (L,), low means
            removable; "block-distance": values (L, L), [i, j] of the block from layer i to layer j, low means
            removable.
        values: float64.
        meaning: one line for people, with the range.
        method: who computed them.
        settings: with which settings.
        stability: of pairwise similarities, how far their order hangs on the texts; None if it was not measured.
    """

    kind: ScoreKind
    values: np.ndarray
    meaning: str
    method: str
    settings: Mapping[str, Any]
    stability: Stability | None = None

    def __post_init__(self) -> None:
        """Check shape and finiteness.

        Raises:
            NumericsError: if the values are not what ``kind`` says.
        """
        shape = self.values.shape
        good = len(shape) == 1 if self.kind == "layer-importance" else len(shape) == 2 and shape[0] == shape[1]
        if not good:
            raise NumericsError(f"{self.kind} scores have shape {shape}")
        if not np.isfinite(self.values).all():
            raise NumericsError(f"{self.method}: {int((~np.isfinite(self.values)).sum())} scores are NaN or infinite")

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return self.values.shape[0]

    def save(self, path: str | Path) -> None:
        """Write as JSON in the documented format (docs/formats.md)."""
        body: dict[str, Any] = {
            "format": SCORES_FORMAT,
            "kind": self.kind,
            "method": self.method,
            "meaning": self.meaning,
        }
        body |= {"settings": dict(self.settings), "values": self.values.tolist()}
        body["stability"] = None if self.stability is None else asdict(self.stability)
        Path(path).write_text(json.dumps(body) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote.

        Raises:
            NumericsError: if the file is not a scores file.
        """
        try:
            body = read_json(path)
            if body["format"] != SCORES_FORMAT or body["kind"] not in get_args(ScoreKind):
                raise UnreadableError(
                    f"format {quote(body['format'])}, kind {quote(body['kind'])}; expected {SCORES_FORMAT!r}"
                )
            if not all(isinstance(body[name], str) for name in ("meaning", "method")):
                raise UnreadableError("meaning and method must be texts")
            if not isinstance(body["settings"], dict):
                raise UnreadableError(f"settings must be an object, got {quote(body['settings'])}")
            found = body.get("stability")
            stability = None if found is None else build_from(Stability, found)
            values = _read_values(body["values"])
            return cls(body["kind"], values, body["meaning"], body["method"], body["settings"], stability)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise NumericsError(f"scores {path} cannot be read: {give_reason(error)}") from None


def _read_values(values: Any) -> np.ndarray:
    rows = values if isinstance(values, list) else [values]
    strange = next((x for row in rows for x in (row if isinstance(row, list) else [row]) if not is_number(x)), None)
    if strange is not None or not rows:
        raise UnreadableError(f"values must be finite numbers, got {quote(strange)}")
    return np.asarray(values, dtype=np.float64)
