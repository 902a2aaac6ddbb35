"""Load a folder with whatever transformers is there, and print its logits; other environments have nothing of ours.

    read_logits.py FOLDER '[[1, 2, 3]]' TEXT

Beside what libraries print it prints a line of READ and JSON: the version, the logits in float32, the text's token ids.
"""

import json
import sys


def main() -> None:
    import torch
    import transformers

    folder, ids, text = sys.argv[1:]
    options = {"torch_dtype" if transformers.__version__.startswith("4.") else "dtype": torch.float32}
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(json.loads(ids)), use_cache=False).logits.float()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    keys = [*told["missing_keys"], *told["unexpected_keys"]]
    found = {"version": transformers.__version__, "logits": logits.tolist(), "tokens": tokens, "keys": keys}
    print("READ", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
