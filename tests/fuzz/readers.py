"""Readers of files fuzzed by coverage, for a time: python tests/fuzz/readers.py plan --seconds 180.

Atheris leads the changes to lines that were not reached yet. It is no package of the project; put it beside for a run:

    .venv/bin/pip install --no-deps --target /tmp/atheris atheris==3.0.0
    PYTHONPATH=.:tests:/tmp/atheris .venv/bin/python tests/fuzz/readers.py header index plan manifest --seconds 180

A reader returns or raises a refusal of one line; anything else is a crash: it is listed with the input that made it,
and the exit code is 1.
"""

import argparse
import base64
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

try:
    atheris = importlib.import_module("atheris")
except ImportError:
    atheris = None

Read = Callable[[Path], object]
SLOW = 5.0
# Bytes that an input may take; more is a MemoryError, which is a crash.
MEMORY = 3 * 2**30


def prepare_header(folder: Path) -> tuple[Path, bytes, Read]:
    """A safetensors file of a model folder."""
    path = _make_model(folder) / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")

    def read(path: Path) -> object:
        with path.open("ab") as file:  # the tensors, without which every header is refused
            file.write(data[end:])
        return _open(path)

    return path, data[:end], read


def prepare_index(folder: Path) -> tuple[Path, bytes, Read]:
    """The index of a model folder's shards."""
    model = _make_model(folder, max_shard_size="60KB")
    path = model / "model.safetensors.index.json"
    return path, path.read_bytes(), _open


def prepare_plan(folder: Path) -> tuple[Path, bytes, Read]:
    """A merge plan."""
    from mka.plan.plan import MergedLayer, MergePlan, Step
    from mka.plan.wording import describe_steps

    layers = (MergedLayer((0,), (1.0,)), MergedLayer((1, 2), (0.3, 0.7)), MergedLayer((3, 4), attention=(3,), mlp=(4,)))
    plan = MergePlan("mka", "", 6, layers, (Step((1,), (2,), 0.5, 0.3), Step((5,), (), 0.1, 0.0)))
    return folder / "plan.json", plan.to_json().encode(), lambda path: describe_steps(MergePlan.load(path))


def prepare_manifest(folder: Path) -> tuple[Path, bytes, Read]:
    """The manifest of a stored result."""
    from mka.store.manifests import MANIFEST
    from mka.store.products import find, produce

    what = {"version": 1, "settings": {"a": 1}, "inputs": {"base": "d"}}
    made = produce(folder, "score", **what, make=lambda partial: {"n": (partial / "x").write_text("x")})
    path = made.folder / MANIFEST
    return path, path.read_bytes(), lambda path: find(folder, "score", **what)


def prepare_recipe(folder: Path) -> tuple[Path, bytes, Read]:
    """A recipe."""
    from mka.pipeline.recipes import load_recipe

    data = b"name: x\nmodel: {folder: base}\ntarget: {layers: 4}\nmethod: {name: mka, settings: {coordinates: 2}}\n"
    return folder / "recipe.yaml", data + b"gate: {rules: [{metric: bytes, most: 250MB}]}\n", load_recipe


def prepare_report(folder: Path) -> tuple[Path, bytes, Read]:
    """The report of an evaluation."""
    from mka.evaluation.reports import read_report
    from mka.evaluation.scores import EvalReport, Score
    from mka.report.table import result_table

    scores = (
        Score("w", "perplexity", 2.0, 0.1, 2, False, ((1.0, 2), (2.0, 2))),
        Score("p", "acc", 0.5, 0.1, 2, True, (0, 1)),
    )
    report = EvalReport({"layers": 6, "bytes": 9, "parameters": 3}, scores, {}, {"a": "b"}, {"context": 32})
    return folder / "report.json", report.to_json().encode(), lambda path: result_table(None, read_report(path))


def prepare_table(folder: Path) -> tuple[Path, bytes, Read]:
    """A table of texts."""
    from mka.texts.rows import read_heldout

    return folder / "table.jsonl", b'{"text": "one", "source": "a"}\n{"text": "two"}\n', read_heldout


TARGETS = {
    name.removeprefix("prepare_"): value for name, value in list(globals().items()) if name.startswith("prepare_")
}


def _make_model(folder: Path, **options: str) -> Path:
    from support.models import make_tiny_model, save_model

    return save_model(make_tiny_model("llama"), folder / "base", **options)


def _open(path: Path) -> object:
    from mka.model.checkpoint import open_checkpoint

    return open_checkpoint(path.parent)


class Attempt:
    """Gives inputs to a reader; keeps one input of every way in which it failed."""

    def __init__(self, path: Path, read: Read, seconds: float, keep: Path) -> None:
        from mka.errors import MkaError
        from mka.outside.printable import LONGEST

        self.path, self.read, self.keep, self.longest, self.refusal = path, read, keep, LONGEST, MkaError
        self.end = time.monotonic() + seconds
        self.runs = self.refused = 0
        self.crashes: dict[str, Path] = {}

    def __call__(self, data: bytes) -> None:
        """Try one input; ends the process when the time is over."""
        if time.monotonic() > self.end:
            self.finish()
        self.runs += 1
        self.path.write_bytes(data)
        started = time.process_time()
        try:
            self.read(self.path)
        except self.refusal as error:
            self.refused += 1
            line = str(error)
            if not (line and len(line) <= self.longest and line.isprintable()):
                self.note(f"a refusal that is no line: {line[:80]!r}", data)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.note(f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}", data)
        if time.process_time() - started > SLOW:
            self.note("an input that takes long", data)

    def note(self, what: str, data: bytes) -> None:
        """Keep the first input of a kind of failure."""
        if what not in self.crashes:
            self.crashes[what] = self.keep / f"crash-{len(self.crashes)}"
            self.crashes[what].write_bytes(data)

    def finish(self) -> None:
        """Tell the counts and end: libFuzzer does not return."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{self.runs:,} inputs tried, {self.refused:,} refused in one line, {len(self.crashes)} crashes,", end=" "
        )
        print(f"{memory:.1f} GB of memory at most")
        for what, file in self.crashes.items():
            print(f"  {what}: {base64.b64encode(file.read_bytes()[:300]).decode()}")
        sys.stdout.flush()
        os._exit(1 if self.crashes else 0)


def fuzz(target: str, seconds: float) -> None:
    """Fuzz one reader in this process, which ends with it."""
    with atheris.instrument_imports(include=["mka"], enable_loader_override=False):
        import mka.evaluation.scores
        import mka.model.checkpoint
        import mka.pipeline.recipes
        import mka.plan.plan
        import mka.report.table
        import mka.store.products
        import mka.texts.rows  # noqa: F401
    folder = Path(os.environ["FUZZ_FOLDER"])
    path, seed, read = TARGETS[target](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(seed)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    attempt = Attempt(path, read, seconds, folder)
    options = ["-max_len=16384", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], attempt)
    atheris.Fuzz()


def main() -> int:
    """Fuzz each target in a process of its own; returns 1 if anything crashed."""
    parser = argparse.ArgumentParser(description="Fuzz readers of files by coverage.")
    parser.add_argument("targets", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="per target (%(default)s)")
    given = parser.parse_args()
    if atheris is None:
        print("atheris is not installed, nothing was fuzzed; see the head of this file")
        return 0
    if "FUZZ_FOLDER" in os.environ:
        fuzz(given.targets[0], given.seconds)
    failed = False
    for target in given.targets:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, target, "--seconds", str(given.seconds)]
            print(f"{target}:", end=" ", flush=True)
            ended = subprocess.run(
                command, env=os.environ | {"FUZZ_FOLDER": folder}, stderr=subprocess.PIPE, check=False
            )
            if ended.returncode not in (0, 1):
                print(f"ended by {ended.returncode}: {ended.stderr[-500:].decode(errors='replace')}")
            failed |= ended.returncode != 0
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
