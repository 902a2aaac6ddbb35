"""How models are asked: in their chat template, after an instruction, and by lm-eval's own model classes."""

from importlib.util import find_spec

import pytest
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from support.models import make_texts, make_tiny_model, make_tokenizer, save_model
from support.task_tables import define, save_items
from transformers import AutoModelForCausalLM

import mka.outside.rendering as rendering
from mka.errors import EngineError, GuardError, NumericsError, RecipeError
from mka.evaluation.evaluate import evaluate_checkpoint, pair_scores
from mka.evaluation.scores import EvalReport
from mka.evaluation.task_models import Asked, open_model
from mka.evaluation.tasks import run_tasks
from mka.recipe import EvaluationSettings, ModelArguments

WORDS = make_texts(6, seed=9)
TURNS = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}w4 {{ eos_token }}{% endif %}"


@pytest.fixture
def folder(tmp_path):
    return save_items(tmp_path, WORDS)


class Listening(HFLM):
    """Keeps what it is asked."""

    def __init__(self, **options):
        super().__init__(**options)
        self.truncated, self.heard = {}, []

    def loglikelihood(self, requests, disable_tqdm=False):
        self.heard += [request.args for request in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


def listen(folder, asked=None, template=TEMPLATE, **told):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    model = make_tiny_model("llama", max_position_embeddings=512).eval()
    lm = Listening(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=512)
    run_tasks(lm, None, {"mine": None}, tasks_folder=folder, progress=False, asked=asked, **told)
    return lm.heard, tokenizer


def test_items_are_asked_in_plain_text_unless_a_chat_template_is_asked_for(folder):
    heard, _ = listen(folder)
    assert heard[0] == (WORDS[0], " w3")
    assert listen(folder, Asked("auto"), template=None)[0] == heard
    with pytest.raises(RecipeError, match="chat_template on: the model's tokenizer has no chat template"):
        listen(folder, Asked("on"), template=None)


@pytest.mark.parametrize("asked", ["auto", "on"])
def test_a_chat_template_makes_turns_as_transformers_does(folder, asked):
    heard, tokenizer = listen(folder, Asked(asked, "be brief"))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": WORDS[0]}]
    made = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert heard[0] == (made, "w3") and "be brief" in made


def test_examples_are_turns_too_and_as_many_as_the_definition_says(folder):
    define(folder, num_fewshot=2, fewshot_config={"sampler": "first_n"})
    heard, _ = listen(folder, Asked("on"), shots=None)
    assert heard[0][0].count("w1 ") >= 5 and heard[0][0].count("w2 ") >= 5  # two examples are four turns
    plain, _ = listen(folder, shots=None)
    assert plain[0][0] == f"{WORDS[0]} w3\n\n{WORDS[1]} w9 w4\n\n{WORDS[0]}"
    assert listen(folder, shots=1)[0][0][0].count("\n\n") == 1


def test_a_chat_template_without_a_system_turn_loses_it_and_one_without_end_is_given_up(folder, monkeypatch):
    closed = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    heard, _ = listen(folder, Asked("on", "be brief"), template=closed)
    assert "be brief" not in heard[0][0] and WORDS[0] in heard[0][0]
    with pytest.raises(RecipeError, match="the model's chat template fails on an item: UndefinedError"):
        listen(folder, Asked("on"), template="{{ nothing.at.all }}")
    monkeypatch.setattr(rendering, "LIMIT", 1.0)
    endless = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
    with pytest.raises(RecipeError, match=r"the model's chat template takes more than 1 s"):
        listen(folder, Asked("on"), template=endless)


class Served(HFLM):
    """Stands in the place of a model class that has an engine of its own."""

    def __init__(self, pretrained, **options):
        self.told.append({"pretrained": pretrained, **options})
        model = AutoModelForCausalLM.from_pretrained(pretrained).eval()
        super().__init__(pretrained=model, tokenizer=make_tokenizer(), batch_size=2, max_length=512)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(Served, "told", [], raising=False)
    monkeypatch.setitem(model_registry._objs, "vllm", Served)
    return Served.told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = make_tiny_model("llama", max_position_embeddings=512)
    return save_model(made, tmp_path_factory.mktemp("served") / "model", tokenizer=make_tokenizer())


def measure(checkpoint, folder, **settings):
    settings = EvaluationSettings(text=None, prompts=(), tasks={"mine": None}, tasks_folder=folder, **settings)
    told = {"dtype": "float32", "seed": 0, "heldout": {}, "checkpoint_facts": {}, "progress": False, "speed": False}
    return evaluate_checkpoint(checkpoint, settings, **told)


def test_lm_evals_own_model_class_is_handed_the_folder_and_scores_alike(model, folder, served):
    here = measure(model, folder)
    apart = measure(model, folder, model="vllm", model_args={"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5})
    assert [score.items for score in apart.scores] == [score.items for score in here.scores]
    assert served == [
        {
            "pretrained": str(model),
            "dtype": "float32",
            "trust_remote_code": False,
            "batch_size": "auto",
            "seed": 0,
            "tensor_parallel_size": 2,
            "gpu_memory_utilization": 0.5,
        }
    ]
    assert apart.conditions["answered_by"]["model"] == "vllm" and here.conditions["answered_by"] == {"model": "hf"}
    with pytest.raises(GuardError, match="answered_by differs between base and candidate"):
        pair_scores(here, apart)
    former = EvalReport({}, here.scores, {}, {}, {})  # of before this was written down
    assert len(pair_scores(former, here)) == 1


def test_beside_it_other_metrics_are_of_the_model_here(model, folder, served):
    settings = {"model": "vllm", "generation": 2}
    apart = measure(model, folder, **settings)
    assert [score.metric for score in apart.scores] == ["acc", "copying", "retrieval", "repetition"]
    assert len(served) == 1


def test_what_it_says_that_is_no_number_is_refused(model, folder, served, monkeypatch):
    nothing = float("nan")
    monkeypatch.setattr(
        Served, "_loglikelihood_tokens", lambda self, requests, **_: [(nothing, False)] * len(requests), raising=False
    )
    with pytest.raises(NumericsError, match="task 'mine': a log-likelihood is nan"):
        measure(model, folder, model="vllm")


def test_a_package_that_is_missing_and_a_folder_that_does_not_load_are_told_in_one_line(
    model, folder, tmp_path, served
):
    with pytest.raises(EngineError, match=r"lm-eval's vllm does not load .*missing") as refused:
        open_model("vllm", tmp_path / "missing", ModelArguments(), dtype="float32", batch_size=1, seed=0)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="it is installed here")
def test_vllm_itself_is_asked_for_where_it_is_not_installed(model, folder):
    with pytest.raises(EngineError, match=r"evaluation\.model vllm needs the package vllm.*lm-eval\[vllm\]") as told:
        measure(model, folder, model="vllm")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_args": {"gpu_memory_utilization": 0.5}}, "belongs to model vllm"),
        ({"model_args": {"dtype": "float16"}}, "goes with model vllm"),
        ({"model": "openai-completions"}, "'hf' or 'vllm'"),
        ({"model": "vllm", "model_args": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"model": "vllm", "model_args": {"gpu_memory_utilization": 1.5}}, "less than or equal to 1"),
    ],
)
def test_arguments_are_a_closed_list(settings, said):
    with pytest.raises(ValueError, match=said):
        EvaluationSettings(**settings)
    plain = EvaluationSettings()
    assert EvaluationSettings.model_validate(plain.model_dump(mode="json")) == plain  # as runs hand recipes on
