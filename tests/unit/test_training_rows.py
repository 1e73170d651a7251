"""What is trained on is what inference asks, and only the correction is learnt."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.prompt import DEFAULT, encode_prompt
from aligner_middleware.training.batches import DECISION, IGNORED, collate, correction_loss, encode_triple
from aligner_middleware.triples import Triple, with_identity
from tests.fakes import END, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
TRIPLE = st.builds(Triple, question=TEXT, answer=TEXT, correction=TEXT)


@given(TRIPLE)
def test_the_training_prompt_is_the_inference_prompt(triple: Triple) -> None:
    example = encode_triple(TOKENIZER, DEFAULT, END, triple)
    assert list(example.prompt) == encode_prompt(TOKENIZER, DEFAULT, triple.question, triple.answer)


@given(st.lists(TRIPLE, min_size=1, max_size=4))
@settings(deadline=None)
def test_supervised_tokens_are_the_correction_and_its_end(triples: list[Triple]) -> None:
    batch = collate([encode_triple(TOKENIZER, DEFAULT, END, triple) for triple in triples])
    for labels, mask, triple in zip(batch["labels"], batch["attention_mask"], triples, strict=True):
        supervised = (labels[labels != IGNORED] % DECISION).tolist()
        assert supervised[-1] == END
        assert TOKENIZER.decode(supervised[:-1]) == triple.correction
        assert (labels[mask == 0] == IGNORED).all()


@given(st.lists(TRIPLE, min_size=1, max_size=4), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_sliced_head_gives_the_loss_of_all_positions(triples: list[Triple], seed: int) -> None:
    batch = collate([encode_triple(TOKENIZER, DEFAULT, END, triple) for triple in triples], slices=True)
    vocabulary = int(batch["input_ids"].max()) + 1
    logits = torch.randn(*batch["labels"].shape, vocabulary, generator=torch.Generator().manual_seed(seed))
    targets = torch.where(batch["labels"] == IGNORED, IGNORED, batch["labels"] % DECISION)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    sliced = correction_loss({"logits": logits[:, -batch["logits_to_keep"] :]}, batch["labels"])
    torch.testing.assert_close(sliced, expected)


@given(TRIPLE)
def test_what_is_marked_is_the_first_token_and_where_the_correction_parts_from_the_answer(triple: Triple) -> None:
    labels = collate([encode_triple(TOKENIZER, DEFAULT, END, triple)])["labels"][0]
    targets = labels[labels != IGNORED]
    marked = (targets >= DECISION).nonzero().flatten().tolist()
    answer = [*TOKENIZER.encode(triple.answer), END]
    parting = marked[-1]
    assert marked[0] == 0 and len(marked) <= 2
    assert (targets[:parting] % DECISION).tolist() == answer[:parting]
    assert triple.keeps or parting >= len(answer) or targets[parting] % DECISION != answer[parting]


@given(st.lists(TRIPLE, min_size=1, max_size=4))
@settings(deadline=None)
def test_decisions_weigh_more_in_training_alone(triples: list[Triple]) -> None:
    batch = collate([encode_triple(TOKENIZER, DEFAULT, END, triple) for triple in triples])
    labels = batch["labels"][:, 1:]
    logits = torch.zeros(*batch["labels"].shape, 320)  # every token costs the same
    supervised, marked = (labels != IGNORED).sum(), (labels >= DECISION).sum()
    weighted = correction_loss({"logits": logits}, batch["labels"], supervised, decision_weight=3.0)
    plain = correction_loss({"logits": logits}, batch["labels"], decision_weight=3.0)
    torch.testing.assert_close(weighted / plain, (supervised + 2 * marked) / supervised)


@given(TRIPLE)
def test_the_warm_up_row_keeps_the_answer(triple: Triple) -> None:
    assert triple.identity().correction == triple.answer
    assert triple.identity().keeps


@given(st.lists(TRIPLE, min_size=1, max_size=20), st.floats(0, 1))
def test_identity_rows_keep_what_was_corrected(triples: list[Triple], share: float) -> None:
    rows = with_identity(triples, share)
    added = rows[len(triples) :]
    assert rows[: len(triples)] == triples
    assert all(row.keeps for row in added)
    assert {row.correction for row in added} <= {row.correction for row in triples if not row.keeps}
    assert len(added) <= share * len(rows) + 1
