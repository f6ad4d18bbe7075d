"""GGUF: the tensors of the exported bundle in Meta's rotary layout, a vocabulary that llama.cpp cuts text with as we do, and the same words."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax import checkpoint
from rad_jax.errors import UserError
from rad_jax.interop import convert, exported, sources, verify, verify_parts
from rad_jax.interop.export import export
from rad_jax.interop.gguf import VISION, held, vocabulary
from rad_jax.lora import LoraSpec
from rad_jax.models.llama import Llama, RopeScaling
from rad_jax.prompts import load_tokenizer

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).resolve().parents[2]

HF = "language_model.model."
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "token_embd": f"{HF}embed_tokens", "output_norm": f"{HF}norm", "output": "language_model.lm_head",
}  # fmt: skip


def hf_name(name: str) -> str:
    *layer, last = name.removesuffix(".weight").split(".")
    return (f"{HF}layers.{layer[1]}." if layer else "") + f"{NAMES[last]}.weight"


def unpaired(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of pairs to rows of halves: row 2i of a head was row i, row 2i + 1 was row H/2 + i."""
    rows = x.reshape(heads, -1, x.shape[-1])
    return np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(x.shape)


def tensors(path: Path, config) -> dict[str, np.ndarray]:
    """By transformers' names and in its layout, dequantised."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(tensor.name.split(".")[-2])
        found[hf_name(tensor.name)] = unpaired(x, heads) if heads else x
    return found


def metadata(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_are_those_of_the_bundle(plain_example, tmp_path, dtype):
    model, llm = plain_example.exported(), plain_example.config.llm
    export(model, "hf", tmp_path / "hf", dtype)
    receipt = export(model, "gguf", tmp_path / "gguf", dtype)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    bundle = sources.open_source(tmp_path / "hf/model.safetensors")
    found = tensors(file, llm)
    wanted = {name for name in bundle if name.startswith("language_model.")}
    assert set(found) == wanted and receipt["tensors"] == len(wanted) == 2 * 9 + 3
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, np.asarray(bundle[name][: len(tensor)], np.float32), err_msg=name)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {"F32"} | ({"F16"} if dtype == "float16" else set())


def test_q8_0_is_within_half_a_step(plain_example, tmp_path):
    model, llm = plain_example.exported(), plain_example.config.llm
    export(model, "gguf", tmp_path / "exact", "float32")
    export(model, "gguf", tmp_path / "q8", "q8_0")
    exact = tensors(tmp_path / "exact/model-f32.gguf", llm)
    reader = gguf.GGUFReader(tmp_path / "q8/model-q8_0.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert (
        kinds["blk.0.ffn_down.weight"] == "F16" and kinds["output_norm.weight"] == "F32"
    )  # rows of 48 are no blocks of 32
    for name, tensor in tensors(tmp_path / "q8/model-q8_0.gguf", llm).items():
        if name.endswith(("norm.weight", "down_proj.weight")):
            np.testing.assert_array_equal(tensor, exact[name].astype(np.float16))
            continue
        blocks = exact[name].reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        # Half a step for the rounding of a weight, and what the rounding of the step to float16 moves the greatest by.
        assert (np.abs(tensor.reshape(-1, 32) - blocks) <= step * (0.5 + 127 * 2**-11) + 1e-9).all(), name


def test_what_the_file_says_of_the_model(plain_example, tmp_path):
    export(plain_example.exported(), "gguf", tmp_path / "out", "float16")
    found, tokenizer = metadata(tmp_path / "out/model-f16.gguf"), load_tokenizer(plain_example.tokenizer)
    llama = {name.removeprefix("llama."): value for name, value in found.items() if name.startswith("llama.")}
    assert llama == {
        "context_length": 256, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "rope.dimension_count": 8,
        "rope.freq_base": 10000.0, "vocab_size": 512,
    }  # fmt: skip
    words = {name.removeprefix("tokenizer.ggml."): value for name, value in found.items() if "tokenizer" in name}
    pieces = json.loads(plain_example.tokenizer.read_text())["model"]["vocab"]
    assert words["tokens"][: len(pieces)] == sorted(pieces, key=pieces.get) and len(words["tokens"]) == 512
    ids = words["bos_token_id"], words["eos_token_id"], words["unknown_token_id"], words["padding_token_id"]
    assert ids == (tokenizer.bos_id, tokenizer.eos_id, 0, tokenizer.pad_id)
    kinds = [gguf.TokenType(kind).name for kind in words["token_type"]]
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"] and kinds.count("BYTE") == 256
    assert (words["model"], words["add_bos_token"], words["add_eos_token"], words["add_space_prefix"]) == (
        "llama",
        True,
        False,
        True,
    )
    assert found["general.architecture"] == "llama" and found["general.description"] == VISION
    assert VISION in (tmp_path / "out/README.md").read_text()


SCALINGS = [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 4.0, original_max_positions=32)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "linear", "llama3"])
def test_logits_of_the_file_alone(plain_example, tmp_path, scaling):
    """A forward pass in numpy after llama.cpp's graph, from nothing but the file, against our own of the merged model."""
    llm = dataclasses.replace(plain_example.config.llm, rope_scaling=scaling)
    model = plain_example.exported(config=dataclasses.replace(plain_example.config, llm=llm))
    export(model, "gguf", tmp_path / "out", "float32")
    ids = np.random.default_rng(0).integers(3, 512, 40)
    params = jax.tree.map(jnp.asarray, {"params": model.merged()["llm"]})
    with jax.default_matmul_precision("highest"):
        ours = Llama(llm).apply(params, ids[None])[0]
    theirs = forward(tmp_path / "out/model-f32.gguf", ids)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4


def forward(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits float64 [T, V] of ids [T]; neighbouring channels 2i and 2i + 1 of a head turn together."""
    told, stored = metadata(path), gguf.GGUFReader(path).tensors
    w = {t.name.removesuffix(".weight"): np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float64) for t in stored}
    heads, kv_heads = told["llama.attention.head_count"], told["llama.attention.head_count_kv"]
    size, eps = told["llama.rope.dimension_count"], told["llama.attention.layer_norm_rms_epsilon"]
    speed = told["llama.rope.freq_base"] ** (-np.arange(0, size, 2) / size)
    speed = speed / w.get("rope_freqs", 1.0) / told.get("llama.rope.scaling.factor", 1.0)
    turn = np.exp(1j * np.arange(len(ids))[:, None] * speed)  # [T, H / 2]

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def rotated(x: np.ndarray, count: int) -> np.ndarray:
        pairs = x.reshape(len(ids), count, size // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(len(ids), count, size)

    x = w["token_embd"][ids]
    for n in range(told["llama.block_count"]):
        y = norm(x, w[f"blk.{n}.attn_norm"])
        q = rotated(y @ w[f"blk.{n}.attn_q"].T, heads)
        k = np.repeat(rotated(y @ w[f"blk.{n}.attn_k"].T, kv_heads), heads // kv_heads, axis=1)
        v = np.repeat((y @ w[f"blk.{n}.attn_v"].T).reshape(len(ids), kv_heads, size), heads // kv_heads, axis=1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
        scores = np.exp(np.where(np.tri(len(ids), dtype=bool), scores, -np.inf))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", scores, v).reshape(len(ids), -1) @ w[f"blk.{n}.attn_output"].T
        y = norm(x, w[f"blk.{n}.ffn_norm"])
        gate, up = y @ w[f"blk.{n}.ffn_gate"].T, y @ w[f"blk.{n}.ffn_up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{n}.ffn_down"].T
    return norm(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_verified_by_the_reader_of_transformers(plain_example, tmp_path, dtype):
    pytest.importorskip("transformers")
    model = plain_example.exported()
    export(model, "gguf", tmp_path / "out", dtype)
    result = verify_parts.verify(tmp_path / "out", model, "gguf", dtype, 8)
    verify.check(result, tmp_path / "out")
    assert result["max_abs_logit_diff"] <= 1e-4 and result["text_equal"]
    config = dataclasses.replace(model.config, lora=LoraSpec(4, 4.0, targets=model.config.lora.targets))
    other = verify_parts.verify(tmp_path / "out", dataclasses.replace(model, config=config), "gguf", dtype, 8)
    with pytest.raises(UserError, match="do not agree"):
        verify.check(other, tmp_path / "out")


def cut(path: Path, text: str) -> list[int]:
    """Ids as llama.cpp's `llm_tokenizer_spm` gives them: the best-scored neighbours are joined, the first of equals first."""
    told = metadata(path)
    pieces, scores = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.scores"]
    ids = {piece: number for number, piece in enumerate(pieces)}
    symbols = list(" ".join(["", text]).replace(" ", "\u2581"))
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [
        number
        for symbol in symbols
        for number in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]


TEXTS = [
    "There is a small left effusion.\nNo pneumothorax; the heart is normal.",
    "  Two blanks, 12.5 cm, \u00e9 \u2265 \U0001fac1 </s> <image>",
]


def test_texts_are_cut_as_ours(plain_example, tmp_path):
    export(plain_example.exported(), "gguf", tmp_path / "out", "float16")
    tokenizer = load_tokenizer(plain_example.tokenizer)
    for text in [*TEXTS, "normal small lungs clear or nodule no size"]:
        assert cut(tmp_path / "out/model-f16.gguf", text) == tokenizer.encode(text)


def test_vocabulary_of_sentencepiece(real):
    words = vocabulary(real / "tokenizer/llama2_tokenizer.model", 32064)
    assert (words.bos_id, words.eos_id, words.unk_id) == (1, 2, 0) and len(words.pieces) == len(words.scores) == 32064
    assert words.pieces[29871] == "\u2581" and words.kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert words.pieces[32000] == "[PAD32000]" and set(words.kinds[32000:]) == {"UNUSED"}
    with pytest.raises(UserError, match="32000 tokens but the model has 512 rows"):
        vocabulary(real / "tokenizer/llama2_tokenizer.model", 512)


def test_refusals(plain_example, tmp_path, monkeypatch):
    model = plain_example.exported()
    with pytest.raises(UserError, match="convert it with --tokenizer"):
        export(plain_example.exported(tokenizer=None), "gguf", tmp_path / "out", "float16")
    with pytest.raises(UserError, match="give one of these as --dtype"):
        export(model, "gguf", tmp_path / "out", "keep")
    loud = jax.tree.map(np.copy, plain_example.variables)
    loud["params"]["llm"]["embed"]["embedding"][3, 3] = np.nan
    for dtype in ("float16", "q8_0"):
        with pytest.raises(UserError, match=r"token_embd\.weight has values"):
            export(plain_example.exported(variables=loud), "gguf", tmp_path / "out", dtype)
    tokenizer = tmp_path / "other.json"
    contents = json.loads(plain_example.tokenizer.read_text())
    contents["model"]["byte_fallback"] = False
    tokenizer.write_text(json.dumps(contents))
    with pytest.raises(UserError, match="byte fallback"):
        export(plain_example.exported(tokenizer=tokenizer), "gguf", tmp_path / "out", "float16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'gguf>="):
        export(model, "gguf", tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


# llama.cpp logs to the process's own streams and keeps threads, so it gets a process.
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.hostnames, params.port, params.cpuparams.n_threads = ["127.0.0.1"], 0, 1
server = xllamacpp.Server(params)
def ask(path, **what):
    request = urllib.request.Request(server.listening_address + path, json.dumps(what).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
asked = json.loads(sys.argv[2])
written = ask("/completion", prompt=[1], n_predict=asked["length"], temperature=0, return_tokens=True)["tokens"]
cuts = [ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in asked["texts"]]
print("RESULT", json.dumps([written, cuts]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="no llama.cpp (pip install xllamacpp)")
@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_llama_cpp_writes_the_same(real, tokenizer_path, tmp_path, dtype):
    """Trained weights, greedily from BOS, against the story that llama2.c's own test expects; and its cuts of texts against ours."""
    golden = json.loads((real / "weights/stories260K_golden.json").read_text())["greedy_ids"]
    convert.convert(real / "weights/stories260K.bin", "meta", tmp_path / "base", tokenizer=tokenizer_path)
    receipt = export(exported.from_run(checkpoint.load_run(tmp_path / "base")), "gguf", tmp_path / "out", dtype)
    (file,) = [name for name in receipt["files"] if name.endswith(".gguf")]
    asked = json.dumps({"length": 60, "texts": TEXTS})
    command = [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "out" / file), asked]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    written, cuts = json.loads(line.removeprefix("RESULT "))
    assert written == golden[1:61]
    tokenizer = load_tokenizer(tokenizer_path)
    assert cuts == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]


def test_what_is_held_is_what_is_written(plain_example, tmp_path):
    model = plain_example.exported()
    export(model, "gguf", tmp_path / "out", "q8_0")
    found = tensors(tmp_path / "out/model-q8_0.gguf", model.config.llm)
    kernel = held(model, "q8_0")["layers"]["attn"]["q"]["kernel"][1]
    np.testing.assert_array_equal(kernel.reshape(32, 32).T, found[f"{HF}layers.1.self_attn.q_proj.weight"])


def test_the_command_says_that_the_file_cannot_see():
    """On the terminal, and not in the file's card alone. What is written is tested above."""
    code = """
from pathlib import Path
from absl import flags
from launch import export as command
from rad_jax.interop import export
export.export = lambda *_, **__: {"bytes": 1, "seconds": 1.0, "mb_per_s": 1.0}
flags.FLAGS(["export", "--format=gguf"])
command.write(Path("out"), None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0].startswith("out: 0.00 GB as gguf (float16)") and told[1] == f"warning: {VISION}."
    assert (
        "llama.cpp computes the image towers of this model family wrongly" in told[1] and "cannot see films" in told[1]
    )
