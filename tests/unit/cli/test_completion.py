"""What a shell is offered, asked as a shell asks."""

import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from mka.cli.main import cli, main
from mka.evaluation.task_tables import TASKS
from mka.methods import get_method, method_names


def offer(line):
    *words, begun = line.split(" ")
    found = ShellComplete(cli, {}, "mka", "_MKA_COMPLETE").get_completions(words, begun)
    return [item.value for item in found]


def test_commands_and_options():
    assert {"inspect", "init", "compress", "completion"} <= set(offer(""))
    assert offer("comp") == ["compress", "compare", "completion"]
    assert "--method" in offer("compress --me")


def test_methods_and_their_settings():
    assert offer("compress --method ") == method_names()
    assert offer("score x --method re") == ["reference_code", "replaceme"]
    assert offer("compress --method laco --set ") == [f"{name}=" for name in get_method("laco").settings.model_fields]
    assert offer("compress --method nobody --set ") == []


def test_tasks_also_behind_a_comma(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert offer("evaluate x --tasks ") == [*TASKS, "mmlu"]
    assert offer("compress --tasks piqa=40,arc_") == ["piqa=40,arc_easy", "piqa=40,arc_challenge"]


@pytest.mark.parametrize("command", ["compress --recipe ", "bench ", "budget ", "frontier ", "recipe --show "])
def test_recipes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("one.yaml", "two.yml", "notes.txt", "recipes/three.yaml", ".hidden.yaml"):
        (tmp_path / name).write_text("")
    assert offer(command) == ["one.yaml", "recipes/", "two.yml"]
    assert offer(f"{command}recipes/") == offer(f"{command}recipes/th") == ["recipes/three.yaml"]
    assert offer(f"{command}nowhere/") == []


def test_forms_types_engines_and_devices():
    assert offer("export x --format ") == ["folder", "gguf"]
    assert "q8_0" in offer("export x --format gguf --type q") == offer("export x --type q")
    assert offer("serve-check x --engine ") == ["vllm", "llama.cpp"]
    assert offer("evaluate x --device c") == ["cpu", "cuda"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_call_back_the_program(shell, capsys):
    assert main(["completion", shell]) == 0
    assert f"_MKA_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_a_shell_that_is_not_known_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of" in capsys.readouterr().err


def test_completing_is_fast_and_answers_a_shell():
    """As the script of bash asks: nothing heavy is imported."""
    code = "import sys; from mka.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    asked = {"_MKA_COMPLETE": "bash_complete", "COMP_WORDS": "mka compress --method sh", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path), **asked}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,shortgpt\n", "")
