"""What is trained on is what inference asks, and only the correction is learnt."""

from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.prompt import DEFAULT, encode_prompt
from aligner_middleware.training.batches import IGNORED, collate, encode_triple
from aligner_middleware.training.triples import Triple
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
        supervised = labels[labels != IGNORED].tolist()
        assert supervised[-1] == END
        assert TOKENIZER.decode(supervised[:-1]) == triple.correction
        assert (labels[mask == 0] == IGNORED).all()


@given(TRIPLE)
def test_the_warm_up_row_keeps_the_answer(triple: Triple) -> None:
    assert triple.identity().correction == triple.answer
    assert triple.identity().keeps
