"""What trackers that can neither drop nor overwrite points show of updates that a rollback undid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_logs import FIRST, config, leveldb_records, rows, scalars_of

from engine.logs import Logs


def two_launches(run: Path, name: str) -> None:
    """Updates 1 to 4, back to 2, on to 4; the second launch begins with 4 again."""
    with Logs(run, FIRST, config("tensorboard", name)) as log:
        for update in range(1, 5):
            log.scalars(update, {"loss": float(update)})
        log.back_to(2, undone=4, rollbacks=1)
        for update in (3, 4):
            log.scalars(update, {"loss": 10.0 * update})
        log.writer.add_scalar("val/CT", 0.5, 4)
    with Logs(run, FIRST, config("tensorboard", name), start=3, rollbacks=1) as log:
        log.scalars(4, {"loss": 40.0})
    # These two forget what was undone.
    assert [(row["update"], row["loss"]) for row in rows(run / "metrics.jsonl")] == [
        (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0),
    ]  # fmt: skip
    assert scalars_of(run)["loss"][:4] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def wandb_rows(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history of all launches of an offline run, in order, and what its summary was set to."""
    from wandb.proto.wandb_internal_pb2 import Record

    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in leveldb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = record.history.item
                history.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return history, summary


def test_weights_and_biases_tells_points_after_a_rollback_from_those_it_undid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_launches(tmp_path, "wandb")
    history, summary = wandb_rows(tmp_path)
    assert [(row["update"], row.get("loss"), row.get("rollback/attempt")) for row in history] == [
        (1, 1.0, None), (2, 2.0, None), (3, 3.0, None), (4, 4.0, None),
        (2, None, 1.0),  # the rollback itself
        (3, 30.0, 1.0), (4, 40.0, 1.0), (4, None, 1.0),
        (4, 40.0, 1.0),
    ]  # fmt: skip
    assert summary["rollback/1"] == "updates 3 to 4 were undone"
    # As docs/engine.md says: the last point of each update is the one that counts.
    assert list({row["update"]: row["loss"] for row in history if "loss" in row}.values()) == [1, 2, 30, 40]


def test_mlflow_has_the_points_after_a_rollback_last_at_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_launches(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    identity = (tmp_path / "mlflow-id").read_text().strip()
    points = sorted(client.get_metric_history(identity, "loss"), key=lambda point: point.timestamp)
    assert {point.step: point.value for point in points} == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}
    assert sorted((p.step, p.value) for p in points if p.step == 3) == [(3, 3.0), (3, 30.0)]
    marks = client.get_metric_history(identity, "rollback/attempt")
    assert [mark.step for mark in marks] == [2, 3, 4, 4, 4]
    assert {mark.value for mark in marks} == {1.0}
    found = client.get_run(identity).data
    assert found.metrics["loss"] == 40.0
    assert found.tags["rollback.1"] == "updates 3 to 4 were undone"


def test_a_run_that_never_went_back_bears_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for start in (0, 1):
        with Logs(tmp_path, FIRST, config("mlflow"), start=start) as log:
            log.scalars(start + 1, {"loss": 1.0})
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    found = client.get_run((tmp_path / "mlflow-id").read_text().strip()).data
    assert set(found.metrics) == {"loss"}
    assert not [name for name in found.tags if name.startswith("rollback")]
