"""A vision model behind a chat endpoint as a system to compare with: image and question in, findings out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.judging import PROMPTS
from rad_jax import images
from rad_jax.chat import templates
from rad_jax.chat.client import Question, UnusableError, with_image

REFUSED = "refused in words"
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'|’)?m (?:really )?(?:sorry|unable|not able)|sorry|i can(?:'|’)?t|i cannot|as an ai\b|i am (?:sorry|unable|not able))",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^\W*findings\W*:\W*", re.IGNORECASE)


def prompt_of(given: Path | None = None) -> templates.Template:
    """Our prompt, or the file that is given. Raises UserError for a file that is no prompt with a question."""
    return templates.load(given or PROMPTS / "vision.txt", {"question"})


def asker(prompt: templates.Template, image_size: int) -> Callable[[int, dict[str, Any]], Question]:
    """(number, row of a corpus) -> the request for its findings, with the square of the film that our own models see.

    The function raises UserError for an image that cannot be decoded.
    """

    def question(number: int, row: dict[str, Any]) -> Question:
        *before, last = prompt.fill({"question": row["question"].replace("<image>", "").strip()})
        square = images.centre_crop(images.decode_png(row["image"]), image_size)
        return Question(number, [*before, with_image(last["content"], images.encode_png(square))], findings_of)

    return question


def findings_of(text: str) -> str:
    """The findings of an answer, without a heading and on one line. Raises UnusableError where the model declines in words."""
    if _REFUSAL.match(text):
        raise UnusableError(
            REFUSED, "it holds no findings; the image is a public or de-identified one for research, describe it"
        )
    found = " ".join(_HEADING.sub("", text.replace("*", "").replace("#", "")).split())
    if not found:
        raise UnusableError("empty answer")
    return found
