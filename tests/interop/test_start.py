"""Stage 1 from towers made elsewhere: DINOv2 for the images, a BERT for the texts, and heads of its own; or the two of BiomedCLIP."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import stage1
from rad_jax import checkpoint, optim, state, tasks, train
from rad_jax.errors import UserError
from rad_jax.interop import open_clip, positions
from rad_jax.interop.convert import convert
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.vit import VitConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 2}
    vision = transformers.Dinov2Config(**size, num_hidden_layers=3, image_size=32, patch_size=8, mlp_ratio=2)
    transformers.Dinov2Model(vision).save_pretrained(folder / "dinov2")
    text = transformers.BertConfig(
        **size, num_hidden_layers=2, vocab_size=512, intermediate_size=64, max_position_embeddings=64
    )
    transformers.BertModel(text).save_pretrained(folder / "bert")
    for format in ("dinov2", "bert"):
        convert(folder / format, format, folder / f"{format}_base")
    return folder / "dinov2_base", folder / "bert_base"


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_stage1_starts_from_dinov2_and_bert(training, bases, tmp_path, loss):
    config = training.config("stage1", steps=2)
    config.model.loss = loss
    runs = [checkpoint.load_run(path) for path in bases]
    tasks.adopt(config, runs)
    assert config.model.vision.layer_scale and config.model.vision.pixel_mean == [0.485, 0.456, 0.406]
    task, base = tasks.make_task(config), state.join(*(run.variables for run in runs))
    optimizer = optim.optimizer(config.optimizer, config.steps)
    with jax.set_mesh(training.mesh()):
        start, frozen = train.initial(config, task, optimizer, base, training.mesh())
    assert not frozen
    found, given = flatten_dict(start.trainable, sep="/"), flatten_dict(base, sep="/")
    own = {path for path in found if path.split("/")[1] not in ("vision", "text")}
    bias = {"params/logit_bias"} if loss == "sigmoid" else set()
    heads = {f"params/{name}/kernel" for name in ("vision_head", "text_head/fc1", "text_head/fc2")}
    assert own == heads | {"params/logit_scale"} | bias
    assert found.keys() - own == given.keys()
    for path in given:
        np.testing.assert_array_equal(found[path], np.asarray(given[path]), err_msg=path)
    # Drawn: normal with a standard deviation of 1 / sqrt(inputs).
    assert all(0.5 < np.std(found[path]) * np.sqrt(found[path].shape[0]) < 2 for path in heads)
    assert np.isclose(found["params/logit_scale"], np.log(1 / 0.07 if loss == "softmax" else 10))
    if bias:
        assert found["params/logit_bias"] == -10


@pytest.mark.slow
def test_stage1_trains_from_dinov2_and_bert(training, bases, tmp_path):
    config = training.config("stage1", steps=2)
    runs = [checkpoint.load_run(path) for path in bases]
    tasks.adopt(config, runs)
    training.run(config, tmp_path / "run", bases)
    trained = checkpoint.load_run(tmp_path / "run")
    moved = np.abs(
        np.asarray(trained.variables["params"]["vision"]["pos_embed"])
        - np.asarray(runs[0].variables["params"]["vision"]["pos_embed"])
    )
    assert 0 < moved.max() < 0.1


SHAPE: dict[str, Any] = {"width": 64, "depth": 2, "heads": 1, "mlp_dim": 96}  # open_clip's towers have heads of 64
WORDS: dict[str, Any] = {"vocab_size": 512, "max_positions": 64}


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory):
    """The public BiomedCLIP's folder with small towers: 48 pixels in patches of 16, no LayerScale; and what is in its tensors."""
    folder = tmp_path_factory.mktemp("BiomedCLIP")
    clip = ClipConfig(VitConfig(image_size=48, patch_size=16, **SHAPE), BertConfig(**SHAPE, **WORDS), 16)
    rng = np.random.default_rng(0)
    tensors = {
        name: np.asarray(0.2 * rng.normal(size=shape), np.float32)
        for name, shape in open_clip.table(clip).shapes().items()
    }
    torch.save({n: torch.from_numpy(t) for n, t in tensors.items()}, folder / "open_clip_pytorch_model.bin")
    vision: dict[str, Any] = {
        "timm_model_name": "vit_base_patch16_224",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 48,
    }
    text: dict[str, Any] = {
        "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        "hf_proj_type": "mlp",
    }
    text |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 64}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    pixels = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    return folder, tensors


def small(config):
    """The full-size experiment with the sizes of that folder, at the 32 pixels of the tiny corpus; what it says of the tower's kind stays."""
    config.model.vision.update(image_size=32, **SHAPE)
    config.model.text.update(**SHAPE, **WORDS)
    config.model.embed_dim = 16
    return config


def test_which_config_is_biomedclips(biomedclip, tmp_path):
    """The paper's tower has patches of 14 and LayerScale; 518 pixels are no multiple of 16, and 512 are."""
    folder, _ = biomedclip
    with pytest.raises(UserError, match="--image_size=518 is not a multiple of the tower's patches of 16 pixels"):
        convert(folder, "open_clip", tmp_path / "base", image_size=518)
    convert(folder, "open_clip", tmp_path / "base", image_size=512)
    base = checkpoint.load_run(tmp_path / "base")
    config = stage1.get_config("biomedclip,cpu-1")
    config.model.vision.update(SHAPE)
    config.model.text.update(**SHAPE, **WORDS)
    tasks.adopt(config, [base])
    assert config.model.vision.image_size == 512
    assert base.variables["params"]["vision"]["pos_embed"].shape == (1, 1 + 32 * 32, 64)
    config = stage1.get_config("cpu-1")
    config.model.vision.update(image_size=512, **SHAPE)
    with pytest.raises(UserError, match=r"has vision\.layer_scale = False but the config says True"):
        tasks.adopt(config, [base])


@pytest.mark.slow
def test_stage1_trains_from_biomedclip(training, biomedclip, tmp_path):
    """By the command: the towers and both heads are those of the folder, the position table on another grid, after one small step."""
    folder, tensors = biomedclip
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    config = small(stage1.get_config("biomedclip,cpu-1"))
    flags = [f"--config.model.{part}.{key}={config.model[part][key]}" for part in ("vision", "text") for key in SHAPE]
    flags += [f"--config.model.text.{key}={value}" for key, value in WORDS.items()]
    flags += ["--config.model.embed_dim=16", "--config.model.vision.image_size=32", "--config.data.text_length=64"]
    flags += ["--config.steps=1", "--config.batch_size=4", "--config.num_micro=1"]
    flags += ["--config.optimizer.peak_lr=0.001", "--config.optimizer.warmup_ratio=0.0"]
    convert(folder, "open_clip", tmp_path / "base", image_size=32)
    line = [sys.executable, "-m", "launch.train", "--config=configs/stage1.py:biomedclip,cpu-1", *flags]
    line += [f"--data={training.corpus}", f"--base={tmp_path / 'base'}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(line, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = checkpoint.load_run(tmp_path / "run")
    vision = run.config["model"]["vision"]
    assert (vision["patch_size"], vision["layer_scale"], vision["image_size"]) == (16, False, 32)
    found = flatten_dict(run.variables["params"], sep="/")
    given = flatten_dict(checkpoint.load_run(tmp_path / "base").variables["params"], sep="/")
    table = tensors["visual.trunk.pos_embed"]
    np.testing.assert_array_equal(given["vision/pos_embed"], positions.resample(table, 2))
    assert found.keys() == given.keys()
    moved = {path: np.abs(np.asarray(found[path]) - np.asarray(given[path])).max() for path in given}
    # Adam's first step is the learning rate, and weight decay is a fifth of it times the weight.
    assert max(moved.values()) <= 1.3e-3 and moved["vision/pos_embed"] > 5e-4 and moved["text_head/fc1/kernel"] > 5e-4
