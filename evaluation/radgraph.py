"""F1 over RadGraph annotations (Jain et al. 2021; Delbrouck et al. 2022), in the four forms that papers call "RadGraph F1".

An annotation is a set of entities, tokens with a label, and typed relations between them. Sets of elements are compared report by report:
  simple           (tokens, label)
  partial          the same, marked when the entity has a relation (what most papers print, LLaVA-Rad among them)
  complete         (tokens, label, relation, target tokens) for every relation, (tokens, label) for an entity without one
  entity_relation  mean of the F1 of entities and the F1 of relations (RadCliQ, ReXrank)
Released packages compare tokens as they are written ("case:kept"), except for the complete form's relations; the later rule lower-cases all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metric import Metric, mean, mean_rows
from rad_jax.errors import UserError

FORMS = ("simple", "partial", "complete", "entity_relation")
Annotation = dict[str, Any]  # entity number -> {"tokens", "label", "relations": [[type, entity number], ...]}


def read(path: Path) -> dict[str, Annotation]:
    """id -> entities of a JSON file of annotations, as the radgraph package gives them, under the ids of the reports.

    Raises UserError for a missing file or another layout.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no annotations at {path}: give a JSON file of RadGraph's output by report id") from None
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    try:
        found = {str(name): dict(report["entities"]) for name, report in content.items()}
        for entities in found.values():
            for entity in entities.values():
                [entities[str(target)] for _, target in entity["relations"]]
                str(entity["tokens"] + entity["label"])
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(
            f"{path} is no file of RadGraph annotations: id, then entities with tokens, label and relations"
        ) from None
    return found


def elements(annotation: Annotation, form: str, keep_case: bool) -> set[Any]:
    """The set of one report in the form "simple", "partial", "complete", or "relation" for the relations alone."""
    out: set[Any] = set()
    for entity in annotation.values():
        tokens, label = entity["tokens"], entity["label"]
        written = tokens if keep_case else tokens.lower()
        related = [(kind, annotation[str(target)]) for kind, target in entity["relations"]]
        if form == "relation":
            targets = [(t["tokens"] if keep_case else t["tokens"].lower(), t["label"], kind) for kind, t in related]
            out |= {(written, label, *target) for target in targets}
        elif form == "complete" and related:
            out |= {(tokens.lower(), label, kind, t["tokens"].lower()) for kind, t in related}
        else:
            out.add((written, label, True) if form == "partial" and related else (written, label))
    return out


def f1(predicted: Annotation, reference: Annotation, form: str, keep_case: bool) -> float:
    """F1 of one report; 0 when nothing is common, two empty annotations included."""
    if form == "entity_relation":
        return (f1(predicted, reference, "simple", keep_case) + f1(predicted, reference, "relation", keep_case)) / 2
    said, true = (elements(annotation, form, keep_case) for annotation in (predicted, reference))
    return 2 * len(said & true) / (len(said) + len(true)) if said & true else 0.0


def metrics(
    predicted: Sequence[Annotation], references: Sequence[Annotation], keep_case: bool, how: str = "given"
) -> list[Metric]:
    """radgraph_simple, _partial, _complete and _entity_relation as means over the reports; `how` says what made the annotations."""
    out = []
    for form in FORMS:
        values = [f1(p, r, form, keep_case) for p, r in zip(predicted, references, strict=True)]
        signature = f"radgraph|form:{form}|case:{'kept' if keep_case else 'lc'}|agg:mean|scale:0-1|annotations:{how}"
        out.append(Metric(f"radgraph_{form}", signature, mean_rows(np.array(values, float)), mean, len(values)))
    return out
