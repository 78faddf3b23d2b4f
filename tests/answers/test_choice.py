"""Multiple choice: hundreds of ways to settle on a letter, and as many to settle on none."""

import time

import pytest

from diffmas.answers import choice

OPTIONS = ["Paris", "the city of Rome", "an oak", "42", "A mixture of B and C"]

# @ is a letter, in upper case and, where the last column says so, in lower case.
SETTLED = [
    (r"\boxed{@}", True), (r"\boxed{ @ }", True), (r"\boxed{(@)}", True), (r"\boxed{\text{@}}", True),
    (r"\boxed{\text{(@)}}", True), (r"\boxed{\textbf{@}}", True), (r"\boxed{\mathrm{@}}", True),
    (r"\boxed{\mathbf{@}}", True), (r"$\boxed{@}$", True), (r"\[\boxed{@}\]", True), (r"\boxed{@.}", True),
    (r"\boxed{$@$}", True), (r"\boxed{**@**}", True), (r"\boxed{@)}", True), (r"\boxed @", True), (r"\fbox{@}", True),
    (r"\boxed{\text{Option @}}", True), (r"\boxed{option @}", True), (r"\boxed{Answer: @}", True),
    (r"First \boxed{E}, but no: \boxed{@}", True), (r"\boxed{@}. The answer is E.", True),
    (r"Answer: E. On second thought \boxed{@}", True), (r"I think \boxed{@} since A is wrong", True),
    ("Answer: @", True), ("Answer: (@)", True), ("Answer: @.", True), ("answer: @", True), ("ANSWER: @", True),
    ("**Answer:** @", True), ("**Answer: @**", True), ("**Answer**: @", True), ("Answer : @", True),
    ("Answer = @", True),
    ("Answer: **@**", True), ("Answer: $@$", True), ("Answer: \\text{@}", True), ("Answer: `@`", True),
    ("Final Answer: @", True), ("Final answer: (@)", True), ("Answer: [@]", True), ('Answer: "@"', True),
    ("Answer:@", True), ("Answer:\n@", True), ("Answer:\n\n(@)", True), ("### Answer: @", True),
    ("> Answer: @", True),
    ("Answer: @\n\n", True), ("The answer is @", True), ("The answer is @.", True), ("the answer is (@).", True),
    ("The answer is: @", True), ("The answer is **@**.", True), ("The answer is $@$.", True), ("answer is @!", True),
    ("The correct answer is @.", True), ("The best answer is (@), I think", True),
    ("So the answer is @, as shown.", True),
    ("The answer is option @.", True), ("The answer is choice (@).", True), ("The answer would be @.", True),
    ("The answer must be @.", True), ("The answer is therefore @.", True), ("The answer is clearly (@).", True),
    ("The correct option is @.", True), ("The correct choice is @", True), ("The right letter is @.", True),
    ("My choice: @", True), ("My answer is @ because the others fail.", True), ("The answer is @ since 1 < 2.", True),
    ("The answer is (@) because it fits", True), ("The answer is @\nIt fits.", True),
    ("Thus the answer is @ - done", True),
    ("Option: @", True), ("The answer here is @.", True),
    ("Option @ is correct.", False), ("Choice @ is the right answer.", False), ("(@) is correct", False),
    ("@ is the correct answer.", False), ("So @ is the answer.", False), ("Clearly **@** is correct.", False),
    ("@ is the best answer", False), ("@ is the only correct one", False),
    ("I choose @.", True), ("I pick (@)", True), ("I'd go with @.", True), ("We select option @.", True),
    ("I am going with @", True), ("I would settle on @.", True), ("It must be @.", True), ("So it is @.", True),
    ("So it's (@).", True), ("Let me choose option @.", True),
    ("@", True), ("(@)", True), ("@.", True), ("**@**", True), ("@)", True), ("$@$", True), (" @ \n", True),
    ("Some thoughts.\n@", True), ("Some thoughts.\n\n**(@)**", True), ("Some thoughts.\n@.", True), ("- @", True),
    ("@) something", False), ("(@) something", False), ("@. something", False), ("@: something", False),
    ("**@) something**", False), ("Because of this:\n@) something", False), ("@) something\nIt is what fits.", False),
    ("The answer is not E. The answer is @.", True), ("Answer: E\nWait.\nAnswer: @", True),
    ("A first look says E. A second one: the answer is @.", True), ("Is it A? B? No.\nAnswer: @", True),
    ("E is not the answer; @ is the correct answer.", False), ("The answer isn't E. I choose @.", True),
    ("１． Ａnswer: @", True), ("Answer: @ (" + "x" * 500 + ")", True), ("Answer: @) something", True),
    ("Answer: @. something", True), ("The answer is @) something", True), ("The answer is (@) something", True),
]  # fmt: skip

UNSETTLED = [
    "", " ", "\n", "A mixture of things happens here", "A bird in the hand", "a", "I think so", "None of them",
    "The answer is a matter of taste", "The answer is a mixture", "The answer is A mixture", "An answer is a thing",
    "The answer is an apple", "The answer is unknown", "The answer is below", "The answer is Because", "answer",
    "Answer:", "Answer: ", "Answer: Apple", "Answer: Berlin", "Answer: Because", "Answer: ABBA",
    "Answer: all of them",
    "Answer: Both A and B", "Answer: A or B", "Answer: A, B", "Answer: A and C", "Answer: (A) or (B)", "Answer: B/C",
    "The answer is A or B.", "The answer is (A) and (C).", "The answer is A, B and C.", "Answer: A & B",
    "The answer is not A.", "The answer is not (B)", "The answer isn't C", "The answer cannot be D", "It is not B.",
    "I would never choose A.", "A is not the answer", "A is wrong, B is wrong too", "Is it A? Or B?",
    "Option A says Paris. Option B says Rome.", "A) Paris\nB) Rome\nC) oak\nD) 42", "(A) x\n(B) y",
    "A. x\nB. y\nC. z",
    "A) Paris\nB) Rome\nNow, let us see.", r"\boxed{}", r"\boxed{A, B}", r"\boxed{A and B}", r"\boxed{AB}",
    r"\boxed{A or B}", r"\boxed{?}", r"\boxed{I}", r"\boxed{Z}", r"\boxed{1}", r"\boxed{none}", r"\boxed{apple}",
    r"\boxed{\text{}}", r"\boxed{\frac{a}{b}}", r"\boxed{a + b}", r"\boxed{A B C D}", "Z", "1", "(1)", "42?",
    "AB", "ab",
    "vitamin A", "Plan B", "type C cells", "a b c d", "I", "x" * 1000, "\\", "{", "}", "\\boxed", "$$", "🦆", "（）",
    "Grade: A+", "B-", "She got an A in class", "Hepatitis B", "the answer, friend, blows in the wind",
    "Answer the question",
    "It is a dog.", "I choose a dog.", "go with a friend", "it's a trap", "It is A dog.", "I pick a card",
]  # fmt: skip


def item(letter):
    return {"gold": letter, "options": OPTIONS}


def test_tables_are_as_long_as_they_say():
    assert len(SETTLED) > 100 and len(UNSETTLED) > 90


@pytest.mark.parametrize("letter", "ABCD")
def test_settled(letter):
    wrong = []
    for template, lower in SETTLED:
        for written in {letter, letter.lower()} if lower else {letter}:
            text = template.replace("@", written)
            verdicts = [choice.check(text, item(other)) for other in "ABCDE"]
            if choice.extract(text) != letter or verdicts != [other == letter for other in "ABCDE"]:
                wrong.append((text, choice.extract(text), verdicts))
    assert not wrong


def test_unsettled():
    letters = set("ABCDEFGH")
    found = {text: choice.extract(text) for text in UNSETTLED if text != "a"}
    assert not {text: letter for text, letter in found.items() if letter in letters}
    assert not [
        t for t in found for letter in "ABCD" if choice.check(t, {"gold": letter, "options": ["p", "q", "r", "s"]})
    ]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{Paris}", "A"), (r"\boxed{\text{paris}}", "A"), ("Answer: Paris", "A"),
        ("The answer is paris.", "A"),
        ("Paris", "A"), ("It took a while.\nParis.", "A"), (r"\boxed{A) Paris}", "A"),
        (r"\boxed{\text{A. Paris}}", "A"),
        ("Answer: The City of  Rome", "B"), (r"\boxed{city of rome}", "B"), (r"\boxed{oak}", "C"),
        (r"\boxed{42}", "D"),
        ("The answer is 42.", "D"), (r"\boxed{A mixture of B and C}", "E"), ("Answer: a mixture of B and C", "E"),
        (r"\boxed{B) Paris}", None), (r"\boxed{Paris or oak}", None), ("Paris, of course not", None), ("Pari", None),
        (r"\boxed{Parisian}", None), (r"\boxed{4}", None), ("Answer: 420", None), ("Paris\nRome", None),
    ],
)  # fmt: skip
def test_the_option_itself(text, letter):
    assert [choice.check(text, item(other)) for other in "ABCDE"] == [other == letter for other in "ABCDE"]


def test_an_option_that_stands_twice_settles_nothing():
    assert not choice.check(r"\boxed{x}", {"gold": "A", "options": ["x", "x"]})
    assert choice.check(r"\boxed{A}", {"gold": "A", "options": ["x", "x"]})


def test_equal_answers_extract_equally():
    assert {choice.extract(t) for t in (r"\boxed{b}", "Answer: (B)", "The answer is b.", "B) Rome", "B")} == {"B"}
    assert choice.extract(r"\boxed{\text{Rome}}") == choice.extract("Answer: rome.") == "rome"


CITIES = ["Paris", "Rome", "London", "Vitamin C"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # A letter that ends a name, or is denied or only supposed.
        ("Vitamin C is correct", None), ("Vitamin C is the best answer", None), ("Plan B is the best", None),
        ("Hepatitis B is the right diagnosis", None), ("Schedule A is right", None), ("C is correct", "C"),
        ("I think that B is correct", "B"), ("A is wrong and B is correct", "B"), ("Since 1 < 2, C is right", "C"),
        ("It is unlikely that B is correct", None), ("Nobody would say B is the right answer", None),
        ("I doubt that the answer is B", None), ("It is unlikely that the answer is Rome", None),
        ("There is no doubt that B is correct", "B"), ("If B is correct, Rome is in France", None),
        ("None of A is correct", None), ("The answer is B. If the answer is A, all is lost", "B"),
        # Several answers are none.
        ("Answer: A; B", None), ("Answer: (A)(B)", None), ("(A)(B)", None), ("Answer: B C", None),
        ("Answer: (A) (B)", None), (r"\boxed{(A)(B)}", None), (r"\boxed{A; B}", None), ("A or B is correct", None),
        ("Answer: B; C is wrong", "B"), ("Answer: B, C is wrong", "B"), ("Answer: B (C is wrong)", "B"),
        # A letter beside the text of another option.
        ("The answer is A) Rome", None), ("The answer is (A) Rome.", None), ("Answer: A: Rome, not Paris", None),
        ("The answer is B) Rome", "B"), ("The answer is B. Rome is Italian", "B"), ("Answer: A) the one", "A"),
        # Plain last lines.
        ("Option B", "B"), ("choice b", "B"), ("Therefore, B.", "B"), ("So B", "B"), ("Hence, (B).", "B"),
        ("A is wrong. C is wrong. Therefore, B.", "B"), ("So, option (B)", "B"), ("It rains, so B.", "B"),
        ("Therefore, A or B.", None), ("So Beta.", None), ("Option", None), ("Options A", None),
        ("B because Rome is the capital", "B"), ("(B) since it fits", "B"), ("Vitamin B because it fits", None),
        ('{"answer": "B"}', "B"), ('{"answer": "B", "why": "A is bad"}', "B"), ('{"answer": "Rome"}', "B"),
        ('{"answer": "A", "why": "it fits"}', "A"), ('{"answer": "A or B"}', None),
        ("The answer is Rome, not Paris", "B"), ("The answer is Rome rather than Paris.", "B"),
        ("The answer is Rome because it is", "B"), ("The answer is not Rome", None),
        ("The answer is Rome, Paris", None), ("The answer is Rome or Paris", None),
    ],
)  # fmt: skip
def test_plain_and_misleading(text, letter):
    item = {"options": CITIES}
    assert [choice.check(text, {**item, "gold": other}) for other in "ABCD"] == [other == letter for other in "ABCD"]


@pytest.mark.parametrize(
    "piece", [" ", "\n", "`", "(", "A; ", "A because ", "so ", "not ", "B is correct ", "option ", "**"]
)
def test_long_texts(piece):
    for text in (piece * (50_000 // len(piece)), "The answer is A" + piece * (50_000 // len(piece))):
        started = time.process_time()
        choice.extract(text)
        assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is Rome (B)", "B"), ('The answer is "Rome" (B).', "B"), ("The answer is Rome, option B", "B"),
        ("Answer: **Rome** (B)", "B"), ("The answer is Rome [B]", "B"), ("The answer is Rome (option B).", "B"),
        ("It is Rome, which is option B.", "B"), ("Hence, Rome (B).", "B"), ("Rome (B)", "B"),
        (r"\boxed{Rome (B)}", "B"),
        ("The answer is not known (D).", "D"),
        ("The answer is Rome (C)", None), ("Hence, Rome (A).", None), ("The answer is not Rome (B)", None),
        ("The answer is not (B)", None), ("The answer is Vitamin (B)", None),
    ],
)  # fmt: skip
def test_an_option_and_its_letter_behind_it(text, letter):
    item = {"options": ["Paris", "Rome", "Why Berlin?", "not known"]}
    assert [x for x in "ABCD" if choice.check(text, item | {"gold": x})] == [letter] * (letter is not None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is A? No, it is B.", "B"), ("The answer is (A)? No: the answer is B.", "B"),
        ("Is the answer is **A**? I choose C.", "C"), ("I choose A? No, I choose B.", "B"),
        ("The answer is A?", None), ("Answer: B?", None), ("The answer is Rome?", None), ("Rome?", None),
        ("The answer is Why Berlin?", "C"), ("The answer is Why Berlin", "C"), ("The answer is C) Why Berlin?", "C"),
    ],
)  # fmt: skip
def test_a_question_settles_nothing(text, letter):
    item = {"options": ["Paris", "Rome", "Why Berlin?", "not known"]}
    assert [x for x in "ABCD" if choice.check(text, item | {"gold": x})] == [letter] * (letter is not None)
