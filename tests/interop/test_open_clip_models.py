"""BiomedCLIP's two sizes as open_clip builds them: a training checkpoint in, the same embeddings, and a folder that open_clip loads out."""

import gc
import json

import jax
import numpy as np
import pytest

from rad_jax import checkpoint, sharding, tasks
from rad_jax.interop import exported
from rad_jax.interop.convert import convert
from rad_jax.interop.export import export

torch = pytest.importorskip("torch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "size"),
    [("vit_base_patch16_224", 224), ("vit_base_patch14_dinov2.lvd142m", 518)],
    ids=["BiomedCLIP", "BiomedCLIP-CXR"],
)
def test_training_checkpoint(tmp_path, trunk, size):
    open_clip = pytest.importorskip("open_clip")
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(
        tmp_path / "bert"
    )
    vision = {
        "timm_model_name": trunk,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": size,
    }
    text = {
        "hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": False, "hf_proj_type": "mlp", "context_length": 256,
        "hf_pooler_type": "cls_last_hidden_state_pooler",
    }  # fmt: skip
    model = open_clip.model.CustomTextCLIP(512, vision, text).eval()
    with torch.no_grad():  # LayerScale starts at 1e-5: at that size a tower without it would pass
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.5, 1.5)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.98)}],
    }
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"epoch": 32, "name": "run", "state_dict": state, "optimizer": moments}, source / "epoch_32.pt")
    (source / "model.json").write_text(json.dumps({"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}))
    convert(source / "epoch_32.pt", "open_clip", tmp_path / "base")
    run = checkpoint.load_run(tmp_path / "base")
    assert run.config["model"]["vision"]["layer_scale"] == (size == 518) and run.config["data"] == {"text_length": 256}

    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    tokens, lengths = rng.integers(1000, 30000, (2, 20)).astype(np.int32), np.array([20, 12], np.int32)
    tokens[1, 12:] = 0
    with torch.inference_mode():
        theirs = [
            x.numpy()
            for x in model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens).long())
        ]
    task, weights = tasks.restore(run, sharding.make_mesh(jax.device_count(), 1, 1))
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(task.model.apply)(weights, images, tokens, lengths)
    # Unit vectors after twelve layers in float32, entries of size 0.04; and the temperature.
    for mine, other, tolerance in zip(ours[:3], theirs, (1e-5, 1e-5, 1e-4), strict=True):
        assert np.abs(np.asarray(mine) - other).max() <= tolerance
    del weights, task
    gc.collect()

    export(exported.from_run(run), "open_clip", tmp_path / "out", "keep")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    expected = model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
