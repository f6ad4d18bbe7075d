"""What every experiment has: one flat record with the defaults of the original's trainer (Hugging Face's AdamW and cosine schedule)."""

from typing import Any

import ml_collections


def experiment(
    task: str, model: dict[str, Any], trainable: tuple[str, ...], data: dict[str, Any], steps: int, batch_size: int
) -> ml_collections.ConfigDict:
    """An experiment.

    Args:
        task: "contrastive" or "generative".
        model: shapes of the parts: vision, text and embed_dim, or vision, llm and lora.
        trainable: regular expressions over variable paths ("params/projector/.*"); everything else is frozen.
        data: template, text_length (T), target_length (U).
        steps: optimizer steps.
        batch_size: rows of the global batch.
    """
    return ml_collections.ConfigDict(
        {
            "task": task,
            "model": model,
            "trainable": trainable,
            "frozen_dtype": "float32",
            "data": {"split": "train", "selection": "frontal", "num_threads": 2, "target_length": 0, **data},
            "steps": steps,
            "batch_size": batch_size,
            "num_micro": 1,
            "compiler_options": {},
            "dropout_bits": "threefry2x32",
            "optimizer": {
                "peak_lr": 1e-3,
                "warmup_ratio": 0.03,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip": 0.0,
            },
            "seed": 42,
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "log_every": 10,
            # A checkpoint after so many steps, and, where a row is logged, when the last is so many minutes old (0: by steps alone).
            "checkpoint_every": 1000,
            "checkpoint_minutes": 10.0,
            "keep_checkpoints": 2,
            # Findings written for the first so many studies of a split, so many at once, and scored every so many steps (0: never).
            # metric: the one that chooses the best checkpoint; "" is that of findings.
            "evaluate": {
                "every": 0,
                "split": "validation",
                "selection": "frontal",
                "studies": 128,
                "batch_size": 64,
                "max_new_tokens": 256,
                "metric": "",
            },
        }
    )
