"""Weights as they lie on disk: one file or many, whole or half-downloaded."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rad_jax.errors import UserError
from rad_jax.interop import sources, torch_zip

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "a.bias": RNG.normal(size=4).astype(ml_dtypes.bfloat16),
    "b.weight": RNG.normal(size=(2, 2)).astype(np.float16),
    "b.steps": np.array(7),
    "b.mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


def save_torch(path, tensors, under=None):
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    torch_zip.write(path, shapes, iter(tensors.items()), dtypes, under)


def save(path, tensors=TENSORS):
    save_file(tensors, path) if path.suffix == ".safetensors" else save_torch(path, tensors)


def save_shards(folder, suffix):
    """Two shards and an index, as transformers writes them."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-0000{1 + (name[0] == 'b')}-of-00002{suffix}" for name in TENSORS}
    for file in set(weight_map.values()):
        save(folder / file, {name: TENSORS[name] for name in TENSORS if weight_map[name] == file})
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def check(source, expected=TENSORS):
    assert set(source) == set(expected) and len(source) == len(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tensor.shape and source.dtype(name) == tensor.dtype == source[name].dtype
        np.testing.assert_array_equal(source[name], tensor)
        assert not source[name].flags.owndata


@pytest.mark.parametrize("file", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
def test_one_file(tmp_path, file):
    save(tmp_path / file)
    source = sources.open_source(tmp_path / file)
    check(source)
    assert source.path == tmp_path / file and source.files == (tmp_path / file,)
    with pytest.raises(ValueError, match="read-only"):
        source["a.weight"][0, 0] = 1


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path, suffix):
    index = save_shards(tmp_path, suffix)
    shards = sorted(path for path in tmp_path.iterdir() if path != index)
    for path in (tmp_path, index):
        source = sources.open_source(path)
        check(source)
        assert source.path == path and source.files == (index, *shards)


def test_what_torch_and_safetensors_themselves_write(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch_tensors

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "iteration": 3}, tmp_path / "model.pt")
    torch.save(
        {"epoch": 1, "name": "run", "state_dict": parallel, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt"
    )
    save_torch_tensors(state, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    expected = {name: tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) for name, tensor in state.items()}
    for file in ("plain.pt", "model.pt", "plain.safetensors"):
        check(sources.open_source(tmp_path / file), expected)
    source = sources.open_source(tmp_path / "run.pt")
    assert set(source) == set(parallel)
    check(source.renamed(lambda name: name.removeprefix("module.")), expected)


def test_a_folder_is_searched_in_order(tmp_path):
    for number, name in enumerate(reversed(sources.NAMES)):
        if not name.endswith(sources.INDEX):
            save(tmp_path / name, {"w": np.full(1, number, np.float32)})
            assert sources.open_source(tmp_path)["w"] == number
    named = ("absent.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
    assert sources.open_source(tmp_path, named).files == (tmp_path / "open_clip_pytorch_model.bin",)
    with pytest.raises(UserError, match=r"has no weights: there should be absent\.safetensors;"):
        sources.open_source(tmp_path, named[:1])


def test_the_only_safetensors_file_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"has no weights: there should be model\.safetensors\.index\.json or "):
        sources.open_source(tmp_path)
    save(tmp_path / "lora.safetensors")
    check(sources.open_source(tmp_path))
    save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"has 2 safetensors files and no model\.safetensors\.index\.json"):
        sources.open_source(tmp_path)


def test_missing_shards_are_listed_with_what_a_download_left(tmp_path):
    save_shards(tmp_path, ".safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors.part")
    hidden = tmp_path / ".cache/huggingface/download"
    hidden.mkdir(parents=True)
    (hidden / "abc.incomplete").touch()
    with pytest.raises(UserError) as error:
        sources.open_source(tmp_path)
    assert "lacks 1 of the 2 files in model.safetensors.index.json: model-00002-of-00002.safetensors;" in str(
        error.value
    )
    assert "unfinished downloads: abc.incomplete, model-00002-of-00002.safetensors.part" in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_and_its_shards_must_agree(tmp_path, suffix):
    index = save_shards(tmp_path, suffix)
    content = json.loads(index.read_text())
    shard = content["weight_map"]["a.weight"]
    for change, reason in (({"new": shard}, "lacks new"), ({"a.weight": None}, "has beyond its index a.weight")):
        weight_map = {name: file for name, file in (content["weight_map"] | change).items() if file}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=reason):
            sources.open_source(tmp_path)
    for wrong in (None, {}, {"w": 3}, {"w": f"../{shard}"}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UserError, match="has no weight_map from tensors to files beside it"):
            sources.open_source(tmp_path)


@pytest.mark.parametrize("file", ["x.safetensors", "x.bin"])
def test_truncated_files_are_refused(tmp_path, file):
    save(tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 5):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.\w+ is truncated.*download it again"):
            sources.open_source(tmp_path / file)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a git-lfs pointer .*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Log in</html>", "a web page"),
        (b"", "empty"),
    ],
)
def test_placeholders_are_named(tmp_path, file, content, reason):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is {reason}"):
        sources.open_source(tmp_path)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 4 bytes for shape"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "has shape"),
        ({"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}, "has shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "bytes -8 to 0"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "ends 8 bytes after the file"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "dtype F8_E4M3, which is not read here"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "header cannot be read"),
        ({"dtype": "F32"}, "header cannot be read"),
        (3, "header cannot be read"),
    ],
)
def test_a_safetensors_header_cannot_reach_out_of_its_file(tmp_path, entry, reason):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=reason):
        sources.open_source(tmp_path / "x.safetensors")


def test_files_without_weights_are_refused(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    save_torch(tmp_path / "x.bin", {}, under="state_dict")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF")
    expected = {
        "x.safetensors": "holds no tensors",
        "x.bin": "holds no tensors",
        "x.h5": "weights are read from",
        "absent.bin": "no such file",
    }
    for file, reason in expected.items():
        with pytest.raises(UserError, match=f"{file}:? {reason}"):
            sources.open_source(tmp_path / file)


def test_a_list_of_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds a list instead of a dict of tensors"):
        sources.open_source(tmp_path / "x.pt")


def test_renaming_drops_and_never_merges(tmp_path):
    save(tmp_path / "x.bin")
    source = sources.open_source(tmp_path / "x.bin")
    renamed = source.renamed(lambda name: name.removeprefix("a.") if name.startswith("a.") else None)
    check(renamed, {"weight": TENSORS["a.weight"], "bias": TENSORS["a.bias"]})
    assert (renamed.path, renamed.files) == (source.path, source.files)
    with pytest.raises(UserError, match=r"a\.weight and b\.weight both stand for weight"):
        source.renamed(lambda name: name.partition(".")[2])


def test_json_files_and_hashes(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        sources.read_json(file)
    for content, reason in (("{", "is not JSON"), ("[1]", "holds a JSON list"), ("\xff", "is not JSON")):
        file.write_text(content, encoding="latin1")
        with pytest.raises(UserError, match=rf"config\.json {reason}"):
            sources.read_json(file)
    file.write_text('{"a": 1}')
    assert sources.read_json(file) == {"a": 1}
    assert sources.sha256(file) == hashlib.sha256(b'{"a": 1}').hexdigest()
