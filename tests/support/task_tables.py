"""A task of one's own, as a definition in YAML."""

import json

import yaml

MINE = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "/written/down/elsewhere/mine.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def define(folder, name="mine", **changes):
    body = {key: value for key, value in (MINE | {"task": name} | changes).items() if value is not ...}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))


def save_items(folder, texts):
    """Write the definition and a table of one item per text; returns the folder."""
    rows = [{"question": text, "choices": ["w3", "w9 w4", "w5"], "answer": n % 3} for n, text in enumerate(texts)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    define(folder)
    return folder
