"""PyTorch's files: data, or nothing."""

import os
import pickle
import struct
import zipfile

import pytest
import torch

from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.formats.torchfile import is_torch_file, read_torch_file, write_torch_file
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.errors import CheckpointError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def write(path, values, tensors, **options):
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_torch_file(path, values, tensors, specs, **options)
    return path


def test_torch_reads_what_is_written_and_the_other_way_round(tmp_path):
    tensors = {str(dtype): torch.arange(15).to(dtype).reshape(3, 5) for dtype in DTYPES}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "deep": torch.randn(2, 3, 4, 5)}
    values = {"config": {"n": None, "yes": True, "no": False, "one": 1, "less": -300, "big": 2**80, "f": -1e-5,
                         "text": "ü" * 300, "list": [1, [2, "x"], {}], "": []}, "files": {"a": b"bytes", "b": b""}}  # fmt: skip
    path = write(tmp_path / "m.pt", values, tensors, aliases={"again": "deep"})
    assert is_torch_file(path) and zipfile.ZipFile(path).testzip() is None
    for options in ({"mmap": True}, {}):
        read = torch.load(path, weights_only=True, **options)
        assert read["config"] == values["config"] and bytes(read["files"]["a"].tolist()) == b"bytes"
        assert read["files"]["b"].numel() == 0
        model = read["model"]
        assert model["again"].data_ptr() == model["deep"].data_ptr()
        for name, tensor in tensors.items():
            assert torch.equal(model[name], tensor) and model[name].dtype == tensor.dtype
            assert model[name].is_contiguous() and not model[name].requires_grad
    torch.save(read, tmp_path / "theirs.pt")
    assert torch.equal(read_torch_file(tmp_path / "theirs.pt")["model"]["deep"], tensors["deep"])


def test_mapped_tensors_are_aligned(tmp_path):
    path = write(tmp_path / "m.pt", {}, {str(n): torch.ones(n, dtype=torch.bfloat16) for n in range(1, 9)})
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read_torch_file(path)["model"].values())


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["top", "beside", "inside"])
@pytest.mark.parametrize("legacy", [False, True])
def test_payloads_are_never_executed(tmp_path, place, legacy):
    payload = Payload(tmp_path / "executed")
    state = {"lm_head.weight": torch.ones(2)}
    content = {"top": payload, "beside": {"model": state, "extra": payload}, "inside": state | {"x": payload}}[place]
    path = tmp_path / "m.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="a bare pickle, which is never read" if legacy else "which could run code"):
        open_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "the payload is one"


def test_a_bare_pickle_is_never_read(tmp_path):
    (tmp_path / "m.pth").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match="a bare pickle, which is never read"):
        open_checkpoint(tmp_path / "m.pth")
    assert not (tmp_path / "executed").exists()


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, data in members:
            out.writestr(name, data)
    return path


def data_of(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source:
        return [(info.filename, source.read(info)) for info in source.infolist()]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_not_what_they_should_be(tmp_path):
    good, path = data_of(tmp_path), tmp_path / "m.pt"
    assert set(read_torch_file(archive(path, good))) == {"a"}
    cases = [
        (archive, (good, zipfile.ZIP_DEFLATED), "is compressed"),
        (archive, ([*good, good[-1]],), "a name is there twice"),
        (archive, ([*good, ("plain/code/__torch__.py", b"import os")],), "a TorchScript archive, which is code"),
        (archive, ([("readme", b"hello")],), "none of PyTorch's"),
        (archive, ([(name, b"" if "/data/" in name else data) for name, data in good],), "its parts differ in size"),
        (archive, ([entry for entry in good if "/data/" not in entry[0]],), "cannot be read as PyTorch's"),
    ]
    for make, arguments, words in cases:
        path.unlink()
        make(path, *arguments)
        with pytest.raises(CheckpointError, match=words):
            read_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no PyTorch file"):
        read_torch_file(path)


def test_truncation_anywhere(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "m.pt").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut short|no PyTorch file"):
            read_torch_file(tmp_path / "m.pt")


def test_a_description_that_claims_more_than_the_file_holds(tmp_path):
    """2**40 elements over a storage of 2: refused by torch, and no memory is taken."""
    good = data_of(tmp_path)
    lie = [(name, data.replace(b"K\x02", b"\x8a\x06" + (2**40).to_bytes(6, "little")) if name.endswith(".pkl") else data)
           for name, data in good]  # fmt: skip
    assert lie != good
    with pytest.raises(CheckpointError, match="cannot be read as PyTorch's"):
        read_torch_file(archive(tmp_path / "m.pt", lie))


def test_llama2c_widths_that_look_like_a_pickle(tmp_path):
    for width in (128, 640, 896, 1152, 1408, 19280):
        (tmp_path / "m.bin").write_bytes(struct.pack("<7i", width, 1, 1, 1, 1, 1, 1))
        assert not is_torch_file(tmp_path / "m.bin")
