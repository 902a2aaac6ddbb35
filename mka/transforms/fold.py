"""Folds: factors fitted after a deletion, multiplied into the tensors of the output, so that it stays a stock folder.

A fold is kept under the name of an output tensor and acts on its output side: a number multiplies it, (D,) multiplies
its rows (of a norm: its gains), and (D, D) is F in ``F W``. The bias of the same module gets the same fold. Gains that
the file stores around zero are folded as what they mean, ``offset + w``.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mka.errors import NumericsError, PlanError
from mka.model.families import Family
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.plan.plan import MergePlan

if TYPE_CHECKING:
    import torch


Folds = Mapping[str, np.ndarray]
# Kinds of parts whose output a fold knows how to change.
TREATS = frozenset({ATTENTION, MLP})


def fit_output_map(gram: np.ndarray, cross: np.ndarray, ridge: float, *, diagonal: bool = False) -> np.ndarray:
    """Fit the map T of an output M to a target R: ``argmin ||M T - R||^2 + a ||T - I||^2``, rows are tokens.

    ``T = (G + a I)^-1 (C + a I)`` with ``a = ridge * mean(diag G)``; the objective at T is at most that at I, so the
    squared error on the tokens fitted is never above that of T = I.

    Args:
        gram: G = M^T M, (D, D) float64.
        cross: C = M^T R, (D, D) float64.
        ridge: a, relative to the Gram's mean diagonal.
        diagonal: keep T diagonal.

    Returns:
        T, (D, D), or its diagonal, (D,).

    Raises:
        NumericsError: if the system is singular.
    """
    from scipy.linalg import LinAlgError, LinAlgWarning, solve

    width = len(gram)
    penalty = ridge * np.trace(gram) / width
    if diagonal:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.diag(cross) + penalty) / (np.diag(gram) + penalty)
    import warnings

    eye = np.eye(width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LinAlgWarning)
            return solve(gram + penalty * eye, cross + penalty * eye, assume_a="pos")
    except (LinAlgError, LinAlgWarning):
        raise NumericsError(
            f"least squares for {width} channels is singular with ridge {ridge:g}; give more tokens or a larger ridge"
        ) from None


def fold_output_map(
    position: int, family: Family, gram: np.ndarray, cross: np.ndarray, ridge: float
) -> dict[str, np.ndarray]:
    """Fit the map of an MLP's output and fold it into what writes that output to the residual stream.

    ``M T = H W^T T`` is the writer with the weight ``T^T W``. Behind a post-norm a map does not commute with the norm;
    a diagonal one does, so it is fitted instead and multiplies the norm's gains.

    Args:
        position: output layer.
        family: of the model.
        gram: see `fit_output_map`.
        cross: see `fit_output_map`.
        ridge: see `fit_output_map`.
    """
    fitted = fit_output_map(gram, cross, ridge, diagonal=family.mlp.post_norm is not None)
    return {family.layer_tensor(position, f"{family.mlp.residual_writer}.weight"): fitted.T}


def fold_scales(scales: Mapping[int, float], family: Family, *, tied: bool) -> dict[str, np.ndarray]:
    """Turn factors of the residual stream into folds of what writes to it.

    Args:
        scales: number of output layers before a place in the stream -> what the stream there is multiplied by.
        family: of the model.
        tied: the language-model head is the embedding.

    Raises:
        PlanError: if a layer has parts whose output cannot be scaled.
    """
    check_parts(family.parts, TREATS, "scaling the residual stream", family.model_type)
    total = np.array(np.prod(list(scales.values())))
    folds = {family.embedding_tensor: total}
    if tied:
        folds[family.norm_tensor] = 1.0 / total
    for position in range(max(scales)):
        factor = np.array(np.prod([s for before, s in scales.items() if position < before]))
        for part in family.parts:
            folds[family.layer_tensor(position, f"{part.residual_writer}.weight")] = factor
    return folds


def apply_fold(fold: np.ndarray, tensor: "torch.Tensor", offset: float = 0.0) -> "torch.Tensor":
    """Multiply a fold into a tensor, in float32 or the tensor's own wider dtype; returns it in the tensor's dtype.

    Args:
        fold: a number (), rows (R,) or a matrix (R, R), for a tensor of R rows.
        tensor: (R, ...).
        offset: the tensor stands for ``offset + tensor``.
    """
    import torch

    wide = torch.promote_types(tensor.dtype, torch.float32)
    factor, value = torch.from_numpy(np.array(fold)).to(wide), tensor.to(wide) + offset
    if fold.ndim == 2:
        value = factor @ value
    else:
        value = factor.reshape(-1, *[1] * (value.ndim - 1)) * value if fold.ndim else factor * value
    return (value - offset).to(tensor.dtype)


def find_fold(folds: Folds, name: str) -> np.ndarray | None:
    """Return the fold of a tensor by its name in the output; a bias follows its module's weight."""
    return folds.get(name.removesuffix("bias") + "weight" if name.endswith(".bias") else name)


def check_folds(plan: MergePlan, folds: Folds | None, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse folds that are not the plan's.

    Args:
        plan: names the folds it needs by their digest.
        folds: what was given.
        shapes: of the output's tensors, by name.

    Raises:
        PlanError: if they are missing, others, or name a tensor that the output does not have.
        NumericsError: if they are not finite.
    """
    if plan.folds is not None and (folds is None or digest_folds(folds) != plan.folds):
        given = "none were given" if folds is None else f"those given have {digest_folds(folds)[:12]}…"
        raise PlanError(f"plan needs the folds with digest {plan.folds[:12]}…, {given}; plan again or give its file")
    for name, fold in (folds or {}).items():
        if name not in shapes:
            raise PlanError(f"fold of {name}: the output has no such tensor; plan again")
        rows = shapes[name][0]
        if fold.shape not in ((), (rows,), (rows, rows)):
            raise PlanError(f"fold of {name} has shape {fold.shape}; allowed: (), ({rows},), ({rows}, {rows})")
    require_finite(folds or {})


def require_finite(folds: Folds) -> None:
    """Refuse folds that are not finite.

    Raises:
        NumericsError: naming the first one.
    """
    for name, fold in folds.items():
        if not np.isfinite(fold).all():
            raise NumericsError(f"fold of {name} is NaN or infinite: a channel was silent; give more calibration text")


def folds_path(plan_path: Path) -> Path:
    """Return where the folds of a plan file are: beside it, ``plan.json`` -> ``plan.folds.safetensors``."""
    return plan_path.with_suffix(".folds.safetensors")


def serialise_folds(folds: Folds) -> bytes:
    """Return the bytes of a folds file: safetensors, float32."""
    from safetensors.numpy import save

    return save({name: np.array(fold, dtype=np.float32, order="C") for name, fold in folds.items()})


def digest_folds(folds: Folds) -> str:
    """Return the SHA-256 of the folds' file."""
    return hashlib.sha256(serialise_folds(folds)).hexdigest()


def bind_folds(plan: MergePlan, folds: Folds | None) -> MergePlan:
    """Return the plan with the digest of its folds, without which it is then refused."""
    return replace(plan, folds=digest_folds(folds) if folds else None)


def load_folds(plan: MergePlan, plan_path: Path) -> Folds | None:
    """Read the folds of a plan file; None if it needs none.

    Raises:
        PlanError: if the file is missing or damaged.
    """
    if plan.folds is None:
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folds_path(plan_path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise PlanError(f"plan {plan_path} needs its folds in {path}, which is missing; copy it there") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"folds {path} cannot be read: {error}") from None
