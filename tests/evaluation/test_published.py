"""Published figures keep their form, and stand only beside numbers that were made the same way."""

import re

from evaluation import profiles, published

SYSTEMS = ("LLaVA-Rad", "Med-PaLM M 12B", "Med-PaLM M 84B", "Med-PaLM M 562B", "GPT-4V", "MAIRA-1", "MAIRA-2")


def entry(**changes: object) -> dict[str, object]:
    signature = "bleu|order:4|tok:13a|case:mixed|smooth:exp|agg:corpus|scale:0-100|unit:report|ci:percentile-500-seed3"
    return {"name": "bleu_4", "profile": "llava-rad", "n": 2461, "signature": signature} | changes


def test_every_row_is_whole() -> None:
    rows = published.rows()
    keys = [(row["system"], row["metric"]) for row in rows]
    assert len(keys) == len({*keys})
    assert all(any(system.startswith(name) for system, _ in keys) for name in SYSTEMS)
    for row in rows:
        share = not row["metric"].startswith(("bleu", "chexprompt"))
        assert 0 < float(row["value"]) < (1 if share else 100)
        assert row["source"] and row["verified"] in ("yes", "third party")
        assert re.fullmatch(r"(|([\w-]+\|)([\w-]+:[\w-]+\|)*([\w-]+\|)*)", row["signature"]), row


def test_only_the_same_convention_and_size() -> None:
    found = published.beside([entry()])
    assert [(row["system"], row["value"]) for row in found] == [("LLaVA-Rad 7B", 15.4)]
    other = entry(signature="bleu|order:4|tok:blank|case:mixed|smooth:coco|agg:corpus|scale:0-1|")
    assert published.beside([other, entry(n=2460), entry(name="bleu_3")]) == []


def test_signatures_are_those_of_our_metrics() -> None:
    """A signature that none of our metrics has could never be shown."""
    import numpy as np

    ours = [m.signature for p in profiles.PROFILES.values() for m in profiles.text_metrics(p, ["a b c d"], ["a b c d"])]
    table = np.zeros((1, 14), np.int8)
    ours += [m.signature for m in profiles.label_scores(profiles.PROFILES["native"], table, table, "chexbert", "how")]
    for row in published.rows():
        assert not row["signature"] or any(signature.startswith(row["signature"]) for signature in ours), row
