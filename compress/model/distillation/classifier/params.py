"""Parameters of distillation into a small classifier; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from compress.context import Params
from compress.model.distillation.params import DEFAULT_RATIO, SIZES, LogitsParams

SLOT = "{text}"
_STUDENT = ("init", "prune_ratio", *SIZES, "multiple_of", "calibration_tokens")


class ClassifierParams(Params):
    """Per row: (1 - kd_weight) * CE of the label's answer + kd_weight * KD of classes + attribution_weight * cosine."""

    init: Literal["teacher_layers", "scratch", "checkpoint"] = Field(
        "teacher_layers", description="how the student starts, as in model.distillation.logits"
    )
    prune_ratio: float | None = Field(
        None, ge=0, lt=1, description=f"share of the teacher's parameters to remove; {DEFAULT_RATIO} without a size"
    )
    layers: int | None = Field(None, ge=1, description="layers of the student (default: the teacher's)")
    heads: int | None = Field(None, ge=1, description="attention heads (default: the teacher's)")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads (default: the teacher's)")
    head_dim: int | None = Field(None, ge=2, multiple_of=2, description="size of a head; for init: scratch only")
    ffn: int | None = Field(None, ge=1, description="feed-forward width (default: the teacher's)")
    hidden: int | None = Field(None, ge=1, description="hidden size (default: the teacher's)")
    multiple_of: int = Field(32, ge=1, le=1024, description="grid of new widths, so that weight groups fit")
    calibration_tokens: int = Field(32_768, ge=1, description="tokens whose activations choose what to cut")

    classes: list[str] = Field(
        default_factory=list, description="labels that a row may have (default: those found in the rows, sorted)"
    )
    answers: dict[str, str] = Field(
        default_factory=dict, description="what a model answers for a label (default: the label itself)"
    )
    prompt: str = Field(SLOT, description="what teacher and student are asked; {text} is the row's user message")
    deeper: list[str] = Field(
        default_factory=list,
        description="fuller prompts, also with {text}, for the teacher alone: each is asked about the rows of which it "
        "is still less sure than confidence",
    )
    confidence: float = Field(
        0.0, ge=0, le=1, description="probability of the teacher's class below which deeper prompts are asked; 0: never"
    )
    score: Literal["sum", "mean"] = Field(
        "sum",
        description="the teacher's score of a class: log-likelihood of its answer, or that per token, for a teacher "
        "that was never trained on these answers and prefers short ones",
    )

    kd_weight: float = Field(0.5, ge=0, le=1, description="share of the teacher's classes; 0 learns the labels alone")
    temperature: float = Field(1.0, gt=0, le=20, description="softens both sides' probabilities of the classes")
    unlabelled: Literal["soft", "teacher"] = Field(
        "soft",
        description="rows without a label. soft: learn from the teacher's probabilities alone; teacher: the teacher's "
        "class is their label too",
    )
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="of unlabelled: teacher: rows of which the teacher is less sure get no label"
    )
    attribution_weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="weight of (1 - cosine) / 2 between the teacher's integrated gradients per token and the student's "
        "attention scores; 0: none, and none are made",
    )
    attribution_points: int = Field(
        32, ge=1, le=512, description="points of the integral; each is a forward and a backward pass of the teacher"
    )
    attribution_baseline: Literal["mean", "zero"] = Field(
        "mean",
        description="where the integral starts: the mean of all embeddings, or zero as in the paper, "
        "where models with RMS norms turn so fast that it takes more points",
    )

    epochs: float = Field(3.0, gt=0, le=10_000, description="passes over the rows; a part is allowed")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_tokens: int = Field(4096, ge=16, description="padded tokens of one step: each prompt and all answers to it")
    accumulate: int = Field(1, ge=1, description="parts into which a step is cut to save memory")
    max_tokens: int = Field(512, ge=2, description="longest prompt with its longest answer, in tokens")

    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak of the cosine schedule")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps with a rising rate")
    final_lr_ratio: float = Field(0.02, ge=0, le=1, description="the last rate, as a share of the peak")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="as in model.distillation.logits")
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled decay of the matrices")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    average_decay: float = Field(0.0, ge=0, lt=1, description="as in model.distillation.logits; 0: none")

    validation_share: float = Field(0.05, ge=0, lt=1, description="share of the rows held out")
    validation_rows: int = Field(256, ge=0, description="held-out rows at most")
    validations: int = Field(8, ge=1, description="how often the held-out loss is taken")
    patience: int = Field(0, ge=0, description="as in model.distillation.logits; 0: never stop early")
    keep: Literal["best", "last"] = Field("best", description="which weights become the student")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="as in model.distillation.logits")

    @model_validator(mode="after")
    def _fits_together(self) -> ClassifierParams:
        try:
            self.student  # noqa: B018 - made for its checks
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        for prompt in (self.prompt, *self.deeper):
            if prompt.count(SLOT) != 1:
                raise ValueError(f"a prompt needs {SLOT} once, where the row's user message goes; got {prompt!r}")
        if bool(self.deeper) != (self.confidence > 0):
            raise ValueError("deeper and confidence go together: which prompts, and below which confidence")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ValueError("classes needs two labels or more, each once")
        if self.min_confidence and self.unlabelled != "teacher":
            raise ValueError("min_confidence is for unlabelled: teacher")
        return self

    @property
    def student(self) -> LogitsParams:
        """How the student starts, as model.distillation.logits says it."""
        return LogitsParams(**{name: getattr(self, name) for name in _STUDENT})

    @property
    def wants_teacher(self) -> bool:
        """Whether the teacher is asked about the rows."""
        return bool(self.kd_weight or self.attribution_weight or self.unlabelled == "teacher")
