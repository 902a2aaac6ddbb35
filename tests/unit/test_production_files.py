"""The files of the production set-up: nothing published beyond this machine, no password, nothing unpinned."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "mlflow/compose.yaml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
OWN = ("mlflow", "prefect", "worker")
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<sign>:\?|:-|-|)(?P<text>[^}]*)\}")
EXAMPLE = dict(
    line.split("=", 1)
    for line in (ROOT / "mlflow/production.env.example").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
DOCKERFILE = (ROOT / "mlflow/Dockerfile").read_text(encoding="utf-8")
IGNORED = [
    line
    for line in (ROOT / "mlflow/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
SWITCHES = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|AUTH_STRING|TOKEN")


def environments():
    for service, settings in SERVICES.items():
        for name, value in settings["environment"].items():
            yield service, name, value


def test_it_starts_what_a_production_set_up_needs():
    assert set(SERVICES) == {"postgres", "objects", "mlflow", "prefect", "worker"}


def test_every_port_is_published_on_loopback_only():
    published = [port for settings in SERVICES.values() for port in settings.get("ports", ())]
    assert len(published) == 2
    assert [port for port in published if not str(port).startswith("127.0.0.1:")] == []
    assert not any("network_mode" in settings for settings in SERVICES.values())


def test_no_secret_is_written_down_and_none_has_a_default():
    """A secret is one variable that compose refuses to do without; a gated hub is the one that may be absent."""
    secrets = [(service, name, value) for service, name, value in environments() if SECRET.search(name)]
    assert len(secrets) >= 7
    for service, name, value in secrets:
        match = VARIABLE.fullmatch(value)
        assert match, f"{service}: {name} holds something else than one variable"
        assert match["sign"] == ":?" or (name == "HF_TOKEN" and match["text"] == ""), f"{service}: {name}"
    for service, name, value in environments():
        for user, password in re.findall(r"//([^/:@]+):([^@]*)@", value):
            assert user and VARIABLE.fullmatch(password), f"{service}: {name} holds a password"
            assert VARIABLE.fullmatch(password)["sign"] == ":?"


def test_compose_refuses_to_start_from_the_example_as_it_is():
    required = {match["name"] for match in VARIABLE.finditer(TEXT) if match["sign"] == ":?"}
    assert required == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "PREFECT_AUTH"}
    assert {EXAMPLE[name] for name in required} == {""}
    assert {match["text"] for match in VARIABLE.finditer(TEXT) if match["sign"] == ":?"} == {"set it in production.env"}


def test_the_example_names_every_variable_and_no_other():
    assert set(EXAMPLE) == {match["name"] for match in VARIABLE.finditer(TEXT)}
    # An empty value counts as the default only where compose is told so.
    optional = [match for match in VARIABLE.finditer(TEXT) if match["sign"] != ":?"]
    assert all(match["sign"] == ":-" or match["text"] == "" for match in optional)
    assert "$" not in VARIABLE.sub("", TEXT)


def test_every_variable_has_a_line_that_says_why():
    lines = (ROOT / "mlflow/production.env.example").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+=", line):
            before = next(other for other in reversed(lines[:number]) if not re.match(r"\w+=", other))
            assert before.startswith("# "), line


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_pinned_watched_and_comes_back(service):
    settings = SERVICES[service]
    name, _, tag = settings["image"].rpartition(":")
    assert name and re.match(r"v?\d+\.\d+", tag), settings["image"]
    assert settings["restart"] == "unless-stopped"
    assert settings["healthcheck"]["test"][0] == "CMD"
    assert settings["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    for needed in settings.get("depends_on", {}):
        assert settings["depends_on"][needed] == {"condition": "service_healthy"} and "healthcheck" in SERVICES[needed]


def test_what_must_last_lies_in_named_volumes():
    mounted = {name: [volume.partition(":")[0] for volume in s.get("volumes", ())] for name, s in SERVICES.items()}
    assert mounted == {
        "postgres": ["postgres"],
        "objects": ["objects"],
        "mlflow": [],
        "prefect": ["prefect"],
        "worker": ["work"],
    }
    assert set(COMPOSE["volumes"]) == {"postgres", "objects", "prefect", "work"}


@pytest.mark.parametrize("service", OWN)
def test_no_part_sends_usage_data(service):
    environment = SERVICES[service]["environment"]
    assert {name: environment.get(name) for name in SWITCHES} == SWITCHES


def test_the_image_sends_none_either_and_is_pinned_and_not_root():
    assert {name: value for name, value in re.findall(r"(\w+)=(\S+)", DOCKERFILE) if name in SWITCHES} == SWITCHES
    (base,) = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert re.fullmatch(r"python:3\.1[1-3]\.\d+-slim-\w+", base)
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.M) == ["1000:1000"]
    assert "requirements.lock" in DOCKERFILE


def test_the_image_of_services_is_the_version_of_the_project():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {SERVICES[name]["image"] for name in OWN} == {f"mka-compress:{version}"}
    assert {SERVICES[name]["build"]["dockerfile"] for name in OWN} == {"mlflow/Dockerfile"}


def test_the_image_leaves_out_secrets_and_nothing_that_git_tracks():
    """Else every run would record that the checkout differs from its commit."""
    assert {"mlflow/production.env", ".dvc/config.local", "data/work", ".venv"} <= set(IGNORED)
    assert not {".git", ".dvc", ".dvc/cache"} & set(IGNORED)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode or not tracked:
        pytest.skip("not a Git checkout")
    patterns = [pattern.removeprefix("**/") for pattern in IGNORED]
    for name in tracked:
        parts = Path(name).parts
        heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        assert not [p for p in patterns if any(fnmatch(head, p) for head in heads) or any(fnmatch(q, p) for q in parts)]


def test_secrets_are_ignored_by_git():
    done = subprocess.run(["git", "check-ignore", "--quiet", "mlflow/production.env"], cwd=ROOT)
    if done.returncode == 128:
        pytest.skip("not a Git checkout")
    assert done.returncode == 0, "add /mlflow/production.env to .gitignore"


def test_servers_find_each_other():
    """Addresses name services of this file and the ports these listen on."""
    listening = {"postgres": "5432", "objects": "7070"}
    for name in ("mlflow", "prefect"):
        command = SERVICES[name]["command"]
        listening[name] = command[command.index("--port") + 1]
        assert SERVICES[name]["ports"][0].endswith(f":{listening[name]}")
        assert f":{listening[name]}/" in SERVICES[name]["healthcheck"]["test"][-1]
    found = set()
    for _, _, value in environments():
        for host, port in re.findall(r"(?:@|//)([a-z]+):(\d+)", value):
            assert listening[host] == port
            found.add(host)
    prefect = SERVICES["prefect"]["environment"]
    assert listening[prefect["PREFECT_SERVER_DATABASE_HOST"]] == prefect["PREFECT_SERVER_DATABASE_PORT"]
    assert found == {"postgres", "objects", "mlflow", "prefect"}
    assert f"mlflow:{listening['mlflow']}" in SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    databases = {SERVICES["postgres"]["environment"]["POSTGRES_DB"], prefect["PREFECT_SERVER_DATABASE_NAME"]}
    assert databases == {"mlflow", "prefect"}
    assert COMPOSE["configs"]["databases"]["content"].strip() == "CREATE DATABASE prefect;"
