"""Whether two checkouts do the same, bit for bit: what a move of files has to leave as it was.

    python benchmarks/unchanged.py record BEFORE.json --tree DIR [--only tiny tables smollm2 demo]
    python benchmarks/unchanged.py compare BEFORE.json AFTER.json [--only tiny ...]

`record` runs DIR (default: this checkout) with this interpreter and adds each part to the file as it is done; one at a
time. `compare` prints a line per difference and exits with 1 if there is one. Both records must come from one machine:
other processors, thread counts or versions of the libraries round differently.

tiny     Tiny random models of every family, 8 layers: every method, plain and aligned, to 5 layers; on two families
         also quantization, each stage as a command of its own, evaluation and report; help and refusals.
tables   Files of data/prepared and data/raw, and what dvc.lock says of them. Needs `make data` in DIR.
smollm2  The demo's base model, compressed by the recipes of mka, shortgpt and aligned, to int8, unmeasured; the last
         tries groups of three layers at most, on fewer tokens (FASTER), which spares most of its time.
demo     `python -m flows.recompress recipes/smollm2_135m.yaml` in a work folder of its own; DIR must be a Git checkout.

Recorded are digests of files, figures of JSON documents, exit codes and refusals; left out are times, speeds, dates and
ids of runs (VARYING, SCRUBBED). Commands go through the entry point in DIR's pyproject.toml, so modules may move.
`mka-unchanged` in the temporary folder is wiped and used, the same for every tree, because paths end up in results.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.gettempdir()).resolve() / "mka-unchanged"
VARYING = re.compile(r"seconds|speed|started|created|run_id|^run$|^rev$|^commit$|per_second|against_control")
SCRUBBED = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:+.]+|\b[\d.,]+ s\b|\b[\d.]+ times the base|(prefill|decode) speed.*|Against the .*"
    r"|\b[0-9a-f]{40}\b(\+changes)?|\breport-[0-9a-f]{16}"
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Layers of two kinds in families that have them; those of gemma2 alternate by themselves.
SPECIAL: dict[str, dict[str, Any]] = {"gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8}}
SPECIAL["gemma3_text"] = SPECIAL["gemma2"] | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3}
SPECIAL["smollm3"] = {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 1]}
# Settings under which a method takes another road; a method not named here has one.
ROADS = {
    "aligned": ("", "operator=keep selection=divergence", "operator=average", "selection=similarity"),
    "mka": ("", "weights=fixed weight=0.5", "weights=line-search grid=[0,0.5,1]", "selection=iterative"),
}
SMALL = {"aligned": " tokens=256 heldout_tokens=64 context=16"}
RECIPE = f"""
name: tiny
calibration: {{path: {SCRATCH}/texts.jsonl, samples: 60, max_tokens: 16, search_tokens: 256}}
target: {{layers: 5, protect_first: 1, protect_last: 1}}
alignment: {{path: {SCRATCH}/table.jsonl, tokens: 1024, context: 32}}
quantize: {{group_size: 16}}
evaluation: {{text: {SCRATCH}/heldout.jsonl, overlap_index: null, text_tokens: 256, context: 32, new_tokens: 4}}
"""
FASTER = "--align-tokens 4096 --set tokens=512 --set heldout_tokens=256 --set context=256 --set largest=3"
COMMANDS = ("compress", "methods", "observe", "score", "plan", "merge", "evaluate", "report", "bench", "clean")
# Command lines on a base in @/base; @ is the folder that is wiped, and each reads what others wrote.
STAGES = """
observe @/base --calibration @/texts.jsonl --samples 60 --pooling mean --output @/out/mean.safetensors
observe @/base --calibration @/texts.jsonl --samples 60 --output @/out/last.safetensors
score @/base --states @/out/last.safetensors --output @/out/score-mka.json
score @/base --states @/out/last.safetensors --method shortgpt --output @/out/score-shortgpt.json
score @/base --states @/out/last.safetensors --method replaceme --output @/out/score-folds.json
plan @/base --scores @/out/score-mka.json --layers 6 --output @/out/plan-mka.json
plan @/base --scores @/out/score-folds.json --layers 6 --calibration @/texts.jsonl --samples 60 --output @/out/plan.json
plan @/base --method sleb --layers 6 --calibration @/texts.jsonl --samples 60 --output @/out/plan-sleb.json
merge @/base --plan @/out/plan-mka.json --output @/out/merged
merge @/base --plan @/out/plan.json --quantize int8 --group-size 16 --output @/out/folded
merge @/base --plan @/out/plan-mka.json --align --align-tokens 2048 --alignment-table @/table.jsonl --output @/out/refit
evaluate @/base --text @/heldout.jsonl --context 32 --tokens 256 --output @/out/before.json
evaluate @/out/merged --text @/heldout.jsonl --context 32 --tokens 256 --output @/out/after.json
report --plan @/out/plan-mka.json --base @/out/before.json --candidate @/out/after.json --output @/out/page
"""


def digest(data: bytes) -> str:
    """Return the SHA-256."""
    return hashlib.sha256(data).hexdigest()


def neutral(text: str) -> str:
    """Name no path of this machine, and no time."""
    return SCRUBBED.sub("-", text.replace(str(SCRATCH), "SCRATCH").replace(str(Path.cwd()), "TREE"))


def list_figures(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a JSON document says under dotted names, but for what varies; of a long list its digest."""
    if isinstance(value, list):
        found = [figure for index, item in enumerate(value) for figure in list_figures(f"{name}.{index}", item)]
        yield from found if len(value) <= 16 else [(name, digest(json.dumps(found).encode()))]
    elif not isinstance(value, dict):
        yield name, neutral(value) if isinstance(value, str) else value
    elif not str(value.get("quantity")).endswith("speed"):
        for key in (key for key in value if not VARYING.search(key)):
            yield from list_figures(f"{name}.{key}", value[key])


def read_files(name: str, files: Iterable[Path], root: Path) -> Iterator[tuple[str, Any]]:
    """Digest files; of JSON documents other than plans, scores and a model's own yield the figures."""
    for file in sorted(file for file in files if file.is_file()):
        place, data = f"{name}/{file.relative_to(root)}", file.read_bytes()
        if file.suffix == ".json" and not file.name.startswith(("plan", "score", "config", "tokenizer")):
            yield from list_figures(place, json.loads(data))
        else:
            yield place, digest(neutral(data.decode()).encode() if file.suffix in (".md", ".html") else data)


def make_caller(tree: Path, found: dict[str, Any]) -> Callable[..., None]:
    """Return a function that runs `mka` in this process, as its script would, and records what came of it."""
    target = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["mka"]
    module = import_module(target.partition(":")[0])
    if not Path(str(module.__file__)).is_relative_to(tree):
        sys.exit(f"{target} came from {module.__file__}, not from {tree}")

    def call(name: str, line: str, keep: bool = False) -> None:
        """Run one command line and digest what it wrote to @/out, where it stays only if asked for."""
        started, before = time.perf_counter(), set((SCRATCH / "out").rglob("*"))
        sys.argv = ["mka", *(word.replace("@", str(SCRATCH), 1) if word[0] == "@" else word for word in line.split())]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = getattr(module, target.partition(":")[2])() or 0
            except (SystemExit, Exception) as error:
                code = (error.code or 0) if isinstance(error, SystemExit) else repr(error)
        said, refusal = out.getvalue(), err.getvalue().strip().rpartition("\n")[2] if code else ""
        found[f"{name}/exit"] = neutral(f"{code} {refusal}".strip())
        document = json.loads(said) if "--json" in line and said else digest(neutral(said).encode())
        found.update(list_figures(f"{name}/said", document))
        found.update(read_files(name, set((SCRATCH / "out").rglob("*")) - before, SCRATCH / "out"))
        if not keep:
            shutil.rmtree(SCRATCH / "out", ignore_errors=True)
        print(f"{name:<80} {time.perf_counter() - started:6.1f} s", file=sys.stderr, flush=True)

    return call


def write_texts(place: Path, sources: list[str]) -> None:
    """Write sentences of random words, 60 of each source; others in every file."""
    draw = random.Random(place.name)
    with place.open("w", encoding="utf-8") as file:
        for source in (s for s in sources for _ in range(60)):
            words = ("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 7))) for _ in range(12))
            print(json.dumps({"source": source, "text": " ".join(words)}), file=file)


def make_model(family: str, folder: Path) -> None:
    """Save a random model whose gains and biases are random too: ones and zeros would hide mistakes."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **SPECIAL.get(family, {}))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "layers" in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    # Of single bytes, which every family loads as it was saved.
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())])}
    Qwen2Tokenizer(vocab, [], "<pad>", "<s>", "</s>", "<pad>").save_pretrained(folder)


def record_tiny(tree: Path, found: dict[str, Any]) -> None:
    """Every method on every family; every command on two."""
    found.update((f"version/{name}", metadata.version(name)) for name in ("torch", "transformers", "numpy", "scipy"))
    call = make_caller(tree, found)
    for line in [f"{name} --help" for name in COMMANDS] + ["comprss", "observe @/nowhere --output @/out"]:
        call(line, line)
    call("methods", "methods --json")
    methods = [found[name] for name in found if re.fullmatch(r"methods/said\.methods\.\d+\.name", name)]
    for name, *sources in (("texts", "words"), ("heldout", "words", "others"), ("table", "one", "three", "two")):
        write_texts(SCRATCH / f"{name}.jsonl", sources)
    (SCRATCH / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    cases = {scheme: f"--quantize {scheme}" for scheme in ("int8", "int4")}
    for method in methods:
        for road in ROADS.get(method, ("",)):
            settings = (f" --set {setting}" for setting in (road + SMALL.get(method, "")).split())
            cases[f"{method} {road}".strip()] = f"--method {method}{''.join(settings)}"
    compress = "compress @/base --recipe @/recipe.yaml --output @/out/made --json"
    for family in FAMILIES:
        make_model(family, SCRATCH / "base")
        found.update(read_files(f"{family}/base", (SCRATCH / "base").iterdir(), SCRATCH / "base"))
        for name, options in cases.items():
            call(f"{family}/{name}", f"{compress} {options} --no-evaluate")
            call(f"{family}/{name} --align", f"{compress} {options} --no-evaluate --align")
        if family in ("llama", "gemma3_text"):
            call(f"{family}/dry", f"{compress} --align --dry-run")
            call(f"{family}/measured", f"{compress} --quantize int8")
            for number, line in enumerate(STAGES.strip().splitlines(), 1):
                call(f"{family}/stage {number} {line.split()[0]}", f"{line} --json", keep="report" not in line)


def record_tables(tree: Path, found: dict[str, Any]) -> None:
    """What DVC made, as it lies there, and as the lock says."""
    import yaml

    for file in filter(Path.is_file, (*(tree / "data/prepared").rglob("*"), *(tree / "data/raw").rglob("*"))):
        found[str(file.relative_to(tree))] = digest(file.read_bytes())
    for stage in yaml.safe_load((tree / "dvc.lock").read_text(encoding="utf-8"))["stages"].values():
        found.update((f"dvc.lock/{out['path']}", out["md5"]) for out in stage["outs"])


def record_smollm2(tree: Path, found: dict[str, Any]) -> None:
    """The real base model by three recipes."""
    call = make_caller(tree, found)
    for recipe, less in (("", ""), ("_shortgpt", ""), ("_aligned", FASTER)):
        line = f"compress --recipe recipes/smollm2_135m{recipe}.yaml {less} --no-evaluate --output @/out/made --json"
        call(f"smollm2_135m{recipe}", line)


def record_demo(tree: Path, found: dict[str, Any]) -> None:
    """The flow: figures of its last run, and every stage's result under its key."""
    command = [sys.executable, "-m", "flows.recompress", "recipes/smollm2_135m.yaml"]
    found["exit"], work = subprocess.run(command, cwd=tree).returncode, SCRATCH / "work"
    found.update(list_figures("last_run", json.loads((work / "last_run.json").read_bytes())))
    for folder in (work / "stages").glob("[!.]*"):
        # Times in evaluations reach the keys of the last two stages, and the digests in every list of files.
        name = re.sub(r"^(gate|report)-.*", r"\1", folder.name)
        left = ("files",) if name == folder.name else ("files", "key", "inputs")
        kept = {key: fact for key, fact in json.loads((folder / "stage.json").read_bytes()).items() if key not in left}
        found.update(list_figures(f"{name}/stage", kept))
        found.update(read_files(name, set(folder.rglob("*")) - {folder / "stage.json"}, folder))


PARTS = {"tiny": record_tiny, "tables": record_tables, "smollm2": record_smollm2, "demo": record_demo}


def record(output: Path, tree: Path, parts: list[str]) -> None:
    """Run the parts, each in a process that sees DIR's modules only; each is in the file as soon as it is done."""
    # A run of somebody else on this machine is not to be waited for, nor its servers to be used.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MLFLOW", "MKA"))}
    kept |= {"DO_NOT_TRACK": "true", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MKA_SLOTS": "8"}
    kept |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    kept |= {"PYTHONPATH": str(tree), "MKA_WORK": str(SCRATCH / "work"), "PREFECT_HOME": str(SCRATCH / "prefect")}
    for part in parts:
        started, made = time.perf_counter(), SCRATCH / "record.json"
        shutil.rmtree(SCRATCH, ignore_errors=True)
        SCRATCH.mkdir()
        if part in ("smollm2", "demo"):
            shutil.copytree(tree / "data/work/models", SCRATCH / "work/models")
        command = [sys.executable, "-P", __file__, "work", str(made), "--tree", str(tree), "--only", part]
        subprocess.run(command, cwd=tree, env={"OMP_NUM_THREADS": "2"} | kept, check=True)
        known = json.loads(output.read_bytes()) if output.exists() else {}
        found = {f"{part}/{name}": value for name, value in json.loads(made.read_bytes()).items()}
        others = {name: value for name, value in known.items() if not name.startswith(f"{part}/")}
        output.write_text(json.dumps(others | found, indent=1) + "\n", encoding="utf-8")
        print(f"{part}: {len(found)} recorded in {time.perf_counter() - started:.0f} s", flush=True)
    shutil.rmtree(SCRATCH)


def compare(old: dict[str, Any], new: dict[str, Any], parts: tuple[str, ...]) -> int:
    """Print a line per difference; return 1 if there is one."""
    names = sorted(name for name in old.keys() | new.keys() if name.startswith(parts))
    differing = [name for name in names if old.get(name, "missing") != new.get(name, "missing")]
    for name in differing:
        print(f"{name}: {str(old.get(name, 'missing'))[:80]} -> {str(new.get(name, 'missing'))[:80]}")
    print(f"{len(names)} compared, {len(differing)} differ")
    return 1 if differing or not names else 0


def main() -> int:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description="Whether two checkouts do the same, bit for bit.")
    parser.add_argument("what", choices=("record", "compare", "work"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="checkout that is run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    if given.what == "compare":
        old, new = (json.loads(file.read_bytes()) for file in given.files)
        return compare(old, new, tuple(f"{part}/" for part in given.only))
    if given.what == "work":
        found: dict[str, Any] = {}
        PARTS[given.only[0]](given.tree, found)
        given.files[0].write_text(json.dumps(found), encoding="utf-8")
    else:
        record(given.files[0].resolve(), given.tree.resolve(), given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
