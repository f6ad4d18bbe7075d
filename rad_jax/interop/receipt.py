"""What a conversion or an export did, for the record: sources, hashes, sizes, seconds, memory, differences."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from rad_jax import __version__

NAME = "receipt.json"
_INTERVAL_S = 0.02


class Meter:
    """Time and memory of this process while it is open. Memory is what Linux tells; None elsewhere."""

    def __enter__(self) -> "Meter":
        self._began = time.perf_counter()
        self._peak_anon = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def read(self) -> dict[str, Any]:
        """seconds; peak_anon_bytes, sampled: memory that is the process's own; peak_rss_bytes: with it, what it maps of files."""
        return {
            "seconds": round(time.perf_counter() - self._began, 3),
            "peak_anon_bytes": self._peak_anon or None,
            "peak_rss_bytes": _status("VmHWM") or None,
        }

    def _sample(self) -> None:
        while not self._ended.is_set():
            self._peak_anon = max(self._peak_anon, _status("RssAnon"))
            self._ended.wait(_INTERVAL_S)


def write(folder: Path, **contents: Any) -> None:
    """Writes `receipt.json`."""
    text = json.dumps({"rad_jax": __version__, **contents}, indent=2, ensure_ascii=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def add(folder: Path, **more: Any) -> None:
    """Adds to a receipt."""
    contents = json.loads((folder / NAME).read_text(encoding="utf-8"))
    write(folder, **{**contents, **more})


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes, or 0."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
