import gzip

import pytest
from datasets import Dataset
from support.handmade import MMLU, PARAMS, question, read, requests, save_raw, save_requests, sentence

from mka.corpora.mixture import SOURCES, build_alignment, cut_text, find_plain_prose
from mka.corpora.params import Params
from mka.corpora.raw_sets import read_requests, read_set
from mka.corpora.sampling import assign_room
from mka.errors import CalibrationError


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    save_raw(folder)
    return folder


@pytest.fixture(scope="module")
def params():
    return Params.model_validate(PARAMS)


def test_alignment_takes_the_texts_and_leaves_the_questions(raw, params, tmp_path):
    build_alignment(raw, tmp_path / "alignment.jsonl", params)
    texts = {source: [] for source in (*SOURCES, "boolq", "mmlu")}
    for row in read(tmp_path / "alignment.jsonl"):
        texts[row["source"]].append(row["text"])
    assert set(texts["cnn"]) < {sentence("cnn", i) for i in range(5)}
    assert set(texts["gutenberg"]) < {sentence("gutenberg", i) for i in range(5)}
    assert set(texts["pubmedqa"]) < {sentence("pubmedqa", i) for i in range(5)}
    assert set(texts["medqa"]) < {sentence("patient", i) for i in range(6)}
    assert set(texts["gsm8k"]) < {f"{sentence('sum', i)} How many?\nIt is {i}." for i in range(6)}
    assert set(texts["mbpp"]) < {f"{sentence('code', i)}\ndef f():\n    return {i}" for i in range(6)}
    # 300 characters end within the fourth of nine sentences.
    papers = [" ".join(sentence("paper", 100 * i + k) for k in range(9)) for i in range(3)]
    assert all(any(paper.startswith(text) for paper in papers) for text in texts["qasper"])
    assert all(200 < len(text) <= 300 and text.endswith("round.") for text in texts["qasper"])
    assert all(assign_room(text, params.seed) == "calibration" for text in texts["boolq"])
    assert all("What is validation" in text and "\nD. z" in text for text in texts["mmlu"])


@pytest.mark.parametrize("measured", ["drop", "lambada", "hellaswag", "sciq", "boolq", "mmlu"])
def test_alignment_drops_near_copies_of_everything_measured(tmp_path, raw, params, measured):
    for entry in raw.iterdir():
        if entry.name not in ("requests", measured):
            (tmp_path / entry.name).symlink_to(entry)
    # Shares 13 words with a text that is measured on, or only 12.
    shared = [f"word{i}" for i in range(13)]
    text = " ".join(["measured", *shared])
    items = requests()
    items["medqa"] = [{"question": " ".join(["long", *shared])}, {"question": " ".join(["short", *shared[:12]])}]
    if measured == "drop":
        items["drop"].append({"passage": text})
    elif measured == "lambada":
        items["lambada"].append({"query": text.removesuffix(" word12"), "choices": ["word12"]})
    for name, rows in items.items():
        save_requests(tmp_path, name, rows)
    if measured == "mmlu":
        for subject in ("anatomy", "virology"):
            for split in ("test", "dev", "validation"):
                extra = [question(subject, split, 0) | {"question": text}] if split == "dev" else []
                rows = read_set(raw, f"mmlu/{subject}/{split}") + extra
                Dataset.from_list(rows, features=MMLU).save_to_disk(tmp_path / "mmlu" / subject / split)
    elif measured not in items:
        row = {"hellaswag": {"ctx": text}, "sciq": {"support": text}, "boolq": {"question": text}}[measured]
        rows = read_set(raw, f"{measured}/validation")
        Dataset.from_list([*rows, {**rows[0], **row}]).save_to_disk(tmp_path / measured / "validation")
    counts = params.alignment.model_copy(update={"medqa": 1})
    build_alignment(tmp_path, tmp_path / "a.jsonl", params.model_copy(update={"alignment": counts}))
    taken = [row["text"] for row in read(tmp_path / "a.jsonl") if row["source"] == "medqa"]
    assert taken == [" ".join(["short", *shared[:12]])]
    two = params.model_copy(update={"alignment": counts.model_copy(update={"medqa": 2})})
    with pytest.raises(CalibrationError, match=r"alignment\.medqa asks for 2 texts, there are 1"):
        build_alignment(tmp_path, tmp_path / "a.jsonl", two)


def test_every_prefix_of_alignment_is_a_mixture_however_much_of_a_source_is_taken(tmp_path, raw, params):
    for entry in raw.iterdir():
        if entry.name != "requests":
            (tmp_path / entry.name).symlink_to(entry)
    items = requests()
    items["medqa"] = [{"question": sentence("patient", i)} for i in range(800)]
    items["gsm8k"] = [{"question": sentence("sum", i), "choices": ["So."]} for i in range(40)]
    for name, rows in items.items():
        save_requests(tmp_path, name, rows)
    counts = params.alignment.model_copy(update={"medqa": 40, "gsm8k": 40})
    build_alignment(tmp_path, tmp_path / "a.jsonl", params.model_copy(update={"alignment": counts}))
    sources = [row["source"] for row in read(tmp_path / "a.jsonl") if row["source"] in ("medqa", "gsm8k")]
    # Hypergeometric: 20 are expected, the standard deviation is 2.2.
    assert 10 < sources[:40].count("medqa") < 30


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One two. Three four.", "One two. Three four."),
        ("One two. Three four. Five", "One two. Three four."),
        ("One two\n\nthree four five. Six", "One two\n\nthree four"),
        ("One two three.\n \nFour. Five six seven", "One two three."),
        ("One two three four five six", "One two three four"),
        ('"One two?" three four fives', '"One two?"'),
        ("x" * 25, "x" * 20),
    ],
)
def test_long_texts_are_cut_at_paragraphs_then_sentences_then_words(text, cut):
    assert cut_text(f" {text}\n", 20) == cut


def test_papers_give_their_longest_run_of_paragraphs_without_markup():
    plain = [f"{i} " + "plain words " * 20 for i in range(4)]
    sections = [[*plain[:1], "short", *plain[1:2]], [plain[2], plain[3], plain[0], f"As $x$ shows, {'word ' * 300}"]]
    found = find_plain_prose({"full_text": {"paragraphs": sections}})
    assert found == "\n\n".join(text.strip() for text in (plain[2], plain[3], plain[0]))
    assert find_plain_prose({"full_text": {"paragraphs": [plain[:2]]}}) == ""
    assert find_plain_prose({"full_text": {"paragraphs": []}}) == ""


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"x" + data, lambda _: gzip.compress(b"{}\n")]
)
def test_damaged_requests_name_the_file_and_the_command(tmp_path, raw, damage):
    path = tmp_path / "requests/drop/requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage((raw / "requests/drop/requests.jsonl.gz").read_bytes()))
    with pytest.raises(CalibrationError, match=r"is damaged .*dvc repro --force fetch") as caught:
        read_requests(tmp_path, "drop")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
