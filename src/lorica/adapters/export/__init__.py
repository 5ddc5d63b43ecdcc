"""Export: adapters of any method in forms that other programs read. One file per form."""

from __future__ import annotations

from lorica.adapters.export.adalora import pruned
from lorica.adapters.export.lora import ExportReport, as_lora, export_lora

__all__ = ["ExportReport", "as_lora", "export_lora", "pruned"]
