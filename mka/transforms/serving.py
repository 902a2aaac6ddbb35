"""What of a checkpoint an engine has kernels for, and what stock loading misses, refused before anything is rounded."""

import math
from collections.abc import Iterable

from mka.errors import RecipeError
from mka.kernels import find_row
from mka.model.checkpoint import Checkpoint
from mka.recipe import LEAST_GROUP, QuantizeSettings
from mka.transforms import SCHEMES, list_options


def check_kernels(source: Checkpoint, settings: QuantizeSettings) -> None:
    """Refuse widths and group sizes that the engine named by ``serve_on`` has no kernel for.

    Raises:
        RecipeError: naming what it has them for.
    """
    for name in list_options(settings):
        row = find_row(settings.serve_on, name)
        if SCHEMES[name].grouped and settings.group_size % row.group_multiple:
            raise RecipeError(
                f"quantize.group_size {settings.group_size}: {row.engine.label} holds whole numbers in groups of "
                f"multiples of {row.group_multiple}, and would unpack these; name such a group_size, or no serve_on"
            )
        if row.groups and SCHEMES[name].grouped and settings.group_size not in row.groups:
            raise RecipeError(
                f"quantize.group_size {settings.group_size}: {row.engine.label} runs {name} in groups of "
                f"{', '.join(map(str, row.groups))} only"
            )
        widths = {width for shape in list_products(source) for width in shape if width % row.multiple}
        if widths:
            raise RecipeError(
                f"quantize.scheme {settings.scheme}: {row.engine.label} runs {name} on widths that are multiples of "
                f"{row.multiple}, this model has {sorted(widths)}; name another scheme, or no serve_on"
            )


def list_group_sizes(widths: Iterable[int], settings: QuantizeSettings | None = None) -> list[int]:
    """Return the group sizes that may be named: those that divide all widths, powers of two if any of them is one.

    Args:
        widths: of the inputs.
        settings: whose schemes and engine are to have them; None: whatever they are.
    """
    common = math.gcd(*widths)
    rows = [find_row(settings.serve_on, name) for name in list_options(settings)] if settings else []
    sizes = [
        size
        for size in range(LEAST_GROUP, common + 1)
        if not common % size and all(not size % row.group_multiple and size in (row.groups or (size,)) for row in rows)
    ]
    return [size for size in sizes if size.bit_count() == 1] or sizes


def list_products(source: Checkpoint) -> list[tuple[int, int]]:
    """List the matrices that an engine multiplies with, (outputs, inputs): the readers of a norm are one there."""
    found = []
    for layer in range(source.layers):
        for part in source.family.parts:
            for fused in part.fused:
                names = (source.family.layer_tensor(layer, f"{name}.weight") for name in fused)
                shapes = [source.tensors[name].shape for name in names if name in source.tensors]
                if shapes:
                    found.append((sum(shape[0] for shape in shapes), shapes[0][1]))
    return found


def check_embeddings(source: Checkpoint) -> None:
    """Refuse an embedding that keeps something beside its weight: stock loading calls that missing once it is rounded.

    Raises:
        RecipeError: naming it.
    """
    import torch

    from mka.model.outline import build_outline

    embedding = source.family.get_embedding(build_outline(source, torch.float32))
    if beside := [name for name, _ in embedding.named_buffers()]:
        raise RecipeError(
            f"quantize.embeddings int8: the embedding of {source.family.model_type} keeps {beside[0]} beside its "
            "weight, which stock loading of a rounded one misses; leave embeddings off"
        )
