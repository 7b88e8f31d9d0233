"""Parameters of the quality stages; imports only pydantic, so that a profile is checked without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.context import Params


def check_weights(mix: str, weights: dict[str, float]) -> None:
    """Raise ValueError unless ``weights`` is given exactly with ``mix: weights`` and holds usable shares."""
    if (mix == "weights") != bool(weights):
        raise ValueError("weights and mix: weights go together: set both or neither")
    if any(weight < 0 for weight in weights.values()) or (weights and not sum(weights.values()) > 0):
        raise ValueError("weights must be 0 or more, and one of them above 0")


class MislabelParams(Params):
    """Rows whose answer the teacher contradicts (after RobustFT and CLEAR)."""

    action: Literal["drop", "relabel"] = Field(
        default="drop", description="drop the row, or give it the teacher's own answer where that is confident"
    )
    min_margin: float = Field(
        default=3.0,
        ge=0.0,
        description="nats by which the teacher prefers another token somewhere in the answer, from which its "
        "disagreement counts; 3 means 20 times likelier",
    )
    max_mean_logprob: float = Field(
        default=0.0,
        le=0.0,
        description="rows whose answer has a higher mean log probability per token stay all the same; 0: no limit",
    )
    same_call: bool = Field(
        default=True,
        description="before a row goes, generate the teacher's answer; equal JSON in another layout is no disagreement",
    )
    entropy_gate: Literal["limit", "median"] = Field(
        default="limit",
        description="which new answers are confident: mean negative log probability at most max_entropy, or at most "
        "the median of all new answers (RobustFT)",
    )
    max_entropy: float = Field(
        default=0.1, ge=0.0, description="nats per token, for entropy_gate: limit; also for a teacher that only answers"
    )
    max_tokens: int = Field(default=512, ge=8, description="longer rows are cut for scoring")
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer that the teacher gives")


class StabilizeParams(Params):
    """The mix of groups, brought towards a wanted one."""

    by: Literal["function", "label", "cluster"] = Field(
        default="function",
        description="function: the name in the answer's JSON object; label: the row's label; cluster: k-means",
    )
    mix: Literal["reference", "uniform", "weights"] = Field(
        default="reference",
        description="the wanted mix: that of the reference rows, equal shares (none for rows without a function or "
        "label), or weights",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="for mix: weights, group -> weight; groups that are not named get none"
    )
    tempering: float = Field(
        default=1.0,
        ge=0.0,
        le=4.0,
        description="power of the wanted shares: 1 as they are, 0 uniform, between: flatter",
    )
    smoothing: float = Field(
        default=0.5,
        ge=0.0,
        description="rows added to every group's count in the reference, so that a group which a small reference "
        "happens to lack is not wiped out; 0: it is",
    )
    rows: int | None = Field(default=None, ge=1, description="rows wanted in all; empty: as many as came in")
    max_repeat: int = Field(default=3, ge=1, le=100, description="how often a row may stand in the result; 1: once")
    keep: Literal["random", "diverse", "score"] = Field(
        default="random", description="which rows of a group with too many stay: by seed, farthest apart, or best score"
    )
    score: str = Field(
        default="",
        description="for keep: score, which one, as STAGE.KEY such as data.selection.ifd.ratio; highest wins",
    )
    clusters: int = Field(default=16, ge=2, le=4096, description="for by: cluster, how many")
    embedding: Literal["hashed", "teacher"] = Field(
        default="hashed",
        description="for cluster and diverse: TF-IDF of hashed n-grams, or the teacher's hidden states",
    )
    max_tokens: int = Field(default=512, ge=8, description="longer rows are cut for the teacher's embedding")

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        check_weights(self.mix, self.weights)
        if (self.keep == "score") != bool(self.score):
            raise ValueError("score and keep: score go together: set both or neither")
        return self
