"""Parameters of the quantization stages. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.context import Params

Rule = Literal["affine", "lsq", "elastic", "ternary"]
GROUP_SIZES = (128, 64, 32, 16)  # what the runtime's int4 operator takes as block, largest first


class ModuleOverride(Params):
    """Other settings for the linears whose path fits a pattern; what is left out stays as for all."""

    pattern: str = Field(
        min_length=1, description="shell pattern of paths, such as *.down_proj or model.layers.0.*; case counts"
    )
    bits: Literal[2, 3, 4, 8, 16] | None = Field(default=None, description="bits of these; 16: left alone, as fp16")
    group_size: Literal[16, 32, 64, 128, -1] | None = Field(default=None, description="inputs that share a scale")


class RtnParams(Params):
    """Rounding to nearest: no data, no compensation. The baseline, and a way out where there are no rows."""

    bits: Literal[2, 3, 4, 8] = Field(
        default=4, description="bits of a weight; 3 is stored in 4, because no runtime has an operator for 3"
    )
    group_size: Literal[16, 32, 64, 128, -1] = Field(
        default=32,
        description="inputs that share a scale; -1: all of a row. Falls to the largest size that divides all inputs",
    )
    sym: bool = Field(default=True, description="zero point in the middle of the grid instead of fitted to each group")
    clip_steps: int = Field(
        default=40, ge=0, le=200, description="clips tried per group for the least squared error; 0: the full range"
    )
    overrides: list[ModuleOverride] = Field(
        default_factory=list, description="other bits or groups for some linears; the first pattern that fits counts"
    )
    ignore: list[str] = Field(
        default_factory=list, description="patterns of linears that are left alone, as fp16; counts before overrides"
    )
    embedding_bits: Literal[4, 8, 16] = Field(default=8, description="bits of the embedding; 16: fp16")
    lm_head_bits: Literal[4, 8, 16] | None = Field(
        default=None,
        description="bits of the output head; left out: as embedding_bits. A tied head is the embedding and has its",
    )


class GptqParams(RtnParams):
    """GPTQ: each rounding error is pushed into the weights not yet rounded, as calibration rows weigh it."""

    act_order: bool = Field(default=True, description="round the inputs of largest activation first")
    keep_groups: bool = Field(
        default=True,
        description="act_order sorts within groups and whole groups, so that no index is needed at run time; false: "
        "sorts freely (desc_act with g_idx), a little better and slower to run",
    )
    damp_frac: float = Field(
        default=0.01, ge=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean"
    )
    true_sequential: bool = Field(
        default=True, description="within a layer, let o see the quantized q, k, v, and down the quantized gate and up"
    )
    calibration_tokens: int = Field(default=32_768, ge=1, description="tokens whose activations are measured")
    calibration_draws: int = Field(
        default=2,
        ge=1,
        le=16,
        description="disjoint samples that are tried where the rows suffice; the one of least divergence on rows that "
        "neither saw is kept, and how far they are apart is reported. Each takes its time",
    )
    max_tokens: int = Field(default=512, ge=2, description="longer rows lose their end")
    batch_size: int = Field(default=16, ge=1, description="rows per calibration batch")
    prompt_weight: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="weight of the positions that predict no target, against 1 for those that do",
    )


class MixedParams(GptqParams):
    """GPTQ with bits chosen per part of the model, for the least divergence under a budget of bytes."""

    budget_bits: float | None = Field(
        default=None, gt=1, le=16, description="mean bits of a linear's weight, scales counted; or give budget_bytes"
    )
    budget_bytes: int | None = Field(
        default=None,
        ge=1,
        description="of all weights, embedding and head included; with neither, what the target's storage and half of "
        "its memory hold",
    )
    candidates: list[Literal[2, 3, 4, 8]] = Field(
        default=[2, 4, 8], min_length=1, description="bits that a part may get"
    )
    groups: list[Literal[16, 32, 64, 128, -1]] = Field(
        default_factory=list, description="group sizes that a part may get; left out: group_size"
    )
    sensitivity_tokens: int = Field(
        default=2048, ge=16, description="tokens on which the divergence of each part is measured"
    )

    @model_validator(mode="after")
    def _chooses_itself(self) -> MixedParams:
        if self.overrides or self.ignore:
            raise ValueError("overrides and ignore are for the other methods: mixed chooses bits for every linear")
        if self.budget_bits is not None and self.budget_bytes is not None:
            raise ValueError("budget_bits and budget_bytes are both given; one budget counts")
        return self
