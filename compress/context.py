"""What a stage is given and gives back; shared by every stage of every package.

`Params` is the base of all stage parameter models, `StageContext` what a stage function receives beside
them, `StageResult` what it returns. Knows nothing of profiles, of the store's layout, or of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.teachers import Teacher


class Params(BaseModel):
    """Base of every stage's parameters: unknown keys are errors, values are immutable and not coerced.

    ``tokenizer_folders`` names those parameters that are folders of a tokenizer: an artifact's key holds what is in
    the folder and not where it is.
    """

    tokenizer_folders: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @property
    def extras(self) -> Mapping[str, str]:
        """Optional packages that these values need: the extra, and the parameter that asks for it."""
        return {}


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may look at. A stage reads ``inputs``, writes into ``out``, and nothing else.

    Attributes:
        name: ``stage.method`` as in the profile, e.g. ``data.selection.dedup``; the reason rows are dropped under.
        inputs: slot name -> artifact folder (read only). Slots: ``data`` ``model`` ``test`` ``reference``
            ``bundle`` ``evaluation`` ``bench``. Only the slots that the stage's table line reads are present.
        out: empty folder; what is in it when the function returns becomes the artifact. Never returned if it raises.
        work: scratch folder of this very artifact key; survives ``kill -9``, deleted after the commit.
            Long stages checkpoint here and resume from what they find.
        seed: seed of this step; the only source of randomness.
        teacher: loaded on first use; ``None`` when the table line does not say that the stage uses it.
        teachers: those of the profile's ``teachers`` that the parameters name, by name; loaded on first use.
        target: the device's facts (``deploy.targets.Target``) or ``None``.
        threads: CPU threads to use, of all processes together.
        processes: those that train together; 1: this one alone.
        sharding: ``full``: each of them holds its part of a student's weights and of what training adds to them;
            ``none``: all of it.
        lineage: the ``steps`` that led to the inputs and their ``origins``, JSON values that follow from the key; empty
            where a stage runs alone.
        progress: progress bars and plain lines.
    """

    name: str
    inputs: Mapping[str, Path]
    out: Path
    work: Path
    seed: int
    progress: Progress
    teacher: Teacher | None = None
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    target: Any = None
    threads: int = 2
    processes: int = 1
    sharding: Literal["none", "full"] = "none"
    lineage: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class StageResult:
    """Figures for the run record, JSON values only.

    Data stages give ``rows_in``, ``rows_out`` and ``dropped`` (reason -> count). Model stages give
    ``parameters``. ``notes`` tell the user what gave way (a fallback is never silent).
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
