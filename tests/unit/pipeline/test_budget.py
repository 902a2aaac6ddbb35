"""`mka budget`: what depth loses, what bits lose, and which of both the bytes are better spent on."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.bench import make_bench_folder
from support.lines import split_stages
from transformers import AutoModelForCausalLM

from mka.alignment.gptq import MEASURED, choose_bits, cut_windows
from mka.cli.main import main
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import load_tokenizer, open_decoder
from mka.pipeline.target import foresee_rounded, least_bytes
from mka.plan.plan import MergePlan, keep_layers
from mka.recipe import QuantizeSettings
from mka.texts.rows import read_texts
from mka.transforms.merge import merge_checkpoint

LAYERS = 6
MIXED = {"scheme": "mixed", "rounding": "gptaq", "group_size": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("budget"))


@pytest.fixture
def ask(place, monkeypatch, capsys):
    """Run `mka budget` with options; returns its offers, layers and bytes -> the rest, and what it printed."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MKA_WORK", str(place / "work"))

    def run(*options, code=0, **changes):
        recipe = {
            "name": "tiny",
            "model": {"folder": "base"},
            "calibration": {"path": "calibration.jsonl", "samples": 60, "max_tokens": 16, "rev": None},
            "method": {"name": "shortgpt"},
            "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
            "quantize": {"scheme": "int8", "group_size": 16},
            "evaluation": {"text": "heldout.jsonl"},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        assert main(["budget", "recipe.yaml", *options]) == code
        shown = capsys.readouterr()
        if code:
            return {}, shown.err
        assert main(["budget", "recipe.yaml", *options, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        run.share = document["share"]
        return {(offer["layers"], offer["nbytes"]): offer for offer in document["offers"]}, shown.out

    return run


def measured_windows(base):
    settings = QuantizeSettings(**MIXED, bytes=1e15)
    return cut_windows(base, settings, load_tokenizer(base.path), read_texts(Path("calibration.jsonl")))[:MEASURED]


def test_depth_loses_the_divergence_of_the_stock_models(ask, place, tmp_path):
    found, _ = ask("--layers", "6", "--layers", "4", "--bytes", "1GB")
    base = open_checkpoint(place / "base")
    plans = [MergePlan.load(path) for path in (place / "work/stages").glob("plan-*/plan.json")]
    kept = [layer.leader for plan in plans for layer in plan.layers if len(plan.layers) == 4]
    assert len(kept) == 4 and found[6, 1e9]["depth"] == 0.0
    merge_checkpoint(MergePlan("test", "", LAYERS, keep_layers(kept)), base, tmp_path / "cut")
    models = [
        AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval() for at in (base.path, tmp_path / "cut")
    ]
    with torch.no_grad():
        p, q = (torch.log_softmax(model(measured_windows(base)).logits.double(), -1) for model in models)
    assert found[4, 1e9]["depth"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    # Bits are no question where there is room for the most of them.
    assert found[4, 1e9]["total"] == pytest.approx(found[4, 1e9]["depth"], abs=1e-4)


def test_a_refit_loses_less(ask):
    plain, _ = ask("--layers", "3", "--bytes", "1GB")
    refitted, _ = ask("--layers", "3", "--bytes", "1GB", alignment={"enabled": True, "rev": None})
    assert 0 < refitted[3, 1e9]["depth"] < plain[3, 1e9]["depth"]


def test_bits_of_all_layers_are_those_that_rounding_would_choose_and_lose_what_was_measured(ask, place):
    base = open_checkpoint(place / "base")
    three = foresee_rounded(base, QuantizeSettings(scheme="int3", group_size=16), LAYERS)
    found, said = ask("--layers", "6", "--bytes", f"{three}B")
    settings = QuantizeSettings(**MIXED, bytes=three)
    with open_decoder(base, "float32", False) as (decoder, _):
        _, expected = choose_bits(base, settings, decoder, measured_windows(base))
    assert ask.share["expected"] == pytest.approx(expected, rel=1e-6)
    # Measured with these very layers and bytes.
    assert found[6, float(three)]["rounding"] == pytest.approx(ask.share["measured"], rel=1e-6)
    assert f"seen with all layers at {three / 1000:g} kB" in said
    # Whatever else is asked for, it is measured there.
    before = ask.share
    ask("--layers", "6", "--bytes", "80kB")
    assert ask.share == before


def test_more_bytes_never_lose_more_and_none_has_more_than_there_are(ask, place):
    budgets = [50_000, 56_000, 62_000, 70_000]
    found, said = ask("--layers", "6", "--layers", "5", *[f"--bytes={size}" for size in budgets])
    base, settings = open_checkpoint(place / "base"), QuantizeSettings(**MIXED, bytes=1e15)
    for layers in (6, 5):
        lost = [found[layers, float(size)]["rounding"] for size in budgets]
        there = [value for value in lost if value is not None]
        assert there == sorted(there, reverse=True) and there
        least = least_bytes(base, settings, layers)
        assert [value is None for value in lost] == [size < least for size in budgets]
        # Every linear layer at the fewest bits has four with its scales; what is left of the bytes is more bits.
        weights = sum(i.parameters for n, i in base.tensors.items() if "_proj" in n) * layers / LAYERS
        for size in budgets:
            if (bits := found[layers, float(size)]["bits"]) is not None:
                assert least + (bits - 4.0) * weights / 8 <= size + 1
    assert "too few bytes" in said and said.count("*") == len(budgets) + 1  # and what it stands for


def test_the_least_loss_of_its_bytes_is_starred(ask):
    found, said = ask("--bytes", "1GB", "--bytes", "56kB")
    assert sorted({layers for layers, _ in found}, reverse=True) == [6, 5, 4]
    starred = [line.split() for line in said.splitlines() if line.endswith("*")]
    for size, line in zip((1e9, 56_000.0), starred, strict=True):
        totals = {layers: one["total"] for (layers, nbytes), one in found.items() if nbytes == size}
        best = min((total, -layers) for layers, total in totals.items() if total is not None)
        assert int(line[-6]) == -best[1]
    # All layers in eight bits lose nothing that fewer layers could win back.
    assert min((one["total"], -layers) for (layers, size), one in found.items() if size == 1e9)[1] == -6


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--layers", "7"), {}, "7 layers: the model has 6; allowed: 1 to 6"),
        (("--bytes", "much"), {}, "'much' is no size, e.g. 80MB"),
        ((), {"method": {"name": "replaceme"}}, "folds a correction into the model"),
        ((), {"transforms": [{"name": "cast", "settings": {"dtype": "bfloat16"}}]}, "transforms are not counted"),
        ((), {"calibration": {"path": "no.jsonl", "rev": None}}, "no.jsonl"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(ask, options, changes, message):
    _, said = ask("--layers", "4", *options, code=2, **changes)
    said = split_stages(said)[1]
    assert message in said and said.count("\n") == 1


def test_a_number_of_layers_that_cannot_be_reached_is_marked_and_the_others_are_told(ask):
    found, said = ask("--layers", "5", "--layers", "1", "--bytes", "1GB")
    assert found[5, 1e9]["total"] is not None and found[5, 1e9]["refusal"] is None
    assert found[1, 1e9]["depth"] is None and "target of 1 layers cannot be reached" in found[1, 1e9]["refusal"]
    assert any(line.split()[-2:] == ["not", "reached"] for line in said.splitlines())
    assert "1 layers: target of 1 layers cannot be reached" in said
    _, said = ask("--layers", "1", "--bytes", "1GB", code=2)
    assert "target of 1 layers cannot be reached" in said
