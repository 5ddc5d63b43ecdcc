"""The engine process: `python -m lorica.engine.worker --fd N --model NAME`, started by `link.EngineLink`.

In: frames on a socket, each four bytes of length (little-endian) and a message of `commands`. Out: the same. A thread
reads, so that commands never wait in the kernel; the main thread computes, and sleeps only when there is nothing to do.
The end of the socket is the end of the process. Refuses to know HTTP, SQL and users.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import struct
import sys
import threading
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from lorica.core.errors import ConfigError, LoricaError
from lorica.engine import commands
from lorica.engine.settings import EngineSettings, parse

if TYPE_CHECKING:
    from lorica.engine.core import EngineCore
    from lorica.models.backbone import Backbone

log = logging.getLogger("lorica.engine")
LENGTH = struct.Struct("<I")


class Wire:
    """Frames on a socket."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._file = self._socket.makefile("rb", buffering=1 << 16)
        self._lock = threading.Lock()

    def send(self, *replies: commands.Frame) -> None:
        """Whole frames, from any thread."""
        parts = []
        for reply in replies:
            content = commands.encode(reply)
            parts += [LENGTH.pack(len(content)), content]
        with self._lock:
            self._socket.sendall(b"".join(parts))

    def receive(self) -> commands.Commands | None:
        """The next command; None at the end."""
        start = self._file.read(LENGTH.size)
        if len(start) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack(start)
        content = self._file.read(length)
        return commands.decode_command(content) if len(content) == length else None


def main(arguments: list[str]) -> int:
    """The process. The API decides when it ends: by closing the socket."""
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    fd, settings = parse(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin take the API's processor
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    wire = Wire(fd)
    inbox: queue.SimpleQueue[commands.Commands] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(wire, inbox), name="reader", daemon=True).start()
    try:
        core, ready = start(settings)
    except Exception as error:
        if not isinstance(error, LoricaError):
            log.exception("the engine does not start")
        wire.send(refused(error))
        return 1
    wire.send(ready)
    try:
        serve(core, wire, inbox)
    except (BrokenPipeError, ConnectionResetError):  # the API died first
        return 0
    return 0


def _read(wire: Wire, inbox: queue.SimpleQueue[commands.Commands]) -> None:
    """Put commands into the inbox until the socket ends; then nobody wants what is being computed."""
    code = 0
    try:
        while (command := wire.receive()) is not None:
            inbox.put(command)
    except msgspec.MsgspecError:
        log.exception("a message that is no command")
        code = 2
    except OSError:
        log.exception("the socket failed")
        code = 2
    logging.shutdown()
    os._exit(code)


def serve(core: EngineCore, wire: Wire, inbox: queue.SimpleQueue[commands.Commands]) -> None:
    """Take what has come, do one turn, send what came of it; for ever."""
    from lorica.engine.aside import Aside

    aside = Aside(core.host.backbone, core.settings, wire.send)

    def take(command: commands.Commands) -> None:
        if isinstance(command, commands.Asides):
            aside.submit(command)
        else:
            core.submit(command)

    while True:
        if not core.busy:
            take(inbox.get())
        while not inbox.empty():
            take(inbox.get())
        replies = core.turn()
        if replies:
            wire.send(*replies)


def start(settings: EngineSettings) -> tuple[EngineCore, commands.Ready]:
    """The backbone, loaded and warm. Raises LoricaError."""
    import torch

    from lorica.engine.core import EngineCore
    from lorica.models import load

    if settings.threads:
        torch.set_num_threads(settings.threads)
    backbone = load(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        position_scale=settings.position_scale,
        quantize=settings.quantize,
    )
    core = EngineCore(backbone, settings)
    core.warm_up()
    return core, commands.Ready(0, settings.model, describe(backbone, settings.model), method_settings())


def method_settings() -> dict[str, commands.MethodSettings]:
    """What `Ready` tells of the methods, those of other packages too."""
    from lorica.methods import all_methods

    return {
        name: commands.MethodSettings(
            {field: _takes_text(info.annotation) for field, info in method.model_fields.items()},
            dict(method.peft.fields) if method.peft else {},
        )
        for name, method in all_methods().items()
    }


def _takes_text(annotation: Any) -> bool:
    """Whether a field's type, or one of those that it allows, is text. A list of texts is none."""
    if get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return any(map(_takes_text, get_args(annotation)))
    return isinstance(annotation, type) and issubclass(annotation, str)


def describe(backbone: Backbone, name: str) -> dict[str, Any]:
    """What `Ready` tells of a backbone."""
    from lorica.models.positions import context

    config = getattr(backbone.module, "config", None)
    generation = getattr(backbone.module, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    return {
        "family": backbone.family,
        "parameters": backbone.parameter_count(),
        "layers": getattr(config, "num_hidden_layers", 0),
        "hidden": getattr(config, "hidden_size", 0),
        "vocabulary": backbone.weight("input").matrix().shape[1],
        "context": context(backbone.module),
        "fingerprint": backbone.fingerprint(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "tokenizer": _tokenizer(name),
        "eos_ids": [] if eos is None else [int(id) for id in (eos if isinstance(eos, list | tuple) else [eos])],
    }


def _tokenizer(name: str) -> str:
    """The directory that a tokenizer can be read from; empty where the model has none."""
    from lorica.models.builtin import BUILTIN
    from lorica.models.directory import has_tokenizer
    from lorica.models.loading import locate

    if name.startswith("tiny-") and name in BUILTIN:
        return ""
    path = locate(name)
    return str(path) if has_tokenizer(path) else ""


def refused(error: Exception) -> commands.Failed:
    """Why the engine does not start."""
    if isinstance(error, LoricaError):
        text = error.message if error.hint is None else f"{error.message} {error.hint}"
        return commands.Failed(0, "user", error.code, text)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "it said nothing.")
    return commands.Failed(0, "server", "engine", f"The engine does not start: {type(error).__name__}, {line}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"{error}")
