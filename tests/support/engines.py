"""Engines that are a few lines of Python: they answer, die, hang or are killed, through the runner of the real ones."""

import json
from pathlib import Path

from mka.engines import Engine
from mka.engines.reference import END, continue_greedily

_HEAD = """
import json, os, signal, subprocess, sys, time
request = json.load(open(sys.argv[1]))
place = sys.argv[2]

def answer(**given):
    body = {"stage": "run", "error": None, "version": "1.0", "device": "cpu", "load_seconds": 0.5, "kv_bytes": 6400,
            "kv_tokens": 100, "read": None, "continuations": [], "runs": [], **given}
    with open(place, "w") as file:
        json.dump(body, file)
"""
BODIES = {
    "answers": "answer()",
    "dies": "print('assertion failed: heads', file=sys.stderr); sys.exit(3)",
    "is killed": "print('warming up', file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "print('compiling', file=sys.stderr, flush=True); time.sleep(600)",
    "has no kernel": "answer(stage='load', error='ValueError: Failed to find a kernel for WNA16'); sys.exit(1)",
    "fails later": "answer(error='RuntimeError: shapes do not match'); sys.exit(1)",
    "is not installed": "answer(stage='import', error=\"ModuleNotFoundError: No module named 'vllm'\"); sys.exit(1)",
    "says memory": "answer(stage='load', error='OutOfMemoryError: CUDA out of memory'); sys.exit(1)",
    "takes memory": "held = bytearray(b'x' * 400_000_000); time.sleep(600)",
    "babbles": "open(place, 'w').write('[1, 2')",
    "answers nonsense": "answer(continuations=[{'tokens': ['a']}])",
    "leaves children": (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(os.path.join(os.path.dirname(place), 'child'), 'w').write(str(child.pid))\n"
        "answer()"
    ),
    "says why in its log": (
        "print('0.00.1 I loading', file=sys.stderr)\n"
        "print(\"0.00.2 E load: error loading model: unknown model architecture: 'x'\", file=sys.stderr)\n"
        "print('0.00.3 E srv: exiting', file=sys.stderr)\n"
        "answer(stage='load', error='RuntimeError: Failed to init server')"
    ),
}
_SERVES = """
known = json.loads({known!r})
open(request["log"]).close()  # engines are told of files, and run in a folder of their own
with open({journal!r}, "a") as file:
    file.write(json.dumps([request["model"], len(request["prompts"])]) + "\\n")
runs = []
for count in request["concurrency"]:
    for _ in range(request["repeats"]):
        for tokens in (1, request["timed_tokens"]):
            times = [0.5 + 0.25 * token for token in range(tokens)]
            runs.append({{"concurrency": count, "new_tokens": tokens, "arrivals": [times] * count}})
found = known[request["model"]] if request["prompts"] else []
answer(continuations=found, runs=runs, read=request["prompts"] if request["prompts"] else None)
"""


def make_engine(folder: Path, body: str, name: str = "vllm", **options) -> Engine:
    """An engine whose program is a body of `BODIES`, or Python itself."""
    program = folder / "program.py"
    program.write_text(_HEAD + BODIES.get(body, body) + "\n")
    return Engine(name, ("pytest",), "MKA_FAKE_PYTHON", str(program), **options)


def make_serving(folder: Path, models, prompts, *, change=lambda found: found) -> Engine:
    """An engine that says of each model folder what transformers says, changed as asked; it keeps a journal."""
    known = {}
    for model in models:
        references, _ = continue_greedily(model, prompts, new_tokens=32, dtype="float32")
        known[str(model)] = change([tell(reference) for reference in references])
    return make_engine(folder, _SERVES.format(known=json.dumps(known), journal=str(folder / "journal")))


def tell(reference) -> dict:
    ended = reference.tokens[-1] == END
    logprobs = [step[token] for token, step in zip(reference.tokens, reference.steps)]
    tokens = [token for token in reference.tokens if token != END]
    return {"tokens": tokens, "ended": ended, "logprobs": logprobs, "others": [[] for _ in tokens]}


def read_journal(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
