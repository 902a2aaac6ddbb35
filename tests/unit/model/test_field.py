"""Folders as people have them: what stock loading makes of one is walked, merged and measured, or it is refused."""

import json
import shutil

import pytest
import torch
from support.faults import REFUSED
from support.field import INDEX, SINGLE, WORKING, edit, rewrite, save, save_shards, save_two_generations
from support.models import LAYERS, make_tiny_model, save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mka.errors import CalibrationError, CheckpointError, NumericsError
from mka.model.checkpoint import open_checkpoint
from mka.model.companions import copy_companions
from mka.model.config import find_reader, spell_config
from mka.model.loading import load_model, open_decoder
from mka.model.stock import open_base
from mka.model.verification import verify_checkpoint
from mka.model.walk import run_layer
from mka.pipeline.inputs import Inputs
from mka.plan.plan import MergedLayer, MergePlan, identity_layers
from mka.terminal import showing
from mka.transforms.merge import merge_checkpoint

IDS = torch.tensor([[1, 5, 9, 33, 7, 12, 96, 3]])


def read(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def walk(checkpoint):
    """Logits of a model whose layers are read one after the other."""
    with open_decoder(checkpoint, "float32") as (decoder, _), torch.inference_mode():
        states, contexts = decoder.enter(IDS)
        for index, layer in enumerate(decoder.layers):
            with decoder.hold(index):
                states = run_layer(layer, states, contexts[index])
        with decoder.hold_head():
            return decoder.family.get_head(decoder.model)(decoder.norm(states))


@pytest.mark.parametrize("name", WORKING)
def test_a_folder_works_and_means_what_stock_makes_of_it(name, tmp_path):
    build, make = WORKING[name]
    checkpoint, expected = open_base(build(tmp_path / "m"), trust_remote_code=True), read(make())
    for trust in (False, True):
        assert torch.equal(read(load_model(checkpoint.path, "float32", trust)[0]), expected)
    torch.testing.assert_close(walk(checkpoint), expected)
    plan = MergePlan("test", "", LAYERS, identity_layers(LAYERS))
    merge_checkpoint(plan, checkpoint, tmp_path / "out", verify=verify_checkpoint)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(read(written), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w4").input_ids == [3, 4]
    assert open_base(tmp_path / "out").left_out == ()


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_is_refused_in_one_line_before_work_begins(name, tmp_path):
    build, words = REFUSED[name]
    folder = build(tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        open_base(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 700
    assert [word for word in words if word not in message] == [], message


def test_tensors_left_out_are_named(tmp_path, capsys):
    folder = WORKING["rotary frequencies"][0](tmp_path / "m")
    with showing(True):
        checkpoint = open_base(folder)
    assert len(checkpoint.left_out) == LAYERS
    assert f"{LAYERS} stored tensors are left out" in capsys.readouterr().err


def test_a_text_with_a_mark_that_has_no_row_is_refused(tmp_path):
    base = open_base(WORKING["mark without a row"][0](tmp_path / "m"))
    assert base.rowless == ("<picture>",)
    with pytest.raises(CalibrationError, match=r"held: a text holds '<picture>'"):
        Inputs(heldout={"plain": ["w3"], "held": ["w3", "w4 <picture> w5"]}).refuse_marks(base.rowless)
    Inputs(heldout={"plain": ["w3"]}).refuse_marks(base.rowless)
    with open_decoder(base, "float32") as (decoder, tokenizer):
        assert tokenizer("<picture>").input_ids == [97]
        with pytest.raises(CalibrationError, match="token 97, and the embedding has 97 rows"):
            decoder.enter(torch.tensor([[3, 97]]))


def drop_index(folder):
    (folder / INDEX).unlink()
    return folder


@pytest.mark.parametrize(
    "build",
    [save, save_shards, save_two_generations, lambda f: drop_index(save_two_generations(f))],
    ids=["single", "index", "both", "single and stale shards"],
)
def test_the_resolver_takes_what_stock_takes(build, tmp_path):
    folder = build(tmp_path / "m")
    stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == stock.keys()
    assert {info.file for info in checkpoint.tensors.values()} == (
        {SINGLE} if (folder / SINGLE).exists() else {file.name for file in folder.glob("model-*.safetensors")}
    )
    with checkpoint.reader() as tensor:
        assert all(torch.equal(tensor(name), value) for name, value in stock.items())


def test_every_byte_that_is_read_is_in_the_digest(tmp_path):
    folder = save_shards(tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    files = {info.file for info in open_checkpoint(folder).tensors.values()}
    files |= {"config.json", INDEX, "tokenizer.json", "additional_chat_templates/tool.jinja"}
    assert len(files) > 6
    before = open_checkpoint(folder).digest
    for name in files:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(
            whole[:-1] + bytes([whole[-1] ^ 1]) if "safetensors" in name and name != INDEX else whole + b" "
        )
        assert open_checkpoint(folder).digest != before, name
        (folder / name).write_bytes(whole)
    assert open_checkpoint(folder).digest == before


def test_a_list_of_sums_that_names_a_file_twice_is_refused(tmp_path):
    folder = save(tmp_path / "m")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ./{SINGLE}\n{'1' * 64}  {SINGLE}\n")
    with pytest.raises(CheckpointError, match=f"line 2: lists {SINGLE} again"):
        open_checkpoint(folder)


def test_companions_are_what_is_wanted_and_nothing_stale(tmp_path):
    folder, target = save(tmp_path / "m"), tmp_path / "out"
    stale = ("params.json", "consolidated.safetensors.index.json", "trainer_state.json", "latest", "rust_model.ot")
    stale += ("decoder_model.onnx_data", "model.nemo", "openvino_model.xml", "hf_quant_config.json", "modeling_x.py")
    wanted = ("LICENSE", "LICENSE-MODEL.txt", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "tokenizer.model.v3")
    for name in stale + wanted + ("tokenization_x.py",):
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.Slow", None]})
    target.mkdir()
    copy_companions(folder, target)
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenization_x.py", *wanted}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == kept | {"additional_chat_templates/tool_use.jinja"}


def test_gains_that_half_precision_cannot_hold_once_folded_are_said_to_be_so(tmp_path):
    model = make_tiny_model("llama")
    with torch.no_grad():
        for i in (2, 3):
            model.model.layers[i].post_attention_layernorm.weight[5] = 3000.0
            model.model.layers[i].mlp.up_proj.weight[0, 5] = 40.0
    folder = save_model(model.half(), tmp_path / "m")
    copies = identity_layers(LAYERS)
    layers = (*copies[:2], MergedLayer((2, 3), (0.5, 0.5)), *copies[4:])
    plan = MergePlan("test", "", LAYERS, layers)
    with pytest.raises(NumericsError) as caught:
        merge_checkpoint(plan, open_base(folder), tmp_path / "out")
    message = str(caught.value)
    assert "layers.2.mlp.up_proj.weight" in message and "F16" in message and "gains" in message
    assert "damaged" not in message and "bfloat16" in message and "\n" not in message
    rewrite(folder, lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.full((64, 32), float("nan")).half()})
    with pytest.raises(NumericsError, match="the source checkpoint is damaged"):
        merge_checkpoint(plan, open_base(folder), tmp_path / "out")


def old_rotary(body):
    """What readers before 5.0 make of a config: base and scaling from the top, the window's base apart."""
    return body.get("rope_theta"), body.get("rope_local_base_freq"), body.get("rope_scaling")


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, (5e5, None, None)),
        ("llama", {"rope_theta": 100000.0}, (100000.0, None, None)),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}},
            (3e4, None, {"rope_type": "linear", "factor": 2.0}),
        ),
        (
            "llama",
            {"rope_theta": 2e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            (2e4, None, {"type": "dynamic", "factor": 2.0}),
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                }
            },
            (1e6, 2e4, {"rope_type": "linear", "factor": 8.0}),
        ),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
                "original_max_position_embeddings": 16,
            },
            (1e4, None, {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
        ),
    ],
)
def test_rotary_settings_are_written_in_both_spellings(kind, given, expected, tmp_path):
    folder = save(tmp_path / "m", kind)
    body = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "rope_parameters"} | given
    spelled = spell_config(body, "test")
    assert old_rotary(spelled) == expected
    for name, document in (("given", body), ("spelled", spelled)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(document))
    found = [AutoConfig.from_pretrained(tmp_path / name).rope_parameters for name in ("given", "spelled")]
    for settings in found:
        settings.pop("type", None)  # the older name of rope_type
    assert found[0] == found[1]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("given", "spelled")]
    assert torch.equal(read(models[0]), read(models[1]))
    assert spell_config(spelled, "test") == spelled


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("kind", "given", "expected", "reader"),
    [
        (
            "qwen2",
            {"layer_types": [FULL] * 2 + [SLIDING] * 4, "max_window_layers": 9},
            {"max_window_layers": 2},
            "4.53",
        ),
        ("qwen2", {"layer_types": [FULL] * 6, "max_window_layers": 28}, {"max_window_layers": 6}, "4.37"),
        ("qwen2", {"layer_types": [SLIDING] + [FULL] * 5, "max_window_layers": 9}, {"max_window_layers": None}, "4.53"),
        (
            "gemma3_text",
            {"layer_types": [SLIDING, SLIDING, FULL] * 2, "sliding_window_pattern": 6},
            {"sliding_window_pattern": 3},
            "4.50",
        ),
        (
            "gemma3_text",
            {"layer_types": [SLIDING, FULL, FULL] * 2, "sliding_window_pattern": 6, "_sliding_window_pattern": 6},
            {"sliding_window_pattern": None, "_sliding_window_pattern": None},
            "4.53",
        ),
        ("gemma2", {"layer_types": [SLIDING, FULL] * 3}, {}, "4.42"),
        ("gemma2", {"layer_types": [FULL, SLIDING] * 3}, {}, "4.53"),
        ("smollm3", {"no_rope_layers": [1, 0] * 3}, {"no_rope_layer_interval": None}, "4.53"),
        ("mistral", {}, {}, "4.34"),
    ],
)
def test_superseded_keys_say_what_the_lists_say_or_nothing(kind, given, expected, reader, tmp_path):
    body = json.loads((save(tmp_path / "m", kind) / "config.json").read_text()) | given
    spelled = spell_config(body, "test")
    assert {key: spelled.get(key) for key in expected} == expected
    assert {key: spelled[key] for key in given if key in ("layer_types", "no_rope_layers")}.items() <= given.items()
    assert find_reader(spelled) == reader


def test_a_written_folder_says_the_same_to_older_readers(tmp_path):
    """Qwen 2 whose last layers look back over a window: cut, the count of the first ones follows."""
    folder = save_model(
        make_tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=4), tmp_path / "m"
    )
    edit(folder / "config.json", layer_types=..., max_window_layers=4)
    copies = identity_layers(LAYERS)
    layers = (copies[0], *copies[2:])
    merge_checkpoint(
        MergePlan("test", "", LAYERS, layers), open_base(folder), tmp_path / "out", verify=verify_checkpoint
    )
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["layer_types"] == [FULL] * 3 + [SLIDING] * 2 and written["max_window_layers"] == 3
