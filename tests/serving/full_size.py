"""The server at the real sizes: random weights of LLaVA-Rad's shapes, loaded in bfloat16 on this machine's CPU and asked about a film.

    python -m tests.serving.full_size FOLDER TOKENIZER FILM

Writes FOLDER/bundle first (14 GB, a minute or two) unless it is there. TOKENIZER is one of 32,000 pieces, as Llama 2's tokenizer.model;
FILM a DICOM, PNG or JPEG. Printed are the server's memory plan, its seconds until it was ready and its memory, then the seconds and the tokens
of an answer with words alone and of one about the film. The words mean nothing. Without FILM the bundle is written, and that is all.
"""

import argparse
import contextlib
import dataclasses
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import jax
import numpy as np
from flax import linen as nn
from tqdm import tqdm

from configs import stage3
from rad_jax import FORMAT_VERSION, tasks
from rad_jax.interop import bundle, receipt
from rad_jax.interop.exported import Exported
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import Vit
from tests import random_weights

ROOT = Path(__file__).resolve().parents[2]


def write(out: Path, tokenizer: Path) -> None:
    config = stage3.get_config("cpu-1")
    model = tasks.model_config(config)
    assert isinstance(model, LlavaConfig) and model.vision is not None
    shapes = random_weights.shapes(tasks.make_task(config))
    tower = Vit(
        dataclasses.replace(model.vision, feature_layer=None)
    )  # with the blocks that are not used, as bundles have it
    film = jax.ShapeDtypeStruct((1, model.vision.image_size, model.vision.image_size, 3), np.float32)
    shapes["vision"] = nn.unbox(jax.eval_shape(tower.init, jax.random.key(0), film))["params"]
    whole = dataclasses.replace(model, lora=None)
    exported = Exported({"params": random_weights.tree(shapes)}, whole, tokenizer, {})
    partial = out.with_suffix(".partial")
    partial.mkdir(parents=True)
    # By the writer alone: launch.export would also run the model once, to see that float16 holds its numbers.
    with tqdm(unit="B", unit_scale=True, desc="writing", mininterval=1.0) as bar:
        files = bundle.write(partial, exported, "float16", bar.update)
    receipt.write(partial, format_version=FORMAT_VERSION, format="hf", files=files)
    partial.rename(out)


def ask(url: str, tokens: int, film: Path | None) -> str:
    began = time.monotonic()
    if film is None:
        body = {"model": "bundle", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=None)
    else:
        fields = {"max_new_tokens": str(tokens)}
        answer = httpx.post(f"{url}/v1/findings", files={"file": film.read_bytes()}, data=fields, timeout=None)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return (
        f"{usage['prompt_tokens']} tokens read, {usage['completion_tokens']} written, {time.monotonic() - began:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "tokenizer"):
        parser.add_argument(name, type=Path)
    parser.add_argument("film", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=16, help="To write.")
    given = parser.parse_args()
    folder = given.folder / "bundle"
    if not folder.exists():
        write(folder, given.tokenizer)
    if given.film is None:
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--device=cpu", "--dtype=bfloat16", "--slots=1", "--timeout=86400", f"--port={port}"]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-m", "rad_jax.serving", str(folder), *options], cwd=ROOT) as server:
        try:
            while server.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                time.sleep(1)
            for name, film in (("words", None), ("film", given.film)):
                print(f"{name}: {ask(url, given.tokens, film)}", flush=True)
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
            assert peak is not None
            print(f"the server's largest memory: {int(peak[1]) / 2**20:.1f} GiB")
        finally:
            server.send_signal(signal.SIGTERM)
    return server.returncode


if __name__ == "__main__":
    sys.exit(main())
