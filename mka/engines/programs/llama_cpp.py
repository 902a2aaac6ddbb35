"""llama.cpp asked about one GGUF file, in xllamacpp's environment: ``python -I llama_cpp.py REQUEST ANSWER``.

Both are JSON files; mka/engines/exchange.py says what stands in them. The engine's own server is asked, on this
machine's own address: it reports every token with its log-probability, and takes requests side by side.
"""

import http.client
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# In the log, a line per kind of layer: "llama_kv_cache: size =   90.00 MiB (  1024 cells,  30 layers,  4/4 seqs), ...".
CACHE = re.compile(r"llama_kv_cache\S*: size = +([0-9.]+) MiB \( *(\d+) cells, +\d+ layers, +(\d+)/")
# Kept to the end of the process: a server's destructor waits for what it is doing, for ever if a request failed.
SERVERS: list[Any] = []
DTYPES = {"float32": "GGML_TYPE_F32", "bfloat16": "GGML_TYPE_BF16", "float16": "GGML_TYPE_F16"}


def ask(request: Json, answer: Json) -> None:
    """Load the model, continue the prompts, time the others."""
    import xllamacpp

    answer["version"] = importlib.metadata.version("xllamacpp")
    answer["stage"] = "load"
    started = time.perf_counter()
    server = load(xllamacpp, request)
    host = server.listening_address.partition("//")[2]
    answer["load_seconds"] = time.perf_counter() - started
    log = Path(request["log"]).read_text(encoding="utf-8", errors="replace")
    caches = CACHE.findall(log)
    answer["kv_bytes"] = round(sum(float(size) for size, _, _ in caches) * 2**20) or None
    answer["kv_tokens"] = max((int(cells) * int(sequences) for _, cells, sequences in caches), default=None)
    devices = [device.get("name", "") for device in xllamacpp.get_device_info()]
    answer["device"] = ", ".join(name for name in devices if name) or "cpu"
    answer["stage"] = "run"
    if request["texts"]:
        answer["read"] = [
            post(host, "/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
            for text in request["texts"]
        ]
    greedy = {"samplers": ["top_k"], "top_k": 1, "return_tokens": True, "cache_prompt": False}
    for prompt in request["prompts"]:
        body = {"prompt": prompt, "n_predict": request["new_tokens"], "n_probs": request["alternatives"]}
        answer["continuations"].append(tell(post(host, "/completion", {**greedy, **body}), request["ends"]))
    if not request["concurrency"]:
        return
    for repeat in range(request["repeats"] + 1):
        for count in request["concurrency"]:
            for tokens in (1, request["timed_tokens"]):
                wanted = min(tokens, 4) if repeat == 0 else tokens
                body = {**greedy, "n_predict": wanted, "ignore_eos": True, "stream": True}
                arrivals = time_streams(host, request["timed_prompts"][:count], body)
                if repeat:
                    answer["runs"].append({"concurrency": count, "new_tokens": wanted, "arrivals": arrivals})


def load(xllamacpp: Any, request: Json) -> Any:
    """Start the engine's server with the model."""
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_parallel = request["sequences"]
    params.n_ctx = request["context"] * request["sequences"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    cache = getattr(xllamacpp.ggml_type, DTYPES[request["dtype"]])
    params.cache_type_k = params.cache_type_v = cache
    params.cache_prompt = params.fit_params = False
    params.cache_ram_mib = 0
    params.verbosity = 4  # says how large the cache is
    SERVERS.append(xllamacpp.Server(params))
    return SERVERS[-1]


def post(host: str, path: str, body: Json) -> Json:
    """Ask the server, and return what it answers."""
    connection = http.client.HTTPConnection(host)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found: Json = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(found.get("error", {}).get("message") or f"{path}: status {response.status}")
    return found


def tell(found: Json, ends: list[int]) -> Json:
    """Return a continuation for the answer."""
    tokens, steps = list(found["tokens"]), found.get("completion_probabilities", [])
    logprobs = [finite(step["logprob"]) for step in steps]
    others = [
        [[other["id"], other["logprob"]] for other in step["top_logprobs"] if finite(other["logprob"]) is not None]
        for step in steps
    ]
    ended = found["stop_type"] == "eos"
    if ended and tokens and tokens[-1] in ends:
        tokens = tokens[:-1]
    return {"tokens": tokens, "ended": ended, "logprobs": logprobs, "others": others}


def finite(value: Any) -> float | None:
    """Return a number, or None if it is none."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def time_streams(host: str, prompts: list[list[int]], body: Json) -> list[list[float]]:
    """Hand all prompts over at once; return when each of their tokens was there."""
    arrivals: list[list[float]] = [[] for _ in prompts]
    failures: list[Exception] = []
    started = time.perf_counter()

    def follow(place: int) -> None:
        try:
            connection = http.client.HTTPConnection(host)
            text = json.dumps({**body, "prompt": prompts[place]})
            connection.request("POST", "/completion", text, {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if not line.startswith(b"data: "):
                    continue
                # Tokens that end within a letter are held back, but counted.
                now, count = time.perf_counter() - started, json.loads(line[6:])["tokens_predicted"]
                arrivals[place].extend([now] * (count - len(arrivals[place])))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=follow, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return arrivals


def main(asked: str, place: str) -> None:
    """Answer one request; what goes wrong is part of the answer."""
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    answer: Json = {"stage": "import", "error": None, "continuations": [], "runs": []}
    try:
        ask(request, answer)
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    aside = Path(f"{place}.partial")
    aside.write_text(json.dumps(answer), encoding="utf-8")
    aside.replace(place)
    # Engines' own threads and destructors can hang or crash after the work is done.
    sys.stderr.flush()
    os._exit(0 if answer["error"] is None else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
