"""Every corpus by the name that --dataset gives it. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from rad_jax.errors import UserError

CORPORA = {
    "phantom": "data.phantom.builder:Phantom",
    "folder": "data.folder.builder:Folder",
    "openi": "data.openi.builder:OpenI",
    "mimic_cxr": "data.mimic_cxr.builder:MimicCxr",
    "mimic_cxr_reports": "data.mimic_cxr.builder:MimicCxrReports",
    "mimic_cxr_reports_corrected": "data.mimic_cxr.builder:MimicCxrReportsCorrected",
    "chexpert": "data.chexpert.builder:CheXpert",
    "chexpert_plus": "data.chexpert.builder:CheXpertPlus",
    "padchest": "data.padchest.builder:PadChest",
    "brax": "data.brax.builder:Brax",
    "candid_ptx": "data.candid_ptx.builder:CandidPtx",
    "vindr_cxr": "data.vindr_cxr.builder:VinDrCxr",
    "object_cxr": "data.object_cxr.builder:ObjectCxr",
    "chestxray14": "data.chestxray14.builder:ChestXray14",
}


def builder_class(name: str) -> Any:
    """The TFDS builder of a corpus.

    Raises:
        UserError: there is no corpus of this name.
    """
    if name not in CORPORA:
        raise UserError(f"--dataset={name}: unknown data set: use one of {', '.join(CORPORA)}.")
    module, _, attribute = CORPORA[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
