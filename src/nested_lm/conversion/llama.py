"""What a Llama's config.json means here: the same function as a model of ours, or the reason why there is none."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from nested_lm.errors import CheckpointError

_One = Annotated[float, Field(ge=1.0, le=1.0)]


class _Rope(BaseModel):
    """Rotary angles as Hugging Face describes them: `rope_scaling`, or since transformers 5 `rope_parameters`."""

    rope_type: str = "default"
    rope_theta: PositiveFloat | None = None
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    partial_rotary_factor: _One = 1.0

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "type" in values:
            return {"rope_type": values["type"]} | values
        return values

    @model_validator(mode="after")
    def _is_known(self) -> "_Rope":
        if self.rope_type not in ("default", "llama3"):
            raise ValueError(
                f"rotary positions of type {self.rope_type!r} are not supported; supported are 'default' and 'llama3'"
            )
        needed = {
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
        }
        missing = [name for name, value in needed.items() if value is None]
        if self.rope_type == "llama3" and missing:
            raise ValueError(f"rotary positions of type 'llama3' need {', '.join(missing)}")
        return self


class LlamaConfig(BaseModel):
    """The fields of a Llama's config.json that decide what it computes. Others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["llama"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    quantization_config: None = None
    partial_rotary_factor: _One = 1.0
    rope_theta: PositiveFloat = 10_000.0
    rope: _Rope = Field(default_factory=_Rope)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_place_for_rope(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return values | {"rope": values.get("rope_parameters") or values.get("rope_scaling") or {}}

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> "LlamaConfig":
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim} x num_attention_heads {self.num_attention_heads} is not hidden_size "
                f"{self.hidden_size}; heads of another width than hidden_size / num_attention_heads are not supported"
            )
        return self

    def model_section(self, periods: tuple[int, ...]) -> dict[str, Any]:
        """The section `model` of a run: the same function, its MLPs in levels of these periods, fastest first."""
        rope, scaling = self.rope, None
        if rope.rope_type == "llama3":
            scaling = {
                "kind": "llama3",
                "factor": rope.factor,
                "low_frequency": rope.low_freq_factor,
                "high_frequency": rope.high_freq_factor,
                "original_context": rope.original_max_position_embeddings or self.max_position_embeddings,
            }
        mixer: dict[str, Any] = {
            "kind": "attention",
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "rope_base": rope.rope_theta or self.rope_theta,
            "rope_scaling": scaling,
        }
        return {
            "vocab_size": self.vocab_size,
            "width": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "tie_embeddings": self.tie_word_embeddings,
            "norm_epsilon": self.rms_norm_eps,
            "mixer": mixer,
            "channel": {
                "kind": "layer_levels",
                "hidden": self.intermediate_size,
                "levels": [{"period_tokens": period} for period in periods],
            },
        }

    @property
    def boundary(self) -> tuple[int, int] | None:
        """Tokens that start and end a document; of several end tokens the first. None when it names neither."""
        eos = self.eos_token_id
        end = (eos[0] if eos else None) if isinstance(eos, list) else eos
        start = self.bos_token_id if self.bos_token_id is not None else end
        return None if start is None else (start, start if end is None else end)


def parse_config(document: dict[str, Any], *, where: str) -> LlamaConfig:
    """Judge a config.json.

    Raises:
        CheckpointError: every field that has no counterpart here, with what was found.
    """
    try:
        return LlamaConfig.model_validate(document)
    except ValidationError as error:
        lines = []
        for found in error.errors():
            place = ".".join(str(part) for part in found["loc"])
            message = found["msg"].removeprefix("Value error, ")
            given = f", found {found['input']!r}" if found["type"] not in ("missing", "value_error") else ""
            lines.append(f"  {place}: {message}{given}" if place else f"  {message}")
        raise CheckpointError(
            f"{where} describes a model that cannot be converted\n" + "\n".join(lines) + "\n"
            "  Llama-type models (model_type llama) without biases and quantisation can."
        ) from error
