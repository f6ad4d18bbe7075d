"""An exported bundle in PyTorch, through transformers alone: what anyone else would make of it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.images import normalise
from rad_jax.prompts import question
from rad_jax.serving.bundle import check_files


@dataclasses.dataclass(frozen=True)
class Reference:
    """A loaded bundle: transformers' model and processor, and the contents of `receipt.json`."""

    model: Any
    processor: Any
    record: dict[str, Any]

    def prompt(self, image: np.ndarray, indication: str | None) -> list[int]:
        """Token ids of the conversation's template, the image's placeholder once per patch.

        Args:
            image: uint8 [Y, X], square, of the tower's size.
            indication: None where there is none.
        """
        content = [{"type": "image"}, {"type": "text", "text": question(indication)}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self._processed(image, text)["input_ids"][0].tolist()

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """What the bundle's own image processor makes of uint8 [Y, X]: float32 [Y, X, C]."""
        return self._processed(image, "<image>")["pixel_values"][0].permute(1, 2, 0).numpy()

    def features(self, image: np.ndarray) -> np.ndarray:
        """Patch features of the chosen block, float32 [P, D], of uint8 [Y, X]."""
        import torch

        tower = self.model.model.vision_tower
        with torch.inference_mode():
            states = tower(self._tensor(image), output_hidden_states=True).hidden_states
        config = self.model.config
        first = 1 if config.vision_feature_select_strategy == "default" else 0  # "default" drops the class token
        return states[config.vision_feature_layer][0, first:].float().cpu().numpy()

    def logits(self, ids: list[int], image: np.ndarray) -> np.ndarray:
        """Logits float32 [S, V] of one row of ids, placeholders expanded."""
        import torch

        with torch.inference_mode():
            output = self.model(input_ids=self._ids(ids), pixel_values=self._tensor(image))
        return output.logits[0].float().cpu().numpy()

    def greedy(self, ids: list[int], image: np.ndarray, max_new_tokens: int) -> list[int]:
        """Ids that `generate` adds to the prompt with the bundle's own settings, the end of sequence included."""
        import torch

        tokens = self._ids(ids)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=self._tensor(image),
                max_new_tokens=max_new_tokens,
            )
        return output[0, len(ids) :].tolist()

    def activations(self, image: np.ndarray, indication: str | None) -> dict[str, float]:
        """Greatest absolute output of each block of tower and decoder on one prompt, by the block's name."""
        import torch

        found: dict[str, float] = {}

        def hook(name: str) -> Any:
            def look(_: Any, __: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                found[name] = float(states.abs().max())

            return look

        blocks = re.compile(r"(?:.*\.)?(?:layer|layers|encoder\.layers)\.\d+")
        named = [(n, m) for n, m in self.model.named_modules() if blocks.fullmatch(n)]
        hooks = [module.register_forward_hook(hook(name)) for name, module in named]
        try:
            with torch.inference_mode():
                self.model(input_ids=self._ids(self.prompt(image, indication)), pixel_values=self._tensor(image))
        finally:
            for handle in hooks:
                handle.remove()
        return found

    def text(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _tensor(self, image: np.ndarray) -> Any:
        """uint8 [Y, X] prepared as in training, with the statistics of the bundle, as torch's [1, C, Y, X]."""
        import torch

        way = self.processor.image_processor
        pixels = normalise(image, np, way.image_mean, way.image_std)
        chw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
        return chw.to(self.model.device, self.model.dtype)

    def _ids(self, ids: list[int]) -> Any:
        import torch

        return torch.tensor([ids], device=self.model.device)

    def _processed(self, image: np.ndarray, text: str) -> Any:
        from PIL import Image

        return self.processor(images=Image.fromarray(image), text=text, return_tensors="pt")


def load(bundle: Path, dtype: str = "float32", device: str = "cpu") -> Reference:
    """Loads a bundle after checking its files, and refuses one that transformers does not fill completely.

    Args:
        bundle: folder that `launch.export --format=hf` made.
        dtype, device: PyTorch's names of what is computed in and where.

    Raises:
        UserError: not a bundle, another format version, a file that is missing or changed, or a tensor that is missing, unexpected or
            of another shape.
    """
    record = check_files(bundle)
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration, utils

    utils.logging.disable_progress_bar()
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            bundle,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # safetensors and transformers raise many kinds on a damaged folder
        raise UserError(f"{bundle}: PyTorch cannot load this bundle ({str(error).splitlines()[0]}).") from error
    refuse_unfilled(bundle, info)
    if (bundle / "adapter").is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, bundle / "adapter").merge_and_unload()
    return Reference(model.eval().to(device), AutoProcessor.from_pretrained(bundle, local_files_only=True), record)


def refuse_unfilled(bundle: Path, info: Mapping[str, Any]) -> None:
    """Refuses what `from_pretrained(..., output_loading_info=True)` told of weights that do not fit.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    wrong = [
        f"{kind} {', '.join(sorted(map(str, info[key])))}"
        for kind, key in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("misshapen", "mismatched_keys"),
        )
        if info[key]
    ]
    if wrong:
        raise UserError(f"{bundle}: the weights do not fill the PyTorch model: {'; '.join(wrong)}.")


def versions() -> dict[str, str]:
    """Of the libraries that a bundle was loaded with."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
