"""Decodes films in processes of their own: `python -m rad_jax.serving.decoder` reads requests from stdin and answers on stdout.

What a client sends is untrusted, and the codecs of DICOM are C and C++. Here a file that crashes one, or makes it fill the memory, ends a
process that holds nothing and can do nothing with the model. Frames are a line of JSON, then as many bytes as it says.
"""

import contextlib
import json
import re
import resource
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from rad_jax import images
from rad_jax.errors import UserError
from rad_jax.serving import headers, offline

MEMORY = 4 << 30  # address space in bytes: 64 megapixels take about 2.5 GB on their way
NAME = "the film"  # what errors call it


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory ends, this process is to end before the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    offline.forbid()
    load_codecs()
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while request := receive(stdin):
        asked, data = request
        try:
            answer, pixels = decode(data, asked["what"], asked["dicom"])
        except UserError as error:
            # The reason in brackets is another library's, and may quote the file.
            answer, pixels = {"error": re.sub(r" \(.*\)$", "", str(error), flags=re.DOTALL)}, b""
        except MemoryError:
            answer, pixels = {"error": f"{NAME}: takes too much memory to decode"}, b""
        send(stdout, answer, pixels)


def load_codecs() -> None:
    """Imports what the first film would else wait for; a server without pydicom reads pictures alone."""
    from PIL import JpegImagePlugin, PngImagePlugin  # noqa: F401

    with contextlib.suppress(ImportError):
        import pydicom.pixels  # noqa: F401


def decode(data: bytes, what: str, dicom: str) -> tuple[dict[str, Any], bytes]:
    """A film and what its header says of it.

    Args:
        data: contents of the file.
        what: "film", for the model (uint8), or "deep", for a viewer (uint16).
        dicom: one of `images.DICOM_STYLES`, for "film".

    Raises:
        UserError: no film, or one over the limits.
    """
    header = headers.read(data, NAME)
    told: dict[str, Any] = header._asdict()
    if what == "film":
        pixels = images.read_grey(data, NAME, dicom)
    else:
        pixels, told["window"] = images.read_deep(data, NAME)
    return {**told, "shape": pixels.shape}, np.ascontiguousarray(pixels).tobytes()


def send(file: IO[bytes], head: dict[str, Any], data: bytes) -> None:
    file.write(json.dumps({**head, "size": len(data)}).encode() + b"\n")
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next frame, or None at the end of the file."""
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    head = json.loads(line)
    data = file.read(head.pop("size"))
    return head, data


if __name__ == "__main__":
    main()
