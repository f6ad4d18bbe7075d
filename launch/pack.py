r"""Packs a corpus: images and reports in, ArrayRecord shards out, ready for launch.train.

The phantom, drawn chest radiographs with known findings (PHANTOM_SEED=n gives another corpus):

  python -m launch.pack --dataset=phantom --image_size=112 --out=out/phantom

Your own data, a folder with images and one CSV (columns image, findings; optional indication, impression, patient,
view, sex, age, split, id, source; image paths are relative to the CSV; PNG, JPEG or DICOM, whose grey values --dicom=mimic_cxr_jpg spreads and
equalises as MIMIC-CXR-JPG was made, for films that join that corpus):

  python -m launch.pack --dataset=folder --source=my/films --out=out/films

A published corpus, laid out as its publisher does; the text at the top of data/NAME/builder.py says where it comes from and which files it
needs. A folder that is not one is refused with the name of the file that is missing:

  python -m launch.pack --dataset=openi --source=openi --out=out/openi
  python -m launch.pack --dataset=mimic_cxr --source=mimic --tokenizer=tokenizer.model --out=out/mimic_cxr

Several packed corpora as one, as configs/mixture.py says; their films stay where they are:

  python -m launch.pack --dataset=mixture --recipe=configs/mixture.py:openi,mimic_cxr --source=out --out=out/pairs

Reports that launch.structure has rewritten are packed as further texts of their films (method llm; selections all.llm and so on):

  python -m launch.pack --dataset=openi --source=openi --structured=out/openi.structured.jsonl --out=out/openi

No patient is in two splits: what would put one there, a table or a column split, is refused before a film is read.

One film may have several texts. Packing writes an index of each selection of them ("all", "frontal", "pairs", and the corpus's own; they are in
OUT/corpus.json), and --config.data.selection names the one to train on. Rows without findings and images that cannot be read are left out, counted, and listed in OUT/skipped.csv. A tokenizer
is trained on the training reports unless one is given.

Images are packed in shards of up to 1,024. A command that was stopped goes on with the shards that are missing when it is given again, and
does nothing once the corpus is there; nothing half-written is ever found. OUT/shards.json has a checksum of every shard.

Films that are missing or cannot be decoded are bad rows: more than a twentieth of them end the packing, which --bad_rows=0.001 makes a
thousandth, and --bad_rows=1, for a part of a corpus, as many as there are. The share is of at least 100 films, so that up to five never end
it, and shards that lack none of their films stay for the next run. What is left out by a rule (no findings, no label, another part of the
body) is no bad row.

On a cluster, Apache Beam does the packing (pip install apache-beam, in an environment of its own because of its older protobuf). Every worker must
see --source and --out under the same paths, and have this checkout on its path. Tried with the first line only:

  python -m launch.pack --dataset=mimic_cxr --source=mimic --out=out/mimic_cxr --beam_pipeline_options=runner=DirectRunner,direct_num_workers=8,direct_running_mode=multi_processing
  ... --beam_pipeline_options=runner=DataflowRunner,project=P,region=R,temp_location=gs://B/tmp,sdk_container_image=IMAGE,sdk_location=container
  ... --beam_pipeline_options=runner=FlinkRunner,flink_master=HOST:8081,environment_type=DOCKER,environment_config=IMAGE,parallelism=64
  ... --beam_pipeline_options=runner=SparkRunner,spark_master_url=spark://HOST:7077,environment_type=DOCKER,environment_config=IMAGE
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from data.corpora import CORPORA
from rad_jax import errors, images
from rad_jax.errors import UserError

_DATASET = flags.DEFINE_enum("dataset", None, [*CORPORA, "mixture"], "What to pack.", required=True)
_SOURCE = flags.DEFINE_string("source", None, "Folder that holds the corpus; for the data set folder, the CSV will do.")
_RECIPE = config_flags.DEFINE_config_file("recipe", None, "Members of the data set mixture, as configs/mixture.py.")
_OUT = flags.DEFINE_string("out", None, "Corpus folder to write.", required=True)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 518, "Short side of the stored images, in pixels.")
_STUDIES = flags.DEFINE_integer("studies", 4600, "Phantom studies, about 87 % train, 4 % validation, 9 % test.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json, tokenizer.model or vocab.txt to use as it is.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 1024, "Pieces of the tokenizer trained when none is given.")
_STRUCTURED = flags.DEFINE_string("structured", None, "Reports that launch.structure has rewritten.")
_DICOM = flags.DEFINE_enum(
    "dicom",
    "window",
    images.DICOM_STYLES,
    "Grey values of DICOM films: as the file says, or as MIMIC-CXR-JPG was made.",
)
_BAD_ROWS = flags.DEFINE_float(
    "bad_rows",
    0.05,
    "Share of the films that may be missing or damaged; 1 packs what there is.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_BEAM = flags.DEFINE_list(
    "beam_pipeline_options",
    None,
    "Pack on Apache Beam: its options as name=value,name=value, as `tfds build` takes them.",
)
_WORKERS = flags.DEFINE_integer("workers", None, "Processes; default: one per CPU core.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    out = Path(_OUT.value)
    if (_DATASET.value == "mixture") != (_RECIPE.value is not None):
        raise UserError("--dataset=mixture and --recipe belong together: give both, or neither.")
    if _RECIPE.value is not None:
        pack_mixture(out)
        return
    # Imported here, so that --help and the worker processes stay quick.
    from data import packing
    from data.phantom.builder import seed_from_environment

    arguments = packing.Arguments(
        dataset=_DATASET.value,
        source=_SOURCE.value,
        image_size=_IMAGE_SIZE.value,
        studies=_STUDIES.value,
        seed=seed_from_environment(),
        tokenizer=_TOKENIZER.value,
        vocab_size=_VOCAB_SIZE.value,
        structured=_STRUCTURED.value,
        dicom=_DICOM.value,
    )
    beam = [f"--{option}" for option in _BEAM.value] if _BEAM.value else None
    workers = _WORKERS.value or os.cpu_count() or 1
    manifest, packed = packing.pack(arguments, out, workers, bad_rows=_BAD_ROWS.value, beam=beam)
    if not packed:
        print(f"{out}: already packed with these arguments, nothing to do")
    summary = manifest["summary"]
    splits = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    print(f"{out}: read {summary['read']}, written {summary['written']} ({splits})", end="")
    skipped = ", ".join(f"{count} {reason}" for reason, count in summary["skipped"].items())
    print(
        f", skipped {sum(summary['skipped'].values())}"
        + (f" ({skipped}), see {out / 'skipped.csv'}" if skipped else "")
    )
    patients = ", ".join(f"{count} {split}" for split, count in summary.get("patients", {}).items())
    print(f"  patients, none in two splits: {patients or 'not counted'}")
    print("  views: " + ", ".join(f"{count} {view}" for view, count in summary["views"].items()))
    for name, count in summary["counts"].items():
        print(f"  {name}: {count}")
    for line in sizes(manifest):
        print(f"  {line}")
    for name, what in (("duplicate_images", "equal images"), ("near_duplicates", "images that look alike")):
        if copies := {where: count for where, count in summary[name].items() if count}:
            print(f"  {what} " + ", ".join(f"{where}: {count}" for where, count in copies.items()))
    for name, of_split in manifest["published"].items():
        for split, found in of_split.items():
            same = found["rows"] == found["published"]
            told = (
                "as published"
                if same
                else f"warning: {found['published']} are published, so this is not the whole corpus"
            )
            print(f"  {name}, {split}: {found['rows']} rows, {told}")


def sizes(manifest: dict[str, Any]) -> list[str]:
    """What a film takes on disk, and a pair: a film may have several texts, so a selection may have more pairs than there are films."""
    found, size = [], manifest["summary"]["bytes"]
    if films := manifest["summary"]["written"]:
        each = size / films
        found.append(f"{each / 1e3:.1f} kB for each film; 697,000 films would take {697_000 * each / 1e9:.0f} GB")
    rows = {
        name: sum(index["rows"] for index in selection["splits"].values())
        for name, selection in manifest["selections"].items()
    }
    name = max(rows, key=lambda name: rows[name])
    if rows[name]:
        each = size / rows[name]
        found.append(
            f"{each:,.0f} bytes for each of the {rows[name]:,} pairs of the largest selection, {name}; "
            f"697,000 such pairs would take {697_000 * each / 1e9:.0f} GB"
        )
    return found


def pack_mixture(out: Path) -> None:
    """Packs --recipe into `out` and prints what of each member is in it."""
    from data import mixture

    if not _SOURCE.value:
        raise UserError("--source is missing: the folder that holds the packed corpora which --recipe names.")
    manifest, packed = mixture.pack(_RECIPE.value.members.to_dict(), Path(_SOURCE.value), out, _RECIPE.value.seed)
    if not packed:
        print(f"{out}: already packed with these arguments, nothing to do")
    for member in manifest["members"]:
        rows = ", ".join(f"{count} {split}" for split, count in member["rows"].items())
        leaked = member[mixture.LEAKED]
        print(f"  {member['name']}: {rows}" + (f"; {leaked} train rows left out, {mixture.LEAKED}" if leaked else ""))
    print(f"{out}: " + ", ".join(f"{count} {split}" for split, count in manifest["splits"].items()))


if __name__ == "__main__":
    errors.run(main)
