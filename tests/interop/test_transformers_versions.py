"""Exported folders in transformers 4.57 as in the installed transformers 5: the same ids, pixels, logits and greedy texts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rad_jax.interop.export import export
from rad_jax.models.llava import LlavaConfig
from rad_jax.prompts import question

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OLD = "4.57.6"
# What it needs in other versions than the installed ones; all else comes from the environment.
PACKAGES = (f"transformers=={OLD}", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0")

# What anyone would write to use a folder, without code of ours.
SCRIPT = """
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

print(transformers.__version__)
folder, given, out = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
with_images = json.loads((folder / "config.json").read_text())["model_type"] == "llava"
kind = transformers.LlavaForConditionalGeneration if with_images else transformers.LlamaForCausalLM
model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
if (folder / "adapter").is_dir():
    import peft

    from safetensors.torch import load_file

    model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    # peft only warns of names that it does not know, and starts others with a B of zeros.
    stored, loaded = load_file(folder / "adapter/adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    assert loaded.keys() == stored.keys(), loaded.keys() ^ stored.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in stored.items())
model.eval()
if with_images:
    pillow = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    processor = transformers.AutoProcessor.from_pretrained(folder, **pillow)
    prompts = []
    for image, words in zip(given["images"], given["questions"], strict=True):
        content = [{"type": "image"}, {"type": "text", "text": str(words)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append(processor(images=Image.fromarray(image), text=text, return_tensors="pt"))
else:
    tokens = torch.from_numpy(given["tokens"])
    prompts = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]
found = {}
with torch.inference_mode():
    for number, prompt in enumerate(prompts):
        found |= {f"{name} {number}": tensor.numpy() for name, tensor in prompt.items()}
        found[f"logits {number}"] = model(**prompt).logits.numpy()
        found[f"greedy {number}"] = model.generate(**prompt, max_new_tokens=8).numpy()
np.savez(out, **found)
"""
TOLERANCES = {"pixel_values": 1e-5, "logits": 1e-4}  # everything else is equal


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A folder of packages that go before those of the environment."""
    folder = tmp_path_factory.mktemp("old")
    # Without dependencies, which would bring their own torch and numpy.
    options = ["--quiet", "--disable-pip-version-check", "--retries=1", "--no-deps", f"--target={folder}"]
    command = [sys.executable, "-m", "pip", "install", *options, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip could not install transformers {OLD}: {done.stderr.strip().splitlines()[-1]}")
    return folder


def outputs(version: str, folder: Path, studies: Path, packages: Path | None) -> dict[str, np.ndarray]:
    """What the script writes, after checking that it ran with that version of transformers."""
    out = studies.with_name(f"{folder.name} {version}.npz")
    environment = {**os.environ, "PYTHONPATH": str(packages or "")}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(studies), str(out)]
    done = subprocess.run(command, cwd=studies.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == version
    with np.load(out) as arrays:
        return dict(arrays)


def compare(tmp_path: Path, old: Path, example, format: str, **changes) -> None:
    export(example.exported(**changes), format, tmp_path / "out", "float32")
    images, indications = zip(*example.studies, strict=True)
    tokens = np.random.default_rng(0).integers(3, 512, (1, 24))
    np.savez(
        tmp_path / "studies.npz", images=np.stack(images), questions=[question(i) for i in indications], tokens=tokens
    )
    theirs = outputs(OLD, tmp_path / "out", tmp_path / "studies.npz", old)
    new = outputs(transformers.__version__, tmp_path / "out", tmp_path / "studies.npz", None)
    assert theirs.keys() == new.keys()
    for name, expected in new.items():
        tolerance = TOLERANCES.get(name.split()[0], 0)
        assert theirs[name].shape == expected.shape, name
        assert np.abs(theirs[name] - expected).max() <= tolerance, name


def test_bundle(tmp_path, old, example):
    compare(tmp_path, old, example, "hf")


def test_bundle_with_a_tower_of_another_family(tmp_path, old, other_example):
    compare(tmp_path, old, other_example, "hf")


def test_bundle_with_its_adapter_apart(tmp_path, old, plain_example):
    pytest.importorskip("peft")
    compare(tmp_path, old, plain_example, "hf_adapter")


@pytest.mark.parametrize("format", ["hf", "hf_adapter"])
def test_language_model_alone(tmp_path, old, plain_example, format):
    pytest.importorskip("peft")
    whole = plain_example
    variables = {"params": {"llm": whole.variables["params"]["llm"]}, "lora": whole.variables["lora"]}
    alone = LlavaConfig(whole.config.llm, None, whole.config.lora)
    compare(tmp_path, old, whole, format, config=alone, variables=variables)
