"""Reads what wandb wrote offline: records of protobuf in the log format of LevelDB."""

import json
import struct
from collections import defaultdict

BLOCK, HEADER = 32768, 7


def records(file):
    """Every record of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that holds no header is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # full, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_back(folder):
    """Series, axes by metric, summary, artifacts and run id of the only run below ``folder``."""
    import wandb

    wandb.teardown()  # its service writes the last records after the end of a run was answered
    (file,) = folder.glob("wandb/*run-*/*.wandb")
    found = {"series": defaultdict(list), "axes": {}, "summary": {}, "artifacts": [], "id": None}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                found["series"][name].append(json.loads(item.value_json))
        elif kind == "metric":
            found["axes"][record.metric.name] = record.metric.step_metric
        elif kind == "summary":
            for item in record.summary.update:
                found["summary"][item.key or "/".join(item.nested_key)] = json.loads(
                    item.value_json
                )
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
        elif kind == "run":
            found["id"] = record.run.run_id
    return found
