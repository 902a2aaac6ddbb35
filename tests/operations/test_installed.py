"""The wheel in an environment of its own, in an empty folder: what a person meets who has nothing else."""

import json

import pytest
from support.installed import build_wheel, install
from support.models import make_tiny_model, save_model

pytestmark = pytest.mark.operations


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(save_model(make_tiny_model("llama", max_position_embeddings=1024), folder))


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("core"))


def list_made(core) -> list[str]:
    """Everything in the folder but Prefect's home, which is made with the flows."""
    return sorted(str(path) for path in core.folder.rglob("*") if path.name not in ("data", "work", "prefect"))


def refuse(core, *arguments: str) -> str:
    """Type what is refused; return its one line, after which nothing is left."""
    before = list_made(core)
    done = core.run("mka", *arguments)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("mka: ") and "Traceback" not in done.stderr
    assert list_made(core) == before
    return line


def test_help_comes_from_the_wheel_and_lists_what_the_orchestrator_brings(core):
    done = core.run("mka", "--help")
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout and "promote" in done.stdout
    where = core.run("python", "-c", "import mka, mka_flows; print(mka.__file__); print(mka_flows.__file__)")
    assert all(line.startswith(str(core.site)) for line in where.stdout.splitlines()), where.stdout


def test_nothing_else_takes_a_name_of_the_environment(core):
    done = core.run("python", "-c", "import importlib.util as u; print(u.find_spec('flows'), u.find_spec('tasks'))")
    assert done.stdout.split() == ["None", "None"]


def test_a_dry_run_in_an_empty_folder_leaves_it_empty(core, model):
    done = core.run("mka", "compress", model, "--layers", "5", "--output", "smaller", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["to_write"] and list(core.folder.iterdir()) == []
    assert "the base writes its own text" in done.stderr and "make" not in done.stderr


def test_compressing_in_an_empty_folder_needs_no_table(core, model):
    before = core.list_site()
    options = ["--heal-tokens", "2048", "--align-tokens", "2048", "--output", "smaller"]
    done = core.run("mka", "compress", model, "--layers", "5", *options)
    assert done.returncode == 0, done.stderr
    made = core.folder / "smaller"
    assert json.loads((made / "config.json").read_text())["num_hidden_layers"] == 5
    assert (made / "evidence" / "report.html").is_file()
    assert sorted(path.name for path in core.folder.iterdir()) == ["data", "smaller"]
    assert (core.folder / "data" / "work" / "stages").is_dir()
    assert core.list_site() == before
    code = "from transformers import AutoModelForCausalLM as M; print(len(M.from_pretrained('smaller').model.layers))"
    assert core.run("python", "-c", code).stdout.split()[-1] == "5"


@pytest.mark.parametrize(
    ("extra", "missing", "arguments"),
    [
        (
            "eval",
            "task 'piqa' needs lm_eval",
            ["compress", "MODEL", "--layers", "5", "--output", "x", "--tasks", "piqa=9"],
        ),
        ("eval", "task 'piqa' needs lm_eval", ["evaluate", "MODEL", "--tasks", "piqa=9"]),
        ("gguf", "needs gguf", ["compress", "GGUF", "--layers", "5", "--output", "x"]),
        ("gguf", "needs gguf", ["export", "MODEL", "--format", "gguf", "--output", "x"]),
        ("sign", "a signature needs model_signing", ["sign", "MODEL", "--key", "k.pem"]),
        ("flow", "needs prefect", ["run", "recipe.yaml"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_an_extra_brings_is_refused_in_one_line_that_names_it(core, model, tmp_path, extra, missing, arguments):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    line = refuse(core, *({"MODEL": model, "GGUF": str(file)}.get(word, word) for word in arguments))
    assert missing in line and f"pip install 'mka-compress[{extra}]'" in line


def test_a_table_that_was_named_and_is_not_there_is_no_business_of_make(core, model):
    line = refuse(core, "compress", model, "--layers", "5", "--calibration", "mine.jsonl", "--output", "x")
    assert "text table not found: mine.jsonl" in line and "`base`" in line and "make" not in line


def test_the_flow_runs_from_the_wheel_where_no_project_is(wheel, model, tmp_path):
    everything = install(wheel, tmp_path, "eval", "gguf", "flow", "dask", "sign")
    text = "\n\n".join(f"w{number % 90 + 3} w{number % 7 + 3} w{number % 50 + 3} w5 w6" for number in range(80))
    (everything.folder / "mine.txt").write_text(text)
    (everything.folder / "tiny.yaml").write_text(
        f"""
name: tiny
model: {{folder: {model}}}
calibration: {{path: base, samples: 60, max_tokens: 16}}
method: {{name: mka}}
target: {{layers: 5, protect_first: 1, protect_last: 1}}
evaluation: {{text: mine.txt, overlap_index: null, text_tokens: 256, context: 32, prompts: [w5 w6], new_tokens: 4}}
gate: {{perplexity_recovery: 0.01}}
"""
    )
    code = "import mka_flows; mka_flows.find_flows(); from flows.recompress import main; exit(main(['tiny.yaml']))"
    done = everything.run("python", "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((everything.folder / "data" / "work" / "last_run.json").read_text())
    assert facts["status"] == "completed"
