"""A text for films that come with labels alone: noun phrases in a fixed order, by rules, without a language model.

LLaVA-Rad had GPT-4 write such texts; its prompt is not published. These say what the labels say and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.labels import CHEXPERT

METHOD = "labels"
_NOTHING = "No abnormality is labelled."


def findings_of(positive: Sequence[str], negative: Sequence[str] = (), uncertain: Sequence[str] = ()) -> str:
    """A text of findings by their names.

    Args:
        positive, negative, uncertain: what is there, what is not, and what may be; in any case, without an article.

    Returns:
        As "Cardiomegaly and edema. Possible pneumonia. No fracture or pneumothorax."; empty when nothing is stated.
    """
    sentences = []
    if positive:
        sentences.append(_list(positive, "and"))
    if uncertain:
        sentences.append(f"possible {_list(uncertain, 'or')}")
    if negative:
        sentences.append(f"no {_list(negative, 'or')}")
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def of_chexpert(labels: Sequence[int]) -> str:
    """A text of a label vector of `CHEXPERT`; empty when nothing is stated.

    "No Finding" stands for itself only where no other label is positive or uncertain.
    """
    stated = {name: value for name, value in zip(CHEXPERT, labels, strict=True) if name != "No Finding"}
    positive, negative, uncertain = ([n for n, v in stated.items() if v == wanted] for wanted in (1, 0, -1))
    text = findings_of(positive, negative, uncertain)
    if labels[CHEXPERT.index("No Finding")] == 1 and not (positive or uncertain):
        return f"{_NOTHING} {text}".strip()
    return text


def _list(names: Sequence[str], word: str) -> str:
    names = [name if name.isupper() else name.lower() for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
