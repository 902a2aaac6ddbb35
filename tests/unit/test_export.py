"""`mka export`: every form holds the model, and says how many bytes it wrote."""

import json

import pytest
from conftest import make_tiny_model, save_model

from mka.cli.main import main
from mka.errors import RecipeError
from mka.export import export_names, get_export
from mka.store.sums import verify_sums


@pytest.mark.parametrize("form", export_names())
def test_every_form_is_written_whole_and_counted(form, tmp_path, capsys):
    base = save_model(make_tiny_model("llama"), tmp_path / "base", max_shard_size="40KB")
    assert main(["export", str(base), "--format", form, "--output", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert facts["format"] == form and facts["written_bytes"] == sum(file.stat().st_size for file in files) > 0
    verify_sums(tmp_path / "out")
    assert main(["export", str(base), "--format", form, "--output", str(tmp_path / "out")]) == 2


def test_an_unknown_form_is_refused_with_the_nearest():
    with pytest.raises(RecipeError) as refused:
        get_export("foldr")
    assert (
        str(refused.value) == f"unknown format 'foldr' (did you mean 'folder'?); formats: {', '.join(export_names())}"
    )
