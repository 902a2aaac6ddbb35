"""Libraries kept from talking on the terminal: what matters is raised, measured or shown as this project's own bars."""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from unittest import mock

# Modules of compressed-tensors that draw bars and offer no switch for them.
_BARS = ("quantization.lifecycle.apply", "offload.dispatch", "compressors.model_compressors.model_compressor")


@contextlib.contextmanager
def quiet_libraries(quantized: bool = False) -> Iterator[None]:
    """Keep the model libraries' own bars, reports and advice off the terminal; what matters is raised or measured.

    Args:
        quantized: whether a quantized folder will be loaded.
    """
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    names = ("accelerate", "compressed_tensors", "lm_eval", "datasets", "huggingface_hub")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            # Stock loading of quantized folders draws these bars and offers no switch.
            for name in _BARS if quantized else ():
                module = importlib.import_module(f"compressed_tensors.{name}")
                stack.enter_context(mock.patch.object(module, "tqdm", lambda items, **_: items))
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
