"""The JSON bodies of the Tinker protocol, as this server reads them.

In: JSON objects. Out: validated values; what does not fit is refused by name (422, or a failed future on calls that
carry a place in a run's order). Refuses to know what is done with them. Unknown keys are refused where ignoring one
could change a result.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints

NAME = r"[A-Za-z0-9_@+=:-][A-Za-z0-9_.@+=:-]{0,149}"
"""What checkpoints may be called: one part of a path that does not begin with a dot."""
TTL = (3600, 10 * 365 * 24 * 3600 + 3 * 24 * 3600)

Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
Id = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Ttl = Annotated[int, Field(ge=TTL[0], le=TTL[1])]
Seq = Annotated[int, Field(ge=0, le=2**63 - 1)]
Metadata = dict[str, Any]


class Body(BaseModel):
    """Base of bodies: unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)

    type: str | None = None


class LooseBody(BaseModel):
    """Base of bodies whose unknown keys cannot change a number."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), frozen=True)


# -- client and session -----------------------------------------------------------------------------------------------


class ClientConfigBody(LooseBody):
    sdk_version: str = ""


class CreateSessionBody(LooseBody):
    tags: list[str] = []
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class HeartbeatBody(LooseBody):
    session_id: Id


class FinishReason(LooseBody):
    type: Literal["success", "errored", "interrupted"]


class FinishBody(LooseBody):
    reason: FinishReason
    detail: str | None = None


class ProjectBody(LooseBody):
    project_id: Id


# -- runs -------------------------------------------------------------------------------------------------------------


class LoraConfigBody(Body):
    rank: int
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerBody(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "adamw"


class CreateModelBody(Body):
    session_id: Id
    model_seq_id: Seq
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: LoraConfigBody | None = None
    optimizer_config: OptimizerBody = OptimizerBody()


class GetInfoBody(LooseBody):
    model_id: Id


class AdamBody(Body):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStepBody(Body):
    model_id: Id
    seq_id: Seq | None = None
    adam_params: AdamBody = Field(validation_alias=AliasChoices("adam_params", "optim_params"))


class LoadWeightsBody(Body):
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerBody | None = None
    weights_access_token: str | None = None


class SaveWeightsBody(Body):
    model_id: Id
    path: Name | None = None
    seq_id: Seq | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveForSamplerBody(SaveWeightsBody):
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class SaveExternalBody(SaveWeightsBody):
    path: Name
    age_encryption_recipients: list[str] | None = None


class CopyWeightsBody(Body):
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    destination_project_id: str | None = None
    source_path: str
    ttl_seconds: Ttl | None = None
    weights_access_token: str | None = None


class WeightsInfoBody(LooseBody):
    tinker_path: str


class TtlBody(Body):
    ttl_seconds: Ttl | None


# -- sampling ---------------------------------------------------------------------------------------------------------


class CreateSamplingSessionBody(Body):
    session_id: Id
    sampling_session_seq_id: Seq
    base_model: str | None = None
    model_path: str | None = None


class JoinBody(LooseBody):
    sampling_session_id: Id


class ChunkBody(Body):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[Annotated[int, Field(ge=-(2**31), lt=2**31)]]


class PromptBody(Body):
    chunks: list[ChunkBody]


class SamplingParamsBody(Body):
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[int] | list[str] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: int = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class SampleBody(Body):
    num_samples: Annotated[int, Field(ge=1)] = 1
    prompt: PromptBody
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: Id | None = None
    seq_id: Seq | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0)] = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0)] = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


# -- futures ----------------------------------------------------------------------------------------------------------


class RetrieveBody(LooseBody):
    request_id: Id
    allow_metadata_only: bool = False


class FuturesTarget(LooseBody):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: Seq = 0


class RetrieveManyBody(LooseBody):
    target: FuturesTarget
    prev_cursor: Seq = 0
    timeout: Annotated[float, Field(ge=0)] | None = None
    retrieved_request_ids: list[Id] = []


class CancelBody(LooseBody):
    request_id: Id
