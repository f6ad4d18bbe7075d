"""What is too large, too much, too slow, or not what it says."""

import contextlib
import gc
import io
import itertools
import os
import signal
import socket
import struct
import tempfile
import threading
import time
import tracemalloc
import zlib
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from rad_jax.errors import UserError
from rad_jax.serving import films, headers, limits
from rad_jax.serving.gate import BodyGate


@pytest.fixture(scope="module")
def reader():
    one = films.Films(1)
    yield one
    one.close()


def test_a_body_over_the_limit_is_refused_unread(plain):
    with socket.create_connection(("127.0.0.1", plain.port)) as connection:
        head = f"POST /v1/findings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {limits.BODY + 1}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_in_chunks_is_counted(plain):
    sent = 0

    def chunks():
        nonlocal sent
        while sent < 2 * limits.BODY:
            sent += 10**6
            yield b"x" * 10**6

    answer = httpx.post(f"{plain.url}/v1/chat/completions", content=chunks(), timeout=30)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
    assert sent < 1.5 * limits.BODY
    assert httpx.get(f"{plain.url}/healthz").status_code == 200


def test_all_bodies_together_are_limited(plain, made, monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 1000)
    answer = httpx.post(f"{plain.url}/v1/findings", files={"file": b"x" * 1000})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    for _ in range(3):  # what was held is given back
        assert httpx.post(f"{plain.url}/v1/findings", files={"file": b"x" * 400}).status_code == 400


def test_a_body_that_dawdles_is_given_up(plain, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", plain.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_connection_without_a_request_is_closed_and_one_that_waits_for_its_answer_is_not(serve, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    served = serve()
    served.model.go.clear()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30))
    )
    thread.start()
    for head in (
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head)
            connection.settimeout(10)
            while data := connection.recv(1000):  # until the server hangs up
                assert data.startswith(b"HTTP/1.1 200") or b"ok" in data
    served.model.go.set()
    thread.join(30)
    assert answers[0].status_code == 200


def test_uploads_stay_in_memory(plain, made, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))  # where a spooled file would be
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000), np.uint8)
    answer = httpx.post(f"{plain.url}/v1/findings", files={"file": made.png(noise)}, timeout=60)
    assert answer.status_code == 200


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many black pixels, of which few bytes are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return headers.PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_pixels_are_counted_before_decoding(reader, made):
    for data in (bomb(8001, 8000), bomb(60000, 60000), made.dicom(Rows=9000, Columns=9000)):
        with pytest.raises(UserError, match="more than 64 megapixels"):
            reader.decode(data, "window")
    with pytest.raises(UserError, match="damaged"):  # within the limit, and cut short
        reader.decode(bomb(8000, 8000), "window")


def encapsulated(made, frame: bytes, syntax: str, rows: int = 40, columns: int = 30) -> bytes:
    import pydicom
    from pydicom.encaps import encapsulate

    dataset = pydicom.dcmread(io.BytesIO(made.dicom()))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


JPEG_BASELINE, JPEG2000 = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"


@pytest.mark.parametrize(("kind", "syntax"), [("JPEG", JPEG_BASELINE), ("JPEG2000", JPEG2000)])
def test_the_codestream_must_have_the_size_that_the_dicom_says(reader, made, kind, syntax):
    pytest.importorskip("gdcm")
    buffer = io.BytesIO()
    options = {"no_jp2": True} if kind == "JPEG2000" else {}
    Image.fromarray(np.tile(np.arange(30, dtype=np.uint8) * 8, (40, 1))).save(buffer, format=kind, **options)
    frame = buffer.getvalue()
    assert reader.decode(encapsulated(made, frame, syntax), "window").pixels.shape == (40, 30)
    with pytest.raises(UserError, match="another size"):
        reader.decode(encapsulated(made, frame, syntax, rows=10, columns=10), "window")


def test_run_length_codes_that_unpack_to_too_much(reader, made):
    from pydicom.uid import RLELossless

    head = struct.pack("<16I", 1, 64, *[0] * 14)
    exact = bytes([129, 7]) * 9 + bytes([256 - 47, 7])  # 9 x 128 + 48 = 1200
    assert headers.rle_size(head + exact, 10**6) == 1200
    assert (reader.decode(encapsulated(made, head + exact, RLELossless), "window").pixels.shape) == (40, 30)
    with pytest.raises(UserError, match="unpack to more"):
        reader.decode(encapsulated(made, head + bytes([129, 7]) * 100_000, RLELossless), "window")


@pytest.mark.parametrize("whole", [True, False], ids=["group 2", "group 8"])
def test_an_old_dicom_without_a_preamble(reader, made, whole):
    """As a file that begins with its group 2, and as one in implicit little endian without it."""
    import pydicom

    given = made.dicom()
    if whole:
        bare = given[132:]
    else:
        dataset, out = pydicom.dcmread(io.BytesIO(given)), io.BytesIO()
        pydicom.dcmwrite(out, pydicom.Dataset(dataset), implicit_vr=True, little_endian=True, enforce_file_format=False)
        bare = out.getvalue()
    assert bare[128:132] != b"DICM"
    assert headers.read(bare, "x") == headers.read(given, "x")
    np.testing.assert_array_equal(reader.decode(bare, "window").pixels, reader.decode(given, "window").pixels)


def deflated(made) -> bytes:
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(made.dicom()))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(headers.DEFLATED)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_a_header_without_types_hides_nothing(reader, made):
    """As implicit little endian, which the standard does not allow there and pydicom reads."""
    uid = headers.DEFLATED.encode()
    own = struct.pack("<HHLL", 2, 0, 4, 8 + len(uid)) + struct.pack("<HHL", 2, 16, len(uid)) + uid
    data, start = deflated(made), 132 + 12
    (length,) = struct.unpack_from("<L", data, start - 4)
    with pytest.raises(UserError, match="deflated"):
        reader.decode(data[:132] + own + data[start + length :], "window")


@pytest.mark.parametrize("preamble", [b"", *headers.BARE], ids=["empty", "group 2", "group 8"])
def test_a_preamble_hides_nothing(reader, made, preamble):
    """Its 128 bytes may be anything, also the beginning of a file without one."""

    def behind(data: bytes) -> bytes:
        return preamble + data[len(preamble) :]

    plain = made.dicom()
    np.testing.assert_array_equal(reader.decode(behind(plain), "window").pixels, reader.decode(plain, "window").pixels)
    with pytest.raises(UserError, match="deflated"):
        reader.decode(behind(deflated(made)), "window")
    head = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 60000, 60000, 1) + bytes([1, 0x11, 0])
    with pytest.raises(UserError, match="another size"):
        reader.decode(behind(encapsulated(made, head, JPEG_BASELINE)), "window")


def test_several_frames_and_colour(reader, made):
    with pytest.raises(UserError, match="several frames"):
        reader.decode(made.dicom(NumberOfFrames=2), "window")
    with pytest.raises(UserError, match="colour"):
        reader.decode(made.dicom(PhotometricInterpretation="RGB", SamplesPerPixel=3), "window")


def test_a_decoder_that_dies_is_started_again(reader, made):
    data = made.png(made.grey())
    reader.decode(data, "window")
    worker = reader._idle.get()
    assert os.getsid(worker._process.pid) != os.getsid(
        0
    )  # what a terminal sends to all of a command, Ctrl-C, does not reach it
    worker._process.kill()
    worker._process.wait()
    reader._idle.put(worker)
    assert reader.decode(data, "window").pixels.shape == (40, 30)
    first = worker._process.pid

    worker._process.send_signal(signal.SIGSTOP)  # so that it cannot answer before it dies, as of a codec that crashes
    threading.Timer(0.05, worker._process.kill).start()
    with pytest.raises(UserError, match="codec failed"):
        reader.decode(data, "window")
    assert reader.decode(data, "window").pixels.shape == (40, 30)
    assert worker._process.pid != first


def test_a_decoder_has_its_day(made, monkeypatch):
    """What its codecs lose of the memory goes with it."""
    monkeypatch.setattr(films, "LIFE", 3)
    reader = films.Films(1)
    seen = []
    for _ in range(7):
        assert reader.decode(made.png(made.grey()), "window").pixels.shape == (40, 30)
        worker = reader._idle.get()
        seen.append(worker.start().pid)  # of the process that the next film goes to
        reader._idle.put(worker)
    reader.close()
    assert [a == b for a, b in itertools.pairwise(seen)] == [True, False, True, True, False, True]


def test_a_decoder_that_takes_too_long_is_ended(made, monkeypatch):
    monkeypatch.setattr(films, "SECONDS", 0.2)
    reader = films.Films(1)
    worker = reader._idle.get()
    worker._process = films.start()
    worker._process.send_signal(signal.SIGSTOP)
    reader._idle.put(worker)
    busy = [reader.busy()]
    threading.Timer(0.1, lambda: busy.append(reader.busy())).start()
    with pytest.raises(UserError, match="took too long"):
        reader.decode(made.png(made.grey()), "window")
    reader.close()
    assert [*busy, reader.busy()] == [0, 1, 0]


def test_a_full_queue(serve, made):
    served = serve({"slots": 1, "queue": 2})
    served.model.go.clear()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
    answers = []

    def ask():
        answers.append(httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30))

    threads = []
    for running, queued in ((1, 0), (1, 1), (1, 2)):
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        assert made.until(
            lambda running=running, queued=queued: (
                (served.engine.stats()["running"], served.engine.stats()["queued"]) == (running, queued)
            )
        )
    ask()
    assert answers[0].status_code == 429 and int(answers[0].headers["retry-after"]) >= 1
    assert answers[0].json()["error"]["code"] == "queue_full"
    served.model.go.set()
    for thread in threads:
        thread.join(30)
    assert [answer.status_code for answer in answers[1:]] == [200] * 3
    numbers = httpx.get(f"{served.url}/metrics").text
    assert "rad_jax_queue_full_total 1.0" in numbers and "rad_jax_requests_total 3.0" in numbers


def test_openais_client_waits_and_asks_again_when_the_queue_is_full(serve, made):
    served = serve({"slots": 1, "queue": 1, "seconds": 0.02})
    message = [{"role": "user", "content": "Hello"}]
    answers = []

    def ask():
        client = served.client(max_retries=20)
        answers.append(client.chat.completions.create(model="scripted", messages=message).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [made.said(None)] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(serve, stream):
    served = serve(timeout=0.3)
    served.model.endless = True
    served.model._seconds = 0.01
    body = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 512,
        "stream": stream,
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
    if stream:
        assert '"code": "timeout"' in answer.text.split("\n\n")[-2] and "[DONE]" not in answer.text
    else:
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert served.idle()


def gate(app):
    """The middleware that counts the bodies that are held."""
    found = app.middleware_stack
    while not isinstance(found, BodyGate):
        found = found.app
    return found


def unread(port, path, kind, body):
    """A connection that asks for an answer and does not read it."""
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(head.encode() + body)
    connection.settimeout(10)
    return connection


def read_on(connection):
    """What can still be read until the connection is found to have ended."""
    found = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while data := connection.recv(10**6):
            found += data
    return found


def test_a_client_that_stops_reading_is_cut_off_in_time(serve, made, monkeypatch):
    """Its slot and its body are free again, and its answer is not written on."""
    from rad_jax.serving import chat_api

    texts = chat_api.texts

    async def padded(answer):  # to more than all buffers of a connection hold
        async for _, piece in texts(answer):
            yield "x" * 10**6, piece

    monkeypatch.setattr(chat_api, "texts", padded)
    served = serve(timeout=1.0)
    served.model.endless = True
    served.model._seconds = 0.01
    body = (
        b'{"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 512, "stream": true}'
    )
    connection = unread(served.port, "chat/completions", "application/json", body)
    assert made.until(lambda: gate(served.app).held == len(body))
    assert made.until(lambda: gate(served.app).held == 0, 5)
    assert served.idle() and served.engine.stats()["tokens_total"] < 512
    found = read_on(connection)
    assert found.startswith(b"HTTP/1.1 200") and b"xxx" in found and b"[DONE]" not in found
    numbers = httpx.get(f"{served.url}/metrics").text
    assert 'rad_jax_http_requests_total{route="/v1/chat/completions",status="499"} 1.0' in numbers


def test_an_answer_that_is_never_read_is_not_kept(serve, monkeypatch):
    """One that was handed over whole, so that no sending waits."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    served = serve()
    preview = films.Preview(bytes(16 * 10**6), "", (1, 1), (0, 1))
    served.app.state.service.films.preview = lambda _: preview
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nfilm\r\n--x--\r\n'
    connection = unread(served.port, "film", "multipart/form-data; boundary=x", body)
    time.sleep(1.5)  # two looks until it is closed, two until it is cut, and something over
    assert 0 < len(read_on(connection)) < len(preview.png)


@pytest.mark.parametrize("path", ["findings", "film"])
def test_a_film_that_waits_too_long(serve, made, path):
    served = serve(timeout=0.3)
    done = threading.Event()
    served.app.state.service.films.decode = served.app.state.service.films.preview = lambda *_: done.wait(30)
    answer = httpx.post(f"{served.url}/v1/{path}", files={"file": made.png(made.grey())}, timeout=20)
    done.set()
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert "504" in served.app.openapi()["paths"][f"/v1/{path}"]["post"]["responses"]
    assert served.engine.stats()["requests_total"] == 0


def test_the_time_of_a_request_begins_with_it(serve):
    served = serve(timeout=0.3)
    body = b'{"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + body[:9])
        time.sleep(0.5)
        connection.sendall(body[9:])
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 504")
    assert served.engine.stats()["requests_total"] == 0


def test_a_film_whose_client_has_gone_is_never_decoded(serve, made):
    served = serve()
    reader, done, begun = served.app.state.service.films, threading.Event(), []

    def decode(data, _):
        begun.append(data)
        done.wait(30)
        raise UserError("the film: given up.")

    reader.decode = decode
    url, files = f"{served.url}/v1/findings", {"file": made.png(made.grey())}
    threads = [threading.Thread(target=httpx.post, args=(url,), kwargs={"files": files, "timeout": 30}) for _ in "12"]
    for thread in threads:
        thread.start()
    assert made.until(lambda: len(begun) == 2)  # both processes are busy
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, files=files, timeout=httpx.Timeout(10, read=0.2))
    assert made.until(lambda: reader._waiting == 2)
    done.set()
    for thread in threads:
        thread.join(30)
    assert httpx.post(url, files=files, timeout=30).status_code == 400 and len(begun) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "findings"])
def test_a_client_that_leaves_frees_its_slot(serve, made, stream, path):
    served = serve()
    served.model.endless = True
    served.model._seconds = 0.01
    url = f"{served.url}/v1/{path}"
    request: dict[str, Any]
    if path == "findings":
        request = {"files": {"file": made.png(made.grey())}, "data": {"stream": str(stream), "max_new_tokens": "512"}}
    else:
        message = [{"role": "user", "content": "Hello"}]
        request = {"json": {"model": "scripted", "messages": message, "max_tokens": 512, "stream": stream}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, timeout=httpx.Timeout(10, read=0.3), **request) if not stream else leave(url, request)
    assert served.idle()
    assert served.engine.stats()["tokens_total"] < 512


def leave(url, request):
    """Reads a little of a stream and hangs up."""
    with httpx.stream("POST", url, **request) as answer:
        next(answer.iter_bytes())
    raise httpx.ReadTimeout("left")


def test_memory_of_refused_bodies_is_given_back_at_once(plain):
    """Not at the next full collection of garbage, which in a process with a model may be long to come."""
    body = b"x" * (20 * 10**6)
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(4):
            assert httpx.post(f"{plain.url}/v1/chat/completions", content=body).status_code == 400
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < 1.5 * len(body)  # the last one may still be on its way out
