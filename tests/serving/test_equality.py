"""The engine beside JAX: the same texts for films drawn and real, and the same maps of where a word looked."""

import asyncio
import io

import httpx2 as httpx
import jax
import numpy as np
import pytest
from PIL import Image

from rad_jax import images
from rad_jax.generate import generate
from rad_jax.grounding import attention_to_image
from rad_jax.interop.verify import as_stored
from rad_jax.models.llava import Llava
from rad_jax.prompts import load_tokenizer, question, render_v1
from rad_jax.serving import reference
from rad_jax.serving.app import Settings, create_app
from rad_jax.serving.engine import Request

TOKENS = 16


def square(film, size):
    return images.centre_crop(images.resize_short(film, size), size)


def padded(rows):
    """Ids [B, T] and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    return ids, lengths


def texts_of_jax(example, films, reasons):
    """Greedy, with the adapters beside the weights."""
    tokenizer, size = load_tokenizer(example.tokenizer), example.config.vision.image_size
    variables, config = as_stored(example.exported(), "float32", merged=False)
    tokens, length = padded([render_v1(tokenizer, question(reason), None).ids for reason in reasons])
    batch = {"image": np.stack([square(film, size) for film in films]), "tokens": tokens, "length": length}
    model, key = Llava(config), jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        ids = generate(model, variables, batch, key, max_new_tokens=TOKENS, eos_id=tokenizer.eos_id)
    return [tokenizer.decode(row) for row in np.asarray(ids).tolist()]


def compare(bundle, engine, films):
    """Asserts that all write the same; returns the reasons, the texts and the engine that wrote them."""
    example, folder = bundle("wide")
    reasons = [None if i % 4 == 0 else " ".join(["heart", "left effusion", "clear lungs"][: i % 4]) for i in range(50)]
    ours, theirs, size = engine("wide"), reference.load(folder), example.config.vision.image_size
    requests = [Request(film, question(reason), TOKENS) for film, reason in zip(films, reasons, strict=True)]
    together = [ours.submit(request) for request in requests]
    mixed = ["".join(piece.text for piece in stream) for stream in together]
    alone = ["".join(piece.text for piece in ours.submit(request)) for request in requests]
    squares = [square(film, size) for film in films]
    greedy = [theirs.greedy(theirs.prompt(f, r), f, TOKENS) for f, r in zip(squares, reasons, strict=True)]
    assert mixed == alone == [theirs.text(ids) for ids in greedy] == texts_of_jax(example, films, reasons)
    assert len(set(mixed)) > 25
    return reasons, mixed, ours


@pytest.mark.slow
@pytest.mark.parity
def test_50_drawn_films(bundle, engine, tiny_corpus):
    from rad_jax.input_pipeline import Corpus

    source = Corpus.open(tiny_corpus).source("train")
    rng = np.random.default_rng(0)
    drawn = [images.decode_png(source[i % len(source)]["image"]) for i in range(50)]
    # Of other sizes and contrasts, so that no two are alike.
    films = [images.resize_short(film, int(rng.integers(28, 90))) // int(rng.integers(1, 4)) for film in drawn]
    compare(bundle, engine, films)


@pytest.mark.slow
@pytest.mark.parity
def test_50_real_films(bundle, engine, real, tmp_path):
    """All go through the server too, as PNGs of their pixels, and the last of them, which are whole files, also as they are: it must write
    what JAX writes of those pixels."""
    kinds = {kind: sorted((real / "images" / kind).iterdir()) for kind in ("covid", "nih", "openi")}
    originals = [real / "dicom" / name for name in ("RG1_J2KI.dcm", "RG1_JLSN.dcm", "CR-MONO1-10-chest.dcm")]
    jpeg = tmp_path / "film.jpg"
    Image.open(kinds["covid"][0]).convert("L").save(jpeg, quality=95)
    originals += [jpeg, kinds["nih"][0], kinds["openi"][0]]
    small = [path for files in kinds.values() for path in files[1:]][: 50 - len(originals)]
    films = [images.load_short(path, 64)[0] for path in small]
    films += [images.load_grey(path, "mimic_cxr_jpg") for path in originals]
    reasons, expected, ours = compare(bundle, engine, films)
    app = create_app(ours, Settings(dicom="mimic_cxr_jpg"))

    def png(film):
        buffer = io.BytesIO()
        Image.fromarray(film).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    async def post(data, reason):
        fields = {"max_new_tokens": str(TOKENS), **({"indication": reason} if reason else {})}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60
        ) as client:
            return await client.post("/v1/findings", files={"file": data}, data=fields)

    async def all_at_once():
        as_pngs = await asyncio.gather(*map(post, map(png, films), reasons))
        whole = [path.read_bytes() for path in originals]
        return as_pngs, await asyncio.gather(*map(post, whole, reasons[-len(originals) :]))

    as_pngs, answers = asyncio.run(all_at_once())
    app.state.service.films.close()
    assert [answer.status_code for answer in as_pngs] == [200] * 50
    assert [answer.json()["findings"] for answer in as_pngs] == [text.strip() for text in expected]
    assert [answer.status_code for answer in answers] == [200] * len(originals)
    assert [answer.json()["film"]["kind"] for answer in answers] == ["dicom"] * 3 + ["jpeg", "png", "png"]
    texts = [answer.json()["findings"] for answer in answers]
    assert texts == [text.strip() for text in expected[-len(originals) :]] and len(set(texts)) > 3


def test_attention_is_that_of_jax(bundle, engine):
    """Mean over all heads of the last half of the layers, from where the token was chosen."""
    example, _ = bundle()
    ours, tokenizer = engine(), load_tokenizer(example.tokenizer)
    variables, config = as_stored(example.exported(), "float32", merged=False)
    streams = [
        ours.submit(Request(film, question(r), 6, attention=i != 1)) for i, (film, r) in enumerate(example.studies)
    ]
    pieces = [list(stream) for stream in streams]
    assert all(piece.attention is None for piece in pieces[1])
    for (film, reason), found in list(zip(example.studies, pieces, strict=True))[::2]:
        prompt = render_v1(tokenizer, question(reason), None).ids
        ids = [*prompt, *(piece.token for piece in found)]
        at = np.arange(len(prompt) - 1, len(ids) - 1, dtype=np.int32)
        batch = {"image": film[None], "tokens": np.array([ids], np.int32), "length": np.array([len(ids)], np.int32)}
        weights = np.asarray(attention_to_image(Llava(config), variables, batch, at[None]))[0]
        depth = len(weights)
        expected = weights[depth // 2 :].mean((0, 1))
        expected /= expected.sum(-1, keepdims=True)
        maps = np.stack([piece.attention.reshape(-1) for piece in found])
        np.testing.assert_allclose(maps, expected, atol=1e-5)
        assert maps.dtype == np.float32 and found[0].attention.shape == (4, 4)
