"""The BERT labeler against transformers' BERT and torch's linear layers, from a checkpoint that torch wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import bertscore, labels, models, report
from evaluation.bert_labeler import HEADS, BertLabeler
from evaluation.predictions import Predictions, Row
from rad_jax.errors import UserError

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "small",
    "left",
    "effusion",
    "no",
    "pneumo",
    "##thorax",
    "lungs",
    "clear",
    ".",
]
TEXTS = [
    "Small left effusion.",
    "No pneumothorax.",
    "",
    "The lungs are\n clear.",
    "no " * 90,
    "effusion " * 300,
    "left . " * 20,
]


@pytest.fixture(scope="module")
def model() -> Any:
    """BERT of width 128 with 14 heads, random weights everywhere."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertModel(config).eval()
    heads = torch.nn.ModuleList([torch.nn.Linear(128, size) for size in HEADS])
    with torch.no_grad():
        for parameter in [*bert.parameters(), *heads.parameters()]:
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return bert, heads


def save(path: Path, model: Any, change: Any = lambda state: state) -> Path:
    """As a training loop on several GPUs writes it: nested, with "module." before every name."""
    bert, heads = model
    state = {f"module.bert.{n}": x for n, x in bert.state_dict().items()}
    state |= {f"module.heads.{n}": x for n, x in heads.state_dict().items()}
    torch.save({"epoch": 3, "model_state_dict": change(state)}, path)
    return path


@pytest.fixture(scope="module")
def labeler(model: Any, tmp_path_factory: pytest.TempPathFactory) -> BertLabeler:
    folder = tmp_path_factory.mktemp("labeler")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return BertLabeler(save(folder / "model.pth", model), folder / "vocab.txt")


def alone(model: Any, labeler: BertLabeler, text: str) -> np.ndarray:
    """Logits [54] of one text, unpadded, by torch."""
    bert, heads = model
    with torch.no_grad():
        cls = bert(torch.tensor([labeler.encode(text)])).last_hidden_state[:, 0]
        return torch.cat([head(cls) for head in heads], dim=1)[0].numpy()


@pytest.mark.parametrize("batch_size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 64))])
def test_padded_batches_against_single_texts(parity: Any, model: Any, labeler: BertLabeler, batch_size: int) -> None:
    theirs = np.stack([alone(model, labeler, text) for text in TEXTS])
    ours, _ = labeler.logits(TEXTS, batch_size)
    # Two layers and a head in float32 at logits of size 10: relative to those the usual 1e-5.
    scale = np.abs(theirs).max()
    parity.forward(f"BERT labeler, batches of {batch_size}", "transformers, one by one", ours / scale, theirs / scale)
    found = labeler.label(TEXTS, batch_size)
    expected = [[part.argmax() for part in np.split(row, np.cumsum(HEADS)[:-1])] for row in theirs]
    np.testing.assert_array_equal(found.codes, expected)
    assert found.margin.min() >= 0 and found.codes.shape == (len(TEXTS), len(labels.CLASSES))
    assert set(found.codes[:, -1]) <= {labels.BLANK, labels.POSITIVE}


def test_texts_are_cut_to_the_positions(labeler: BertLabeler) -> None:
    ids = labeler.encode("effusion " * 300)
    assert len(ids) == 256 and ids[0] == WORDS.index("[CLS]") and ids[-1] == WORDS.index("[SEP]")
    assert labeler.encode(" ") == [WORDS.index("[CLS]"), WORDS.index("[SEP]")]
    assert labeler.encode("NO\n\npneumothorax") == [
        WORDS.index(w) for w in ("[CLS]", "no", "pneumo", "##thorax", "[SEP]")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: x for n, x in s.items() if "heads.13" not in n}, "instead of 14 heads"),
        (lambda s: {n: x for n, x in s.items() if "heads.3.bias" not in n}, "instead of 14 heads"),
        (lambda s: {n: x for n, x in s.items() if ".bert." not in n}, "holds 0 BERT encoders"),
        (
            lambda s: {n: x for n, x in s.items() if "layer.1.output.dense.weight" not in n},
            "layer.1.output.dense.weight",
        ),
    ],
)
def test_other_checkpoints_are_refused(
    tmp_path: Path, model: Any, labeler: BertLabeler, change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        BertLabeler(save(tmp_path / "m.pth", model, change), labeler.tokenizer.path)


def test_in_the_evaluation(tmp_path: Path, model: Any, labeler: BertLabeler) -> None:
    """A folder of weights with this model alone gives F1 over its labels and the cosine of its class tokens."""
    (tmp_path / "chexbert").mkdir()
    save(tmp_path / "chexbert/chexbert.pth", model)
    (tmp_path / "chexbert/vocab.txt").write_text("\n".join(WORDS) + "\n")
    rows = [Row(str(i), "", TEXTS[i], TEXTS[j], i + 1) for i, j in enumerate((1, 1, 0, 4, 3))]
    filled = models.fill([report.Input("p", Predictions(rows, []))], report.Options(draws=100), tmp_path)
    result, _ = report.evaluate(*filled)
    found = {m["name"]: m["value"] for m in result["metrics"]}
    kept = [row for row in rows if row.reference.strip()]
    said, true = (labeler.label([getattr(row, side) for row in kept]) for side in ("prediction", "reference"))
    positive, both = said.codes == labels.POSITIVE, (said.codes == labels.POSITIVE) & (true.codes == labels.POSITIVE)
    assert found["chexbert_micro_14"] == pytest.approx(2 * both.sum() / (positive.sum() + (true.codes == labels.POSITIVE).sum()))  # fmt: skip
    assert found["semb_score"] == pytest.approx(bertscore.semb_scores(said.cls, true.cls).mean(), abs=1e-6)
