"""What is trained on is what inference asks, and only verdict and correction are learnt."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.data.triples import Triple, with_identity
from aligner_middleware.text.targets import encode_target, verdict_of
from aligner_middleware.text.template import (
    DEFAULT,
    VERDICTS,
    PromptTemplate,
    encode_prompt,
    verdict_ids,
    with_instruction,
)
from aligner_middleware.training.batches import (
    DECIDING,
    IGNORED,
    VERDICT,
    Example,
    collate,
    correction_loss,
    count_targets,
    encode_identity,
    encode_triple,
    predicting_at,
    supervised,
    verdict_weights,
)
from tests.fakes import END, SPARE, byte_tokenizer, verdict_template

TOKENIZER = byte_tokenizer(SPARE)
VOCABULARY = TOKENIZER.vocab_size
MARKED, COPYING = (verdict_template(TOKENIZER, marks=marks) for marks in (True, False))
VERDICT_IDS = verdict_ids(TOKENIZER, MARKED) or (0, 0, 0)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
CORRECTED = st.builds(Triple, question=TEXT, answer=TEXT, correction=TEXT)
KEPT = CORRECTED.map(Triple.identity)
UNWRITTEN = CORRECTED.map(lambda triple: triple.model_copy(update={"correction": ""}))
EDITED = CORRECTED.map(
    lambda triple: Triple(question=triple.question, answer="Go on. You fool! So it is.", correction="Go on. So it is.")
)
TRIPLE = CORRECTED | KEPT
ANY = CORRECTED | KEPT | UNWRITTEN | EDITED
TEMPLATE = st.sampled_from([MARKED, COPYING, DEFAULT])


def encoded(triple: Triple, template: PromptTemplate = DEFAULT) -> Example:
    return encode_triple(TOKENIZER, template, END, triple)


def labels_of(*examples: Example) -> torch.Tensor:
    labels: torch.Tensor = collate(examples)["labels"]
    return labels


@given(TRIPLE, TEMPLATE)
def test_the_training_prompt_is_the_inference_prompt(triple: Triple, template: PromptTemplate) -> None:
    example = encoded(triple, template)
    assert list(example.prompt) == encode_prompt(TOKENIZER, template, triple.question, triple.answer)


@given(TRIPLE)
def test_a_row_with_an_instruction_is_trained_on_the_prompt_of_inference(triple: Triple) -> None:
    template = with_instruction(MARKED)
    told = triple.model_copy(update={"instruction": "formal"})
    for row in (triple, told):
        given = encode_prompt(TOKENIZER, template, row.question, row.answer, row.instruction or "")
        assert list(encoded(row, template).prompt) == given
    assert encoded(told, template).target == encoded(triple, template).target
    assert encoded(triple, template) == encoded(triple, MARKED)


@given(st.lists(TRIPLE, min_size=1, max_size=4))
def test_supervised_tokens_are_the_correction_and_its_end(triples: list[Triple]) -> None:
    batch = collate([encoded(triple) for triple in triples])
    for labels, mask, triple in zip(batch["labels"], batch["attention_mask"], triples, strict=True):
        learnt = (labels[labels != IGNORED] % DECIDING).tolist()
        assert learnt[-1] == END
        assert TOKENIZER.decode(learnt[:-1]) == triple.correction
        assert (labels[mask == 0] == IGNORED).all()


@given(st.lists(ANY, min_size=1, max_size=4), st.sampled_from([MARKED, COPYING]))
def test_with_verdicts_each_row_teaches_one_and_then_what_it_writes(
    triples: list[Triple], template: PromptTemplate
) -> None:
    batch = collate([encoded(triple, template) for triple in triples])
    rows = (batch["input_ids"], batch["labels"], batch["attention_mask"])
    for ids, labels, mask, triple in zip(*rows, triples, strict=True):
        places = (labels != IGNORED).nonzero().flatten().tolist()
        learnt = labels[places].tolist()
        target = encode_target(TOKENIZER, template, END, triple.answer, triple.correction)
        assert [label % DECIDING for label in learnt] == list(target.ids) == ids[places].tolist()
        assert [label >= VERDICT for label in learnt] == [True] + [False] * (len(learnt) - 1)
        assert [at for at, label in enumerate(learnt) if DECIDING <= label < VERDICT] == list(target.deciding)
        assert places == list(range(places[0], int(mask.sum())))
        wanted = verdict_of(triple.answer, triple.correction, as_operations=template.mark is not None)
        assert learnt[0] - VERDICT == VERDICT_IDS[VERDICTS.index(wanted)]
        if wanted == "keep" or not triple.correction:
            assert len(learnt) == 1
        assert (count_targets(labels) == torch.tensor([len(learnt) - 1, 1])).all()


@given(st.lists(ANY, min_size=1, max_size=5), TEMPLATE)
def test_what_predicts_a_target_stands_one_place_before_it(triples: list[Triple], template: PromptTemplate) -> None:
    triples = [triple for triple in triples if triple.correction or template.verdicts] or [
        Triple(question="q", answer="a", correction="c")
    ]
    batch = collate([encoded(triple, template) for triple in triples])
    places, targets = supervised(batch["labels"])
    wanted = targets != IGNORED
    assert len(places) == len(targets) and len(places) % 32 == 0
    assert (batch["labels"].flatten()[places[wanted] + 1] == targets[wanted]).all()
    assert int(wanted.sum()) == int((batch["labels"] != IGNORED).sum())


class Network(torch.nn.Module):
    """Embeddings, and a head over them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.inner(ids))
        return logits


@given(st.lists(CORRECTED, min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=30)
def test_a_head_at_the_targets_alone_gives_the_loss_of_all_positions(triples: list[Triple], seed: int) -> None:
    batch = collate([encoded(triple) for triple in triples])
    network = Network(seed)
    whole = network(batch["input_ids"])
    targets = torch.where(batch["labels"] == IGNORED, IGNORED, batch["labels"] % DECIDING)[:, 1:]
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    places, labels = supervised(batch["labels"])
    with predicting_at(network.head, places):
        logits = network(batch["input_ids"])
    assert logits.shape == (len(places), VOCABULARY)
    torch.testing.assert_close(correction_loss(logits, labels), expected)
    assert network(batch["input_ids"]).shape == whole.shape  # and then it is as before


@given(CORRECTED)
def test_the_first_token_and_the_first_edit_are_marked(triple: Triple) -> None:
    labels = labels_of(encoded(triple))[0]
    targets = labels[labels != IGNORED]
    marked = (targets >= DECIDING).nonzero().flatten().tolist()
    answer = [*TOKENIZER.encode(triple.answer), END]
    first_edit = marked[-1]
    assert marked[0] == 0 and len(marked) <= 2
    assert (targets[:first_edit] % DECIDING).tolist() == answer[:first_edit]
    assert triple.keeps or first_edit >= len(answer) or targets[first_edit] % DECIDING != answer[first_edit]


def all_alike(*examples: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Give logits by which every token costs the same, and their labels."""
    places, targets = supervised(labels_of(*examples))
    return torch.zeros(len(places), VOCABULARY), targets


@given(st.lists(TRIPLE, min_size=1, max_size=4))
@settings(max_examples=30)
def test_deciding_tokens_weigh_more_in_training_alone(triples: list[Triple]) -> None:
    logits, targets = all_alike(*map(encoded, triples))
    learnt, marked = (targets != IGNORED).sum(), (targets >= DECIDING).sum()
    weighted = correction_loss(logits, targets, torch.ones(2), decision_weight=3.0)
    plain = correction_loss(logits, targets, decision_weight=3.0)
    torch.testing.assert_close(weighted / plain, (learnt + 2 * marked) / learnt)


@given(st.lists(ANY, min_size=1, max_size=5), st.floats(0.5, 3), st.floats(0, 1), st.booleans())
@settings(max_examples=30)
def test_verdicts_have_a_loss_of_their_own_over_rows(
    triples: list[Triple], weight: float, balance: float, training: bool
) -> None:
    examples = [encoded(triple, MARKED) for triple in triples]
    logits, targets = all_alike(*examples)
    of_each = verdict_weights(examples, balance)
    weights = {token: of_each[verdict] for token, verdict in zip(VERDICT_IDS, VERDICTS, strict=True)}
    shares = torch.ones(2) if training else None
    loss = correction_loss(logits, targets, shares, verdict_weight=weight, weights=weights)
    writing = any(len(example.target) > 1 for example in examples)
    mean = sum(of_each[example.verdict] for example in examples if example.verdict) / len(examples) if training else 1.0
    assert float(loss) == pytest.approx(math.log(VOCABULARY) * (writing + weight * mean), rel=1e-5)


@given(st.lists(ANY, min_size=1, max_size=6), st.floats(0, 1))
def test_verdicts_are_weighed_by_how_rare_they_are(triples: list[Triple], balance: float) -> None:
    examples = [encoded(triple, MARKED) for triple in triples]
    counts = Counter(example.verdict for example in examples)
    weights = verdict_weights(examples, balance)
    assert set(weights) == set(VERDICTS)
    for verdict, count in counts.items():
        assert weights[verdict or "keep"] == pytest.approx((len(examples) / (3 * count)) ** balance)
    if balance == 1 and len(counts) == 3:  # then each has a third of all weight
        assert sum(weights[verdict or "keep"] * count for verdict, count in counts.items()) == pytest.approx(
            len(examples)
        )


@given(st.lists(ANY, min_size=2, max_size=6), TEMPLATE, st.integers(0, 2**31), st.data())
@settings(max_examples=30)
def test_passes_of_a_step_add_up_to_the_loss_of_all_its_rows(
    triples: list[Triple], template: PromptTemplate, seed: int, data: st.DataObject
) -> None:
    triples = [triple if triple.correction or template.verdicts else triple.identity() for triple in triples]
    examples = [encoded(triple, template) for triple in triples]
    network = Network(seed)
    weights = dict(zip(VERDICT_IDS, (0.5, 2.0, 1.5), strict=True))

    def loss(rows: list[Example], counts: torch.Tensor) -> torch.Tensor:
        batch = collate(rows)
        places, targets = supervised(batch["labels"])
        with predicting_at(network.head, places):
            logits = network(batch["input_ids"])
        shares = count_targets(batch["labels"]) / counts.clamp(min=1)
        return correction_loss(logits, targets, shares, decision_weight=2.0, verdict_weight=1.5, weights=weights)

    counts = count_targets(labels_of(*examples))
    cut = data.draw(st.integers(1, len(examples) - 1))
    parts = loss(examples[:cut], counts) + loss(examples[cut:], counts)
    torch.testing.assert_close(parts, loss(examples, counts))


@given(ANY, st.sampled_from([COPYING, DEFAULT]))
def test_the_warm_up_copies_the_answer_after_the_verdict_to_edit(triple: Triple, template: PromptTemplate) -> None:
    example = encode_identity(TOKENIZER, template, END, triple)
    assert example is not None
    prompt = encode_prompt(TOKENIZER, template, triple.question, triple.answer)
    assert list(example.prompt) == prompt + ([VERDICT_IDS[1]] if template.verdicts else [])
    assert list(example.target) == [*TOKENIZER.encode(triple.answer), END]
    assert example.verdict is None
    assert example.deciding == (0, len(example.target) - 1)


@given(ANY)
def test_operations_copy_nothing_and_so_have_no_warm_up(triple: Triple) -> None:
    assert encode_identity(TOKENIZER, MARKED, END, triple) is None


@given(TRIPLE)
def test_the_warm_up_row_keeps_the_answer(triple: Triple) -> None:
    assert triple.identity().correction == triple.answer
    assert triple.identity().keeps


@given(st.lists(ANY, min_size=1, max_size=20), st.floats(0, 1))
def test_identity_rows_keep_what_was_corrected(triples: list[Triple], share: float) -> None:
    rows = with_identity(triples, share)
    added = rows[len(triples) :]
    assert rows[: len(triples)] == triples
    assert all(row.keeps for row in added)
    assert {row.correction for row in added} <= {row.correction for row in triples if not row.keeps}
    assert all(row.correction for row in added)
    assert len(added) <= share * len(rows) + 1
