"""Says what evaluation has here and what it lacks: packages, devices, weights; where each comes from, and under which licence.

    python -m launch.doctor
    python -m launch.doctor --weights=DIR
    python -m launch.doctor --weights=DIR --seal

DIR is the folder that launch.evaluate --weights takes: chexbert/, radgraph/ and bertscore/, each with the files that the report below names.
--seal unpacks radgraph/radgraph.tar.gz where its files are not there yet, and writes DIR/SHA256SUMS; from then on doctor and evaluate refuse
files that have changed. Nothing is downloaded.
"""

import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from absl import flags

from evaluation import radgraph_model, weights
from rad_jax import errors
from rad_jax.errors import UserError

# Package -> what is missing without it.
PACKAGES = {
    "jax": "everything that runs a model",
    "flax": "everything that runs a model",
    "tokenizers": "BERT labeler, RadGraph, BERTScore",
    "rouge-score": "ROUGE (pip install rad_jax[eval])",
    "sacrebleu": "nothing: BLEU is our own, equal to it; the benchmark of intervals",
    "scikit-learn": "nothing: F1 is our own, equal to it; the benchmark of intervals",
    "torch": "the benchmark of labels, the exported model",
    "transformers": "the benchmarks",
}


def packages() -> list[str]:
    """One line per package: version and licence, or what is missing without it."""
    lines = []
    for name, need in PACKAGES.items():
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            lines.append(f"  - {name}: not installed; without it: {need}")
            continue
        lines.append(f"  + {name} {found['Version']} ({licence(found)})")
    return lines


def licence(found: metadata.PackageMetadata) -> str:
    """What a package says of its licence, in a few words."""
    for field in ("License-Expression", "License"):
        said = str(found[field] or "").strip().splitlines()
        if said and len(said[0]) <= 60 and said[0].upper() != "UNKNOWN":
            return said[0]
    of = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or () if c.startswith("License ::")]
    return ", ".join(of) or "licence not stated"


def devices() -> str:
    """The devices that JAX sees."""
    import jax

    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind} ({found[0].platform})"


def of_weights(folder: Path | None) -> list[str]:
    """Every model with what is missing of it, where it comes from, and its licence. Raises UserError for a file that has changed."""
    lines = []
    for item in weights.ITEMS:
        missing = item.missing(folder) if folder else [" or ".join(names) for names in item.files]
        packed = item.packed(folder) if folder else None
        state = "not packed out yet: run with --seal" if packed else f"missing: {', '.join(missing)}"
        lines.append(f"  {'-' if missing else '+'} {item.name}/ for {item.metrics}{f': {state}' if missing else ''}")
        lines += [f"      from: {item.source}", f"      licence: {item.licence}"]
    if folder is not None:
        count = weights.check(folder)
        lines.append(
            f"  no {weights.SUMS}: write it with --seal" if count is None else f"  {count} files as in {weights.SUMS}"
        )
    return lines


def prepare(folder: Path) -> None:
    """Unpacks what is packed and writes the sums."""
    for item in weights.ITEMS:
        if packed := item.packed(folder):
            radgraph_model.unpack(packed, folder / item.name)
    print(f"written: {folder / weights.SUMS}, {weights.seal(folder)} files")


def main(_: Sequence[str]) -> None:
    options = flags.FLAGS
    folder = Path(options.weights) if options.weights else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"no folder of weights at {folder}")
    if options.seal:
        if folder is None:
            raise UserError("--seal needs --weights=DIR")
        prepare(folder)
    print(f"Python {platform.python_version()}, {devices()}")
    print("\nPackages\n" + "\n".join(packages()))
    print(f"\nWeights{f' in {folder}' if folder else ' (none given: --weights=DIR)'}\n" + "\n".join(of_weights(folder)))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    print(f"\nBrowser for the tests of pages: {browser or 'none (the tests are skipped)'}")
    print("Without any weights: BLEU, ROUGE, CIDEr, rule labels, panels, intervals, comparisons.")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("weights", None, "Folder of weights.")
    flags.DEFINE_bool("seal", False, "Unpack archives and write SHA256SUMS.")


if __name__ == "__main__":
    define_flags()
    errors.run(main)
