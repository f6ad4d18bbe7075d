"""Which way a score is better: without it "more" cannot be told from "better"."""

from evaluation import panels

# Scores by how their names begin, the longest beginning that fits counts: 1 where more is better, -1 where less is.
_BEGINNINGS = {
    **dict.fromkeys(("bleu_", "rouge_", "cider", "meteor", "bertscore", "semb_score", "radgraph_", "chexbert_", "rules_"), 1),
    **dict.fromkeys(("finding_", "laterality", "ratescore", "radfact_", "green", "crimson"), 1),
    **dict.fromkeys(("radcliq_", "chexprompt_", "green_significant", "crimson_missed", "crimson_invented"), -1),
    **dict.fromkeys((name for name in panels.NAMES if name.endswith("_rate")), -1),
}  # fmt: skip
_FREE = "_free"  # a share of reports without errors, among counts of errors


def direction(name: str) -> int | None:
    """1 for a score of which more is better, -1 where less is, None for one that is not known or is best in between."""
    if name.endswith(_FREE):
        return 1
    fitting = [start for start in _BEGINNINGS if name.startswith(start)]
    return _BEGINNINGS[max(fitting, key=len)] if fitting else None
