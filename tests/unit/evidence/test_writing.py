"""What a model writes, on models whose distribution is known."""

import math

import pytest
import torch
from support.models import make_tiny_model, make_tokenizer

from mka.errors import CalibrationError, NumericsError
from mka.evidence import writing
from mka.evidence.writing import draw_starts, find_special, imitate_texts, write_texts
from mka.terminal import showing
from mka.texts.rows import text_digest
from mka.texts.writing import LEAST_TOKENS, OPENINGS, Wanted

SPECIAL = frozenset({0, 1, 2})
TURNS = ["base-token", *(f"base-{kind}" for kind in OPENINGS)]


@pytest.fixture(autouse=True)
def quiet():
    with showing(False):
        yield


def make_uniform_model():
    """Every one of 97 tokens is as likely as any other, whatever went before."""
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def make_sure_model(token):
    """Says one token and no other."""
    model = make_uniform_model()
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
        model.lm_head.bias[token] = 1e4
    return model


def test_a_table_is_large_enough_and_has_every_kind_in_every_part(tokenizer):
    wanted = Wanted(2000, 60, seed=3)
    made = write_texts(make_uniform_model(), tokenizer, wanted)
    lengths = [len(row["text"].split()) for row in made.rows]  # a word is a token
    assert sum(lengths) == made.tokens >= 2000 and len(made.rows) >= 60
    assert min(lengths) >= LEAST_TOKENS and max(lengths) <= wanted.length == 64
    assert len({text_digest(row["text"]) for row in made.rows}) == len(made.rows)
    assert not any(mark in row["text"] for row in made.rows for mark in ("<s>", "</s>", "<pad>"))
    for first in range(0, len(made.rows) - 24, 24):
        assert {row["source"] for row in made.rows[first : first + 24]} == set(TURNS)


def test_the_same_request_gives_the_same_texts_and_leaves_the_random_state_alone(tokenizer):
    model = make_tiny_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = write_texts(model, tokenizer, Wanted(1000))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert write_texts(model, tokenizer, Wanted(1000)) == one
    other = write_texts(model, tokenizer, Wanted(1000, seed=1))
    assert {row["text"] for row in other.rows}.isdisjoint(row["text"] for row in one.rows)


def test_tokens_are_drawn_from_the_whole_distribution_whatever_the_model_prefers(tokenizer):
    """A model's own top-k of 1 would make every text the same; a top-p would leave most of the vocabulary out."""
    model = make_uniform_model()
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    made = write_texts(model, tokenizer, Wanted(8000))
    words = [word for row in made.rows for word in row["text"].split()]
    counts = [words.count(f"w{i}") for i in range(3, 97)]
    expected = len(words) / 94
    # Chi-square of 94 cells: 93 on average, deviation sqrt(186).
    assert sum((count - expected) ** 2 / expected for count in counts) < 93 + 4 * math.sqrt(186)
    # A text goes on after a token with probability 94/97, so that of those long enough for a table, which lose
    # nothing by their beginning, few have more than a hundred.
    survive = (94 / 97) ** (100 - LEAST_TOKENS)
    longer = sum(len(row["text"].split()) > 100 for row in made.rows) / len(made.rows)
    assert abs(longer - survive) < 4 * math.sqrt(survive / len(made.rows))


@pytest.mark.parametrize("batch", [5, 200])
def test_texts_are_written_so_many_at_a_time(tokenizer, batch):
    made = write_texts(make_uniform_model(), tokenizer, Wanted(1000), batch)
    written = len(made.rows) + sum(made.dropped.values())
    # A text has 32 tokens on average, the probability to go on is 94/97: 200 are more than enough, 5 are not.
    assert written == 200 if batch == 200 else 5 < written < 200 and written % 5 == 0
    assert sum(len(row["text"].split()) for row in made.rows) == made.tokens >= 1000


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_a_batch_changes_no_text(family):
    """Of a model that is sure of everything: each beginning goes on as it does alone, read afresh token by token."""
    model = make_tiny_model(family)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(1e5 * model.lm_head.weight)  # no longer the embedding's
    starts = [[5], [7, 8, 9, 10, 11], [20, 21], [2, 33, 34]]
    made = writing._sample(model, starts, 24, [0, 1, 2])
    for start, found in zip(starts, made):
        ids = list(start)
        with torch.inference_mode():
            # The batch is as long as its longest beginning and what follows it.
            for _ in range(24 - 5):
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token in SPECIAL:
                    break
                ids.append(token)
        assert found == ids


def test_beginnings_take_turns_and_start_with_bos_where_the_tokenizer_does():
    plain, bos = make_tokenizer(), make_tokenizer(add_bos=True)
    starts = draw_starts(plain, SPECIAL, 0)
    drawn = [next(starts) for _ in range(600)]
    assert [source for source, _ in drawn] == TURNS * 100
    tokens = [ids for source, ids in drawn if source == "base-token"]
    assert all(len(ids) == 1 and ids[0] not in SPECIAL for ids in tokens) and len({ids[0] for ids in tokens}) > 40
    starts = draw_starts(bos, SPECIAL, 0)
    drawn = [next(starts) for _ in range(7)]
    assert [source for source, _ in drawn] == ["base-bos", *TURNS]
    assert drawn[0][1] == [1] and all(ids[0] == 1 and len(ids) > 1 for _, ids in drawn[1:])


def test_special_tokens_are_marks_and_ids_without_a_token(tokenizer):
    assert find_special(tokenizer, 97) == SPECIAL
    assert find_special(tokenizer, 100) == SPECIAL | {97, 98, 99}


@pytest.mark.parametrize(
    ("token", "reason"), [(2, "short: 64"), (9, "repetitive: 64")], ids=["ends at once", "says one word"]
)
def test_a_model_that_does_not_write_is_refused_in_one_line(tokenizer, token, reason):
    with pytest.raises(CalibrationError, match="writes nothing usable: of 64 texts 64 were left out") as refusal:
        write_texts(make_sure_model(token), tokenizer, Wanted(1000))
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_model_whose_logits_are_no_numbers_is_refused(tokenizer):
    with pytest.raises(NumericsError, match="NaN or infinite"):
        write_texts(make_broken_model(), tokenizer, Wanted(1000))


def make_broken_model():
    model = make_uniform_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    return model


def test_what_stands_in_for_texts_is_as_much_and_of_the_same_sources(tokenizer):
    made = imitate_texts(tokenizer, Wanted(2000, 25))
    assert {len(row["text"].split()) for row in made.rows} == {80}
    assert made.tokens == 2000 and len(made.rows) == 25 and {row["source"] for row in made.rows} == set(TURNS)
