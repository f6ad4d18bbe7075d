"""Attention maps as PNG bytes: laid over a radiograph, or alone and see-through."""

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
    height, width = image.shape
    resized = Image.fromarray(_scaled(attention)).resize((width, height), Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(resized), 0.0, 1.0)[..., None]
    opacity = _STRONGEST * strength
    return _png(image[..., None] * (1 - opacity) + _colour(strength) * opacity)


def heat(attention: np.ndarray) -> bytes:
    """The same colours and opacities for attention float [h, w] alone: an RGBA PNG of h x w pixels, to be drawn over the image by a browser.

    Raises ValueError for numbers that are not finite.
    """
    strength = _scaled(attention)[..., None]
    return _png(np.concatenate([_colour(strength), 255 * _STRONGEST * strength], axis=-1))


def _scaled(attention: np.ndarray) -> np.ndarray:
    """float32 [h, w] from 0 to 1; a flat map is 0."""
    if not np.isfinite(attention).all():
        raise ValueError("attention map contains numbers that are not finite")
    low, high = float(attention.min()), float(attention.max())
    scaled = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    return scaled.astype(np.float32)


def _colour(strength: np.ndarray) -> np.ndarray:
    """Colours [Y, X, 3] of strengths [Y, X, 1]."""
    at = strength * (len(_RAMP) - 1)
    lower = np.minimum(at.astype(np.int64), len(_RAMP) - 2)
    return _RAMP[lower[..., 0]] * (1 - (at - lower)) + _RAMP[lower[..., 0] + 1] * (at - lower)


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(out, format="PNG", optimize=True)
    return out.getvalue()
