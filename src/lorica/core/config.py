"""The base of every config: frozen, typed, and deaf to nothing.

In: keyword arguments or a mapping (from YAML, JSON or the command line). Out: a validated, immutable value whose field
descriptions are the help text and the reference page. An unknown key fails and names its nearest neighbours.
Refuses to know where the values came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lorica.core.errors import ConfigError, LoricaError, did_you_mean


class Config(BaseModel):
    """A frozen record of settings. Subclasses describe each field with `Field(description=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate a mapping. Raises ConfigError naming the first wrong field."""
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again; a field that nobody has set is not set in it either."""
        return type(self)(
            **{**{k: getattr(self, k) for k in type(self).model_fields if k in self.model_fields_set}, **changes}
        )


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    """One sentence for the first problem: where it is, what was wrong, what would be right."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields(cls, first["loc"])
        near = did_you_mean(str(first["loc"][-1]), known) or f" Its settings are {', '.join(known) or 'none'}."
        return f"{cls.__name__} has no setting {where!r}.{near}"
    if first["type"] == "missing":
        return f"{cls.__name__} needs {where!r}, which is missing."
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LoricaError):  # a nested config, or a validator of ours, has said it already
        return str(cause)
    given = first.get("input")
    return f"{cls.__name__}.{where} is {given!r}: {first['msg'].removeprefix('Value error, ')}."


def _fields(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The names that would have been accepted at `path` (nested configs are followed)."""
    here = cls
    for part in path[:-1]:
        field = here.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        here = field.annotation
    return list(here.model_fields)
