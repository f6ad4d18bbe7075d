"""The text tower against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import hf_bert, tables
from rad_jax.models.bert import Bert, BertConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


def test_padded_rows(parity, randomised, state):
    transformers = pytest.importorskip("transformers")
    config = BertConfig(vocab_size=64, width=32, depth=3, heads=4, mlp_dim=80, max_positions=16)
    model = randomised(
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
                max_position_embeddings=16,
            )
        )
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(1, 64, (3, 12)).astype(np.int32)
    lengths = np.array([12, 7, 1], np.int32)
    real = np.arange(12) < lengths[:, None]
    probe = np.random.default_rng(1).normal(size=(3, 12, 32)).astype(np.float32) * real[:, :, None]
    output = model(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(real).long())
    theirs = output.last_hidden_state
    (theirs * torch.from_numpy(probe)).sum().backward()
    table = hf_bert.table(config)

    def loss(p):
        x = Bert(config).apply({"params": p}, tokens, lengths)
        return (x * probe).sum(), x

    params = jax.tree.map(jnp.asarray, tables.load(table, state(model)))
    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    parity.forward("BERT, padded rows", "transformers BertModel", ours[real], theirs.detach().numpy()[real])
    theirs_grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    parity.gradients("BERT, gradients", "transformers BertModel", grads, tables.load(table, theirs_grads))
