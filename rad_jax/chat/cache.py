"""Answers on disk by what was asked: a run that is started again asks nothing twice.

The key is a hash of model, messages and parameters. The endpoint is not in it, so that the same model elsewhere gives the same answers. The
file holds answers, which may repeat report text: it is made readable to its owner alone and belongs where the data belongs.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any, NamedTuple

from rad_jax.errors import UserError


class Reply(NamedTuple):
    """A model's whole answer, and the tokens it was charged for."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def key_of(body: Any) -> str:
    """SHA-256 of a request as canonical JSON."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """FOLDER/answers.sqlite, safe for threads, and for several processes at once.

    Raises:
        UserError: the file is no cache, or damaged.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / "answers.sqlite"
        self._lock = threading.Lock()
        self._path.touch(mode=0o600)
        try:
            self._db = sqlite3.connect(self._path, timeout=60, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "PRAGMA synchronous=NORMAL"
            )  # a lost power supply may cost the last answers, never the file
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, prompt INTEGER, completion INTEGER)"
            )
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self._path}: damaged: remove it, or name another folder with --cache.") from error

    def get(self, key: str) -> Reply | None:
        with self._lock:
            row = self._db.execute("SELECT text, prompt, completion FROM answers WHERE key = ?", (key,)).fetchone()
        return Reply(*row) if row else None

    def put(self, key: str, reply: Reply) -> None:
        """On disk when it returns."""
        with self._lock, self._db:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, *reply))

    def close(self) -> None:
        with self._lock:
            self._db.close()
