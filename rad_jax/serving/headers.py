"""What a film's header says, read and judged before any pixel is decoded.

The sizes are those that the decoder will go by, in the codestream itself: a DICOM of 10 x 10 can hold a JPEG of 60,000 x 60,000.
"""

import io
import warnings
from typing import Any, NamedTuple

from rad_jax.errors import UserError
from rad_jax.serving import limits

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
BARE = (b"\x02\x00", b"\x08\x00")  # group 2 or 8: a DICOM of before 1993, which begins with its first element
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
FRONTAL, LATERAL = ("AP", "PA"), ("LL", "RL", "LATERAL", "LLD", "RLD")
RADIOGRAPHS = ("CR", "DX")
# Markers of a JPEG, or JPEG-LS, frame: SOF0 to SOF15 but DHT, JPG and DAC, and SOF55.
FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


class Header(NamedTuple):
    """`kind` is dicom, png or jpeg; `view` frontal, lateral or unknown; `radiograph` whether a DICOM says that it is one."""

    kind: str
    view: str
    radiograph: bool


def read(data: bytes, name: str) -> Header:
    """Judges a file.

    Raises:
        UserError: it is no PNG, JPEG or DICOM, has several frames, colour in a DICOM, or more than `limits.PIXELS`.
    """
    if data.startswith((PNG, JPEG)):
        check_picture(data, name)
        return Header("png" if data.startswith(PNG) else "jpeg", "unknown", True)
    if data[128:132] != b"DICM" and not data.startswith(BARE):
        raise UserError(f"{name}: not a PNG, JPEG or DICOM file")
    try:
        return dicom_header(data, name)
    except UserError:
        raise
    except Exception as error:  # pydicom raises whatever damaged bytes lead it to
        raise UserError(f"{name}: damaged or incomplete DICOM") from error


def check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise UserError(f"{name}: has no pixels")
    if height * width > limits.PIXELS:
        raise UserError(f"{name}: has more than {limits.PIXELS // 10**6} megapixels")


def check_picture(data: bytes, name: str) -> None:
    """Of a PNG or JPEG."""
    from PIL import Image

    try:
        # Opening reads the header alone. Up to twice its own limit of 89 megapixels Pillow only warns.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        width, height = limits.PIXELS, 2
    except Exception as error:  # Pillow raises SyntaxError, ValueError, OSError and more on damage
        raise UserError(f"{name}: damaged or incomplete image") from error
    check_size(height, width, name)


def dicom_header(data: bytes, name: str) -> Header:
    """Of a DICOM; the file's own header is read, pixels and all else are left where they are."""
    import pydicom
    from pydicom.filereader import read_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO(data)
        # Where pydicom begins too, whatever stands in the preamble. The group of the file itself is never compressed (PS3.10 section 7.1).
        file.seek(132 if data[128:132] == b"DICM" else 0)
        own = read_dataset(file, False, True, stop_when=lambda tag, _, __: tag >> 16 != 2)
        syntax = str(own.get("TransferSyntaxUID", ""))
        if syntax == DEFLATED:
            raise UserError(f"{name}: a deflated DICOM, which could hold anything: send it uncompressed")
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        if str(dataset.file_meta.get("TransferSyntaxUID", "")) != syntax:  # what the decoder goes by
            raise UserError(f"{name}: damaged or incomplete DICOM")
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise UserError(f"{name}: has several frames, only single films can be read")
        height, width = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        check_size(height, width, name)
        if dataset.get("PixelData") and syntax and pydicom.uid.UID(syntax).is_compressed:
            check_codestream(dataset, syntax, (height, width), name)
        view = str(dataset.get("ViewPosition") or "").upper()
        known = "frontal" if view in FRONTAL else "lateral" if view in LATERAL else "unknown"
        return Header("dicom", known, str(dataset.get("Modality") or "") in RADIOGRAPHS)


def check_codestream(dataset: Any, syntax: str, shape: tuple[int, int], name: str) -> None:
    """Refuses compressed pixels that say another size than the DICOM, or unpack to more."""
    from pydicom.encaps import generate_frames

    frame = next(iter(generate_frames(dataset.PixelData, number_of_frames=1)))
    if syntax == RLE:
        room = shape[0] * shape[1] * max(int(dataset.get("BitsAllocated") or 8) // 8, 1)
        if rle_size(frame, 2 * room) > 2 * room:
            raise UserError(f"{name}: its pixels unpack to more than they should")
        return
    found = jpeg_shape(frame) if frame.startswith(b"\xff\xd8") else jpeg2000_shape(frame)
    if found != shape:
        raise UserError(f"{name}: its pixels are damaged, or of another size than it says")


def rle_size(frame: bytes, enough: int) -> int:
    """Bytes that a frame of DICOM's run-length code (PS3.5 annex G) unpacks to, counted no further than `enough`."""
    starts = [int.from_bytes(frame[4 * i : 4 * i + 4], "little") for i in range(1, 16)]
    count = min(int.from_bytes(frame[:4], "little"), 15)
    ends = [*starts[1:count], len(frame)]
    total = 0
    for start, end in zip(starts[:count], ends, strict=True):
        while start < end - 1 and total <= enough:
            code = frame[start]
            if code < 128:
                total, start = total + code + 1, start + code + 2
            elif code > 128:
                total, start = total + 257 - code, start + 2
            else:
                start += 1
    return total


def jpeg_shape(frame: bytes) -> tuple[int, int] | None:
    """Height and width in the frame header of a JPEG or JPEG-LS codestream."""
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in FRAMES:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def jpeg2000_shape(frame: bytes) -> tuple[int, int] | None:
    """Height and width in the SIZ marker of a JPEG 2000 codestream, which may lie in a JP2 file."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(frame) < at + 24:
        return None
    width, height, left, top = (int.from_bytes(frame[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
    return height - top, width - left
