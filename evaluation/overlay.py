"""An attention map laid over its radiograph, as PNG bytes."""

import io

import numpy as np
from PIL import Image

# Dark violet to pale yellow, rising in lightness, so that it also reads in grey and to colour-blind eyes.
_RAMP = np.array(
    [[44, 18, 84], [120, 28, 109], [187, 55, 84], [237, 105, 37], [251, 180, 26], [252, 245, 160]], dtype=np.float32
)
_STRONGEST = 0.72  # share of colour at the maximum; the image still shows through


def overlay(image: np.ndarray, attention: np.ndarray) -> bytes:
    """Colours image uint8 [Y, X] by attention float [h, w] and returns an RGB PNG of the image's size.

    The map is scaled from its own minimum and maximum to [0, 1] and resized bilinearly; its strength sets colour and
    opacity, so unattended places stay grey. A flat map colours nothing. Raises ValueError for numbers that are not
    finite.
    """
    if not np.isfinite(attention).all():
        raise ValueError("attention map contains numbers that are not finite")
    height, width = image.shape
    low, high = float(attention.min()), float(attention.max())
    scaled = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    resized = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(resized), 0.0, 1.0)
    at = strength[..., None] * (len(_RAMP) - 1)
    lower = np.minimum(at.astype(np.int64), len(_RAMP) - 2)
    colour = _RAMP[lower[..., 0]] * (1 - (at - lower)) + _RAMP[lower[..., 0] + 1] * (at - lower)
    opacity = _STRONGEST * strength[..., None]
    mixed = image[..., None] * (1 - opacity) + colour * opacity
    out = io.BytesIO()
    Image.fromarray(np.round(mixed).astype(np.uint8)).save(out, format="PNG", optimize=True)
    return out.getvalue()
