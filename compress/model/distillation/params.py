"""Parameters of the distillation stage; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.context import Params

SIZES = ("layers", "heads", "kv_heads", "head_dim", "ffn", "hidden")
DEFAULT_RATIO = 0.5


class LogitsParams(Params):
    """Distillation on the teacher's logits: loss = (1 - kd_weight) * CE + kd_weight * temperature^2 * KL."""

    init: Literal["teacher_layers", "scratch", "checkpoint"] = Field(
        "teacher_layers",
        description="how the student starts: the teacher cut down by activation importance, random weights, "
        "or the checkpoint that the step before left",
    )
    prune_ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=f"share of the teacher's parameters to remove; {DEFAULT_RATIO} if no size is given",
    )
    layers: int | None = Field(None, ge=1, description="layers of the student (default: the teacher's)")
    heads: int | None = Field(None, ge=1, description="attention heads (default: the teacher's)")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads (default: the teacher's)")
    head_dim: int | None = Field(None, ge=2, multiple_of=2, description="size of a head; for init: scratch only")
    ffn: int | None = Field(None, ge=1, description="feed-forward width (default: the teacher's)")
    hidden: int | None = Field(None, ge=1, description="hidden size (default: the teacher's)")
    multiple_of: int = Field(32, ge=1, le=1024, description="grid of new widths, so that weight groups fit")
    calibration_tokens: int = Field(32_768, ge=1, description="tokens whose activations choose what to cut")

    epochs: float = Field(3.0, gt=0, le=10_000, description="passes over the rows; a part is allowed")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_tokens: int = Field(4096, ge=16, description="padded tokens of one optimizer step")
    accumulate: int = Field(1, ge=1, description="parts into which a step is cut to save memory")
    max_tokens: int = Field(512, ge=2, description="longest row, in tokens")
    truncate: bool = Field(False, description="cut longer rows instead of refusing them")

    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak of the cosine schedule")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps with a rising rate")
    final_lr_ratio: float = Field(0.02, ge=0, le=1, description="the last rate, as a share of the peak")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon orthogonalizes the steps of the layers' matrices: better per step, for some more "
        "time; needs a learning rate of its own",
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled decay of the matrices")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    average_decay: float = Field(
        0.0, ge=0, lt=1, description="decay per step of an average of the weights, which is then kept; 0: none"
    )

    kd_weight: float = Field(0.5, ge=0, le=1, description="share of the KL to the teacher; 0 learns the labels alone")
    learn: Literal["answer", "all"] = Field(
        "answer",
        description="which tokens are targets: the answers, or all tokens, the user's turns included; a teacher that "
        "was trained on user turns then says far more with every row",
    )
    temperature: float = Field(1.0, gt=0, le=20, description="softens both sides of the KL")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over the vocabulary")
    targets: Literal["cache", "online"] = Field(
        "cache", description="run the teacher once and store what it says, or run it in every step"
    )
    top_k: int = Field(
        32, ge=1, le=1 << 16, description="entries of the cache per token; the mass of all others is stored too"
    )

    validation_share: float = Field(0.05, ge=0, lt=1, description="share of the rows held out")
    validation_rows: int = Field(256, ge=0, description="held-out rows at most")
    validations: int = Field(8, ge=1, description="how often the held-out loss is taken")
    patience: int = Field(
        0, ge=0, description="end the training after so many validations without a lower held-out loss; 0: never"
    )
    keep: Literal["best", "last"] = Field("best", description="which weights become the student")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the machine has it and the model is wide enough to gain"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> LogitsParams:
        if self.prune_ratio is not None and self.sizes:
            raise ValueError(f"prune_ratio and sizes ({', '.join(self.sizes)}) exclude each other: give one")
        if self.init == "checkpoint" and (self.sizes or self.prune_ratio is not None):
            raise ValueError("init: checkpoint takes the student as it is: give no sizes and no prune_ratio")
        if self.head_dim is not None and self.init != "scratch":
            raise ValueError("head_dim can be chosen with init: scratch only; cut-down heads keep their size")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}
