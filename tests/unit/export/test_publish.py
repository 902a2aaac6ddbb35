"""A model's page on a hub: everything there, compared, tagged last; and one line where it does not come to that."""

import json

import pytest
import yaml
from support.hub import TOKEN
from support.models import make_tiny_model, save_model

from mka.cli.main import main
from mka.model.checkpoint import open_checkpoint
from mka.recipe import ModelSource
from mka.sources.fetch import materialize
from mka.store.sums import SUMS_NAME, write_sums

REPO = "me/tiny-4"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    folder = save_model(make_tiny_model("llama", num_hidden_layers=2), tmp_path / "made")
    write_sums(folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: org/base\nbase_model_relation: merge\ntags: [mka]\n---\n\n"
        '# tiny\n\nAutoTokenizer.from_pretrained("path/to/this/folder")\n'
    )
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    (folder / "optimizer.pt").write_bytes(b"x")
    return folder


def publish(folder, *options, repo=REPO):
    return main(["publish", str(folder), "--to", repo, *options])


def refusal(capsys):
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("mka: ")]
    assert TOKEN not in said and "Traceback" not in said and len(line) < 700
    return line


def test_what_is_published_is_the_model_and_comes_back(hub, folder, tmp_path, capsys):
    assert publish(folder, "--tag", "v1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    held = hub.repos[REPO].files("v1")
    assert held.keys() == {*told["files"]} == {f.name for f in folder.iterdir()} - {".env", "optimizer.pt"}
    assert all(held[name] == (folder / name).read_bytes() for name in held if name != "README.md")
    _, front, body = held["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        **{"license": "apache-2.0", "base_model": "org/base", "base_model_relation": "merge", "tags": ["mka"]}
    }
    assert f'from_pretrained("{REPO}")' in body
    assert hub.repos[REPO].tags == {"v1": told["commits"]["main"]} and not hub.repos[REPO].private

    came = materialize(ModelSource(hub=REPO, revision="v1"), tmp_path, cache_dir=tmp_path / "cache")
    assert came.name == told["commits"]["main"] and open_checkpoint(came).layers == 2
    assert all(file.read_bytes() == held[file.name] for file in came.iterdir()) and (came / WEIGHTS).exists()

    # Again: nothing is new, so nothing is sent and the tag stays.
    before = len(hub.seen)
    assert publish(folder, "--tag", "v1", "--json") == 0
    assert not json.loads(capsys.readouterr().out)["sent"]
    assert not [line for line in hub.seen[before:] if "/commit/" in line or "PUT" in line or "/tag/" in line]


def test_a_dry_run_says_what_would_be_sent_and_asks_nobody(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    options = ("--license", "mit", "--base", "other/base", "--relation", "finetune", "--private")
    assert publish(folder, "--dry-run", "--tag", "v2", *options) == 0
    said = capsys.readouterr().out
    for part in (WEIGHTS, SUMS_NAME, "mit", "other/base", "finetune", "tag v2", "private", "nothing was sent"):
        assert part in said
    assert hub.seen == [] and not (folder.parent / "cache").exists()


def test_a_folder_without_card_and_sums_gets_both(hub, tmp_path, capsys):
    folder = save_model(make_tiny_model("qwen2", num_hidden_layers=2), tmp_path / "bare", max_shard_size="40KB")
    (folder / "LICENSE").write_text("Terms.")
    (folder / "training_args.bin").write_bytes(b"x")
    assert publish(folder, "--private", "--revision", "first", "--relation", "merge") == 0
    assert "--license, --base" in capsys.readouterr().out
    repo = hub.repos[REPO]
    held = repo.files("first")
    assert repo.private and repo.files("main") == {}
    assert held.keys() == {f.name for f in folder.iterdir()} - {"training_args.bin"} | {"README.md", SUMS_NAME}
    front = yaml.safe_load(held["README.md"].decode().split("---\n")[1])
    assert front["library_name"] == "transformers" and "base_model_relation" not in front  # of no base
    listed = {line.split("  ")[1] for line in held[SUMS_NAME].decode().splitlines()}
    assert listed == held.keys() - {"README.md", SUMS_NAME}


def test_another_version_takes_the_place_of_all_files_and_of_no_tag(hub, folder, tmp_path, capsys):
    assert publish(folder, "--tag", "v1") == 0
    other = save_model(make_tiny_model("llama", num_hidden_layers=3), tmp_path / "other", max_shard_size="40KB")
    assert publish(other, "--tag", "v1") == 2
    assert "has a tag v1 already" in refusal(capsys)
    assert hub.repos[REPO].files("main") == hub.repos[REPO].files("v1")
    assert publish(other, "--tag", "v2") == 0
    repo = hub.repos[REPO]
    assert WEIGHTS in repo.files("v1") and WEIGHTS not in repo.files("main")
    assert repo.files("main") == repo.files("v2") != repo.files("v1")


@pytest.mark.parametrize(
    ("pattern", "how", "times", "words"),
    [
        ("POST /api/repos/create", 401, 1, ("does not take the token", "HF_TOKEN", "401")),
        ("POST /api/repos/create", 403, 1, ("write permission",)),
        ("POST /api/repos/create", 500, 1, ("the hub failed", "500", "run the same command again")),
        ("GET /api/models/.*/refs", "drop", 1, ("went away", "run the same command again")),
        ("POST /api/validate-yaml", 500, 1, ("the hub failed",)),
        ("POST /api/models/.*/preupload", 409, 1, ("somebody else is changing",)),
        ("POST /.*/objects/batch", 500, 9, ("the hub failed",)),
        ("PUT /store/", 500, 99, ("the hub failed", WEIGHTS, "not sent twice")),
        ("PUT /store/", "drop", 99, ("went away", WEIGHTS, "not sent twice")),
        ("POST /api/models/.*/commit", 409, 1, ("somebody else is changing",)),
        ("POST /api/models/.*/commit", 412, 1, ("somebody else changed the repository meanwhile",)),
        ("POST /api/models/.*/commit", "drop", 1, ("went away",)),
        ("POST /api/models/.*/tag", 500, 1, ("the hub failed",)),
    ],
)
def test_a_failure_is_one_line_without_the_token_and_the_same_command_goes_on(
    pattern, how, times, words, hub, folder, capsys, caplog
):
    hub.fail(pattern, how, times)
    assert publish(folder, "--tag", "v1") == 2
    line = refusal(capsys)
    assert [word for word in (REPO, "no tag was set", *words) if word not in line] == [], line
    assert TOKEN not in caplog.text
    assert REPO not in hub.repos or hub.repos[REPO].tags == {}
    hub.failures.clear()
    assert publish(folder, "--tag", "v1") == 0
    assert hub.repos[REPO].files("v1")[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_what_arrived_otherwise_is_not_tagged(name, hub, folder, capsys):
    hub.spoil = name
    assert publish(folder, "--tag", "v1") == 2
    line = refusal(capsys)
    assert f"{name} has another digest" in line and "no tag was set" in line
    assert hub.repos[REPO].tags == {}
    hub.spoil = None
    assert publish(folder, "--tag", "v1") == 0
    assert hub.repos[REPO].files("v1")[name] == (folder / name).read_bytes()


def test_weights_that_arrived_are_not_sent_twice(hub, folder, capsys):
    hub.fail("POST /api/models/.*/commit", 500)
    assert publish(folder) == 2
    assert publish(folder) == 0 and hub.count("PUT /store/") == 1


def test_what_cannot_be_published_is_refused_before_anybody_is_asked(hub, folder, tmp_path, monkeypatch, capsys):
    assert publish(tmp_path / "none") == 2
    assert "no such model folder" in refusal(capsys)
    for repo in ("tiny", "me/tiny/4", "me/ti ny", "https://hub/me/tiny", ""):
        assert publish(folder, repo=repo) == 2
        assert "is no model id of a hub; give org/name" in refusal(capsys)
    assert publish(folder, "--tag", "-x y") == 2
    assert "--tag '-x y' cannot be a branch or tag" in refusal(capsys)
    assert publish(folder, "--card", str(tmp_path / "none.md")) == 2
    assert "no such file" in refusal(capsys)
    (folder / "README.md").write_text("---\na: [\n---\n# x\n")
    assert publish(folder) == 2
    assert "front matter cannot be read" in refusal(capsys)
    (folder / "README.md").unlink()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"\1")
    assert publish(folder) == 2
    assert "is altered" in refusal(capsys)
    write_sums(folder)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert publish(folder) == 2
    assert "without a token" in refusal(capsys)
    assert hub.seen == []


def test_a_public_page_is_not_given_what_should_be_private(hub, folder, capsys):
    assert publish(folder) == 0
    assert publish(folder, "--private") == 2
    assert "is there and public" in refusal(capsys)


def test_a_wrong_token_and_a_silent_hub(hub, folder, monkeypatch, capsys):
    wrong = "hf_" + "z" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    assert publish(folder) == 2
    said = capsys.readouterr().err
    assert "does not take the token" in said and wrong not in said and "Bearer" not in said.replace("Bearer hf_***", "")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert publish(folder) == 2
    assert "cannot be reached" in refusal(capsys)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert publish(folder) == 2
    assert "HF_HUB_OFFLINE is set" in refusal(capsys)
