"""What engines run: a recipe's `serve_on` chooses and refuses by one table, which the docs print."""

from pathlib import Path

import pytest
from support.models import make_tiny_model, save_model

from mka.errors import RecipeError
from mka.export.carrying import choose_carrier
from mka.kernels import EMBEDDINGS, ENGINES, ROWS, choose_scheme, find_row
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.recipes import validate_recipe
from mka.recipe import QuantizeSettings
from mka.transforms import SCHEMES
from mka.transforms.packing import check_roundable

ROOT = Path(__file__).parents[3]
RECIPE = {"name": "one", "model": {"folder": "models/one"}, "target": {"layers": 4}}


def read(**quantize):
    return validate_recipe(RECIPE | {"quantize": quantize}).quantize


def test_every_engine_has_a_row_for_every_scheme_and_for_embeddings():
    wanted = sorted(["off", *SCHEMES, EMBEDDINGS])
    for engine in ENGINES:
        assert sorted(row.scheme for row in ROWS if row.engine == engine) == wanted, engine


def test_the_docs_print_the_table():
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    for row in ROWS:
        loads, seen = "yes" if row.loads else "no", "run" if row.ran else "read"
        cells = [row.engine.name, row.engine.device, row.engine.version, f"`{row.scheme}`", loads, row.how, seen]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(("engine", "scheme"), [("cuda", "int8"), ("cpu", "w8a8"), ("llama.cpp", "int8")])
def test_auto_is_settled_when_the_recipe_is_read(engine, scheme):
    assert read(scheme="auto", serve_on=engine).scheme == scheme == choose_scheme(engine)
    # Recorded, it says what was done, and reads as the same again.
    assert read(**read(scheme="auto", serve_on=engine).model_dump()).scheme == scheme


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"scheme": "int8", "serve_on": "cpu"}, ["scheme int8: vLLM on CPU", "4 bits", "allowed: w8a8, int4, off"]),
        (
            {"scheme": "w8a8", "serve_on": "llama.cpp"},
            ["scheme w8a8: llama.cpp", "not once per token", "allowed: int8, int4, int7, int6, int5, int3, int2, off"],
        ),
        (
            {"scheme": "w8a8", "serve_on": "cpu", "embeddings": "int8"},
            ["embeddings int8: vLLM on CPU", "leave embeddings off"],
        ),
        (
            {"scheme": "int8", "serve_on": "cuda", "embeddings": "int8"},
            ["embeddings int8: vLLM on CUDA", "leave embeddings off"],
        ),
        ({"scheme": "auto"}, ["scheme auto needs serve_on (cuda, cpu or llama.cpp)"]),
        ({"embeddings": "int8"}, ["embeddings are rounded beside the layers only"]),
        ({"scheme": "auto", "serve_on": "tpu"}, ["'quantize.serve_on': Input should be 'cuda', 'cpu' or 'llama.cpp'"]),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line_when_the_recipe_is_read(asked, told):
    with pytest.raises(RecipeError) as caught:
        read(**asked)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in told), str(caught.value)


@pytest.mark.parametrize("row", [row for row in ROWS if row.loads and row.scheme != EMBEDDINGS])
def test_what_loads_is_let_through(row):
    assert read(scheme=row.scheme, serve_on=row.engine.serve_on).scheme == row.scheme


def test_group_sizes_without_a_kernel_are_refused(tmp_path):
    base = open_checkpoint(
        save_model(make_tiny_model("llama", hidden_size=64, intermediate_size=96), tmp_path / "base")
    )
    check_roundable(base, QuantizeSettings(scheme="int8", group_size=32, serve_on="cuda"))
    check_roundable(base, QuantizeSettings(scheme="int8", group_size=16))
    with pytest.raises(RecipeError, match=r"quantize\.group_size 16: vLLM on CUDA .* groups of 32, 64, 128 only"):
        check_roundable(base, QuantizeSettings(scheme="int8", group_size=16, serve_on="cuda"))


def test_groups_that_a_gguf_file_would_unpack_are_refused(tmp_path):
    sizes = {"hidden_size": 192, "head_dim": 48, "intermediate_size": 384}
    base = open_checkpoint(save_model(make_tiny_model("llama", **sizes), tmp_path / "base"))
    mixed = {"scheme": "mixed", "rounding": "gptq", "bits_per_weight": 5}
    for scheme in ({"scheme": "int8"}, {"scheme": "int2"}, mixed):
        for size in (32, 64, 96):
            check_roundable(base, QuantizeSettings(**scheme, group_size=size, serve_on="llama.cpp"))
        check_roundable(base, QuantizeSettings(**scheme, group_size=16))
        with pytest.raises(RecipeError, match=r"group_size 16: llama\.cpp on any device .* multiples of 32"):
            check_roundable(base, QuantizeSettings(**scheme, group_size=16, serve_on="llama.cpp"))


@pytest.mark.parametrize("width", range(32, 1056, 32))
def test_groups_that_are_allowed_are_kept_by_a_type_whatever_the_width(width):
    """The rule of the recipe is one number; what types hold is a table of its own."""
    step = find_row("llama.cpp", "int8").group_multiple
    for bits in range(2, 9):
        row = find_row("llama.cpp", f"int{bits}")
        assert row.loads and row.group_multiple == step
        for group in range(step, width + 1, step):
            assert width % group or choose_carrier(bits, group, width) is not None
    # Below it there is a width at which no type holds eight bits.
    assert choose_carrier(8, step // 2, width) is None


def test_widths_without_a_kernel_are_refused_and_fused_ones_are_taken_together(tmp_path):
    """Queries of 32 and keys and values of 16 rows each are one matrix of 64 in the engine; an MLP of 80 is none."""
    assert find_row("cpu", "int4").multiple == 32
    fits = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "fits"))
    check_roundable(fits, QuantizeSettings(scheme="int4", group_size=16, serve_on="cpu"))
    narrow = open_checkpoint(save_model(make_tiny_model("llama", intermediate_size=80), tmp_path / "narrow"))
    check_roundable(narrow, QuantizeSettings(scheme="int4", group_size=16))
    check_roundable(narrow, QuantizeSettings(scheme="w8a8", serve_on="cpu"))
    with pytest.raises(RecipeError, match=r"scheme int4: vLLM on CPU .* multiples of 32, this model has \[80\]"):
        check_roundable(narrow, QuantizeSettings(scheme="int4", group_size=16, serve_on="cpu"))
