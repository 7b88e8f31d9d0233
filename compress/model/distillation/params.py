"""Parameters of the distillation stage; imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.context import Params

SIZES = ("layers", "heads", "kv_heads", "head_dim", "ffn", "hidden")
DEFAULT_RATIO = 0.5
TOP_K, SAMPLES = 32, 12
DivergenceName = Literal["forward_kl", "reverse_kl", "cakld", "jsd", "skew_kl", "skew_reverse_kl", "skew_pair"]
# which parameter is a divergence's number, and what it is when left out (cakld: the teacher's confidence, measured)
NUMBERS = {"cakld": "reverse_share", "jsd": "beta", "skew_kl": "skew", "skew_reverse_kl": "skew", "skew_pair": "skew"}
NUMBER_DEFAULTS = {"beta": 0.5, "skew": 0.1}


class LogitsParams(Params):
    """Distillation on the teacher's logits: loss = (1 - kd_weight) * CE + kd_weight * temperature^2 * divergence."""

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

    lora_rank: int = Field(
        0,
        ge=0,
        le=1024,
        description="train adapters of this rank instead of the weights, merged in the end; 0: the weights. Needs the "
        "extra lora and a higher learning_rate",
    )
    lora_alpha: float | None = Field(
        None, gt=0, le=1e4, description="of lora_rank: adapters count lora_alpha / lora_rank (default: twice the rank)"
    )
    lora_targets: Literal["all", "attention", "ffn"] | None = Field(
        None, description="of lora_rank: which of the layers' linears get an adapter (default: all)"
    )

    epochs: float = Field(3.0, gt=0, le=10_000, description="passes over the rows; a part is allowed")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_tokens: int = Field(4096, ge=16, description="padded tokens of one optimizer step")
    accumulate: int = Field(1, ge=1, description="parts into which a step is cut to save memory")
    activation_checkpointing: bool = Field(
        False, description="compute each layer again on the way back instead of keeping what is in it: less memory"
    )
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

    kd_weight: float = Field(0.5, ge=0, le=1, description="share of the divergence; 0 learns the labels alone")
    divergence: DivergenceName = Field(
        "forward_kl",
        description="of teacher and student: forward_kl is KL(teacher, student), reverse_kl the other way round, "
        "cakld both by reverse_share, jsd Jensen-Shannon by beta, skew_kl and skew_reverse_kl those against a mixture "
        "by skew, skew_pair the first in the teacher's text and the second in the student's; logs tell forward_kl too",
    )
    beta: float | None = Field(
        None, ge=0, le=1, description="of jsd: 0 is forward_kl, 1 reverse_kl (default: 0.5, symmetric)"
    )
    skew: float | None = Field(
        None, ge=0, lt=1, description="of skew_*: how much of its other side the mixture holds (default: 0.1)"
    )
    reverse_share: float | None = Field(
        None, ge=0, le=1, description="of cakld: share of reverse_kl (default: the teacher's confidence in the answers)"
    )
    adaptive_skew: bool = Field(
        False, description="of skew_*: rows nearer to the teacher get less skew; costs a second product with the head"
    )
    student_weight: float = Field(
        1.0, ge=0, le=2, description="of skew_pair: weight b in text of the student; that of the teacher has 2 - b"
    )
    student_source: str | None = Field(
        None, min_length=1, description="of skew_pair: rows of this source have answers that the student wrote"
    )
    hidden_weight: float = Field(
        0.0, ge=0, description="weight of the projected hidden states' relative squared error; needs targets: online"
    )
    attention_weight: float = Field(
        0.0, ge=0, description="weight of the KL of attention, through a mix of heads; needs targets: online"
    )
    feature_layers: Literal["all", "last"] = Field(
        "all", description="which of the student's layers hidden_weight and attention_weight compare"
    )
    learn: Literal["answer", "all"] = Field(
        "answer",
        description="which tokens are targets: the answers, or all tokens, the user's turns included; a teacher that "
        "was trained on user turns then says far more with every row",
    )
    temperature: float = Field(1.0, gt=0, le=20, description="softens both sides of the divergence")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over the vocabulary")
    targets: Literal["cache", "online"] = Field(
        "cache", description="run the teacher once and store what it says, or run it in every step"
    )
    codec: Literal["topk", "sample"] = Field(
        "topk",
        description="what the cache keeps of a distribution. topk: the likeliest tokens and the mass of all others; "
        "sample: tokens drawn from it, with counts: fewer bytes, and the right gradient on average",
    )
    top_k: int = Field(
        TOP_K, ge=1, le=1 << 16, description="codec topk: entries per token; the mass of all others is stored too"
    )
    samples: int = Field(SAMPLES, ge=1, le=255, description="codec sample: draws per token, at most 3 bytes each")
    mixture: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=dict,
        description="whom to learn from: weights of teachers by their names in the profile's teachers, and teacher for "
        "the profile's own; their probabilities are mixed. Left out: the profile's own alone",
    )
    routing: Literal["fixed", "loss", "entropy", "column"] = Field(
        "fixed",
        description="weights per row. loss: heavier where a teacher's loss on the labels is lower; entropy: where it "
        "is surer; column: as the row says in routing_column. All on top of the weights of mixture",
    )
    routing_temperature: float = Field(
        0.1, gt=0, le=100, description="routing by loss or entropy: nats per token that make a weight e times smaller"
    )
    routing_column: str | None = Field(
        None,
        pattern=r"^(source|label|meta\.[^.]+(\.[^.]+)*)$",
        description="routing by column: source, label or meta.KEY of a row: a teacher's name, or names with weights",
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
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets is not None):
            raise ValueError("lora_alpha and lora_targets belong to adapters: give lora_rank above 0 too")
        if self.lora_rank and self.init == "scratch":
            raise ValueError("lora_rank adapts weights that have learned something: init: scratch has none")
        return self

    @model_validator(mode="after")
    def _targets_fit_together(self) -> LogitsParams:
        if self.codec == "sample" and self.targets == "online":
            raise ValueError("codec: sample is how a cache is stored; with targets: online there is none")
        if self.codec == "sample" and self.top_k != TOP_K:
            raise ValueError("top_k is for codec: topk; with codec: sample give samples")
        if self.codec == "topk" and self.samples != SAMPLES:
            raise ValueError("samples is for codec: sample; with codec: topk give top_k")
        if self.codec == "sample" and self.divergence != "forward_kl":
            raise ValueError(
                f"codec: sample needs divergence forward_kl, which draws do not bias; got {self.divergence}"
            )
        if self.mixture and not any(self.mixture.values()):
            raise ValueError("mixture gives every teacher the weight 0")
        if self.mixture and (self.hidden_weight or self.attention_weight):
            raise ValueError("hidden_weight and attention_weight need the profile's own teacher alone, without mixture")
        if self.mixture and self.number is None:
            raise ValueError("cakld with mixture: give reverse_share; the confidence is measured of one teacher")
        if self.routing != "fixed" and len(self.voices) < 2:
            raise ValueError(f"routing: {self.routing} is between teachers: name at least two in mixture")
        if (self.routing == "column") != (self.routing_column is not None):
            raise ValueError("routing: column and routing_column go together")
        return self

    @property
    def voices(self) -> dict[str, float]:
        """The teachers that count, and their weights; ``teacher`` is the profile's own."""
        return {name: weight for name, weight in (self.mixture or {"teacher": 1.0}).items() if weight}

    @model_validator(mode="after")
    def _loss_fits_together(self) -> LogitsParams:
        for name in sorted({*NUMBERS.values()}):
            takes = [kind for kind, number in NUMBERS.items() if number == name]
            if getattr(self, name) is not None and self.divergence not in takes:
                raise ValueError(f"{name} belongs to divergence {', '.join(takes)}; got divergence {self.divergence}")
        if self.adaptive_skew and (NUMBERS.get(self.divergence) != "skew" or not self.number):
            raise ValueError(f"adaptive_skew needs a divergence with a skew above 0; got {self.divergence}")
        if self.adaptive_skew and self.accumulate > 1:
            raise ValueError("adaptive_skew looks at all rows of a step: accumulate must be 1")
        if self.patience and not (self.validation_share and self.validation_rows):
            raise ValueError("patience needs held-out rows: give validation_share and validation_rows")
        if self.divergence != "skew_pair" and (self.student_weight != 1.0 or self.student_source is not None):
            raise ValueError(f"student_weight and student_source belong to skew_pair; got divergence {self.divergence}")
        if self.student_source is not None and self.kd_weight != 1:
            raise ValueError("rows that the student wrote are no labels: student_source needs kd_weight: 1")
        if (self.hidden_weight or self.attention_weight) and self.activation_checkpointing:
            raise ValueError("activation_checkpointing keeps no layer's states, which hidden_weight compares: give one")
        if (self.hidden_weight or self.attention_weight) and self.targets != "online":
            raise ValueError("hidden_weight and attention_weight need targets: online; the cache holds logits alone")
        return self

    @property
    def number(self) -> float | None:
        """The divergence's number; ``None`` where it is to be measured."""
        name = NUMBERS.get(self.divergence)
        if name is None:
            return 0.0
        given: float | None = getattr(self, name)
        return NUMBER_DEFAULTS.get(name) if given is None else given

    @property
    def extras(self) -> Mapping[str, str]:
        """Adapters need peft."""
        return {"lora": "lora_rank"} if self.lora_rank else {}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}
