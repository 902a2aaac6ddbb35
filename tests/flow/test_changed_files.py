"""Files that change during a run: it ends in one line, and nothing is registered."""

import pytest

import mka.pipeline.stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


@pytest.mark.parametrize(
    ("after", "place", "said"),
    [
        ("gate", "quantize-*/model/model.safetensors", "since stage 'quantize' wrote it"),
        ("evaluate candidate", "evaluate-*/evaluation.json", "since stage 'evaluate' wrote it"),
        ("report", "../../base/config.json", "has changed since the run began"),
    ],
)
def test_nothing_is_registered_of_what_has_changed(project, capsys, monkeypatch, after, place, said):
    produce = mka.pipeline.stage.Stage.produce

    def produce_then_harm(self, *args, **options):
        product = produce(self, *args, **options)
        if self.name == after:
            for file in (project.work / "stages").glob(place):
                content = bytearray(file.read_bytes())
                content[-2] ^= 1
                file.write_bytes(content)
        return product

    monkeypatch.setattr(mka.pipeline.stage.Stage, "produce", produce_then_harm)
    assert project.run() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("recompress: ") and said in last
    assert project.last_run["status"] == "failed"
    assert list(project.client.search_model_versions("name = 'tiny'")) == []
