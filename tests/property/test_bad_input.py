"""Bad input by the thousand: whatever is changed in a valid file or command, it is read, or refused in one line.

MKA_FUZZ_EXAMPLES says how many of each kind are tried; the counts are printed at the end of the run.
"""

import json
import os
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from support.bench import TINY
from support.models import LAYERS, make_texts
from support.mutations import STRANGE, TEXTS, dump_json, mutate_bytes, mutate_document, mutate_json

from mka.bench.recipe import load_bench
from mka.corpora.params import load_params
from mka.errors import CheckpointError, MkaError
from mka.evaluation.catalog import Catalog
from mka.evaluation.definitions import read_definitions
from mka.evaluation.gate import decide, recover_tasks
from mka.evaluation.reports import read_report
from mka.evaluation.scores import EvalReport, Score
from mka.evaluation.task_building import build_tasks
from mka.evaluation.task_keys import SCORED
from mka.evaluation.task_tables import MMLU_COLUMNS, TASKS, is_built_in, read_table
from mka.evidence.journal import Journal
from mka.evidence.needs import Evidence
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import resolve_method
from mka.model.checkpoint import describe_checkpoint, open_checkpoint
from mka.model.loading import load_tokenizer
from mka.outside.printable import LONGEST
from mka.pipeline.recipes import load_recipe
from mka.plan.plan import MergedLayer, MergePlan, Step
from mka.plan.target import Aim
from mka.plan.wording import describe_layer, describe_steps, label_sources
from mka.recipe import GateSettings, MethodChoice
from mka.report.control import tell_against_control
from mka.report.data import ReportData
from mka.report.page import write_card
from mka.report.table import result_table
from mka.similarity.stability import describe_stability
from mka.store.cleaning import _names_of_last_run
from mka.store.manifests import MANIFEST, read_manifest
from mka.store.products import produce
from mka.terminal import quiet_lm_eval
from mka.texts.calibration import load_calibration
from mka.texts.rows import read_heldout
from mka.transforms.merge import check_plan_fits

EXAMPLES = int(os.environ.get("MKA_FUZZ_EXAMPLES", "100"))
MOST_SECONDS, MOST_BYTES = 5.0, 500_000_000
ROOT = Path(__file__).parents[2]


class Trial:
    """Tries a reader on many inputs of one kind, and counts; the valid one comes first."""

    def __init__(self, record) -> None:
        self.record, self.tried, self.refused = record, 0, 0

    def run(self, make, read, examples=EXAMPLES):
        """Make each input by ``make(random)`` and give it to ``read``, which returns or raises a refusal."""

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            print_blob=False,
        )
        @given(random=st.randoms(use_true_random=False))
        def attempt(random):
            given = make(random)
            self.tried += 1
            started, held = time.process_time(), _peak_memory()
            try:
                read(given)
            except MkaError as error:
                self.refused += 1
                refuse_unreadable(str(error), given)
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}; given {given!r:.1500}") from error
            assert time.process_time() - started < MOST_SECONDS, f"too slow; given {given!r:.1500}"
            assert _peak_memory() - held < MOST_BYTES, f"too much memory; given {given!r:.1500}"

        with limited_memory():
            attempt()
        self.record("inputs", (self.tried, self.refused))
        assert 0 < self.refused <= self.tried


def refuse_unreadable(line, given):
    assert line and len(line) <= LONGEST and line.isprintable(), f"{line!r:.1000}; given {given!r:.1000}"


@contextmanager
def limited_memory(more=3 * 2**30):
    """Let an input that would take all of the machine's memory end in a MemoryError; where the system can."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    held = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture
def trial(record_property):
    return Trial(record_property)


@pytest.fixture
def reading(tmp_path):
    """Return what writes an input to a file and hands it to a reader, and sees that nothing else is written."""

    def prepare(name, read):
        path = tmp_path / name

        def run(data):
            path.write_bytes(data)
            read(path)
            assert sorted(tmp_path.iterdir()) == [path]

        return run

    return prepare


RECIPE = {
    "name": "tiny",
    "method": {"name": "mka", "settings": {"coordinates": 2, "grid": [0, 0.5, 1], "weights": "line-search"}},
    "model": {"package": ["a==1", "b==2"], "sha256": ["0" * 64, "1" * 64], "dtype": "float32"},
    "calibration": {"path": "calibration.jsonl", "rev": None, "samples": 60, "max_tokens": 16},
    "target": {"layers": 5, "protect_first": 1, "protect_last": 1},
    "alignment": {"enabled": True, "penalty": "auto", "heldout_source": "x"},
    "heal": {"mode": "distil", "rate": 0.001},
    "transforms": [{"name": "cast", "settings": {"dtype": "bfloat16"}}],
    "quantize": {"scheme": "int8", "group_size": 16},
    "evaluation": {"text": "heldout.jsonl", "tasks": {"piqa": 40, "boolq": None}, "prompts": ["w5"], "generation": 4},
    "gate": {"rules": [{"metric": "perplexity", "recovery": 0.85}, {"metric": "bytes", "most": "250MB"}]},
    "registry": {"name": "x", "tracking_uri": "http://127.0.0.1:5000", "approvers": ["alice"]},
    "seed": 3,
}


def mutate_yaml(body, random, strange=STRANGE):
    kind = random.random()
    changed = mutate_document(body, random, strange) if kind < 0.75 else body
    try:
        data = yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):  # too deep or too large for the writer, not for a person with an editor
        data = b"a: " + b"[" * 3000
    return mutate_bytes(data, random) if kind > 0.6 else data


def test_recipes(trial, reading):
    trial.run(lambda random: mutate_yaml(RECIPE, random), reading("recipe.yaml", load_recipe))


def test_overrides(trial, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    keys = ["target.layers", "method", "method.settings.grid", "", ".", "gate.rules.0.metric", "seed", "x.y.z", *TEXTS]

    def make(random):
        return random.choice([{random.choice(keys): random.choice(STRANGE)}, random.choice(STRANGE)])

    trial.run(make, lambda given: load_recipe(path, given))


def test_bench_recipes(trial, reading):
    body = yaml.safe_load(TINY.read_text())
    trial.run(lambda random: mutate_yaml(body, random), reading("bench.yaml", load_bench))


def test_params(trial, reading):
    body = yaml.safe_load((ROOT / "data" / "params.yaml").read_text())
    trial.run(lambda random: mutate_yaml(body, random), reading("params.yaml", load_params))


PLAN = MergePlan(
    "mka",
    "label",
    LAYERS,
    (MergedLayer((0,), (1.0,)), MergedLayer((1, 2), (0.3, 0.7)), MergedLayer((3, 4), attention=(3,), mlp=(3, 4))),
    (Step((1,), (2,), 0.5, 0.3), Step((3,), (4,), 0.5, 0.0), Step((5,), (), 0.1, 0.0)),
    settings={"selection": "one-shot"},
    base={"model": "tiny", "digest": None},
    search={"spent": 10},
)


def test_plans(trial, reading, llama_folder):
    base = open_checkpoint(llama_folder)

    def read(path):
        plan = MergePlan.load(path)
        assert MergePlan.from_json(plan.to_json()) == plan
        describe_steps(plan)
        assert all(describe_layer(0, layer) and label_sources(layer) is not None for layer in plan.layers)
        check_plan_fits(plan, base)

    trial.run(lambda random: mutate_json(json.loads(PLAN.to_json()), random), reading("plan.json", read))


def test_layer_scores(trial, reading):
    values = np.random.default_rng(0).uniform(size=(LAYERS, LAYERS))
    stability = {"texts": 60, "halves": 8, "correlation": 0.9, "correlation_least": 0.8, "correlation_most": 1.0}
    body = {"format": "mka-scores/1", "kind": "pairwise-similarity", "method": "mka", "meaning": "m", "settings": {}}
    body |= {"values": ((values + values.T) / 2).tolist(), "stability": stability | {"best": 8, "best_two": 7}}

    def read(path):
        scores = LayerScores.load(path)
        describe_stability(scores)
        planner = resolve_method(MethodChoice(name="mka", settings={}))
        planner.plan(Evidence(scores.layers, "a" * scores.layers), scores, Aim(4, 1, 1))

    trial.run(lambda random: mutate_json(body, random), reading("scores.json", read))


def make_score(metric, items, **extra):
    value = float(np.mean([item[0] for item in items] if isinstance(items[0], tuple) else items))
    return Score("words", metric, value, 0.1, len(items), metric != "perplexity", tuple(items), extra)


def make_report():
    windows = [(70.0 + i, 31) for i in range(8)]
    scores = (make_score("perplexity", windows, bits_per_byte=1.2), make_score("acc", [0, 1] * 4, items_digest="d"))
    facts = {"path": "x", "digest": "ab", "model_type": "llama", "layers": 6, "parameters": 1000, "bytes": 4000}
    speed = {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0}
    return EvalReport(facts, scores, speed, {"w5": "w6"}, {"dtype": "float32", "context": 32, "tasks": {"piqa": 8}})


def test_reports(trial, reading, tmp_path, tmp_path_factory):
    base, elsewhere = make_report(), tmp_path_factory.mktemp("card")

    def read(path):
        candidate = read_report(path)
        decide(base, candidate, GateSettings(), seed=0, resamples=20)
        recover_tasks(base, candidate, seed=0, resamples=20)
        result_table(base, candidate, None)
        tell_against_control(base, candidate, base)
        write_card(ReportData(recipe={}, plan=PLAN, base=base, candidate=candidate, control=base), elsewhere)

    trial.run(lambda random: mutate_json(json.loads(base.to_json()), random), reading("report.json", read))


def test_hidden_states(trial, reading):
    rng = np.random.default_rng(0)

    def make(random):
        arrays = {"pooled": rng.normal(size=(4, 5, 3)), "block_influence": rng.uniform(size=3), "tokens": np.ones(5)}
        kinds = dict.fromkeys(arrays, "float32") | {"block_influence": "float64", "tokens": "int64"}
        if random.random() < 0.7:
            name = random.choice(list(arrays))
            kinds[name] = random.choice(["float16", "float32", "float64", "int8", "int64", "bool"])
            change = random.choice(["drop", "shape", "value", "rename", "dtype"])
            if change == "shape":
                shape = random.choice([(), (0,), (1,), (5,), (2, 2), (4, 5, 3), (0, 5, 3), (4, 0, 3), (1, 5, 3)])
                arrays[name] = np.ones(shape)
            elif change == "value":
                arrays[name].flat[0] = random.choice([np.nan, np.inf, 3e38, -1, 0])
            elif change in ("drop", "rename"):
                arrays |= {random.choice(["", "pooled ", "x"]): arrays.pop(name)} if change == "rename" else {}
                arrays.pop(name, None)
        with np.errstate(all="ignore"):
            data = save({name: np.asarray(array).astype(kinds.get(name, "f4")) for name, array in arrays.items()})
        return mutate_bytes(data[:400], random) + data[400:] if random.random() < 0.5 else data

    def read(path):
        states = HiddenStates.load(path)
        planner = resolve_method(MethodChoice(name="uidl", settings={}))
        planner.method.score(Evidence(states.layers, "a" * states.layers, states=states), planner.settings)

    trial.run(make, reading("states.safetensors", read))


@pytest.mark.parametrize("name", ["table.jsonl", "table.txt"])
def test_tables(trial, reading, name):
    rows = [{"source": "words", "text": text} for text in make_texts(60)]
    lines = [dump_json(row) if name.endswith("l") else row["text"].encode() + b"\n" for row in rows]

    def make(random):
        made, number = list(lines), random.randrange(60)
        if name.endswith("l") and random.random() < 0.7:
            made[number] = dump_json(mutate_document(rows[number], random))
        data = random.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(made)
        kind = random.random()
        data = b"\xef\xbb\xbf" + data if kind < 0.1 else data.decode("utf-8").encode("utf-16") if kind < 0.15 else data
        return mutate_bytes(data, random) if kind > 0.4 else data

    def read(path):
        for source, texts in read_heldout(path).items():
            assert source.isprintable() and all(texts)
        load_calibration(path, 50)

    trial.run(make, reading(name, read))


ITEMS = {
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": "3"},
    "arc_easy": {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"},
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"},
    "mmlu_anatomy": {"question": "a", "choices": ["b", "c", "d", "e"], "answer": 3},
}


@pytest.mark.parametrize("task", ITEMS)
def test_items_of_tasks(trial, reading, task):
    columns = TASKS[task][1] if task in TASKS else MMLU_COLUMNS
    read_ = reading("items.jsonl", lambda path: read_table(task, path, columns))
    trial.run(lambda random: mutate_json(ITEMS[task], random) + b"\n" + dump_json(ITEMS[task]), read_, EXAMPLES // 2)


DEFINITION = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "mine.jsonl", "train": ["mine.jsonl"]}},
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "description": "Answer.\n",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": " ",
    "fewshot_config": {"sampler": "first_n", "fewshot_delimiter": "\n"},
    "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}, {"metric": "acc_norm"}],
    "repeats": 1,
    "metadata": {"version": 1.0},
}
# What a definition may ask of lm-eval that is not done here: code and files from elsewhere, work without end.
ASKED = [
    {"include": "mine.yaml"},
    {"include": "second.yaml"},
    {"class": "planted.Task"},
    {"custom_dataset": "planted.load"},
    {"process_docs": "planted.process"},
    {"process_results": "planted.process"},
    {"use_prompt": "promptsource:*"},
    {"unsafe_code": True},
    {"dataset_path": "../elsewhere"},
    {"dataset_path": "org/name", "dataset_kwargs": {"trust_remote_code": True}},
    {"dataset_kwargs": {"data_files": {"test": "../../../etc/passwd"}}},
    {"dataset_kwargs": {"data_files": {"test": "."}}},
    {"dataset_kwargs": {"data_files": {"test": "x" * 1000}}},
    {"metric_list": [{"metric": "planted.py"}, {"metric": "acc"}]},
    {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
    {"metric_list": [{"metric": "acc"}, {}]},
    {"output_type": "generate_until", "metric_list": [{"metric": "acc"}]},
    {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]},
    {"output_type": "loglikelihood", "metric_list": [{"metric": "exact_match"}]},
    {"generation_kwargs": {"custom_generate": "planted", "trust_remote_code": True}},
    {"filter_list": [{"name": "x", "filter": [{"function": "decontaminate", "path": "/etc/passwd"}]}]},
    {"fewshot_config": {"split": "nowhere"}},
    {"repeats": 10**9},
    {"num_fewshot": 10**9},
    {"group": "both", "task": ["mine", "second"]},
    {"group": "both", "task": ["both"]},
    {"group": "mine", "task": ["mine"]},
]
# Read by the letter: tags, anchors and numbers that a writer of YAML does not make.
WRITTEN = [
    b"doc_to_image: !function planted.text\n",
    b"doc_to_image: !<!function> planted.text\n",
    b"doc_to_image: !!python/name:planted.text\n",
    b"doc_to_image: !!python/object/apply:os.system ['touch ran']\n",
    b"doc_to_image: !include second.yaml\n",
    b"--- \n%TAG !f! !func\n---\ndoc_to_image: !f!tion planted.text\n",
    b"gen_prefix: &a [*a]\n",
    b"gen_prefix: [" + b"".join(b"&b%d [%s]," % (n, b"*b%d," % (n - 1) * 9 if n else b"") for n in range(12)) + b"]\n",
    b"gen_prefix: ["
    + b"".join(b"&b%d {<<: [%s]}," % (n, b"*b%d," % (n - 1) * 9 if n else b"") for n in range(12))
    + b"]\n",
    b"num_fewshot: 1" + b":1" * 120_000 + b"\n",
    b"num_fewshot: 0x" + b"f" * 200_000 + b"\n",
    b"gen_prefix: {0x" + b"f" * 200_000 + b": a}\n",
    b"gen_prefix: " + b"[" * 5000 + b"\n",
    b"tag: [" + b"a, " * 300_000 + b"]\n",
    b"tag: [" + b"a, " * 70_000 + b"]\n",
    b"? " * 2000 + b"\n",
    b"num_fewshot: 2001-02-30\n",
    b"num_fewshot: .nan\n",
    b"gen_prefix: !!binary aaaa\n",
    b"gen_prefix: 'x'\n",
]
TEMPLATES = ["{{ question", "{% for a in question %}", "{{ nothing }}", "{{ 1 // 0 }}", "{{ answer }}", "{{ choices }}"]
TEMPLATES += ["question", "choices", "answer", "{{ choices[answer] }}", "{{ question.__class__.__mro__ }}", "[1, {}]"]
STRANGE_TASKS = [
    *STRANGE,
    "piqa",
    "second",
    *TEMPLATES,
    "acc",
]


def mutate_definition(random):
    kind = random.random()
    if kind < 0.3:
        body = DEFINITION | random.choice(ASKED)
        return mutate_yaml(body, random, STRANGE_TASKS) if kind < 0.1 else yaml.safe_dump(body).encode()
    if kind < 0.5:
        lines = yaml.safe_dump(DEFINITION).encode()
        data = random.choice([lines.replace(b"repeats: 1\n", b""), lines]) + random.choice(WRITTEN)
        return mutate_bytes(data, random) if kind < 0.35 else data
    return mutate_yaml(DEFINITION, random, STRANGE_TASKS)


@pytest.fixture
def tasks_folder(tmp_path, monkeypatch):
    """A folder with tables, a second task and code that no definition may run."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": text, "choices": ["w3", "w9 w4", "w5"], "answer": n % 3} for n, text in enumerate(make_texts(4))
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(DEFINITION | {"task": "second"}))
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    before = sorted(tmp_path.iterdir())
    yield tmp_path
    (tmp_path / "mine.yaml").unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_task_definitions(trial, tasks_folder):
    def read(data):
        (tasks_folder / "mine.yaml").write_bytes(data)
        for name, tasks in read_definitions(tasks_folder).items():
            assert name.isprintable() and all(task.metric in SCORED for task in tasks)
            tables = {table for task in tasks for table in task.tables.values()}
            assert tables and {table.parent for table in tables} == {tasks_folder}
            if not is_built_in(name):  # refused elsewhere
                assert tables <= set(Catalog(tasks_folder).list_files(name, every=True))
                assert list(Catalog(tasks_folder).read_texts(name))

    trial.run(lambda random: mutate_definition(random), read)


def test_items_of_tasks_that_are_defined(trial, tasks_folder):
    table = tasks_folder / "mine.jsonl"
    rows = table.read_bytes().splitlines()
    keys = ["doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "gen_prefix", "output_type"]
    said = [*TEMPLATES, *TEXTS, 0, 7, [], ["a", ""], None, "multiple_choice", "loglikelihood", "generate_until"]

    def make(random):
        body = DEFINITION | {"task": "mine", "metric_list": [{"metric": "acc"}, {"metric": "exact_match"}]}
        body |= {random.choice(keys): random.choice(said) for _ in range(random.randrange(3))}
        changed = mutate_json(json.loads(rows[1]), random) if random.random() < 0.5 else rows[1]
        return yaml.safe_dump(body).encode("utf-8", "surrogatepass"), b"\n".join([rows[0], changed, *rows[2:]])

    def read(given):
        (tasks_folder / "mine.yaml").write_bytes(given[0])
        table.write_bytes(given[1])
        catalog = Catalog(tasks_folder)
        build_tasks(catalog, {"mine": catalog.find("mine")}, 1, 0)

    with quiet_lm_eval(progress=False):
        trial.run(make, read, EXAMPLES // 2)


def test_manifests(trial, tmp_path):
    def make_result(folder):
        (folder / "x.txt").write_text("x")
        return {"count": 2}

    def make_again(data=None):
        what = {"version": 1, "settings": {"a": 1}, "inputs": {"base": "d"}}
        if data is not None:
            (folder / MANIFEST).write_bytes(data)
        return produce(tmp_path, "score", **what, make=make_result)

    folder = make_again().folder
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]

    def read(data):
        product = make_again(data)
        assert (product.folder / "x.txt").read_text() == "x" and isinstance(product.facts, dict)
        if not product.reused:  # nothing is refused here: what cannot be used is made again
            raise MkaError(product.why)

    trial.run(lambda random: mutate_json(body, random), read)
    assert read_manifest(folder) is not None


def test_journals(trial, reading):
    lines = [dump_json({"of": f"step {i}", "value": 0.5}) for i in range(3)]

    def make(random):
        return b"\n".join([lines[0], mutate_json(json.loads(lines[1]), random), lines[2], b""])

    trial.run(make, reading("journal.jsonl", lambda path: Journal(path).recall("step 2", lambda: 1.0)))


def test_records_of_the_last_run(trial, tmp_path):
    body = {"recipe": "r.yaml", "stages": {"plan": {"seconds": 1.0, "why": "new"}}, "candidate": "/x/y"}

    def read(data):
        (tmp_path / "last_run.json").write_bytes(data)
        _names_of_last_run(tmp_path)

    trial.run(lambda random: mutate_json(body, random), read)


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A model folder of which one file is changed."""
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


def open_folder(folder):
    try:
        describe_checkpoint(open_checkpoint(folder))
    except OSError as error:  # a name that is too long; commands tell these in one line, too
        raise CheckpointError(str(error)) from None


def write_and(read, path):
    def run(data):
        path.write_bytes(data)
        read(path.parent)

    return run


def test_configs(trial, folder):
    body = json.loads((folder / "config.json").read_text())

    trial.run(lambda random: mutate_json(body, random), write_and(open_folder, folder / "config.json"))


def test_a_config_of_a_thousand_million_layers(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    with limited_memory(), pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_headers(trial, folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    def make(random):
        made = mutate_json(header, random)
        size = len(made) if random.random() < 0.9 else random.choice([0, 2**31, 2**63, 2**64 - 1, len(made) + 8])
        return size.to_bytes(8, "little") + made + rest

    trial.run(make, write_and(open_folder, path))


def test_indices(trial, folder):
    names = list(open_checkpoint(folder).tensors)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    body = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    path = folder / "model.safetensors.index.json"
    trial.run(lambda random: mutate_json(body, random), write_and(open_folder, path))


def test_tokenizers(trial, folder):
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text())

    def read(folder):
        tokenizer = load_tokenizer(folder)
        try:
            tokenizer(["w3 w4"], truncation=True, max_length=8)
        except Exception as error:
            raise CheckpointError(str(error)) from None  # how a tokenizer works is asked where it is used

    trial.run(lambda random: mutate_json(body, random), write_and(read, path))
