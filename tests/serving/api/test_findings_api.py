"""Findings for a file, and the film for a viewer."""

import base64
import io
import json

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from rad_jax import images
from rad_jax.serving import films


def post(served, data, path="findings", name="film.dcm", **fields):
    return httpx.post(f"{served.url}/v1/{path}", files={"file": (name, data)}, data=fields, timeout=30)


def codes(answer):
    return [warning["code"] for warning in answer["warnings"]]


def test_findings_of_a_dicom(plain, made):
    data = made.dicom()
    answer = post(plain, data, indication="Cough.").json()
    assert answer["findings"] == made.said(films.Films(1).decode(data, "mimic_cxr_jpg").pixels)
    assert (answer["model"], answer["bundle"], answer["finish_reason"]) == ("scripted", "ab" * 32, "stop")
    assert codes(answer) == ["not_for_clinical_use", "dicom_equalised"]
    film = answer["film"]
    assert (film["kind"], film["view"], film["height"], film["width"]) == ("dicom", "frontal", 40, 30)
    assert answer["usage"]["completion_tokens"] > 10
    assert "tokens" not in answer


def test_dicom_pixels_are_those_of_the_chosen_style(tmp_path, made):
    data = made.dicom(WindowCenter="1000", WindowWidth="500")
    (tmp_path / "film.dcm").write_bytes(data)
    reader = films.Films(1)
    for style in images.DICOM_STYLES:
        found = reader.decode(data, style)
        np.testing.assert_array_equal(found.pixels, images.load_grey(tmp_path / "film.dcm", style))
    reader.close()


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"ViewPosition": "LL"}, "view_lateral"),
        ({"ViewPosition": ""}, "view_unknown"),
        ({"Modality": "CT"}, "not_a_radiograph"),
    ],
)
def test_a_dicom_that_is_not_a_frontal_radiograph_is_warned_of(plain, made, tags, code):
    assert code in codes(post(plain, made.dicom(**tags)).json())


def test_a_picture_does_not_say_its_view(plain, made):
    answer = post(plain, made.png(made.grey()), max_new_tokens=3).json()
    assert codes(answer) == ["not_for_clinical_use", "view_unknown", "cut_off"]
    assert answer["film"]["kind"] == "png" and answer["usage"]["completion_tokens"] == 3


def test_attention(plain, made):
    answer = post(plain, made.png(made.grey()), attention="true").json()
    assert "".join(token["text"] for token in answer["tokens"]).strip() == answer["findings"]
    look = answer["tokens"][0]["attention"]
    assert (look["rows"], look["columns"]) == (2, 2) and look["peak"] == pytest.approx(0.4)
    assert list(base64.b64decode(look["map"])) == [64, 128, 191, 255]


def test_streamed_findings(plain, made):
    answer = post(plain, made.dicom(), stream="true", attention="true", indication="Cough.")
    events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    kinds = [kind.removeprefix("event: ") for kind, _ in events]
    values = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert kinds[0] == "start" and kinds[-1] == "done" and set(kinds[1:-1]) == {"piece"}
    assert values[0]["film"]["view"] == "frontal" and codes(values[0]) == ["not_for_clinical_use", "dicom_equalised"]
    assert "".join(value["text"] for value in values[1:-1]).strip() == values[-1]["findings"]
    assert values[1]["attention"]["rows"] == 2
    whole = post(plain, made.dicom(), indication="Cough.").json()
    assert values[-1]["findings"] == whole["findings"] and values[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (28, 28), (100, 31)])
def test_the_square_that_the_model_sees(shape):
    seen = films.seen(shape, 28)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for axis, values in ((1, y), (0, x)):
        spread = (values * 255 / values.max()).astype(np.uint8)
        square = images.centre_crop(images.resize_short(spread, 28), 28).astype(float) * values.max() / 255
        # The middles of the outermost pixels of the square, in pixels of the film.
        pixel = min(shape) / 28
        assert square.min() == pytest.approx(seen[axis] + pixel / 2 - 0.5, abs=1.2)
        assert square.max() == pytest.approx(seen[axis + 2] - pixel / 2 - 0.5, abs=1.2)


def test_the_film_for_a_viewer(plain, made):
    answer = post(plain, made.dicom(WindowCenter="1800", WindowWidth="1200"), "film")
    assert answer.headers["content-type"] == "image/png"
    film = np.asarray(Image.open(io.BytesIO(answer.content)))
    stored = np.arange(40 * 30).reshape(40, 30) * 3
    np.testing.assert_array_equal(film, np.rint(stored / stored.max() * 65535).astype(np.uint16))
    told = [int(answer.headers[f"x-film-{name}"]) for name in ("height", "width", "black", "white")]
    assert told == [40, 30, round(1200 / 3597 * 65535), round(2400 / 3597 * 65535)]


def test_a_dark_film_for_a_viewer_is_inverted_with_its_window(plain, made):
    tags = {"WindowCenter": "1800", "WindowWidth": "1200"}
    plainly, inverted = (
        post(plain, made.dicom(PhotometricInterpretation=f"MONOCHROME{n}", **tags), "film") for n in (2, 1)
    )
    pixels = [np.asarray(Image.open(io.BytesIO(answer.content))).astype(int) for answer in (plainly, inverted)]
    np.testing.assert_array_equal(pixels[0] + pixels[1], np.full((40, 30), 65535))
    ends = [[int(a.headers[f"x-film-{name}"]) for name in ("black", "white")] for a in (plainly, inverted)]
    assert ends[1] == [65535 - ends[0][1], 65535 - ends[0][0]]


def test_a_large_film_comes_small_to_the_viewer(plain, made):
    answer = post(plain, made.png(np.zeros((3000, 1500), np.uint8)), "film")
    assert Image.open(io.BytesIO(answer.content)).size == (1024, 2048)
    assert answer.headers["x-film-height"] == "3000"


def test_no_file_and_too_long_a_reason(plain, made):
    assert httpx.post(f"{plain.url}/v1/findings", data={"indication": "x"}).status_code == 400
    answer = post(plain, made.dicom(), indication="x" * 1001)
    assert answer.status_code == 400 and "indication" in answer.json()["error"]["param"]
    assert post(plain, b"no film").status_code == 400
    assert post(plain, made.dicom(), max_new_tokens="513").status_code == 400
