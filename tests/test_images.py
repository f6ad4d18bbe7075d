"""Pixels: reading, scaling and cropping, against open_clip and against golden DICOM values."""

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rad_jax import images
from rad_jax.errors import UserError

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "real"
DICOM = REAL / "dicom"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real test data at {REAL}")


def film(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A grey picture with coarse and fine structure, uint8 [Y, X]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 21, (height, width))
    return np.clip(np.asarray(coarse, np.int32) + noise, 0, 255).astype(np.uint8)


def save(image: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(image).save(path, **options)
    return path


def prepared(image: np.ndarray, size: int) -> np.ndarray:
    """The whole way of a pixel through packing and reading, uint8 [size, size]."""
    stored = images.encode_png(images.resize_short(image, size))
    return images.centre_crop(images.decode_png(stored), size)


def test_eight_bit_files_are_read_as_they_are(tmp_path):
    image = film(61, 47)
    grey = images.load_grey(save(image, tmp_path / "grey.png"))
    assert grey.dtype == np.uint8
    assert grey.flags.writeable
    np.testing.assert_array_equal(grey, image)
    rgb = np.repeat(image[..., None], 3, -1)
    np.testing.assert_array_equal(images.load_grey(save(rgb, tmp_path / "rgb.png")), image)
    rgba = np.concatenate([rgb, np.full_like(image[..., None], 7)], -1)
    np.testing.assert_array_equal(images.load_grey(save(rgba, tmp_path / "rgba.png")), image)
    Image.fromarray(image).convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(images.load_grey(tmp_path / "palette.png"), image)
    jpeg = save(image, tmp_path / "film.jpg", quality=95)
    np.testing.assert_array_equal(images.load_grey(jpeg), np.asarray(Image.open(jpeg)))


def test_deep_png_is_spread_over_eight_bits(tmp_path):
    deep = np.linspace(100, 4195, 60 * 50).reshape(60, 50).astype(np.uint16)
    grey = images.load_grey(save(deep, tmp_path / "deep.png"))
    assert (grey.min(), grey.max()) == (0, 255)
    expected = (deep.astype(np.float64) - 100) / 4095 * 255
    assert np.abs(grey - expected).max() <= 0.5  # rounded to the nearest
    flat = images.load_grey(save(np.full((5, 4), 900, np.uint16), tmp_path / "flat.png"))
    assert not flat.any()


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_cut_image_never_gives_part_of_a_film(tmp_path, kind):
    path = save(film(80, 60), tmp_path / f"film.{kind}")
    whole, image = path.read_bytes(), images.load_grey(path)
    cut = tmp_path / f"cut.{kind}"
    accepted = refused = 0
    lengths = [*range(0, len(whole), 31), *range(len(whole) - 30, len(whole))]
    for length in lengths:
        cut.write_bytes(whole[:length])
        try:
            grey = images.load_grey(cut)
        except UserError as error:
            refused += f"cut.{kind}" in str(error)
        else:  # only a checksum or an end mark is missing
            accepted += 1
            assert length >= len(whole) - 24
            np.testing.assert_array_equal(grey, image)
    assert accepted + refused == len(lengths)


def test_a_damaged_png_is_refused(tmp_path):
    data = bytearray(images.encode_png(film(80, 60)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UserError):
        images.decode_png(bytes(data))


def test_what_is_no_image_is_refused_by_name(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no film here")
    with pytest.raises(UserError, match=r"notes\.txt: not a PNG, JPEG or DICOM"):
        images.load_grey(text)
    with pytest.raises(UserError, match=r"missing\.png: cannot be read"):
        images.load_grey(tmp_path / "missing.png")
    with pytest.raises(UserError, match="cannot be read"):
        images.load_grey(tmp_path)
    frames = [Image.fromarray(film(20, 20, seed)) for seed in range(2)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"moving\.png: has several frames"):
        images.load_grey(tmp_path / "moving.png")


@pytest.mark.parametrize(("height", "width"), [(90, 70), (70, 90), (71, 71), (113, 64)])
def test_sizes_of_resize_and_crop(height, width):
    scaled = images.resize_short(film(height, width), 37)
    assert min(scaled.shape) == 37
    assert max(scaled.shape) == int(37 * max(height, width) / min(height, width))
    assert (scaled.shape[0] < scaled.shape[1]) == (height < width)
    assert images.centre_crop(scaled, 37).shape == (37, 37)
    with pytest.raises(ValueError, match="cannot crop"):
        images.centre_crop(scaled, 38)


def test_png_round_trip():
    image = film(33, 21)
    np.testing.assert_array_equal(images.decode_png(images.encode_png(image)), image)


def test_normalise_is_the_same_in_numpy_and_jax():
    import jax.numpy as jnp

    batch = np.stack([film(12, 12, seed) for seed in range(3)])
    host = images.normalise(batch)
    assert host.dtype == np.float32
    assert host.shape == (3, 12, 12, 3)
    expected = (batch[..., None] / 255.0 - np.array(images.MEAN)) / np.array(images.STD)
    np.testing.assert_allclose(host, expected, atol=1e-6)  # float32 against float64, values up to 2.7
    np.testing.assert_allclose(images.normalise(jnp.asarray(batch), jnp), host, atol=1e-6)


def test_normalise_with_the_statistics_of_another_tower():
    batch = film(12, 12)[None]
    half = images.normalise(batch, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(half[..., 1], batch / 127.5 - 1.0, atol=1e-6)
    channels = images.normalise(batch, mean=(0.0, 0.1, 0.2), std=(1.0, 2.0, 4.0))
    expected = (batch[..., None] / 255.0 - [0.0, 0.1, 0.2]) / [1.0, 2.0, 4.0]
    np.testing.assert_allclose(channels, expected, atol=1e-6)


def open_clip_transform(size: int, is_train: bool = False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        module = pytest.importorskip("open_clip", reason="open_clip is only in the development environment")
    return module.image_transform(size, is_train=is_train)


# 1030 x 1024 and its turn have an odd crop offset where rounding half to even matters.
@pytest.mark.parametrize(
    ("height", "width"), [(1030, 1024), (1024, 1030), (733, 641), (577, 811), (601, 601), (518, 700)]
)
@pytest.mark.parity
def test_pixels_equal_open_clip(height, width):
    transform = open_clip_transform(518)
    image = film(height, width)
    theirs = transform(Image.fromarray(image)).numpy()
    ours = prepared(image, 518)
    np.testing.assert_array_equal(images.normalise(ours[None])[0].transpose(2, 0, 1), theirs)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (images.MEAN, images.STD))
    np.testing.assert_array_equal(np.rint((theirs * std + mean) * 255).astype(np.uint8)[0], ours)


@needs_real
@pytest.mark.parity
def test_real_radiographs_equal_open_clip():
    transform = open_clip_transform(518)
    with open(REAL / "reports.csv", newline="", encoding="utf-8") as file:
        paths = [REAL / row["image"] for row in csv.DictReader(file)]
    checked = 0
    for path in paths:
        with Image.open(path) as image:
            if image.mode != "L":  # open_clip keeps the colours of a coloured scan; we read its luma
                continue
            theirs = transform(image).numpy()
        ours = images.normalise(prepared(images.load_grey(path), 518)[None])[0].transpose(2, 0, 1)
        np.testing.assert_array_equal(ours, theirs, err_msg=path.name)
        checked += 1
        if checked == 24:
            break
    assert checked == 24


@pytest.mark.parametrize(("height", "width"), [(640, 518), (518, 733), (100, 400), (400, 100)])
@pytest.mark.parity
def test_training_crop_equals_open_clip(height, width):
    """The same part of the film gives the same pixels, bit for bit; where the parts come from is the next test."""
    transform = open_clip_transform(112, is_train=True)
    crop, image = transform.transforms[0], film(height, width)
    assert (crop.scale, crop.ratio) == (images.CROP_AREA, images.CROP_RATIO)
    for seed in range(4):
        box = images.crop_box(height, width, np.random.default_rng(seed))
        crop.get_params = lambda *_, box=box: box
        theirs = transform(Image.fromarray(image)).numpy()
        ours = images.random_crop(image, 112, np.random.default_rng(seed))
        np.testing.assert_array_equal(images.normalise(ours[None])[0].transpose(2, 0, 1), theirs)


@pytest.mark.parity
def test_training_crop_is_drawn_as_torchvision_draws():
    """Means of 2,000 boxes, to four standard errors; on films too long for any such part, the same middle."""
    torch = pytest.importorskip("torch")
    draw = pytest.importorskip("torchvision.transforms").RandomResizedCrop.get_params
    rng = np.random.default_rng(0)
    torch.manual_seed(0)

    def peer(height, width):
        return draw(torch.zeros(1, 1, 1).expand(1, height, width), list(images.CROP_AREA), list(images.CROP_RATIO))

    for height, width in ((640, 518), (518, 560)):
        ours = np.array([images.crop_box(height, width, rng) for _ in range(2000)])
        theirs = np.array([peer(height, width) for _ in range(2000)])
        error = np.sqrt((ours.var(0) + theirs.var(0)) / 2000)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
        assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for shape in ((100, 400), (400, 100), (333, 1000)):
        assert images.crop_box(*shape, rng) == tuple(peer(*shape))


def golden_dicoms() -> list[dict]:
    path = DICOM / "golden_pydicom.json"
    return json.loads(path.read_text()) if path.is_file() else []


@needs_real
@pytest.mark.parametrize("golden", golden_dicoms(), ids=lambda golden: golden["file"])
def test_dicom_files_decode_to_the_golden_values(golden):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    dataset = pydicom.dcmread(DICOM / golden["file"], force=True)
    stored = images._stored_values(dataset)
    assert stored.shape == (golden["rows"], golden["cols"])
    assert (stored.min(), stored.max()) == (golden["min"], golden["max"])
    assert stored.mean() == pytest.approx(golden["mean"], abs=1e-4)  # the golden mean has four digits

    grey = images.load_grey(DICOM / golden["file"])
    assert grey.shape == stored.shape
    assert grey.dtype == np.uint8
    assert int(grey.max()) - int(grey.min()) > 200  # the film uses the range of 8 bits
    # Every LUT and window of these files rises, so that the order of the values survives, or turns for MONOCHROME1.
    trend = np.corrcoef(stored.ravel(), grey.ravel())[0, 1]
    assert (trend < -0.9) if golden["photometric"] == "MONOCHROME1" else (trend > 0.9)


def table_of(item: Any) -> tuple[np.ndarray, int]:
    """The table of a LUT and the first value it is for."""
    entries, first, _ = item.LUTDescriptor
    data = item["LUTData"].value
    table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.array(data, np.uint16)
    assert len(table) == entries
    return table.astype(int), first


def shown_by_table(stored: np.ndarray, item: Any, kind: str, photometric: str) -> np.ndarray:
    """What a film with one LUT shows, by indexing alone (PS3.3 C.11.1.1 and C.11.2.1.1): values beyond the table take its ends.

    A VOI LUT's own range becomes black to white; a modality LUT leaves that open, and the film's darkest to brightest value is spread.
    """
    table, first = table_of(item)
    values = table[np.clip(stored.astype(int) - first, 0, len(table) - 1)]
    ends = table if kind == "VOILUTSequence" else values
    grey = np.rint((values - ends.min()) / (ends.max() - ends.min()) * 255).astype(np.uint8)
    return 255 - grey if photometric == "MONOCHROME1" else grey


@needs_real
@pytest.mark.parametrize("bent", [False, True], ids=["as it is", "bent"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mlut_18.dcm", "ModalityLUTSequence"),
        ("CR-ModalitySequenceLUT.dcm", "ModalityLUTSequence"),
        ("vlut_04.dcm", "VOILUTSequence"),
    ],
)
def test_a_film_with_a_table_shows_what_the_table_says(name, kind, bent, tmp_path):
    """All three tables are straight lines; bent, one is its middle half squared, so that most values are beyond its ends or off the line."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    dataset = pydicom.dcmread(DICOM / name)
    item = dataset[kind].value[0]
    if bent:
        table, first = table_of(item)
        part = slice(len(table) // 4, 3 * len(table) // 4)
        item.LUTDescriptor = [len(table) // 2, first + part.start, 16]
        squared = (table[part] ** 2 // table.max()).astype("<u2")
        item["LUTData"] = pydicom.DataElement("LUTData", "OW", squared.tobytes())
    path = tmp_path / name
    dataset.save_as(path)
    stored = pydicom.dcmread(path).pixel_array
    shown = images.load_grey(path)
    np.testing.assert_array_equal(shown, shown_by_table(stored, item, kind, dataset.PhotometricInterpretation))
    assert (shown.min(), shown.max()) == (0, 255)
    straight = images.load_grey(DICOM / name)
    assert (shown != straight).any() == bent


@needs_real
def test_chest_films_show_lung_dark_and_spine_bright():
    pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    for name in ("CR-MONO1-10-chest.dcm", "RG1_J2KI.dcm", "RG1_JLSN.dcm"):
        grey = images.resize_short(images.load_grey(DICOM / name), 64).astype(int)
        spine, right_lung = grey[25:40, 30:34].mean(), grey[20:35, 14:20].mean()
        assert spine > right_lung + 30, name


@needs_real
def test_window_follows_the_dicom_formula():
    pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    import pydicom

    path = DICOM / "RG1_JLSN.dcm"
    stored = pydicom.dcmread(path).pixel_array.astype(np.float64)
    # PS3.3 C.11.2.1.2 with centre 15000, width 30000; MONOCHROME1
    shown = np.clip((stored - 14999.5) / 29999 + 0.5, 0, 1)
    np.testing.assert_array_equal(images.load_grey(path), 255 - np.rint(shown * 255).astype(np.uint8))


def small_dicom(**changes):
    """A 16-bit signed dataset of 4 x 3 pixels, saved to bytes."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 4, 3, 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = np.arange(-600, 600, 100, dtype=np.int16).tobytes()
    for key, value in changes.items():
        if isinstance(value, pydicom.DataElement):
            dataset.add(value)
        else:
            setattr(dataset, key, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_histogram_equalisation_is_opencvs():
    ramp = (np.arange(1000) ** 2 // 4000).astype(np.uint8).reshape(25, 40)
    # cv2.equalizeHist of opencv-python-headless 5.0.0.93
    golden = [0, 0, 13, 25, 40, 51, 65, 79, 93, 106, 119, 133, 147, 160, 174, 187, 201, 214, 228, 242]
    assert images.equalise(ramp).reshape(-1)[::50].tolist() == golden
    flat = np.full((3, 3), 7, np.uint8)
    np.testing.assert_array_equal(images.equalise(flat), flat)


def test_dicom_in_the_style_of_mimic_cxr_jpg(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    path = tmp_path / "film.dcm"
    # Twelve values, each once: equalised they are evenly spread, whatever rescale and window say.
    even = np.rint(np.arange(12) * np.float32(255 / 11)).astype(int)
    path.write_bytes(small_dicom(RescaleSlope="2", RescaleIntercept="100", WindowCenter="0.5", WindowWidth="401"))
    np.testing.assert_array_equal(images.load_grey(path, "mimic_cxr_jpg").ravel(), even)
    assert images.load_grey(path).ravel().tolist() != even.tolist()
    path.write_bytes(small_dicom(PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(images.load_grey(path, "mimic_cxr_jpg").ravel(), even[::-1])
    small, shape = images.load_short(path, 2, "mimic_cxr_jpg")
    assert shape == (4, 3) and small.shape == (2, 2)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "tags",
    [{}, {"WindowCenter": "0.5", "WindowWidth": "401"}, {"RescaleSlope": "-2", "RescaleIntercept": "100"}],
    ids=["spread", "window", "rescale"],
)
def test_padding_counts_for_nothing_and_is_black(photometric, tags):
    """Signed pixels with a border of -2000: the film within is as it is without one, whichever way it is read."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    tags = {"PhotometricInterpretation": photometric, **tags}
    film = np.arange(-600, 600, 40, dtype=np.int16).reshape(6, 5)
    alone = small_dicom(Rows=6, Columns=5, PixelData=film.tobytes(), **tags)
    border = np.ones((8, 7), bool)
    border[1:-1, 1:-1] = False
    even = np.pad(film, 1, constant_values=-2000)
    uneven = even.copy()
    uneven[0] = -1990
    unsigned = pydicom.DataElement("PixelPaddingValue", "US", 2**16 - 2000)  # some files have it so
    ways: list[tuple[np.ndarray, dict[str, Any]]] = [
        (even, {"PixelPaddingValue": -2000}),
        (even, {"PixelPaddingValue": unsigned}),
        (uneven, {"PixelPaddingValue": -1990, "PixelPaddingRangeLimit": -2000}),
    ]
    for pixels, padding in ways:
        data = small_dicom(Rows=8, Columns=7, PixelData=pixels.tobytes(), **tags, **padding)
        for style in images.DICOM_STYLES:
            grey = images.read_grey(data, "film", style)
            np.testing.assert_array_equal(grey[1:-1, 1:-1], images.read_grey(alone, "film", style))
            assert not grey[border].any() and grey.dtype == np.uint8
        deep, window = images.read_deep(data, "film")
        wanted, ends = images.read_deep(alone, "film")
        np.testing.assert_array_equal(deep[1:-1, 1:-1], wanted)
        assert window == ends and not deep[border].any() and deep.dtype == np.uint16
    # Without the header's word the border is film, and takes most of the greys; a range that covers all of the film is a mistake.
    spread = np.ptp(images.read_grey(alone, "film").astype(int))
    plain = small_dicom(Rows=8, Columns=7, PixelData=even.tobytes(), **tags)
    wide = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": 600}
    wrong = small_dicom(Rows=8, Columns=7, PixelData=even.tobytes(), **tags, **wide)
    np.testing.assert_array_equal(images.read_grey(wrong, "film"), images.read_grey(plain, "film"))
    assert "WindowWidth" in tags or np.ptp(images.read_grey(plain, "film")[1:-1, 1:-1].astype(int)) < spread / 2


def test_dicom_rescale_window_and_refusals(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    path = tmp_path / "film.dcm"

    path.write_bytes(small_dicom())
    np.testing.assert_array_equal(images.load_grey(path).ravel(), np.rint(np.arange(12) / 11 * 255))
    # Rescaled to -1100..1100; of the two windows the first, -200..200, shows.
    path.write_bytes(
        small_dicom(RescaleSlope="2", RescaleIntercept="100", WindowCenter=["0.5", "500"], WindowWidth=["401", "9"])
    )
    rescaled = np.arange(-600, 600, 100) * 2 + 100
    expected = np.rint(np.clip((rescaled + 200) / 400, 0, 1) * 255)
    np.testing.assert_array_equal(images.load_grey(path).ravel(), expected)

    refused: dict[str, dict[str, Any]] = {
        "several frames": {"NumberOfFrames": 2, "PixelData": bytes(48)},
        "colour": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        "damaged": {"PixelData": bytes(20)},
    }
    for message, changes in refused.items():
        path.write_bytes(small_dicom(**changes))
        with pytest.raises(UserError, match=rf"film\.dcm: .*{message}"):
            images.load_grey(path)
    path.write_bytes(b"not DICOM at all" * 20)
    with pytest.raises(UserError, match=r"film\.dcm"):
        images.load_grey(path)


@needs_real
@pytest.mark.parametrize("name", ["CR-MONO1-10-chest.dcm", "RG3_J2KI_extremity.dcm", "mlut_18.dcm"])
def test_a_cut_dicom_is_refused(tmp_path, name):
    pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    whole = (DICOM / name).read_bytes()
    cut = tmp_path / "cut.dcm"
    for part in (0.001, 0.1, 0.5, 0.9, 0.999):
        cut.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(UserError, match=r"cut\.dcm"):
            images.load_grey(cut)


@needs_real
def test_a_cut_codestream_in_a_whole_dicom_is_refused(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the packing extra")
    from pydicom.encaps import encapsulate, generate_frames

    dataset = pydicom.dcmread(DICOM / "RG3_J2KI_extremity.dcm")
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(tmp_path / "half.dcm")
    with pytest.raises(UserError, match=r"half\.dcm"):
        images.load_grey(tmp_path / "half.dcm")


def test_a_short_film_without_an_array_of_the_whole(tmp_path):
    for name, shape in (("tall.png", (90, 61)), ("wide.jpg", (33, 80))):
        pixels = film(*shape)
        Image.fromarray(pixels).save(tmp_path / name)
        small, found = images.load_short(tmp_path / name, 24)
        assert found == shape
        np.testing.assert_array_equal(small, images.resize_short(images.load_grey(tmp_path / name), 24))
