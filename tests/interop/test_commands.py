"""The way of a team with weights of its own, by the real commands: convert, train stages 2 and 3 on them, export, verify, and in again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rad_jax.interop import sources

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
LLM = {"vocab_size": 512, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_dim": 48, "max_positions": 512}
VISION = {"image_size": 28, "patch_size": 7, "width": 24, "depth": 3, "heads": 4, "mlp_dim": 96}


def call(name, *arguments, status=0):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def settings(stage, **more):
    """The full-size config of a stage on one CPU, at a small size."""
    flags = [
        f"--config=configs/{stage}.py:cpu-1",
        "--config.frozen_dtype=float32",
        "--config.batch_size=4",
        "--config.steps=2",
    ]
    flags += [
        f"--config.model.llm.{key}={value}" for key, value in (LLM | {"dtype": "float32", "remat": "none"}).items()
    ]
    flags += [
        f"--config.model.vision.{key}={value}"
        for key, value in (VISION | {"dtype": "float32", "remat": "none"}).items()
    ]
    return [*flags, "--config.num_micro=1", *(f"--config.{key}={value}" for key, value in more.items())]


@pytest.mark.slow
def test_from_foreign_weights_to_foreign_weights(tmp_path):
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            rms_norm_eps=1e-5, max_position_embeddings=512,
        )
    )  # fmt: skip
    llama.half().save_pretrained(tmp_path / "vicuna")
    tower = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
        )
    )
    tower.save_pretrained(tmp_path / "dinov2")
    corpus = tmp_path / "corpus"
    call("pack", "--dataset=phantom", f"--out={corpus}", "--image_size=28", "--studies=40", "--vocab_size=512")
    told = call("convert", "--format=hf_llama", f"--source={tmp_path / 'vicuna'}", f"--out={tmp_path / 'llm'}")
    assert "warning: no tokenizer found" in told
    bases = [tmp_path / "llm_with", tmp_path / "tower"]
    call(
        "convert", "--format=hf_llama", f"--source={tmp_path / 'vicuna'}", f"--out={bases[0]}", f"--tokenizer={corpus}"
    )
    call("convert", "--format=dinov2", f"--source={tmp_path / 'dinov2'}", f"--out={bases[1]}")

    stage2, stage3 = tmp_path / "stage2", tmp_path / "stage3"
    texts = {"data.text_length": 128, "data.target_length": 96}
    base = f"--base={bases[0]},{bases[1]}"
    call("train", *settings("stage2", **texts), f"--data={corpus}", f"--workdir={stage2}", base)
    # The tower's own pixel statistics went with it, though the config says nothing of them.
    model = json.loads((stage2 / "config.json").read_text())["config"]["model"]
    assert model["vision"]["pixel_mean"] == [0.485, 0.456, 0.406]
    texts = {"data.text_length": 256, "data.target_length": 96, "model.lora.rank": 4}
    call("train", *settings("stage3", **texts), f"--data={corpus}", f"--workdir={stage3}", f"--base={stage2}")
    other = [*settings("stage3", **texts), "--config.model.llm.eps=1e-6"]
    wrong = call("train", *other, f"--data={corpus}", f"--workdir={tmp_path / 'other'}", f"--base={stage2}", status=2)
    assert "has llm.eps = 1e-05 but the config says 1e-06" in wrong

    bundle = tmp_path / "bundle"
    compared = [f"--checkpoint={stage3}", f"--data={corpus}", "--studies=2", "--max_new_tokens=8"]
    told = call("export", *compared, f"--out={bundle}")
    assert "PyTorch and JAX agree on 2 studies" in told
    assert "agree on 2 studies" in call("export", *compared, f"--verify={bundle}")
    assert "Not compared again" in call("export", f"--verify={bundle}")  # what a reader without PyTorch gets
    receipt = json.loads((bundle / "receipt.json").read_text())
    blocks = receipt["differences"]["max_abs_activation"]
    assert len(blocks) == 3 + 2 and all(0 < value < 65504 for value in blocks.values())
    assert receipt["peak_anon_bytes"] > 0 and receipt["seconds"] > 0 and receipt["sources"]["stage3"]["step"] == 2
    pytest.importorskip("peft")
    told = call("export", *compared, "--format=hf_adapter", f"--out={tmp_path / 'apart'}")
    assert "PyTorch and JAX agree on 2 studies" in told
    assert (tmp_path / "apart/adapter/adapter_config.json").is_file()

    # In again: the merged model is the language model, and says the same.
    call("convert", "--format=hf_llava", f"--source={bundle}", f"--out={tmp_path / 'again'}")
    image = tmp_path / "film.png"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32), dtype=np.uint8)).save(image)
    ask = [f"--image={image}", "--max_new_tokens=8"]
    call("generate", f"--checkpoint={tmp_path / 'again'}", *ask)
    call("export", f"--checkpoint={tmp_path / 'again'}", "--dtype=keep", f"--out={tmp_path / 'out'}")
    a, b = sources.open_source(tmp_path / "out"), sources.open_source(bundle)
    assert set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)

    call("export", f"--checkpoint={stage3}", "--format=peft", f"--out={tmp_path / 'adapter'}")
    told = call("export", f"--checkpoint={stage3}", f"--verify={tmp_path / 'adapter'}", "--max_new_tokens=8")
    assert "PyTorch and JAX agree (greatest difference: logits" in told and "greedy texts equal" in told
    told = call("export", f"--checkpoint={stage3}", "--format=llava", f"--out={tmp_path / 'none'}", status=2)
    assert "there is no text tower beside the image tower" in told
    call(
        "convert",
        "--format=peft",
        f"--source={tmp_path / 'adapter'}",
        f"--base={bases[0]}",
        f"--out={tmp_path / 'lora'}",
    )


def test_mistakes(tmp_path):
    """One sentence and exit status 2, and nothing written."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, sentence in (
        (["--format=hf_llama", f"--source={tmp_path / 'nothing'}"], "no such file or folder: check --source"),
        (["--format=hf_llama", f"--source={empty}"], "config.json: no such file"),
        (["--format=gguf", f"--source={empty}"], "gguf"),
        (["--format=peft", f"--source={empty}"], "give the base it was trained on"),
    ):
        assert sentence in call("convert", *arguments, f"--out={tmp_path / 'out'}", status=2)
    assert "give either --out" in call("export", status=2)
    assert "--checkpoint is missing" in call("export", f"--out={tmp_path / 'out'}", status=2)
    assert not (tmp_path / "out").exists()


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    (tmp_path / "model").mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    torch.save({"model.norm.weight": torch.ones(8), "other": Attack()}, tmp_path / "model/pytorch_model.bin")
    told = call("convert", "--format=hf_llama", f"--source={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", status=2)
    assert "system" in told and not marker.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "model/pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the attack is real
