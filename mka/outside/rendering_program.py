"""Renders templates and matches patterns, one line of JSON in, one out; bounded from outside by whoever asked.

A program of its own that imports nothing of the project: it starts in a tenth of a second and may be ended at any time.
"""

import contextlib
import json
import re
import sys
import time
from functools import lru_cache
from typing import Any

# Bytes of memory it may have; a text it makes, which becomes a prompt, has fewer characters than this.
MEMORY, LONGEST = 1 << 30, 4_000_000


def bound_memory() -> None:
    """Have the system refuse more memory, where there is a system that does."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


@lru_cache(maxsize=1)
def make_environment() -> Any:
    """Return lm-eval's environment of templates, closed: they see what they are given and call nothing of Python."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    closed = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    closed.filters["regex_replace"] = lambda string, pattern, repl, count=0: re.sub(pattern, repl, string, count=count)
    return closed


@lru_cache(maxsize=512)
def compile_template(text: str) -> Any:
    """Compile a template once."""
    return make_environment().from_string(text)


def render_chat(text: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Render a chat template as transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=text, **options)
    return str(rendered[0])


def answer(request: dict[str, Any]) -> Any:
    """Do what is asked for."""
    text, what = request["text"], request["do"]
    if what == "render":
        return compile_template(text).render(**request["values"])
    if what == "chat":
        return render_chat(text, request["messages"], request["options"])
    if what == "find":
        return re.findall(text, request["given"])
    return re.sub(text, request["by"], request["given"])


def main() -> None:
    """Answer until nobody asks."""
    bound_memory()
    make_environment()
    out = sys.stdout
    sys.stdout = sys.stderr
    if "chats" in sys.argv:
        import transformers.utils.chat_template_utils  # noqa: F401  (before anything is timed)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        try:
            made = answer(json.loads(line))
            if len(made) > LONGEST:
                raise ValueError(f"makes {len(made)} characters of one item, at most {LONGEST} are taken")
            said = json.dumps({"made": made, "seconds": time.process_time() - start})
        # Whatever a template raises is told to whoever asked.
        except Exception as error:
            said = json.dumps({"error": [type(error).__name__, str(error)[:2000]]})
        print(said, file=out, flush=True)


if __name__ == "__main__":
    main()
