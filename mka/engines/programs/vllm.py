"""vLLM asked about one model, in vLLM's own environment: ``python -I vllm.py REQUEST ANSWER``.

Both are JSON files; mka/engines/exchange.py says what stands in them. ``-I`` keeps this folder off the path: the file
has the engine's own name.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# Everything in one process: one memory to watch, one to end. Threads are as many as the request says, bound to no core.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def ask(request: Json, answer: Json) -> None:
    """Load the model, continue the prompts, time the others."""
    import vllm
    from vllm.platforms import current_platform

    answer["version"] = vllm.__version__
    on_cpu = current_platform.is_cpu()
    answer["device"] = "cpu" if on_cpu else current_platform.get_device_name()
    answer["stage"] = "load"
    started = time.perf_counter()
    model = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=request["sequences"],
        kv_cache_memory_bytes=request["kv_bytes"],
        enable_prefix_caching=False,
        # Compilation takes minutes on processors, and Triton has no kernels for them.
        enforce_eager=on_cpu,
        distributed_executor_backend="uni",
        seed=0,
    )
    answer["load_seconds"] = time.perf_counter() - started
    engine = model.llm_engine
    answer["kv_bytes"], answer["kv_tokens"] = measure_cache(engine)
    answer["stage"] = "run"
    if request["texts"]:
        answer["read"] = [model.get_tokenizer()(text)["input_ids"] for text in request["texts"]]
    greedy = vllm.SamplingParams(
        temperature=0,
        max_tokens=request["new_tokens"] or 1,
        logprobs=request["alternatives"],
        ignore_eos=True,
        stop_token_ids=request["ends"],
        detokenize=False,
    )
    for prompt in request["prompts"]:
        [(output, _)] = generate(engine, [prompt], greedy)
        answer["continuations"].append(tell(output, request["ends"]))
    if not request["concurrency"]:
        return

    def time_run(count: int, tokens: int) -> Json:
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        found = generate(engine, request["timed_prompts"][:count], params)
        return {"concurrency": count, "new_tokens": tokens, "arrivals": [arrivals for _, arrivals in found]}

    for repeat in range(request["repeats"] + 1):
        for count in request["concurrency"]:
            for tokens in (1, request["timed_tokens"]):
                run = time_run(count, min(tokens, 4) if repeat == 0 else tokens)
                if repeat:
                    answer["runs"].append(run)


def generate(engine: Any, prompts: list[list[int]], params: Any) -> list[tuple[Any, list[float]]]:
    """Hand all prompts over at once; return each one's last output and when each of its tokens was there."""
    import vllm

    started = time.perf_counter()
    names = [f"{started}-{place}" for place in range(len(prompts))]
    for name, prompt in zip(names, prompts):
        engine.add_request(name, vllm.TokensPrompt(prompt_token_ids=prompt), params)
    outputs: Json = {}
    arrivals: dict[str, list[float]] = {name: [] for name in names}
    while engine.has_unfinished_requests():
        found = engine.step()
        now = time.perf_counter() - started
        for output in found:
            outputs[output.request_id] = output.outputs[0]
            times = arrivals[output.request_id]
            times.extend([now] * (len(output.outputs[0].token_ids) - len(times)))
    return [(outputs[name], arrivals[name]) for name in names]


def tell(output: Any, ends: list[int]) -> Json:
    """Return a continuation for the answer."""
    tokens = list(output.token_ids)
    logprobs, others = [], []
    for token, found in zip(tokens, output.logprobs):
        value = found[token].logprob
        logprobs.append(value if math.isfinite(value) else None)
        pairs = [[other, entry.logprob] for other, entry in found.items() if math.isfinite(entry.logprob)]
        others.append(pairs)
    ended = bool(tokens) and tokens[-1] in ends
    return {"tokens": tokens[:-1] if ended else tokens, "ended": ended, "logprobs": logprobs, "others": others}


def measure_cache(engine: Any) -> tuple[int, int]:
    """Return the bytes set aside for keys and values, and the tokens that they hold."""
    settings = engine.vllm_config.cache_config
    try:
        core = engine.engine_core.engine_core
        held = sum(tensor.size for tensor in core.scheduler.kv_cache_config.kv_cache_tensors)
    except AttributeError:  # where another version has it elsewhere
        held = settings.kv_cache_memory_bytes
    return held, settings.num_gpu_blocks * settings.block_size


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
