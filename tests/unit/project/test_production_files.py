"""The files of the production set-up: nothing published beyond this machine, no password, nothing unpinned."""

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
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


TEMPLATES = {
    kind: json.loads((ROOT / f"mlflow/{kind}-job-template.json").read_text(encoding="utf-8"))
    for kind in ("kubernetes", "docker")
}


def render(kind, **values):
    """What a worker makes of a template: defaults, replaced by what a run was given, in the job's configuration."""
    from prefect.utilities.templating import apply_values

    variables = TEMPLATES[kind]["variables"]["properties"]
    defaults = {name: v["default"] for name, v in variables.items() if v.get("default") is not None}
    return apply_values(TEMPLATES[kind]["job_configuration"], {**defaults, **values})


def leaves(node):
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from ((f"{key}.{path}", leaf) for path, leaf in leaves(value))
    else:
        yield "", node


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_job_template_uses_every_variable_it_declares_and_no_other(kind):
    from jsonschema import Draft202012Validator

    text = json.dumps(TEMPLATES[kind]["job_configuration"])
    variables = TEMPLATES[kind]["variables"]
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(variables["properties"])
    assert text.count("{{") == len(re.findall(r"\{\{ \w+ \}\}", text))
    Draft202012Validator.check_schema(variables)
    defaults = {name: v["default"] for name, v in variables["properties"].items() if "default" in v}
    Draft202012Validator(variables).validate(defaults)
    assert all(variable.get("description") for variable in variables["properties"].values())


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_job_template_has_what_the_shipped_default_of_its_kind_has(kind):
    """A worker fills in what is not there with defaults of its own: nothing may be lost on the way."""
    import prefect

    listed = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    shipped = json.loads(listed.read_text())[f"prefect-{kind}"][kind]["default_base_job_configuration"]
    left_out = {
        # Ours names a variable of the environment there; a worker puts those of {{ env }} beside it.
        "kubernetes": {"job_manifest.spec.template.spec.containers.0.env."},
        # Of a worker newer than prefect-docker 0.7.4.
        "docker": {"container_wait_timeout."},
    }
    ours = {path for path, _ in leaves(TEMPLATES[kind]["job_configuration"])}
    assert {path for path, _ in leaves(shipped["job_configuration"])} - ours == left_out[kind]
    missing = set(shipped["variables"]["properties"]) - set(TEMPLATES[kind]["variables"]["properties"])
    assert missing == ({"container_wait_timeout"} if kind == "docker" else set())


@pytest.mark.parametrize("gpus", [1, 3])
def test_a_job_on_kubernetes_is_limited_in_gpus_memory_and_cores(gpus):
    pod = render("kubernetes", gpus=gpus)["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == gpus and set(limits) == {"nvidia.com/gpu", "memory", "cpu"}
    assert re.fullmatch(r"\d+Gi", limits["memory"]) and limits["cpu"].isdecimal()
    # A container sees all cores of its node: threads have to be as many as it may use.
    (threads,) = container["env"]
    assert threads["name"] == "OMP_NUM_THREADS"
    assert threads["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert container["volumeMounts"] == [{"name": "work", "mountPath": "/work"}]
    assert pod["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "mka-work"}}]
    assert pod["securityContext"] == {"fsGroup": int(re.findall(r"^USER \d+:(\d+)", DOCKERFILE, re.M)[0])}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "runAsNonRoot": True}


@pytest.mark.parametrize("gpus", [1, -1])
def test_a_job_in_docker_is_limited_in_gpus_memory_and_cores(gpus):
    """By the library that the worker calls; -1 is all of them."""
    from docker.models.containers import _create_container_args

    job = render("docker", gpus=gpus)
    # What the worker hands over, see DockerWorker._build_container_settings of prefect-docker 0.7.4.
    given = {name: job[name] for name in ("image", "command", "volumes", "mem_limit", "memswap_limit") if name in job}
    made = _create_container_args({**given, **job["container_create_kwargs"], "version": "1.45"})
    (device,) = made["host_config"]["DeviceRequests"]
    assert (device["Count"], device["Capabilities"]) == (gpus, [["gpu"]])
    assert made["host_config"]["NanoCpus"] == int(job["env"]["OMP_NUM_THREADS"]) * 10**9
    assert made["host_config"]["Memory"] == made["host_config"]["MemorySwap"] == 16 * 2**30
    assert made["host_config"]["SecurityOpt"] == ["no-new-privileges:true"] and not job["privileged"]
    # Volume and network of compose.yaml, which name themselves after the project.
    assert made["host_config"]["Binds"] == [f"{COMPOSE['name']}_work:/work"]
    assert job["networks"] == [f"{COMPOSE['name']}_default"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_jobs_run_the_image_of_the_services_with_the_environment_of_their_worker_and_no_secret(kind):
    template, job = TEMPLATES[kind], render(kind)
    assert template["variables"]["properties"]["image"]["default"] == SERVICES["worker"]["image"]
    worker = SERVICES["worker"]["environment"]
    for name, value in job["env"].items():
        assert name == "OMP_NUM_THREADS" or worker[name] == value, name
    assert {"MKA_WORK", "PREFECT_HOME", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "MLFLOW_TRACKING_URI"} <= set(job["env"])
    written = [
        *job["env"].items(),
        *((name, v.get("default")) for name, v in template["variables"]["properties"].items()),
    ]
    assert [name for name, value in written if SECRET.search(name.upper()) and name != "secret" and value] == []
    assert not re.search(r"//[^/\s\"]+:[^/\s\"]+@", json.dumps(template))


def test_the_image_holds_what_servers_and_workers_of_a_sweep_need():
    (extras,) = re.findall(r"map\(x\.get, '([\w ]+)'\.split\(\)\)", DOCKERFILE)
    assert extras.split() == ["eval", "gguf", "flow", "dask", "postgres", "s3"]
