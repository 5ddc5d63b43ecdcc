"""What the service asks of an engine process and what it answers: typed messages in msgpack frames.

In: commands with an id that the caller chose. Out: one final reply for each. Commands of one run are executed in the
order in which they arrive. Refuses to know how frames travel and who sends them; imports no torch, so that the API
process can speak this language.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Frame(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages."""


class Array(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A tensor as its bytes, C order, little-endian; `dtype` is numpy's name (`int32`, `float32` …)."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]


class Csr(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A sparse matrix [T, K] by rows: `values`, `crow` [T + 1] int64, `col` int64."""

    values: Array
    crow: Array
    col: Array
    shape: tuple[int, ...]


class Datum(msgspec.Struct, frozen=True):
    """One sequence of T tokens and what its loss reads: `inputs` by the loss's own names (`target_tokens`, `weights`,
    `logprobs`, `advantages` …), each [T], or [T, K] where the loss takes several targets a position.
    """

    tokens: Array
    inputs: dict[str, Array | Csr]


class RunSpec(msgspec.Struct, frozen=True):
    """All that a run starts from. `method` is a registered name and `config` its fields; `targets` are a `Targets`'
    fields. With `parent`, an artifact folder of an adapter, values and method come from there; `parent_name` is what
    its client calls it.
    """

    method: str
    config: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    seed: int = 0
    parent: str | None = None
    parent_name: str = ""


class Adam(msgspec.Struct, frozen=True):
    """One step of AdamW with decoupled decay; `clip` is the largest norm of the whole gradient, 0 is off."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    clip: float = 0.0


# -- commands ------------------------------------------------------------------------------------------------------


class Command(Frame, frozen=True, tag=True):
    """`id` is the caller's; every command gets exactly one `Done` or `Failed` with it."""

    id: int


class Open(Command, frozen=True):
    """Make a run known, as it was after a snapshot, or new. Tensors are made at once for a new run and on first use for
    one with a snapshot. Replies `Opened`. `tenant` is an opaque word for fairness.
    """

    run: str
    spec: RunSpec
    tenant: str = ""
    snapshot: str | None = None


class Train(Command, frozen=True):
    """`forward_backward`, or `forward` alone where `backward` is false: the sum of the loss over the datums. Replies
    `Trained`.
    """

    run: str
    datums: list[Datum]
    loss: str
    config: dict[str, float | str] = {}
    backward: bool = True


class Step(Command, frozen=True):
    """One optimiser step on what was accumulated; the gradient is zero afterwards. Replies `Stepped`."""

    run: str
    adam: Adam


class Save(Command, frozen=True):
    """Write the run to artifact folder `path`: with `state` as it can be continued (adapter and optimiser), else the
    adapter alone, as PEFT reads it. Replies `Saved`.
    """

    run: str
    path: str
    state: bool


class Load(Command, frozen=True):
    """Replace the run's adapter by the one in artifact folder `path`; with `optimizer` its optimiser too, else a fresh
    one. Accumulated gradients are dropped. `name` is what its client calls it. Replies `Opened`.
    """

    run: str
    path: str
    optimizer: bool
    name: str = ""


class Snapshot(Command, frozen=True):
    """Write all that continues the run exactly to artifact file `path`. Replies `Saved`."""

    run: str
    path: str


class Close(Command, frozen=True):
    """Forget a run and free what it holds. Replies `Closed`."""

    run: str


class Sample(Command, frozen=True):
    """`num_samples` continuations of one prompt; none where `max_tokens` is 0 (prefill only). Replies `Sampled`.

    Draw i depends on (seed, i) alone. `adapters` are artifact folders of a stack, innermost first; none is the base.
    `stop_ids` end a sample and are kept as its last token; `stop_sequences` are token sequences that do. `stream`
    asks for a `Progress` with every token.
    """

    prompt: Array
    adapters: list[str] = []
    tenant: str = ""
    num_samples: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_ids: list[int] = []
    stop_sequences: list[list[int]] = []
    prompt_logprobs: bool = False
    topk_prompt: int = 0
    topk_sample: int = 0
    stream: bool = False


class Combine(Command, frozen=True):
    """Make one adapter of those in artifact folders `adapters` by rule `how`, and write it to folder `path`. Replies
    `Saved`, with what `Opened` tells and a `report`. `names` are what the parents are called in the result's lineage.
    """

    adapters: list[str]
    names: list[str]
    how: str
    path: str
    settings: dict[str, Any] = {}
    weights: list[float] | None = None
    rank: int | None = None


class Inspect(Command, frozen=True):
    """Describe the adapter in an artifact folder, beside others; with `intruders` count those among the `top` leading
    vectors whose cosine is below `threshold`. Replies `Inspected`.
    """

    adapter: str
    name: str
    against: list[str] = []
    against_names: list[str] = []
    intruders: bool = False
    top: int = 10
    threshold: float = 0.5


class Cancel(Command, frozen=True):
    """Give up command `target` if it is not finished: it then fails with category `user`. Replies `Closed`."""

    target: int


class Drain(Command, frozen=True):
    """Finish what is queued, take nothing new. Replies `Closed` when nothing is left."""


# -- replies -------------------------------------------------------------------------------------------------------


class Reply(Frame, frozen=True, tag=True):
    """`id` of the command that it answers; 0 for what the engine tells of itself."""

    id: int


class MethodSettings(msgspec.Struct, frozen=True):
    """The config fields of a registered method, for who has no torch to ask it. `fields`: each one's name, and whether
    a text is its value as it stands; for others a text is the JSON of one. `peft`: PEFT's names, theirs → ours.
    """

    fields: dict[str, bool] = {}
    peft: dict[str, str] = {}


class Ready(Reply, frozen=True):
    """The engine has its backbone. `info`: family, parameters, layers, hidden, vocabulary, context, fingerprint,
    dtype, tokenizer (a directory or hub id, or empty), eos_ids. `methods`: every registered one, by name.
    """

    model: str
    info: dict[str, Any]
    methods: dict[str, MethodSettings]


class Opened(Reply, frozen=True):
    """`rank` of the method where it has one; `parameters` that are trained; `method`, `config`, `targets` as resolved;
    `sites`: how many.
    """

    method: str
    config: dict[str, Any]
    targets: dict[str, Any]
    rank: int | None
    parameters: int
    sites: int


class Trained(Reply, frozen=True):
    """For each datum its fields (`logprobs` of the targets' shape …), and metrics named `name:reduction`."""

    outputs: list[dict[str, Array]]
    metrics: dict[str, float]


class Stepped(Reply, frozen=True):
    """Metrics named `name:reduction`: `grad_norm:mean` before clipping …"""

    metrics: dict[str, float]


class Saved(Reply, frozen=True):
    """Bytes written, and what an index needs to know of the adapter."""

    size: int
    info: dict[str, Any] = {}


class Inspected(Reply, frozen=True):
    """What `lorica inspect --json` prints."""

    report: dict[str, Any]


class Closed(Reply, frozen=True):
    """Done, nothing to tell."""


class TopK(msgspec.Struct, frozen=True):
    """For each of n positions the k likeliest tokens: ids int32 [n, k] and log-probabilities float32 [n, k]; places
    that hold nothing are (0, −99999).
    """

    ids: Array
    logprobs: Array


class Sequence(msgspec.Struct, frozen=True):
    """Sampled tokens int32, their log-probabilities float32 (temperature 1, untruncated), and what ended them."""

    tokens: Array
    logprobs: Array
    reason: Literal["stop", "length"]
    topk: TopK | None = None


class Sampled(Reply, frozen=True):
    """`prompt_logprobs` float32 [T], NaN at 0. `cached`: prompt tokens whose keys were there already."""

    sequences: list[Sequence]
    prompt_logprobs: Array | None = None
    topk_prompt: TopK | None = None
    cached: int = 0


class Progress(Reply, frozen=True):
    """New tokens of one sample of a streamed command; the final `Sampled` still comes."""

    index: int
    tokens: list[int]
    logprobs: list[float]


class Failed(Reply, frozen=True):
    """One clear sentence. `category`: `user` (the request was wrong), `server` (Lorica was). `code`: the error's."""

    category: Literal["user", "server"]
    code: str
    message: str


class Stats(Reply, frozen=True):
    """What the engine does, about once a second while it works and after each change of residency: numbers by name."""

    values: dict[str, float]


Asides = Combine | Inspect
"""What is asked of folders and the frozen base: it waits for no run, and no run waits for it."""
Commands = Open | Train | Step | Save | Load | Snapshot | Close | Sample | Combine | Inspect | Cancel | Drain
Replies = Ready | Opened | Trained | Stepped | Saved | Inspected | Closed | Sampled | Progress | Failed | Stats

_ENCODER = msgspec.msgpack.Encoder()
_COMMANDS: msgspec.msgpack.Decoder[Commands] = msgspec.msgpack.Decoder(Commands)
_REPLIES: msgspec.msgpack.Decoder[Replies] = msgspec.msgpack.Decoder(Replies)


def encode(frame: Frame) -> bytes:
    """A message as msgpack, without the length prefix."""
    return _ENCODER.encode(frame)


def decode_command(data: bytes) -> Commands:
    """Raises msgspec.ValidationError for anything that is not a command."""
    return _COMMANDS.decode(data)


def decode_reply(data: bytes) -> Replies:
    """Raises msgspec.ValidationError for anything that is not a reply."""
    return _REPLIES.decode(data)
