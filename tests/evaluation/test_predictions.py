import json
from pathlib import Path

import pytest

from evaluation.predictions import malformed_sentence, read_predictions
from rad_jax.errors import UserError


def row(name: str, **changes: object) -> str:
    return json.dumps({"id": name, "query": "q", "reference": "r", "prediction": "p"} | changes)


def test_bad_rows_are_listed_by_line_and_never_quoted(tmp_path: Path) -> None:
    file = tmp_path / "preds.jsonl"
    secret = "Jane Doe"
    lines = [
        row("a"),
        "",
        '{"id": "' + secret,
        "[1]",
        row("b", prediction=None),
        '{"id": "x"}',
        row("", reference=secret),
        row("c", prediction=""),
        row("d", reference="\ud800"),
        row("e", reference="é ü"),
    ]
    file.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b"[" * 100_000)
    read = read_predictions(file)
    assert [(r.id, r.line) for r in read.rows] == [("a", 1), ("c", 8), ("e", 10)]
    assert read.malformed == [
        (3, "not JSON"),
        (4, "not a JSON object"),
        (5, "field 'prediction' is not a string"),
        (6, "no field 'query'"),
        (7, "empty id"),
        (9, "field 'reference' holds half a character (lone surrogate)"),
        (11, "not UTF-8"),
        (12, "not JSON"),
    ]
    sentence = malformed_sentence(read.malformed, 11)
    assert sentence.startswith("8 of 11 rows left out as malformed (line 3: not JSON, ")
    assert secret not in sentence


def test_many_bad_rows_are_summed_up() -> None:
    assert malformed_sentence([(i, "not JSON") for i in range(30)], 40).endswith("line 9: not JSON, and 20 more)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no predictions file at"),
        ("", "holds no usable row: the file is empty"),
        ("x\n{}\n", "holds no usable row: 2 of 2 rows left out"),
        (row("a") + "\n" + row("b") + "\n" + row("a"), "lines 1 and 3 have the same id"),
    ],
)
def test_unusable_files_end_in_one_sentence(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "preds.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(file)
    assert "\n" not in str(caught.value)
