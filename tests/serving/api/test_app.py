"""The process as its users start it: what it says, what it never says, and how it stops."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from rad_jax.errors import UserError
from rad_jax.serving import access, app, audit, batch, decoder, films, offline
from rad_jax.serving import command as commands

ROOT = Path(__file__).resolve().parents[3]
NAME = "MARKEDNAME^OF^A^PATIENT"
# The real app over a model that writes fixed text; its arguments: port, audit log, seconds a step, "broken" or not.
SERVER = """
import importlib.util, pathlib, sys
from rad_jax.serving import app, command
command.set_environment()
spec = importlib.util.spec_from_file_location("scripted", {conftest!r})
scripted = importlib.util.module_from_spec(spec)
sys.modules["scripted"] = scripted
spec.loader.exec_module(scripted)
from rad_jax.prompts import load_tokenizer
from rad_jax.serving.engine import Engine
port, log, seconds, broken, tokenizer, *tls = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)
model = scripted.ScriptedModel(tokenizer, 2, float(seconds))
model.broken = broken == "broken"
engine = Engine(model, tokenizer, [False] * tokenizer.vocab_size, frozenset([tokenizer.eos_id]), scripted.INFO, 4, 64, 4096)
made = app.create_app(engine, app.Settings(audit=pathlib.Path(log)))
sys.exit(app.serve(made, "127.0.0.1", int(port), **dict(zip(("certificate", "key"), map(pathlib.Path, tls)))))
"""


class Process:
    """That server, with its output in files."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        seconds: float,
        prefix: tuple[str, ...],
        tls: tuple[Path, ...],
        broken: bool,
    ):
        import socket

        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder
        code = SERVER.format(conftest=str(Path(__file__).with_name("conftest.py")))
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-c",
                    code,
                    str(self.port),
                    str(folder / "audit.jsonl"),
                    str(seconds),
                    "broken" if broken else "whole",
                    str(tokenizer),
                    *map(str, tls),
                ],
                cwd=ROOT,
                stdout=out,
                stderr=err,
            )

    def ready(self) -> bool:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return httpx.get(f"{self.url}/readyz").status_code == 200
            except httpx.TransportError:
                time.sleep(0.1)
        return False

    def logged(self) -> str:
        """All that it wrote, anywhere."""
        return "".join(path.read_text() for path in sorted(self.folder.iterdir()) if path.is_file())


@pytest.fixture
def process(tmp_path, small_tokenizer):
    made = []

    def start(seconds=0.0, prefix=(), tls=(), broken=False):
        folder = tmp_path / "server"
        folder.mkdir()
        made.append(Process(folder, small_tokenizer.path, seconds, prefix, tls, broken))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.wait()


def ask_everything(url, made):
    """Requests of each kind, good and bad, with a marked name wherever there is room for one."""
    film = made.dicom(PatientName=NAME, PatientID=NAME, StudyDescription=NAME)
    broken = film[:-100]
    lines = [{"type": "text", "text": NAME}]
    ask = {"model": "scripted", "messages": [{"role": "user", "content": lines}], "user": NAME}
    files = {"file": (f"{NAME}.dcm", film)}
    with httpx.Client(base_url=url, timeout=60) as client:
        return [
            client.post("/v1/findings", files=files, data={"indication": NAME}),
            client.post("/v1/findings", files=files, data={"indication": NAME, "stream": "true"}),
            client.post("/v1/film", files=files),
            client.post("/v1/chat/completions", json=ask),
            client.post("/v1/findings", files={"file": (f"{NAME}.dcm", broken)}, data={NAME: NAME}),
            client.post("/v1/findings", files=files, data={"max_new_tokens": NAME}),
            client.post("/v1/chat/completions", json={**ask, "model": NAME}),
            client.post("/v1/chat/completions", json={**ask, NAME: NAME}),
            client.post("/v1/chat/completions", content=b"{" + NAME.encode()),
            client.get(f"/v1/models/{NAME}?name={NAME}"),
            client.get(f"/{NAME}?name={NAME}", headers={"X-Name": NAME, "Cookie": NAME}),
            client.get("/v1/models", headers={"Host": NAME.replace("^", "-")}),
            client.request(NAME.replace("^", ""), "/"),
            client.get("/metrics"),
        ]


def test_no_log_knows_a_patient(process, made):
    served = process()
    assert served.ready()
    answers = ask_everything(served.url, made)
    assert [answer.status_code for answer in answers] == [200] * 4 + [400, 400, 404, 400, 400, 404, 404, 403, 405, 200]
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) == 0
    written = served.logged()
    assert written.count("/v1/findings") >= 8
    for part in re.split(r"\W", NAME):
        if len(part) > 2:
            assert part.lower() not in written.lower(), written
    assert "lungs" not in written  # nor what was answered
    assert "Traceback" not in written
    assert "MARKEDNAME" not in answers[-1].text


def test_the_audit_log(process, made):
    served = process()
    assert served.ready()
    film = made.grey(90)
    answer = httpx.post(f"{served.url}/v1/findings", files={"file": made.png(film)}, timeout=60)
    httpx.post(f"{served.url}/v1/findings", files={"file": b"none"})
    shown = httpx.post(f"{served.url}/v1/film", files={"file": made.png(film)}, timeout=60)
    httpx.get(f"{served.url}/healthz")
    good, bad, viewed = (json.loads(line) for line in (served.folder / "audit.jsonl").read_text().splitlines())
    assert good["request"] == answer.headers["x-request-id"] and answer.json()["id"].endswith(good["request"])
    assert good["film"] == hashlib.sha256(b"40x30:" + film.tobytes()).hexdigest()
    assert good["status"] == 200 and good["finish"] == "stop" and good["film_shape"] == [40, 30]
    assert good["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert (good["model"], good["bundle"]) == ("scripted", "ab" * 32)
    assert good["token"] is None and good["seconds"] >= good["first_token_seconds"] > 0
    assert bad["status"] == 400 and "film" not in bad
    values = np.asarray(Image.open(io.BytesIO(shown.content))).astype(np.uint16)
    assert viewed["film"] == hashlib.sha256(b"40x30:" + values.tobytes()).hexdigest() and viewed["status"] == 200
    assert viewed["film_shape"] == [40, 30] and viewed["film_bytes"] == len(made.png(film))
    assert (served.folder / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_sigterm_lets_what_runs_end_and_refuses_what_is_new(process, made):
    served = process(seconds=0.05)
    assert served.ready()
    found = []

    def ask():
        found.append(httpx.post(f"{served.url}/v1/findings", files={"file": made.png(made.grey())}, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    assert made.until(lambda: "rad_jax_running 1.0" in httpx.get(f"{served.url}/metrics").text)
    served.process.send_signal(signal.SIGTERM)

    def refused():
        try:
            return httpx.get(f"{served.url}/readyz").status_code == 503
        except httpx.TransportError:
            return True

    assert made.until(refused)
    thread.join(60)
    assert found[0].status_code == 200 and found[0].json()["findings"] == made.said(made.grey())
    assert served.process.wait(30) == 0
    assert (served.folder / "stderr").read_text() == ""


def test_a_server_whose_engine_has_failed_ends_with_a_status_that_has_it_started_again(process):
    served = process(broken=True)
    assert served.ready()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
    answers = [httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [500] * 3
    assert served.process.wait(30) == 1
    assert "error: the engine failed 3 times in a row (RuntimeError): start the server again" in served.logged()
    assert "PATIENT" not in served.logged()


def test_tls(process, made, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    served = process(tls=files)
    context = ssl.create_default_context(cafile=str(files[0]))

    def answers():
        try:
            return httpx.get(f"https://127.0.0.1:{served.port}/readyz", verify=context).status_code == 200
        except httpx.TransportError:
            return False

    assert made.until(answers, 60)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{served.port}/readyz")


def namespaces() -> bool:
    tried = subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True)
    return tried.returncode == 0


INSIDE = """
set -e
ip link set lo up
test -z "$(ip route)"
exec "$0" "$@"
"""


def test_it_works_in_a_network_namespace_without_routes(process, made, tmp_path):
    """The client must be in the same namespace: a second program, which asks and writes down what it got."""
    if not namespaces():
        pytest.skip("this machine does not let its users make network namespaces (unshare -rn)")
    served = process(prefix=("unshare", "-rn", "sh", "-c", INSIDE))
    (tmp_path / "film.dcm").write_bytes(made.dicom())
    client = f"""
import sys, time, pathlib
import httpx2 as httpx
for _ in range(600):
    try:
        httpx.get("{served.url}/readyz"); break
    except httpx.TransportError:
        time.sleep(0.1)
print(httpx.post("{served.url}/v1/findings", files={{"file": pathlib.Path(sys.argv[1]).read_bytes()}}, timeout=60).text)
"""
    inside = ["nsenter", f"--target={served.process.pid}", "--user", "--net", "--preserve-credentials"]
    assert made.until(lambda: os.readlink(f"/proc/{served.process.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
    done = subprocess.run(
        [*inside, sys.executable, "-c", client, str(tmp_path / "film.dcm")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"].startswith("the lungs")
    # Of its sockets, one listens and no other is of its own making: no other TCP, no UDP, no raw packets.
    net = Path(f"/proc/{served.process.pid}/net")
    for kind in ("tcp6", "udp", "udp6", "raw", "raw6", "packet"):
        assert not (net / kind).exists() or len((net / kind).read_text().splitlines()) == 1, kind
    table = (net / "tcp").read_text().splitlines()[1:]
    local = f"0100007F:{served.port:04X}"
    assert any(line.split()[1] == local and line.split()[3] == "0A" for line in table)
    assert all(local in line.split()[1:3] for line in table)


def test_what_reaches_for_the_network_is_an_error():
    """Of Python code. What the server itself needs goes on: its socket, its clients, and the name that it listens on."""
    code = """
import asyncio, socket
from rad_jax.serving import offline
offline.forbid(("listened.example",))
here = socket.create_server(("127.0.0.1", 0))
there, udp = here.getsockname(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tries = (
    lambda: socket.create_connection(there),
    lambda: socket.socket().connect_ex(there),
    lambda: udp.sendto(b"x", there),
    lambda: udp.sendmsg([b"x"], [], 0, there),
    lambda: socket.getaddrinfo("hub.example", 443),
    lambda: socket.gethostbyname("hub.example"),
    lambda: socket.getnameinfo(("192.0.2.1", 443), 0),
)
for one in tries:
    try:
        print(one())
    except PermissionError as error:
        print(error)
a, b = socket.socketpair()
print(a.sendmsg([b"x"]), len(socket.getaddrinfo("localhost", 80)) > 0, len(socket.getaddrinfo("::1", 80)) > 0)
try:
    socket.getaddrinfo("listened.example", 80)
except socket.gaierror:
    print("asked")
async def listen():
    (await asyncio.start_server(print, "localhost", 0)).close()
asyncio.run(listen())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    connection, datagram, name = (
        f"this server {what}" for what in ("opens no connections", "sends no datagrams", "looks no names up")
    )
    expected = [connection] * 2 + [datagram] * 2 + [name] * 3
    assert done.stdout.splitlines() == [*expected, "1 True True", "asked"], done.stderr


def test_decoders_a_batch_and_what_loads_a_bundle_are_offline_too(monkeypatch):
    called: list[Any] = []
    info = types.SimpleNamespace(name="a", bundle_sha256="b", version="c")
    engine = types.SimpleNamespace(info=info, close=lambda **_: None)
    monkeypatch.setattr(offline, "forbid", lambda *names: called.append(names))
    monkeypatch.setattr(decoder, "load_codecs", lambda: called.append("codecs"))
    monkeypatch.setattr(decoder.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    decoder.main()
    assert called == [(), "codecs"]

    def load(*_):
        called.append("loaded")
        return engine

    monkeypatch.setattr(commands, "load", load)
    monkeypatch.setattr(batch, "read", lambda _: [])
    monkeypatch.setattr(batch, "run", lambda *_, **__: (0, 0))
    options = {option.name: option.default for option in commands.OPTIONS}
    assert commands.run("bundle", options, ("in.csv", "out.jsonl")) == 0
    assert called[2:] == [(), "loaded"]
    monkeypatch.setattr(app, "check_port", lambda *_: None)
    monkeypatch.setattr(app, "create_app", lambda *_: None)
    monkeypatch.setattr(app, "serve", lambda *_, **__: called.append("served"))
    commands.run("bundle", options, None)
    assert called[4:] == [(("127.0.0.1",),), "loaded", "served"]


def test_the_engine_hears_of_films_that_are_decoded(plain):
    service = plain.app.state.service
    assert service.engine.others == service.films.busy and service.engine.others() == 0


def test_a_crash_tells_its_place_and_no_value(plain, made, capsys):
    plain.model.broken = True
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
    answer = httpx.post(f"{plain.url}/v1/chat/completions", json=body)
    assert answer.status_code == 500 and "PATIENT" not in answer.text
    streamed = httpx.post(f"{plain.url}/v1/chat/completions", json={**body, "stream": True})
    assert streamed.text.split("\n\n")[-2].startswith('data: {"error"') and "PATIENT" not in streamed.text
    plain.app.state.service.films.decode = None  # whatever a bug may be
    answer = httpx.post(f"{plain.url}/v1/findings", files={"file": made.png(made.grey())})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    errors = capsys.readouterr().err
    assert "TypeError at" in errors and re.search(r"Broken at \w+\.py:\d+ < engine\.py", errors)
    assert "PATIENT" not in errors


@pytest.mark.parametrize("partly", [False, True], ids=["not at all", "in part"])
def test_an_audit_log_that_cannot_be_written_stops_the_answers_until_a_restart(
    serve, made, tmp_path, monkeypatch, capsys, partly
):
    served = serve(audit=tmp_path / "audit.jsonl")
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
    write, lines, room = os.write, [0], [True]

    def counted(file, data):
        lines[0] += 1
        if not room[0] and not partly:
            raise OSError(28, "No space left on device")
        return write(file, data if room[0] else data[:10])

    def post(url=served.url):
        before = lines[0]
        status = httpx.post(f"{url}/v1/chat/completions", json=body).status_code
        assert made.until(lambda: lines[0] > before)  # a line is written after its answer
        return status

    monkeypatch.setattr(audit.os, "write", counted)
    assert post() == 200
    room[0] = False
    assert post() == 200  # its line is the one that is lost
    assert post() == 503
    room[0] = True
    assert post() == 503 and post() == 503  # there are lines of these refusals again
    assert httpx.get(f"{served.url}/readyz").status_code == 503
    assert ("only a part" if partly else "No space left") in capsys.readouterr().err
    served.stop()
    with open(tmp_path / "audit.jsonl", "ab") as file:
        file.write(b'{"time": "20')
    again = serve(audit=tmp_path / "audit.jsonl")
    assert post(again.url) == 200
    again.stop()
    found = []
    for line in (tmp_path / "audit.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line)["status"])
        except ValueError:
            found.append("torn")
    assert found == [200, *["torn"] * (2 if partly else 0), 503, 503, "torn", 200]


def test_the_plain_routes(plain):
    assert httpx.get(f"{plain.url}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{plain.url}/readyz").json()
    assert ready["status"] == "ready" and ready["name"] == "scripted" and ready["slots"] == 2
    answer = httpx.get(f"{plain.url}/metrics")
    assert "rad_jax_kv_tokens_total 4096.0" in answer.text and "process_resident_memory_bytes" in answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert httpx.get(f"{plain.url}/docs").status_code == 404  # FastAPI's would load scripts from elsewhere
    document = httpx.get(f"{plain.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/findings", "/v1/film", "/readyz"} <= document["paths"].keys()
    assert "event: piece" in json.dumps(document["paths"]["/v1/findings"])
    assert "422" not in json.dumps(document)
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["scripted"]


def test_the_page_may_ask_this_server_alone(plain):
    answer = httpx.get(plain.url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=[\"']?https?:", answer.text)


def test_tokens(serve, tmp_path):
    file = tmp_path / "tokens.txt"
    first, second = access.add_token(file, "ward-3"), access.add_token(file, "ward-4")
    assert first not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="already"):
        access.add_token(file, "ward-3")
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    third = access.add_token(file, "ward-5")
    assert [access.name_of(t, access.read_tokens(file)) for t in (first, second, third)] == [
        "ward-3",
        "ward-4",
        "ward-5",
    ]
    with pytest.raises(UserError, match="name of a token"):
        access.add_token(file, "ward 3")
    served = serve(tokens=access.read_tokens(file), audit=tmp_path / "audit.jsonl")
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
    for headers in (
        {},
        {"Authorization": "Bearer rad_no"},
        {"Authorization": f"Basic {first}"},
        {"Authorization": first},
    ):
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/metrics", "/v1/models", "/nothing"):
        assert httpx.get(served.url + path).status_code == 401
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        answer = httpx.get(served.url + path)
        assert answer.status_code == 200 and "scripted" not in answer.text and "ab" * 32 not in answer.text
    openai = pytest.importorskip("openai")
    for token in (first, second):
        served.client(api_key=token).chat.completions.create(**body)
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key=first[:-1]).chat.completions.create(**body)
    httpx.get(f"{served.url}/healthz")  # a line is written after its answer, and before the next request is read
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["token"], line["status"]) for line in lines] == [
        *[(None, 401)] * 4,
        ("ward-3", 200),
        ("ward-4", 200),
        (None, 401),
    ]


def test_readiness_is_told_to_all_and_its_reasons_to_those_with_a_token(serve, tmp_path):
    token = access.add_token(tmp_path / "tokens.txt", "ward-3")
    served = serve(tokens=access.read_tokens(tmp_path / "tokens.txt"))
    known = {"Authorization": f"Bearer {token}"}
    others: list[dict[str, str]] = [{}, {"Authorization": "Bearer rad_no"}]

    def ready(headers):
        answer = httpx.get(f"{served.url}/readyz", headers=headers)
        return answer.status_code, answer.json()

    assert [ready(other) for other in others] == [(200, {"status": "ready"})] * 2
    status, told = ready(known)
    assert status == 200 and told["status"] == "ready" and told["name"] == "scripted" and told["device"] == "cpu"
    served.app.state.service.audit.broken = True
    for other in others:
        status, told = ready(other)
        assert status == 503 and (told["error"]["message"], told["error"]["code"]) == ("not ready.", "not_ready")
    status, told = ready(known)
    assert status == 503 and told["error"]["code"] == "audit"


def test_an_unknown_token_is_refused_before_its_body_is_read(serve, tmp_path):
    import socket

    access.add_token(tmp_path / "tokens.txt", "ward-3")
    served = serve(tokens=access.read_tokens(tmp_path / "tokens.txt"))
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(b"POST /v1/findings HTTP/1.1\r\nHost: x\r\nContent-Length: 40000000\r\n\r\n")
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("text", ["", "# none\n", "ward-3 abc\n", "ward-3\n"])
def test_files_that_hold_no_tokens(tmp_path, text):
    (tmp_path / "tokens.txt").write_text(text)
    with pytest.raises(UserError, match=r"tokens\.txt"):
        access.read_tokens(tmp_path / "tokens.txt")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ],
)
def test_pages_from_elsewhere_cannot_use_a_server_without_tokens(plain, headers, status):
    assert httpx.get(f"{plain.url}/readyz", headers=headers).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "hospital.example"])
def test_other_addresses_need_tokens(host):
    with pytest.raises(UserError, match="make a token first"):
        access.check_bind(host, None)
    access.check_bind(host, {"hash": "name"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host):
    access.check_bind(host, None)


def command(*arguments, module="rad_jax.serving", cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "BUNDLE is missing"),
        (["bundle", "--host=0.0.0.0"], "make a token first"),
        (["bundle", "--tokens=missing.txt"], "missing.txt: cannot be read"),
        (["--add_token=ward-3"], "--tokens is missing"),
        (["bundle", "--certificate=cert.pem"], "belong together"),
        (["bundle", "--timeout=0"], "--timeout must be"),
        (["bundle", "--max_new_tokens=513"], "between 1 and 512"),
        (["bundle", "--host=192.0.2.1", "--tokens={tokens}"], "cannot be listened on"),
        (["missing-bundle", "--port={port}"], "missing-bundle"),
        # All of these before anything is loaded: there is no such bundle.
        (["missing-bundle", "--certificate={tokens}", "--key=none.pem"], "none.pem: there is no such file"),
        (["missing-bundle", "--certificate={tokens}", "--key={tokens}"], "no certificate in PEM"),
        (["missing-bundle", "--port={port}", "--audit=no-folder/audit.jsonl"], "audit log cannot be written"),
        (
            ["missing-bundle", "--audit=no-folder/audit.jsonl", "--batch", "{films}", "out.jsonl"],
            "audit log cannot be written",
        ),
        (["missing-bundle", "--batch", "none.csv", "out.jsonl"], "none.csv: cannot be read"),
        (["--tokens=no-folder/tokens.txt", "--add_token=ward-4"], "no-folder/tokens.txt"),
    ],
)
def test_one_sentence_for_what_cannot_be(arguments, said, tmp_path):
    import socket

    access.add_token(tmp_path / "tokens.txt", "ward-3")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (tmp_path / "films.csv").write_text("image\n")
    names = {"tokens": tmp_path / "tokens.txt", "port": port, "films": tmp_path / "films.csv"}
    given = [part.format(**names) for part in arguments]
    status, _, errors = command(*given)
    assert status == 2 and errors.splitlines()[-1].startswith("error: ") and said in errors
    assert "Traceback" not in errors


def test_a_token_is_shown_once(tmp_path):
    status, out, _ = command(f"--tokens={tmp_path / 'tokens.txt'}", "--add_token=ward-3", module="launch.serve")
    token = out.splitlines()[0]
    assert status == 0 and token.startswith("rad_")
    assert access.name_of(token, access.read_tokens(tmp_path / "tokens.txt")) == "ward-3"


def test_the_server_needs_no_jax(tmp_path):
    """With jax, flax and absl out of reach, the app and the command import."""
    code = """
import sys
for name in ("jax", "jaxlib", "flax", "absl", "optax", "orbax"):
    sys.modules[name] = None
from rad_jax.serving import app, batch, loading, __main__
__main__.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--batch IN.csv OUT.jsonl" in done.stdout


def test_the_hash_of_pixels_knows_their_shape():
    film = np.zeros((2, 3), np.uint8)
    assert films.hashed(film) != films.hashed(film.reshape(3, 2))


def test_lines_of_the_access_log(plain, capsys):
    for _ in range(2):  # a line is written after its answer, and before the next request is read
        httpx.get(f"{plain.url}/healthz?name=x")
    line = capsys.readouterr().out.splitlines()[0].split()
    assert line[2:6] == ["-", "GET", "/healthz", "200"]
