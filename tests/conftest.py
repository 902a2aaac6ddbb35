"""The environment of all tests; tiny models and a tokenizer, made once per session."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes share two cores. With two threads each they wait for one another at every product, eight times as
    # long; the variable is set in whoever started this process, so it is replaced.
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Flows of other test processes must not keep this one's waiting.
os.environ.setdefault("MKA_SLOTS", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "true")

from pathlib import Path

import pytest
from support.hub import TOKEN, Hub
from support.models import FAMILY_NAMES, make_tiny_model, make_tokenizer, save_model


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session", params=FAMILY_NAMES)
def family_model(request):
    return make_tiny_model(request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Let pip find wheels in a folder only; returns that folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """Replace the conversion of real GGUF files; returns the contents it was given."""
    seen = []

    def convert(gguf, folder):
        seen.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr("mka.sources.fetch.convert_gguf", convert)
    return seen


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of a hub that the client talks to; its waits between tries take no time."""
    import huggingface_hub.constants as constants

    hub = Hub()
    for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()
