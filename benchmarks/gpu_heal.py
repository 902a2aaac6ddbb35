"""What millions of tokens of distillation give a model cut short, on text its base writes itself, on one GPU.

    python benchmarks/gpu_heal.py --pieces /tmp/piece.0 /tmp/piece.1 --work /tmp/heal --out OUT
    python benchmarks/gpu_heal.py --base MODEL --work /tmp/heal --out OUT --tokens 102400 1000000
    python benchmarks/gpu_heal.py --shape tiny --work /tmp/heal --out /tmp/out    # to try it out; runs on a CPU as well

The base writes; a block of its layers is deleted, with the others as they are and refitted; both starts are distilled
on each number of tokens, in the order given and from the start every time, so that every point is the end of a run.
Held-out KL is measured on a kind of text that is not trained on, perplexity on tables of other people's texts. Without
a folder the base is SmolLM2-135M, from the wheel that the recipes name, in as many pieces as it takes.

Needs torch, transformers, accelerate, safetensors, numpy, scipy, pydantic, and gguf where the base comes as a wheel, in
the versions of pyproject.toml; no network; 5 GB in --work. Onto a bare machine that takes 64 MiB per call, the
repository's 3 included, it comes in two: `split -b 58000000 -d -a 1 WHEEL piece.` The first call carries piece.0 in a
folder .heal that Git ignores, and copies it to /tmp. The second, while that machine is kept, carries in .heal piece.1,
WikiText-2 as wikitext2.txt and wheels of what is missing or too old there (transformers, pydantic, pydantic-core,
annotated-types, typing-inspection, typing-extensions, gguf), and beside it the two tables of data/prepared. It runs
within 600 s; OUT is what is sent back:

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .heal/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/gpu_heal.py --pieces /tmp/piece.0 .heal/piece.1 --work /tmp/heal
    --out $OUT --texts data/prepared/heldout.jsonl data/prepared/heldout_drop.jsonl .heal/wikitext2.txt

It stops itself after --minutes and leaves what it has. In --out are the text (texts-*.jsonl.gz), heal.json and
table.md, 25 MB in four files; in --work the models and the trainer's checkpoints. Called again with the same folders it
goes on from the last checkpoint; with --out alone it makes the models anew and loses no more than the run it was in.
Prints the table.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.own_text import (
    FITTED_TEXTS,
    HELDOUT,
    make_base,
    measure_peak,
    name_device,
    read_texts,
    say,
    write_enough,
)
from benchmarks.resumable import Record, TimeUp, limit_time, write_whole
from mka.alignment.aligner import Aligner
from mka.evaluation.perplexity import measure_perplexity
from mka.healing.curve import read_curve
from mka.healing.distil import distil
from mka.healing.student import count_shared
from mka.healing.table import HealingWindows
from mka.healing.training import find_last
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.loading import load_model, load_tokenizer, open_decoder
from mka.plan.plan import MergePlan, keep_layers
from mka.recipe import AlignmentFit, HealFit, ModelSource
from mka.texts.rows import read_heldout
from mka.texts.windows import deal_windows, pack_windows
from mka.transforms.merge import merge_checkpoint

PREPARED = Path(__file__).resolve().parents[1] / "data" / "prepared"
TABLES = (PREPARED / "heldout.jsonl", PREPARED / "heldout_drop.jsonl")
STARTS = ("aligned", "deleted")
# Perplexity as the recipes measure it.
MEASURED_TOKENS, MEASURED_CONTEXT = 8192, 512
# Steps of a run on so many tokens; more tokens make more and larger ones, both by the square root.
STEPS, STEPS_OF = 100, 102_400


@dataclass(frozen=True)
class Shape:
    """What is tried on a model.

    Attributes:
        delete: first and last layer deleted.
        tokens: the curve's points, in the order they are made.
        context: tokens per window of healing.
        fitted: tokens of the refit.
        heldout: tokens of the source that only measures.
    """

    delete: tuple[int, int]
    tokens: tuple[int, ...]
    context: int
    fitted: int
    heldout: int


SHAPES = {
    # The ends first: what there is no time for is what lies between.
    "smollm2-135m": Shape((12, 18), (102_400, 1_000_000, 10_000_000, 3_200_000, 320_000), 256, 16_384, 16_384),
    "tiny": Shape((2, 3), (1024, 4096), 32, 512, 256),
}


def read_measured(files: Sequence[Path], tokenizer: Any) -> dict[str, list[str]]:
    """Return source -> the texts that its perplexity is measured on, the first of each table."""
    measured: dict[str, list[str]] = {}
    for source, texts in chain.from_iterable(read_heldout(file).items() for file in files):
        count = 0
        for text in texts:
            if count > MEASURED_TOKENS + MEASURED_CONTEXT:
                break
            count += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            measured.setdefault(source, []).append(text)
    return measured


def make_start(base: Checkpoint, shape: Shape, texts: Mapping[str, list[str]] | None, folder: Path) -> dict[str, Any]:
    """Write the base without the block, the other layers refitted on texts or as they are; returns the facts."""
    started = time.perf_counter()
    kept = [index for index in range(base.layers) if not shape.delete[0] <= index <= shape.delete[1]]
    plan = MergePlan("benchmark", "a block deleted", base.layers, keep_layers(kept))
    facts: dict[str, Any] = {}
    if texts is None:
        merge_checkpoint(plan, base, folder)
    else:
        fit = AlignmentFit(tokens=shape.fitted, context=2 * shape.context)
        with open_decoder(base, "float32") as (decoder, tokenizer):
            aligner = Aligner(decoder, tokenizer, texts, fit)
            _, made = aligner.align(plan.layers, lambda tensors: merge_checkpoint(plan, base, folder, aligned=tensors))
        facts = {"tokens": made["tokens"], "penalty": made["penalty"]}
    return facts | {"seconds": round(time.perf_counter() - started, 1)}


def cut(texts: Mapping[str, list[str]], tokenizer: Any, shape: Shape) -> HealingWindows:
    """Cut all text into windows, in an order of which every beginning is a fair sample of the whole."""
    others = {source: found for source, found in texts.items() if source != HELDOUT}
    dealt = deal_windows(tokenizer, others, context=shape.context, tokens=sys.maxsize)
    rows = torch.cat(list(dealt.values()))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    measuring = pack_windows(tokenizer, texts[HELDOUT], shape.context, shape.heldout // shape.context)
    counts = {source: len(found) for source, found in dealt.items()}
    return HealingWindows(rows[order], torch.tensor(measuring), HELDOUT, counts)


def measure(folder: Path, tensors: Mapping[str, torch.Tensor], measured: Mapping[str, list[str]]) -> dict[str, float]:
    """Return source -> perplexity of a model, some of whose tensors are others."""
    model, tokenizer = load_model(folder, "float32")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    options: dict[str, Any] = {"context": MEASURED_CONTEXT, "max_tokens": MEASURED_TOKENS, "progress": False}
    return {
        source: measure_perplexity(model, tokenizer, texts, name=source, **options).value
        for source, texts in measured.items()
    }


def choose_batch(tokens: int, context: int) -> int:
    """Return windows per step: 4 of 256 tokens for 102,400 tokens, 10 times as many for 100 times as many."""
    return max(1, round(tokens / context / (STEPS * (tokens / STEPS_OF) ** 0.5)))


def heal(
    base: Checkpoint, student: Checkpoint, windows: HealingWindows, rate: float | None, scratch: Path
) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """Distil once, or go on from the last checkpoint; returns the tensors trained and the facts."""
    context = windows.train.shape[1]
    batch = choose_batch(windows.tokens, context)
    settings = HealFit(
        tokens=windows.tokens, context=context, batch=batch, rate=rate, heldout_tokens=windows.heldout.numel()
    )
    before = find_last(scratch)
    read = 0 if before is None else int(before.name.split("-")[1]) * batch * context
    measure_peak()
    source = ModelSource(folder=base.path)
    done = distil(base, student, windows, settings, source, scratch, shared=count_shared(base, student))
    facts = dict(done.facts) | {"batch": batch, "resumed_at": read, "device": name_device(), "peak_gb": measure_peak()}
    return done.tensors, facts | {"tokens_per_second": round((facts["tokens"] - read) / facts["seconds"])}


def run_point(
    name: str, windows: HealingWindows, base: Checkpoint, given: argparse.Namespace, measured: Any, record: Record
) -> None:
    """Heal one start on one number of tokens, unless that is done; a failure is noted and passed over."""
    points = record.facts["points"]
    before = [point for point in points if (point["name"], point["asked"]) == (name, windows.tokens)]
    if any("failed" not in point for point in before):
        return
    digest = hashlib.sha256(windows.train.numpy().tobytes()).hexdigest()[:8]
    scratch = given.work / "scratch" / f"{name}-{windows.tokens}-{digest}"
    student = open_checkpoint(given.work / name, verify=False)
    try:
        tensors, facts = heal(base, student, windows, given.rate, scratch)
        facts["perplexity"] = measure(student.path, tensors, measured)
    except Exception as error:
        # Where time is lent, the other points are worth more than a clean end.
        traceback.print_exc()
        facts = {"failed": " ".join(str(error).split())[:300] or type(error).__name__}
    points[:] = [point for point in points if point not in before]
    points.append({"name": name, "asked": windows.tokens} | facts)
    record.save()
    shutil.rmtree(scratch, ignore_errors=True)
    say(f"{name}, {windows.tokens:,} tokens: {facts.get('best', facts.get('failed'))}")


def run(given: argparse.Namespace, shape: Shape, record: Record) -> None:
    """Everything, in order; what is done is not done again."""
    facts = record.facts
    base = open_checkpoint(given.base or make_base(given.shape, given.pieces, given.work / "base"), verify=False)
    facts |= {"model": given.base.name if given.base else given.shape, "layers": base.layers, "delete": shape.delete}
    tokenizer = load_tokenizer(base.path)
    measured = read_measured(given.texts, tokenizer)
    options = {"tokens": max(shape.tokens), "batch": given.batch, "minutes": given.write_minutes}
    every = list(chain(*measured.values()))
    for _ in write_enough(base.path, given.out, facts["rounds"], **options, measured=every):
        record.save()
    fitted = {source: texts for source, texts in read_texts(given.out, FITTED_TEXTS).items() if source != HELDOUT}
    for name, texts in zip(STARTS, (fitted, None)):
        if not (given.work / name / "config.json").is_file():
            facts["starts"][name] = make_start(base, shape, texts, given.work / name)
            say(f"{name}: {facts['starts'][name]}")
    for name, folder in {"base": base.path, **{name: given.work / name for name in STARTS}}.items():
        if facts["perplexity"].get(name, {}).keys() != measured.keys():
            facts["perplexity"][name] = measure(folder, {}, measured)
    record.save()
    windows = cut(read_texts(given.out), tokenizer, shape)
    for asked in shape.tokens:
        for name in STARTS:
            some = replace(windows, train=windows.train[: asked // shape.context])
            run_point(name, some, base, given, measured, record)


def read_unfinished(folder: Path, context: int) -> dict[str, Any]:
    """Return name -> the curve so far of each run that left a checkpoint."""
    curves = {}
    for scratch in sorted(folder.glob("*")):
        if (last := find_last(scratch)) is not None:
            history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            batch = choose_batch(int(scratch.name.split("-")[1]), context)
            curves[scratch.name] = read_curve(history, batch * context)
    return curves


def show(facts: Mapping[str, Any]) -> str:
    """Return what there is as Markdown: a row per start and number of tokens."""
    perplexity, rounds = facts["perplexity"], facts["rounds"]
    sources = list(perplexity.get("base", {}))
    devices = sorted({made["device"] for made in [*rounds, *facts["points"]] if "device" in made})
    lines = [f"{'; '.join(devices) or name_device()}; torch {torch.__version__}"]
    if "delete" in facts:
        first, last = facts["delete"]
        lines[0] += f"; {facts['model']}, layers {first} to {last} of {facts['layers']} deleted"
    if rounds:
        tokens, seconds = (sum(made[key] for made in rounds) for key in ("tokens", "seconds"))
        left_out = sum(sum(made["dropped"].values()) for made in rounds)
        lines[0] += (
            f"; written: {tokens:,} tokens at {tokens / max(seconds, 0.1):,.0f} tokens/s, {left_out} texts left out"
        )
        lines[0] += f", peak {max(made['peak_gb'] for made in rounds):.1f} GB"
    columns = ("start", "tokens", "steps x windows", "KL before", "KL", *sources, "tokens/s", "peak GB")
    lines += ["", f"| {' | '.join(columns)} |", f"|---{'|--:' * (len(columns) - 1)}|"]

    def add(*cells: Any) -> None:
        lines.append(f"| {' | '.join([*map(str, cells), *[''] * (len(columns) - len(cells))])} |")

    def over(measured: Mapping[str, float]) -> list[str]:
        return [
            f"{measured[source] / perplexity['base'][source]:.3f}" if source in measured else "" for source in sources
        ]

    for name in STARTS:
        if name in perplexity:
            add(name, 0, "", "", "", *over(perplexity[name]))
        for point in sorted(facts["points"], key=lambda point: point["asked"]):
            if point["name"] == name and "failed" in point:
                add(name, f"{point['asked']:,}", f"failed: {point['failed']}")
            elif point["name"] == name:
                kl = (f"{point['start']:.4f}", f"{point['best']:.4f}")
                cost = (f"{point['tokens_per_second']:,}", f"{point['peak_gb']:.1f}")
                steps = f"{point['steps']} x {point['batch']}"
                add(name, f"{point['tokens']:,}", steps, *kl, *over(point["perplexity"]), *cost)
    for name, curve in facts["unfinished"].items():
        reached = [point for point in curve if "heldout" in point][-1]
        lines += ["", f"Unfinished: {name}, KL {reached['heldout']:.4f} at {reached['tokens']:,} tokens."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run until all is done or time is up, and print the table."""
    parser = argparse.ArgumentParser(description="The curve of a healing on one GPU, on text the base writes.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--pieces", type=Path, nargs="+", help="the base's wheel, whole or its pieces in their order")
    model.add_argument("--base", type=Path, help="the base's folder")
    parser.add_argument("--work", type=Path, required=True, help="folder of models and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of text, heal.json and table.md")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it stops itself")
    parser.add_argument("--write-minutes", type=float, default=4.0, help="of them at most for writing text")
    parser.add_argument("--batch", type=int, help="texts written at a time; default: 4096 on a GPU, 32 without")
    parser.add_argument("--tokens", type=int, nargs="+", help="points of the curve, in the order they are made")
    parser.add_argument("--delete", type=int, nargs=2, metavar=("FIRST", "LAST"), help="layers deleted")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: that of a recipe that names none")
    parser.add_argument("--texts", type=Path, nargs="+", help="held-out tables; default: the prepared ones")
    given = parser.parse_args()
    if given.shape != "tiny" and not (given.base or given.pieces):
        parser.error("name the base by --pieces or --base")
    given.batch = given.batch or (4096 if torch.cuda.is_available() else 32)
    given.texts = given.texts or [file for file in TABLES if file.is_file()]
    shape = SHAPES[given.shape]
    shape = replace(shape, tokens=tuple(given.tokens or shape.tokens), delete=tuple(given.delete or shape.delete))
    os.environ["HF_HUB_OFFLINE"] = "1"
    empty: dict[str, Any] = {"rounds": [], "starts": {}, "perplexity": {}, "points": [], "unfinished": {}}
    record = Record(given.out / "heal.json", empty)
    try:
        with limit_time(given.minutes):
            run(given, shape, record)
    except TimeUp:
        say("time is up; called again with the same folders it goes on")
    record.facts["unfinished"] = read_unfinished(given.work / "scratch", shape.context)
    record.save()
    table = show(record.facts)
    write_whole(given.out / "table.md", table.encode())
    print(table)


if __name__ == "__main__":
    main()
