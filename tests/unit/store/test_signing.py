"""A folder signed and held against its signature: a byte of the model that moved is found, and it stays stock."""

import json
import shutil
import subprocess
import sys

import pytest
from support.keys import make_keys
from support.models import make_tiny_model, save_model

from mka.cli.main import main
from mka.export.page import lay_out_page
from mka.model.checkpoint import open_checkpoint
from mka.store.signing import SIGNATURE
from mka.store.sums import verify_sums, write_sums


@pytest.fixture
def keys(tmp_path):
    pytest.importorskip("model_signing", reason="needs the extra sign")
    return make_keys(tmp_path)


@pytest.fixture
def folder(tmp_path):
    folder = save_model(make_tiny_model("llama", num_hidden_layers=2), tmp_path / "made", max_shard_size="40KB")
    write_sums(folder)
    (folder / "README.md").write_text("# card\n")
    return folder


def sign(folder, key, *options):
    return main(["sign", str(folder), "--key", str(key), *options])


def verify(folder, key, *options):
    return main(["verify", str(folder), "--key", str(key), *options])


def refusal(capsys):
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("mka: ")]
    assert "Traceback" not in said and "PRIVATE" not in said
    return line


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_a_signed_folder_is_verified_and_stays_stock(kind, folder, keys, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    private, public = make_keys(tmp_path, kind, kind=kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    digest = open_checkpoint(folder).digest
    assert sign(folder, private) == 0 and verify(folder, public) == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.pop(SIGNATURE) and after == before
    assert json.loads((folder / SIGNATURE).read_text())["mediaType"].startswith("application/vnd.dev.sigstore.bundle")
    assert open_checkpoint(folder).digest == digest and verify_sums(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    # Where it goes, its signature goes along; the card is another there.
    assert SIGNATURE in lay_out_page(folder, "me/tiny").files
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 0
    (tmp_path / "out/README.md").write_text("# another card\n")
    assert verify(tmp_path / "out", public) == 0


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda f: flip(f / "config.json"), "altered since: config.json"),
        (lambda f: flip(next(f.glob("model-00001*"))), "model-00001"),
        (lambda f: (f / "generation_config.json").unlink(), "generation_config.json"),
        (lambda f: (f / "tokenization_x.py").write_text("x"), "tokenization_x.py"),
        (lambda f: (f / SIGNATURE).unlink(), "is not signed"),
        (lambda f: (f / SIGNATURE).write_text("{}"), "no signature in this format"),
        (lambda f: (f / SIGNATURE).write_text("x"), "no signature in this format"),
        (lambda f: (f / SIGNATURE).write_text(""), SIGNATURE),
    ],
)
def test_what_is_not_as_it_was_signed_is_refused_in_one_line(change, word, folder, keys, capsys):
    private, public = keys
    assert sign(folder, private) == 0
    change(folder)
    assert verify(folder, public) == 2
    assert word in refusal(capsys)


def test_another_key_and_a_signature_of_another_folder_do_not_do(folder, keys, tmp_path, capsys):
    private, public = keys
    _, other = make_keys(tmp_path, "other")
    assert sign(folder, private, "--signature", str(tmp_path / "apart.sig")) == 0
    assert not (folder / SIGNATURE).exists()
    assert verify(folder, public, "--signature", str(tmp_path / "apart.sig")) == 0
    assert verify(folder, other, "--signature", str(tmp_path / "apart.sig")) == 2
    assert str(other) in refusal(capsys)
    twin = shutil.copytree(folder, tmp_path / "twin")
    flip(twin / "config.json")
    assert sign(twin, private) == 0
    assert verify(folder, public, "--signature", str(twin / SIGNATURE)) == 2
    assert "config.json" in refusal(capsys)
    # Its payload exchanged for the other's: the signature is of neither.
    mixed, theirs = (json.loads(path.read_text()) for path in (tmp_path / "apart.sig", twin / SIGNATURE))
    mixed["dsseEnvelope"]["payload"] = theirs["dsseEnvelope"]["payload"]
    (twin / SIGNATURE).write_text(json.dumps(mixed))
    assert verify(twin, public) == 2
    assert "the signature is not that key's" in refusal(capsys)


def test_what_is_no_key_is_said_to_be_none(folder, keys, tmp_path, capsys):
    private, public = keys
    (tmp_path / "text.pem").write_text("x")
    for key, words in (
        (public, "none in PEM"),
        (tmp_path / "text.pem", "none in PEM"),
        (tmp_path / "missing.pem", "missing.pem"),
        (make_keys(tmp_path, "hidden", passphrase=b"hunter2")[0], "passphrase"),
        (make_keys(tmp_path, "k", kind="k256")[0], "elliptic curves P-256"),
        (make_keys(tmp_path, "ed", kind="ed25519")[0], "elliptic curves P-256"),
    ):
        assert sign(folder, key) == 2
        assert words in refusal(capsys)
    assert not (folder / SIGNATURE).exists()
    assert sign(folder, private) == 0 and verify(folder, private) == 2
    assert "none in PEM" in refusal(capsys)
    for command in (sign, verify):
        assert command(tmp_path / "none", public) == 2
        assert "no such folder" in refusal(capsys)


def test_the_tool_of_the_format_says_the_same(folder, keys, tmp_path, monkeypatch):
    """A stranger verifies with `model_signing` itself, and what it signs is verified here."""
    private, public = keys

    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "model_signing", *arguments], capture_output=True).returncode

    assert sign(folder, private) == 0
    asked = ("verify", "key", str(folder), "--signature", str(folder / SIGNATURE), "--public_key", str(public))
    assert run(*asked) == 0
    theirs = tmp_path / "theirs.sig"
    ignored = ("--ignore-paths", str(folder / SIGNATURE))
    assert run("sign", "key", str(folder), "--signature", str(theirs), "--private_key", str(private), *ignored) == 0
    assert verify(folder, public, "--signature", str(theirs)) == 0
    flip(folder / "config.json")
    assert run(*asked) != 0 and verify(folder, public, "--signature", str(theirs)) == 2


def test_without_the_package_the_extra_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    key = tmp_path / "any.pem"
    key.write_text("x")
    assert sign(folder, key) == 2
    assert "pip install 'mka-compress[sign]'" in refusal(capsys)
