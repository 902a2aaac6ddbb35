"""Commands by the thousand: exit codes 0 to 3, one line on stderr where it is not 0, and nothing written."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bench import make_bench_folder, write_bench_recipe
from support.mutations import NUMBERS, TEXTS

from mka.cli.main import main

EXAMPLES = int(os.environ.get("MKA_FUZZ_EXAMPLES", "100"))
# What might do something is asked with --dry-run, or of a model that is not there.
COMMANDS = {
    "compress": "compress base --method mka --layers 4 --calibration calibration.jsonl --samples 60 "
    "--text heldout.jsonl --context 32 --quantize int8 --group-size 16 --set coordinates=2 --output out",
    "compress by recipe": "compress --recipe recipe.yaml --layer-ratio 0.3 --tasks piqa=40 --seed 1 --output out",
    "write": "write base --tokens 1000 --seed 1 --dtype float32 --output out",
    "bench": "bench tiny.yaml --only sleb",
    "clean": "clean --work work --older-than 30d --models",
    "observe": "observe gone --calibration calibration.jsonl --samples 60 --max-tokens 16 --pooling last --output out",
    "score": "score gone --states states.safetensors --method mka --set coordinates=2 --output out",
    "plan": "plan gone --scores scores.json --layers 4 --protect-first 1 --set weights=fixed --output out",
    "merge": "merge gone --plan plan.json --align --align-tokens 512 --quantize int8 --group-size 16 --output out",
    "heal": "heal gone --base base --plan plan.json --mode local --tokens 512 --rate 0.01 --output out",
    "evaluate": "evaluate gone --text heldout.jsonl --tasks hellaswag=4 --tasks-folder . --generation 2 --output out",
    "report": "report --plan plan.json --base base.json --candidate base.json --recipe recipe.yaml --output out",
    "export": "export gone --format folder --output out",
    "serve-check": "serve-check gone --engine vllm --python gone --base base --concurrency 1,2 --rounds 1 --limit 9 "
    "--output out",
    "sign": "sign gone --key base.json --signature out",
    "verify": "verify gone --key base.json --signature out",
    "publish": "publish base --to me/tiny --revision first --tag v1 --base org/base --relation merge --license mit",
    "methods": "methods --json",
    "inspect": "inspect base --dtype float32 --device cpu --json",
    "init": "init base --dtype float32 --output new.yaml",
    "recipe": "recipe --show recipe.yaml --set target.layers=5 --set quantize.scheme=int8",
    "compare": "compare base base --report base.json --seed 1",
    "chat": "chat gone --prompt hello --max-new-tokens 4 --temperature 0.5 --seed 1 --dtype float32 --device cpu",
    "completion": "completion zsh",
}
DRY = ("compress", "write", "bench", "clean", "publish", "init")
# What asks for nothing that is not there, and writes nothing.
SOUND = ("methods", "inspect", "recipe", "completion")
VALUES = [*TEXTS, *map(str, NUMBERS[:7]), "9" * 5000, "0.5", "nan", "inf", "-inf", "1e400", "hellaswag", "mka", "base"]
VALUES += [
    "a=" + "[" * 3000,
    "a=&a [*a]",
    "grid=[0, 1, .nan]",
    "x=!!python/name:os.system",
    "piqa=٣",
    "piqa=-1",
    "package:a",
]
VALUES += [
    "package:a==",
    "org/name@",
    "@",
    "--",
    "-",
    "-h",
    "--json",
    "--nope",
    "--output",
    "--layers=5",
    "hub",
    "null",
]


def mutate_arguments(command, random):
    arguments = COMMANDS[command].split()
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(1, len(arguments)) if len(arguments) > 1 else 0
        kind = random.choice(("replace", "replace", "drop", "double", "insert", "swap", "glue"))
        if kind == "replace":
            arguments[at] = random.choice(VALUES)
        elif kind == "drop":
            del arguments[at]
        elif kind == "double":
            arguments[at:at] = arguments[at : at + 2]
        elif kind == "insert":
            arguments.insert(at, random.choice(VALUES))
        elif kind == "glue":
            arguments[at] += random.choice(VALUES)
        else:
            other = random.randrange(len(arguments))
            arguments[at], arguments[other] = arguments[other], arguments[at]
        arguments = arguments or [command.split()[0]]
    # Behind "--" it would be an argument.
    dry = command.split()[0] in DRY
    return [a for a in arguments if a != "--"] + ["--dry-run"] * 2 if dry else arguments


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the commands name, but for what they would be refused without."""
    folder = make_bench_folder(tmp_path_factory.mktemp("commands"))
    write_bench_recipe(folder)
    (folder / "work" / "stages").mkdir(parents=True)
    recipe = {"name": "tiny", "model": {"folder": "base"}, "target": {"layers": 4}, "method": {"name": "sleb"}}
    recipe["calibration"] = {"path": "calibration.jsonl", "rev": None, "samples": 60}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("plan.json", "scores.json", "base.json", "states.safetensors"):
        (folder / name).write_text("{}")
    return folder


def look(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((".", "traceback-"))
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, place, monkeypatch, capsys, record_property):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MKA_WORK", str(place / "work"))
    before, codes = look(place), []

    @settings(
        max_examples=EXAMPLES // 2,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(random=st.randoms(use_true_random=False))
    def attempt(random):
        arguments = mutate_arguments(command, random)
        capsys.readouterr()
        try:
            code = main(arguments)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}; given {arguments!r:.1500}") from error
        codes.append(code)
        err = capsys.readouterr().err
        told = f"{code}: {err!r:.1500}; given {arguments!r:.1500}"
        assert code in (0, 1, 2, 3), told
        assert "unforeseen" not in err, told
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        if code:
            assert len(lines) == 1 and lines[0].startswith("mka: ") and lines[0].isprintable(), told
            assert len(lines[0]) < 500, told
        assert look(place) == before, told

    attempt()
    record_property("inputs", (len(codes), sum(code != 0 for code in codes)))
    assert any(codes)


def test_the_commands_are_sound_before_they_are_changed(place, monkeypatch, capsys):
    """What is refused of these is what is missing by intention."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MKA_WORK", str(place / "work"))
    for command in COMMANDS:
        dry = command.split()[0] in DRY
        code = main([*COMMANDS[command].split(), *(["--dry-run"] if dry else [])])
        out, err = capsys.readouterr()
        sound = command in SOUND or (dry and command != "compress by recipe")
        assert (code == 0) == sound, (command, err)
        assert command != "methods" or json.loads(out)
