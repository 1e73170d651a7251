"""Which corrections are doubtful, whatever the weights."""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.text.reasoning import set_aside
from aligner_middleware.text.safeguards import SAFEGUARDS, doubts

RECIPE = """To make pancakes, you need flour, milk and two eggs.

1. Whisk the flour with the milk until no lumps are left.
2. Whisk the eggs with a pinch of salt until they foam, then fold them in.
3. Heat a little butter in a pan, pour in the batter and bake each side for two minutes.

Serve them with lemon and sugar, you greedy pig. They keep for a day in the fridge."""
POLITE = RECIPE.replace(", you greedy pig", "")
TABLE = "Prices:\n\n| tea | size | price |\n|---|:-:|--:|\n| green | 100 g | 4 |\n| black | 50 g | 3 |\n\nNow go away."
FLAT = "green | 4 kr\n--- | ---\nblack | 3 kr\n"
CODE = "Run this, fool:\n\n```python\ndef area(r):\n    return 3.14 * r * r\n```\n\nIt prints nothing."
JSON = '{"name": "Ann", "note": "she is an idiot", "tags": ["a", "b"]}'
HTML = '<div class="x"><p>Water boils at <b>100</b> degrees,<br>moron.</p><IMG src="a.png"></div>'

SOUND = [
    (RECIPE, POLITE),
    (RECIPE, "I can't help with that."),
    (TABLE, TABLE.removesuffix("\n\nNow go away.")),
    (CODE, CODE.replace(", fool", "")),
    (JSON, JSON.replace("an idiot", "busy")),
    (HTML, HTML.replace(",<br>moron", "")),
]


def says(name: str, answer: str, correction: str) -> bool:
    return name in doubts(answer, correction)


@pytest.mark.parametrize(("answer", "correction"), SOUND)
def test_a_sound_correction_is_not_doubted(answer: str, correction: str) -> None:
    assert doubts(answer, correction) == ()


MARKS = ["<think>", "</think>", "<b>", "|", "|-|", "```", "1. ", "a ", "B. ", "\n", "{", "}", "'"]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(MARKS)).map("".join))


@given(TEXTS, TEXTS)
@example("", "\ud800")
@example("\x00", "\ufffd")
@example("İ", "ß")
@example("[" * 5000, "[" * 4000)
def test_any_two_texts_can_be_compared_and_the_answer_itself_is_not_doubted(answer: str, correction: str) -> None:
    assert set(doubts(answer, correction)) <= set(SAFEGUARDS)
    assert doubts(answer, answer, cut_off=True) == ()


def test_names_come_in_the_order_of_the_safeguards_and_cut_off_comes_first() -> None:
    assert doubts("Fine, you fool.", "<think>Ъ" + " so" * 20, cut_off=True) == (
        "cut_off",
        "repeats",
        "script",
        "reasoning",
    )
    assert doubts("Fine, you fool.", "Fine.", cut_off=True) == ("cut_off",)


# repeats


TOWNS = "Towns, you clown:\n" + "\n".join(
    f"{number}. {name}: pack a light jacket, buy a day ticket and walk the old town in the morning."
    for number, name in enumerate(("Oslo", "Rome", "Riga", "Kyiv"), 1)
)
NAMES = "\n".join(f"{number}. Place {number}" for number in range(60)) + "\nDolt."


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (RECIPE, POLITE + " the" * 10),
        (RECIPE, POLITE + " in the pan" * 4),
        (RECIPE, POLITE + "\n\n" + POLITE),
        (RECIPE, POLITE + " They keep for a day." * 3),
        (RECIPE, "They keep for a day. Bake them. They keep for a day. Serve them. They keep for a day."),
        (
            RECIPE,
            POLITE
            + "\n\n7. Heat a little butter in a pan, pour in the batter and bake each side for two minutes. Then wait.",
        ),
        (RECIPE, POLITE + "".join(f"\n{number}. Add a pinch of salt." for number in range(4, 20))),
        (RECIPE, POLITE + "".join(f"\n{number}. Salt" for number in range(4, 20))),
        (RECIPE, POLITE + "".join(f"\n**Step {number}:** Add more of the salt" for number in range(4, 20))),
        (RECIPE, POLITE + " " + "na" * 40),
        (RECIPE, "Serve them warm. Eat the first ones at once. " * 2 + "Serve them warm. Eat the first ones at once."),
        ("你是白痴。水在一百度沸腾。", "水在一百度沸腾，" * 5),
        ("It is far, fool.", "It is far: you go by train to the coast and then by boat to the island, " * 2),
        (
            TOWNS,
            TOWNS.partition("\n")[2]
            + "\n5. Bern: pack a light jacket, buy a day ticket and walk the old town in the morning.",
        ),
        (NAMES, NAMES.removesuffix("Dolt.") + "\n".join(f"{number + 60}. Place {number}" for number in range(60))),
    ],
)
def test_what_is_said_again_and_again_is_doubted(answer: str, correction: str) -> None:
    assert says("repeats", answer, correction)


SONG = "Row, row, row your boat.\n" + "Merrily, merrily, merrily, merrily, life is but a dream.\n" * 4 + "Idiot."


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (SONG, SONG.removesuffix("Idiot.")),
        ("No, no, no, you dolt.", "No, no, no."),
        ("Dunce. " + "la " * 40, "la " * 40),
        (
            "Read it, fool: 10000000000000000000000000000000000000000000000",
            "10000000000000000000000000000000000000000000000",
        ),
        ("Idiot!\n| a | b |\n|---|---|\n" + "| 0 | 0 |\n" * 9, "| a | b |\n|---|---|\n" + "| 0 | 0 |\n" * 9),
        ("Do it.", "1. Ask your doctor first.\n2. Ask your pharmacist first.\n3. Ask your nurse first."),
        ("Do it.", "I can't help with that. If you are in danger, call 112. I can't help with that."),
        ("ha", "Ha ha ha!"),
    ],
)
def test_what_the_answer_repeats_as_often_or_what_is_only_alike_is_no_repeat(answer: str, correction: str) -> None:
    assert not says("repeats", answer, correction)


TWICE = "You go by train to the coast and then by boat to the island, which takes a day or so. " * 2


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (TOWNS, TOWNS.partition("\n")[2]),
        (TOWNS, TOWNS.replace(", you clown", "")),
        (NAMES, NAMES.removesuffix("Dolt.")),
        (TWICE.replace(" and", ", dolt, and", 1), TWICE),
    ],
)
def test_who_only_leaves_out_words_repeats_nothing(answer: str, correction: str) -> None:
    assert not says("repeats", answer, correction)


# loss


TOWNS = "".join(
    f"{n}. {town}: buy a day ticket and walk the old town.\n"
    for n, town in enumerate(("Oslo", "Rome", "Riga", "Bern"), 1)
)


def test_leaving_out_most_of_an_answer_that_is_not_short_is_doubted() -> None:
    answer = f"You worthless idiot, read this:\n\n{TOWNS}"
    assert says("loss", answer, "1. Oslo: buy a day ticket and walk the old town.\n")
    assert not says("loss", answer, TOWNS)
    assert not says("loss", answer, "Please ask somebody else.")
    assert not says("loss", "Eight minutes. Why do you ask such a thing, you silly old fool?", "Eight minutes.")


# growth

MORE = " ".join(
    f"In the year {number} a new hall was built by somebody else, and it stood for {number % 90} years."
    for number in range(900, 912)
)


@pytest.mark.parametrize(("answer", "correction"), [(RECIPE, f"{POLITE} {MORE}"), (TOWNS, f"{MORE}\n{TOWNS}")])
def test_an_edit_that_goes_on_and_on_is_doubted(answer: str, correction: str) -> None:
    assert says("growth", answer, correction)


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (RECIPE, POLITE + " Ask whoever eats them whether they can have eggs or milk: both are common allergies."),
        ("Do it. It is easy enough. Nobody will know of it.", MORE),
        ("Just take all of them.", MORE),
        (f"{MORE} You fool.", MORE),
    ],
)
def test_another_text_and_a_caution_may_be_longer_than_the_answer(answer: str, correction: str) -> None:
    assert not says("growth", answer, correction)


# structure


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (JSON, JSON[:-1]),
        (JSON, "The name is Ann."),
        (JSON, f"```json\n{JSON}\n```"),
        (f"```json\n{JSON}\n```", f"```json\n{JSON[1:]}\n```"),
        (f"[{JSON}, {JSON}]", f"[{JSON} {JSON}]"),
        (CODE, CODE.replace("```\n\n", "\n")),
        (CODE, CODE.replace("```python", "")),
        (CODE.replace("```", "~~~"), CODE.replace("```python", "~~~python").replace("```", "")),
        (CODE + "\n\n" + CODE, CODE.replace("```\n\n", "\n\n") + "\n\n" + CODE),
        ("Go, fool.", "Go:\n\n```\ngo"),
        ("Fool, run this: ```sh\nls\n```\n", "Run this: ```sh\nls\n"),
        (TABLE, TABLE.replace("| 100 g ", "")),
        (TABLE, TABLE.replace("| black | 50 g | 3 |", "| black | 50 g")),
        (TABLE, TABLE.replace("|---|:-:|--:|\n", "")),
        (FLAT, FLAT.replace("black | ", "black | | ")),
        (HTML, HTML.replace("</b>", "")),
        (HTML, HTML.replace('<div class="x">', "")),
        (HTML.upper(), HTML.upper().removesuffix("</DIV>")),
        ("<items><item id='1'>a</item><item>b</item></items>", "<items><item id='1'>a<item>b</item></items>"),
    ],
)
def test_what_parsed_and_no_longer_does_is_doubted(answer: str, correction: str) -> None:
    assert says("structure", answer, correction)


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (f"```json\n{JSON}\n```", JSON),
        (JSON[:-1], "Ann."),
        ("42", "Forty-two."),
        (CODE, "I can't help with that."),
        (CODE, "Use `area`, or ```3.14 * r * r```."),
        ("Fool, run this: ```sh\nls\n```\n", "Run this: `ls`"),
        (CODE.removesuffix("```\n\nIt prints nothing."), CODE.removesuffix("```\n\nIt prints nothing.") + "#"),
        ("````md\n```python\nx\n```\n````\nFool.", "````md\n```python\nx\n```\n````"),
        (TABLE, "Tea costs 3 or 4."),
        (TABLE, TABLE.replace("| green | 100 g | 4 |\n", "")),
        (TABLE, TABLE.replace("green", "green \\| white")),
        (TABLE.replace("| 3 |", "|"), TABLE.replace("| 100 g | 4 |", "|")),
        ("Dolt, a < b and c > d, so |x| < 3.", "Since a < b and b > c, |x| > 3."),
        ("Use std::vector<int>, fool.", "Use std::vector<int> or std::list<int>."),
        ("<ul><li>one<li>two</ul>", "<ul><li>one</ul>"),
        (HTML, HTML.replace("<b>100</b>", "100")),
        ("Dear X", "Dear <your name>"),
    ],
)
def test_what_did_not_parse_or_went_as_a_whole_is_not_broken(answer: str, correction: str) -> None:
    assert not says("structure", answer, correction)


# spacing


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        ("It's “fine”.", 'It\'s "fine".'),
        ("It's `fine`.", "It’s fine."),
        (CODE, CODE.replace("    ", "")),
        (RECIPE, RECIPE + "\n"),
        (RECIPE, RECIPE.replace("\n", " ")),
        ("A pause—then 3–4 more…", "A pause - then 3-4 more..."),
    ],
)
def test_a_change_of_form_only_is_doubted(answer: str, correction: str) -> None:
    assert says("spacing", answer, correction)


@pytest.mark.parametrize(
    ("answer", "correction"),
    [("It's fine.", "Its' fine!"), ("It's 5.", "It's 6."), ("a - b", "a + b"), (RECIPE, POLITE), ("A", "a")],
)
def test_a_change_of_words_or_signs_is_more_than_form(answer: str, correction: str) -> None:
    assert not says("spacing", answer, correction)


# holes


@pytest.mark.parametrize(
    "correction",
    [
        POLITE.replace("no lumps are left.\n2. Whisk the eggs with a pinch of salt until ", ""),
        POLITE.replace(" until no lumps are left.\n2. Whisk the eggs", ""),
        POLITE.replace("the flour with the milk until ", ""),
        POLITE.removesuffix(" a day in the fridge."),
        POLITE.removesuffix(" in the fridge."),
        POLITE[: POLITE.index("pan, pour")],
        POLITE[: POLITE.index(" pour in")],  # it ends with a comma
        POLITE.replace("Heat a little butter in a ", ""),  # what is left begins with a small letter
        "milk sugar day",
    ],
)
def test_a_copy_with_holes_is_doubted(correction: str) -> None:
    assert set(doubts(RECIPE, correction)) - {"loss"} == {"holes"}


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (RECIPE, POLITE.replace("2. Whisk the eggs with a pinch of salt until they foam, then fold them in.\n", "")),
        (RECIPE, POLITE.partition("\n\nServe")[0]),
        (RECIPE, POLITE.replace("the flour with the milk until no lumps are left.\n2. Whisk ", "")),  # a whole item
        (
            RECIPE,
            POLITE.replace("1. Whisk the flour with the milk until no lumps are left.\n2.", "1.").replace("3.", "2."),
        ),
        (
            RECIPE,
            POLITE.replace(" in a pan, pour in the batter and bake", " in a pan and bake").replace("a little", "some"),
        ),
        ("Listen, moron: take two tablets.", "Take two tablets."),
        ("Water (as even a child like you knows) boils at 100.", "Water boils at 100."),
        ("Water boils at 100 – which any halfwit learns at school.", "Water boils at 100."),
        ("It works, you utter fool, by osmosis.", "It works by osmosis."),
        ("Stir it, you idiot. You never learn. Listen, dolt: add salt.", "Stir it. Add salt."),
        ("Your stupid cat needs a vet.", "Your cat needs a vet."),
        ("Even a moron like you should know that water boils at 100.", "Water boils at 100."),
        ("what a surprise, the slowest one asks They clear the area first.", "They clear the area first."),
        ("Vermeer, around 1665. some people should not type at all", "Vermeer, around 1665."),
        ("- flour, sugar, you pig\n- two eggs", "- flour, sugar\n- two eggs"),
        ("**Idiot!** Take the *damn* bus.", "Take the bus."),
        ("水在一百度沸腾，连你这种白痴都知道。盐不改变多少。", "水在一百度沸腾。盐不改变多少。"),
        ("पानी सौ डिग्री पर उबलता है। तुम मूर्ख हो।", "पानी सौ डिग्री पर उबलता है।"),
        ("x = 1\ny = 2  # you fool\nprint(x + y)", "x = 1\ny = 2\nprint(x + y)"),
    ],
)
def test_whole_sentences_items_clauses_and_adjectives_may_go(answer: str, correction: str) -> None:
    assert doubts(answer, correction) == ()


SENTENCES = [
    "The kettle takes three minutes.",
    "Is the tea green or black?",
    "Green tea wants water of 80 degrees, not more!",
    "Pour it over the leaves (a spoon for each cup).",
    "The leaves sink when they are done.",
    "Milk goes in last, if at all.",
    'My aunt said: "The tea is never done."',
    "- Leave out the sugar",
    "1. Warm the pot with a little water.",
    "| tea | time |",
]
PROSE = SENTENCES[:7]


@given(st.permutations(SENTENCES), st.sets(st.integers(0, 9), min_size=1), st.sampled_from(["\n", "\n\n"]))
def test_lines_may_go(lines: list[str], kept: set[int], between: str) -> None:
    assert doubts(between.join(lines), between.join(lines[at] for at in sorted(kept))) in ((), ("loss",))


@given(st.permutations(PROSE), st.sets(st.integers(0, 6), min_size=1))
def test_sentences_may_go(sentences: list[str], kept: set[int]) -> None:
    assert doubts(" ".join(sentences), " ".join(sentences[at] for at in sorted(kept))) in ((), ("loss",))


THINGS = ["blue", "tea", "milk", "sun", "moon", "hill", "lake", "stone", "bird"]
CLAUSES = st.lists(st.sampled_from(THINGS), min_size=2, unique=True)
INSULTS = st.sampled_from(["moron", "you idiot", "as even a brainless lump like you must have heard by now"])


@given(CLAUSES, st.integers(1, 9), INSULTS, st.permutations(PROSE), st.integers(0, 7))
def test_an_insult_between_commas_may_go(words: list[str], cut: int, insult: str, rest: list[str], place: int) -> None:
    begins, ends = " ".join(words[:cut]), " ".join(words[cut:])
    parts = [part for part in (begins, ends) if part]

    def among_others(*clauses: str) -> str:
        return " ".join([*rest[:place], ", ".join(clauses) + ".", *rest[place:]])

    assert doubts(among_others(begins, insult, *parts[1:]), among_others(*parts)) == ()
    assert doubts(among_others(insult, *parts), among_others(*parts)) == ()


# script, empty, reasoning


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        ("Take the bus, fool.", "Take the автобус."),
        ("Take the bus, fool.", "Take the bus。请"),
        ("Take the bus, fool.", "Take the bus\ufffd."),
        ("Take the bus, fool.", "Take the \ue000bus."),
        ("Take the bus, fool.", "Take the\x07 bus."),
        ("水在一百度沸腾。", "水は百度で沸く。"),
        ("Take the bus, fool.", "Take the ბუსი."),
    ],
)
def test_letters_of_a_script_that_was_not_there_are_doubted(answer: str, correction: str) -> None:
    assert says("script", answer, correction)


def test_scripts_of_the_answer_and_the_question_are_not_foreign() -> None:
    assert not says("script", "Автобус, bus, fool.", "Возьми автобус. Take the bus.")
    assert not says("script", "ばかだね。", "東京です。")
    assert not says("script", "Fine, fool.", "Fine 👍 – 100 °C, “naïve” café,\ta\u00a0b ½ 𝑥")
    assert doubts("It means thanks, fool.", "спасибо means thanks.", question="What does спасибо mean?") == ()


def test_a_blank_correction_is_doubted() -> None:
    assert doubts("You fool.", " \n") == ("empty",)
    assert not says("empty", "You fool.", ".")


def test_tags_of_reasoning_that_the_answer_does_not_have_are_doubted() -> None:
    assert says("reasoning", "Go, fool.", "<think>They want me to be polite.</think>Go.")
    assert says("reasoning", "Go, fool.", "Go.</THINK>")
    assert says("reasoning", "<think>Hm.</think>Go, fool.", "<think>Hm.</think><think>Go.</think>Go.")
    assert not says("reasoning", "<think>Hm, a fool.</think>Go, fool.", "<think>Hm.</think>Go.")
    assert not says("reasoning", "<think>Hm.</think>Go, fool.", "Go. I think.")


# set_aside


@pytest.mark.parametrize(
    ("aside", "rest"),
    [
        ("<think>What a fool.</think>\n\n", "Take the bus."),
        ("\n <Thinking budget='9'>Hm < 3\n</THINKING > ", "Take the bus."),
        ("<think>a</think>\n<reflection>b</reflection>\n", "Take <think>c</think> the bus."),
        ("<think>a <analysis>b</think>", "Take the bus."),
        ("<think>Still on it", ""),
        ("<think>a</think>\n<scratchpad>b", ""),
        ("What a fool.\n</think>\n\n", "Take the bus."),
        ("", "Take the bus."),
        ("", " \n"),
        ("", "Write <think>so</think> and go."),
        ("", "I <b>think</b> so."),
        ("", "The tag `</think>` ends it."),
        ("", "<thinker>a</thinker>"),
    ],
)
def test_reasoning_at_the_beginning_is_set_aside_whole(aside: str, rest: str) -> None:
    assert set_aside(aside + rest) == (aside, rest)


@given(TEXTS)
def test_setting_aside_loses_nothing_and_leaves_nothing_to_set_aside(answer: str) -> None:
    aside, rest = set_aside(answer)
    assert aside + rest == answer
    assert set_aside(rest) == ("", rest)


# all of them


def test_hardly_any_correction_that_people_wrote_is_doubted() -> None:
    rows = [
        json.loads(line)
        for name in ("corrections", "held_out")
        for line in (DEFAULT_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    changed = [row for row in rows if row["answer"] != row["correction"]]
    doubted = [row for row in changed if doubts(row["answer"], row["correction"], question=row["question"])]
    assert len(changed) > 2000
    assert len(doubted) <= 0.005 * len(changed)


LONG = " ".join(
    f"Step {number} takes {number * 7} minutes, and then you stir pot {number % 9}." for number in range(400)
)


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        (LONG, LONG.replace("Step 300 takes 2100 minutes, and then you stir pot 3. ", "")),
        ("the " * 5000, "the " * 4000),
        ("你好吗" * 6600, "你好" * 6600),
        ("<a " * 6600, "<a " * 6500),
        ("a\n" * 10000, "a\n" * 9000),
        ("." + "'" * 20000, "|-" * 10000),
    ],
)
def test_20000_characters_take_a_fraction_of_a_second(answer: str, correction: str) -> None:
    started = time.process_time()
    doubts(answer, correction)
    assert time.process_time() - started < 1
