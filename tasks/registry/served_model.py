"""The registered model as MLflow serves it: loaded from its stock folder on first use. Logged as code, not pickled."""

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class CausalLanguageModel(PythonModel):
    """Continues prompts greedily with the stock transformers model in the artifact ``model``."""

    def load_context(self, context: PythonModelContext) -> None:
        """Remember where the folder is; weights are read at the first prediction."""
        self.folder = context.artifacts["model"]
        self.loaded: Any = None

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return the continuation of each prompt; ``params`` may hold max_new_tokens."""
        if self.loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.loaded = AutoModelForCausalLM.from_pretrained(self.folder), AutoTokenizer.from_pretrained(self.folder)
        model, tokenizer = self.loaded
        continuations = []
        for prompt in model_input:
            tokens = tokenizer(prompt, return_tensors="pt")
            limit = int((params or {}).get("max_new_tokens", 32))
            output = model.generate(**tokens, max_new_tokens=limit, do_sample=False)
            continuations.append(tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
        return continuations


set_model(CausalLanguageModel())
