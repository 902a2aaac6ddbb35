"""Execute a plan: source checkpoint in, stock folder out, one tensor in memory at a time.

Merging is linear, ``theta_c = sum_i w_i theta_i`` (MKA, arXiv 2406.16330), after the gain g of each RMSNorm is moved
into the linear layers that read it. That move is exact, ``W (g * x) = (W diag(g)) x``, and makes the sum meaningful:
otherwise one layer's gains would scale another layer's weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError, NumericsError, PlanError
from mka.model.checkpoint import Checkpoint
from mka.model.config import write_config
from mka.model.families import Family
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.model.shards import BLOCK_BYTES, MAX_SHARD_BYTES, Blocks, write_tensors
from mka.model.tensors import TensorInfo, TensorReader, is_finite, torch_dtype
from mka.plan.plan import MergedLayer, MergePlan
from mka.transforms import Transform
from mka.transforms.fold import Folds, apply_fold, check_folds, find_fold
from mka.transforms.rewrite import publish_copy
from mka.transforms.verbs import check_summable, make_tensor, refuse_selecting

if TYPE_CHECKING:
    import torch


# What a merge may be handed: what its plan's method fitted, and what an alignment refits layer by layer.
FOLDS, ALIGNED = "folds", "aligned"
# Kinds of parts that a merge may copy; those it may sum are `mka.transforms.verbs.SUMMED`.
TREATS = frozenset({ATTENTION, MLP})
# Bytes of each source of a sum at a time: as float32 they stay in the processor's cache.
SUM_BYTES = 1 << 20


def check_plan_fits(plan: MergePlan, source: Checkpoint) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanError: if the layer counts differ or a merge mixes kinds of layers, or its layers have parts that a merge
            cannot treat.
        CheckpointError: if the checkpoint is already quantized.
    """
    check_parts(source.family.parts, TREATS, "merging", str(source.path))
    if source.is_quantized:
        raise CheckpointError(f"{source.path}: weights are already quantized; merge the original checkpoint instead")
    if plan.layers_in != source.layers:
        raise PlanError(f"plan is for {plan.layers_in} layers, {source.path} has {source.layers}")
    planned = plan.base.get("digest")
    if planned and planned != source.digest:
        raise PlanError(
            f"plan was made for digest {planned[:12]}…, {source.path} has {source.digest[:12]}…; plan again"
        )
    for layer in plan.merged:
        if layer.verb == "combine" and len(layer.used) > 1:
            check_summable(source.family)
        # Kinds differ in how attention looks back; an MLP goes with any of them.
        mixed = layer.attention if layer.verb == "take" else layer.sources
        if len({source.kinds[i] for i in mixed}) > 1:
            kinds = ", ".join(f"{i}: {'/'.join(map(str, source.kinds[i]))}" for i in mixed)
            raise PlanError(f"layers of different kinds cannot be merged ({kinds})")


def check_alignable(plan: MergePlan, aligned: bool) -> None:
    """Refuse a plan that cannot be written with, or without, an alignment.

    Raises:
        PlanError: if it was made with folds and is to be aligned, or leaves a choice to an alignment and is not.
    """
    if aligned and plan.folds is not None:
        raise PlanError(f"method {plan.method!r} fits on its own; allowed: alignment of plans without folds")
    for layer in plan.layers if not aligned else ():
        refuse_selecting(layer)


def plan_tensors(layers: Sequence[MergedLayer], source: Checkpoint) -> list[tuple[TensorInfo, MergedLayer | None, str]]:
    """List the output's tensors in the source's order: what each is, its output layer, its name or suffix."""
    suffixes = [source.layer_tensors(i) for i in range(source.layers)]
    planned: list[tuple[TensorInfo, MergedLayer | None, str]] = []
    done = False
    for name, info in source.tensors.items():
        if source.family.split_tensor(name) is None:
            planned.append((info, None, name))
            continue
        if done:
            continue
        done = True
        for position, layer in enumerate(layers):
            shapes = {i: {s: (t.shape, t.dtype) for s, t in suffixes[i].items()} for i in layer.used}
            first = shapes[layer.used[0]]
            if any(other != first for other in shapes.values()):
                raise PlanError(f"layers {list(layer.used)} hold different tensors or shapes and cannot be merged")
            for suffix, (shape, dtype) in first.items():
                target = TensorInfo(source.family.layer_tensor(position, suffix), "", dtype, shape)
                planned.append((target, layer, suffix))
    return planned


def cut_config(
    config: Mapping[str, Any], kinds: Sequence[tuple[Any, ...]], family: Family, layers: Sequence[MergedLayer]
) -> dict[str, Any]:
    """Return config.json for the output: layer count and every per-layer list follow the layers kept.

    Lists that the source left implicit (Gemma's alternating pattern) are written out, since the pattern they were
    derived from no longer holds.
    """
    cut = dict(config)
    cut["num_hidden_layers"] = len(layers)
    for position, name in enumerate(family.per_layer_config):
        if kinds[0][position] is not None:
            cut[name] = [kinds[layer.leader][position] for layer in layers]
    return cut


def merge_checkpoint(
    plan: MergePlan,
    source: Checkpoint,
    output: str | Path,
    *,
    folds: Folds | None = None,
    aligned: Iterator[Mapping[str, "torch.Tensor"]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int], Any] | None = None,
    verify: Callable[[Path], Any] | None = None,
) -> Any:
    """Write the planned model as a stock folder; publish it only once it is whole.

    Args:
        plan: what to make.
        source: the base checkpoint.
        output: folder to publish; must not exist.
        folds: what the plan's method fitted, by output tensor; see `mka.transforms.fold`.
        aligned: of each output layer in order, the tensors that were refitted, by name within the layer; they replace
            what the plan alone would make.
        max_shard_bytes: largest shard.
        on_tensor: called with the bytes of each tensor written (for a progress bar).
        verify: called with the finished folder before it is published; an exception from it publishes nothing.

    Returns:
        What ``verify`` returned.

    Raises:
        PlanError: if plan and checkpoint, or plan and folds, do not fit.
        NumericsError: if a merged tensor or a fold is not finite.
        OutputError: if the folder cannot be written.
    """
    check_plan_fits(plan, source)
    check_alignable(plan, aligned is not None)
    planned = plan_tensors(plan.layers, source)
    check_folds(plan, folds, {info.name: info.shape for info, _, _ in planned})
    specs = [info for info, _, _ in planned]

    def write(folder: Path) -> Mapping[str, str]:
        write_config(folder, cut_config(source.config, source.kinds, source.family, plan.layers))
        # Without an alignment there is nothing to compute that a second thread would not lose by waiting.
        with source.reader() as read, _limit_threads(None if aligned else 1):
            stream = _stream(planned, source.family, read, folds, aligned, on_tensor)
            return write_tensors(folder, specs, stream, max_shard_bytes)

    needed = sum(info.nbytes for info in specs)
    return publish_copy(source, output, write, needed_bytes=needed, verify=verify)


@contextmanager
def _limit_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads within the block; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream(
    planned: Sequence[tuple[TensorInfo, MergedLayer | None, str]],
    family: Family,
    read: TensorReader,
    folds: Folds | None,
    aligned: Iterator[Mapping[str, "torch.Tensor"]] | None,
    on_tensor: Callable[[int], Any] | None,
) -> Iterator[Blocks]:
    """Yield the output's tensors in order, each as blocks of rows, to be used up before the next is asked for."""
    # Tensors of one output layer follow one another.
    for layer, tensors in groupby(planned, key=lambda item: item[1]):
        refitted = next(aligned) if aligned is not None and layer is not None else {}
        for info, _, name in tensors:
            if name in refitted:
                tensor = refitted[name].to(dtype=torch_dtype(info), device="cpu")
                blocks: Blocks = _check_finite([tensor], info, "weights; the refit gave no number")
            else:
                blocks = _read_blocks(info, layer, name, family, read)
                blocks = _check_finite(blocks, info, partial(_find_cause, info, layer, name, family, read))
            yield _fold_blocks(blocks, info, family, folds or {})
            if on_tensor:
                on_tensor(info.nbytes)


def _fold_blocks(blocks: Blocks, info: TensorInfo, family: Family, folds: Folds) -> Blocks:
    """Multiply a tensor's fold in, if it has one; that takes the whole tensor."""
    import torch

    if (fold := find_fold(folds, info.name)) is None:
        return blocks
    folded = apply_fold(fold, torch.cat([block.clone() for block in blocks]), family.stored_offset(info.name))
    return _check_finite([folded], info, f"after its fold, which {info.dtype} cannot hold")


def _read_blocks(
    info: TensorInfo, layer: MergedLayer | None, suffix: str, family: Family, read: TensorReader
) -> Iterator["torch.Tensor"]:
    """Read, or compute, one tensor of the output in blocks of rows: neither it nor its sources are there whole.

    A block is overwritten when the one after the next is asked for.
    """
    import torch

    summed = layer is not None and layer.verb == "combine" and len(layer.used) > 1
    row = info.nbytes // info.shape[0] if len(info.shape) > 1 and info.shape[0] else info.nbytes
    size = max(row, SUM_BYTES if summed else BLOCK_BYTES)
    buffers = [torch.empty(min(size, info.nbytes), dtype=torch.uint8) for _ in range(0 if summed else 2)]
    vectors: dict[str, torch.Tensor] = {}

    def read_source(index: int, name: str) -> "torch.Tensor":
        if name == suffix:
            return read(family.layer_tensor(index, name), rows, buffers[0] if buffers else None)
        if (full := family.layer_tensor(index, name)) not in vectors:
            vectors[full] = read(full)
        return vectors[full]

    step = size // row if row else 1
    for first in range(0, info.shape[0] if len(info.shape) > 1 else 1, step):
        rows = slice(first, first + step) if len(info.shape) > 1 else None
        buffers.reverse()
        yield read(suffix, rows, buffers[0]) if layer is None else make_tensor(layer, suffix, family, read_source)


def _check_finite(blocks: Blocks, info: TensorInfo, cause: str | Callable[[], str]) -> Iterator["torch.Tensor"]:
    for block in blocks:
        if not is_finite(block):
            raise NumericsError(f"{info.name}: NaN or infinite {cause if isinstance(cause, str) else cause()}")
        yield block


def _find_cause(info: TensorInfo, layer: MergedLayer | None, suffix: str, family: Family, read: TensorReader) -> str:
    """Say why a tensor is not finite: a source of it is not, or the dtype cannot hold the sum of finite ones."""
    if layer is not None:
        module = suffix.removesuffix(".weight")
        norms = [f"{norm}.weight" for norm, readers in family.folds.items() if module in readers]
        names = [family.layer_tensor(index, name) for index in layer.used for name in (suffix, *norms)]
        if all(is_finite(block) for name in names for block in read.blocks(name, BLOCK_BYTES)):
            return (
                f"once its norm's gains are folded in and the layers summed: {info.dtype} cannot hold what finite "
                "weights give; store the base in bfloat16 or float32, or delete layers in the place of summing them"
            )
    return "weights; the source checkpoint is damaged"


def _check(source: Checkpoint, plan: MergePlan) -> None:
    check_plan_fits(plan, source)


def _foresee(source: Checkpoint, plan: MergePlan) -> int:
    return sum(info.nbytes for info, _, _ in plan_tensors(plan.layers, source))


def _apply(source: Checkpoint, plan: MergePlan, evidence: Mapping[str, Any], output: Path, **options: Any) -> Any:
    return merge_checkpoint(plan, source, output, folds=evidence.get(FOLDS), aligned=evidence.get(ALIGNED), **options)


TRANSFORM = Transform("merge", "merge layers", _check, _foresee, _apply)
