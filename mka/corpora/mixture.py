"""The alignment table: a mixture of several kinds of text, for fits that must carry over to kinds never seen."""

import re
from collections.abc import Callable
from pathlib import Path

from mka.corpora.params import Params
from mka.corpora.raw_sets import (
    TASK_FIELDS,
    Row,
    format_question,
    read_passages,
    read_questions,
    read_requests,
    read_set,
    read_subjects,
    read_task,
)
from mka.corpora.sampling import assign_room, collect_rows, keep_apart, shuffle_rows, take_rows
from mka.store.publishing import write_text
from mka.texts.rows import format_rows

# What a paper's text has in place of citations, formulas and figures, and what is left of its LaTeX.
MARKUP = re.compile(r"[A-Z]{3,}REF\d*|INLINE_?FORM|DISPLAY_?FORM|FLOAT|:::|[$\\]")
SHORTEST_PARAGRAPH = 100
SHORTEST_RUN = 600
PARAGRAPH_END = re.compile(r"\n(?=\s*\S)")
SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*(?=\s)")


def find_plain_prose(doc: Row) -> str:
    """Return the longest run of adjacent paragraphs of a Qasper paper that hold no markup, or "" if all are short."""
    runs = []
    for section in doc["full_text"]["paragraphs"]:
        run: list[str] = []
        runs.append(run)
        for paragraph in section:
            if len(paragraph) >= SHORTEST_PARAGRAPH and not MARKUP.search(paragraph):
                run.append(paragraph.strip())
            elif run:
                run = []
                runs.append(run)
    longest = max(("\n\n".join(run) for run in runs), key=len, default="")
    return longest if len(longest) >= SHORTEST_RUN else ""


# Source -> (requests it is taken from, text of an item; "" where the item is of another source).
SOURCES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "cnn": ("coqa", lambda doc: doc["story"] if doc["source"] == "cnn" else ""),
    "gsm8k": ("gsm8k", lambda doc: f"{doc['question']}\n{doc['choices'][0]}"),
    "gutenberg": ("coqa", lambda doc: doc["story"] if doc["source"] == "gutenberg" else ""),
    "mbpp": ("mbpp", lambda doc: f"{doc['text']}\n{doc['code']}".replace("\r\n", "\n")),
    "medqa": ("medqa", lambda doc: doc["question"]),
    "pubmedqa": ("sciriff", lambda doc: doc["context"] if doc["id"].startswith("pubmedqa") else ""),
    "qasper": ("qasper", find_plain_prose),
}


def cut_text(text: str, max_chars: int) -> str:
    """Cut a text that is too long after its last paragraph that fits, else its last sentence, else its last word.

    Paragraphs are passed over if they would leave less than half of ``max_chars``.
    """
    text = text.strip()
    if len(text) <= max_chars:
        return text
    # One character more, for the space behind an end that falls on the last place.
    ends = [match.start() for match in PARAGRAPH_END.finditer(text, 0, max_chars + 1)]
    if not ends or ends[-1] < max_chars / 2:
        ends = [match.end() for match in SENTENCE_END.finditer(text, 0, max_chars + 1)]
    if not ends:
        ends = [match.start() for match in re.finditer(r"\s", text[: max_chars + 1])]
    return text[: ends[-1] if ends else max_chars].rstrip()


def read_measured_texts(raw: Path, seed: int) -> list[str]:
    """Return every text that models are measured on, whether or not a table takes it.

    BoolQ's questions, and its passages dealt to evaluation or held out; SciQ supports; MMLU's test and dev questions;
    the texts of all other tasks' validation items; DROP's passages.
    """
    texts = [text for text in read_passages(raw) if assign_room(text, seed) != "calibration"]
    texts += [row["question"] for row in read_set(raw, "boolq/validation")]
    texts += [row["support"] for row in read_set(raw, "sciq/validation")]
    texts += read_questions(raw, ("test", "dev"))
    for task, fields in TASK_FIELDS.items():
        if task != "boolq":
            texts += [row[field] for row in read_task(raw, task) for field in fields]
    return texts + [doc["passage"] for doc in read_requests(raw, "drop")]


def build_alignment(raw: Path, target: Path, params: Params) -> None:
    """Write the alignment table: the sources of `SOURCES`, BoolQ passages and MMLU validation questions, shuffled.

    Texts are cut to ``max_chars``. One that equals, or shares 13 successive words with, anything of
    `read_measured_texts` is left out.

    Raises:
        CalibrationError: if fewer texts than asked for remain.
    """
    counts = params.alignment
    passages = [text for text in read_passages(raw) if assign_room(text, params.seed) == "calibration"]
    items = [row for subject in read_subjects(raw) for row in read_set(raw, f"mmlu/{subject}/validation")]
    found = {
        "boolq": ("boolq/validation", passages),
        "mmlu": ("mmlu/validation", [format_question(item) for item in items]),
    }
    for source, (name, take_text) in SOURCES.items():
        found[source] = (f"requests/{name}", [take_text(doc) for doc in read_requests(raw, name)])
    is_free = keep_apart(read_measured_texts(raw, params.seed))
    rows = []
    for source, (origin, texts) in found.items():
        cut = [cut_text(text, counts.max_chars) for text in texts]
        free = [row for row in collect_rows(source, origin, cut, counts.min_chars) if is_free(row["text"])]
        rows += take_rows(free, getattr(counts, source), params.seed, f"alignment.{source}")
    # Another seed than the draws: under theirs, a source of which few texts were drawn would come first.
    write_text(target, format_rows(shuffle_rows(rows, params.seed + 1)))
