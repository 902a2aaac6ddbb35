"""Stored stage results: reused only when nothing that matters changed and every byte is still there."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from mka.errors import OutputError
from mka.store.manifests import MANIFEST, digest_manifest
from mka.store.products import find_scratch, produce, stage_key

ROOT = Path(__file__).parents[3]
WHAT = {"version": 1, "settings": {"a": 1}, "inputs": {"base": "d1"}}


class Maker:
    """Writes two files and counts how often it was asked to."""

    def __init__(self, text="result"):
        self.calls = 0
        self.text = text

    def __call__(self, folder):
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "x.txt").write_text(self.text)
        (folder / "deep").mkdir()
        (folder / "deep" / "y.bin").write_bytes(b"\0\1")
        return {"count": 2, "ratio": 0.5}


def make(store, maker, stage="score", **changes):
    return produce(store, stage, **WHAT | changes, make=maker)


def test_the_first_run_makes_and_the_second_reuses(tmp_path):
    maker = Maker()
    first = make(tmp_path / "store", maker)
    assert not first.reused and first.why == "no result of this stage is stored"
    assert (first.folder / "x.txt").read_text() == "result"
    second = make(tmp_path / "store", maker)
    assert second.reused and second.why == "same inputs and settings; 2 files intact"
    assert maker.calls == 1
    assert second.facts == first.facts == {"count": 2, "ratio": 0.5}
    assert (second.key, second.digest, second.folder) == (first.key, first.digest, first.folder)
    assert second.seconds == first.seconds  # what making it took, not what finding it took


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"settings": {"a": 2}},
        {"settings": {"a": 1, "b": None}},
        {"inputs": {"base": "d2"}},
        {"inputs": {"parent": "d1"}},
        {"inputs": {}},
        {"stage": "plan"},
    ],
)
def test_stage_version_settings_and_inputs_decide(tmp_path, change):
    maker = Maker()
    first = make(tmp_path, maker)
    other = make(tmp_path, maker, **change)
    assert maker.calls == 2 and not other.reused and other.key != first.key
    assert make(tmp_path, maker).reused  # the first is still there


def test_nothing_else_decides(tmp_path):
    first = stage_key("score", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "1", "y": "2"})
    assert stage_key("score", 1, {"b": {"d": 3, "c": 2}, "a": 1}, {"y": "2", "x": "1"}) == first
    here, there = make(tmp_path / "here", Maker()), make(tmp_path / "there", Maker())
    assert here.key == there.key and here.digest == there.digest
    os.utime(here.folder / "x.txt", (0, 0))
    moved = (tmp_path / "here").rename(tmp_path / "moved")
    assert make(moved, Maker()).reused


def test_the_digest_is_that_of_the_files_or_else_of_the_facts(tmp_path):
    one, same, other = (make(tmp_path / n, Maker(text)) for n, text in (("a", "1"), ("b", "1"), ("c", "2")))
    assert one.digest == same.digest != other.digest
    facts = [make(tmp_path / str(i), lambda folder, i=i: {"i": i}) for i in (1, 2)]
    assert facts[0].digest != facts[1].digest
    assert make(tmp_path / "1", lambda folder: {"i": 1}).why == "same inputs and settings"


@pytest.mark.parametrize("name", ["x.txt", "deep/y.bin"])
@pytest.mark.parametrize("change", ["delete", "flip", "grow", "folder"])
def test_a_result_that_is_not_whole_is_made_again_and_the_reason_said(tmp_path, name, change):
    maker = Maker()
    file = make(tmp_path, maker).folder / name
    content = file.read_bytes()
    if change in ("delete", "folder"):
        file.unlink()
        if change == "folder":
            file.mkdir()
    else:
        file.write_bytes(content + b"!" if change == "grow" else bytes([content[0] ^ 1]) + content[1:])
    again = make(tmp_path, maker)
    assert not again.reused and maker.calls == 2
    assert again.why == f"stored file {name} " + ("is gone" if change in ("delete", "folder") else "has changed")
    assert file.read_bytes() == content
    assert make(tmp_path, maker).reused


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (None, "no result of this stage is stored"),
        ("", "manifest is damaged"),
        ("{", "manifest is damaged"),
        ("\xff", "manifest is damaged"),
        ("[]", "manifest is damaged"),
        ("{}", "manifest is damaged"),
        ('{"format": "mka-stage/9"}', "manifest is damaged"),
        ("[" * 100_000, "manifest is damaged"),
        ('{"seconds": ' + "9" * 5000 + "}", "manifest is damaged"),
    ],
)
def test_a_result_without_a_sound_manifest_is_made_again(tmp_path, manifest, why):
    maker = Maker()
    path = make(tmp_path, maker).folder / MANIFEST
    path.unlink()
    if manifest is not None:
        path.write_bytes(manifest.encode("latin-1"))
    again = make(tmp_path, maker)
    assert not again.reused and why in again.why and maker.calls == 2
    assert make(tmp_path, maker).reused


ENTRY = {"bytes": 6, "sha256": "0" * 64}


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of an earlier commit"])
@pytest.mark.parametrize(
    "damage",
    [
        *({name: wrong} for name in ("files", "facts", "seconds") for wrong in (None, [], [["x"]], "")),
        *({"files": {"x.txt": wrong}} for wrong in (None, 6, "y", [], {}, {"bytes": 6}, {"sha256": "0" * 64})),
        *({"files": {"x.txt": ENTRY | wrong}} for wrong in ({"bytes": "6"}, {"bytes": None}, {"sha256": 6})),
        *(
            {"files": {name: ENTRY}}
            for name in ("/etc/hostname", "../x", "a/../../x", "x\0", "\ud800", "x\x1b[2J", "x" * 300)
        ),
        *({"seconds": wrong} for wrong in (float("nan"), float("inf"), -1, "1", {})),
        *({name: wrong} for name in ("stage", "key") for wrong in (None, 1, ["x"])),
    ],
    ids=repr,
)
def test_a_manifest_damaged_in_any_shape_is_no_result(tmp_path, damage, sealed):
    maker = Maker()
    path = make(tmp_path, maker).folder / MANIFEST
    body = json.loads(path.read_text()) | damage
    path.write_text(json.dumps(body | {"sha256": digest_manifest(body)} if sealed else without_seal(body)))
    again = make(tmp_path, maker)
    assert not again.reused and again.why == "the stored result's manifest is damaged" and maker.calls == 2
    assert make(tmp_path, maker).reused


def without_seal(body):
    return {name: value for name, value in body.items() if name != "sha256"}


@pytest.mark.parametrize("name", ["format", "stage", "key", "files", "facts", "seconds"])
def test_a_manifest_that_lacks_something_is_no_result(tmp_path, name):
    maker = Maker()
    path = make(tmp_path, maker).folder / MANIFEST
    body = without_seal(json.loads(path.read_text()))
    path.write_text(json.dumps({key: value for key, value in body.items() if key != name}))
    assert not make(tmp_path, maker).reused and maker.calls == 2


def test_a_manifest_whose_facts_were_changed_is_no_result(tmp_path):
    maker = Maker()
    path = make(tmp_path, maker).folder / MANIFEST
    path.write_text(path.read_text().replace('"count": 2', '"count": 3'))
    again = make(tmp_path, maker)
    assert not again.reused and again.facts["count"] == 2 and maker.calls == 2


def test_a_manifest_of_an_earlier_commit_is_read(tmp_path):
    maker = Maker()
    path = make(tmp_path, maker).folder / MANIFEST
    path.write_text(json.dumps(without_seal(json.loads(path.read_text()))))
    assert make(tmp_path, maker).reused and maker.calls == 1


def test_a_manifest_is_sealed_as_it_is_read(tmp_path):
    """Keys that are numbers become text, in another order."""
    make(tmp_path, lambda folder: {"by layer": {10: (1, 2), 9: None}})
    assert make(tmp_path, lambda folder: {}).reused


def test_a_result_under_another_key_is_not_taken_for_this_one(tmp_path):
    """Folders carry only the first 16 digits of the key."""
    maker = Maker()
    path = make(tmp_path, maker).folder / MANIFEST
    body = json.loads(path.read_text())
    path.write_text(json.dumps(without_seal(body) | {"key": body["key"][:16] + "0" * 48}))
    again = make(tmp_path, maker)
    assert not again.reused and "another format or key" in again.why and maker.calls == 2


def test_the_manifest_says_what_was_made_from_what(tmp_path):
    product = make(tmp_path, Maker())
    body = json.loads((product.folder / MANIFEST).read_text())
    assert body["stage"] == "score" and body["version"] == 1 and body["key"] == product.key
    assert body["settings"] == {"a": 1} and body["inputs"] == {"base": "d1"}
    assert set(body["files"]) == {"x.txt", "deep/y.bin"} and body["files"]["deep/y.bin"]["bytes"] == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_stores_nothing(tmp_path, error):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error("no")

    with pytest.raises(error):
        make(tmp_path, fail)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    maker = Maker()
    assert make(tmp_path, maker).why == "no result of this stage is stored"


def test_facts_that_are_not_json_store_nothing(tmp_path):
    with pytest.raises(TypeError):
        make(tmp_path, lambda folder: {"path": folder})
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_an_exception_while_remaking_does_not_bring_the_damaged_result_back(tmp_path):
    product = make(tmp_path, Maker())
    (product.folder / "x.txt").unlink()

    def fail(folder):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        make(tmp_path, fail)
    assert not make(tmp_path, Maker()).reused


def test_a_full_disk_is_a_refusal(tmp_path):
    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="disk full"):
        make(tmp_path, full)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_threads_that_want_the_same_make_it_once(tmp_path):
    maker, products = Maker(), []

    def slow(folder):
        time.sleep(0.2)
        return maker(folder)

    threads = [threading.Thread(target=lambda: products.append(make(tmp_path, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert maker.calls == 1
    assert sorted(product.reused for product in products) == [False, True, True, True]
    assert len({product.digest for product in products}) == 1


def start(store, body):
    """Run ``produce`` in a process of its own; ``body`` is what makes the result."""
    code = f"""
import time
from pathlib import Path
from mka.store.products import produce

def make(folder):
{textwrap.indent(textwrap.dedent(body), "    ")}
    return {{}}

print("reused" if produce(Path({str(store)!r}), "score", **{WHAT!r}, make=make).reused else "made")
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_processes_that_want_the_same_make_it_once(tmp_path):
    body = """
        time.sleep(0.3)
        (folder / "x").write_text("result")
        with (folder.parent / "calls").open("a") as calls:
            calls.write("made ")
    """
    processes = [start(tmp_path, body) for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said == ["made", "reused", "reused"]
    assert (tmp_path / "calls").read_text() == "made "


def test_a_killed_process_leaves_no_result_and_nobody_waits_for_it(tmp_path):
    body = """
        (folder / "half").write_text("half")
        print("making", flush=True)
        time.sleep(60)
    """
    process = start(tmp_path, body)
    with process:
        assert process.stdout.readline() == "making\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert any(".partial-" in name for name in left)  # the kill came while it was at work

    started = time.perf_counter()
    product = make(tmp_path, Maker())
    assert time.perf_counter() - started < 5
    assert not product.reused and product.why == "no result of this stage is stored"
    # What the killed process had half written is gone too.
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == [product.folder]


def test_a_scratch_folder_outlives_a_failed_maker_and_goes_with_the_result(tmp_path):
    found = []

    def note(folder):
        note = find_scratch(folder) / "note"
        found.append(note.read_text() if note.exists() else None)
        note.parent.mkdir(exist_ok=True)
        note.write_text("so far")
        if len(found) < 3:
            raise RuntimeError("killed")
        return {}

    for _ in range(2):
        with pytest.raises(RuntimeError):
            make(tmp_path, note)
    # Something else that is made meanwhile neither finds nor removes it.
    make(tmp_path, lambda folder: {"there": find_scratch(folder).exists()}, version=2)
    product = make(tmp_path, note)
    assert found == [None, "so far", "so far"]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".scratch")] == []
    assert [path.name for path in product.folder.iterdir()] == [MANIFEST]
    assert find_scratch(product.folder) == find_scratch(product.folder.with_name(f".{product.folder.name}.partial-1"))
