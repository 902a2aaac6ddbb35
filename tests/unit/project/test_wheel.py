"""What is in the wheel: two names, every module and template, the library's own dependencies and no pinned torch."""

import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.installed import ROOT, build_wheel, list_requirements, read_metadata

# Folder of the checkout -> where it is installed.
PLACES = {"mka": "mka", "flows/installed": "mka_flows", "flows": "mka_flows/flows", "tasks": "mka_flows/tasks"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_an_environment_gets_two_names(members):
    assert {name.partition("/")[0].partition("-")[0] for name in members} == {"mka", "mka_flows", "mka_compress"}


def test_every_module_and_every_template_is_in_it_once(members):
    sources = {
        path.relative_to(ROOT)
        for folder in ("mka", "flows", "tasks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    wanted = set()
    for source in sources:
        folder = next(folder for folder in PLACES if source.is_relative_to(folder))
        wanted.add((Path(PLACES[folder]) / source.relative_to(folder)).as_posix())
    assert {name for name in members if ".dist-info/" not in name} == wanted
    assert any(name.endswith(".j2") for name in wanted)


def test_the_library_alone_brings_no_orchestrator_and_a_range_of_torch(wheel):
    own = {requirement.name: requirement for requirement in list_requirements(wheel)}
    for name in ("prefect", "mlflow", "dvc", "great-expectations", "lm-eval", "datasets", "pandas", "gguf"):
        assert name not in own
    torch = own["torch"].specifier
    assert torch.contains("2.13.0") and torch.contains("2.14.1") and not torch.contains("3.0")


def test_all_is_every_extra_a_run_may_ask_for(wheel):
    about = read_metadata(wheel)
    (everything,) = list_requirements(wheel, "all")[len(list_requirements(wheel)) :]
    assert everything.name == about["Name"]
    servers = {"postgres", "s3", "dev"}
    assert everything.extras == set(about.get_all("Provides-Extra")) - {"all"} - servers
    assert all(Requirement(text).url is None for text in about.get_all("Requires-Dist"))
