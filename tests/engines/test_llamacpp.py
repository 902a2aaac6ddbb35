"""llama.cpp loads what was exported and computes what transformers does of the folder.

The package xllamacpp has to be importable: ``PYTHONPATH=ENVIRONMENT/lib/python3.11/site-packages pytest -m engines
tests/engines``.
"""

import json
from urllib.request import Request, urlopen

import gguf
import pytest
import torch
from support.models import FAMILY_NAMES, make_byte_tokenizer, make_sentencepiece_tokenizer, make_tiny_model, save_model
from support.rounded import write_mixed
from transformers import AutoModelForCausalLM

from mka.cli.main import main
from mka.engines import ENGINES
from mka.export.gguf import write_gguf
from mka.model.checkpoint import open_checkpoint
from mka.recipe import QuantizeSettings
from mka.transforms.rtn import quantize_checkpoint

pytestmark = pytest.mark.engines
xllamacpp = pytest.importorskip("xllamacpp")

# Longer than the windows of the tiny models that have them.
PROMPT = list(range(3, 25))
VOCABULARY = 320
_LENGTH = {"original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LENGTH}
# llama.cpp takes the short factors if its whole context is within the original one, transformers if the text is.
_WITHIN = {"original_max_position_embeddings": 1024}
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], **_WITHIN}
_THETA = {"rope_theta": 10000.0}
_REGULAR = {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}
MODELS = [
    *((family, _REGULAR if family == "gemma3_text" else {}) for family in FAMILY_NAMES),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": _THETA | _LLAMA3}),
    ("qwen2", {"rope_parameters": _THETA | {"rope_type": "linear", "factor": 2.0}}),
    ("qwen3", {"rope_parameters": _THETA | {"rope_type": "yarn", "factor": 4.0, **_LENGTH}}),
    (
        "phi3",
        {"rope_parameters": _THETA | {"rope_type": "longrope", **_FACTORS}, **_WITHIN, "max_position_embeddings": 2048},
    ),
    ("gemma2", {"query_pre_attn_scalar": 2}),
    ("gemma3_text", {"query_pre_attn_scalar": 2, "layer_types": ["sliding_attention"] * 6}),
]
TEXTS = ["the cat sat", "  then 2025 cats!\n\nI've 12: she'll", "thé \U0001f408 <think>mat"]


@pytest.fixture
def export(tmp_path):
    def export(model, file_type="f32", tokenizer=None):
        target = tmp_path / "out"
        target.mkdir()
        folder = save_model(model, tmp_path / "model", tokenizer=tokenizer or make_byte_tokenizer())
        return write_gguf(folder, target, file_type)

    return export


@pytest.fixture
def ask():
    """Start llama.cpp's server on a file, its cache in float32, and ask it once."""
    servers = []

    def ask(file, path, **asked):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        servers.append(xllamacpp.Server(parameters))
        address = f"{servers[-1].listening_address}/{path}"
        request = Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    yield ask
    servers.clear()


def read_choices(ask, file):
    """Return llama.cpp's log-probabilities of the token behind the prompt, (V,)."""
    answer = ask(file, "completion", prompt=PROMPT, n_predict=1, temperature=0, n_probs=VOCABULARY)
    found = {choice["id"]: choice["logprob"] for choice in answer["completion_probabilities"][0]["top_logprobs"]}
    assert len(found) == VOCABULARY
    return torch.tensor([found[i] for i in range(VOCABULARY)])


def compute_choices(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


def is_said(tokenizer, choices):
    """llama.cpp holds a token back, and its probabilities with it, while it is part of a character."""
    return tokenizer.decode([int(choices.argmax())], skip_special_tokens=True).strip("\ufffd").isalnum()


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_llama_cpp_computes_what_the_folder_does(family, overrides, export, ask):
    tokenizer = make_byte_tokenizer()
    for seed in range(20):
        model = make_tiny_model(family, seed=seed, vocab_size=VOCABULARY, **overrides)
        expected = compute_choices(model)
        if is_said(tokenizer, expected):
            break
    found = read_choices(ask, export(model))
    # Its GELU is a table of float16.
    assert (found - expected).abs().max() < (5e-3 if family.startswith("gemma") else 5e-4)
    assert expected.max() - expected.min() > 0.5


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("q6_k", {"Q6_K"}),
        ("q5_k_m", {"Q5_K", "Q6_K"}),
        ("q4_k_m", {"Q4_K", "Q6_K"}),
        ("q8_0", {"Q8_0"}),
        ("q4_0", set()),
    ],
)
def test_rounded_files_load_and_err_little(name, kinds, export, ask):
    """Random weights hide nothing: errors of the log-probabilities double with every bit less."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
    model = make_tiny_model("llama", vocab_size=VOCABULARY, **sizes)
    file = export(model, name)
    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert stored == {"F32"} | (kinds or {"Q4_0", "Q8_0"})
    expected, found = compute_choices(model), read_choices(ask, file)
    most = {"q8_0": 0.1, "q6_k": 0.25, "q5_k_m": 0.5, "q4_k_m": 0.9, "q4_0": 0.9}[name]
    assert (found - expected).std() < most * expected.std()


@pytest.mark.parametrize(
    ("scheme", "kind", "most"),
    [
        ("int8", "Q8_0", 0.1),
        ("int7", "Q8_0", 0.1),
        ("int6", "Q6_K", 0.15),
        ("int5", "Q5_0", 0.1),
        ("int4", "Q4_0", 0.1),
        ("int3", "Q3_K", 0.15),
        ("int2", "Q2_K", 0.25),
    ],
)
def test_whole_numbers_that_were_kept_are_read_as_they_are(scheme, kind, most, ask, tmp_path):
    """All bits give what stock loading makes of the folder; what rounding itself moved is several times as much.

    llama.cpp rounds what goes into a product to 8 bits, and the scales of the types with K are whole numbers.
    """
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
    settings = QuantizeSettings(scheme=scheme, group_size=32, embeddings="int8" if scheme == "int8" else "off")
    tokenizer = make_byte_tokenizer()
    for seed in range(20):
        model = make_tiny_model("llama", seed=seed, vocab_size=VOCABULARY, **sizes)
        base, folder = save_model(model, tmp_path / f"base-{seed}", tokenizer=tokenizer), tmp_path / f"rounded-{seed}"
        quantize_checkpoint(open_checkpoint(base), folder, settings)
        expected = compute_choices(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        if is_said(tokenizer, expected):
            break
    file = write_gguf(folder, tmp_path, "rounded")
    assert kind in {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if ".ffn_up" in tensor.name}
    found = read_choices(ask, file)
    assert (found - expected).std() < most * expected.std()
    if scheme != "int8":
        assert (compute_choices(model) - expected).std() > 2 * (found - expected).std()


def test_a_rounded_folder_is_served_beside_its_base(tmp_path, monkeypatch, capsys):
    """Each by its own file: the folder's numbers of all bits as they are, the base in the type of the arithmetic."""
    if not ENGINES["llama.cpp"].environment.is_file():
        pytest.skip("llama.cpp is not installed: make engines")
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
    model = make_tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=512, **sizes)
    tokenizer = make_byte_tokenizer()
    with torch.no_grad():
        for token in range(VOCABULARY):
            if not tokenizer.decode([token], skip_special_tokens=True).strip("\ufffd"):
                model.lm_head.weight[token] = 0.0  # below the best of the others
    base = save_model(model, tmp_path / "base", tokenizer=tokenizer)
    folder = write_mixed(open_checkpoint(base), tmp_path / "mixed", embeddings="int8")
    capsys.readouterr()
    timing = ["--concurrency", "1", "--prompt-tokens", "16", "--new-tokens", "6", "--rounds", "1", "--limit", "300"]
    asked = ["serve-check", str(folder), "--engine", "llama.cpp", "--base", str(base), *timing]
    code = main(["--no-progress", *asked, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["verdict"], report["reason"]) == (0, "pass", None)
    assert report["conditions"]["file_types"] == {"candidate": "rounded", "base": "f32"}
    found, beside = report["candidate"]["agreement"], report["base"]["agreement"]
    # What goes into a product of rounded weights is rounded, too; the base's arithmetic is transformers' own.
    assert beside["largest_error"] < beside["tolerance"] < found["tolerance"]
    assert beside["largest_error"] < found["largest_error"]
    # The base's weights have 32 bits each, the candidate's 8.5 at most.
    assert report["expected"]["decode_tokens_per_second"] > 32 / 8.5


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_llama_cpp_cuts_and_merges_text_as_the_folder_does(cut, export, ask):
    tokenizer = make_byte_tokenizer(cut, add_bos=cut == "llama-bpe")
    file = export(make_tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=1), "q8_0", tokenizer)
    for text in TEXTS:
        found = ask(file, "tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert found == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_merges_by_the_scores_as_the_folder_does_by_merges(prefix, export, ask):
    tokenizer = make_sentencepiece_tokenizer(prefix=prefix)
    file = export(make_tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=1), "q8_0", tokenizer)
    for text in TEXTS:
        found = ask(file, "tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert found == tokenizer(text)["input_ids"]
