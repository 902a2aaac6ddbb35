"""What is shown of text from outside: no password, no control sequence."""

import pytest

from mka.errors import RecipeError, RegistryError
from mka.outside.printable import escape_controls, hide_passwords, make_page, make_printable


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://mka:hunter2@host:5000/x", "http://mka:***@host:5000/x"),
        ("http://mka:12345@host", "http://mka:***@host"),
        ("https://hunter2@host/x", "https://***@host/x"),
        ("postgresql+psycopg://mka:hun/ter:2@db:5432/mlflow", "postgresql+psycopg://mka:***@db:5432/mlflow"),
        ("postgresql://db/mlflow?user=mka&password=hunter2&x=1", "postgresql://db/mlflow?user=mka&password=***&x=1"),
        ("s3://bucket/key?X-Amz-Signature=hunter2", "s3://bucket/key?X-Amz-Signature=***"),
        ("registry 'http://a:hunter2@b' and http://c:hunter2@d;", "registry 'http://a:***@b' and http://c:***@d;"),
    ],
)
def test_passwords_of_addresses_are_hidden(address, shown):
    assert hide_passwords(address) == shown
    refused = RegistryError(f"registry {address} cannot be used")
    assert "hunter2" not in f"{refused} {refused!r}"


def test_tokens_of_hubs_are_hidden():
    token = "hf_" + "hunter2HUNTER2hunter2HUNTER2hunter"
    assert hide_passwords(f"401: Bearer {token}, again") == "401: Bearer hf_***, again"
    assert "hunter2" not in str(RegistryError(f"refused {token}"))


@pytest.mark.parametrize(
    "text",
    [
        "hf_causal_lm_model_with_a_long_name and hf_hub",
        "sqlite:////home/a/mlflow.db",
        "http://127.0.0.1:5000",
        "http://host:4200/api/runs@12",
        "MLFLOW_TRACKING_URI=http://host:5000 python -c \"mlflow.load_model('models:/tiny@champion')\"",
        "mail a@b.c; ratio 3:4",
    ],
)
def test_what_holds_no_password_stays(text):
    assert make_printable(text) == text


def test_terminal_sequences_go_and_control_characters_are_spelled_out():
    text = "a\x1b[31mred\x1b[0m\x1b]0;title\x07b\rc\x07d\u202ee\u2066f\x9b1mg\nh\u2028i\ttab"
    assert escape_controls(text) == r"aredb\rc\x07d\u202ee\u2066f\x9b1mg\nh\u2028i\ttab"
    assert make_page("one\ntwo\tthree\x1b[2J\r") == "one\ntwo\tthree\\r"


@pytest.mark.parametrize("text", ["Übergröße – 日本語 ± 😀", "שלום", "مرحبا", "नमस्ते"])
def test_letters_of_any_script_stay(text):
    assert escape_controls(text) == text


def test_a_refusal_is_one_line_whatever_stands_in_it():
    assert str(RecipeError("source 'a\nb\x1b[31m\u202e' is refused")) == r"source 'a b\u202e' is refused"
