"""Every command of the paper's sweep at its true size, without a weight: published configurations go the way of launch.convert into bases
of shapes, and each training is checked against them as launch.train does before it reads anything."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from configs.sweeps import paper
from data.mimic_cxr.builder import MimicCxr
from launch import sweep
from rad_jax import checkpoint, state, tasks, train
from rad_jax.corpus import WITHOUT
from rad_jax.errors import UserError
from rad_jax.interop import (
    convert,
    foreign_configs,
    hf_clip_vision,
    hf_dinov2,
    hf_llama,
    hf_siglip_vision,
    open_clip,
)
from rad_jax.interop.formats import FORMATS
from rad_jax.lazy import LazyArray
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.vit import VitConfig

# What config.json of each repository on huggingface.co says, as far as it is read.
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}
_LLAMA2 = {
    **_LLAMA,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "vicuna": {**_LLAMA2, "rope_scaling": None},
    "llama2": {**_LLAMA2, "rope_scaling": None},
    "mistral": {
        **_LLAMA,
        "model_type": "mistral",
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "llama3": {
        **_LLAMA,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
}
_DINOV2 = {"model_type": "dinov2", "hidden_size": 768, "image_size": 518, "patch_size": 14, "mlp_ratio": 4}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16}
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "openai_clip": ("clip", {"model_type": "clip", "vision_config": _CLIP}, {}),
    "siglip": (
        "siglip",
        {"model_type": "siglip", "vision_config": _SIGLIP},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "dinov2": ("dinov2", _DINOV2, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
    "rad_dino": ("dinov2", _DINOV2, {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3}),
}
OPEN_CLIP = {"biomedclip": ("vit_base_patch16_224", 224, 16), "biomedclip_cxr": ("vit_base_patch14_dinov2", 518, 14)}
# Pieces of each tokenizer; Llama 2's is Vicuna's.
PIECES = {"vicuna": 32000, "mistral": 32000, "llama3": 128256, "biomedbert": 30522}
ARMS = dict(paper.get_config().arms)


def write_weights(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room: its end is set, and nothing is written there."""
    header: dict[str, Any] = {}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + start)


def published(folder: Path, name: str) -> str:
    """Makes `folder` as it is published, and says which format of launch.convert it has."""
    folder.mkdir()
    config: dict[str, Any] = {}
    preprocessor: dict[str, Any] = {}
    if name in LANGUAGE_MODELS:
        format, config = "hf_llama", LANGUAGE_MODELS[name]
        table = hf_llama.table(foreign_configs.llama(config))
    elif name in OPEN_CLIP:
        trunk, size, patch = OPEN_CLIP[name]
        text = {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "context_length": 256,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
        }
        vision = {"timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear", "image_size": size}
        tower = VitConfig(size, patch, 768, 12, 12, 3072, layer_scale=patch == 14)
        format, table = "open_clip", open_clip.table(ClipConfig(tower, BertConfig(30522, 768, 12, 12, 3072), 512))
        model = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}}
        (folder / "open_clip_config.json").write_text(json.dumps(model))
    else:
        format, config, preprocessor = TOWERS[name]
        table = {
            "clip": lambda: hf_clip_vision.table(foreign_configs.clip_vision(config)),
            "siglip": lambda: hf_siglip_vision.table(foreign_configs.siglip_vision(config)),
            "dinov2": lambda: hf_dinov2.table(foreign_configs.dinov2(config)),
        }[format]()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    write_weights(folder / "model.safetensors", table.shapes())
    return format


def unread(layer: int) -> np.ndarray:
    raise AssertionError(f"layer {layer} is read")


def lazy(shapes: dict[str, tuple[int, ...]], stacked: set[str]) -> dict[str, Any]:
    """A tree of arrays that cannot be read."""
    leaves = {path: LazyArray(shape, np.dtype("float16"), unread, path in stacked) for path, shape in shapes.items()}
    return unflatten_dict(leaves, sep="/")


class Works:
    """What a folder of bases and corpora holds, and the runs that were checked."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._runs: dict[Path, checkpoint.Run] = {}
        for name in PIECES:
            (folder / f"{name}.model").write_text(name)

    def tokenizer(self, name: str) -> Path:
        return self._folder / f"{name}.model"

    def base(self, name: str) -> checkpoint.Run:
        """What launch.convert makes of published weights, up to where it reads them."""
        path = self._folder / "bases" / name
        if path not in self._runs:
            opened = FORMATS[published(self._folder / name, name)](self._folder / name, ())
            plan, _ = convert._planned(opened, None)
            shapes: dict[str, tuple[int, ...]] = {}
            layers: dict[str, int] = {}
            for full, (shape, _) in plan.items():
                leaf, layered, _ = full.partition("[")
                layers[leaf] = layers.get(leaf, 0) + bool(layered)
                shapes[leaf] = tuple(shape)
            shapes = {leaf: (layers[leaf], *shape) if layers[leaf] else shape for leaf, shape in shapes.items()}
            words = {"llama2": "vicuna"}.get(name, name) if name in LANGUAGE_MODELS else None
            variables = lazy(shapes, {leaf for leaf, count in layers.items() if count})
            self._runs[path] = self._run(path, {"model": opened.model}, words, variables)
        return self._runs[path]

    def _run(self, path: Path, config: dict[str, Any], words: str | None, variables: Any) -> checkpoint.Run:
        kept = None
        if words is not None:
            file = self.tokenizer(words)
            kept = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        return checkpoint.Run(path, json.loads(json.dumps(config)), kept, 0, "", variables)

    def check(self, command: tuple[str, ...]) -> None:
        """What launch.train checks before it begins; the run is kept for those that go on from it.

        Raises:
            UserError: as launch.train does.
        """
        options = dict(word.removeprefix("--").split("=", 1) for word in command[1:])
        config = sweep.experiment(command)
        bases = [
            self._runs.get(Path(path)) or self.base(Path(path).name)
            for path in options.get("base", "").split(",")
            if path
        ]
        tasks.adopt(config, bases)
        corpus = Path(options["data"]).name
        size, words = paper.CORPORA["films" if corpus.startswith("films_share") else corpus]
        check_selection(corpus, config.data.selection)
        model = tasks.make_task(config).model.config
        tasks.check_vocabulary(model, PIECES[words], corpus)
        if config.task == "generative":
            checkpoint.check_tokenizer(self.tokenizer(words), bases)
        assert config.model.vision.image_size == size
        shapes = variables_of(config)
        trains, stays = (flatten_dict(tree, sep="/") for tree in state.split(shapes, config.trainable))
        under = state.join(*(run.variables for run in bases))
        taken = train.taken(under, shapes, stays)
        fresh = trains.keys() - taken.keys()
        assert all(path.startswith(("params/projector/", "lora/")) for path in fresh) or config.task == "contrastive"
        own = {path: leaf.shape for path, leaf in trains.items()}
        made = lazy(own, {path for path in own if "/layers/" in path or "/blocks/" in path})
        path = Path(options["workdir"])
        self._runs[path] = self._run(path, config.to_dict(), words, state.join(under, made))


# What says how a model is computed, and not which variables it has; the plainest is traced fastest.
PLAIN = {"attention": "xla", "remat": "none", "rope": "halves", "dtype": "float32", "activation": "gelu"}


def variables_of(config: Any) -> Any:
    """The variables of an experiment as shapes; models with the same ones are traced once."""
    model = config.model.to_dict()
    for part in {"vision", "text", "llm"} & set(model):
        kept = {name: PLAIN.get(name, value) for name, value in model[part].items() if not name.startswith("pixel_")}
        model[part] = kept
    return _shapes(config.task, json.dumps(model, sort_keys=True))


@functools.cache
def _shapes(task: str, model: str) -> Any:
    config = common.experiment(task, json.loads(model), (), {}, steps=1, batch_size=1)
    return nn.unbox(jax.eval_shape(tasks.make_task(config).init, jax.random.key(0)))


def check_selection(corpus: str, selection: str) -> None:
    """Raises AssertionError where a corpus has no such selection."""
    if corpus.startswith("pairs") or "share" in corpus:
        assert selection == "all"  # all that a mixture has
        return
    name, _, method = selection.removesuffix(WITHOUT).partition(".")
    assert name in MimicCxr.selections and method in ("", "rule-based", "gpt4")


def plan_of(config: Any, folder: Path) -> sweep.Plan:
    corpora = {name: folder / name for name in paper.CORPORA}
    return sweep.plan(config, folder / "out", folder / "bases", corpora)


@pytest.mark.slow
def test_every_command_of_every_arm_can_start(tmp_path):
    """And what it writes findings of has the size and the tokenizer of its last stage."""
    works, config = Works(tmp_path), paper.get_config()
    config.seeds = (0,)  # the commands of other seeds differ in nothing else
    found = plan_of(config, tmp_path)
    checked = 0
    for step in found.steps:
        options = dict(word.removeprefix("--").split("=", 1) for word in step.command[1:])
        if step.command[0] == "launch.train":
            works.check(step.command)
            checked += 1
        elif step.command[0] == "launch.generate":
            run, (size, words) = works._runs[Path(options["checkpoint"])], paper.CORPORA[Path(options["data"]).name]
            check_selection("films", options["selection"])
            assert run.config["model"]["vision"]["image_size"] == size
            assert run.tokenizer is not None and run.tokenizer["file"] == works.tokenizer(words).name
    assert len(config.arms) >= 20 and checked == 4 + 18 + len(config.arms)  # stages 1, 2 and 3
    # Activation and statistics, of which the config says nothing, are the tower's own.
    clip = next(run for run in works._runs.values() if run.config["model"].get("vision", {}).get("width") == 1024)
    assert clip.config["model"]["vision"]["activation"] == "quick_gelu"


@pytest.mark.parametrize(
    ("arm", "part", "refused"),
    [
        ("tower: openai_clip", "stage2", "has vision.depth = 24 but the config says 12"),
        ("tower: biomedclip", "stage2", "has vision.image_size = 224 but the config says 518"),
        ("tower: siglip", "stage2", "has vision.image_size = 384 but the config says 518"),
        ("language model: llama3", "stage2", "has llm.kv_heads = 8 but the config says 32"),
        ("language model: mistral", "data", "mistral learned with: pack the corpus again"),
        ("tower: biomedclip continued", "stage1", "has vision.image_size = 224 but the config says 518"),
    ],
)
def test_what_an_arm_changes_is_needed(tmp_path, arm, part, refused):
    """A base alone is refused, by its shapes or by its tokenizer."""
    works, config = Works(tmp_path), paper.get_config()
    changes = {**ARMS[arm], part: {} if part == "data" else ()}
    with config.unlocked():
        config.arms = (("recipe", {}), (arm, changes))
    titles = (arm, "recipe, seed 0, stage1")  # where an arm goes on from the recipe's tower
    commands = [step.command for step in plan_of(config, tmp_path).steps if step.title.startswith(titles)]
    with pytest.raises(UserError, match=refused):
        list(map(works.check, commands))


def test_missing_corpora_are_all_named(tmp_path):
    with pytest.raises(
        UserError, match=r"--corpora lacks films=FOLDER, packed with --image_size=518 .* pairs_224=FOLDER"
    ):
        sweep.plan(paper.get_config(), tmp_path, tmp_path, {})


def test_missing_bases_are_all_named(tmp_path):
    (tmp_path / "bases" / "vicuna").mkdir(parents=True)
    (tmp_path / "bases" / "vicuna" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not there: .*bases/biomedclip, .*films_llama3") as error:
        sweep.check_given(plan_of(paper.get_config(), tmp_path))
    assert "bases/vicuna" not in str(error.value)
