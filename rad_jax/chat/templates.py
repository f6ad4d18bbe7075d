"""Prompts as files: turns of a conversation with places for values.

A line `### system`, `### user` or `### assistant` begins a turn; {{name}} is a place. What stands above the first turn is a comment.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rad_jax.errors import UserError

_TURN = re.compile(r"^### *(system|user|assistant) *$", re.MULTILINE)
_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Template:
    """A prompt: turns of (role, text), and the first 8 hexadecimal digits of the SHA-256 of its file."""

    turns: tuple[tuple[str, str], ...]
    sha256: str

    def fill(self, values: Mapping[str, str]) -> list[dict[str, Any]]:
        """The messages of a request. A value is put in as it is, also one that looks like a place."""
        return [{"role": role, "content": _PLACE.sub(lambda m: values[m[1]], text)} for role, text in self.turns]


def load(path: Path, places: set[str]) -> Template:
    """Reads a prompt.

    Args:
        path: the file.
        places: the names that must stand in it, each at least once, and no others.

    Raises:
        UserError: no file, no turn of the user at its end, or other places.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no prompt in UTF-8 here: check the path.") from error
    parts = _TURN.split(text)[1:]
    turns = tuple((role, body.strip()) for role, body in zip(parts[::2], parts[1::2], strict=True))
    if not turns or turns[-1][0] != "user":
        raise UserError(
            f"{path}: a prompt has turns that begin with a line '### system' or '### user' and ends with one of the user."
        )
    found = {name for _, body in turns for name in _PLACE.findall(body)}
    if found != places:
        wanted = ", ".join("{{" + name + "}}" for name in sorted(places))
        raise UserError(f"{path}: a prompt for this has exactly the places {wanted}: add or remove what differs.")
    return Template(turns, hashlib.sha256(data).hexdigest()[:8])
