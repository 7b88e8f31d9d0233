"""Parameters of the pruning stage. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.context import Params

DEFAULT_RATIO = 0.25


class RecoveryParams(Params):
    """Distillation after each round of trimming; the total is shared out over the rounds."""

    steps: int = Field(default=200, ge=0, description="optimizer steps over all rounds; 0: trim only")
    batch_tokens: int = Field(default=2048, ge=16, description="tokens per optimizer step")
    learning_rate: float = Field(
        default=3e-4, gt=0, le=1, description="peak; Minitron advises about a fifth of the original training's peak"
    )
    warmup_ratio: float = Field(default=0.05, ge=0, le=1, description="share of the steps with a rising rate")
    optimizer: Literal["adamw", "muon"] = Field(default="adamw", description="as in model.distillation.logits")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="decoupled decay of the matrices")
    kd_weight: float = Field(
        default=1.0, ge=0, le=1, description="share of the KL to the unpruned logits; the rest is cross-entropy"
    )
    temperature: float = Field(default=1.0, gt=0, le=20, description="softens both sides of the KL")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="number format of the training; auto: as in model.distillation.logits"
    )
    learn: Literal["answer", "all"] = Field(
        default="answer", description="which tokens are targets: the answers, or all tokens, user turns included"
    )
    targets: Literal["cache", "online"] = Field(
        default="online", description="run the model that is learned from in every step, or once and store what it says"
    )
    top_k: int = Field(default=32, ge=1, le=1 << 16, description="entries of the cache per token")
    target: Literal["teacher", "unpruned"] = Field(
        default="teacher", description="whose logits: the profile's teacher, or the model as it was before pruning"
    )


class StructuredParams(Params):
    """Width and depth by activation importance (Minitron). Give prune_ratio, or some target sizes, or neither."""

    prune_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description=f"fraction of the parameters to remove; {DEFAULT_RATIO} if no size is given",
    )
    axes: tuple[Literal["heads", "ffn", "hidden", "layers"], ...] = Field(
        default=("heads", "ffn"),
        min_length=1,
        strict=False,
        description="what prune_ratio may shrink; width (heads, ffn, hidden) costs less quality than depth (layers)",
    )
    layers: int | None = Field(default=None, ge=1, description="target number of layers")
    heads: int | None = Field(default=None, ge=1, description="target number of attention heads")
    kv_heads: int | None = Field(default=None, ge=1, description="target number of key-value heads")
    ffn: int | None = Field(default=None, ge=1, description="target feed-forward width")
    hidden: int | None = Field(default=None, ge=1, description="target hidden size")
    multiple_of: int = Field(
        default=32, ge=1, le=1024, description="grid of new widths, so that weight groups and kernels fit"
    )
    max_step: float = Field(
        default=1 / 3, gt=0, lt=1, description="largest fraction removed per round; more is done in several rounds"
    )
    calibration_tokens: int = Field(default=32_768, ge=1, description="tokens whose activations are scored")
    max_tokens: int = Field(default=512, ge=2, description="longer rows lose their end")
    batch_size: int = Field(default=16, ge=1, description="rows per calibration batch")
    rescale_norms: bool = Field(
        default=True, description="after cutting hidden channels, scale norm gains by rms(kept) / rms(all)"
    )
    recovery: RecoveryParams = Field(default_factory=RecoveryParams, description="training after trimming")

    @model_validator(mode="after")
    def _one_way(self) -> StructuredParams:
        if self.prune_ratio is not None and self.sizes:
            raise ValueError(f"prune_ratio and target sizes ({', '.join(self.sizes)}) exclude each other: give one")
        if len(set(self.axes)) < len(self.axes):
            raise ValueError("axes names one twice")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The target sizes that were given."""
        named = {key: getattr(self, key) for key in ("layers", "heads", "kv_heads", "ffn", "hidden")}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def ratio(self) -> float:
        """The fraction to remove when no size is given."""
        return DEFAULT_RATIO if self.prune_ratio is None else self.prune_ratio
