"""The folder of weights that a user brings for the metrics that need models: what belongs in it, where it comes from, whether it is whole.

    DIR/chexbert/   chexbert.pth, vocab.txt
    DIR/radgraph/   radgraph.tar.gz, or config.json, weights.th and vocabulary/ out of it; vocab.txt
    DIR/bertscore/  model.safetensors or pytorch_model.bin, tokenizer.json or vocab.txt, config.json
    DIR/SHA256SUMS  written by launch.doctor --seal, in the form of sha256sum; files that it names must have not changed

Nothing is downloaded here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rad_jax.errors import UserError
from rad_jax.interop.sources import sha256

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Item:
    """One model. files: each entry lists names of which one must be there; archive: what they may come in."""

    name: str
    metrics: str
    files: Sequence[Sequence[str]]
    source: str
    licence: str
    archive: str | None = None

    def missing(self, folder: Path) -> list[str]:
        """What is not in DIR/name, in words."""
        own = folder / self.name
        return [" or ".join(names) for names in self.files if not any((own / name).exists() for name in names)]

    def packed(self, folder: Path) -> Path | None:
        """The archive, when it is there and the first of `files`, which is out of it, is not."""
        own = folder / self.name
        path = own / self.archive if self.archive else None
        return path if path and path.is_file() and not (own / self.files[0][0]).exists() else None


ITEMS = (
    Item(
        "chexbert",
        "chexbert_*, semb_score, radcliq_*",
        (("chexbert.pth",), ("vocab.txt",)),
        "checkpoint: its authors (Stanford), or chexbert.pth of StanfordAIMI/RRG_scorers on Hugging Face; vocab.txt: bert-base-uncased",
        "Stanford academic software licence: internal, non-commercial use, no redistribution; vocabulary Apache-2.0",
    ),
    Item(
        "radgraph",
        "radgraph_*, radcliq_*",
        (("config.json",), ("weights.th",), ("vocabulary",), ("vocab.txt",)),
        "radgraph.tar.gz of StanfordAIMI/RRG_scorers on Hugging Face (version 1, not XL); vocab.txt: PubMedBERT (microsoft)",
        "MIT; the data it was trained on is credentialed (PhysioNet, RadGraph 1.0.0)",
        "radgraph.tar.gz",
    ),
    Item(
        "bertscore",
        "bertscore, radcliq_* (distilroberta-base)",
        (("model.safetensors", "pytorch_model.bin"), ("tokenizer.json", "vocab.txt")),
        "any BERT or RoBERTa; distilroberta-base on Hugging Face for RadCliQ and rescaled scores",
        "distilroberta-base: Apache-2.0",
    ),
)


def item(name: str) -> Item:
    """The model of this name."""
    return next(item for item in ITEMS if item.name == name)


def files(folder: Path) -> list[Path]:
    """All files of the models in the folder, in the order of their names."""
    return sorted(path for part in ITEMS for path in (folder / part.name).rglob("*") if path.is_file())


def seal(folder: Path) -> int:
    """Writes `SUMS` for all files, and returns how many there are. Raises UserError for a folder without any."""
    found = files(folder)
    if not found:
        raise UserError(f"{folder} holds no weights: there should be {', '.join(f'{part.name}/' for part in ITEMS)}")
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in found]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return len(found)


def check(folder: Path, only: Sequence[str] = ()) -> int | None:
    """Compares the files that `SUMS` names (those of the models in `only`, where given) with it; how many, or None where there is no such file.

    Raises UserError for a file that is missing or has changed.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of weights at {folder}")
    if not (folder / SUMS).is_file():
        return None
    count = 0
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if only and name.partition("/")[0] not in only:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is in {SUMS} and not in the folder: put it back, or write {SUMS} again")
        if sha256(path) != digest:
            raise UserError(f"{path} is not the file that {SUMS} was written for: download it again")
        count += 1
    return count
