"""Hand-made sets in the layout of data/raw, for the tests of the tables' stages."""

import gzip
import json

from datasets import ClassLabel, Dataset, Features, List, Value

from mka.corpora.build import build_calibration, build_evaluation, build_heldout, build_heldout_drop
from mka.corpora.mixture import build_alignment

MMLU = Features(
    {
        "question": Value("string"),
        "subject": Value("string"),
        "choices": List(Value("string")),
        "answer": ClassLabel(names=list("ABCD")),
    }
)
PARAMS = {
    "seed": 3,
    "package": {"requirement": "some-sets==1.0", "sha256": "0" * 64},
    "calibration": {"boolq": 12, "mmlu": 4, "min_chars": 10},
    "alignment": {
        **{"boolq": 10, "cnn": 3, "gsm8k": 4, "gutenberg": 3, "mbpp": 4, "medqa": 4, "mmlu": 5, "pubmedqa": 3},
        **{"qasper": 2, "min_chars": 10, "max_chars": 300},
    },
    "heldout": {"boolq": 5, "sciq": 6, "min_chars": 10},
    "heldout_drop": {"drop": 4, "min_chars": 10},
    "evaluation": {"items": 7, "mmlu_test": 3, "mmlu_dev": 2},
}


def passage(i):
    return f"Passage {i} tells of the river {i * 7919} and of its towns."


def question(subject, split, i):
    return {
        "question": f"What is {split} {i} of {subject}?",
        "subject": subject,
        "choices": list("wxyz"),
        "answer": i % 4,
    }


def sentence(kind, i):
    """Sentences of which no two share 13 words."""
    return f"{kind.capitalize()} {i} says that {kind}{i * 7919} was seen by many, and that it was round."


def requests():
    """Items of ready-made requests; each is asked about twice."""

    def coqa(i, source):
        return {"source": source, "story": sentence(source, i)}

    def qasper(i):
        prose = " ".join(sentence("paper", 100 * i + k) for k in range(9))
        return {"full_text": {"paragraphs": [["A title", f"{prose} As in BIBREF3 ."], ["Where $x$ is 3.", prose]]}}

    items = {
        "coqa": [coqa(i, source) for i in range(5) for source in ("cnn", "mctest", "gutenberg")],
        "drop": [{"passage": sentence("battle", i), "question": f"how many {i}?"} for i in range(6)],
        "gsm8k": [{"question": f"{sentence('sum', i)} How many?", "choices": [f"It is {i}."]} for i in range(6)],
        "lambada": [{"query": f"She took the {i}th road to the", "choices": ["sea"]} for i in range(9)],
        "mbpp": [{"text": sentence("code", i), "code": f"def f():\r\n    return {i}"} for i in range(6)],
        "medqa": [{"question": sentence("patient", i), "answer": "leech"} for i in range(6)],
        "qasper": [qasper(i) for i in range(3)],
        "sciriff": [{"id": f"{s}:{i}", "context": sentence(s, i)} for i in range(5) for s in ("pubmedqa", "bioasq")],
    }
    return {name: [item for item in rows for _ in range(2)] for name, rows in items.items()}


def save_requests(raw, name, items):
    folder = raw / "requests" / name
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"doc": item, "request": {"context": "shots"}}) + "\n" for item in items)


def save_raw(folder):

    def save(name, rows, features=None):
        Dataset.from_list(rows, features=features).save_to_disk(folder / name)

    # Every third passage is asked about twice, as in BoolQ.
    passages = [passage(i) for i in range(60)] + [passage(i) for i in range(0, 60, 3)]
    save(
        "boolq/validation",
        [{"question": f"is {i}", "answer": i % 2 == 0, "passage": p} for i, p in enumerate(passages)],
    )
    save(
        "sciq/validation",
        [{"question": "q", "support": f"Support {i} on the chemistry of {i}." * (i % 5)} for i in range(20)],
    )
    options = {"text": ["2000", "x"], "label": ["1", "2"]}
    for task in ("arc_easy", "arc_challenge"):
        rows = [{"id": f"{i}", "question": f"{task} {i}", "choices": options, "answerKey": "2"} for i in range(9)]
        save(f"{task}/validation", rows)
    save("piqa/validation", [{"goal": f"goal {i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(9)])
    save(
        "winogrande/validation",
        [{"sentence": f"{i} _ .", "option1": "a", "option2": "b", "answer": "1"} for i in range(9)],
    )
    save("hellaswag/validation", [{"ctx": f"ctx {i}", "endings": list("abcd"), "label": "3"} for i in range(5)])
    for subject in ("anatomy", "virology"):
        for split, count in (("test", 6), ("dev", 4), ("validation", 5)):
            rows = [question(subject, split, i) for i in range(count)]
            save(f"mmlu/{subject}/{split}", rows, MMLU)
    for name, items in requests().items():
        save_requests(folder, name, items)


def build_tables(raw, folder, params):
    build_calibration(raw, folder / "calibration.jsonl", params)
    build_alignment(raw, folder / "alignment.jsonl", params)
    build_heldout(raw, folder / "heldout.jsonl", params)
    build_heldout_drop(raw, folder / "heldout_drop.jsonl", params)
    build_evaluation(raw, folder, params)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
