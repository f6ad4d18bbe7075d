"""A result as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from evaluation import panels

Json = dict[str, Any]

# What a summary shows, in this order, of what there is: metric -> head.
HEADLINES = {
    "finding_macro_f1": "finding macro F1",
    "laterality": "laterality",
    "chexbert_micro_14": "CheXbert micro 14",
    "chexbert_macro_14": "CheXbert macro 14",
    "chexbert_micro_5": "CheXbert micro 5",
    "chexbert_macro_5": "CheXbert macro 5",
    "chexbert_micro_14_plus": "CheXbert micro 14+",
    "chexbert_macro_14_plus": "CheXbert macro 14+",
    "chexbert_micro_5_plus": "CheXbert micro 5+",
    "chexbert_macro_5_plus": "CheXbert macro 5+",
    "rules_micro_14": "rules micro 14",
    "rules_macro_14": "rules macro 14",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "radgraph_partial": "RadGraph partial",
    "bertscore": "BERTScore",
    "semb_score": "SembScore",
    "radcliq_v0": "RadCliQ v0",
    "radcliq_v1": "RadCliQ v1",
    "chexprompt_significant": "CheXprompt significant errors",
    "chexprompt_total": "CheXprompt errors",
    "green": "GREEN",
    "crimson": "CRIMSON",
    "radfact_f1": "RadFact F1",
}


def profiles_of(result: Json) -> list[str]:
    """The profiles that have a metric, in order."""
    return list(dict.fromkeys(row["profile"] for row in result["metrics"]))


def summary(result: Json, profile: str) -> list[list[str]]:
    """Head row and one row per system: its name, then every headline number with its interval."""
    cells = {(row["system"], row["name"]): row for row in result["metrics"] if row["profile"] == profile}
    used = [name for name in HEADLINES if any(row["name"] == name for row in cells.values())]
    used = [name for name in used if any(cells.get((s["name"], name), {}).get("value") is not None for s in result["systems"])]  # fmt: skip
    rows = [["system", *(HEADLINES[name] for name in used)]]
    for system in result["systems"]:
        rows.append([system["name"], *(with_interval(cells.get((system["name"], name))) for name in used)])
    return rows


def rest(result: Json, profile: str) -> list[list[str]]:
    """Head row and one row per metric that is no headline and in no panel, systems in columns; empty when there is none."""
    names = [system["name"] for system in result["systems"]]
    cells = {(row["name"], row["system"]): row for row in result["metrics"] if row["profile"] == profile}
    used = [name for name in dict.fromkeys(name for name, _ in cells) if name not in (*HEADLINES, *panels.NAMES)]
    rows = [[name, *(with_interval(cells.get((name, system))) for system in names)] for name in used]
    return [["metric", *names], *rows] if rows else []


def panel(result: Json) -> list[list[str]]:
    """Head row and one row per rate of `evaluation.panels`, systems in columns; empty when none was computed."""
    names = [system["name"] for system in result["systems"]]
    cells = {(row["name"], row["system"]): row for row in result["metrics"]}
    rows = [["rate", *names]]
    for rate in panels.NAMES:
        if any((rate, name) in cells for name in names):
            rows.append([rate.replace("_", " "), *(with_interval(cells.get((rate, name))) for name in names)])
    if len(rows) > 1:
        for key in ("distinct_share", "most_frequent_share"):
            rows.append([key.replace("_", " "), *(digits(system[key], 3) for system in result["systems"])])
    return rows if len(rows) > 1 else []


def subgroups(result: Json) -> list[list[str]]:
    """Head row and one row per group and system: every headline number; empty when there are no groups."""
    used = [name for name in HEADLINES if any(row["name"] == name for row in result["subgroups"])]
    cells = {(r["column"], r["group"], r["system"], r["name"]): r for r in result["subgroups"]}
    keys = dict.fromkeys((r["column"], r["group"], r["system"], r["reports"]) for r in result["subgroups"])
    rows = [["group", "system", "reports", *(HEADLINES[name] for name in used)]]
    for column, group, system, reports in keys:
        scores = [with_interval(cells.get((column, group, system, name))) for name in used]
        rows.append([f"{column}: {group}", system, str(reports), *scores])
    return rows if len(rows) > 1 else []


def per_finding(result: Json, system: str) -> list[list[str]]:
    """Head row and one row per finding class of the system's first metric that has them; empty when none has."""
    found = next((r for r in result["metrics"] if r["system"] == system and r.get("per_finding")), None)
    if found is None:
        return []
    rows = [["finding", "precision", "recall", "F1 (95%)", "support", "predicted", "omitted (95%)", "invented (95%)"]]
    for name, s in found["per_finding"].items():
        f1 = with_interval({"value": s["f1"], "ci": s["f1_ci"], "scale": 1.0})
        numbers = [digits(s["precision"], 3), digits(s["recall"], 3), f1, str(s["support"]), str(s["predicted"])]
        shares = [
            with_interval(s[kind] | {"value": s[kind]["share"], "scale": 1.0}) for kind in ("omitted", "invented")
        ]
        counts = (s[kind]["count"] for kind in ("omitted", "invented"))
        cells = [f"{count}: {share}" if share != "-" else "-" for count, share in zip(counts, shares, strict=True)]
        rows.append([name.replace("_", " "), *numbers, *cells])
    return rows


def comparisons(result: Json) -> list[list[str]]:
    """Head row and one row per comparison of a headline metric; empty when there is none."""
    rows = [["metric", "profile", "b minus a", "difference (95%)", "p", "p (Holm)", "better", "worse", "n"]]
    for row in result["comparisons"]:
        if row["metric"] in HEADLINES:
            difference = with_interval({"value": row["diff"], "ci": row["ci"], "scale": row["scale"]})
            names = [HEADLINES[row["metric"]], row["profile"], f"{row['b']} - {row['a']}"]
            tests = [digits(row["p"], 4), digits(row["p_holm"], 4), str(row["n_better"]), str(row["n_worse"])]
            count = f"{row['n']} ({row['n_dropped']} lack a score)" if row["n_dropped"] else str(row["n"])
            rows.append([*names, difference, *tests, count])
    return rows if len(rows) > 1 else []


def markdown(result: Json) -> str:
    """The whole result as Markdown."""
    parts = ["# Evaluation", f"{result['inputs'][0]['n']} reports scored. Brackets: 95% interval.", *result["warnings"]]
    for profile in profiles_of(result):
        parts += [f"## Profile {profile}", markdown_table(summary(result, profile))]
        if table := rest(result, profile):
            parts.append(markdown_table(table))
    if table := comparisons(result):
        parts += ["## Comparisons", markdown_table(table)]
    first = result["systems"][0]["name"]
    if table := per_finding(result, first):
        parts += ["## Findings", markdown_table(table)]
    if table := panel(result):
        parts += ["## Behind the averages", markdown_table(table)]
    if result["published"]:
        found = [["system", "metric", "profile", "value", "source"]]
        found += [[*(r[k] for k in found[0][:3]), f"{r['value']:g}", r["source"]] for r in result["published"]]
        parts += ["## Published on the same number of reports in the same convention", markdown_table(found)]
    if table := subgroups(result):
        parts += ["## Subgroups", markdown_table(table)]
    lines = [
        f"- {row['name']}: `{row['signature']}|n:{row['n']}`" for row in result["metrics"] if row["system"] == first
    ]
    if lines:
        parts += ["## Signatures", "\n".join(lines)]
    for item in result["inputs"]:
        if item["malformed"]:
            rows = [f"- line {row['line']}: {row['reason']}" for row in item["malformed"]]
            parts += ["## Rows left out", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def csv_text(result: Json) -> str:
    """One line per metric of every system."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["system", "profile", "metric", "value", "ci_low", "ci_high", "n", "n_failed", "signature"])
    for row in result["metrics"]:
        ends = row["ci"] or ("", "")
        value = "" if row["value"] is None else row["value"]
        names = [row["system"], row["profile"], row["name"]]
        writer.writerow([*names, value, *ends, row["n"], row["n_failed"], row["signature"]])
    return out.getvalue()


def latex(result: Json) -> str:
    """Two booktabs tables per profile, headlines with systems in rows and the rest with systems in columns; intervals are subscripts."""
    parts = []
    tables = [
        (profile, rows) for profile in profiles_of(result) for rows in (summary(result, profile), rest(result, profile))
    ]
    for profile, rows in tables:
        if not rows:
            continue
        body = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in rows]
        lines = [
            f"% profile {profile}; needs \\usepackage{{booktabs}}",
            r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_LATEX = str.maketrans({"\\": r"\textbackslash{}"} | {character: f"\\{character}" for character in "&%$#_{}"})


def _latex_cell(cell: str) -> str:
    value, bracket, interval = cell.partition(" [")
    value = value.translate(_LATEX)
    return f"{value} {{\\scriptsize [{interval}}}" if bracket else value


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows (the first is the head) as a padded Markdown table, readable in a terminal as it is."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def with_interval(entry: Json | None) -> str:
    """A value with its interval in brackets: one digit of a percentage, three of a share; "-" for none."""
    if entry is None or entry["value"] is None:
        return "-"
    places = 1 if entry["scale"] == 100.0 else 3
    text = digits(entry["value"], places)
    if entry["ci"]:
        text += f" [{entry['ci'][0]:.{places}f}, {entry['ci'][1]:.{places}f}]"
    return text


def digits(value: float | None, places: int) -> str:
    """A number for a table, "-" for none."""
    return "-" if value is None else f"{value:.{places}f}"
