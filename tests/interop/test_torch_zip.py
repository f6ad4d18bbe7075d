"""torch's own files, read and written without torch: what torch.save writes, and what it never would."""

import argparse
import collections
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from rad_jax.errors import UserError
from rad_jax.interop import torch_zip

PLAIN = {"epoch": 3, "name": "ViT", "none": None, "list": [1.5, (2, True)], "big": 2**40}


def same(found, expected):
    """Equal to a torch tensor: shape, dtype and bits."""
    import torch

    bits = expected.detach().contiguous()
    if bits.dtype == torch.bfloat16:
        assert found.dtype == ml_dtypes.bfloat16
        found, bits = found.view(np.uint16), bits.view(torch.uint16)
    assert found.dtype == bits.numpy().dtype
    np.testing.assert_array_equal(found, bits.numpy())


def program_of(tensor: tuple, storage: tuple = ("storage", "FloatStorage", "0", "cpu", 4)) -> bytes:
    """A pickle with one tensor `x` and whatever arguments: storage offset, shape, strides."""

    def plain(value):
        return pickle.dumps(value, 2)[2:-1]

    reference = b"(" + plain(storage[0]) + b"ctorch\n" + storage[1].encode() + b"\n" + b"".join(map(plain, storage[2:]))
    arguments = b"".join(map(plain, (*tensor, False, None)))
    return b"\x80\2}" + plain("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"tQ" + arguments + b"tRs."


def packed(path, program: bytes, data: bytes = bytes(16), compression: int = zipfile.ZIP_STORED):
    """A file as torch.save makes them, around any pickle and with one storage."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", data)
    return path


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6) / 7
    dtypes = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
    saved = {name: base.to(getattr(torch, name)) for name in dtypes}
    saved |= {
        "transposed": base.T,
        "rows": base[1:3],
        "every other": base[::2, 1::3],
        "repeated": base[:1].expand(3, 6),
    }
    saved |= {"parameter": torch.nn.Parameter(base.clone()), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    saved |= {"bfloat16 view": saved["bfloat16"].T[2:]}
    torch.save(saved, tmp_path / "x.bin")
    found = torch_zip.read(tmp_path / "x.bin")
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        same(found[name], tensor)
        assert not found[name].flags.owndata and not found[name].flags.writeable


def test_modules_and_training_checkpoints_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    state = collections.OrderedDict((f"module.{name}", tensor) for name, tensor in model.state_dict().items())
    numbers = {"best": np.float64(0.25), "step": np.int64(7), "dtype": torch.bfloat16, "size": torch.Size([2, 3])}
    device = {"device": torch.device("cuda", 1)}
    torch.save(
        PLAIN | {"state_dict": state, "optimizer": optimizer.state_dict(), **numbers, **device}, tmp_path / "x.pt"
    )
    found = torch_zip.read(tmp_path / "x.pt")
    assert {key: found[key] for key in PLAIN} == PLAIN
    assert [found[key] for key in (*numbers, *device)] == [0.25, 7, "bfloat16", (2, 3), "cuda:1"]
    assert list(found["state_dict"]) == list(state)
    for name, tensor in state.items():
        same(found["state_dict"][name], tensor)
    for index, moments in optimizer.state_dict()["state"].items():
        for key, tensor in moments.items():
            same(found["optimizer"]["state"][index][key], tensor)


def test_tied_tensors_share_memory(tmp_path):
    torch = pytest.importorskip("torch")
    table = torch.ones(4, 3)
    torch.save({"embed": table, "head": table}, tmp_path / "x.bin")
    found = torch_zip.read(tmp_path / "x.bin")
    assert np.shares_memory(found["embed"], found["head"])


class Attack:
    """What a pickle can do to whoever loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["top", "optimizer"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, where):
    torch = pytest.importorskip("torch")
    attack = Attack(tmp_path / "marker")
    saved = {"top": attack, "optimizer": {"w": torch.ones(2), "optimizer": {"state": {0: [attack]}}}}
    torch.save(saved[where], tmp_path / "x.bin")
    with pytest.raises(UserError, match=rf"x\.bin was refused: it asks for {os.name}\.system"):
        torch_zip.read(tmp_path / "x.bin")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "x.bin", weights_only=False)  # the attack is a real one
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("harmless", "named"),
    [(argparse.Namespace(lr=1), "argparse.Namespace"), (np.ones(2), "_reconstruct"), (bytearray(1), "bytearray")],
)  # fmt: skip
def test_what_is_no_plain_value_is_refused_by_name(tmp_path, harmless, named):
    packed(tmp_path / "x.bin", pickle.dumps({"args": harmless}, 2))
    with pytest.raises(UserError, match=f"asks for .*{named}"):
        torch_zip.read(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "hostile",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb.",  # BUILD with a dict sets attributes
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\0\0\0_pathK\1s\x86b.",  # BUILD with a pair sets slots
        b"cnumpy\ndtype\n(X\1\0\0\0O\x89\x88tR.",  # scalars that are Python objects
        b"ctorch\nFloatStorage\n)R.",  # calling a type
        program_of((0, (2, 2), (2, 1)))[:-3],
        b"",
    ],
)
def test_a_pickle_that_no_torch_wrote_is_refused(tmp_path, hostile):
    packed(tmp_path / "x.bin", hostile)
    with pytest.raises(UserError, match="truncated or damaged"):
        torch_zip.read(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "tensor",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (2**62, (2,), (2**62,)),
        (0, (1.0,), (1,)),
        (0, (2**40, 2**40), (0, 0)),
    ],
)
def test_a_tensor_cannot_reach_out_of_its_storage(tmp_path, tensor):
    packed(tmp_path / "good.bin", program_of((1, (2,), (2,))), struct.pack("<4f", 0, 1, 2, 3))
    assert torch_zip.read(tmp_path / "good.bin")["x"].tolist() == [1, 3]
    packed(tmp_path / "x.bin", program_of(tensor))
    with pytest.raises(UserError, match=r"x\.bin is truncated or damaged"):
        torch_zip.read(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        (("storage", "FloatStorage", "0", "cpu", 5), "has 16 bytes for 5 numbers"),
        (("storage", "HalfStorage", "0", "cpu", 4), "has 16 bytes for 4 numbers"),
        (("storage", "FloatStorage", "1", "cpu", 4), "'1' is missing"),
        (("storage", "ComplexFloatStorage", "0", "cpu", 2), "asks for torch.ComplexFloatStorage"),
    ],
)
def test_a_storage_is_what_the_pickle_says(tmp_path, storage, reason):
    packed(tmp_path / "x.bin", program_of((0, (1,), (1,)), storage))
    with pytest.raises(UserError, match=reason):
        torch_zip.read(tmp_path / "x.bin")


def test_truncated_and_compressed_files_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(1000)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    cases = {"half": whole[: len(whole) // 2], "end": whole[:-1], "empty": b"", "noise": b"\1" * 99, "zip": b""}
    for name, content in cases.items():
        (tmp_path / f"{name}.bin").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    packed(tmp_path / "deflated.bin", program_of((0, (1,), (1,))), compression=zipfile.ZIP_DEFLATED)
    expected = {
        "half": "truncated or damaged .* download it again",
        "end": "truncated or damaged",
        "empty": "is empty",
        "noise": "no file that torch.save writes: .* save it again with torch.save or as safetensors",
        "zip": "none that torch.save wrote",
        "deflated": "is compressed",
    }
    for name, reason in expected.items():
        with pytest.raises(UserError, match=rf"{name}\.bin.*{reason}"):
            torch_zip.read(tmp_path / f"{name}.bin")


def test_a_member_that_ends_after_the_file_is_refused(tmp_path):
    packed(tmp_path / "x.bin", program_of((0, (4,), (1,))))
    data = bytearray((tmp_path / "x.bin").read_bytes())
    entry = data.rindex(b"PK\1\2")  # of the storage in the list of contents: both sizes, 20 bytes on
    data[entry + 20 : entry + 28] = struct.pack("<II", 10**6, 10**6)
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(UserError, match="data/0 ends after the file"):
        torch_zip.read(tmp_path / "x.bin")


def made() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dtypes = map(np.dtype, torch_zip.DTYPES)
    values = {f"x.{dtype.name}": (9 * rng.normal(size=(3, 5))).astype(dtype) for dtype in dtypes}
    odd: dict[str, np.ndarray] = {
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float16),
        "é": rng.random((2, 3, 4)).T,
    }
    return values | odd


@pytest.mark.parametrize("under", [None, "state_dict"])
@pytest.mark.parametrize("zip64_bytes", [torch_zip.ZIP64_BYTES, 0])
def test_torch_loads_what_is_written(tmp_path, monkeypatch, under, zip64_bytes):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch_zip, "ZIP64_BYTES", zip64_bytes)
    tensors, path = made(), tmp_path / "x.bin"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    digest = torch_zip.write(path, shapes, iter(tensors.items()), dtypes, under)
    again = torch_zip.write(tmp_path / "y.bin", shapes, iter(tensors.items()), dtypes, under)
    assert digest == again and path.read_bytes() == (tmp_path / "y.bin").read_bytes()
    for options in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
        loaded = torch.load(path, **options)
        loaded = loaded if under is None else loaded[under]
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            same(tensor, loaded[name])
            assert loaded[name].is_contiguous()
    found = torch_zip.read(path)
    found = found if under is None else found[under]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert found[name].ctypes.data % torch_zip.ALIGNMENT == 0 or not found[name].size


def test_writing_casts_and_refuses_what_does_not_fit(tmp_path):
    values = np.array([1.0, 70000.0])
    shapes, path = {"w": (2,)}, tmp_path / "x.bin"
    torch_zip.write(path, shapes, iter([("w", values)]), {"w": "bfloat16"})
    assert torch_zip.read(path)["w"].tolist() == [1.0, 70144.0]
    with pytest.raises(UserError, match="w has values that are not finite in float16"):
        torch_zip.write(path, shapes, iter([("w", values)]), {"w": "float16"})
