import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcore.checkpoint import tensorfile
from mmcore.checkpoint.tensorfile import TensorSpec, find_tensors, is_finite, lazy_tensors, read_header, write_tensors
from mmcore.errors import CheckpointError

MIXED = {
    "half": torch.arange(3, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "double": torch.randn(2, 3, dtype=torch.float64),
    "brain": torch.randn(7).bfloat16(),
    "single": torch.randn(4, 1, 2),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "strided": torch.randn(6, 4).t(),
}


def specs(tensors):
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path, "model", MIXED, specs(MIXED))
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor)


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"a": "b"})
    files = find_tensors(tmp_path, "model")
    ours = lazy_tensors(files, list(tensors), tmp_path)
    assert files.specs == specs(tensors)
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


def test_shards_are_cut_at_the_limit_and_found_again(tmp_path):
    tensors = {f"t{i}": torch.randn(10, i + 1) for i in range(8)}
    records = write_tensors(tmp_path, "model", tensors, specs(tensors), limit=700)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    for shard in shards:
        assert sum(spec.nbytes for spec in read_header(tmp_path / shard).values()) <= 700
    assert set(records) == {*shards, "model.safetensors.index.json"}
    files = find_tensors(tmp_path, "model")
    assert files.problems == []
    ours = lazy_tensors(files, list(tensors), tmp_path)
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_beyond_the_limit_has_its_own_shard():
    plan = tensorfile.plan_shards({name: TensorSpec(torch.float32, (size,)) for name, size in
                                   {"a": 1, "big": 100, "b": 1, "c": 1}.items()}, limit=40)  # fmt: skip
    assert plan == [["a"], ["big"], ["b", "c"]]


def test_tensors_are_fetched_one_at_a_time(tmp_path):
    """Streaming: the mapping hands out each tensor once, and holds none."""
    asked = []

    class Once(dict):
        def __getitem__(self, name):
            asked.append(name)
            return torch.full((3,), float(len(asked)))

    shape = {name: TensorSpec(torch.float32, (3,)) for name in "abc"}
    write_tensors(tmp_path, "model", Once(), shape)
    assert asked == ["a", "b", "c"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_is_seen_anywhere(bad, dtype):
    for size in (1, 7, 1000):
        tensor = torch.zeros(size, dtype=dtype)
        assert is_finite(tensor)
        for place in (0, size // 2, size - 1):
            broken = tensor.clone()
            broken[place] = bad
            assert not is_finite(broken)
    assert is_finite(torch.zeros(0)) and is_finite(torch.tensor([1])) and is_finite(torch.tensor([True]))


def test_overflow_in_a_narrow_dtype_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="tensor w overflows in float16: choose bfloat16"):
        write_tensors(tmp_path, "model", {"w": torch.tensor([1e6])}, {"w": TensorSpec(torch.float16, (1,))})


HEADERS = {
    "overlap": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}},
    "hole": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
             "b": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]}},
    "short": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
    "beyond": {"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}},
    "wrong size": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 3]}},
    "dtype": {"a": {"dtype": "C64", "shape": [3], "data_offsets": [0, 3]}},
    "negative": {"a": {"dtype": "U8", "shape": [-3, -1], "data_offsets": [0, 3]}},
    "boolean": {"a": {"dtype": "U8", "shape": [True, 3], "data_offsets": [0, 3]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [3]}},
    "list": [1],
    "name twice": b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
                  b'"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' * 50_000,
    "huge number": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,3]}}',
    "infinite": b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,3]}}',
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_bad_headers_are_refused(tmp_path, header):
    path = write_raw(tmp_path / "model.safetensors", header, b"xyz")
    with pytest.raises(CheckpointError, match="model.safetensors") as caught:
        read_header(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_the_library_accepts_a_name_given_twice(tmp_path):
    """Why headers are parsed here."""
    path = write_raw(tmp_path / "model.safetensors", HEADERS["name twice"], b"xyz")
    assert len(load_file(path)) == 1


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 200_000_000)])
def test_short_files_and_long_headers_are_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="cut short or is no safetensors"):
        read_header(tmp_path / "model.safetensors")


def test_links_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link.*cp -rL"):
        find_tensors(tmp_path, "model")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None,
                                  ".hidden.safetensors", "a\0.safetensors", "model.bin",
                                  "a\n.safetensors"])  # fmt: skip
def test_an_index_names_plain_files_only(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path.parent / "outside.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        find_tensors(tmp_path, "model")


def test_contradictions_of_the_index_are_collected(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    problems = "; ".join(find_tensors(tmp_path, "model").problems)
    assert "a is in one.safetensors and again in two.safetensors" in problems
    assert "b is in one.safetensors but not so in the index" in problems
    assert "c is in two.safetensors but not so in the index" in problems


def test_two_answers_to_one_question_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has both"):
        find_tensors(tmp_path, "model")


def test_a_missing_shard_is_named(tmp_path):
    weight_map = {"a": "model-00001-of-00001.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="model-00001-of-00001.safetensors is missing"):
        find_tensors(tmp_path, "model")


def test_weights_with_nan_are_refused_unless_allowed(tmp_path):
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    files = find_tensors(tmp_path, "model")
    with pytest.raises(CheckpointError, match="tensor a holds NaN or infinity"):
        lazy_tensors(files, ["a"], tmp_path)["a"]
    assert lazy_tensors(files, ["a"], tmp_path, allow_nonfinite=True)["a"].isnan().any()


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    tensors = lazy_tensors(find_tensors(tmp_path, "model"), ["a"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({"a": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        tensors["a"]
