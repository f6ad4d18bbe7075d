"""Pixels: the one place where a radiograph becomes what the image tower sees.

A film is read as 8-bit grey (`load_grey`), scaled so that its short side has the training size (`resize_short`), kept
as PNG (`encode_png`), and at read time cut to a square (`centre_crop`) and normalised (`normalise`, on the host or on
the device). The result equals the evaluation transform of open_clip, bit for bit: Pillow's antialiased bicubic filter
on 8-bit values, long side rounded down, crop offset rounded half to even, the statistics of OpenAI's CLIP (a tower of
another family brings its own).
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rad_jax.errors import UserError

# Channel statistics of OpenAI's CLIP (Radford et al. 2021), for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Of a training crop: share of the film's area (open_clip's), and width over height (torchvision's).
CROP_AREA = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_DICOM_SUFFIXES = (".dcm", ".dicom", "")
DICOM_STYLES = ("window", "mimic_cxr_jpg")
PNG_LEVEL, _Z_RLE = 1, 3
_DEEP = 65535
_DEEP_MODES = ("I", "F")  # 16-bit PNGs open as "I" or "I;16..."


def load_grey(path: str | os.PathLike[str], dicom: str = "window") -> np.ndarray:
    """Reads one radiograph.

    PNG and JPEG of 8 bits are taken as they are (colour becomes luma); deeper ones are spread from their darkest to
    their brightest value over 0..255. DICOM passes its modality LUT or rescale, then its VOI LUT or first window;
    MONOCHROME1 is inverted, so that bone is bright. What its header calls padding counts for nothing in all this, and is black.

    Args:
        path: a PNG, JPEG or DICOM file; DICOM may lack its preamble.
        dicom: one of DICOM_STYLES: "window" as above, or "mimic_cxr_jpg", as MIMIC-CXR-JPG was made of MIMIC-CXR (Johnson et al. 2019): the
            stored values, spread over 0..255 and cut to whole numbers, inverted if MONOCHROME1, histogram equalised.

    Returns:
        uint8 [Y, X].

    Raises:
        UserError: the file cannot be read, is cut short or damaged, has several frames, or is a colour DICOM.
    """
    return np.array(_open(path, dicom))


def read_grey(data: bytes, name: str, dicom: str = "window") -> np.ndarray:
    """`load_grey` of a file's contents; `name` is what errors call it, and a DICOM is what is neither PNG nor JPEG."""
    return np.array(_decode(data, name)) if data.startswith(_SIGNATURES) else _decode_dicom(data, name, dicom)


def read_deep(data: bytes, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """A film with all its shades, for a viewer with a window of its own.

    DICOM passes its modality LUT or rescale and no window, MONOCHROME1 is inverted, padding is black; PNG and JPEG are taken as they are.

    Args:
        data: contents of a PNG, JPEG or DICOM file.
        name: what errors call it.

    Returns:
        uint16 [Y, X], spread from the darkest to the brightest value over 0..65535, and the values (black, white) of the DICOM's first
        window on that scale; where there is none, the whole of it.

    Raises:
        UserError: as `load_grey`.
    """
    if not data.startswith(_SIGNATURES):
        return _deep_dicom(data, name)
    with _opened(data, name) as image:
        deep = np.asarray(image) if image.mode.startswith(_DEEP_MODES) else None
    if deep is None:  # 8 bits: 255 becomes 65535
        return read_grey(data, name).astype(np.uint16) * np.uint16(257), (0, _DEEP)
    return _scale(deep, deep.min(), deep.max(), _DEEP), (0, _DEEP)


def load_short(path: str | os.PathLike[str], size: int, dicom: str = "window") -> tuple[np.ndarray, tuple[int, int]]:
    """`resize_short` of `load_grey`, without an array of the whole film in between.

    Returns:
        uint8 [Y', X'], and the film's own (Y, X).
    """
    film = _open(path, dicom)
    return np.asarray(film.resize(_short_shape(film.size, size), Image.Resampling.BICUBIC)), (film.height, film.width)


def equalise(image: np.ndarray) -> np.ndarray:
    """Equalises the histogram of uint8 [Y, X] as OpenCV's `equalizeHist`: the darkest value becomes 0, the brightest 255."""
    counts = np.bincount(image.reshape(-1), minlength=256)
    darkest = int(np.flatnonzero(counts)[0])
    rest = image.size - counts[darkest]
    if not rest:
        return image.copy()
    below = np.cumsum(counts) - np.cumsum(counts)[darkest]
    table = np.rint(np.maximum(below, 0).astype(np.float32) * np.float32(255 / rest))
    return table.astype(np.uint8)[image]


def resize_short(image: np.ndarray, size: int) -> np.ndarray:
    """Scales so that the short side is `size` and the long side int(size * long / short).

    Pillow's bicubic filter, antialiased, on 8-bit values, as torchvision's `Resize` does with a Pillow image.

    Args:
        image: uint8 [Y, X].
        size: pixels.

    Returns:
        uint8 [Y', X'].
    """
    film = Image.fromarray(image)
    return np.asarray(film.resize(_short_shape(film.size, size), Image.Resampling.BICUBIC))


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the middle square, offsets round((side - size) / 2), half to even, as torchvision's `CenterCrop`.

    Args:
        image: [Y, X], both at least `size`.
        size: pixels.

    Returns:
        [size, size], a view.

    Raises:
        ValueError: the image is smaller than the square.
    """
    height, width = image.shape
    if min(height, width) < size:
        raise ValueError(f"cannot crop {size} x {size} from {height} x {width}")
    top, left = (round((side - size) / 2) for side in (height, width))
    return image[top : top + size, left : left + size]


def boxes_seen(boxes: Sequence[Sequence[float]], shape: tuple[int, int], size: int) -> list[list[float]]:
    """Where boxes of a film lie after `resize_short` and `centre_crop`.

    Args:
        boxes: [x0, y0, x1, y1] in pixels of the film.
        shape: (Y, X) of the film.
        size: side of the square, as of the short side.

    Returns:
        The boxes in pixels of the square, cut at its edges; what lies outside is left out.
    """
    height, width = shape
    short = min(height, width)
    new_height, new_width = (size if side == short else int(size * side / short) for side in (height, width))
    top, left = (round((side - size) / 2) for side in (new_height, new_width))
    out = []
    for x0, y0, x1, y1 in boxes:
        xs, ys = (
            [v * n / o - off for v in ends]
            for ends, n, o, off in (((x0, x1), new_width, width, left), ((y0, y1), new_height, height, top))
        )
        cut = [min(max(v, 0.0), float(size)) for v in (xs[0], ys[0], xs[1], ys[1])]
        if cut[2] > cut[0] and cut[3] > cut[1]:
            out.append(cut)
    return out


def mask_seen(mask: np.ndarray, size: int) -> np.ndarray:
    """What `resize_short` and `centre_crop` leave of a mask bool [Y, X], as bool [size, size]: the nearest pixel of the film decides."""
    height, width = mask.shape
    scaled = int(size * max(height, width) / min(height, width))
    shape = (size, scaled) if width <= height else (scaled, size)
    small = Image.fromarray(mask.astype(np.uint8)).resize(shape, Image.Resampling.NEAREST)
    return centre_crop(np.asarray(small), size).astype(bool)


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A part of the film, drawn and scaled to a square: open_clip's transform for training, torchvision's `RandomResizedCrop`.

    `CROP_AREA` of the film at an aspect ratio of `CROP_RATIO`, as open_clip and torchvision have them by default; as in `resize_short`
    the filter is Pillow's bicubic.

    Args:
        image: uint8 [Y, X].
        size: pixels.
        rng: what is drawn from.

    Returns:
        uint8 [size, size].
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], rng)
    part = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of a film [height, width].

    torchvision's way: area and logarithm of the aspect ratio are uniform; a part that does not fit is drawn again, ten times, and then
    is the largest part in the middle whose aspect ratio is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            top, left = rng.integers(height - part_height + 1), rng.integers(width - part_width + 1)
            return int(top), int(left), part_height, part_width
    least, greatest = CROP_RATIO
    part_width, part_height = min(width, round(height * greatest)), min(height, round(width / least))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [Y, X] as an 8-bit grey PNG.

    zlib looks for runs only: on films that gives smaller files than its usual search for repeats, in a sixth of the time.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_LEVEL, compress_type=_Z_RLE)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Decodes what `encode_png` wrote.

    Returns:
        uint8 [Y, X].

    Raises:
        UserError: the bytes are no whole grey image.
    """
    return np.array(_decode(data, "stored image"))


def normalise(images: Any, xp: Any = np, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Any:
    """Turns grey values into the three channels of the image tower: (x / 255 - mean) / std.

    Args:
        images: uint8 [..., Y, X].
        xp: numpy or jax.numpy.
        mean, std: of the three channels, the tower's own (`VitConfig.pixel_mean`, `pixel_std`).

    Returns:
        float32 [..., Y, X, C], C = 3.
    """
    unit = xp.asarray(images)[..., None].astype(xp.float32) / xp.float32(255)
    return (unit - xp.asarray(mean, xp.float32)) / xp.asarray(std, xp.float32)


def _short_shape(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of a film of this width and height when its short side is `size`."""
    width, height = shape
    short, long = sorted(shape)
    scaled = int(size * long / short)
    return (size, scaled) if width <= height else (scaled, size)


def _open(path: str | os.PathLike[str], dicom: str) -> Image.Image:
    """A film as an image of mode L, decoded; raises as `load_grey`."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if data.startswith(_SIGNATURES):
        return _decode(data, str(path))
    if data[128:132] == b"DICM" or (data and path.suffix.lower() in _DICOM_SUFFIXES):
        return Image.fromarray(_decode_dicom(data, str(path), dicom))
    raise UserError(f"{path}: not a PNG, JPEG or DICOM file")


def _decode(data: bytes, name: str) -> Image.Image:
    """Decodes a PNG or JPEG to an image of mode L; Pillow refuses a file that ends early."""
    with _opened(data, name) as image:
        if image.mode.startswith(_DEEP_MODES):
            return Image.fromarray(_spread(np.asarray(image)))
        # Transparency carries no film; through RGB, because the luma of a palette is only defined there.
        return image.copy() if image.mode == "L" else image.convert("RGB").convert("L")


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """A decoded PNG or JPEG of one frame."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise UserError(f"{name}: has several frames, only single films can be read")
            image.load()
            yield image
    # The PNG reader raises SyntaxError and ValueError on damage, the JPEG reader OSError.
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: damaged or incomplete image ({_first_line(error)})") from error


def _decode_dicom(data: bytes, name: str, style: str) -> np.ndarray:
    """Decodes a single-frame grey DICOM to uint8 [Y, X], as it is meant to be shown (DICOM PS3.3 C.11.1 and C.11.2) or in another style."""
    with _parsed(data, name) as dataset:
        from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

        stored, padding = _without_padding(_stored_values(dataset), dataset)
        if style == "mimic_cxr_jpg":
            return _mimic_cxr_jpg(stored, padding, dataset.PhotometricInterpretation == "MONOCHROME1")
        values = apply_modality_lut(stored, dataset)
        if dataset.get("VOILUTSequence"):
            entries, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
            table = apply_voi(np.arange(first, first + (entries or 2**16)), dataset)
            grey = _scale(apply_voi(values, dataset), table.min(), table.max())
        elif _has_window(dataset):
            black, white = apply_windowing(np.array([-np.inf, np.inf]), dataset)
            grey = _scale(apply_windowing(values, dataset), black, white)
        else:
            grey = values if values.dtype == np.uint8 else _spread(values)
        grey = 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey
        return _black(grey, padding)


def _deep_dicom(data: bytes, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """`read_deep` of a DICOM."""
    with _parsed(data, name) as dataset:
        from pydicom.pixels import apply_modality_lut

        stored, padding = _without_padding(_stored_values(dataset), dataset)
        values = apply_modality_lut(stored, dataset)
        low, high = float(values.min()), float(values.max())
        ends = [0.0, float(_DEEP)]
        if _has_window(dataset) and high > low:
            centre, width = (_first_number(dataset[key].value) for key in ("WindowCenter", "WindowWidth"))
            ends = [(centre + side * width / 2 - low) / (high - low) * _DEEP for side in (-1, 1)]
        black, white = (round(min(max(end, 0.0), _DEEP)) for end in ends)
        deep = _scale(values, low, high, _DEEP)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            deep, black, white = _DEEP - deep, _DEEP - white, _DEEP - black
        return _black(deep, padding), (black, white)


@contextlib.contextmanager
def _parsed(data: bytes, name: str) -> Iterator[Any]:
    """A DICOM dataset of one grey frame; whatever its pixels then raise becomes a UserError."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"{name}: reading DICOM needs the package pydicom") from error
    try:
        # pydicom warns about every odd but readable header; what matters here is checked below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            _check_dicom(dataset, name)
            yield dataset
    except UserError:
        raise
    except Exception as error:  # pydicom and its codecs raise whatever the damaged bytes lead them to
        raise UserError(f"{name}: damaged or incomplete DICOM, or no codec for it ({_first_line(error)})") from error


def _has_window(dataset: Any) -> bool:
    return dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None


def _first_number(value: Any) -> float:
    """Of a DICOM element with one or more values."""
    return float(value if isinstance(value, (str, float, int)) else value[0])


def _without_padding(stored: np.ndarray, dataset: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored values [Y, X] with the film's smallest where they are padding, and where that is: bool [Y, X], or None without any.

    Pixel Padding Value and Range Limit (DICOM PS3.3 C.7.5.1.1.2) are stored values, before any LUT. A range that leaves nothing of the
    film is taken for a mistake.
    """
    ends = [_padding_end(dataset, key) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    known = [end for end in ends if end is not None]
    if ends[0] is None:
        return stored, None
    padding = (stored >= min(known)) & (stored <= max(known))
    if not padding.any() or padding.all():
        return stored, None
    return np.where(padding, stored[~padding].min(), stored), padding


def _black(grey: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """The same values with padding black."""
    return grey if padding is None else np.where(padding, grey.dtype.type(0), grey)


def _padding_end(dataset: Any, key: str) -> int | None:
    """An end of the range of padding, with the sign of the pixels; some files have it without its sign."""
    value = dataset.get(key)
    if not isinstance(value, int):
        return None
    signed = dataset.get("PixelRepresentation") == 1
    return (value + 2**15) % 2**16 - 2**15 if signed else value % 2**16


def _mimic_cxr_jpg(stored: np.ndarray, padding: np.ndarray | None, inverted: bool) -> np.ndarray:
    """What MIMIC-CXR-JPG does with stored values [Y, X], up to its JPEG; `padding` as of `_without_padding`.

    Equalising leaves out how often the darkest value is there, and so the padding too.
    """
    shifted = stored.astype(np.float64) - stored.min()
    grey = (shifted / max(shifted.max(), 1) * 255).astype(np.uint8)
    grey = 255 - grey if inverted else grey
    return equalise(_black(grey, padding))


def _check_dicom(dataset: Any, name: str) -> None:
    """Raises UserError unless the dataset holds one grey frame."""
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise UserError(f"{name}: no DICOM image, or one that ends before its pixels")
    if dataset.get("SamplesPerPixel", 1) != 1 or not str(dataset.get("PhotometricInterpretation")).startswith("MONO"):
        raise UserError(f"{name}: a colour DICOM, only grey radiographs can be read")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise UserError(f"{name}: has several frames, only single films can be read")


def _stored_values(dataset: Any) -> np.ndarray:
    """Decodes the pixel data to integers [Y, X]."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:
        # A file without preamble has no such entry; it is then uncompressed, in the encoding it was parsed with.
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset.pixel_array


def _spread(values: np.ndarray) -> np.ndarray:
    """Spreads numbers [Y, X] from their smallest to their largest over uint8 0..255; a flat image becomes black."""
    return _scale(values, values.min(), values.max())


def _scale(values: np.ndarray, black: float, white: float, top: int = 255) -> np.ndarray:
    """Maps black..white to 0..top, rounding to the nearest: uint8, or uint16 where `top` is greater."""
    kind = np.uint8 if top <= 255 else np.uint16
    if black == white:
        return np.zeros(values.shape, kind)
    unit = (values.astype(np.float64) - float(black)) / (float(white) - float(black))
    return np.rint(unit * top).astype(kind)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
