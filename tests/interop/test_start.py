"""Stage 1 from towers made elsewhere: DINOv2 for the images, a BERT for the texts, and heads of its own."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rad_jax import checkpoint, optim, state, tasks, train
from rad_jax.interop.convert import convert

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
