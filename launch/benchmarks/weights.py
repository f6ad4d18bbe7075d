"""A language model of Vicuna-7B's width read, converted, merged with an adapter and written: ours against transformers and peft."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rad_jax.errors import UserError

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}
RANK = 64
LAYER_BYTES, REST_BYTES = 2 * 202_383_360, 2 * 262_148_096  # in float16

MAKE = """
import json, sys
from pathlib import Path
import numpy as np
from rad_jax.interop import hf_llama, peft_lora, torch_zip
from rad_jax.lora import LoraSpec
from rad_jax.models.llama import LlamaConfig
folder, config, rank = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
llm = LlamaConfig(config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], 32, 32, config["intermediate_size"])
rng = np.random.default_rng(0)
noise = (0.02 * rng.standard_normal(2**24, np.float32)).astype(np.float16)
def tensors(shapes):
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        start = int(rng.integers(2**23))
        yield name, np.resize(noise[start:], size).reshape(shape)
def save(path, shapes):
    torch_zip.write(path, shapes, tensors(shapes), dict.fromkeys(shapes, "float16"))
shapes = hf_llama.table(llm).shapes()
names = list(shapes)
cut = len(names) * 3 // 4
files = {"pytorch_model-00001-of-00002.bin": names[:cut], "pytorch_model-00002-of-00002.bin": names[cut:]}
(folder / "model").mkdir(parents=True)
for file, part in files.items():
    save(folder / "model" / file, {name: shapes[name] for name in part})
index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
(folder / "model/pytorch_model.bin.index.json").write_text(json.dumps(index))
(folder / "model/config.json").write_text(json.dumps(config))
(folder / "adapter").mkdir()
spec = LoraSpec(rank, 2.0 * rank)
save(folder / "adapter/adapter_model.bin", peft_lora.table(llm, spec).shapes())
modules = [f"{target}_proj" for target in spec.targets]
(folder / "adapter/adapter_config.json").write_text(json.dumps({
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none",
    "target_modules": modules, "base_model_name_or_path": None, "inference_mode": True}))
"""

PEER_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
model.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""

PEER_EXPORT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
model = PeftModel.from_pretrained(model, sys.argv[2], dtype=torch.float16).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="5GB")
"""

COMPARE = """
import sys
from pathlib import Path
import numpy as np
from rad_jax.interop import sources
ours, theirs, before = (sources.open_source(Path(p)) for p in sys.argv[1:])
assert set(ours) == set(theirs) == set(before), set(ours) ^ set(theirs)
def greatest(a, b):  # a NaN stays
    return float(np.max([np.abs(a[n].astype(np.float32) - b[n].astype(np.float32)).max() for n in a]))
print(greatest(ours, theirs), greatest(before, theirs))
"""


def run(folder: Path, layers: int) -> list[dict[str, Any]]:
    """The rows; works in `folder`, which must not exist, and removes it again.

    Raises:
        UserError: too little room, or the folder is there already.
    """
    needed = 3.3 * (layers * LAYER_BYTES + REST_BYTES)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.0f} GB free, this takes {needed / 1e9:.0f}: give another --dir or fewer --layers."
        )
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or give another --dir.")
    try:
        return weights(folder, layers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weights(folder: Path, layers: int) -> list[dict[str, Any]]:
    """Converting the model and exporting it with an adapter merged: ours, theirs, and how far the results are apart."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "dtype": "float16",
        **SIZES,
    }
    config |= {"num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    print(f"making a random model of {layers} layers ...", flush=True)
    python(["-c", MAKE, folder, json.dumps(config), RANK])
    model, adapter = folder / "model", folder / "adapter"
    launch = ["-m", "launch.convert"]
    peer_convert = python(["-c", PEER_CONVERT, model, folder / "peer"])
    shutil.rmtree(folder / "peer")
    ours_convert = python([*launch, "--format=hf_llama", f"--source={model}", f"--out={folder / 'base'}"])
    python(
        [*launch, "--format=peft", f"--source={adapter}", f"--base={folder / 'base'}", f"--out={folder / 'adapted'}"]
    )
    ours_export = python(["-m", "launch.export", f"--checkpoint={folder / 'adapted'}", f"--out={folder / 'ours'}"])
    shutil.rmtree(folder / "base")
    peer_export = python(["-c", PEER_EXPORT, model, adapter, folder / "theirs"])
    compared = python(["-c", COMPARE, folder / "ours", folder / "theirs", model])["output"].split()
    difference, change = map(float, compared[-2:])
    size = layers * LAYER_BYTES + REST_BYTES
    return [
        row("convert", ours_convert, peer_convert, size),
        row("export, LoRA merged", ours_export, peer_export, size)
        | {"max_abs_difference": difference, "max_abs_merged": change},
    ]


def row(name: str, ours: dict[str, Any], peer: dict[str, Any], size: int) -> dict[str, Any]:
    """One line of the table; speeds are bytes of the model by seconds of the whole process."""
    found: dict[str, Any] = {"name": name, "ours_s": ours["seconds"], "peer_s": peer["seconds"]}
    found["ratio"] = peer["seconds"] / ours["seconds"]
    for side, done in (("ours", ours), ("peer", peer)):
        found[f"{side}_mb_per_s"] = size / 1e6 / done["seconds"]
        found |= {f"{side}_peak_anon_bytes": done["anon"], f"{side}_peak_rss_bytes": done["rss"]}
    return found


def python(arguments: Sequence[Any]) -> dict[str, Any]:
    """Runs Python, and samples its memory.

    Raises:
        UserError: it failed.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    peak = {"anon": 0, "rss": 0}
    sampler = threading.Thread(target=sample, args=(process, peak), daemon=True)
    sampler.start()
    output, problem = process.communicate()
    if process.returncode:
        raise UserError(f"a step of the benchmark failed: {' '.join(problem.strip().splitlines()[-3:])}")
    return {"seconds": time.perf_counter() - began, "output": output, **peak}


def sample(process: "subprocess.Popen[str]", peak: dict[str, int]) -> None:
    """Anonymous and resident memory of a process until it ends, as Linux tells."""
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        found = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "VmHWM"))
        }
        peak["anon"] = max(peak["anon"], found.get("RssAnon", 0))
        peak["rss"] = max(peak["rss"], found.get("VmHWM", 0))
        time.sleep(0.02)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows for people."""
    print(f"{'':22}{'ours':>9}{'peer':>9}{'ratio':>7}{'MB/s':>14}{'anonymous GB':>16}{'resident GB':>15}")
    for r in rows:
        pairs = [f"{r[f'ours_{k}'] / u:.{d}f} / {r[f'peer_{k}'] / u:.{d}f}" for k, u, d in
                 (("mb_per_s", 1, 0), ("peak_anon_bytes", 1e9, 2), ("peak_rss_bytes", 1e9, 2))]  # fmt: skip
        print(
            f"{r['name']:22}{r['ours_s']:8.1f}s{r['peer_s']:8.1f}s{r['ratio']:7.2f}{pairs[0]:>14}{pairs[1]:>16}{pairs[2]:>15}"
        )
        if "max_abs_difference" in r:
            print(
                f"{'':22}greatest difference of a weight: {r['max_abs_difference']:.1e} (merging changes one by up to {r['max_abs_merged']:.1e})"
            )
