"""Options of commands are the recipe's fields: what is typed ends at the field's key, under the field's default."""

from pathlib import Path

import pytest

from mka.cli.compress import resolve_recipe
from mka.cli.main import cli
from mka.cli.options import Command, RecipeOption, default_of, find_field, find_marker, list_keys
from mka.recipe import BOUNDS, DEPTHS, Recipe

# Command -> option -> key of the recipe; what people have typed into scripts since 0.1.
MODEL = {"--dtype": "model.dtype", "--trust-remote-code": "model.trust_remote_code"}
METHOD = {"--method": "method.name", "--set": "method.settings"}
TARGET = {f"--{name.replace('_', '-')}": f"target.{name}" for name in DEPTHS + BOUNDS}
TARGET |= {"--protect-first": "target.protect_first", "--protect-last": "target.protect_last"}
QUANTIZE = {
    "--quantize": "quantize.scheme",
    "--group-size": "quantize.group_size",
    "--embeddings": "quantize.embeddings",
    "--serve-on": "quantize.serve_on",
}
CALIBRATED = {
    "--rounding": "quantize.rounding",
    "--rounding-tokens": "quantize.tokens",
    "--bits-per-weight": "quantize.bits_per_weight",
}
CALIBRATION = {
    "--calibration": "calibration.path",
    "--samples": "calibration.samples",
    "--max-tokens": "calibration.max_tokens",
    "--pooling": "calibration.pooling",
}
ALIGNMENT = {
    "--align": "alignment.enabled",
    "--align-tokens": "alignment.tokens",
    "--alignment-table": "alignment.path",
}
HEAL = {
    "--heal": "heal.mode",
    "--heal-table": "heal.path",
    "--heal-tokens": "heal.tokens",
    "--heal-train": "heal.train",
    "--heal-rate": "heal.rate",
    "--heal-context": "heal.context",
}
EVALUATION = {
    "--text": "evaluation.text",
    "--tasks": "evaluation.tasks",
    "--tasks-folder": "evaluation.tasks_folder",
    "--include-path": "evaluation.include_path",
    "--shots": "evaluation.shots",
    "--chat-template": "evaluation.chat_template",
    "--context": "evaluation.context",
    "--tokens": "evaluation.text_tokens",
    "--generation": "evaluation.generation",
    "--seed": "seed",
}
COMMANDS = {
    "compress": METHOD | TARGET | QUANTIZE | CALIBRATED | CALIBRATION | ALIGNMENT | HEAL | EVALUATION | MODEL,
    "observe": CALIBRATION | {"--batch-size": "calibration.batch_size"} | MODEL,
    "score": METHOD,
    "plan": METHOD | TARGET | CALIBRATION | {"--batch-size": "calibration.batch_size"} | MODEL,
    "write": {"--seed": "seed"} | MODEL,
    "merge": ALIGNMENT | QUANTIZE | MODEL,
    # In their own command they need not say what they belong to.
    "heal": {name.replace("--heal-", "--"): key for name, key in HEAL.items() if name != "--heal"}
    | {"--mode": "heal.mode", "--seed": "seed"}
    | MODEL,
    "serve-check": {"--seed": "seed"} | MODEL,
    "tasks": {"--tasks-folder": "evaluation.tasks_folder", "--include-path": "evaluation.include_path"},
    "evaluate": EVALUATION | {"--batch-size": "evaluation.batch_size"} | MODEL,
}
# What is typed -> the keys of the recipe it sets.
TYPED = {
    "--method laco": {"method.name": "laco"},
    "--set coordinates=3 --set alpha=1": {"method.settings": {"coordinates": 3, "alpha": 1}},
    "--layers 4": {"target.layers": 4},
    "--layer-ratio .25": {"target.layer_ratio": 0.25},
    "--protect-first 0": {"target.protect_first": 0},
    "--quantize int4 --group-size 32": {"quantize.scheme": "int4", "quantize.group_size": 32},
    "--quantize off": {"quantize.scheme": "off"},
    "--calibration c.jsonl --pooling mean": {"calibration.path": Path("c.jsonl"), "calibration.pooling": "mean"},
    "--align --alignment-table a.jsonl": {"alignment.enabled": True, "alignment.path": Path("a.jsonl")},
    "--no-align": {"alignment.enabled": False},
    "--heal local --heal-tokens 999": {"heal.mode": "local", "heal.tokens": 999},
    "--text t.txt --tokens 99": {"evaluation.text": Path("t.txt"), "evaluation.text_tokens": 99},
    "--tasks piqa=4,boolq --tasks sciq=all": {"evaluation.tasks": {"piqa": 4, "boolq": None, "sciq": None}},
    "--tasks-folder hub": {"evaluation.tasks_folder": None},
    "--shots own --include-path mine": {"evaluation.shots": None, "evaluation.include_path": Path("mine")},
    "--shots 5 --chat-template auto": {"evaluation.shots": 5, "evaluation.chat_template": "auto"},
    "--tasks-folder tables": {"evaluation.tasks_folder": Path("tables")},
    "--generation 20": {"evaluation.generation": 20},
    "--seed 0": {"seed": 0},
    "--dtype bfloat16 --trust-remote-code": {"model.dtype": "bfloat16", "model.trust_remote_code": True},
    "": {},
}


def options_of(command):
    return [option for option in cli.commands[command].params if isinstance(option, RecipeOption)]


@pytest.fixture
def type_options(monkeypatch):
    """Run `mka compress` as far as its function; returns what was typed for the recipe's keys."""
    command, seen = cli.commands["compress"], []
    monkeypatch.setattr(command, "callback", lambda **arguments: seen.append(arguments))

    def run(line):
        command.main(["model", "--output", "out", *line.split()], standalone_mode=False)
        return seen.pop()["asked"]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_they_always_had(command):
    assert {option.opts[0]: option.key for option in options_of(command)} == COMMANDS[command]
    for option in options_of(command):
        assert option.secondary_opts == (["--no-align"] if option.key == "alignment.enabled" else [])


def test_every_marked_field_is_an_option_of_some_command():
    marked = {key for place in Recipe.model_fields for key in list_keys(place) if find_marker(find_field(key))}
    assert marked == {option.key for command in COMMANDS for option in options_of(command)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_defaults_as_the_recipe_has_them(command):
    """Not of a path that commands take only where it is there, nor where another text stands for the field's."""
    for option in options_of(command):
        default = default_of(option.key)
        silent = option.key in ("evaluation.text", "model.trust_remote_code")
        silent |= command == "plan" and option.key in ("method.name", "calibration.path")
        silent |= command == "heal" and option.key == "heal.mode"
        shown = "" if silent or default in (None, {}) else "no" if default is False else default
        assert option.help.partition("  [default: ")[2].removesuffix("]") == str(shown)
        assert option.help.partition("  [")[0].endswith(".") and ".." not in option.help


@pytest.mark.parametrize("line", TYPED)
def test_what_is_typed_is_what_is_asked_and_nothing_else(type_options, line):
    assert type_options(line) == TYPED[line]


@pytest.mark.parametrize("line", [line for line in TYPED if "target." not in str(TYPED[line])])
def test_what_is_asked_reaches_the_recipe(type_options, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    # Without a method more than what is typed comes with the default.
    named = "" if "--method" in line else "--method mka"
    asked = type_options(f"{line} --layers 4 {named}")
    made = resolve_recipe("model", tmp_path / "out", None, asked)
    for key, value in asked.items():
        found = made
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value
    others = {option.key for option in options_of("compress")} - asked.keys() - {"evaluation.text"}
    for key in others:
        found = made
        for name in key.split("."):
            found = getattr(found, name)
        assert found == default_of(key)
    # What is not there is not measured on; revisions are for a table that DVC reads.
    assert made.evaluation.text == asked.get("evaluation.text")
    assert made.calibration.rev is None and made.alignment.rev is None


def test_options_are_made_when_a_command_is_used():
    made = []

    def make():
        made.append("made")
        return [RecipeOption("seed", ["--seed"], type=int)]

    command = Command("x", params=[make], callback=lambda asked: asked)
    assert command.get_short_help_str() == "" and made == []
    assert command.main(["--seed", "3"], standalone_mode=False) == {"seed": 3}
    assert command.main([], standalone_mode=False) == {}
    assert made == ["made"]
