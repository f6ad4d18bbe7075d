"""What goes out: a run or a base as the writers of foreign formats want it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rad_jax import lora, tasks
from rad_jax.checkpoint import Run
from rad_jax.errors import UserError
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig

TOWERS = ("clip", "siglip", "dinov2", "bert")


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model on its way out.

    Attributes:
        variables: `params`, and `lora` where `config` has adapters, as numpy or lazy arrays. Parts a format has no place for are left out.
        config: of the image-to-text model or the language model; None for towers alone.
        tokenizer: file of the language model's (or the text tower's) tokenizer, if there is one.
        sources: the runs and bases that the weights came from, by name: their step and the sha256 of their content; for the receipt.
        clip: of the contrastive towers, where they are all there.
        configs: foreign configuration files that the weights came with, by name.
        carried: foreign tensors that our models never use, by the format they came in.
    """

    variables: Mapping[str, Any]
    config: LlavaConfig | None
    tokenizer: Path | None
    sources: Mapping[str, Any]
    clip: ClipConfig | None = None
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether the language model came with its embedding for a head, and has it still: a head that trained is its own."""
        config = self.configs.get("config.json", {})
        return bool(config.get("tie_word_embeddings"))

    def merged(self) -> dict[str, Any]:
        """The parameters with adapters folded in, lazily.

        Raises:
            UserError: the config has adapters and the variables have none.
        """
        params = dict(self.variables["params"])
        if self.config is None or self.config.lora is None:
            return params
        if "lora" not in self.variables:
            raise UserError(
                "the config has LoRA adapters but the checkpoint has none: export the run that trained them."
            )
        return lora.merge(params, self.variables["lora"], self.config.lora)


def from_run(run: Run) -> Exported:
    """A run or a base, with what the bases under it brought along.

    Raises:
        UserError: its projector is one that no other program's format holds.
    """
    model: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    carried: dict[str, Mapping[str, np.ndarray]] = {}
    for part in run.chain():  # later ones win
        model |= {key: value for key, value in part.config["model"].items() if value}
        if part.source.get("format") not in TOWERS:  # whose config.json says nothing of the whole
            configs |= part.source.get("configs", {})
        carried |= {part.source["format"]: part.carried} if part.carried else {}
    config = tasks.model_config(SimpleNamespace(task="generative", model=model)) if "llm" in model else None
    assert not isinstance(config, ClipConfig)
    if config is not None and config.projector != "mlp2x_gelu":
        raise UserError(
            f"{run.path}: its projector is {config.projector}, for comparisons here: no format to export to has one."
        )
    clip = None
    if "text" in model and "vision" in model:
        vision = VitConfig(**{**model["vision"], "feature_layer": None})
        clip = ClipConfig(vision, BertConfig(**model["text"]), model["embed_dim"], model.get("loss", "softmax"))
    return Exported(
        run.variables,
        config,
        None if run.tokenizer is None else run.tokenizer_file,
        {part.path.name: {"step": part.step, "sha256": part.sha256} for part in run.chain()},
        clip,
        configs,
        carried,
    )
