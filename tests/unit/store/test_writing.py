"""What is written is whole or not there; and it reads like what the library writes."""

import errno
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import LAYERS, make_tiny_model, save_model

from mka.errors import CheckpointError, OutputError
from mka.model.checkpoint import open_checkpoint
from mka.model.shards import write_tensors
from mka.model.tensors import TensorInfo
from mka.plan.plan import MergePlan, keep_layers
from mka.store.publishing import publish, replace_file, write_bytes, write_file, write_text
from mka.transforms.merge import merge_checkpoint

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("single") / "m")


def header_size(path):
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_what_is_published_appears_under_its_name_only_when_whole(tmp_path):
    output = tmp_path / "a" / "b" / "out"
    with publish(output) as partial:
        (partial / "x").write_text("1")
        assert partial.parent == output.parent  # one file system, so that the rename is atomic
        assert not output.exists()
    assert [file.name for file in output.iterdir()] == ["x"]
    assert list(output.parent.iterdir()) == [output]


def test_publishing_renames_and_copies_nothing(tmp_path):
    with publish(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        inodes = (partial.stat().st_ino, (partial / "x").stat().st_ino)
    assert ((tmp_path / "out").stat().st_ino, (tmp_path / "out" / "x").stat().st_ino) == inodes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_is_left_after_an_exception(tmp_path, error):
    with pytest.raises(error), publish(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "x").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_and_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        refused = pytest.raises(OutputError, match=f"output .*{name} exists; choose another folder or remove it")
        with refused, publish(tmp_path / name):
            pytest.fail("entered")
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file"}


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    refused = pytest.raises(OutputError, match="appeared while it was being written; nothing was replaced")
    with refused, publish(output) as partial:
        (partial / "x").write_text("ours")
        output.mkdir()
        (output / "x").write_text("theirs")
    assert (output / "x").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [output]


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused = pytest.raises(OutputError, match=r"disk full: .*out needs 7 MB, .* has 5 MB free")
    with refused, publish(tmp_path / "out", needed_bytes=7_000_000):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []
    with publish(tmp_path / "out", needed_bytes=4_000_000):
        pass


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk full while writing"),
        (errno.EDQUOT, "disk full while writing"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_a_disk_that_fills_up_or_refuses_while_writing_leaves_nothing(tmp_path, number, message):
    with pytest.raises(OutputError, match=message) as caught, publish(tmp_path / "out") as partial:
        (partial / "x").write_text("half")
        raise OSError(number, "refused")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"output cannot be written in .*file"), publish(tmp_path / "file" / "out"):
        pytest.fail("entered")


def test_a_merge_that_meets_a_full_disk_publishes_nothing(single, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mka.model.shards._write_shard", full)
    with pytest.raises(OutputError, match="disk full while writing"):
        merge_checkpoint(MergePlan("t", "", LAYERS, keep_layers([0, 1])), open_checkpoint(single), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_verification_that_fails_publishes_nothing(single, tmp_path):
    def verify(partial):
        assert (partial / MODEL).is_file() and (partial / "config.json").is_file()
        raise CheckpointError("no good")

    plan = MergePlan("t", "", LAYERS, keep_layers([0, 1]))
    with pytest.raises(CheckpointError, match="no good"):
        merge_checkpoint(plan, open_checkpoint(single), tmp_path / "out", verify=verify)
    assert list(tmp_path.iterdir()) == []


def test_a_merged_folder_carries_sums_that_hold_and_reports_every_byte(single, tmp_path):
    written = []
    plan = MergePlan("t", "", LAYERS, keep_layers([0, 1, 4]))
    merge_checkpoint(plan, open_checkpoint(single), tmp_path / "out", on_tensor=written.append)
    merged = open_checkpoint(tmp_path / "out")
    assert merged.verified and merged.layers == 3
    assert sum(written) == merged.nbytes and len(written) == len(merged.tensors)


# The writer against the library ------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def make_tensors():
    """Every dtype, odd sizes (so that later tensors lie at odd offsets), a scalar, an empty one, a strided one."""
    torch.manual_seed(0)
    tensors = {f"float.{n}": torch.randn(3, 7).to(dtype) for n, dtype in DTYPES.items()}
    tensors |= {f"integer.{n}": torch.randint(0, 100, (5,)).to(dtype) for n, dtype in INTEGERS.items()}
    tensors["truth"] = torch.tensor([True, False, True])
    tensors["strided"] = torch.randn(6, 4).T
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    return tensors


def describe(tensors):
    names = {dtype: name for name, dtype in (DTYPES | INTEGERS | {"BOOL": torch.bool}).items()}
    return [TensorInfo(name, "", names[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def in_blocks(tensors):
    """Each tensor in blocks of two rows, those without rows whole."""
    return [list(t.split(2)) if t.dim() and len(t) else [t] for t in tensors.values()]


def read_folder(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("limit", [1, 100, 200, 500, 10_000])
def test_streamed_shards_read_like_what_the_library_writes(tmp_path, limit):
    tensors = make_tensors()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "reference.safetensors", {"format": "pt"})
    reference = load_file(tmp_path / "reference.safetensors")
    folder = tmp_path / "streamed"
    folder.mkdir()
    specs = describe(tensors)
    sums = write_tensors(folder, specs, in_blocks(tensors), limit)
    streamed = read_folder(folder)
    assert streamed.keys() == reference.keys()
    for name, tensor in reference.items():
        assert streamed[name].dtype == tensor.dtype and torch.equal(streamed[name], tensor), name
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (limit == 10_000) == (files[0].name == MODEL)
    for file in files:
        with safe_open(file, framework="pt") as shard:
            held = [next(s for s in specs if s.name == name) for name in shard.keys()]  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
        assert sum(s.nbytes for s in held) <= limit or len([s for s in held if s.nbytes]) == 1
        assert header_size(file) % 8 == 0
        assert file.stat().st_size == header_size(file) + sum(s.nbytes for s in held)
    assert sums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_index_says_where_every_tensor_is(tmp_path):
    tensors = make_tensors()
    write_tensors(tmp_path, describe(tensors), in_blocks(tensors), 200)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_single_shard_has_no_index(tmp_path):
    write_tensors(tmp_path, describe(make_tensors()), in_blocks(make_tensors()))
    assert [file.name for file in tmp_path.iterdir()] == [MODEL]


def test_one_tensor_is_written_while_the_next_is_made(tmp_path):
    """The next is asked for only after all before the last are on disk."""
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(6)}
    sizes = []

    def stream():
        for tensor in tensors.values():
            sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield [tensor]

    # Unbuffered would be exact; a buffer of a few kilobytes may still be on its way.
    write_tensors(tmp_path, describe(tensors), stream())
    assert all(4000 * (i - 1) - 8192 <= size <= 4000 * i + 2000 for i, size in enumerate(sizes))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(1, 3), torch.zeros(3).half()]
)
def test_a_tensor_that_is_not_what_was_planned_is_refused(tmp_path, wrong):
    with pytest.raises(CheckpointError, match=r"t: .* planned"):
        write_tensors(tmp_path, [TensorInfo("t", "", "F32", (3,))], [[wrong]])


def test_more_tensors_than_planned_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="more tensors than the 1 planned"):
        write_tensors(tmp_path, [TensorInfo("t", "", "F32", (3,))], [[torch.zeros(3)]] * 2)


def test_sizes_follow_dtype_and_shape():
    info = TensorInfo("t", "", "BF16", (3, 4))
    assert (info.parameters, info.nbytes) == (12, 24)
    assert TensorInfo("t", "", "F32", ()).nbytes == 4
    assert TensorInfo("t", "", "I8", (0, 4)).nbytes == 0


# One file


def test_a_file_is_replaced_whole_and_keeps_its_line_ends(tmp_path):
    path = tmp_path / "new" / "page.txt"
    for text in ("é\n", "a\r\nb\u2028"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    write_bytes(path, b"\xff")
    assert path.read_bytes() == b"\xff" and list(path.parent.iterdir()) == [path]


def test_writers_of_one_file_never_write_to_the_same_place(tmp_path):
    """Of two that overlap the later one to finish wins, and the file is whole at every moment."""
    path, places = tmp_path / "page.txt", []

    def write_outer(aside):
        places.append(aside)
        aside.write_text("half of the out")
        replace_file(path, write_inner)
        assert path.read_text() == "inner" and aside.read_text() == "half of the out"
        aside.write_text("outer")

    def write_inner(aside):
        places.append(aside)
        aside.write_text("inner")

    replace_file(path, write_outer)
    assert path.read_text() == "outer"
    assert len(set(places)) == 2 and {place.parent for place in places} == {tmp_path}
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_one_file_leave_it_whole(tmp_path):
    """Each process replaces the file many times with a text of its own; a reader sees one of the texts, or none."""
    path = tmp_path / "page.txt"
    program = (
        "import sys; from pathlib import Path; from mka.store.publishing import write_text\n"
        "for _ in range(200): write_text(Path(sys.argv[1]), sys.argv[2] * 100_000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 100_000 and len(set(text)) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path, error):
    path = tmp_path / "page.txt"
    path.write_text("before")

    def write(aside):
        aside.write_text("half")
        raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        replace_file(path, write)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_exists_is_not_replaced_by_a_result(tmp_path):
    path = tmp_path / "plan.json"
    write_file(path, lambda aside: aside.write_text("mine"))
    with pytest.raises(OutputError, match=r"plan\.json exists"):
        write_file(path, lambda aside: pytest.fail("written"))
    assert path.read_text() == "mine"


def test_nobody_else_renames_a_file_into_place():
    """One function knows how; wheels and folders are moved, which is something else.

    Programs of engines have nothing of ours.
    """
    root = Path(__file__).parents[3]
    renaming = re.compile(r"\b(aside|partial|temporary)\w*\.(replace|rename)\(|os\.(replace|rename)\(")
    found = [
        path.relative_to(root).as_posix()
        for room in ("mka", "tasks", "flows")
        for path in sorted((root / room).rglob("*.py"))
        if renaming.search(path.read_text(encoding="utf-8")) and path.parent.name != "programs"
    ]
    assert found == ["mka/store/publishing.py"]
