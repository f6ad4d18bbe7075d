"""Published figures keep their form, and stand only beside numbers that were made the same way."""

import re

from evaluation import profiles, published, scoring

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


def test_a_median_stands_beside_medians_alone() -> None:
    """LLaVA-Rad prints the median of 500 bootstrap means; other tables print the score itself."""

    def systems(value: str) -> list[str]:
        signature = (
            f"chexbert|labels:14|unc:neg|avg:micro|zero:0|scale:0-1|labeler:chexbert-given{value}|unit:report|ci:x"
        )
        return [row["system"] for row in published.beside([entry(name="chexbert_micro_14", signature=signature)])]

    assert systems("|value:median-500") == ["LLaVA-Rad 7B"]
    assert systems("|value:median-2000") == []
    assert "GPT-4V" in systems("") and "LLaVA-Rad 7B" not in systems("")
    assert not any(system.startswith("Med-PaLM") for system in systems(""))  # on how many reports is not stated


def test_signatures_are_those_of_our_metrics() -> None:
    """A signature that none of our metrics has could never be shown."""
    import numpy as np

    ours, table = set(), np.zeros((1, 14), np.int8)
    for profile in profiles.PROFILES.values():
        metrics = profiles.text_metrics(profile, ["a b c d"], ["a b c d"])
        metrics += profiles.label_scores(profile, table, table, "chexbert", "labeler:chexbert-given")
        setting = scoring.Setting(range(1), "report", profile.draws, 0)
        ours |= {published.made(row["signature"]) for row in scoring.entries(metrics, setting, profile.median)}
    for row in published.rows():
        assert not row["signature"] or row["signature"].rstrip("|") in ours, row
