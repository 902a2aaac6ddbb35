"""The DVC stages that build the project's tables: ``python -m mka.corpora.build STAGE``, the stages of dvc.yaml.

Every choice is a sort by hash (`mka.corpora.sampling`), so it depends on the seed and the items alone.
"""

import shutil
from pathlib import Path

import click

from mka.corpora.mixture import build_alignment
from mka.corpora.params import Params, load_params
from mka.corpora.raw_sets import (
    TASK_FIELDS,
    Row,
    fetch_sets,
    format_question,
    read_passages,
    read_questions,
    read_requests,
    read_set,
    read_subjects,
    read_task,
)
from mka.corpora.sampling import assign_room, collect_rows, keep_apart, shuffle_rows, take_rows
from mka.errors import MkaError
from mka.store.publishing import write_text
from mka.texts.overlap import refuse_overlap
from mka.texts.rows import format_rows, read_rows, read_texts, text_digest


def build_calibration(raw: Path, target: Path, params: Params) -> None:
    """Write the calibration table: BoolQ passages and MMLU validation questions, shuffled into one another.

    A text that equals, or shares 13 successive words with, anything of the other rooms is left out:
    BoolQ passages dealt to evaluation or held out, all SciQ supports, all MMLU test and dev questions.

    Raises:
        CalibrationError: if fewer texts than asked for remain.
    """
    passages = read_passages(raw)
    supports = [row["support"] for row in read_set(raw, "sciq/validation")]
    apart = [text for text in passages if assign_room(text, params.seed) != "calibration"]
    is_free = keep_apart([*apart, *supports, *read_questions(raw, ("test", "dev"))])
    boolq = [
        row
        for row in collect_rows("boolq", "boolq/validation", passages, params.calibration.min_chars)
        if assign_room(row["text"], params.seed) == "calibration" and is_free(row["text"])
    ]
    mmlu = []
    for subject in read_subjects(raw):
        items = [row for row in read_set(raw, f"mmlu/{subject}/validation") if is_free(row["question"])]
        texts = [format_question(item) for item in items]
        mmlu += collect_rows("mmlu", f"mmlu/{subject}/validation", texts, params.calibration.min_chars)
    rows = take_rows(mmlu, params.calibration.mmlu, params.seed, "calibration.mmlu")
    rows += take_rows(boolq, params.calibration.boolq, params.seed, "calibration.boolq")
    write_text(target, format_rows(shuffle_rows(rows, params.seed)))


def build_heldout(raw: Path, target: Path, params: Params) -> None:
    """Write the held-out table: BoolQ passages dealt to it, and SciQ supports, a source calibration never sees.

    Raises:
        CalibrationError: if fewer texts than asked for exist.
    """
    counts = params.heldout
    passages = [text for text in read_passages(raw) if assign_room(text, params.seed) == "heldout"]
    supports = [row["support"] for row in read_set(raw, "sciq/validation")]
    boolq = collect_rows("boolq", "boolq/validation", passages, counts.min_chars)
    sciq = collect_rows("sciq", "sciq/validation", supports, counts.min_chars)
    rows = take_rows(boolq, counts.boolq, params.seed, "heldout.boolq")
    write_text(target, format_rows(rows + take_rows(sciq, counts.sciq, params.seed, "heldout.sciq")))


def build_heldout_drop(raw: Path, target: Path, params: Params) -> None:
    """Write the second held-out table: DROP passages, a source neither calibration nor alignment sees.

    Both it and BoolQ come from Wikipedia: a passage that equals, or shares 13 successive words with, a BoolQ passage
    or an MMLU validation question is left out.

    Raises:
        CalibrationError: if fewer texts than asked for remain.
    """
    is_free = keep_apart([*read_passages(raw), *read_questions(raw, ("validation",))])
    passages = [doc["passage"] for doc in read_requests(raw, "drop")]
    rows = collect_rows("drop", "requests/drop", passages, params.heldout_drop.min_chars)
    free = [row for row in rows if is_free(row["text"])]
    write_text(target, format_rows(take_rows(free, params.heldout_drop.drop, params.seed, "heldout_drop.drop")))


def build_evaluation(raw: Path, prepared: Path, params: Params) -> None:
    """Write one table per evaluation task, and all their texts in one for the overlap check.

    The tables have the columns of the hub datasets that lm-eval's own task definitions expect. Rows are in seeded
    order, so the first n are a random sample; MMLU dev questions keep their order, for they are the few-shots.

    Raises:
        CalibrationError: if a text of the calibration or alignment table is among the texts evaluation uses.
    """
    folder, texts = prepared / "evaluation", []
    shutil.rmtree(folder, ignore_errors=True)
    for task, fields in TASK_FIELDS.items():
        rows = read_task(raw, task)
        if task == "boolq":
            rows = [
                {"idx": i, "label": int(row["answer"]), "passage": row["passage"], "question": row["question"]}
                for i, row in enumerate(rows)
                if assign_room(row["passage"], params.seed) == "evaluation"
            ]
        rows = shuffle_rows(rows, params.seed)[: params.evaluation.items]
        write_text(folder / f"{task}.jsonl", format_rows(rows))
        texts += [_text_row(task, str(i), field, row[field]) for i, row in enumerate(rows) for field in fields]
    for subject in read_subjects(raw):
        test = shuffle_rows(read_set(raw, f"mmlu/{subject}/test"), params.seed)[: params.evaluation.mmlu_test]
        dev = read_set(raw, f"mmlu/{subject}/dev")[: params.evaluation.mmlu_dev]
        for split, rows in (("test", test), ("dev", dev)):
            write_text(folder / "mmlu" / f"{subject}.{split}.jsonl", format_rows(rows))
            for i, row in enumerate(rows):
                name = f"mmlu_{subject}"
                texts.append(_text_row(name, f"{split}/{i}", "question", row["question"]))
                texts.append(_text_row(name, f"{split}/{i}", "item", format_question(row)))
    for table in ("heldout.jsonl", "heldout_drop.jsonl"):
        for row in read_rows(prepared / table):
            texts.append(_text_row("heldout", row["id"], "text", row["text"]))
    for table in ("calibration.jsonl", "alignment.jsonl"):
        refuse_overlap(read_texts(prepared / table), [row["text"] for row in texts])
    write_text(prepared / "evaluation_texts.jsonl", format_rows(texts))


def _text_row(task: str, item: str, field: str, text: str) -> Row:
    return {"field": field, "id": item, "task": task, "text": text, "text_sha256": text_digest(text)}


TABLES = {
    "calibration": build_calibration,
    "alignment": build_alignment,
    "heldout": build_heldout,
    "heldout_drop": build_heldout_drop,
}


@click.command()
@click.argument("stage", type=click.Choice(["fetch", *TABLES, "evaluation"]))
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), help="The data folder.")
def main(stage: str, data: Path) -> None:
    """Run one stage of dvc.yaml; `dvc repro` runs those that are out of date."""
    raw, prepared = data / "raw", data / "prepared"
    try:
        params = load_params(data / "params.yaml")
        if stage == "fetch":
            fetch_sets(raw, data / "work" / "packages", params)
        elif stage == "evaluation":
            build_evaluation(raw, prepared, params)
        else:
            TABLES[stage](raw, prepared / f"{stage}.jsonl", params)
    except MkaError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
