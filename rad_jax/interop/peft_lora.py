"""peft's LoRA adapters on a Llama: A is (R, in), B is (out, R)."""

import dataclasses

from rad_jax.interop.tables import Entry, Table, linear, stacked
from rad_jax.lora import LoraSpec
from rad_jax.models.llama import LlamaConfig

PREFIX = "base_model.model."  # what peft puts before the adapted model's own names
FILES = ("adapter_model.safetensors", "adapter_model.bin")


def plain_name(name: str) -> str:
    """The name on a language model alone, of an adapter that was trained inside a LLaVA of transformers 5 or 4."""
    for inside in ("model.language_model.layers.", "language_model.model.layers."):
        name = name.replace(PREFIX + inside, f"{PREFIX}model.layers.")
    return name.replace(".default.weight", ".weight")  # peft's name of the adapter, in a plain state_dict


def block(target: str) -> str:
    """The part of a layer that a projection belongs to, by its foreign name."""
    return "mlp" if target in ("gate", "up", "down") else "self_attn"


def table(config: LlamaConfig, spec: LoraSpec) -> Table:
    """Adapters of `spec.targets` in every layer; our side is the `lora` tree of the decoder ("layers/attn/q/a", ...)."""
    c, width, mlp = config, (config.width,), (config.mlp_dim,)
    heads, kv_heads = (c.heads, c.head_dim), (c.kv_heads, c.head_dim)
    axes = {
        "q": (width, heads),
        "k": (width, kv_heads),
        "v": (width, kv_heads),
        "o": (heads, width),
        "gate": (width, mlp),
        "up": (width, mlp),
        "down": (mlp, width),
    }
    entries: list[Entry] = []
    for target in spec.targets:
        ours = "mlp" if block(target) == "mlp" else "attn"
        name = f"{PREFIX}model.layers.{{}}.{block(target)}.{target}_proj"
        entries += _pair(f"layers/{ours}/{target}", name, *axes[target], spec.rank)
    return Table("peft LoRA", stacked(entries, c.depth))


def _pair(path: str, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int) -> list[Entry]:
    entries = []
    for leaf, source, target in (("a", inputs, (rank,)), ("b", (rank,), outputs)):
        (kernel,) = linear(path, f"{name}.lora_{leaf.upper()}", source, target, bias=False)
        entries.append(dataclasses.replace(kernel, leaves=((f"{path}/{leaf}", source + target),)))
    return entries
