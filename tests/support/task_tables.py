"""A task of one's own, as a definition in YAML."""

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
