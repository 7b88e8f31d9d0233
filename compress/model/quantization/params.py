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
    grid: Literal["uniform", "nf3"] = Field(
        default="uniform",
        description="levels of 3-bit weights: evenly spaced, or nf3, spaced as a normal distribution's quantiles and "
        "moved to integers of the 4-bit code in which 3 bits are stored; needs sym",
    )
    rotate: Literal["none", "heads", "full"] = Field(
        default="none",
        description="turn the model into a basis in which outliers are spread out, before all else; the outputs stay. "
        "heads: within the attention heads; full: the residual stream too, which unties a tied head",
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
    correction_damp: float | None = Field(
        default=0.1,
        gt=0,
        description="let each linear make up for what the quantized layers before it changed (GPTAQ): damping of that "
        "least-squares fit as a fraction of the Hessian's mean diagonal; null: no correction, half the memory",
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
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="number format of the calibration's products; auto: bf16 where the machine has it and the model is "
        "wide enough to gain",
    )


class AwqParams(GptqParams):
    """AWQ: finer weights for the inputs that are large, by scales that the operation before takes back."""

    clip_steps: int = Field(
        default=20,
        ge=0,
        le=200,
        description="clips tried per group for the least change of the outputs; 0: the full range. With rounding gptq "
        "as there",
    )
    clip_attention: bool = Field(
        default=True, description="clip q and k too; false as in the paper's code, measured worse. For rounding nearest"
    )
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest", description="how the scaled weights are rounded; gptq joins both methods"
    )
    grid_points: int = Field(
        default=20, ge=1, le=100, description="exponents tried per input, 0 to below 1; 1: none but 0, so no scales"
    )


class MixedParams(GptqParams):
    """GPTQ with bits chosen per part of the model, for the least divergence under a budget of bytes."""

    budget_bits: float | None = Field(
        default=None, gt=1, le=16, description="mean bits of a linear's weight, scales counted; or give budget_bytes"
    )
    budget_bytes: int | None = Field(
        default=None,
        ge=1,
        description="of all weights, embedding and head included; with neither, what the target's storage and a third "
        "of its memory hold",
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

    @property
    def likely_bits(self) -> int:
        """Bits of most weights, as far as the parameters tell before anything is measured."""
        if self.budget_bits is None:
            return min(self.candidates)
        return max((bits for bits in self.candidates if bits <= self.budget_bits), default=min(self.candidates))

    @model_validator(mode="after")
    def _chooses_itself(self) -> MixedParams:
        if self.overrides or self.ignore:
            raise ValueError("overrides and ignore are for the other methods: mixed chooses bits for every linear")
        if self.grid != "uniform":
            raise ValueError("grid nf3 is for the other methods: mixed compares widths on the uniform grid")
        if self.budget_bits is not None and self.budget_bytes is not None:
            raise ValueError("budget_bits and budget_bytes are both given; one budget counts")
        return self


class QatParams(GptqParams):
    """Training through the rounding, towards the model before it was rounded; starts from codes of another method."""

    bits: Literal[2, 3, 4, 8] = Field(default=2, description="as in model.quantization.gptq")
    sym: bool = Field(default=False, description="as in model.quantization.gptq; the rules other than affine need true")
    rule: Literal["auto", "affine", "lsq", "elastic", "ternary"] = Field(
        default="auto",
        description="how a weight is rounded and what its gradient is. affine: EfficientQAT's, with a zero point; lsq: "
        "symmetric; auto: affine without sym, else lsq. Of 2-bit parts, ParetoQ's grids without a zero: elastic, "
        "which can only be stored in 4 bits, or with three levels: ternary",
    )
    start: Literal["gptq", "clip", "rtn"] = Field(
        default="gptq",
        description="codes to start from: those of GPTQ, which alone has correction_damp, of BitDistiller's asymmetric "
        "clip, or of rounding to nearest; "
        "elastic and ternary have a rounding of their own and take clip or rtn as that with or without a clip search",
    )
    clip_qk: bool = Field(default=False, description="start: clip also clips q_proj and k_proj, as the paper does not")
    teacher: Literal["self", "pipeline"] = Field(
        default="self", description="whom to learn from: the model before rounding, or the profile's teacher"
    )
    loss: Literal["cakld", "kl", "ce"] = Field(
        default="kl",
        description="kl: KL(teacher || student); cakld: that and its reverse, weighted by the teacher's confidence "
        "(BitDistiller); ce: the labels alone. On stories kl gave the lowest perplexity",
    )
    confidence: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of KL(student || teacher) in cakld; left out: the mean probability that the teacher gives "
        "the targets of some training rows",
    )
    temperature: float = Field(default=1.0, gt=0, le=20, description="softens both sides of the divergence")
    learn: Literal["answer", "all"] = Field(
        default="answer", description="which tokens are targets: the answers, or all tokens, user turns included"
    )
    targets: Literal["cache", "online"] = Field(
        default="online", description="run the teacher in every step, or once and store what it says"
    )
    top_k: int = Field(default=32, ge=1, le=1 << 16, description="entries of the cache per token")

    block_steps: int = Field(
        default=0,
        ge=0,
        description="steps that train each decoder layer alone towards its own outputs before all are trained "
        "(EfficientQAT's first phase); 0: none",
    )
    block_learning_rate: float = Field(default=1e-3, gt=0, le=1, description="its peak")
    train_zero: bool = Field(default=True, description="block steps move zero points too (rule affine without sym)")
    steps: int = Field(default=400, ge=0, description="steps that train the whole model; 0: none")
    batch_tokens: int = Field(default=4096, ge=16, description="padded tokens of one step")
    accumulate: int = Field(default=1, ge=1, description="parts into which a step is cut to save memory")
    learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="peak of the cosine schedule; a short run at 2 bits gains by 3e-3"
    )
    warmup_ratio: float = Field(default=0.05, ge=0, le=1, description="share of the steps with a rising rate")
    final_lr_ratio: float = Field(default=0.02, ge=0, le=1, description="the last rate, as a share of the peak")
    optimizer: Literal["adamw", "muon"] = Field(default="adamw", description="as in model.distillation.logits")
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    train_norms: bool = Field(default=True, description="train norms and biases along with the weights; costs no bytes")
    scale_steps: int = Field(
        default=0, ge=0, description="last steps that train the scales alone, codes fixed (EfficientQAT); 0: none"
    )
    scale_learning_rate: float = Field(default=3e-4, gt=0, le=1, description="their peak")
    validation_share: float = Field(default=0.05, ge=0, lt=1, description="share of the rows held out")
    validation_rows: int = Field(default=128, ge=0, description="held-out rows at most")
    validations: int = Field(default=4, ge=1, description="how often the held-out loss is taken")
    keep: Literal["best", "last"] = Field(default="best", description="which weights are kept")

    @model_validator(mode="after")
    def _has_a_grid(self) -> QatParams:
        if self.grid != "uniform":
            raise ValueError("grid nf3 is for the other methods: no rule of qat trains its levels")
        usual = QatParams.model_fields["correction_damp"].default
        if self.start != "gptq" and self.correction_damp not in (None, usual):
            raise ValueError(f"correction_damp is a part of GPTQ: leave it out with start {self.start}")
        if self.rule in ("lsq", "elastic", "ternary") and not self.sym:
            raise ValueError(f"rule {self.rule} has a symmetric grid: set sym: true, or rule: affine")
        if self.rule in ("elastic", "ternary"):
            if self.bits != 2:
                raise ValueError(f"rule {self.rule} is for 2 bits, not {self.bits}: set bits: 2, or rule: auto")
            if self.start == "gptq":
                raise ValueError(f"rule {self.rule} has a grid that GPTQ does not know: set start: clip or rtn")
        return self

    def rule_of(self, bits: int, *, sym: bool) -> Rule:
        """Return the rule of a linear with a grid of ``bits``; the 2-bit rules leave those of other bits to auto."""
        if self.rule == "affine" or (self.rule in ("elastic", "ternary") and bits == 2):
            return self.rule
        return "lsq" if sym else "affine"
