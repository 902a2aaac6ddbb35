"""A copy of a model is the one that was measured, or refused."""

import shutil

import pytest

from mka.errors import RegistryError, StoreError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.holding import refuse_other


@pytest.mark.parametrize(("alter", "said"), [("flip", "digest [0-9a-f]{16}, measured"), ("lose", "model.safetensors")])
@pytest.mark.parametrize("refusal", [StoreError, RegistryError])
def test_a_copy_that_is_another_or_none_is_refused_as_what_it_is(llama_folder, tmp_path, alter, said, refusal):
    digest = open_checkpoint(llama_folder).digest
    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    refuse_other(copy, digest, "the copy", "copy it again", refusal=refusal)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data) if alter == "flip" else weights.unlink()
    with pytest.raises(refusal, match=f"^the copy is not what was measured: .*{said}.*; copy it again$"):
        refuse_other(copy, digest, "the copy", "copy it again", refusal=refusal)
