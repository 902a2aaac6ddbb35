"""`mka chat`: what stock transformers says to the same tokens, streamed; one prompt per line where nobody types."""

import io
import json

import pytest
import torch
from support.models import make_tiny_model, make_tokenizer, save_model
from transformers import AutoModelForCausalLM

from mka.cli.main import main
from mka.errors import RecipeError
from mka.evaluation.chat import Chat, Decoding

TEMPLATE = "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }} {% endfor %}w4 "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("chat") / "model", tokenizer=tokenizer)


@pytest.fixture
def run(capsys, monkeypatch):
    def chat(*given, stdin="", code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert main(["chat", *map(str, given)]) == code
        return capsys.readouterr()

    return chat


def continue_by_stock(folder, text, new_tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    made = model.generate(**given, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(made[given["input_ids"].shape[1] :], skip_special_tokens=True)


def test_one_prompt_is_answered_by_the_template_as_stock_does(run, folder):
    out, err = run(folder, "--prompt", "w7 w8", "--temperature", 0, "--max-new-tokens", 6)
    expected = continue_by_stock(folder, "w3 w7 w8 w4", 6)
    assert out == f"{expected}\n" and err == "" and expected
    found = json.loads(run(folder, "--prompt", "w7 w8", "--temperature", 0, "--max-new-tokens", 6, "--json").out)
    assert found["chat_template"] is True and found["answers"][0] | {"seconds": 0} == {
        **{"prompt": "w7 w8", "answer": expected, "tokens": found["answers"][0]["tokens"], "seconds": 0}
    }
    assert 1 <= found["answers"][0]["tokens"] <= 6


def test_without_a_template_text_is_continued_and_that_is_said(run, llama_folder):
    out, err = run(llama_folder, "--prompt", "w7 w8", "--temperature", 0, "--max-new-tokens", 6)
    assert out == continue_by_stock(llama_folder, "w7 w8", 6) + "\n"
    assert err == "note: no chat template: each prompt is continued as plain text, on its own\n"


def test_lines_of_stdin_are_prompts_of_their_own(run, folder):
    given = [folder, "--max-new-tokens", 5, "--seed", 3]
    both = json.loads(run(*given, "--json", stdin="w9\n\n  w5 w6 \n").out)["answers"]
    assert [entry["prompt"] for entry in both] == ["w9", "w5 w6"]
    alone = json.loads(run(*given, "--json", stdin="w5 w6").out)["answers"]
    assert alone[0]["answer"] == both[1]["answer"]
    out = run(*given, stdin="w9\nw5 w6\n").out
    assert out == "".join(f"> {entry['prompt']}\n{entry['answer']}\n\n" for entry in both)
    assert run(*given, stdin="").out == ""


def test_tokens_are_drawn_by_the_seed(run, folder):
    def draw(*more):
        return run(folder, "--prompt", "w9", "--max-new-tokens", 12, "--temperature", 3, *more).out

    assert draw() == draw("--seed", 0)
    assert len({draw("--seed", seed) for seed in range(4)}) > 1


def test_a_conversation_goes_on_and_ends_with_ctrl_d(run, folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    typed = iter(["w9", "", "w5"])

    def type_next(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(io, "StringIO", lambda text="": Terminal(text))
    out = run(folder, "--temperature", 0, "--max-new-tokens", 4).out
    first = continue_by_stock(folder, "w3 w9 w4", 4)
    second = continue_by_stock(folder, f"w3 w9 w4 {first} w3 w5 w4", 4)
    assert out == f"{first}\n{second}\n\n"


def make_chat(folder, **decoding):
    from mka.model.loading import load_model

    return Chat(*load_model(folder, "float32"), Decoding(temperature=0, **decoding))


def test_old_turns_go_where_the_model_reads_no_more(folder):
    talk = make_chat(folder, new_tokens=10)
    for turn in range(6):
        talk.answer(" ".join(["w9"] * 30), lambda text: None)
        assert len(talk.turns) == 2 * min(turn + 1, 3)
    with pytest.raises(RecipeError, match="the model has 128 positions"):
        talk.answer(" ".join(["w9"] * 200), lambda text: None)


def test_pieces_are_the_answer(folder):
    pieces = []
    text, tokens = make_chat(folder, new_tokens=20).answer("w9 w8", pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1 and tokens <= 20


def test_no_code_of_a_model_is_run_and_nothing_moves_the_cursor(run, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(Chat, "answer", lambda self, said, show: (show("a\x1b[2Jb\x07\n"), ("x", 1))[1])
    assert run(folder, "--prompt", "w9").out == "ab\\x07\n\n"
    assert "--trust-remote-code" in run(folder, "--prompt", "w9", "--trust-remote-code", code=2).err
    monkeypatch.undo()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-new-tokens", "0"], "0 is not in the range x>=1"),
        (["--temperature", "-1"], "-1.0 is not in the range"),
        (["--device", "cuda"], "device cuda: torch"),
        (["--prompt", ""], "the prompt has no tokens"),
    ],
)
def test_refusals_are_one_line(run, llama_folder, given, message):
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is one")
    out, err = run(llama_folder, *given, code=2)
    line = err.splitlines()[-1]
    assert message in line and line.startswith("mka: ") and out == ""
