"""A model in the form its reader wants: checked first, whole or not there."""

import json

import pytest
from support.models import make_byte_tokenizer, make_tiny_model, save_model

from mka.cli.main import main
from mka.errors import RecipeError
from mka.export import export_names, get_export
from mka.model.checkpoint import open_checkpoint
from mka.store.sums import verify_sums


@pytest.fixture
def base(tmp_path):
    return save_model(make_tiny_model("llama"), tmp_path / "base")


@pytest.mark.parametrize("form", export_names())
def test_every_form_is_written_whole_and_counted(form, tmp_path, capsys):
    model = make_tiny_model("llama", vocab_size=320)
    base = save_model(model, tmp_path / "base", max_shard_size="40KB", tokenizer=make_byte_tokenizer())
    assert main(["export", str(base), "--format", form, "--output", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert facts["format"] == form and facts["written_bytes"] == sum(file.stat().st_size for file in files) > 0
    assert verify_sums(tmp_path / "out")
    assert main(["export", str(base), "--format", form, "--output", str(tmp_path / "out")]) == 2


def test_an_unknown_form_is_refused_with_the_nearest(base, tmp_path, capsys):
    with pytest.raises(RecipeError, match="did you mean 'folder'"):
        get_export("folders")
    assert main(["export", str(base), "--format", "folders", "--output", str(tmp_path / "out")]) == 2
    assert f"formats: {', '.join(export_names())}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_type_is_refused_where_there_are_none_and_where_it_is_not_among_them(base, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(["export", str(base), "--type", "f16", *output]) == 2
    assert "format 'folder' has no types" in capsys.readouterr().err
    assert main(["export", str(base), "--format", "gguf", "--type", "q4_k", *output]) == 2
    refusal = capsys.readouterr().err
    assert "did you mean 'q4_k_m'" in refusal and refusal.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_folder_is_the_model_file_by_file_without_its_card(base, tmp_path, capsys):
    (base / "README.md").write_text("card")
    output = tmp_path / "deep" / "out"
    assert main(["export", str(base), "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["format"]) == (str(output), "folder")
    assert {f.name for f in output.iterdir()} == {f.name for f in base.iterdir()} - {"README.md"} | {"SHA256SUMS"}
    assert (output / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert verify_sums(output) and open_checkpoint(output).digest == open_checkpoint(base).digest
    assert main(["export", str(base), "--output", str(output)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_damaged_model_is_not_exported(base, tmp_path, capsys):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["export", str(base), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
