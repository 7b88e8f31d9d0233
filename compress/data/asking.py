"""Asks a teacher for answers and keeps each as soon as it is there, so that nothing is asked, or paid for, twice.

`Asker.answers` is all: a stage that was killed, interrupted or refused asks for what is missing alone. An endpoint's
answers are kept one by one; those of a local model chunk by chunk, since what a batch gives may hang on its company in
the last digit. Knows nothing of what answers are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compress.context import StageContext
from compress.data.turns import Message
from compress.endpoint import Refused, Reply, Unanswered
from compress.errors import UserError
from compress.journal import Journal
from compress.teachers import EndpointTeacher, Teacher

NOTES = "notes"  # the journal's entry for what the server was found not to take


class Asker:
    """The answers of the stage's teacher, kept under ``ctx.work``; `notes` tells what the user should know."""

    def __init__(self, ctx: StageContext) -> None:
        """Open what is kept.

        Raises:
            UserError: there is no teacher.
        """
        if ctx.teacher is None:
            raise UserError(ctx.name, "needs a teacher, but the profile names none", "", "Set teacher in the profile")
        self.teacher: Teacher = ctx.teacher
        self._ctx = ctx
        self._journal = Journal(ctx.work, "answers")
        self._used = self._unsure = self._without = self._thought = 0

    def answers(self, conversations: Sequence[Sequence[Message]], *, place: str, **settings: Any) -> list[Reply]:
        """One reply per conversation, in order; ``settings`` go to the teacher.

        ``place`` names the call: the same one must stand for the same conversations and settings.

        Raises:
            UserError, EdgestillError: as the teacher's ``answer``; what came before is kept.
        """
        keys = [f"{place}/{at}" for at in range(len(conversations))]
        missing = [at for at, key in enumerate(keys) if key not in self._journal]
        if missing and not isinstance(self.teacher, EndpointTeacher):
            missing = list(range(len(keys)))
        if missing:
            self._ask([conversations[at] for at in missing], [keys[at] for at in missing], settings)
        replies = [_reply(self._journal.get(key)) for key in keys]
        self._count(replies)
        return replies

    def _ask(self, conversations: Sequence[Sequence[Message]], keys: Sequence[str], settings: dict[str, Any]) -> None:
        def keep(at: int, reply: Reply) -> None:
            self._journal.put(keys[at], _kept(reply))

        try:
            found = self.teacher.answer(conversations, keep=keep, **settings)
        except (Refused, Unanswered) as error:
            self._keep_notes()
            count = len(self._journal) - (NOTES in self._journal)
            if not count:
                raise
            more = "answer is kept" if count == 1 else "answers are kept"
            raise error.adding(f"{count} {more}; the same command asks for the others alone") from None
        finally:
            self._keep_notes()
            self._journal.sync()
        for key, reply in zip(keys, found, strict=True):
            if key not in self._journal:
                self._journal.put(key, _kept(reply))

    def _keep_notes(self) -> None:
        told = self.teacher.notes if isinstance(self.teacher, EndpointTeacher) else []
        kept = self._journal.get(NOTES) or []
        if set(told) - set(kept):
            self._journal.put(NOTES, list(dict.fromkeys([*kept, *told])))

    def _count(self, replies: Sequence[Reply]) -> None:
        self._used += len(replies)
        self._unsure += sum(not math.isfinite(reply.mean_logprob) for reply in replies)
        self._thought += sum(reply.thoughts for reply in replies)
        self._without += sum(reply.thoughts and not reply.finished for reply in replies)

    def notes(self, *, confidence: bool = False) -> list[str]:
        """What gave way; ``confidence``: the stage looks at how sure the teacher is."""
        found = list(self._journal.get(NOTES) or [])
        if confidence and self._used and self._unsure == self._used:
            found.append(
                "the teacher gives no log-probabilities of its answers: how sure it is of them is not known, and none "
                "is taken for a contradiction"
            )
        if self._thought:
            found.append(
                f"{self._thought} of {self._used} replies held thoughts, which were taken out; {self._without} of them "
                "came to no answer" + (": raise the limit on new tokens" if self._without else "")
            )
        return found


def _kept(reply: Reply) -> list[Any]:
    mean = reply.mean_logprob if math.isfinite(reply.mean_logprob) else None
    return [reply.text, mean, reply.finished, reply.thoughts]


def _reply(kept: Any) -> Reply:
    text, mean, finished, thoughts = kept
    return Reply(text, math.nan if mean is None else mean, finished, thoughts)
