"""The proposer for vLLM: it finds the answer in a prompt's tokens, and drafts from it; no vLLM is needed for that."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aligner_middleware import ArtifactError, BuildError
from aligner_middleware.artifact import CheckpointArtifact
from aligner_middleware.text.published import TEMPLATES
from aligner_middleware.text.template import PromptTemplate, encode_prompt, verdict_ids
from aligner_middleware.vllm import AnswerProposer
from tests.fakes import END, SPARE, byte_tokenizer, tokenizer_json, verdict_template

TOKENIZER = byte_tokenizer(SPARE)
CONTEXT = 1024
ANSWER = "The first sentence stands. The second one is rude, you fool. The third sentence stands as well."
POLITE = "The first sentence stands. The third sentence stands as well."


@pytest.fixture
def proposer(tmp_path: Path) -> Callable[..., AnswerProposer]:
    def make(template: PromptTemplate = TEMPLATES["default"], tokens: int = 16) -> AnswerProposer:
        (tmp_path / "tokenizer.json").write_text(tokenizer_json(SPARE))
        CheckpointArtifact(
            name="test",
            template=template,
            precision="float32",
            base={"source": "tests", "sha256": {}},
            eos_token_ids=(END,),
            vocab_size=263,
            max_positions=CONTEXT,
            files={},
            built_with={},
            verdict_ids=verdict_ids(TOKENIZER, template),
        ).save(tmp_path)
        model = SimpleNamespace(model=str(tmp_path), max_model_len=CONTEXT)
        return AnswerProposer(
            SimpleNamespace(model_config=model, speculative_config=SimpleNamespace(num_speculative_tokens=tokens))
        )

    return make


class Row:
    """A sequence as vLLM runs it greedily: a step gives what was right of the proposal, and one token more."""

    def __init__(
        self, answer: str, written: Sequence[int] | str, template: PromptTemplate = TEMPLATES["default"]
    ) -> None:
        self.ids = encode_prompt(TOKENIZER, template, "Why?", answer)
        self.left = [*(TOKENIZER.encode(written) if isinstance(written, str) else written), END]
        self.proposal: list[int] = []
        self.sampled: list[int] = []
        self.steps = 0

    def step(self) -> None:
        pairs = zip(self.proposal, self.left, strict=False)
        right = next((at for at, (guess, true) in enumerate(pairs) if guess != true), len(self.proposal))
        self.sampled, self.left = self.left[: right + 1], self.left[right + 1 :]
        self.ids += self.sampled
        self.steps += 1


def propose(proposer: AnswerProposer, rows: Sequence[Row], **others: Any) -> None:
    """One call, as after a step of vLLM's engine."""
    table = np.zeros((len(rows) + 1, CONTEXT), np.int32)
    for at, row in enumerate(rows):
        table[at, : len(row.ids)] = row.ids
        table[at, len(row.ids) :] = row.ids[0]  # what a former sequence left there
    lengths = np.array([*(len(row.ids) for row in rows), 0])
    found = proposer.propose([row.sampled for row in rows], lengths, table, slot_mappings=None, **others)
    assert [type(token) for tokens in found for token in tokens] == [int for tokens in found for _ in tokens]
    for row, proposal in zip(rows, found, strict=True):
        row.proposal = proposal


def run(proposer: AnswerProposer, *rows: Row) -> list[int]:
    """Write all rows to their ends, and give the steps of each."""
    running = list(rows)
    while running:
        for row in running:
            row.step()
        running = [row for row in running if row.left]
        propose(proposer, running)
    return [row.steps for row in rows]


@pytest.mark.parametrize("tokens", [4, 16, 200])
def test_a_copy_takes_a_step_for_each_full_proposal(proposer: Callable[..., AnswerProposer], tokens: int) -> None:
    length = len(TOKENIZER.encode(ANSWER))
    (steps,) = run(proposer(tokens=tokens), Row(ANSWER, ANSWER))
    assert steps == 1 + -(-length // (tokens + 1))  # the first step reads the prompt and gives one token


@pytest.mark.parametrize(
    "written", [POLITE, ANSWER.replace(" stands.", " stands, and so it should."), "Well. " + ANSWER, ANSWER + " Bye."]
)
def test_after_a_change_the_answer_is_followed_again(proposer: Callable[..., AnswerProposer], written: str) -> None:
    (steps,) = run(proposer(), Row(ANSWER, written))
    assert steps < 0.45 * len(TOKENIZER.encode(written))


def test_what_never_follows_the_answer_is_hardly_drafted(proposer: Callable[..., AnswerProposer]) -> None:
    row, drafted = Row(ANSWER, "0123456789" * 20), 0
    one = proposer()
    while row.left:
        row.step()
        propose(one, [row])
        drafted += len(row.proposal)
    assert drafted < 0.1 * row.steps


def test_rows_that_move_end_and_repeat_each_other_have_the_steps_of_one_alone(
    proposer: Callable[..., AnswerProposer],
) -> None:
    texts = [POLITE, POLITE, ANSWER, "The third sentence", POLITE + ANSWER]
    alone = [run(proposer(), Row(ANSWER, text))[0] for text in texts]
    rows = [Row(ANSWER, text) for text in texts]
    one, running, turn = proposer(), rows, 0
    while running:
        for row in running:
            row.step()
        turn += 1
        running = [row for row in running[turn % 2 :] + running[: turn % 2] if row.left]
        propose(one, running)
    assert [row.steps for row in rows] == alone


def test_a_sequence_that_was_interrupted_is_taken_up_again(proposer: Callable[..., AnswerProposer]) -> None:
    one, row = proposer(tokens=8), Row(ANSWER, POLITE)
    for _ in range(3):
        row.step()
        propose(one, [row])
    propose(one, [])
    (whole,) = run(proposer(tokens=8), Row(ANSWER, POLITE))
    (steps,) = run(one, row)
    assert whole <= steps <= whole + 3


@pytest.mark.parametrize("marks", [False, True])
def test_a_verdict_comes_before_the_copy(proposer: Callable[..., AnswerProposer], marks: bool) -> None:
    template = verdict_template(TOKENIZER, marks=marks)
    verdicts = verdict_ids(TOKENIZER, template)
    assert verdicts is not None
    edit = verdicts[1]
    row = Row(ANSWER, [edit, *TOKENIZER.encode(ANSWER)], template)
    if marks:  # the prompt's own form of the answer, with a mark and a number before each sentence
        prompt = encode_prompt(TOKENIZER, template, "Why?", ANSWER)
        begin = prompt.index(TOKENIZER.special[SPARE[3]])
        row.left = [edit, *prompt[begin : prompt.index(END, begin)], END]
    (steps,) = run(proposer(template, 200), row)
    assert steps == 2


def test_an_answer_whose_first_token_is_joined_with_the_text_before_it_is_found(
    proposer: Callable[..., AnswerProposer],
) -> None:
    joined = 262  # as a tokenizer with a token for two line breaks has
    row = Row("\n" + ANSWER, [joined, *TOKENIZER.encode(ANSWER)])
    at = next(at for at in range(len(row.ids)) if row.ids[at : at + 2] == TOKENIZER.encode("\n\n"))
    row.ids[at : at + 2] = [joined]
    assert run(proposer(tokens=200), row) == [2]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "default"])
def test_the_published_prompts_are_read_too(proposer: Callable[..., AnswerProposer], name: str) -> None:
    template = TEMPLATES[name]
    (steps,) = run(proposer(template, 200), Row(ANSWER, " " + ANSWER, template))
    assert steps < 12


def test_nothing_is_proposed_without_an_answer_a_token_or_room(proposer: Callable[..., AnswerProposer]) -> None:
    one = proposer()
    chat, reading, full = Row(ANSWER, ANSWER), Row(ANSWER, ANSWER), Row(ANSWER, ANSWER)
    chat.ids = TOKENIZER.encode("Tell me a story. " * 5)
    chat.step()
    full.ids += TOKENIZER.encode("x" * (CONTEXT - len(full.ids) - 4))
    full.step()
    propose(one, [chat, reading, full])
    assert chat.proposal == reading.proposal == []
    assert len(full.ids) + len(full.proposal) < CONTEXT


def test_a_model_that_this_package_did_not_export_is_refused(
    proposer: Callable[..., AnswerProposer], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="aligner export"):
        AnswerProposer(SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path / "no"))))
    for text in ("A: {answer} Q: {question}\n", "Q: {question} A: {answer}"):
        with pytest.raises(BuildError, match="does not end with text of its own"):
            proposer(PromptTemplate(name="open", text=text))
