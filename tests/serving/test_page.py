"""The page in headless Chromium, over the real server and engine: real drops, pointers and keys through the browser's debugging pipe."""

import base64
import io
import json
import os
import re
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")

import uvicorn
from PIL import Image

from rad_jax.serving import access, limits
from rad_jax.serving.app import PAGE, Server, Settings, create_app
from rad_jax.serving.engine import Full

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TAB, ENTER, RIGHT, LEFT, ESCAPE = ("Tab", 9), ("Enter", 13), ("ArrowRight", 39), ("ArrowLeft", 37), ("Escape", 27)
WORDS = "document.querySelectorAll('.word').length"
STATUS, TOLD = "$('status').textContent", "$('told').textContent"

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine (apt-get install chromium)")


class Chromium:
    """One tab. Calls are those of the Chrome DevTools Protocol; `events` are what the browser told in between."""

    def __init__(self, folder: Path):
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"]
        flags += ["disable-component-update", "no-first-run", "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        flags += [f"user-data-dir={folder}", "remote-debugging-pipe"]
        theirs, self._out = os.pipe()
        self._in, to_us = os.pipe()
        line = f'exec "$@" 3<&{theirs} 4>&{to_us}'  # the pipe is at descriptors 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", str(PROGRAM), *(f"--{flag}" for flag in flags)],
            pass_fds=(theirs, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(to_us)
        self.events: list[dict[str, Any]] = []
        self._held, self._number, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (told := self._receive()).get("id") != self._number:
            self.events.append(told)
        assert "error" not in told, (method, told)
        return told["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "the browser does not answer"
            self._held += os.read(self._in, 1 << 20)
        line, _, self._held = self._held.partition(b"\0")
        told: dict[str, Any] = json.loads(line)
        return told

    def js(self, expression: str) -> Any:
        told = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, expression: str) -> Any:
        end = time.monotonic() + 60
        while not (found := self.js(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def open(self, url: str) -> None:
        self.window(1280, "light")
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.getElementById('model')?.textContent")

    def window(self, width: int, theme: str) -> None:
        small = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=small)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def centre(self, selector: str) -> dict[str, float]:
        place = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{place}.scrollIntoView({{block: 'nearest'}})")
        found: dict[str, float] = self.js(
            f"(({{x, y, width, height}}) => ({{x: x + width / 2, y: y + height / 2}}))({place}.getBoundingClientRect())"
        )
        return found

    def point(self, selector: str) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.centre(selector))

    def click(self, selector: str) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **self.centre(selector))

    def drag(self, selector: str, across: float, down: float) -> None:
        start = self.centre(selector)
        end = {"x": start["x"] + across, "y": start["y"] + down}
        self.call("Input.dispatchMouseEvent", type="mousePressed", button="left", buttons=1, clickCount=1, **start)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **end)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **end)

    def drop(self, *files: Path) -> None:
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **self.centre("#stage"))

    def press(self, key: tuple[str, int], modifiers: int = 0) -> None:
        name = {"key": key[0], "code": key[0], "windowsVirtualKeyCode": key[1], "modifiers": modifiers}
        text = {"text": "\r"} if key == ENTER else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **name, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **name)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def shot(self, path: Path) -> np.ndarray:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def requests(self) -> list[str]:
        sent = [event["params"]["request"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [f"{request['method']} {request['url']}" for request in sent]

    def complaints(self) -> list[str]:
        """Exceptions, and refusals by the content policy. The browser also logs each status of 400 and more, which are expected."""
        thrown = [str(event["params"]) for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in self.events if event["method"] == "Log.entryAdded"]
        return thrown + [str(entry) for entry in logged if entry["level"] == "error" and entry["source"] != "network"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._out)
        os.close(self._in)


class Paced:
    """The engine, with texts that come as fast as the test lets them: a piece per `give`, all of them from `free` on; `full` refusals first."""

    def __init__(self, engine: Any):
        self._engine, self._pieces, self.full = engine, threading.Semaphore(0), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Any, tell: Callable[[Any], object]) -> Any:
        if self.full:
            self.full -= 1
            raise Full(1)
        stream = self._engine.submit(request)
        threading.Thread(target=self._pass_on, args=(stream, tell), daemon=True).start()
        return stream

    def _pass_on(self, stream: Any, tell: Callable[[Any], object]) -> None:
        for piece in stream:
            while not self._pieces.acquire(timeout=0.05):
                if stream.finish_reason == "cancelled":
                    tell(None)
                    return
            tell(piece)
        tell(None)

    def give(self, pieces: int) -> None:
        self._pieces.release(pieces)

    def free(self) -> None:
        self._pieces.release(10**6)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    opened = Chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def serve(engine: Callable[..., Any]) -> Iterator[Callable[..., tuple[str, Paced]]]:
    """Starts servers; gives their address and engine."""
    running: list[tuple[Server, threading.Thread, Paced]] = []

    def start(**settings: Any) -> tuple[str, Paced]:
        paced = Paced(engine())
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(paced, Settings(**settings))  # type: ignore[arg-type]
        server = Server(uvicorn.Config(app, loop="asyncio", http="h11", ws="none", log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running.append((server, thread, paced))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/", paced

    yield start
    for server, thread, paced in running:
        paced.free()
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    rows = np.linspace(20, 220, 60)[:, None] + np.random.default_rng(0).normal(0, 12, (60, 80))
    Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8)).save(tmp_path / "DOE^JANE.png")
    return tmp_path / "DOE^JANE.png"


@pytest.fixture(params=["made", "real"])
def dicom(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A film of 12 bits with a window of its own, drawn here; and, where there is one, a real one in JPEG 2000."""
    if request.param == "real":
        found: Path = request.getfixturevalue("real") / "dicom" / "RG1_J2KI.dcm"
        return found
    pydicom = pytest.importorskip("pydicom")
    rows = np.linspace(300, 3500, 300)[:, None] + np.random.default_rng(0).normal(0, 200, (300, 240))
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.ComputedRadiographyImageStorage, "1.2.3"
    dataset.Modality, dataset.ViewPosition, dataset.PatientName = "CR", "PA", "DOE^JANE"
    dataset.Rows, dataset.Columns = rows.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth = "2000", "3000"
    dataset.PixelData = np.clip(rows, 0, 4095).astype(np.uint16).tobytes()
    dataset.save_as(tmp_path / "DOE^JANE.dcm", enforce_file_format=True)
    return tmp_path / "DOE^JANE.dcm"


def heat(browser: Chromium) -> int:
    """How many of the film's pixels are covered."""
    count: int = browser.js(
        "(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v > 8).length)"
        "($('heat'))"
    )
    return count


def grey(browser: Chromium, x: float, y: float) -> int:
    """Of the film as it is shown, at a share of its width and height."""
    browser.js("new Promise(requestAnimationFrame)")
    value: int = browser.js(
        f"(c => c.getContext('2d').getImageData(Math.floor({x} * c.width), Math.floor({y} * c.height), 1, 1).data[0])($('film'))"
    )
    return value


def ready(browser: Chromium) -> None:
    browser.until("!$('write').disabled")


@needs_browser
@pytest.mark.slow
def test_from_a_dicom_to_findings(browser: Chromium, serve: Callable[..., Any], dicom: Path) -> None:
    """Drop, window, reason, stream, hover, copy; nothing leaves the origin, stays behind, or stands in an address."""
    pydicom = pytest.importorskip("pydicom")
    file = dicom
    dataset = pydicom.dcmread(file)
    url, paced = serve()
    browser.open(url)
    entry = "[...$('card').querySelectorAll('dt')].map(e => [e.textContent, e.nextElementSibling.textContent])"
    card = browser.js(f"Object.fromEntries({entry})")
    assert (card["Model"], card["Version"], card["Bundle"]) == (
        paced.info.name,
        paced.info.version,
        paced.info.bundle_sha256,
    )
    assert (
        len(card["Bundle"]) == 64
        and browser.js("$('model').textContent") == f"{card['Model']}, version {card['Version']}"
    )
    browser.events.clear()
    browser.drop(file)
    ready(browser)
    shape = browser.js("[state.film.full.height, state.film.full.width]")
    assert shape == [dataset.Rows, dataset.Columns]
    # What the page shows through the film's window is what the film's own values are through it, to a step of grey.
    x, y = browser.js(
        "[0.5, 0.4].map((v, i) => (Math.floor(v * [film.width, film.height][i]) + 0.5) / [film.width, film.height][i])"
    )
    value = browser.js("state.film.pixels[Math.floor(0.4 * film.height) * film.width + Math.floor(0.5 * film.width)]")
    black, white = browser.js("state.film.window")
    expected = np.clip((value - black) / (white - black) * 255, 0, 255)
    assert abs(grey(browser, x, y) - expected) <= 1.5
    assert browser.js("state.film.high - state.film.low") > 255  # the DICOM's own shades, not eight bits of them

    before = browser.js("[$('level').value, $('width').value].map(Number)")
    browser.drag("#film", 60, -40)
    after = browser.js("[$('level').value, $('width').value].map(Number)")
    assert after[0] < before[0]  # up: brighter
    browser.click("#invert")
    assert browser.js("$('invert').getAttribute('aria-pressed')") == "true"
    browser.click("#reset")
    assert browser.js("[$('level').value, $('width').value].map(Number)") == before

    browser.click("#reason")
    browser.write("Cough of MRS DOE")
    browser.press(ENTER, modifiers=2)  # Ctrl
    paced.give(4)
    browser.until("$('findings').textContent.length > 0")
    begun = browser.js("$('findings').textContent")
    assert browser.js("$('findings').getAttribute('aria-busy')") == "true" and browser.js("$('copy').disabled")
    paced.free()
    browser.until(f"{STATUS}.startsWith('Done')")
    whole = browser.js("state.text")
    assert len(whole) > len(begun) and whole.startswith(begun.strip()[:3])
    assert browser.js(WORDS) > 3

    assert heat(browser) == 0
    browser.point(".word.map")
    assert heat(browser) > 0 and "the model looked most at the" in browser.js("$('place').textContent")
    browser.point("#copy")
    assert heat(browser) == 0

    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.click("#copy")
    browser.until(f"{STATUS} === 'Copied.'")
    assert browser.js("navigator.clipboard.readText()") == whole

    asked = browser.requests()
    assert asked == [f"POST {url}v1/film", f"POST {url}v1/findings"], asked
    sent = " ".join(str(event) for event in browser.events if event["method"] == "Network.requestWillBeSent")
    assert file.name not in sent
    assert (
        browser.js("location.href") == url
        and browser.js("document.cookie + localStorage.length + sessionStorage.length") == "00"
    )
    assert browser.js("$('reason').value") == "Cough of MRS DOE"
    browser.drop(file)
    ready(browser)
    assert browser.js("$('reason').value") == ""  # it was that of the film before
    assert browser.complaints() == []


@needs_browser
@pytest.mark.slow
def test_keys_alone(browser: Chromium, serve: Callable[..., Any], film: Path) -> None:
    url, paced = serve()
    paced.free()
    browser.open(url)
    browser.events.clear()
    browser.press(TAB)
    assert browser.js("document.activeElement.id") == "file"
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    chooser = browser.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(film)], nodeId=chooser)
    ready(browser)
    places: list[str] = []
    while not places or places[-1] != "write":
        browser.press(TAB)
        places.append(browser.js("document.activeElement.id"))
        if places[-1] == "level":
            browser.press(RIGHT)
        if places[-1] == "reason":
            browser.write("cough")
        assert len(places) < 12, places
    assert places == ["level", "width", "reset", "invert", "clear", "reason", "write"]
    assert browser.js("Number($('level').value)") == browser.js(
        "Math.round((state.film.window[0] + state.film.window[1]) / 2) + 1"
    )
    browser.press(ENTER)
    browser.until(f"{STATUS}.startsWith('Done')")
    while browser.js("document.activeElement.id") != "copy":
        browser.press(TAB)
    browser.press(TAB)
    here = "state.words.findIndex(word => word.element === document.activeElement)"
    first = browser.js(here)
    assert first >= 0 and heat(browser) > 0
    browser.press(RIGHT)
    assert browser.js(here) > first
    browser.press(ENTER)
    assert browser.js("document.activeElement.getAttribute('aria-pressed')") == "true"
    browser.press(LEFT)
    assert browser.js(here) == first
    browser.press(ESCAPE)
    assert browser.js("document.querySelectorAll('[aria-pressed=true]').length") == 0
    # Every control says what it is.
    nameless = browser.js(
        "[...document.querySelectorAll('button, input, textarea, [role=button], canvas:not([aria-hidden])')]"
        ".filter(e => !(e.textContent.trim() || e.labels?.length || e.getAttribute('aria-label'))).map(e => e.outerHTML)"
    )
    assert nameless == [] and browser.complaints() == []


@needs_browser
@pytest.mark.slow
def test_what_goes_wrong_is_said_in_words(
    browser: Chromium, serve: Callable[..., Any], film: Path, tmp_path: Path
) -> None:
    url, paced = serve(tokens={access.digest("right"): "somebody"})
    browser.open(url)
    assert "tells who has a token" in browser.js("$('model').textContent")
    browser.events.clear()
    browser.drop(film)
    for token, said in (("wrong", "can make you one"), ("right", "does not know this token")):
        browser.until(f"$('door').open && $('door-told').textContent.includes('{said}')")
        assert browser.js("document.activeElement.id") == "token"
        browser.write(token)
        browser.press(ENTER)
    ready(browser)
    assert not browser.js("$('door').open || $('token').value || localStorage.length")
    browser.until("/, version /.test($('model').textContent) && $('card').children.length > 0")

    paced.full = 1
    browser.click("#write")
    browser.until(f"/queue is full.*again in 1 s/.test({STATUS})")
    paced.give(3)
    browser.until(f"{WORDS} > 0")
    assert paced.full == 0
    browser.click("#stop")
    browser.until(f"{STATUS}.startsWith('Stopped')")
    assert not browser.js("$('write').disabled")

    (tmp_path / "big.dcm").write_bytes(b"")
    os.truncate(tmp_path / "big.dcm", limits.BODY + 1)
    count = len(browser.requests())
    browser.drop(tmp_path / "big.dcm")
    browser.until(f"/51 MB; the server takes up to 50 MB/.test({TOLD})")
    assert len(browser.requests()) == count
    (tmp_path / "notes.txt").write_text("no film at all")
    browser.drop(tmp_path / "notes.txt")
    browser.until(f"/not a PNG, JPEG or DICOM/.test({TOLD})")
    browser.drop(film, film)
    browser.until(f"/One film at a time/.test({TOLD})")
    assert browser.complaints() == []


@needs_browser
@pytest.mark.slow
def test_the_page_fits_the_window(browser: Chromium, serve: Callable[..., Any], film: Path, tmp_path: Path) -> None:
    """At both widths and in both themes; the pictures are left in the test's folder."""
    url, paced = serve()
    paced.free()
    browser.open(url)
    browser.drop(film)
    ready(browser)
    browser.click("#write")
    browser.until(f"{STATUS}.startsWith('Done')")
    browser.js("document.querySelector('details').open = true")
    grounds = {}
    for width in (1280, 390):
        for theme in ("light", "dark"):
            browser.window(width, theme)
            assert browser.js("document.documentElement.scrollWidth") <= width
            outside = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)"
            assert browser.js(f"{outside}.map(e => e.outerHTML.slice(0, 80))") == []
            browser.point(".word.map")
            picture = browser.shot(tmp_path / f"{theme}-{width}.png")
            grounds[width, theme] = int(np.median(picture[:, :8]))
            if width == 390:  # the film with its colours stays in sight of the words
                browser.js("$('findings').scrollIntoView()")
                browser.point(".word.map")
                browser.until("!$('peek').hidden")
                browser.shot(tmp_path / f"{theme}-{width}-words.png")
    assert all(ground > 230 if theme == "light" else ground < 30 for (_, theme), ground in grounds.items())


def test_the_page_is_one_file_that_names_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//\w", text) == [] and "@import" not in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=\"(?!data:)", text)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie|pushState|innerHTML", text)
    assert int(re.search(r"LARGEST = (\d+)", text)[1]) == limits.BODY  # type: ignore[index]
    assert "Not for clinical use" in text
