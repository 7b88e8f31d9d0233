"""Parameters of distillation between different tokenizers; imports neither torch nor transformers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.context import Params

SIZES = ("layers", "heads", "kv_heads", "head_dim", "ffn", "hidden")
BELONGS = {
    "alm_temperature": "alm", "debias": "alm", "debias_threshold": "alm", "gold_unmatched": "gold", "uld_pairs": "uld",
    "top_k": "spelled",
}  # fmt: skip


class CrossTokenizerParams(Params):
    """Distillation across tokenizers: loss = (1 - kd_weight) * CE + kd_weight * the cross loss per aligned chunk."""

    tokenizer_folders: ClassVar[tuple[str, ...]] = ("tokenizer",)

    init: Literal["checkpoint", "scratch"] = Field(
        "checkpoint", description="how the student starts: the checkpoint before this step, or random weights"
    )
    tokenizer: str | None = Field(
        None, description="for init: scratch, the folder with the student's tokenizer.json; its contents are in the key"
    )
    layers: int | None = Field(None, ge=1, description="for init: scratch, layers (default: the teacher's)")
    heads: int | None = Field(None, ge=1, description="attention heads (default: the teacher's)")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads (default: the teacher's)")
    head_dim: int | None = Field(None, ge=2, multiple_of=2, description="size of a head (default: the teacher's)")
    ffn: int | None = Field(None, ge=1, description="feed-forward width (default: the teacher's)")
    hidden: int | None = Field(None, ge=1, description="hidden size (default: the teacher's)")

    loss: Literal["spelled", "alm", "gold", "uld"] = Field(
        "spelled",
        description="spelled: the teacher's next token, summed up to what the student's next token may be, for a "
        "student whose tokens are pieces of the teacher's, such as bytes; alm: likelihoods of chunks that spell the "
        "same bytes; gold: distributions where such chunks begin, common tokens by KL, the rest sorted; uld: sorted "
        "distributions alone",
    )
    kd_weight: float = Field(0.5, ge=0, le=1, description="share of the cross loss; 0 learns the labels alone")
    alm_temperature: float = Field(
        100.0, gt=0, le=1e4, description="of alm: the chunks' probabilities to the power of one over it"
    )
    debias: bool = Field(
        True,
        description="of alm: join chunks until the teacher expects a new word, and count the probability of one; "
        "else the chunk `walk` of a teacher stands against `walk...` of a student of bytes",
    )
    debias_threshold: float = Field(
        0.1, gt=0, le=1, description="of alm: the teacher's probability of a new word at which a chunk may end"
    )
    gold_unmatched: float = Field(1.0, ge=0, description="of gold: weight of the sorted rest beside the KL")
    uld_pairs: Literal["aligned", "index"] = Field(
        "aligned",
        description="of uld: which positions are compared: where aligned chunks begin, or the first with the first, as "
        "in the paper, to the end of the shorter answer",
    )
    targets: Literal["cache", "online"] = Field(
        "cache",
        description="of spelled and alm: store what the teacher says, or run it in every step; the other losses always "
        "run it. alm takes 4 bytes a chunk, 8 with debias",
    )
    top_k: int = Field(
        32, ge=1, le=1 << 16, description="of spelled: entries per token in the cache; the mass of all others is stored"
    )

    epochs: float = Field(3.0, gt=0, le=10_000, description="passes over the rows; a part is allowed")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_tokens: int = Field(4096, ge=16, description="padded tokens of the student in one optimizer step")
    accumulate: int = Field(1, ge=1, description="parts into which a step is cut to save memory")
    max_tokens: int = Field(512, ge=2, description="longest row in the student's tokens")
    teacher_max_tokens: int | None = Field(
        None, ge=2, description="longest row in the teacher's tokens (default: max_tokens)"
    )
    truncate: bool = Field(False, description="cut longer rows instead of refusing them; what both keep is aligned")

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
    keep: Literal["best", "last"] = Field("best", description="which weights become the student")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="as in model.distillation.logits")

    @model_validator(mode="after")
    def _fits_together(self) -> CrossTokenizerParams:
        if self.init == "checkpoint" and (self.sizes or self.tokenizer is not None):
            raise ValueError("init: checkpoint takes the student as it is: give no sizes and no tokenizer")
        if self.init == "scratch" and self.tokenizer is None:
            raise ValueError("init: scratch needs tokenizer, the folder of the student's tokenizer")
        return self

    @model_validator(mode="after")
    def _belongs_to_the_loss(self) -> CrossTokenizerParams:
        for name, loss in BELONGS.items():
            default = type(self).model_fields[name].default
            if self.loss != loss and getattr(self, name) != default:
                raise ValueError(f"{name} belongs to loss {loss}; got loss {self.loss}")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}
