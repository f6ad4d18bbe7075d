"""The command, under both of its names: `python -m rad_jax.serving` (argparse; no jax, no absl) and `python -m launch.serve` (absl)."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from rad_jax.errors import UserError
from rad_jax.serving import limits

HELP = """Serves an exported bundle: findings for chest radiographs, on this machine, with no network. Not for clinical use.

    {command} BUNDLE
    {command} BUNDLE --batch IN.csv OUT.jsonl
    {command} --tokens=tokens.txt --add_token=ward-3
    {command} BUNDLE --host=0.0.0.0 --tokens=tokens.txt --audit=audit.jsonl --certificate=cert.pem --key=key.pem

BUNDLE is what launch.export --format=hf wrote. How much memory it needs is said before it is loaded. Then
http://127.0.0.1:8000/ is a page to try it, /v1/chat/completions speaks as OpenAI does, /v1/findings takes a DICOM, PNG or JPEG and the
reason for the exam, and /openapi.json tells all of them. /healthz, /readyz and /metrics are for those who run it; with --tokens
/readyz tells which model there is, and why it is not ready, to who has one. SIGTERM lets what is being written end. When the card
fails, or three steps in a row do, /readyz says so (503) and the process ends with status 1, to be started again.

Only this machine is answered, unless there are --tokens: a file of names and hashes. --add_token adds one, shows it once, and ends.
stdout is the access log; neither it nor the --audit log holds text, names of files or tags of a DICOM. Uploads stay in memory.

--batch writes findings for the films of a CSV with the columns image (beside the CSV) and, if wanted, indication and id. The same command
after a kill goes on; one with another indication, or other settings, is refused. --audit gets a line for each film. Rows that cannot be answered are listed in OUT.bad.jsonl, and the exit status is then 1.
"""


class Option(NamedTuple):
    """One flag; `choices` where only some values are allowed."""

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] | None = None


OPTIONS = (
    Option("host", str, "127.0.0.1", "Address to listen on."),
    Option("port", int, 8000, "Port to listen on."),
    Option("tokens", str, None, "File of names and hashes of bearer tokens; who has none is refused."),
    Option("add_token", str, None, "Make a token of this name, add its hash to --tokens, show it, and end."),
    Option("audit", str, None, "File that the audit log is added to, a JSON line for each request, or row of --batch."),
    Option("certificate", str, None, "PEM file, to speak TLS; with --key."),
    Option("key", str, None, "PEM file of the certificate's key."),
    Option(
        "timeout",
        int,
        120,
        "Seconds that a request may take, from its first byte on: upload, waiting and the sending of its answer included.",
    ),
    Option("queue", int, 64, "Requests that may wait; further ones get 429."),
    Option("slots", int, None, "Requests written at once; without it as many as memory holds."),
    Option("device", str, "auto", "Where to compute.", ("auto", "cpu", "cuda")),
    Option("dtype", str, None, "To compute in; without it the best that fits.", ("float32", "bfloat16", "float16")),
    Option(
        "weights",
        str,
        None,
        "Smaller weights for the language model: of 7 billion, int8 for cards of 10 GB and more, nf4 for 8 GB.",
        ("int8", "nf4"),
    ),
    Option(
        "dicom",
        str,
        "mimic_cxr_jpg",
        "Grey values of a DICOM: as MIMIC-CXR-JPG made them, which LLaVA-Rad was trained on, or through the DICOM's window.",
        ("mimic_cxr_jpg", "window"),
    ),
    Option("max_new_tokens", int, limits.DEFAULT_NEW_TOKENS, "Longest text, with --batch."),
)


def set_environment() -> None:
    """Keeps libraries from asking a hub and from reporting use; to be called before they are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")


def run(bundle: str | None, options: dict[str, Any], batch: tuple[str, str] | None) -> int:
    """Does what the flags ask for; returns the exit status.

    Raises:
        UserError: they cannot be used together, or what they name cannot be used.
    """
    from rad_jax.serving import access, offline
    from rad_jax.serving.audit import Audit

    set_environment()
    tokens = Path(options["tokens"]) if options["tokens"] else None
    if options["add_token"]:
        if tokens is None:
            raise UserError("--tokens is missing: the file to add the token to.")
        token = access.add_token(tokens, options["add_token"])
        print(f"{token}\nKeep it: it is not shown again. Restart the server to use it.")
        return 0
    if bundle is None:
        raise UserError("BUNDLE is missing: the folder to serve (see --help).")
    if not 1 <= options["max_new_tokens"] <= limits.NEW_TOKENS:
        raise UserError(f"--max_new_tokens must be between 1 and {limits.NEW_TOKENS}.")
    for name in ("timeout", "queue"):
        if options[name] < 1:
            raise UserError(f"--{name} must be at least 1.")
    if bool(options["certificate"]) != bool(options["key"]):
        raise UserError("--certificate and --key belong together: give both.")
    known = access.read_tokens(tokens) if tokens else None
    access.check_bind(options["host"], known)
    Audit(audit_file(options)).close()  # to see that it can be written, before minutes go into loading
    if batch:
        offline.forbid()
        return run_batch(bundle, batch, options)
    return serve(bundle, options, known)


def audit_file(options: dict[str, Any]) -> Path | None:
    return Path(options["audit"]) if options["audit"] else None


def load(bundle: str, options: dict[str, Any]) -> Any:
    from rad_jax.serving import loading

    given = {name: options[name] for name in ("device", "dtype", "weights", "slots", "queue")}
    return loading.load(Path(bundle), **given)


def run_batch(bundle: str, batch: tuple[str, str], options: dict[str, Any]) -> int:
    from rad_jax.serving import batch as batches
    from rad_jax.serving.audit import Audit

    source, out = map(Path, batch)
    batches.read(source)  # a list that cannot be used is refused before, too
    engine = load(bundle, options)
    info, wanted = engine.info, {name: options[name] for name in ("dicom", "max_new_tokens")}
    try:
        audit = Audit(audit_file(options), model=info.name, bundle=info.bundle_sha256, version=info.version)
        done, bad = batches.run(engine, source, out, audit=audit, **wanted)
    finally:
        engine.close(drain=False)
    print(f"{out}: findings for {done} films." + (f" {bad} have none: see {batches.bad_path(out)}." if bad else ""))
    return 1 if bad else 0


def serve(bundle: str, options: dict[str, Any], tokens: dict[str, str] | None) -> int:
    from rad_jax.serving import offline

    # Before anything is loaded; `app.serve` does so too, for those who call it alone.
    offline.forbid((options["host"],))
    try:
        from rad_jax.serving import access, app
    except ImportError as error:
        raise UserError(
            f"the server needs the package {error.name}: install requirements-serve.txt, or rad_jax[serve]."
        ) from error

    certificate, key = (Path(options[name]) if options[name] else None for name in ("certificate", "key"))
    if not access.is_loopback(options["host"]):
        if not certificate:
            print("warning: without --certificate tokens and films cross the network unencrypted.")
        if not options["audit"]:
            print("warning: without --audit nobody can tell later who asked.")
    if certificate and key:
        app.check_certificate(certificate, key)
    app.check_port(options["host"], options["port"])
    settings = app.Settings(tokens, audit_file(options), options["dicom"], float(options["timeout"]))
    made = app.create_app(load(bundle, options), settings)
    return app.serve(made, options["host"], options["port"], certificate=certificate, key=key)
