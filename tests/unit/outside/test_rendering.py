"""Templates and patterns of others end: done, failed, or given up."""

import time

import pytest

import mka.outside.rendering as rendering
from mka.outside.rendering import Patterns, Renderer, RenderError, TooLongError


@pytest.fixture(scope="module")
def renderer():
    renderer = Renderer()
    yield renderer
    renderer.close()


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(rendering, "LIMIT", 1.0)


def test_what_is_harmless_is_made_as_in_this_process(renderer):
    values = {"question": "half\udc80 \u2028é", "choices": ["a", "b"], "answer": 1, "more": {"x": None}}
    assert renderer.render("{{question}} {{choices[answer]}} {{more.x}}\n", values) == "half\udc80 \u2028é b None\n"
    assert renderer.render("{{ 'a-b' | regex_replace('-', '+') }}", {}) == "a+b"
    patterns = Patterns(renderer)
    assert patterns.compile("(a)(b)|c").findall("abc") == [("a", "b"), ("", "")]
    assert patterns.compile("[0-9]+").findall("1 and 22") == ["1", "22"]
    assert patterns.sub(r"(\w)!", r"\1?", "a! b!") == "a? b?"
    assert patterns.escape("a.b") == r"a\.b"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% macro again(n) %}{% for i in range(9**5) %}{{ again(n) }}{% endfor %}{% endmacro %}{{ again(1) }}",
        "{{ text | regex_replace('(a+)+$', '') }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_a_template_without_end_is_given_up_and_the_next_is_made(renderer, short, template):
    start = time.monotonic()
    with pytest.raises((TooLongError, RenderError)) as refused:
        renderer.render(template, {"text": "a" * 40 + "b"})
    assert time.monotonic() - start < 10 and "\n" not in str(refused.value)
    assert renderer.render("{{ a }}", {"a": "next"}) == "next"


def test_a_pattern_that_looks_back_without_end_is_given_up(renderer, short):
    pattern = Patterns(renderer).compile("(a+)+$")
    assert pattern.findall("aaa") == ["aaa"]
    with pytest.raises(TooLongError) as refused:
        pattern.findall("a" * 40 + "b")
    assert refused.value.text == "(a+)+$"
    with pytest.raises(TooLongError):
        Patterns(renderer).sub("(a+)+$", "", "a" * 40 + "b")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' * 10**7 }}", "makes 10000000 characters"),
        ("{{ nothing }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ x.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_what_cannot_be_made_is_told(renderer, template, said):
    with pytest.raises(RenderError, match=said):
        renderer.render(template, {"x": 1})


def test_all_that_one_template_takes_is_bounded_too(renderer, monkeypatch):
    monkeypatch.setattr(rendering, "TOTAL", 0.05)
    slow = "{% for i in range(10**5) %}{{ i }}{% endfor %}"
    with pytest.raises(TooLongError, match=r"more than 0\.05 s of all items"):
        for _ in range(1000):
            renderer.render(slow, {})
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


def test_a_pattern_that_is_none_is_refused_when_it_is_compiled(renderer):
    with pytest.raises(RenderError, match="unterminated"):
        Patterns(renderer).compile("(")


def test_a_chat_template_is_rendered_as_transformers_does(renderer, short):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é?"}]
    options = {"add_generation_prompt": True, "continue_final_message": False, "bos_token": "<s>"}
    made = renderer.render_chat(template, messages, **options)
    assert made == render_jinja_template([messages], chat_template=template, **options)[0][0]
    assert made.startswith("<s><system>") and made.endswith("<assistant>")
    with pytest.raises(TooLongError):
        renderer.render_chat("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", messages)
    with pytest.raises(RenderError, match="TemplateError: no system") as refused:
        renderer.render_chat("{{ raise_exception('no system') }}", messages)
    assert refused.value.kind == "TemplateError"


def test_a_program_that_died_is_started_again(renderer):
    assert renderer.render("{{ a }}", {"a": 1}) == "1"
    renderer._process.kill()
    renderer._process.wait()
    with pytest.raises(RenderError):
        renderer.render("{{ a }}", {"a": 1})
    assert renderer.render("{{ a }}", {"a": 1}) == "1"
