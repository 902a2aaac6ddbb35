"""Where models are run: chosen for a command, refused where it is not there, forgotten afterwards."""

from types import SimpleNamespace

import pytest
import torch
from support.models import make_texts

from mka.cli.main import cli, main
from mka.errors import RecipeError
from mka.evaluation.speed import _synchronize
from mka.model.checkpoint import open_checkpoint
from mka.model.device import DEVICES, find_device, running_on
from mka.model.loading import load_model, open_decoder

RUNS = {
    *("inspect", "init", "compress", "write", "observe", "plan", "merge", "heal", "evaluate", "chat"),
    *("serve-check", "bench", "budget", "frontier"),
}


@pytest.fixture
def with_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_what_is_chosen_holds_within_the_block(with_devices):
    assert find_device().type == "cuda"
    for name in DEVICES[1:]:
        with running_on(name):
            assert find_device().type == name
    assert find_device().type == "cuda"


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device().type == "cpu"
    with pytest.raises(RecipeError, match=r"device cuda: torch .* finds none here; there is: cpu"), running_on("cuda"):
        pass


def test_every_command_that_runs_a_model_takes_it():
    found = {name for name, command in cli.commands.items() if any("--device" in one.opts for one in command.params)}
    assert found == RUNS


def test_models_are_loaded_where_they_are_run(llama_folder, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_model(llama_folder, "float32")
    with running_on("cpu"):
        load_model(llama_folder, "float32")
    assert [device.type for device in moved[:1] + moved[-1:]] == ["cuda", "cpu"]


def test_walks_need_numbers_that_mps_has_not(llama_folder, with_devices):
    checkpoint = open_checkpoint(llama_folder)
    with (
        running_on("mps"),
        pytest.raises(RecipeError, match=r"device mps: .* 64 bits, which mps has not; run it with --device cpu"),
        open_decoder(checkpoint, "float32"),
    ):
        pass


def test_a_timing_waits_for_the_device(monkeypatch):
    waited = []
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda kind=kind: waited.append(kind))
    for kind in ("cpu", "cuda", "mps"):
        _synchronize(SimpleNamespace(device=torch.device(kind)))
    assert waited == ["cuda", "mps"]


def test_the_option_is_in_force_for_one_command(llama_folder, tmp_path, monkeypatch, capsys):
    """On a machine with a GPU, `--device cpu` keeps to the processor."""
    (tmp_path / "texts.txt").write_text("\n\n".join(make_texts(60)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = ["observe", str(llama_folder), "--calibration", str(tmp_path / "texts.txt"), "--samples", "60"]
    assert main([*given, "--device", "cpu", "--output", str(tmp_path / "states.safetensors")]) == 0
    assert find_device().type == "cuda"
    assert main([*given, "--device", "tpu", "--output", str(tmp_path / "more.safetensors")]) == 2
    assert "'tpu' is not one of" in capsys.readouterr().err
