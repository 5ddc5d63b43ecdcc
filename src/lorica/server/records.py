"""Runs and checkpoints as the SDK shows them.

In: records. Out: JSON with the SDK's names. Refuses to know the database.
"""

from __future__ import annotations

from typing import Any

from lorica.server.naming import SEGMENT_OF
from lorica.store.checkpoints import Checkpoint
from lorica.store.runs import Run


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    metadata = checkpoint.user_metadata
    return {
        "checkpoint_id": f"{SEGMENT_OF[checkpoint.kind]}/{checkpoint.name}",
        "checkpoint_type": checkpoint.kind,
        "time": checkpoint.created.isoformat(),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size,
        "public": checkpoint.public,
        "user_metadata": None if metadata is None else texts(metadata),
        "expires_at": checkpoint.expires.isoformat() if checkpoint.expires else None,
    }


def run_json(run: Run, training: Checkpoint | None, sampler: Checkpoint | None) -> dict[str, Any]:
    opened = run.info.get("opened") or {}
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.tenant,
        "is_lora": opened.get("rank") is not None,
        "corrupted": run.corrupted is not None,
        "corruption": run.corrupted,
        "lora_rank": opened.get("rank"),
        "method": opened.get("method"),
        "method_config": opened.get("config"),
        "targets": opened.get("targets"),
        "trainable_parameters": opened.get("parameters"),
        "last_request_time": run.last_request.isoformat(),
        "last_checkpoint": checkpoint_json(training) if training else None,
        "last_sampler_checkpoint": checkpoint_json(sampler) if sampler else None,
        "user_metadata": None if run.user_metadata is None else texts(run.user_metadata),
    }


def texts(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata as the SDK declares it: texts."""
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}
