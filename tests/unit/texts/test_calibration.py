import hashlib
import json

import pytest

from mka.errors import CalibrationError
from mka.texts.calibration import CalibrationSet, load_calibration
from mka.texts.overlap import find_overlap, refuse_overlap, word_runs
from mka.texts.rows import read_heldout, read_rows, read_texts, text_digest

LONG = "The quick brown fox jumps over the lazy dog while the seventh judge sleeps in the sun"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_digest_is_sha256_of_casefolded_collapsed_text():
    assert text_digest("  Große\n\tTiere ") == hashlib.sha256(b"grosse tiere").hexdigest()
    assert text_digest("grosse tiere") != text_digest("grossetiere")


def test_read_texts_keeps_unicode_line_separators_inside_a_text(tmp_path):
    texts = ["one\u2028still one", "two\x85still two", "three"]
    assert read_texts(write(tmp_path / "t.jsonl", [{"text": text} for text in texts])) == texts


def test_read_texts_accepts_bom_and_crlf():
    assert read_texts(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n', "t.jsonl") == ["a", "b"]


def test_plain_text_paragraphs_are_texts(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("first line\nsame paragraph\n  \n\n\nsecond\n", encoding="utf-8")
    assert read_texts(path) == ["first line\nsame paragraph", "second"]
    assert {row["source"] for row in read_rows(path)} == {"prose"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "t.jsonl is empty"),
        (b"\n \n", "t.jsonl is empty"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "t.jsonl is not UTF-8: byte 24 is 0xff"),
        (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2: needs a `text` field that is a string, got body"),
        (b'{"text": 3}\n', "line 1: needs a `text` field"),
        (b"[1]\n", "line 1: needs a `text` field that is a string, got list"),
        (b'{"text": " "}\n', "line 1: the text is empty"),
        (b'{"text": "a", "source": 1}\n', "line 1: `source` must be a string"),
        (b'{"text": "a\\ud800"}\n', "line 1: not JSON (a text holds half of a character (a lone surrogate))"),
    ],
)
def test_bad_tables_are_refused_in_one_line(data, message):
    with pytest.raises(CalibrationError) as refusal:
        read_texts(data, "t.jsonl")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_table_says_how_to_build_it(tmp_path):
    with pytest.raises(CalibrationError, match=r"not found.*make data"):
        read_texts(tmp_path / "none.jsonl")


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_texts(tmp_path)


def test_load_takes_the_first_distinct_texts_in_order(tmp_path):
    rows = [{"text": "a", "source": "x"}, {"text": "b", "source": "y"}, {"text": " A ", "source": "z"}, {"text": "c"}]
    loaded = load_calibration(write(tmp_path / "t.jsonl", rows), samples=3, minimum=2, rev="abc")
    assert loaded.texts == ("a", "b", "c")
    assert loaded.sources == ("x", "y", "t")
    assert (loaded.path, loaded.rev) == (str(tmp_path / "t.jsonl"), "abc")


def test_digest_covers_selected_texts_and_their_order_only(tmp_path):
    def digest(texts, samples=2):
        return load_calibration(write(tmp_path / "t.jsonl", [{"text": t} for t in texts]), samples, minimum=1).digest

    assert digest(["a", "b", "c"]) == digest(["a", "b", "d"]) == digest(["a", "b"])
    assert len({digest(["a", "b"]), digest(["b", "a"]), digest(["ab", "c"]), digest(["a", "b"], 1)}) == 4


def test_bytes_and_file_give_the_same_set(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {i}", "source": "s"} for i in range(60)])
    assert load_calibration(path.read_bytes(), 55, path=str(path)) == load_calibration(path, 55)


@pytest.mark.parametrize(
    ("rows", "samples", "message"),
    [
        (80, 49, "calibration.samples is 49; nearest-neighbour estimates need at least 50 texts, better 200"),
        (60, 64, "has 60 distinct texts, calibration.samples asks for 64; lower it to 60 or add texts"),
        (7, 64, "has 7 distinct texts, calibration.samples asks for 64; at least 50 are needed, add texts"),
    ],
)
def test_too_few_texts_are_refused(tmp_path, rows, samples, message):
    path = write(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(rows)])
    with pytest.raises(CalibrationError) as refusal:
        load_calibration(path, samples)
    assert message in str(refusal.value)


def test_an_empty_set_cannot_be_built():
    with pytest.raises(CalibrationError, match="no texts"):
        CalibrationSet((), (), "", "x")


def test_overlap_by_equality_and_by_containment():
    calibration = ["Is it  TRUE?", f"{LONG.upper()}\nA. yes\nB. no", "Is it true? And more", "free"]
    assert find_overlap(calibration, ["is it true?", LONG, ""]) == calibration[:2]
    assert find_overlap(["a b", "c d"], ["b c"]) == []


def test_texts_do_not_match_across_their_borders():
    half = len(LONG) // 2
    assert find_overlap([LONG[:half], LONG[half:]], [LONG]) == []


def test_refuse_overlap_counts_all_and_shows_five():
    texts = [f"question number {i}" for i in range(8)]
    with pytest.raises(CalibrationError) as refusal:
        refuse_overlap(["fine", *texts], texts)
    message = str(refusal.value)
    assert message.startswith("8 of 9 calibration texts")
    assert [f"'question number {i}'" in message for i in range(8)] == [True] * 5 + [False] * 3
    refuse_overlap(["fine"], texts)


def test_read_heldout_groups_by_source(tmp_path):
    rows = [{"text": "1", "source": "a"}, {"text": "2", "source": "b"}, {"text": "3", "source": "a"}, {"text": "4"}]
    assert read_heldout(write(tmp_path / "h.jsonl", rows)) == {"a": ["1", "3"], "b": ["2"], "h": ["4"]}


def test_word_runs_of_a_short_text():
    assert word_runs("One, two;  three four", 3) == {("one", "two", "three"), ("two", "three", "four")}
    assert word_runs("one two", 3) == set()
