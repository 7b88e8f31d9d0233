"""Parameters of the synthesis stages; imports only pydantic, so that a profile is checked without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.context import Params
from compress.data.quality.params import check_weights


class MagpieParams(Params):
    """Requests invented by the teacher from its bare chat template, and answered by it."""

    rows: int = Field(default=1000, ge=1, description="rows to add")
    draws: int | None = Field(
        default=None, ge=1, description="requests to sample at most; empty: ten for every row to add"
    )
    temperature: float = Field(default=1.0, gt=0.0, le=5.0, description="of sampling requests; answers are greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="sample from the likeliest tokens of this mass")
    max_user_tokens: int = Field(default=64, ge=1, description="longest request; one that does not end by then is out")
    max_answer_tokens: int = Field(
        default=128, ge=1, description="longest answer; one that does not end by then is out"
    )
    min_chars: int = Field(default=3, ge=0, description="shortest request in characters")
    answer_format: Literal["any", "json"] = Field(
        default="any", description="json: the answer must parse as one JSON object"
    )
    min_logprob: float = Field(
        default=-0.1, le=0.0, description="the answer's mean log probability per token (nats) must reach this"
    )
    max_similarity: float = Field(
        default=0.9,
        gt=0.0,
        le=1.0,
        description="Jaccard similarity of letter trigrams to a known request with the same numbers from which a new "
        "one is a near duplicate; 1: only equal sets are",
    )
    mix: Literal["free", "uniform", "pool", "weights"] = Field(
        default="free",
        description="shares of the functions among the new rows: free: as they come; uniform: the pool's functions "
        "alike; pool: as in the pool; weights: as given. A function whose share is full is passed over",
    )
    weights: dict[str, float] = Field(default_factory=dict, description="for mix: weights, function -> weight")
    batch_size: int = Field(default=64, ge=1, le=4096, description="requests generated together; results do not change")
    round_size: int = Field(default=256, ge=1, description="requests sampled between two checkpoints")

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        check_weights(self.mix, self.weights)
        if self.mix != "free" and self.answer_format != "json":
            raise ValueError(f"mix: {self.mix} goes by the function in the answer and needs answer_format: json")
        return self


class ImpossibleParams(Params):
    """Pairs of a weak model's samples that say the same in other words."""

    pairs_per_row: int = Field(default=4, ge=0, description="pairs to keep per context at most; 0: the pool as it is")
    samples: int = Field(default=8, ge=2, le=64, description="sentences sampled per context")
    context: str = Field(
        default="Write one sentence about this: {text}", description="what is sampled from; {text} is the row's"
    )
    request: str = Field(
        default="Say this in other words: {text}", description="the new rows' request; {text} is the pair's first side"
    )
    judge: str = Field(
        default='"{premise}" Does it follow that "{claim}"? Answer yes or no.',
        description="asked both ways; {premise} and {claim} are the two sides",
    )
    temperature: float = Field(default=1.0, gt=0.0, le=5.0, description="of the samples; the judge is greedy")
    top_p: float = Field(default=0.9, gt=0.0, le=1.0, description="sample from the likeliest tokens of this mass")
    max_new_tokens: int = Field(default=64, ge=1, description="longest sample; one that does not end is not paired")
    max_judge_tokens: int = Field(default=8, ge=1, description="longest judgement")
    max_overlap: float = Field(default=0.7, ge=0.0, le=1.0, description="most ROUGE-L F1 of the two sides' words")
    min_length_ratio: float = Field(default=0.5, ge=0.0, le=1.0, description="words of the shorter side by the longer")
    min_words: int = Field(default=3, ge=1, description="fewest words of a side")

    @model_validator(mode="after")
    def _placeholders(self) -> Self:
        wanted = {"context": ("{text}",), "request": ("{text}",), "judge": ("{premise}", "{claim}")}
        for name, parts in wanted.items():
            for part in parts:
                if part not in getattr(self, name):
                    raise ValueError(f"{name} must hold {part}")
        return self
