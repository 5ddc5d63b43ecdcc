"""How a backbone's linear weights are stored: the setting behind `--quantize`.

In: a name with options, or a mapping. Out: a validated record. Imports no torch, so that servers and the command line
can read it. Refuses to know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field

from lorica.core.config import Config
from lorica.core.errors import ConfigError

Kind = Literal["nf4", "nf3", "nf2", "nvfp4", "uniform8", "uniform4", "uniform3", "uniform2"]
Block = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class Quantization(Config):
    """Storage of a frozen backbone's linear weights. As text: `nf4`, or `nf4,double=false,block=128`."""

    kind: Kind = Field(
        "nf4",
        description="nf4 (QLoRA), nf3, nf2, nvfp4 (4-bit floats in blocks of 16), or uniform levels of 2 to 8 bits",
    )
    double: bool = Field(True, description="nf kinds: also store the blocks' scales in 8 bits (double quantisation)")
    block: Block = Field(64, description="nf kinds: neighbouring weights that share a scale")
    skip: tuple[str, ...] = Field(
        (), description="linear sites that stay as they are: names, last parts of names, or patterns with `*`"
    )
    backend: Literal["auto", "torch", "bitsandbytes"] = Field(
        "auto",
        description="what unpacks nf4: our torch code or bitsandbytes, over the same bytes; auto takes bitsandbytes on"
        " CUDA where it is installed",
    )

    @classmethod
    def of(cls, value: Quantization | str | Mapping[str, Any] | None) -> Quantization | None:
        """A setting from what a user wrote; None, `none` and "" are no quantisation. Raises ConfigError."""
        if value is None or isinstance(value, Quantization):
            return value
        if isinstance(value, Mapping):
            return cls.parse(value)
        kind, *options = (part.strip() for part in value.split(","))
        if kind in ("", "none") and not options:
            return None
        values: dict[str, Any] = {"kind": kind}
        for option in options:
            key, mark, text = option.partition("=")
            if not mark:
                raise ConfigError(f"{option!r} in {value!r} is not KEY=VALUE, such as `double=false`.")
            values[key] = _value(key, text)
        return cls.parse(values)

    def skips(self, site: str) -> str | None:
        """The pattern that leaves a site as it is, or None."""
        return next((p for p in self.skip if fnmatchcase(site, p) or fnmatchcase(site.rsplit(".", 1)[-1], p)), None)

    def __str__(self) -> str:
        """The text form, without what is default."""
        changed = {name: getattr(self, name) for name in ("double", "block", "backend")}
        default = {name: type(self).model_fields[name].default for name in changed}
        words = [f"{n}={str(v).lower()}" for n, v in changed.items() if v != default[n]]
        return ",".join([self.kind, *words, *([f"skip={'+'.join(self.skip)}"] if self.skip else [])])


def _value(key: str, text: str) -> Any:
    if key == "skip":
        return tuple(text.split("+"))
    return int(text) if text.isdecimal() else text
