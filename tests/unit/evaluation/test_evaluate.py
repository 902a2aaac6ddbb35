import json
import math
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mka.evaluation.perplexity
from mka.errors import CheckpointError, GuardError, RecipeError
from mka.evaluation import metrics
from mka.evaluation.evaluate import evaluate_checkpoint, generate_text, pair_scores
from mka.evaluation.perplexity import measure_perplexity
from mka.evaluation.scores import EvalReport, Score
from mka.evaluation.speed import compare_speed, watch_others
from mka.model.loading import load_model
from mka.recipe import EvaluationSettings, QuantizeSettings

HELDOUT = {"prose": ["A short piece of prose, long enough for some windows."] * 4, "code": ["x = f(y) + 1\n"] * 12}
PROMPTS = ("The capital", "Tea:")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    tables = tmp_path_factory.mktemp("tables")
    rows = [{"goal": f"make {i}", "sol1": "a" * (i + 1), "sol2": "b" * (i + 2), "label": i % 2} for i in range(6)]
    (tables / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluationSettings(
        text_tokens=90, context=16, tasks={"piqa": 4}, tasks_folder=tables, prompts=PROMPTS, new_tokens=5, batch_size=2
    )


@pytest.fixture(scope="module")
def report(folder, settings):
    return evaluate_checkpoint(
        folder,
        settings,
        dtype="float32",
        seed=3,
        heldout=HELDOUT,
        checkpoint_facts={"digest": "abc", "layers": 2},
        command="mka evaluate tiny",
        progress=False,
    )


def test_the_report_holds_what_was_asked_for_and_survives_its_file(report, tmp_path):
    assert [(s.name, s.n, s.metric) for s in report.scores] == [
        ("prose", 6, "perplexity"),  # 90 // 15
        ("code", 6, "perplexity"),
        ("piqa", 4, "acc_norm"),
    ]
    assert report.checkpoint == {"digest": "abc", "layers": 2}
    path = tmp_path / "report.json"
    path.write_text(report.to_json())
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert EvalReport.load(path) == report


def test_conditions_say_how_it_was_measured(report):
    conditions = report.conditions
    assert conditions["command"] == "mka evaluate tiny"
    assert (conditions["dtype"], conditions["seed"], conditions["context"], conditions["shots"]) == (
        "float32",
        3,
        16,
        0,
    )
    assert conditions["limits"] == {"piqa": 4}
    assert conditions["max_length"] == 256  # the model's positions, fewer than the usual 2048
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        conditions["versions"]["torch"]
    )


def test_perplexity_is_that_of_the_model_in_memory(report, folder):
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), load_model(folder, "float32")[1]
    for score in report.scores[:2]:
        expected = measure_perplexity(
            model, tokenizer, HELDOUT[score.name], name=score.name, context=16, max_tokens=90, progress=False
        )
        assert score.value == pytest.approx(expected.value)


def test_text_is_the_greedy_continuation(report, folder):
    model, tokenizer = load_model(folder, "float32")
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(5):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 257:
                break
        assert report.generations[prompt] == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert list(report.generations) == list(PROMPTS)


def test_speed_is_measured_even_where_the_model_would_stop(folder):
    model, tokenizer = load_model(folder, "float32")
    model.generation_config.eos_token_id = list(range(257))  # all but one token end the text
    assert all(len(text) <= 1 for text in generate_text(model, tokenizer, PROMPTS, 5).values())
    counted = []
    model.register_forward_hook(lambda *_: counted.append(1))
    rates, machine = compare_speed({"one": model}, new_tokens=4, seed=0, repeats=2)
    speed = rates["one"]
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert 0 < speed.pop(f"{name}_least") < speed[name] < speed.pop(f"{name}_most")
        # Of two rounds the median is their mean, and that of the rates.
        assert math.isfinite(speed.pop(name))
    assert speed == {} and machine["rounds"] == 2 and machine["cores"] >= 1 and machine["others_busy_cores"] >= 0
    assert len(counted) == 3 * (1 + 4)  # warm-up and two repeats of one prefill and four decoding steps


def test_how_many_cores_others_kept_busy_leaves_out_this_process_and_idle_time(monkeypatch):
    times = namedtuple("times", "user system idle iowait guest")
    # In five seconds 10 s of work were done on four cores, 3 s of them by this process.
    machine = iter([times(100, 10, 500, 7, 3), times(108, 12, 509, 8, 5)])
    own = iter([times(1, 1, 0, 0, 0), times(3, 2, 0, 0, 0)])
    clock = iter([50.0, 55.0])
    monkeypatch.setattr("psutil.cpu_times", lambda: next(machine))
    monkeypatch.setattr("psutil.Process.cpu_times", lambda self: next(own))
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    monkeypatch.setattr("mka.evaluation.speed.time.perf_counter", lambda: next(clock))
    with watch_others() as found:
        pass
    assert found == {"cores": 4, "others_busy_cores": 1.4}


def test_equal_runs_give_equal_numbers(report, folder, settings):
    again = evaluate_checkpoint(
        folder, settings, dtype="float32", seed=3, heldout=HELDOUT, checkpoint_facts={}, progress=False
    )
    assert (again.scores, again.generations) == (report.scores, report.generations)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_folders_are_measured_as_they_are(report, folder, settings, tmp_path, scheme):
    from mka.model.checkpoint import open_checkpoint
    from mka.transforms.rtn import quantize_checkpoint

    output = tmp_path / scheme
    quantize_checkpoint(open_checkpoint(folder), output, QuantizeSettings(scheme=scheme, group_size=16))
    quantized = evaluate_checkpoint(
        output, settings, dtype="float32", seed=3, heldout=HELDOUT, checkpoint_facts={}, progress=False
    )
    limit = {"int8": 0.02, "int4": 0.5}[scheme]
    for before, after in zip(report.scores[:2], quantized.scores[:2]):
        assert after.items != before.items  # it is the rounded model
        assert after.extra["nats_per_token"] == pytest.approx(before.extra["nats_per_token"], rel=limit)
    assert quantized.scores[2].extra["items_digest"] == report.scores[2].extra["items_digest"]


def copy_of(folder, target, **config):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    body = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**body, **config}))
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, the checkpoint holds 2 layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1, the checkpoint holds 2 layers"),
        ({"intermediate_size": 48}, "does not load|mismatched"),
        ({"attention_bias": True}, "8 missing keys, e.g. model.layers.0.self_attn.k_proj.bias"),
        ({"model_type": "no_such_family"}, "architecture 'no_such_family' is not supported"),
    ],
)
def test_folders_that_do_not_load_whole_are_refused(folder, tmp_path, config, message):
    damaged = copy_of(folder, tmp_path / "damaged", **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(damaged, "float32")
    assert str(damaged) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folders_truncated_weights_and_unknown_dtypes_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_model(tmp_path / "nowhere", "float32")
    with pytest.raises(CheckpointError, match="unknown dtype 'float64', allowed: float32"):
        load_model(folder, "float64")
    weights = copy_of(folder, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_model(weights.parent, "float32")


def test_loading_honours_the_dtype_and_prints_nothing(folder, capfd):
    model, tokenizer = load_model(folder, "bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("as is")["input_ids"]) == "as is"
    assert capfd.readouterr() == ("", "")


def test_unknown_tasks_are_refused_before_the_model_is_loaded(settings, tmp_path):
    bad = settings.model_copy(update={"tasks": {"pika": 4}})
    with pytest.raises(RecipeError, match="did you mean 'piqa'"):
        evaluate_checkpoint(tmp_path / "nowhere", bad, dtype="float32", seed=0, heldout={}, checkpoint_facts={})


def test_a_metric_against_the_base_is_measured_where_there_is_a_base(folder, settings, monkeypatch):
    def compare(subject):
        same = subject.model.config.vocab_size == subject.base.config.vocab_size
        return [Score(name, "likeness", float(same), 0.0, 2, True, ((1, 1), (1, 1))) for name in subject.texts]

    row = replace(metrics.HEADLINE, name="likeness", measure="mka.evaluation.perplexity:compare", of_base=False)
    monkeypatch.setattr(mka.evaluation.perplexity, "compare", compare, raising=False)
    monkeypatch.setattr(metrics, "METRICS", {**metrics.METRICS, "likeness": row})
    conditions = {"dtype": "float32", "seed": 0, "heldout": HELDOUT, "checkpoint_facts": {}, "progress": False}
    plain = settings.model_copy(update={"tasks": {}})
    base = evaluate_checkpoint(folder, plain, **conditions, speed=False)
    candidate = evaluate_checkpoint(folder, plain, **conditions, speed=False, base=folder)
    assert {score.metric for score in base.scores} == {"perplexity"}
    assert [score.name for score in candidate.scores if score.metric == "likeness"] == ["prose", "code"]
    assert [pair[0] is None for pair in pair_scores(base, candidate)] == [False, False, True, True]


def make_report(perplexity, accuracy, name="prose"):
    text = Score(name, "perplexity", perplexity, 1.5, 8, False)
    return EvalReport({}, (text, Score("piqa", "acc_norm", accuracy, 0.05, 90, True)), {}, {}, {})


def test_pairs_of_different_measurements_are_refused():
    with pytest.raises(GuardError, match="perplexity on 'code' was measured of the candidate only"):
        pair_scores(make_report(20.0, 0.8), make_report(20.0, 0.8, name="code"))
