"""Who may see a data set, and whether its texts and images may be sent to an endpoint.

A data set is public, credentialed (given out under an agreement, as by PhysioNet) or private. The last two are restricted: what is made of
them, texts, images, answers, goes to no machine but this one, unless somebody attests that the endpoint's terms allow it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from rad_jax.errors import UserError

PUBLIC, CREDENTIALED, PRIVATE = LEVELS = ("public", "credentialed", "private")


def strictest(levels: Iterable[str]) -> str:
    """The most restricted of some levels; a word that is none of `LEVELS` counts as private, no level at all as public."""
    ranks = [LEVELS.index(level) if level in LEVELS else len(LEVELS) - 1 for level in levels]
    return LEVELS[max(ranks, default=0)]


def create(path: Path, level: str) -> Path:
    """Makes an empty file of `path`, or empties it, to be written by its name; unless `level` is public only its owner can read it, from
    its first byte on. Returns the path."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666 if level == PUBLIC else 0o600)
    if level != PUBLIC and stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, 0o600)  # one that was there keeps its mode otherwise
    os.close(descriptor)
    return path


def is_loopback(url: str) -> bool:
    """Whether an endpoint is on this machine. A server here that passes requests on to another one cannot be told from one that answers."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(url: str, access: str, attested_by: str | None) -> None:
    """Refuses to send data of the level `access` to an endpoint that may not have it.

    Args:
        url: the endpoint.
        access: one of `LEVELS`.
        attested_by: "NAME, YYYY-MM-DD": who has made sure, and when, that the data's agreement allows this endpoint and that it keeps nothing.

    Raises:
        UserError: restricted data, an endpoint that is not on this machine, and no attestation, or one that is none.
    """
    if attested_by is not None:
        _check_attestation(attested_by)
    if strictest([access]) == PUBLIC or is_loopback(url) or attested_by:
        return
    raise UserError(
        f"this data is {access}, and {urlsplit(url).hostname} is another machine: use a model on this one (--endpoint=http://127.0.0.1:PORT/v1), "
        "or, when the data's agreement allows that endpoint and it retains nothing, say who made sure of it: "
        '--attested_by="NAME, YYYY-MM-DD". Public data is marked so with --access=public where the command has it.'
    )


def _check_attestation(text: str) -> None:
    name, _, day = (part.strip() for part in text.rpartition(","))
    try:
        when = datetime.date.fromisoformat(day)
    except ValueError:
        when = None
    if not name or when is None or when > datetime.datetime.now(datetime.UTC).date():
        raise UserError('--attested_by is no attestation: write "NAME, YYYY-MM-DD", the day not in the future.')
