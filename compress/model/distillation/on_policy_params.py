"""Parameters of the ways to distill that let the student write; imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.model.distillation.params import NUMBER_DEFAULTS, NUMBERS, DivergenceName, LogitsParams


class OnPolicyParams(LogitsParams):
    """What every one of them has: steps on answers that are made in training, among steps on the rows given."""

    kd_weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the divergence in steps on the rows given; made answers have no label and learn it alone",
    )
    on_policy_share: float = Field(0.5, ge=0, le=1, description="share of the steps that train on made answers")
    share_schedule: Literal["constant", "adaptive"] = Field(
        "constant",
        description="adaptive: raise the share by 0.1 whenever the held-out loss has risen (DistiLLM); start it at 0",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens of a made answer at most (default: as many as the longest answer given has)"
    )
    prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="so many tokens of a row are the prompt, for texts (default: those before the answer)",
    )
    sample_temperature: float = Field(1.0, gt=0, le=5, description="of the distributions that answers are drawn from")
    rollout_steps: int = Field(
        4, ge=1, le=64, description="steps whose answers are made at once: 1 has the newest student, more are faster"
    )
    collapse: Literal["note", "stop"] = Field(
        "note", description="when made answers are empty, endless or repeat themselves: say so, or stop"
    )

    @model_validator(mode="after")
    def _share_can_move(self) -> OnPolicyParams:
        if self.share_schedule == "adaptive" and not (self.validation_share and self.validation_rows):
            raise ValueError("share_schedule: adaptive needs held-out rows: give validation_share and validation_rows")
        return self


class GkdParams(OnPolicyParams):
    """Generalized KD (Agarwal et al. 2024): the divergence also on the student's own answers."""

    made_divergence: DivergenceName | None = Field(
        "reverse_kl",
        description="the divergence on made answers; null: as on the rows. forward_kl makes the student cover all that "
        "the teacher may write, and its own text worse",
    )
    made_number: float | None = Field(
        None, ge=0, le=1, description="of made_divergence: its beta, skew or reverse_share (default: 0.5, 0.1, 0.5)"
    )
    buffer_rows: int = Field(1024, ge=0, le=1 << 20, description="made answers that are kept for use again; 0: none")
    replay_share: float = Field(
        0.0, ge=0, lt=1, description="share of the steps on made answers that take them from those kept"
    )

    @model_validator(mode="after")
    def _number_belongs(self) -> GkdParams:
        if self.made_number is not None and self.made_divergence not in NUMBERS:
            takes = ", ".join(NUMBERS)
            raise ValueError(f"made_number belongs to made_divergence {takes}; got {self.made_divergence}")
        if self.made_number == 1 and str(self.made_divergence).startswith("skew"):
            raise ValueError("made_number 1 leaves nothing of the student in the mixture: give a skew below 1")
        if self.divergence == "skew_pair" and self.made_divergence not in (None, "skew_pair", "skew_reverse_kl"):
            raise ValueError(f"divergence: skew_pair needs made_divergence: null; got {self.made_divergence}")
        if self.replay_share and not self.buffer_rows:
            raise ValueError("replay_share needs buffer_rows above 0: nothing is kept for use again")
        return self

    def made_rule(self) -> tuple[DivergenceName, float] | None:
        """The divergence on made answers and its number; ``None``: as on the rows."""
        if self.made_divergence is None:
            return None
        usual = {"reverse_share": 0.5, **NUMBER_DEFAULTS}.get(NUMBERS.get(self.made_divergence, ""), 0.0)
        return self.made_divergence, usual if self.made_number is None else self.made_number


class SpeculativeParams(GkdParams):
    """Speculative KD (Xu et al. 2024): the student proposes, the teacher replaces what it finds unlikely."""

    accept_top_k: int = Field(
        25, ge=1, le=1 << 20, description="a proposed token stays when it is among so many likeliest of the teacher"
    )
    block: int = Field(8, ge=1, le=256, description="tokens proposed at a time; changes the speed alone")


class MiniLlmParams(OnPolicyParams):
    """MiniLLM (Gu et al. 2024): reverse KL of whole answers by policy gradient."""

    teacher_mix: float = Field(0.2, ge=0, lt=1, description="the teacher's part in the distribution drawn from")
    discount: float = Field(0.95, gt=0, le=1, description="of the reward of later tokens, per token; 1: none")
    length_normalize: bool = Field(True, description="divide the reward of what follows by its length")
    largest_weight: float = Field(2.0, ge=1, description="importance weights are cut off here")
