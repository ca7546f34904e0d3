"""The metrics at Weights & Biases, with the package itself, offline: what it has stored is read back."""

import json
import struct

import pytest

from mmcore.config import build_recipe
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_values

pytestmark = pytest.mark.slow
pytest.importorskip("wandb", reason="needs the extra mm[wandb]")


def stored(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type before each piece) behind
    seven bytes, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, pieces, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        pieces += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


def test_every_number_of_a_run_and_its_resumption_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    prepare_trainer(build_recipe(tiny_values(tmp_path, steps=4, wandb="mosaics"))).fit()
    prepare_trainer(build_recipe(tiny_values(tmp_path, steps=6, wandb="mosaics")), start=Start(resume=True)).fit()
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sessions = [stored(path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)]
    assert len(sessions) == 2
    for records in sessions:
        (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert begun.project == "mosaics" and begun.run_id == (run / "wandb-id").read_text()
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for records in sessions for record in records if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip
    assert [row["step"] for row in rows] == [line["step"] for line in lines]
    for line, row in zip(lines, rows, strict=True):
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("step", "total_steps"):
                assert row[f"{line['kind']}/{name}"] == value
