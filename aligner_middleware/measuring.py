"""What can be measured with an aligner, beside its corrections: tokens, likelihoods, evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aligner_middleware.corrector import Corrector
from aligner_middleware.text.checks import check_text


class Measuring(Corrector):
    """A corrector that counts an answer's tokens, and says how likely corrections are."""

    def count_tokens(self, text: str, at_most: int | None = None) -> int:
        """Count the tokens of a text, as this aligner reads it.

        Args:
            text: The text.
            at_most: A text that must have more than these is not counted: some number above is given.

        Raises:
            InputError: If it holds a lone surrogate.
        """
        check_text("text", text)
        return self._codec.count_tokens(text, at_most)

    def longest_answer(self, question: str, instruction: str | None = None) -> int:
        """Say how many tokens an answer to this question may have: a copy must fit into the context beside it.

        Args:
            question: The question.
            instruction: As `correct` takes it.

        Raises:
            InputError: If the question holds a lone surrogate.
            PromptTooLongError: If it leaves no room for any.
        """
        check_text("question", question)
        return self._codec.longest_answer(question, instruction)

    def log_likelihood(
        self, question: str, answer: str, corrections: Sequence[str], instruction: str | None = None
    ) -> list[tuple[float, bool]]:
        """Say how likely each of some texts is as the correction of an answer: log μ(y_c | y_o, x), paper section 2.

        An aligner with verdicts can write some texts in several forms; the one that it is trained on counts.

        Args:
            question: The question, x.
            answer: The answer, y_o.
            corrections: The texts, y_c.
            instruction: As `correct` takes it.

        Returns:
            For each the natural logarithm of its probability, its end included, and whether greedy decoding writes it.

        Raises:
            InputError: If the question is blank, or a text does not fit into the context.
        """
        prompt, targets = self._codec.encode_targets(question, answer, corrections, instruction)
        return self._scheduler.log_likelihoods(prompt, targets)

    def evidence(self, question: str, answer: str, instruction: str | None = None) -> float:
        """Measure how much speaks for correcting an answer, for calibration; the arguments are those of `correct`.

        Returns:
            The log odds of not keeping it, in nats. Of an aligner without verdicts: how far the log probability of one of
            the answer's tokens is below the best token's, at most, in nats; infinite where one is not even expected.

        Raises:
            InputError: As `correct` does.
        """
        generation = self._codec.encode_for_evidence(question, answer, instruction).generation
        if generation is None:
            return -math.inf
        self._scheduler.submit(generation).result()
        return generation.surprise if generation.log_odds is None else generation.log_odds
