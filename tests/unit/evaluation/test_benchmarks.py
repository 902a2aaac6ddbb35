import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mka.errors import NumericsError, RecipeError
from mka.evaluation.task_tables import TASKS, list_mmlu
from mka.evaluation.tasks import check_tasks, choose_items, run_tasks

WORDS = ["red", "green", "blue", "cold", "warm", "tall", "small", "round", "quick", "slow"]


def pick(i, step=1):
    return f"{WORDS[i % 10]} {WORDS[(i * step + 3) % 10]}"


TABLES = {
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": f"A {pick(i)} pot [step] stands here.",
            "ctx_b": "it",
            "endings": [pick(i + k, 2) * (k + 1) for k in range(4)],
            "label": str(i % 4),
        }
        for i in range(8)
    ],
    "piqa": [{"goal": pick(i), "sol1": pick(i, 2), "sol2": pick(i, 3) * 2, "label": i % 2} for i in range(8)],
    "arc_easy": [
        {
            "id": f"q{i}",
            "question": f"Which is {pick(i)}?",
            "choices": {"text": [pick(i * 7 + k, 3) for k in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": "BADCABDCCDAB"[i],
        }
        for i in range(12)
    ],
    "winogrande": [
        {"sentence": f"The {pick(i)} was _ again.", "option1": "cup", "option2": "table", "answer": str(1 + i % 2)}
        for i in range(8)
    ],
    "boolq": [
        {"idx": i, "passage": f"It is {pick(i)}. " * 8, "question": f"is it {WORDS[i]}", "label": i % 2}
        for i in range(8)
    ],
    "lambada_openai": [{"text": f"The {pick(i)} cup was {pick(i, 3)}."} for i in range(6)],
}
TABLES["arc_challenge"] = TABLES["arc_easy"][:5]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name, rows in TABLES.items():
        write(folder / f"{name}.jsonl", rows)
    write(folder / "piqa.train.jsonl", [{"goal": "fly", "sol1": "wings", "sol2": "stones", "label": 0}] * 4)
    for number, name in enumerate(list_mmlu()):
        rows = [
            {"question": f"{number} {pick(i)}?", "choices": [pick(i + k) for k in range(4)], "answer": i % 4}
            for i in range(4 if number else 8)
        ]
        for split, part in (("test", rows[1:]), ("dev", rows[:1])):
            write(folder / "mmlu" / f"{name.removeprefix('mmlu_')}.{split}.jsonl", part)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def run(model, tokenizer, tasks, tables, **options):
    options = {"max_length": 1024, "batch_size": 4, "progress": False, **options}
    return run_tasks(model, tokenizer, tasks, tasks_folder=tables, **options)


@pytest.fixture(scope="module")
def scores(model, tokenizer, tables):
    return {score.name: score for score in run(model, tokenizer, dict.fromkeys(TASKS), tables)}


def test_every_task_runs_on_its_table_with_the_published_metric(scores):
    assert list(scores) == list(TASKS)
    assert {name: score.metric for name, score in scores.items()} == {
        "hellaswag": "acc_norm",
        "piqa": "acc_norm",
        "arc_easy": "acc_norm",
        "arc_challenge": "acc_norm",
        "winogrande": "acc",
        "boolq": "acc",
        "lambada_openai": "acc",
    }
    for name, score in scores.items():
        assert score.n == len(score.items) == len(TABLES[name])
        assert set(score.items) <= {0, 1} and score.higher_is_better
        assert (score.extra["source"], score.extra["truncated"], score.extra["shots"]) == ("tables", 0, 0)


def test_items_agree_one_by_one_with_scoring_by_hand(model, tokenizer, scores):
    def loglikelihood(context, continuation):
        start, whole = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
        with torch.inference_mode():
            log = torch.log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
        return sum(log[i - 1, whole[i]].item() for i in range(len(start), len(whole)))

    plain, normed = [], []
    for row in TABLES["arc_easy"]:
        texts = row["choices"]["text"]
        values = [loglikelihood(f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts]
        gold = row["choices"]["label"].index(row["answerKey"])
        plain.append(int(values.index(max(values)) == gold))
        scaled = [value / len(text) for value, text in zip(values, texts)]
        normed.append(int(scaled.index(max(scaled)) == gold))
    score = scores["arc_easy"]
    assert list(score.items) == normed
    assert 0 < sum(normed) < len(normed)  # else the comparison says little
    assert score.extra["acc"] == sum(plain) / len(plain)


def test_lambada_scores_the_last_word_with_accuracy_and_perplexity(model, tokenizer, tmp_path, monkeypatch):
    # A model of bigrams: after "e" a space gets logit 5, after a space "q", all else 0.
    e, space, q = (tokenizer(character)["input_ids"][-1] for character in "e q")
    table = torch.zeros(258, 258)
    table[e, space] = table[space, q] = 5.0
    forward = model.forward

    def bigrams(input_ids, **kwargs):
        output = forward(input_ids, **kwargs)
        output.logits = table[input_ids]
        return output

    monkeypatch.setattr(model, "forward", bigrams)
    # The last space is the target's: " q" is what the model would say, " r" is not.
    write(tmp_path / "lambada_openai.jsonl", [{"text": f"some more {word}"} for word in ("q", "r", "q")])
    (score,) = run(model, tokenizer, {"lambada_openai": None}, tmp_path)
    assert (score.metric, score.items, score.value) == ("acc", (1, 0, 1), 2 / 3)
    other = math.log(math.exp(5) + 257)
    negative = [2 * (other - 5), (other - 5) + other, 2 * (other - 5)]
    assert score.extra["perplexity"] == pytest.approx(math.exp(sum(negative) / 3), rel=1e-5)


def test_standard_error_is_that_of_a_mean_of_items(scores):
    for score in scores.values():
        mean = sum(score.items) / score.n
        spread = math.sqrt(sum((item - mean) ** 2 for item in score.items) / (score.n - 1))
        assert score.value == mean
        assert score.stderr == pytest.approx(spread / math.sqrt(score.n))


def test_a_limit_takes_a_seeded_subset_of_the_same_items(model, tokenizer, tables, scores):
    tasks = {"arc_easy": 5, "piqa": None}
    first, full = run(model, tokenizer, tasks, tables, seed=3)
    again, _ = run(model, tokenizer, tasks, tables, seed=3)
    other, _ = run(model, tokenizer, tasks, tables, seed=4)
    chosen = choose_items({"arc_easy": 12}, 5, 3)["arc_easy"]
    assert list(first.items) == [scores["arc_easy"].items[i] for i in chosen]
    assert first == again
    assert first.extra["items_digest"] != other.extra["items_digest"]
    assert (full.items, full.n) == (scores["piqa"].items, 8)


def test_mmlu_spreads_its_limit_over_all_subjects(model, tokenizer, tables):
    (score,) = run(model, tokenizer, {"mmlu": 60}, tables)
    per_subject = score.extra["per_subject"]
    assert (score.metric, score.n, len(per_subject), sum(per_subject.values())) == ("acc", 60, 57, 60)
    assert min(per_subject.values()) == 1
    (one,) = run(model, tokenizer, {"mmlu_anatomy": None}, tables, shots=1)
    assert (one.name, one.n, one.extra["shots"]) == ("mmlu_anatomy", 3, 1)


def test_fewshot_examples_come_from_the_train_table_and_are_required(model, tokenizer, tables):
    assert run(model, tokenizer, {"piqa": 4}, tables, shots=2)[0].n == 4
    with pytest.raises(RecipeError, match=r"boolq\.train\.jsonl is missing"):
        run(model, tokenizer, {"boolq": 4}, tables, shots=1)


def test_prompts_longer_than_the_model_reads_are_counted(model, tokenizer, tables):
    boolq, piqa = run(model, tokenizer, {"boolq": None, "piqa": None}, tables, max_length=100)
    assert boolq.extra["truncated"] == 2 * boolq.n  # every passage is longer; each item asks twice
    assert piqa.extra["truncated"] == 0


def test_nothing_is_printed_when_progress_is_off_and_one_rate_when_on(model, tokenizer, tables, capfd):
    run(model, tokenizer, {"piqa": 2, "boolq": 2}, tables)
    assert capfd.readouterr() == ("", "")
    run(model, tokenizer, {"piqa": 2, "boolq": 2}, tables, progress=True)
    shown = capfd.readouterr().err
    assert "req/s" in shown and "Building" not in shown and "Tokenizing" not in shown


def test_infinite_scores_are_refused(model, tokenizer, tables, monkeypatch):
    forward = model.forward

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:] = math.nan
        return output

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(NumericsError, match="piqa"):
        run(model, tokenizer, {"piqa": 2}, tables)


def test_no_tasks_need_nothing(model, tokenizer):
    assert run(model, tokenizer, {}, None) == ()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"helaswag": 4}, "unknown task 'helaswag' .did you mean 'hellaswag'"),
        ({"mmlu_anatomi": 4}, "did you mean 'mmlu_anatomy'"),
        ({"piqa": 1}, "at least 2"),
        ({"mmlu": 60, "mmlu_anatomy": 4}, "'mmlu_anatomy' is part of 'mmlu'"),
    ],
)
def test_unknown_tasks_and_useless_limits_are_refused(tasks, message):
    with pytest.raises(RecipeError, match=message):
        check_tasks(tasks)


def test_bad_tables_are_named(model, tokenizer, tmp_path):
    def refused(task="piqa"):
        with pytest.raises(RecipeError) as caught:
            run(model, tokenizer, {task: None}, tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    table = tmp_path / "piqa.jsonl"
    assert str(table) in refused() and "dvc repro" in refused()
    assert "abstract_algebra.test.jsonl" in refused("mmlu")
    table.write_text("")
    assert "no items" in refused()
    table.write_text("{not json\n")
    assert "JSON lines" in refused()
    write(table, [{"goal": "a", "sol1": "b", "label": 0}])
    assert "item 1 lacks sol2" in refused()
    write(table, [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}])
    assert "1 item" in refused()


def test_without_tables_data_sets_are_asked_from_the_hub_by_name(model, tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name=None, **_):
        asked.append((path, name))
        if path != "hf://datasets/baber/piqa":
            raise ConnectionError("no route\nto host")
        rows = datasets.Dataset.from_list(TABLES["piqa"])
        return datasets.DatasetDict({"train": rows, "validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("mka.evaluation.task_data.pin_revision", lambda data: "c" * 40)
    (score,) = run(model, tokenizer, {"piqa": 3}, None)
    assert (score.n, score.extra["source"], score.extra["data"]) == (3, "hub", {"baber/piqa": "c" * 40})
    with pytest.raises(RecipeError, match=r"boolq cannot be fetched .ConnectionError: no route to host.*dvc repro"):
        run(model, tokenizer, {"boolq": 3}, None)
    assert asked[-1] == ("hf://datasets/aps/super_glue", "boolq")


@given(
    sizes=st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 40), min_size=1, max_size=8),
    limit=st.one_of(st.none(), st.integers(2, 120)),
    seed=st.integers(0, 2**32),
)
def test_subsets_are_valid_proportional_and_reproducible(sizes, limit, seed):
    chosen = choose_items(sizes, limit, seed)
    total = sum(sizes.values())
    wanted = total if limit is None else min(total, max(limit, len(sizes)))
    assert list(chosen) == list(sizes)
    for name, items in chosen.items():
        assert items == sorted(set(items)) and items[0] >= 0 and items[-1] < sizes[name]
        if wanted < total and limit:
            assert len(items) <= max(1, math.ceil(limit * sizes[name] / total))
    count = sum(map(len, chosen.values()))
    # Small tables that get their one item may push the total over the limit, never under it.
    assert wanted <= count <= wanted + len(sizes)
    assert choose_items(sizes, limit, seed) == chosen
