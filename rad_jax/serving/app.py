"""The server: its routes behind its guards, and the process around them."""

import asyncio
import contextlib
import dataclasses
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.formparsers import MultiPartParser
from uvicorn.protocols.http.h11_impl import H11Protocol

from rad_jax import __version__
from rad_jax.errors import UserError
from rad_jax.serving import access, audit, chat_api, errors, findings_api, gate, limits, offline
from rad_jax.serving.audit import Audit
from rad_jax.serving.engine import Engine
from rad_jax.serving.films import Films
from rad_jax.serving.metrics import Metrics
from rad_jax.serving.service import Service

PAGE = Path(__file__).with_name("page.html")
# One file with its own style and script; it may ask this server and nobody else.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NOTICE = "Findings for chest radiographs. Not for clinical use: research only."


@dataclasses.dataclass(frozen=True)
class Settings:
    """
    Attributes:
        tokens: names by the SHA-256 of their tokens (`access.read_tokens`); None: this machine alone, and anybody on it.
        audit: file of the audit log.
        dicom: how a DICOM's grey values are made, one of `images.DICOM_STYLES`.
        timeout: seconds that a request may take, until its client has read its answer.
    """

    tokens: Mapping[str, str] | None = None
    audit: Path | None = None
    dicom: str = "mimic_cxr_jpg"
    timeout: float = 120.0


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The whole server over an engine, which it closes when it is shut down.

    Raises:
        UserError: the audit log cannot be written.
    """
    info = engine.info
    log = Audit(settings.audit, model=info.name, bundle=info.bundle_sha256, version=info.version)
    films = Films()
    engine.others = films.busy
    service = Service(engine, films, log, Metrics(engine.stats), settings.dicom, settings.timeout)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.stopping = True
        service.close()

    # No pages of documentation: theirs load scripts from elsewhere.
    app = FastAPI(
        title="rad_jax", version=__version__, description=NOTICE, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.service = service
    errors.install(app)
    app.include_router(chat_api.router(service))
    app.include_router(findings_api.router(service))
    add_plain_routes(app, service)
    complete_document(app, info.name if settings.tokens is None else None)
    MultiPartParser.spool_max_size = limits.BODY + 1  # over this it would write to disk; no body comes so far
    app.add_middleware(gate.BodyGate)
    app.add_middleware(access.Guard, tokens=settings.tokens)
    app.add_middleware(audit.Recorder, audit=log, seen=service.metrics.seen)
    app.add_middleware(gate.Unread, seconds=settings.timeout)
    return app


def add_plain_routes(app: FastAPI, service: Service) -> None:
    """The page, and what watches over the server."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @app.get("/healthz", tags=["watch"], responses=errors.responses(403))
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["watch"], responses=errors.responses(403, 503))
    async def readyz(http: Request) -> dict[str, Any]:
        """The model is loaded and requests are taken. Which model, or why not, is told to who has a token, where there are tokens."""
        trusted = http.state.trusted
        try:
            service.check()
        except errors.ApiError as error:
            raise error if trusted else errors.ApiError(503, "not ready.", code="not_ready") from None
        return {"status": "ready", **(dataclasses.asdict(service.engine.info) if trusted else {})}

    @app.get("/metrics", tags=["watch"], response_class=Response, responses=errors.responses(401, 403))
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def complete_document(app: FastAPI, model: str | None) -> None:
    """Says in the OpenAPI document that routes take a bearer token, and which model there is; leaves out the 422 that is never given.

    Args:
        app: whose document it is.
        model: its name; None where only who has a token may know it, for the document is for everybody.
    """
    made: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = made()
        schemas = document["components"]["schemas"]
        if model is not None:
            schemas["ChatRequest"]["properties"]["model"]["enum"] = [model]
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for route in methods.values():
                route["responses"].pop("422", None)
                if path not in access.OPEN:
                    route["security"] = [{}, {"token": []}]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class Server(uvicorn.Server):
    """Uvicorn, which on SIGTERM refuses what is new, lets what runs end, and then ends; so it does when the engine has failed."""

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.config.app.state.service.engine.failed is not None  # type: ignore[union-attr]

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.config.app.state.service.stopping = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # they are answered: not to be raised again at the end


class Connection(H11Protocol):
    """Uvicorn's, which would wait for ever for the head of a request, and for the end of an answer to be read.

    A head that has not come whole in time closes the connection, and one that is closed is cut when nothing more of its answer is read.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}  # for `gate.Unread`
        self._last: Any = None
        self._unread = 0
        self._look_again()

    def _look_again(self) -> None:
        self.loop.call_later(limits.HEAD_SECONDS, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            before, self._unread = self._unread, self.transport.get_write_buffer_size()
            if before and self._unread >= before:
                self.transport.abort()
            elif self._unread:
                self._look_again()
            return
        if self.conn.their_state is h11.IDLE and self.cycle is self._last:  # no head since the last look
            self.transport.close()
        self._last = self.cycle
        self._look_again()


def serve(
    app: FastAPI,
    host: str,
    port: int,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    say: Callable[[str], object] = print,
) -> int:
    """Answers until SIGTERM or Ctrl-C, or until the engine has failed for good.

    Logs are ours alone; uvicorn's would hold query strings, and values of exceptions.

    Returns:
        The exit status: 1 after such a failure, so that whoever watches over the process starts it again.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would put films on the disk
    offline.forbid((host,))
    app.state.service.films.start()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="asyncio",
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(app.state.service.seconds) + 10,  # not for ever, for one that does not read
        h11_max_incomplete_event_size=64 * 1024,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    say(f"serving on http{'s' if certificate else ''}://{host}:{port}/ ({NOTICE})")
    Server(config).run()
    failed = app.state.service.engine.failed
    if failed:
        audit.say(f"error: {failed}: start the server again")
    return 1 if failed else 0


def check_certificate(certificate: Path, key: Path) -> None:
    """Refuses files that TLS cannot be spoken with, before minutes go into loading.

    Raises:
        UserError: one is missing, no PEM, or the key is not the certificate's.
    """
    for path in (certificate, key):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file.")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise UserError(
            f"{certificate} and {key} are no certificate in PEM with its key, without a password ({reason})."
        ) from error


def check_port(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on, before minutes go into loading.

    Raises:
        UserError: it is in use, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host={host} --port={port} cannot be listened on ({reason}): choose another.") from error
