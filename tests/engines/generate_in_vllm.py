"""Load a folder in vLLM and generate from token ids; runs in the engine's own environment, which has nothing of ours.

    generate_in_vllm.py FOLDER DTYPE '[1, 2, 3]' TOKENS

Beside the engine's own output it prints a line of MADE and JSON: the tokens, and of the first one the log-probabilities
that the engine gave.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, dtype, prompt, tokens = sys.argv[1:]
    options = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4, "skip_tokenizer_init": True}
    engine = LLM(model=folder, dtype=dtype, **options)
    sampling = SamplingParams(max_tokens=int(tokens), temperature=0, logprobs=10, detokenize=False)
    made = engine.generate([{"prompt_token_ids": json.loads(prompt)}], sampling)[0].outputs[0]
    first = {token: entry.logprob for token, entry in made.logprobs[0].items()}
    print("MADE", json.dumps({"tokens": list(made.token_ids), "first": first}), flush=True)


# The engine starts processes that import this file.
if __name__ == "__main__":
    main()
