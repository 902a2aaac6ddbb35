import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mka.errors import NumericsError, RecipeError
from mka.evaluation.perplexity import measure_perplexity, score_windows
from mka.terminal import showing
from mka.texts.windows import SEPARATOR, cut_windows

VOCAB = 258
# ASCII, two-, three- and four-byte characters.
TEXTS = ["Der Wald, im Herbst: grün und gelb.", "Une forêt d'été – 森林 🌲🌳.", "Plain words follow here."] * 6


def byte_tokenizer(*, bos=False):
    """One token per UTF-8 byte."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def uniform(model):
    weights = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    yield model
    with torch.no_grad():
        model.lm_head.weight.copy_(weights)


def measure(model, tokenizer, texts=TEXTS, **options):
    options = {"name": "t", "context": 32, "max_tokens": 10_000, "progress": False, **options}
    return measure_perplexity(model, tokenizer, texts, **options)


@pytest.mark.parametrize("bos", [False, True])
def test_uniform_logits_give_the_vocabulary_size_and_no_error_bar(uniform, bos):
    score = measure(uniform, byte_tokenizer(bos=bos))
    assert score.value == pytest.approx(VOCAB, rel=1e-6)
    assert score.stderr == pytest.approx(0, abs=1e-3)
    assert not score.higher_is_better


def test_one_token_per_byte_makes_bits_per_byte_the_log_of_the_vocabulary(uniform):
    score = measure(uniform, byte_tokenizer(), ["only plain ascii letters in this one. " * 9])
    assert score.extra["bytes"] == score.extra["tokens"]
    assert score.extra["bits_per_byte"] == pytest.approx(math.log2(VOCAB), rel=1e-6)


def test_bits_per_byte_are_the_total_bits_over_the_bytes_of_the_text(model):
    score = measure(model, byte_tokenizer(bos=True))
    total = sum(nll for nll, _ in score.items)
    assert score.extra["bits_per_byte"] * score.extra["bytes"] * math.log(2) == pytest.approx(total)
    assert score.value == pytest.approx(math.exp(total / score.extra["tokens"]))


@pytest.mark.parametrize("bos", [False, True])
def test_each_window_has_the_loss_the_model_itself_reports(model, bos):
    tokenizer = byte_tokenizer(bos=bos)
    score = measure(model, tokenizer)
    windows = cut_windows(tokenizer, TEXTS, name="t", context=32, max_tokens=10_000)
    assert score.n == len(score.items) == len(windows.ids) > 10
    for ids, (nll, tokens) in zip(windows.ids, score.items):
        batch = torch.tensor([ids])
        assert tokens == len(ids) - 1
        assert nll / tokens == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), rel=1e-5)


def test_without_bos_windows_tile_the_tokens_and_predict_all_but_the_first():
    tokenizer = byte_tokenizer()
    windows = cut_windows(tokenizer, TEXTS, name="t", context=16, max_tokens=10_000)
    tokens = tokenizer(SEPARATOR.join(TEXTS))["input_ids"]
    flat = [token for ids in windows.ids for token in ids]
    assert flat == tokens[: len(flat)] and len(tokens) - len(flat) < 16
    assert windows.predicted == 15


def test_a_tokenizer_with_bos_starts_every_window_with_it_and_predicts_the_whole_text():
    tokenizer = byte_tokenizer(bos=True)
    windows = cut_windows(tokenizer, TEXTS, name="t", context=16, max_tokens=10_000)
    assert {ids[0] for ids in windows.ids} == {256}
    assert windows.predicted == 16
    flat = [token for ids in windows.ids for token in ids[1:]]
    raw = SEPARATOR.join(TEXTS).encode()
    assert tokenizer.decode(flat[:30]).encode() == raw[:30]
    # Windows may end inside a character, whose bytes then count as soon as its first token is predicted.
    assert 0 <= sum(windows.nbytes) - len(flat) <= 3


def test_budget_counts_predicted_tokens():
    windows = cut_windows(byte_tokenizer(), TEXTS, name="t", context=16, max_tokens=59)
    assert len(windows.ids) == 3  # 3 * 15 = 45; a fourth would make 60


def test_batches_do_not_change_the_result(model):
    one, many = (measure(model, byte_tokenizer(), batch_size=size) for size in (1, 7))
    assert [nll for nll, _ in one.items] == pytest.approx([nll for nll, _ in many.items], rel=1e-5)


def test_standard_error_solved_by_hand():
    # L = 30/20 = 1.5, residuals -5 and 5: se = sqrt(2/1 * 50) / 20 = 0.5.
    score = score_windows("t", [10.0, 20.0], [10, 10], [40, 60])
    assert score.extra["nats_per_token_stderr"] == pytest.approx(0.5)
    assert score.stderr == pytest.approx(0.5 * math.exp(1.5))
    assert score.extra["bits_per_byte"] == pytest.approx(30 / math.log(2) / 100)
    # Windows of different length but one rate carry no spread.
    assert score_windows("t", [2.0, 6.0], [1, 3], [1, 3]).stderr == 0


def test_standard_error_is_that_of_a_mean_when_windows_are_equal():
    nll = np.random.default_rng(0).normal(300, 40, 50)
    score = score_windows("t", nll.tolist(), [100] * 50, [400] * 50)
    assert score.extra["nats_per_token_stderr"] == pytest.approx(nll.std(ddof=1) / math.sqrt(50) / 100)


def test_what_is_not_finite_is_refused(model, monkeypatch):
    forward = model.forward

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[-1, -1, -1] = math.nan
        return output

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(NumericsError, match=r"'news'.*NaN"):
        measure(model, byte_tokenizer(), name="news")
    with pytest.raises(NumericsError, match="not a finite number"):
        score_windows("t", [1e6, 1e6], [100, 100], [1, 1])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["too short"], {}, "9 tokens .* make 0 windows"),
        ([], {}, "make 0 windows"),
        (TEXTS, {"max_tokens": 40}, "budget of 40 make 1 windows"),
        (TEXTS, {"context": 129}, "the model has 128 positions"),
    ],
)
def test_too_little_text_and_too_long_contexts_are_refused(model, texts, options, message):
    with pytest.raises(RecipeError, match=message):
        measure(model, byte_tokenizer(), texts, **options)


def test_progress_shows_a_token_rate_and_can_be_silent(model, capfd):
    measure(model, byte_tokenizer())
    assert capfd.readouterr() == ("", "")
    with showing(True):
        measure(model, byte_tokenizer(), progress=True)
    assert "tok/s" in capfd.readouterr().err
