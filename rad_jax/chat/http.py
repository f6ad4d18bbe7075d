"""One POST, over by its deadline whatever the server does. Follows no redirect and uses no proxy: only the named machine is spoken to."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

MOST_BYTES = 16_000_000  # of an answer


@dataclass(frozen=True)
class Response:
    """What a server answered; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NoAnswerError(Exception):
    """The server gave no whole answer. The message is one of few phrases; `absent` when nothing listens there at all."""

    def __init__(self, reason: str, absent: bool = False):
        super().__init__(reason)
        self.absent = absent


def post(url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> Response:
    """Sends a request and reads the answer.

    Args:
        url: http or https.
        body: sent as it is.
        headers: of the request.
        seconds: after which the connection is cut, also one that still sends a byte now and then.

    Raises:
        NoAnswerError: no connection, no answer in time, or half of one.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    late = threading.Event()
    sockets: list[socket.socket] = []  # the connection forgets its own once the answer begins
    watch = threading.Timer(seconds, _cut, (sockets, late))
    watch.daemon = True
    watch.start()
    try:
        connection.connect()
        sockets.append(connection.sock)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body=body, headers={**headers, "Connection": "close"})
        with connection.getresponse() as response:
            data = response.read(MOST_BYTES + 1)
            left = response.length
            found = {name.lower(): value for name, value in response.getheaders()}
    except (ConnectionRefusedError, socket.gaierror) as error:
        raise NoAnswerError("nothing listens there", absent=True) from error
    except ssl.SSLCertVerificationError as error:
        raise NoAnswerError("its certificate does not hold", absent=True) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        in_time = not late.is_set() and not isinstance(error, TimeoutError)
        raise NoAnswerError("connection lost" if in_time else "no answer in time") from error
    finally:
        watch.cancel()
        connection.close()
    if late.is_set():
        raise NoAnswerError("no answer in time")
    if len(data) > MOST_BYTES:
        raise NoAnswerError("answer too long")
    if left:
        raise NoAnswerError("connection lost")
    return Response(response.status, found, data)


def _cut(sockets: list[socket.socket], late: threading.Event) -> None:
    late.set()
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
