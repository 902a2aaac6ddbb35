"""Randomly initialised checkpoints of real models' shapes, written shard by shard: as large as the disk allows.

    python benchmarks/shapes.py llama-3-8b /tmp/llama-3-8b
    python benchmarks/shapes.py deep-2b /tmp/deep --layers 96

What is in the weights does not matter where bytes, memory and time are measured. Needs torch and safetensors only.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka.model.shards import write_tensors
from mka.model.tensors import TensorInfo
from mka.store.publishing import publish

# layers, hidden size, MLP width, heads, key-value heads, vocabulary
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256),
    "llama-3-1b": (16, 2048, 8192, 32, 8, 128256),
    # Many narrow layers: large beside any one of them.
    "deep-4b": (160, 1536, 4096, 24, 6, 32000),
    "deep-2b": (230, 1024, 2048, 16, 4, 16000),
    "tiny": (6, 64, 128, 4, 2, 97),
}


def make_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """Return config.json of a shape, untied, bfloat16."""
    count, width, inner, heads, groups, vocabulary = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers or count,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def list_tensors(config: dict[str, Any]) -> list[TensorInfo]:
    """List the tensors of a config, in the order of the layers."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], width)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm": (width,), "lm_head": (config["vocab_size"], width)}
    return [TensorInfo(f"{name}.weight", "", "BF16", shape) for name, shape in shapes.items()]


def draw_tensor(tensor: TensorInfo, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Draw a tensor in blocks of rows, scaled so that hidden states neither vanish nor explode; norms near 1."""
    if len(tensor.shape) == 1:
        drawn = torch.randn(tensor.shape, generator=generator, device=generator.device)
        yield (1 + 0.1 * drawn).bfloat16().cpu()
        return
    scale = 1.0 if "embed" in tensor.name else tensor.shape[1] ** -0.5
    step = max(1, (1 << 21) // tensor.shape[1])
    for first in range(0, tensor.shape[0], step):
        rows = min(step, tensor.shape[0] - first)
        drawn = torch.randn((rows, tensor.shape[1]), generator=generator, device=generator.device)
        yield drawn.mul_(scale).bfloat16().cpu()


def make_checkpoint(shape: str, output: Path, layers: int | None = None, device: str = "cpu") -> int:
    """Write a checkpoint; returns its bytes. A block of rows is in memory at a time, drawn on the device."""
    config = make_config(shape, layers)
    tensors = list_tensors(config)
    total = sum(tensor.nbytes for tensor in tensors)
    with publish(output, needed_bytes=total) as partial:
        generator = torch.Generator(device).manual_seed(0)
        write_tensors(partial, tensors, (draw_tensor(tensor, generator) for tensor in tensors))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return total


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description="Write a randomly initialised checkpoint of a real model's shape.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--layers", type=int, help="another number of layers")
    given = parser.parse_args()
    started = time.perf_counter()
    total = make_checkpoint(given.shape, given.output, given.layers)
    print(f"{given.output}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
