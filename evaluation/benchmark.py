"""How fast intervals and labels are, against the usual way of making them; and how long a whole test set and a large pool take.

Intervals: rows of sums resampled at once, against computing the metric again for every resample. The peers are what other evaluations do: scikit-learn's F1 on resampled label tables (eight of them: micro and macro, 14 and 5 classes, both
rules for uncertain labels), and sacrebleu on resampled texts. A peer is timed for a few resamples and multiplied, for it would take hours.
Labels: the BERT labeler against the same model in PyTorch, one report at a time, as most packages do it, and 64 at a time; compiling and
loading are left out on both sides. Both sides compute the same numbers, which is checked. Reports are random sentences, weights and label
tables random; that does not change the work. A whole test set: all scores that need no weights, of 2,461 reports, with intervals and panels. A
large pool: ranks in both directions among 100,000 pairs, in a process of its own, for its greatest memory.
"""

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import bleu, label_metrics, labels, report, retrieval_metrics, statistics
from evaluation.bert_labeler import HEADS, BertLabeler
from evaluation.metric import Metric
from evaluation.predictions import Predictions, Row

SENTENCES = (
    "The lungs are clear.",
    "Heart size is normal.",
    "There is no pleural effusion or pneumothorax.",
    "Small left pleural effusion with adjacent atelectasis.",
    "Mild cardiomegaly is unchanged.",
    "Patchy opacity in the right lower lobe may represent pneumonia.",
    "The endotracheal tube ends 4.5 cm above the carina.",
    "No acute osseous abnormality.",
)
PEER_RESAMPLES = 5


def bootstrap(reports: int = 2461, draws: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of name, ours_s, peer_s, ratio, draws and reports: seconds for `draws` resamples of `reports` reports.

    Ours includes counting the rows. Raises ValueError when the two sides disagree on a resample.
    """
    rng = np.random.default_rng(seed)
    said, written = ([" ".join(rng.choice(SENTENCES, size=6)) for _ in range(reports)] for _ in range(2))
    true, found = (rng.choice(4, size=(reports, 14), p=[0.6, 0.2, 0.15, 0.05]).astype(np.int8) for _ in range(2))
    sizes = reports, draws
    return [
        _row(
            "label F1, 8 averages", lambda: _label_metrics(true, found), lambda i: _peer_labels(true, found, i), *sizes
        ),
        _row(
            "BLEU-4",
            lambda: [bleu.metric(said, written, 4, "sacrebleu")],
            lambda i: _peer_bleu(said, written, i),
            *sizes,
        ),
    ]


def labels_per_second(reports: int = 128, depth: int = 12, width: int = 768, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of name, ours_s, peer_s, ratio, reports, ours_per_s and peer_per_s for a BERT of random weights with 14 heads.

    Needs torch and transformers. Raises ValueError when the two sides disagree.
    """
    import torch
    from transformers import BertConfig, BertModel

    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(SENTENCES, size=rng.integers(3, 12))) for _ in range(reports)]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted({w for s in SENTENCES for w in re.findall(r"\w+|\.", s.lower())}),
    ]
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    bert = BertModel(BertConfig(vocab_size=30522, intermediate_size=4 * width, **shape)).eval()
    heads = torch.nn.ModuleList([torch.nn.Linear(width, size) for size in HEADS])
    with tempfile.TemporaryDirectory() as folder:
        state = {f"bert.{n}": x for n, x in bert.state_dict().items()} | {
            f"heads.{n}": x for n, x in heads.state_dict().items()
        }
        torch.save(state, Path(folder) / "model.pth")
        (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        labeler = BertLabeler(Path(folder) / "model.pth", Path(folder) / "vocab.txt")
        labeler.logits(texts)  # compiles
        ours_s, (ours, _) = _timed(lambda: labeler.logits(texts))

    def peer(size: int) -> np.ndarray:
        out = []
        for start in range(0, reports, size):
            ids = [torch.tensor(labeler.encode(text)) for text in texts[start : start + size]]
            tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            real = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
            cls = bert(tokens, attention_mask=real.long()).last_hidden_state[:, 0]
            out.append(torch.cat([head(cls) for head in heads], dim=1).numpy())
        return np.concatenate(out)

    rows = []
    with torch.no_grad():
        for size in (1, 64):
            peer_s, theirs = _timed(lambda size=size: peer(size))  # type: ignore[misc]
            if not np.allclose(ours, theirs, atol=1e-3):
                raise ValueError(f"the labeler and PyTorch give different logits, by {np.abs(ours - theirs).max()}")
            row = {
                "name": f"labels, PyTorch batch {size}",
                "ours_s": ours_s,
                "peer_s": peer_s,
                "ratio": peer_s / ours_s,
            }
            rows.append(row | {"reports": reports, "ours_per_s": reports / ours_s, "peer_per_s": reports / peer_s})
    return rows


def whole_panel(reports: int = 2461, seed: int = 0) -> list[dict[str, Any]]:
    """A row of name, ours_s and reports: one system under the native profile, with intervals. A sentence that occurs again is labelled once."""
    rng = np.random.default_rng(seed)
    said, written = ([" ".join(rng.choice(SENTENCES, size=6)) for _ in range(reports)] for _ in range(2))
    rows = [Row(str(i), "", written[i], said[i], i + 1) for i in range(reports)]
    seconds, _ = _timed(lambda: report.evaluate([report.Input("x", Predictions(rows, []))], report.Options()))
    return [{"name": "scores without weights", "ours_s": seconds, "reports": reports}]


def large_pool(pairs: int = 100_000, width: int = 512) -> list[dict[str, Any]]:
    """A row of name, ours_s, pairs and peak_bytes, the greatest resident memory of the process that ranks them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, peak = pool.apply(_rank, (pairs, width))
    return [{"name": f"ranks among {pairs:,} pairs", "ours_s": seconds, "pairs": pairs, "peak_bytes": peak}]


def _rank(pairs: int, width: int) -> tuple[float, int]:
    """Seconds and the process's greatest resident memory in bytes, for pairs of which the right one is mostly the nearest."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((pairs, width), np.float32)
    text = image + 3 * rng.standard_normal((pairs, width), np.float32)
    seconds, _ = _timed(lambda: retrieval_metrics.retrieval(image, text))
    # Not getrusage: its maximum begins with that of the process that started this one.
    return seconds, int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


SUITES: dict[str, tuple[Callable[[], list[dict[str, Any]]], ...]] = {
    "intervals": (bootstrap,),
    "labels": (labels_per_second,),
    "evaluation": (bootstrap, labels_per_second, whole_panel, large_pool),
}


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows for people."""
    print(f"{'':30}{'ours':>11}{'peer':>12}{'ratio':>9}")
    for row in rows:
        peer = f"{row['peer_s']:11.2f}s{row['ratio']:9.1f}" if "peer_s" in row else ""
        rate = f"  {row['ours_per_s']:.1f} / {row['peer_per_s']:.1f} reports per s" if "ours_per_s" in row else ""
        memory = f"  {row['peak_bytes'] / 1e9:.2f} GB at most" if "peak_bytes" in row else ""
        print(f"{row['name']:30}{row['ours_s']:10.3f}s{peer}{rate}{memory}")


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def _row(
    name: str, metrics: Callable[[], list[Metric]], peer: Callable[[np.ndarray], list[float]], reports: int, draws: int
) -> dict[str, Any]:
    began = time.perf_counter()
    ours = metrics()
    totals = statistics.resample(np.concatenate([m.rows for m in ours], axis=1), range(reports), draws=draws)
    parts = np.split(totals, np.cumsum([m.rows.shape[1] for m in ours])[:-1], axis=1)
    for metric, part in zip(ours, parts, strict=True):
        statistics.percentile_interval(metric.value(part))
    ours_s = time.perf_counter() - began
    drawn = [np.random.default_rng(i).integers(0, reports, reports) for i in range(PEER_RESAMPLES)]
    peer(drawn[0])  # its imports
    began = time.perf_counter()
    found = [peer(index) for index in drawn]
    peer_s = (time.perf_counter() - began) / PEER_RESAMPLES * draws
    for index, values in zip(drawn, found, strict=True):
        mine = [float(m.value(m.rows[index].sum(axis=0, keepdims=True))[0]) for m in ours]
        if not np.allclose(mine, values, rtol=1e-9):
            raise ValueError(f"{name}: the two sides give different numbers, {mine} and {values}")
    return {
        "name": name,
        "ours_s": ours_s,
        "peer_s": peer_s,
        "ratio": peer_s / ours_s,
        "draws": draws,
        "reports": reports,
    }


def _label_metrics(reference: np.ndarray, predicted: np.ndarray) -> list[Metric]:
    wanted = [f"x_{a}_{size}{plus}" for plus in ("", "_plus") for size in (14, 5) for a in ("micro", "macro")]
    found = {metric.name: metric for metric in label_metrics.metrics(reference, predicted, "x", "")}
    return [found[name] for name in wanted]


def _peer_labels(reference: np.ndarray, predicted: np.ndarray, index: np.ndarray) -> list[float]:
    from sklearn.metrics import f1_score

    out = []
    for plus in (False, True):
        true, said = (label_metrics.positive(table[index], plus) for table in (reference, predicted))
        for chosen in (labels.columns(labels.CLASSES), labels.columns()):
            for average in ("micro", "macro"):
                out.append(float(f1_score(true[:, chosen], said[:, chosen], average=average, zero_division=0)))
    return out


def _peer_bleu(predictions: Sequence[str], references: Sequence[str], index: np.ndarray) -> list[float]:
    from sacrebleu.metrics import BLEU

    scorer = BLEU(force=True)
    return [scorer.corpus_score([predictions[i] for i in index], [[references[i] for i in index]]).score]
