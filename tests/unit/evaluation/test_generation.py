"""Copying, retrieval and repetition: closed forms on models whose next token is a rule."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import make_tiny_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from mka.errors import NumericsError, RecipeError
from mka.evaluation.gate import decide
from mka.evaluation.generation import (
    measure_copying,
    measure_repetition,
    measure_retrieval,
)
from mka.evaluation.metrics import Subject, list_asked
from mka.evaluation.scores import EvalReport
from mka.recipe import EvaluationSettings, GateRule, GateSettings

VOCAB, BOS, EOS = 258, 256, 257


def byte_tokenizer(*, bos=False):
    """One token per UTF-8 byte."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": BOS, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Ruled(PreTrainedModel, GenerationMixin):
    """A causal language model whose next token is a rule of the tokens before it, padding left out."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, rule):
        super().__init__(PretrainedConfig(vocab_size=VOCAB, eos_token_id=EOS, pad_token_id=0))
        self.rule, self.anchor = rule, torch.nn.Parameter(torch.zeros(1))
        self.generation_config.use_cache = False

    def forward(self, input_ids, attention_mask=None, **_):
        logits = torch.zeros(*input_ids.shape, VOCAB)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), kept.tolist())):
            start = mask.index(1)
            for place in range(start, len(ids)):
                # Nothing but the last place is asked of a padded row.
                if attention_mask is None or place == len(ids) - 1:
                    logits[row, place, self.rule(ids[start : place + 1])] = 1.0
        return CausalLMOutput(logits=logits)


def induct(ids):
    """Say what followed the longest earlier occurrence of what was said last."""
    for size in range(min(40, len(ids) - 1), 0, -1):
        for place in range(len(ids) - size):
            if ids[place : place + size] == ids[-size:]:
                return ids[place + size]
    return 0


RULES = {
    "copies": induct,
    "says one thing": lambda ids: 5,
    "never repeats": lambda ids: (ids[-1] + 1) % 256,
    "stops": lambda ids: EOS,
}


def ask(model, tokenizer=None, **settings):
    settings = {"generation": 6, "context": 512, **settings}
    return Subject(model, tokenizer or byte_tokenizer(), EvaluationSettings(**settings), {}, {}, 3, progress=False)


def measure(function, rule, **settings):
    (score,) = function(ask(Ruled(RULES[rule]).eval(), **settings))
    return score


def test_who_copies_perfectly_copies_everything():
    score = measure(measure_copying, "copies")
    assert (score.name, score.metric, score.value, score.stderr, score.n) == ("sequences", "copying", 1.0, 0.0, 6)
    assert score.items == (1.0,) * 6 and score.extra["tokens"] == 64


def test_who_says_one_thing_copies_that_token_where_it_is():
    score = measure(measure_copying, "says one thing")
    # Tokens of a sequence differ, so that token 5 is at most one of the 63 that are asked for.
    assert {round(63 * item, 9) for item in score.items} <= {0, 1}
    assert score.value == pytest.approx(np.mean(score.items))
    assert score.stderr == pytest.approx(np.std(score.items, ddof=1) / math.sqrt(6))


def test_copied_sequences_are_said_twice_after_what_the_tokenizer_begins_with():
    seen = []
    model = Ruled(RULES["stops"]).eval()
    model.register_forward_hook(
        lambda _, __, kwargs, output: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    measure_copying(ask(model, byte_tokenizer(bos=True), context=32))
    assert len(seen) == 6
    for ids in seen:
        half = (32 - 1) // 2
        assert ids[0] == BOS and len(ids) == 1 + 2 * half
        assert ids[1 : 1 + half] == ids[1 + half :]
        assert len({*ids[1:]}) == half and not {BOS, EOS} & {*ids[1:]}


def test_who_looks_for_what_came_before_finds_the_number_in_the_passage():
    score = measure(measure_retrieval, "copies", context=512)
    assert (score.name, score.value, score.n, score.items) == ("passages", 1.0, 6, (1,) * 6)
    assert 430 < score.extra["tokens"] < 512


@pytest.mark.parametrize("rule", ["says one thing", "never repeats", "stops"])
def test_who_does_not_look_finds_nothing(rule):
    score = measure(measure_retrieval, rule, context=512)
    assert score.value == 0 and score.stderr == 0


def test_the_number_of_another_person_or_a_longer_one_is_no_answer(monkeypatch):
    import mka.evaluation.generation as module

    def answer(change):
        def give(subject, prompts, new_tokens, what):
            found = []
            for ids in prompts:
                passage, _, question = subject.tokenizer.decode(ids).rpartition("\n\n")
                facts = {f.partition(" is ")[0]: f.partition(" is ")[2] for f in passage.split(".") if " is " in f}
                facts = {key.strip(): value for key, value in facts.items()}
                said = change(facts, question.removesuffix(" is"))
                found.append(subject.tokenizer(said)["input_ids"])
            return found

        monkeypatch.setattr(module, "continue_greedily", give)
        (score,) = measure_retrieval(ask(SimpleNamespace(config=SimpleNamespace()), context=512))
        return score.value

    assert answer(lambda facts, asked: f" {facts[asked]}.") == 1
    assert answer(lambda facts, asked: f" {facts[asked]}7") == 0
    assert answer(lambda facts, asked: next(f" {v}." for k, v in facts.items() if k != asked)) == 0


def test_each_4_gram_of_one_token_is_the_same_and_of_a_count_none():
    one, none = (measure(measure_repetition, rule) for rule in ("says one thing", "never repeats"))
    # 64 tokens hold 61 4-grams.
    assert (one.value, one.extra["repeated"]) == (pytest.approx(61), pytest.approx(60 / 61))
    assert (none.value, none.extra["repeated"], none.stderr) == (1.0, 0.0, 0.0)
    assert none.items == (0.0,) * 6 and not none.higher_is_better


def test_a_loop_of_three_tokens_says_each_4_gram_a_third_of_all_times():
    loop = Ruled(lambda ids: 7 + len(ids) % 3).eval()
    (score,) = measure_repetition(ask(loop))
    assert score.value == pytest.approx(61 / 3) and score.extra["repeated"] == pytest.approx(1 - 3 / 61)


def test_to_stop_at_once_is_no_way_of_not_repeating():
    # What comes second for a model that wants to stop is token 0, 64 times.
    assert measure(measure_repetition, "stops").value == pytest.approx(61)


def test_recovery_of_repetition_is_defined_where_the_base_never_repeats():
    def report(rule):
        return EvalReport({}, (measure(measure_repetition, rule),), {}, {}, {})

    gate = GateSettings(rules=(GateRule(metric="repetition", recovery=0.9),))
    (check,) = decide(report("never repeats"), report("says one thing"), gate, seed=0).checks
    assert (check.name, check.verdict) == ("repetition continuations", "fail")
    assert check.recovery == pytest.approx(1 / 61)
    (same,) = decide(report("never repeats"), report("never repeats"), gate, seed=0).checks
    assert (same.recovery, same.verdict) == (1.0, "pass")


def test_a_base_that_solves_nothing_has_no_recovery_and_the_refusal_says_which_metric():
    report = EvalReport({}, (measure(measure_retrieval, "stops", context=512),), {}, {}, {})
    gate = GateSettings(rules=(GateRule(metric="retrieval", recovery=0.9),))
    with pytest.raises(NumericsError, match="retrieval: the base solves no item"):
        decide(report, report, gate, seed=0)


def test_a_gate_without_rules_does_not_ask_for_generation():
    settings = EvaluationSettings(generation=4)
    assert {row.name for row in list_asked(settings)} - {row.name for row in list_asked(EvaluationSettings())} == {
        "copying",
        "retrieval",
        "repetition",
    }
    assert not any(row.required for row in list_asked(settings) if row.asked == "generation")


@pytest.mark.parametrize("function", [measure_copying, measure_retrieval, measure_repetition])
def test_items_hang_on_the_seed_and_not_on_the_model_or_the_batch(function):
    digests = []
    for rule, size, seed in (("stops", 8, 0), ("never repeats", 1, 0), ("stops", 8, 1)):
        (score,) = function(replace(ask(Ruled(RULES[rule]).eval(), context=512, batch_size=size), seed=seed))
        digests.append(score.extra["items_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_penalty_of_the_models_own_is_left_out():
    model = Ruled(RULES["says one thing"]).eval()
    model.generation_config.repetition_penalty = 100.0
    model.generation_config.no_repeat_ngram_size = 2
    assert measure_repetition(ask(model))[0].value == pytest.approx(61)


def test_logits_that_are_no_numbers_are_refused_and_leave_no_hook():
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    subject = ask(model, make_tokenizer(), context=64)
    for function, what in ((measure_copying, "copying"), (measure_repetition, "repetition")):
        with pytest.raises(NumericsError, match=f"{what}: the model's logits are NaN"):
            function(subject)
    assert not model._forward_hooks


def test_a_context_that_holds_no_passage_or_more_than_the_model_reads_is_refused_in_one_line():
    with pytest.raises(RecipeError, match=r"retrieval: 3 facts and a question are \d+ tokens and evaluation.context"):
        measure(measure_retrieval, "stops", context=64)
    with pytest.raises(RecipeError, match="too short for a prompt and 4 tokens"):
        measure(measure_repetition, "stops", context=16)
    with pytest.raises(RecipeError, match="the model has 128 positions"):
        measure_copying(ask(make_tiny_model("llama"), make_tokenizer(), context=512))


def test_one_item_is_refused():
    with pytest.raises(ValueError, match="at least 2: one item has no error bar"):
        EvaluationSettings(generation=1)
    assert EvaluationSettings().generation == 0
