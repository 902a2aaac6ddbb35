"""A GGUF file, as llama.cpp and Ollama read it: weights, config, tokenizer and chat template; and a Modelfile."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_VERSION

from mka.errors import CheckpointError, RecipeError, nearest
from mka.export.architectures import Architecture, describe_config, get_architecture
from mka.export.carrying import CARRIERS, carry_rows
from mka.export.ggml import FILE_TYPES, ROUNDED, Kind, require_quantizer, round_rows
from mka.export.ollama import list_stops, write_modelfile
from mka.export.placing import FileTensor, place_tensors
from mka.export.readback import check_file
from mka.export.vocabulary import Vocabulary, add_vocabulary, read_vocabulary
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.companions import copy_licences
from mka.model.config import build_config
from mka.model.loading import load_tokenizer
from mka.model.tensors import TensorReader
from mka.store.publishing import check_room, replace_file
from mka.store.sums import write_sums


@dataclass(frozen=True)
class FilePlan:
    """All a file will hold.

    Attributes:
        file_type: that was asked for.
        architecture: llama.cpp's.
        facts: what is said of the model, by the names of `gguf.GGUFWriter`'s methods.
        tensors: in the order they are written.
        vocabulary: of its tokenizer.
        tokenizer: transformers'.
    """

    file_type: str
    architecture: Architecture
    facts: dict[str, Any]
    tensors: list[FileTensor]
    vocabulary: Vocabulary
    tokenizer: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the file, a little more than it will have."""
        spelled = sum(4 * len(text) + 24 for text in (*self.vocabulary.tokens, *(self.vocabulary.merges or ())))
        return spelled + sum(tensor.nbytes + GGUF_DEFAULT_ALIGNMENT + 128 for tensor in self.tensors)

    @property
    def number(self) -> LlamaFileType:
        """What readers are told the file is: of kept weights the type that most of them are in."""
        if self.file_type != ROUNDED:
            return FILE_TYPES[self.file_type].number
        counted = _count_weights(tensor for tensor in self.tensors if tensor.rounded is not None)
        return CARRIERS[counted.most_common(1)[0][0]].number if counted else LlamaFileType.MOSTLY_F16

    @property
    def types(self) -> dict[str, dict[str, float]]:
        """What tensors are stored as -> the share of all weights that is, and its bytes; the most first."""
        counted, found = _count_weights(self.tensors), {}
        for kind, count in counted.most_common():
            nbytes = sum(tensor.nbytes for tensor in self.tensors if tensor.kind == kind)
            found[kind.name] = {"share": count / counted.total(), "bytes": nbytes}
        return found


def _count_weights(tensors: Iterable[FileTensor]) -> Counter[Kind]:
    counted: Counter[Kind] = Counter()
    for tensor in tensors:
        counted[tensor.kind] += tensor.weights
    return counted


def write_gguf(source: Path, target: Path, file_type: str) -> Path:
    """Write a model folder as one GGUF file, and read it back before it gets its name.

    Memory holds one tensor as it is stored, and blocks of it as it was.

    Args:
        source: the folder.
        target: an existing folder.
        file_type: a key of `FILE_TYPES`, or `ROUNDED`.

    Returns:
        The file, ``NAME-TYPE.gguf`` in ``target``.

    Raises:
        RecipeError: if there is no such type, or nothing that rounds to it.
        CheckpointError: if llama.cpp has no architecture or tokenizer for the model, or would compute something else.
        NumericsError: if weights are outside the type's range.
        OutputError: if the disk is full, or the file does not hold what was written.
    """
    checkpoint = open_checkpoint(source, verify=False)
    return _write_planned(checkpoint, plan_file(checkpoint, file_type), target)


def _write_planned(checkpoint: Checkpoint, plan: FilePlan, target: Path) -> Path:
    file = target / f"{name_model(checkpoint.path)}-{plan.file_type.upper()}.gguf"
    check_room(file, plan.nbytes)

    def write(aside: Path) -> None:
        _write(aside, checkpoint, plan)
        with checkpoint.reader() as read:
            check_file(aside, file.name, plan.tensors, read)

    replace_file(file, write)
    return file


def export_gguf(source: Path, target: Path, file_type: str) -> dict[str, Any]:
    """Fill an empty folder with a GGUF file, the Modelfile that Ollama wants beside it, licences, and sums.

    Arguments and refusals are those of `write_gguf`.

    Returns:
        ``types`` of the `FilePlan`.
    """
    checkpoint = open_checkpoint(source, verify=False)
    plan = plan_file(checkpoint, file_type)
    file = _write_planned(checkpoint, plan, target)
    write_modelfile(target / "Modelfile", file.name, source)
    copy_licences(source, target)
    write_sums(target)
    return {"types": plan.types}


def foresee_bytes(checkpoint: Checkpoint, file_type: str) -> int:
    """Return the bytes `export_gguf` will write; refusals are those of `write_gguf`."""
    return plan_file(checkpoint, file_type).nbytes


EXPORT = export_gguf


def name_model(folder: Path) -> str:
    """Name a model by its folder; one in a hub's cache by the model's name there."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def plan_file(checkpoint: Checkpoint, file_type: str) -> FilePlan:
    """Decide what a file will hold, without reading a weight; refusals are those of `write_gguf`."""
    types, where = [*FILE_TYPES, ROUNDED], str(checkpoint.path)
    if file_type not in types:
        raise RecipeError(f"unknown type {file_type!r}{nearest(file_type, types)}; types: {', '.join(types)}")
    if file_type != ROUNDED:
        require_quantizer(file_type)
    architecture = get_architecture(checkpoint.family.model_type)
    if checkpoint.is_quantized and file_type != ROUNDED:
        raise CheckpointError(
            f"{where}: its weights are rounded already, and type {file_type!r} would unpack them or round them again; "
            f"take type {ROUNDED!r}, which keeps them, or export the folder it was rounded from"
        )
    if file_type == ROUNDED and not checkpoint.is_quantized:
        raise CheckpointError(
            f"{where}: its weights are not rounded, and type {ROUNDED!r} keeps those that are; types: "
            f"{', '.join(FILE_TYPES)}"
        )
    config = build_config(checkpoint.config, where)
    rows = checkpoint.tensors[checkpoint.family.embedding_tensor].shape[0]
    facts = describe_config(config, architecture, rows)
    tokenizer = load_tokenizer(checkpoint.path)
    vocabulary = read_vocabulary(tokenizer, rows, where)
    tensors = place_tensors(checkpoint, config, architecture, file_type)
    return FilePlan(file_type, architecture, facts, tensors, vocabulary, tokenizer)


def _write(path: Path, checkpoint: Checkpoint, plan: FilePlan) -> None:
    writer = GGUFWriter(path, plan.architecture.name)
    try:
        _describe(writer, checkpoint, plan)
        for tensor in plan.tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with checkpoint.reader() as read:
            for tensor in plan.tensors:
                writer.write_tensor_data(_round(tensor, read))
    finally:
        writer.close()


def _round(tensor: FileTensor, read: TensorReader) -> np.ndarray:
    """Return a tensor as it is stored, (R, bytes of a row) uint8; a vector is one row."""
    count = tensor.shape[0] if len(tensor.shape) > 1 else 1
    data = np.empty((count, tensor.nbytes // count), dtype=np.uint8)
    first = 0
    for rows in _store(tensor, read):
        data[first : first + len(rows)] = rows
        first += len(rows)
    return data


def _store(tensor: FileTensor, read: TensorReader) -> Iterator[np.ndarray]:
    """Yield some rows as they are stored, then the next."""
    name = tensor.source or tensor.name
    if tensor.rounded is None:
        yield from (round_rows(rows, tensor.kind, name) for rows in tensor.read(read))
    else:
        yield from (carry_rows(numbers, scales, tensor.kind, name) for numbers, scales in tensor.rounded(read))


def _describe(writer: GGUFWriter, checkpoint: Checkpoint, plan: FilePlan) -> None:
    """Say what the file is: of a model, its config, its tokenizer."""
    writer.add_type("model")
    writer.add_name(name_model(checkpoint.path))
    writer.add_file_type(plan.number)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for fact, value in plan.facts.items():
        getattr(writer, f"add_{fact}")(value)
    add_vocabulary(writer, plan.vocabulary, plan.tokenizer, list_stops(checkpoint.path))
