"""A vision model as a baseline: what it is sent, what becomes of its answers, and that restricted films stay here."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from evaluation import vision
from evaluation.predictions import access_of, read_predictions
from launch import baseline
from rad_jax import images
from rad_jax.chat.client import UnusableError
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError


@pytest.fixture
def options(client_options):
    def say(data, out, endpoint, **other):
        own = {"data": str(data), "split": "train", "selection": "all", "out": str(out), "endpoint": endpoint}
        return client_options(**own | {"max_failures": 3} | other)

    return say


def seen(body):
    """The image of a request, uint8 [Y, X]."""
    url = body["messages"][-1]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_a_corpus(tmp_path, tiny_corpus, chat_server, options):
    server, out = chat_server(lambda body: f"**Findings:** Mean grey is {seen(body).mean():.4f}."), tmp_path / "p.jsonl"
    server.faults = {1: "busy_ms", 3: "filtered", 4: "error"}
    told = baseline.write(options(tiny_corpus, out, server.url, dry_run=True))
    corpus = Corpus.open(tiny_corpus)
    source = corpus.source("train")
    assert f"{len(source)} requests" in told and "the data is public" in told and not server.bodies
    told = baseline.write(options(tiny_corpus, out, server.url))
    assert f"findings of {len(source) - 1} of {len(source)} studies" in told and "1 filtered" in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [source[n]["id"] for n in range(len(source))]
    for number, line in enumerate(lines):
        record = source[number]
        square = images.centre_crop(images.decode_png(record["image"]), corpus.image_size)
        wanted = "" if "failed" in line else f"Mean grey is {square.mean():.4f}."
        assert line["prediction"] == wanted and line["reference"] == record["findings"]
    assert sum("failed" in line for line in lines) == 1
    text = server.bodies[0]["messages"][-1]["content"][0]["text"]
    assert "<image>" not in text and "This is a chest radiograph." in text
    before = len(server.bodies)
    baseline.write(options(tiny_corpus, out, server.url))
    assert len(server.bodies) == before + 1
    read = read_predictions(out)
    assert not read.malformed and access_of(read.rows) == "public"
    assert out.stat().st_mode & 0o077  # for others, too
    info = json.loads((tmp_path / "p.jsonl.info.json").read_text())
    assert info["answered"] == len(source) and info["access"] == "public" and len(info["prompt"]) == 8


def test_restricted_films_stay_here(tmp_path, tiny_corpus, chat_server, options):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "corpus.json").read_text())
    for level in ("credentialed", None):  # a corpus that does not say counts as private
        manifest |= {"access": level}
        (tmp_path / "c" / "corpus.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
        with pytest.raises(UserError, match=r"is another machine"):
            baseline.write(options(tmp_path / "c", tmp_path / "o", "https://192.0.2.1/v1"))
    server = chat_server(lambda body: "Clear lungs.")
    baseline.write(options(tmp_path / "c", tmp_path / "o.jsonl", server.url, limit=1))
    assert (tmp_path / "o.jsonl").stat().st_mode & 0o777 == 0o600


def test_an_image_that_cannot_be_read_is_counted(tmp_path, tiny_corpus, chat_server, monkeypatch, options):
    decode = images.decode_png
    broken: list[bytes] = []

    def fails_once(data):
        if not broken:
            broken.append(data)
            raise UserError("damaged")
        return decode(data)

    monkeypatch.setattr(images, "decode_png", fails_once)
    server = chat_server(lambda body: "Clear lungs.")
    told = baseline.write(options(tiny_corpus, tmp_path / "o.jsonl", server.url, limit=3))
    assert "findings of 2 of 3 studies" in told and "1 unreadable image" in told
    first = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert first["prediction"] == "" and first["failed"] == "unreadable image"


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I can't help with that.", "I cannot interpret medical images.", "As an AI, I ...", "**"]
)
def test_a_refusal_is_no_finding(text):
    with pytest.raises(UnusableError):
        vision.findings_of(text)


def test_findings_are_cleaned():
    assert (
        vision.findings_of("**FINDINGS:**\n\nThe heart is normal.\nClear lungs.") == "The heart is normal. Clear lungs."
    )
    assert vision.findings_of("I see no effusion.") == "I see no effusion."
