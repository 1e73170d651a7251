"""Text to token ids and back: a question and an answer become a `Generation`, a finished `Generation` a `Correction`.

It knows the tokenizer, the prompt template and the safeguards. It runs nothing: the engine fills the generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aligner_middleware.calibration import Calibration
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.engine import GREEDY, Generation, Prefill, VerdictRule
from aligner_middleware.errors import DoubtError, PromptTooLongError
from aligner_middleware.request import Request
from aligner_middleware.settings import Settings, limits
from aligner_middleware.strength import OnDoubt, Strength
from aligner_middleware.text.checks import check_question, check_text
from aligner_middleware.text.edits import Operation, apply
from aligner_middleware.text.place import tail_length
from aligner_middleware.text.reasoning import set_aside
from aligner_middleware.text.safeguards import doubts
from aligner_middleware.text.targets import encode_target
from aligner_middleware.text.template import (
    VERDICTS,
    PromptTemplate,
    Verdict,
    decode_operations,
    encode_continuation,
    encode_prompt,
    verdict_ids,
)
from aligner_middleware.text.tokenizer import Tokenizer

_ROOM, _ROOM_IN_BYTES = 256, 4096  # tokens that a correction may take beyond the answer, or twice the answer for copies
_CHARACTERS = 32  # for each token of the context; a longer text is refused without being encoded
_UNSTABLE = 8  # last tokens of an unfinished text, which further text may change


class Codec:
    """Encodes pairs for a model, and decodes its corrections. Safe to share between threads.

    Args:
        tokenizer: The model's tokenizer.
        template: The prompt that it was trained with.
        eos_token_ids: Tokens that end a correction.
        max_positions: Context of the model, in tokens.
        settings: How it decodes.
        calibration: Its levels of strength.

    Attributes:
        tokenizer, template, eos_token_ids, settings, calibration: As given.
        verdict_ids: Tokens of keep, edit and rewrite; `None` for an aligner without verdicts.
        copies: Whether an edit is written as a copy of the answer.
        max_characters: Texts longer than this are refused without being encoded.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        eos_token_ids: Sequence[int],
        max_positions: int,
        settings: Settings,
        calibration: Calibration,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.eos_token_ids = frozenset(eos_token_ids)
        self.settings = settings
        self.calibration = calibration
        self.verdict_ids = verdict_ids(tokenizer, template)
        self.max_characters = max_positions * _CHARACTERS
        self.copies = template.mark is None
        self._max_positions, self._tail = max_positions, tail_length(tokenizer, template)
        self._least_room = min(_ROOM, max_positions // 4)  # tokens that operations must have free
        self._end, self._room = eos_token_ids[0], _ROOM if tokenizer.largest_id > 255 else _ROOM_IN_BYTES

    def encode(
        self,
        question: str,
        answer: str,
        prefill: Prefill | None = None,
        *,
        released: str = "",
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
    ) -> Request:
        """Encode a pair.

        Args:
            question: The question.
            answer: Its answer.
            prefill: The part of the prompt that has been prefilled already.
            released: The beginning of the answer that stays, because it has been shown.
            strength: As `Aligner.correct` takes it.
            on_doubt: As `Aligner.correct` takes it.
            instruction: As `Aligner.correct` takes it.

        Raises:
            InputError: If the question is blank, a text is not valid Unicode, or an option cannot be used.
            PromptTooLongError: If the pair does not fit into the context.
        """
        threshold, tolerance = limits(strength, self.calibration, has_verdicts=self.verdict_ids is not None)
        told = self.instruction_for(instruction)
        check_question(question)
        check_text("answer", answer)
        reasoning, text = set_aside(answer)
        if not text.strip():
            return Request(question, answer, told or None, reasoning, text, None, on_doubt)
        self._check_length(question, text)
        prompt = encode_prompt(self.tokenizer, self.template, question, text, told)
        draft = encode_continuation(self.tokenizer, self.template, text)
        generation = Generation(
            prompt,
            draft,
            self._most_new_tokens(question, told, prompt, draft),
            self.settings.sampler(question, answer),
            prefill,
            rule=VerdictRule(*self.verdict_ids, threshold, self.copies) if self.verdict_ids else None,
            tolerance=tolerance,
            verify=self.settings.draft,
            end=self._end,
            stop_loops=True,
        )
        shown = max(0, len(released) - len(reasoning))
        return Request(question, answer, told or None, reasoning, text, generation, on_doubt, shown)

    def instruction_for(self, given: str | None) -> str:
        """Give the instruction of a call that gives this one; see `Settings.instruction_for`."""
        return self.settings.instruction_for(given, self.template)

    def encode_for_evidence(self, question: str, answer: str, instruction: str | None = None) -> Request:
        """Encode a pair to measure the evidence for a correction: greedily, and so that the answer itself is kept."""
        request = self.encode(question, answer, strength=1.0 if self.verdict_ids else math.inf, instruction=instruction)
        if request.generation is not None:
            request.generation.sampler = GREEDY  # a sampled token may not be the best one, which evidence compares with
        return request

    def encode_unfinished(self, question: str, instruction: str | None, answer: str) -> list[int]:
        """Encode the beginning of a prompt whose answer is still being written; `[]` while there is no text of it."""
        text = set_aside(answer)[1]
        if not text.strip():
            return []
        prompt = encode_prompt(self.tokenizer, self.template, question, text, self.instruction_for(instruction))
        return prompt[: -self._tail - _UNSTABLE]

    def encode_targets(
        self, question: str, answer: str, corrections: Sequence[str], instruction: str | None = None
    ) -> tuple[list[int], list[Sequence[int]]]:
        """Encode the prompt of a pair, and its corrections in the form that the model is trained to write.

        Raises:
            InputError: If the question is blank, or a text is not valid Unicode or does not fit into the context.
        """
        check_question(question)
        for text in (answer, *corrections):
            check_text("answer", text)
            self._check_length(question, text)
        prompt = encode_prompt(self.tokenizer, self.template, question, answer, self.instruction_for(instruction))
        targets = [encode_target(self.tokenizer, self.template, self._end, answer, text).ids for text in corrections]
        longest = len(prompt) + max(map(len, targets), default=0)
        if longest > self._max_positions:
            raise PromptTooLongError(longest, self._max_positions)
        return prompt, list(targets)

    def count_tokens(self, text: str, at_most: int | None = None) -> int:
        """Count a text's tokens; see `Aligner.count_tokens`."""
        if at_most is not None and len(text) > at_most * _CHARACTERS:
            return max(at_most + 1, len(text) // _CHARACTERS)
        return len(self.tokenizer.encode(text))

    def longest_answer(self, question: str, instruction: str | None = None) -> int:
        """Give the largest number of tokens that an answer may have; see `Aligner.longest_answer`."""
        self._check_length(question)
        prompt = encode_prompt(self.tokenizer, self.template, question, "", self.instruction_for(instruction))
        room = self._max_positions - len(prompt) - 1
        longest = room // 2 if self.copies else (room - self._least_room) * 3 // 4  # marks and numbers take a third
        if longest < 1:
            raise PromptTooLongError(self.count_tokens(question), self._max_positions, what="the question is")
        return longest

    def _most_new_tokens(self, question: str, instruction: str, prompt: Sequence[int], draft: Sequence[int]) -> int:
        room = self._max_positions - len(prompt) - (self.verdict_ids is not None)
        if room <= (len(draft) if self.copies else self._least_room):
            self.longest_answer(question, instruction)  # raises if the question alone is too long
            raise PromptTooLongError(len(prompt), self._max_positions)
        wanted = self.settings.max_new_tokens or (2 if self.copies else 1) * len(draft) + self._room
        return min(wanted, room)

    def _check_length(self, question: str, text: str = "") -> None:
        """Refuse texts that cannot fit into the context, before they are encoded."""
        both = len(question) + len(text)
        for characters, what in ((len(question), "the question is"), (both, "question and answer are")):
            if characters > self.max_characters:
                least = characters // _CHARACTERS
                raise PromptTooLongError(least, self._max_positions, what=what, characters=characters)

    def decode(self, request: Request) -> Correction:
        """Make a correction of a request whose generation is done.

        Raises:
            DoubtError: If a safeguard objects and `on_doubt` is `raise`.
        """
        if request.generation is None:
            answer, told = request.answer, request.instruction
            return Correction(request.question, answer, answer, "stop", Usage(), instruction=told)
        if self.verdict(request) == "keep":
            return self.conclude(request, request.text, ())
        return self.conclude(request, *self._decode_checked(request, request.generation))

    def conclude(
        self, request: Request, text: str, found: tuple[str, ...], rest: Correction | None = None
    ) -> Correction:
        """Make a correction of a request; see `decode`.

        Args:
            request: The request, done.
            text: The corrected text.
            found: Names of the safeguards that object to it.
            rest: The correction of its rest, where that was corrected alone.
        """
        if found and request.on_doubt == "raise":
            raise DoubtError(found)
        generation, verdict = request.generation, self.verdict(request)
        assert generation is not None
        proposed, usage = request.reasoning + text, self._usage(generation, verdict)
        passed = bool(found) and request.on_doubt == "passthrough"
        return Correction(
            question=request.question,
            original=request.answer,
            corrected=request.answer if passed else proposed,
            finish_reason=(rest or generation).finish_reason or "stop",
            usage=usage + rest.usage if rest else usage,
            verdict=verdict,
            score=None if generation.log_odds is None else self.calibration.score(generation.log_odds),
            doubts=found,
            proposed=proposed if passed else None,
            instruction=request.instruction,
            released=len(request.reasoning) + request.released if request.released else 0,
            late=self._late(request, generation, verdict),
        )

    def verdict(self, request: Request) -> Verdict | None:
        """Give the verdict of a request, once its generation has one."""
        given = request.generation and request.generation.verdict
        return None if given is None or self.verdict_ids is None else VERDICTS[self.verdict_ids.index(given)]

    def _usage(self, generation: Generation, verdict: Verdict | None) -> Usage:
        drafted = self.settings.draft and (verdict is None or (verdict == "edit" and self.copies))
        return Usage(
            prompt_tokens=len(generation.prompt),
            draft_tokens=len(generation.draft) if drafted else 0,
            accepted_tokens=generation.accepted,
            decoded_tokens=len(generation.tokens) - generation.accepted,
            passes=generation.passes,
            seconds=generation.seconds,
        )

    def _decode_checked(self, request: Request, generation: Generation) -> tuple[str, tuple[str, ...]]:
        """Give the corrected text of a generation, and the safeguards that object to it."""
        text, names = request.text, list[str]()
        try:
            text = self._decode_text(request, generation, self.verdict(request))
        except ValueError:
            names.append("operations")
        names += doubts(request.text, text, cut_off=generation.finish_reason == "length", question=request.question)
        if generation.finish_reason == "loop" and "repeats" not in names:
            names.append("repeats")
        return text, tuple(names)

    def operations(self, generation: Generation, after: int = 0) -> list[Operation]:
        """Give the operations of an edit that is done, on sentences after this one; raises ValueError if it has none."""
        found = decode_operations(self.tokenizer, self.template, generation.tokens)
        return [one for one in found if one.sentence > after]

    def _late(self, request: Request, generation: Generation, verdict: Verdict | None) -> int:
        """Count the released sentences that the verdict on the whole would change."""
        count = request.released_sentences if verdict != "keep" else 0
        if count and verdict == "edit" and not self.copies:
            try:
                return sum(one.sentence <= count for one in self.operations(generation))
            except ValueError:
                return 0
        return count

    def _decode_text(self, request: Request, generation: Generation, verdict: Verdict | None) -> str:
        """Give the corrected text of a generation.

        Raises:
            ValueError: If its tokens should be operations on the answer's sentences and are not.
        """
        if verdict == "edit" and not self.copies:
            return apply(request.text, self.operations(generation, request.released_sentences))
        # Not every tokenizer decodes a text to the same text: an unchanged answer is not decoded.
        if generation.tokens == list(encode_continuation(self.tokenizer, self.template, request.text)):
            return request.text
        text = self.tokenizer.decode(generation.tokens)
        return text.strip() if verdict == "rewrite" else text  # a new text may begin with a space
