"""Where a model's tensors and modules are is spelled in two files, and nowhere else."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.alignments import draw_windows, without
from support.models import FAMILY_NAMES, make_tiny_model, save_model

import mka
from mka.alignment.lockstep import Alignment
from mka.errors import PlanError
from mka.model.checkpoint import open_checkpoint
from mka.model.families import FAMILIES, get_family
from mka.model.parts import Part
from mka.plan.plan import MergePlan
from mka.transforms.fold import fold_scales
from mka.transforms.merge import merge_checkpoint

ROOT = Path(mka.__file__).parent
SPELLED_IN = {ROOT / "model/families.py", ROOT / "model/parts.py"}
LAYOUT = re.compile(
    r"model\.(layers|model|norm|embed_tokens)\b|lm_head|embed_tokens|self_attn|layernorm|\b[qk]_norm"
    r"|\b(q|k|v|o|up|down|gate|qkv|gate_up)_proj"
)


def read_code(path):
    """The code of a file without docstrings and comments, which may give examples."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def test_layout_is_spelled_in_families_and_parts_only():
    files = set(ROOT.rglob("*.py"))
    assert files > SPELLED_IN and all(LAYOUT.search(read_code(path)) for path in SPELLED_IN)
    found = {str(path.relative_to(ROOT)): LAYOUT.findall(read_code(path)) for path in files - SPELLED_IN}
    assert {path: words for path, words in found.items() if words} == {}


def test_layout_needs_no_torch():
    program = "import sys, mka.model.families, mka.model.parts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_names_and_modules_are_those_of_the_model(family):
    model, facts = make_tiny_model(family, tie_word_embeddings=False), get_family(family, "test")
    state = model.state_dict()
    outside = {facts.embedding_tensor, facts.norm_tensor, facts.head_tensor}
    assert {name for name in state if facts.split_tensor(name) is None} == outside
    places = {name: facts.split_tensor(name) for name in state.keys() - outside}
    assert all(facts.layer_tensor(*place) == name for name, place in places.items())
    assert {layer for layer, _ in places.values()} == set(range(len(facts.get_layers(model))))
    # Every tensor of a layer is of exactly one part.
    assert all(sum(part.owns(suffix) for part in facts.parts) == 1 for _, suffix in places.values())
    assert facts.get_embedding(model) is model.get_input_embeddings()
    assert facts.get_head(model) is model.get_output_embeddings()
    assert facts.get_backbone(model) is model.base_model
    norm = facts.get_norm(model)
    assert norm.weight.shape == (32,) and norm in facts.get_backbone(model).children()
    for layer in facts.get_layers(model):
        for part in facts.parts:
            assert all(layer.get_submodule(name).in_features == 32 for name in part.readers)
            assert layer.get_submodule(part.writer).out_features == 32


def test_parts_of_a_kind_a_transform_cannot_treat_are_refused(tmp_path, monkeypatch):
    model = make_tiny_model("llama")
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    experts = Part("experts", "mlp", "post_attention_layernorm", ("mlp.gate",), "mlp.down")
    family = dataclasses.replace(source.family, parts=(source.family.attention, experts))
    monkeypatch.setitem(FAMILIES, "llama", family)
    mixture = dataclasses.replace(source, family=family)
    refusals = {
        "merging": lambda: merge_checkpoint(MergePlan("", "", 6, without(2)), mixture, tmp_path / "out"),
        "alignment": lambda: Alignment(model, draw_windows(2)),
        "scaling the residual stream": lambda: fold_scales({1: 2.0}, family, tied=False),
    }
    for transform, refused in refusals.items():
        with pytest.raises(PlanError, match=f"{transform} cannot treat experts; allowed: attention, mlp") as caught:
            refused()
        assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="architecture 'llama' have no part 'mlp'; they have: attention, experts"):
        _ = family.mlp
    assert not (tmp_path / "out").exists()
