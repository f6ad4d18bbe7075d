"""Files in the format of torch before 1.6, as today's torch still writes them when asked to."""

import collections
import os

import numpy as np
import pytest

from rad_jax.errors import UserError
from rad_jax.interop import sources, torch_legacy

torch = pytest.importorskip("torch")
TYPES = ["float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


def save(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.arange(24.0).reshape(4, 6) / 7
    saved = {name: base.to(getattr(torch, name)) for name in TYPES}
    saved |= {"transposed": base.T, "part": base[1:3, ::2], "shared": base, "none": base[:0], "one": torch.tensor(3.5)}
    saved["parameter"] = torch.nn.Parameter(base + 1)
    path = save(tmp_path / "m.pth", {"epoch": 3, "model_state_dict": collections.OrderedDict(saved)})
    assert torch_legacy.begins(path)
    found = torch_legacy.read(path)
    assert found["epoch"] == 3
    for name, tensor in saved.items():
        expected = tensor.detach().numpy()
        assert found["model_state_dict"][name].dtype == expected.dtype, name
        np.testing.assert_array_equal(found["model_state_dict"][name], expected, err_msg=name)
    np.testing.assert_array_equal(sources.open_source(path)["part"], base[1:3, ::2].numpy())


def test_new_files_are_not_taken_for_old_ones(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "new.pth")
    assert not torch_legacy.begins(tmp_path / "new.pth")
    assert not torch_legacy.begins(tmp_path / "nothing.pth")
    np.testing.assert_array_equal(sources.open_source(tmp_path / "new.pth")["w"], np.ones(3))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_no_code_is_run(tmp_path, monkeypatch):
    path = save(tmp_path / "m.pth", {"w": torch.ones(2), "x": Hostile()})
    ran: list[str] = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(UserError, match=r"asks for (posix|nt|os)\.system"):
        torch_legacy.read(path)
    assert ran == []


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = save(tmp_path / "m.pth", {"a": torch.ones(3), "b": torch.zeros(2, 2)}).read_bytes()
    cut = tmp_path / "cut.pth"
    for end in range(16, len(whole)):
        cut.write_bytes(whole[:end])
        with pytest.raises(UserError, match="truncated or damaged"):
            torch_legacy.read(cut)


def test_sizes_that_disagree_are_refused(tmp_path):
    path = save(tmp_path / "m.pth", {"a": torch.ones(3)})
    whole = bytearray(path.read_bytes())
    at = len(whole) - 12 - 8
    assert whole[at] == 3
    whole[at] = 2
    path.write_bytes(whole)
    with pytest.raises(UserError, match="has 2 numbers instead of 3"):
        torch_legacy.read(path)
