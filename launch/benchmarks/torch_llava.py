"""The other side: transformers' LlavaForConditionalGeneration, trained and used the way its users do."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rad_jax.images import normalise
from rad_jax.prompts import IMAGE_ID

if TYPE_CHECKING:
    from launch.benchmarks.llava import Problem

ATTENTION = ("sdpa", "eager")
WEIGHTS = "weights.safetensors"


def training(problem: "Problem", whole: bool, attention: str) -> Callable[[], float]:
    """An optimizer step with projector and (with `whole`) language model trained: AdamW, clipping, cosine schedule; gives the loss."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    net = model(problem, attention)
    net.requires_grad_(whole)
    net.model.vision_tower.requires_grad_(False)
    net.model.multi_modal_projector.requires_grad_(True)
    net.train()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=problem.learning_rate, weight_decay=0.0, fused=True)
    warmup = -(-problem.steps * 3 // 100)
    rate = get_cosine_schedule_with_warmup(optimizer, warmup, problem.steps)
    rows = inputs(problem, problem.batch, problem.after)
    labels = rows["input_ids"].clone()
    labels[:, : -(problem.after - 1)] = -100

    def step() -> float:
        loss = net(**rows, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def writing(problem: "Problem", attention: str) -> Callable[[int, int], list[list[int]]]:
    """`generate`, greedy, of so many rows and new tokens; gives their ids."""
    import torch

    net = model(problem, attention).eval()
    prompts = functools.cache(lambda batch: inputs(problem, batch, problem.asked))

    @torch.inference_mode()
    def write(batch: int, new_tokens: int) -> list[list[int]]:
        rows = prompts(batch)
        ids = net.generate(
            **rows,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return ids[:, rows["input_ids"].shape[1] :].tolist()

    return write


def model(problem: "Problem", attention: str) -> Any:
    """The model with the weights in `problem.folder`, all of them, on as many threads as this process has cores."""
    import os

    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    v, t = problem.vision, problem.llm
    vision = transformers.ViTConfig(
        image_size=v.image_size, patch_size=v.patch_size, hidden_size=v.width, num_hidden_layers=v.depth,
        num_attention_heads=v.heads, intermediate_size=v.mlp_dim, layer_norm_eps=v.eps,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=t.vocab_size, hidden_size=t.width, num_hidden_layers=t.depth, num_attention_heads=t.heads,
        num_key_value_heads=t.kv_heads, intermediate_size=t.mlp_dim, rms_norm_eps=t.eps, tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=t.vocab_size - 1, image_seq_length=v.patches,
        vision_feature_layer=v.feature_layer, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    net = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    net.load_state_dict(load_file(problem.folder / WEIGHTS))
    # The tower is frozen: no gradient, and nothing kept for one.
    net.model.vision_tower.forward = torch.no_grad()(net.model.vision_tower.forward)
    return net


def inputs(problem: "Problem", batch: int, after: int) -> dict[str, Any]:
    """What its processor would give for the batch: the image's id once per patch, pixels normalised."""
    import numpy as np
    import torch

    rows = problem.rows(batch, after)
    repeats = np.where(rows["tokens"][0] == IMAGE_ID, problem.vision.patches, 1)
    ids = np.repeat(np.where(rows["tokens"] == IMAGE_ID, problem.llm.vocab_size - 1, rows["tokens"]), repeats, axis=1)
    pixels = normalise(rows["image"], np, problem.vision.pixel_mean, problem.vision.pixel_std).transpose(0, 3, 1, 2)
    tokens = torch.from_numpy(ids.astype(np.int64))
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels, np.float32)),
    }
