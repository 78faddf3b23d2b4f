"""Mathematical answers: numbers exactly, everything else by math-verify, and nothing raises or hangs."""

import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmas.answers import choice, code, final, mathematics, numbers
from diffmas.answers.verifier import Verifier

# @ is the answer.
SAID = [
    r"\boxed{@}", r"\boxed{ @ }", r"$\boxed{@}$", r"\[\boxed{@}\]", r"\boxed{$@$}", r"\boxed{\text{@}}",
    r"\boxed{x = @}",
    r"\boxed{@.}", r"\fbox{@}", r"So \boxed{@} in all, from 12 and 7.", r"\boxed{11}, no, \boxed{@}",
    r"\boxed{\mathbf{@}}",
    r"\boxed{@\text{ dollars}}", r"\boxed{@ \text{ cm}^2}", r"\boxed{@ apples}", r"\boxed{\$@}",
    r"\boxed{\left(@\right)}",
    "#### @", "12 + 1\n#### @", "####@\n", "#### @\nDone 99", "#### $@", "The answer is @", "The answer is @.",
    "The answer is: @", "The final answer is $@$.", "Answer: @", "**Answer:** @", "Final Answer: @", "answer = @",
    "The answer is \\(@\\), not 11.", "The answer is @ dollars.", "It takes 3 steps and 4 more.\nThe answer is @",
    "3 and 4 make @", "It costs $@.", "= @", "x = @", "@", " @ \n", "@.", "**@**", "$@$", "12 - 3 leaves @ apples",
    "(@)", "so 9*3 = @!", "about 7, then 8, so @", "\\$@", "@%", "@ %",
]  # fmt: skip
NUMBERS = {
    "70000": ["70000", "70,000", "70{,}000", "70000.0", "70,000.00", "+70000"],
    "18": ["18", "18.0", "18.00", "018"],
    "0.5": ["0.5", ".5", "0.50", "1/2"],
    "-7": ["-7", "-7.0"],
    "1250.5": ["1,250.5", "1250.50"],
}
RIGHT = [
    (r"\boxed{\frac{1}{2}}", "0.5"), (r"\boxed{\dfrac12}", "0.5"), (r"\boxed{-\frac{3}{4}}", "-0.75"),
    (r"\boxed{1/3}", "1/3"),
    (r"\boxed{\tfrac{2}{6}}", "1/3"), (r"\boxed{90^\circ}", "90"), (r"\boxed{90^{\circ}}", "90"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{10{,}000{,}000}", "10000000"), (r"\boxed{11,\! 111}", "11111"), (r"\boxed{5\,000}", "5\\,000"),
    (r"\boxed{\text{Evelyn}}", "evelyn"), (r"\boxed{even}", r"\text{even}"), (r"\boxed{\text{Yes}}", "yes"),
    ("Answer: yes", "Yes"),
    (r"\boxed{−7}", "-7"), (r"\boxed{- 7}", "-7"), (r"\boxed 5", "5"), (r"\boxed{12", "12"), ("it is -10", "-10"),
    ("She has 5-10", "10"), ("5 - 10", "10"), ("1,234,567", "1234567"), ("9" * 900, "9" * 900), ("9 < 10", "10"),
    ("x=5, so 5", "5"), (r"\boxed{\$1{,}250.50}", "1250.5"),
    ("2024 was long ago. The answer is 5. I am sure: 100%", "5"),
    ("I ate 3/4 of 20: 15", "15"), ("v1.2 then 7", "7"), (r"\boxed{3}\boxed{", "3"),
    (r"\boxed{\{3\}} \boxed{4}", "4"),
]  # fmt: skip
WRONG = [
    ("70,000", "70"), ("70", "70000"), ("70.000", "70000"), ("7 0000", "70000"), ("70,0000", "700000"),
    ("1,2", "12"), ("12,34", "1234"),
    ("12.5", "125"), ("125", "12.5"), ("7 8 9", "8"), ("9 then 8", "9"), ("it is -10", "10"), ("10", "-10"),
    ("####", "9"),
    ("no number", "1"), ("", "1"), (" ", "0"), ("\n", "0"), (r"\boxed{}", "1"), (r"\boxed{ }", "0"),
    (r"\boxed{?}", "1"),
    (r"\boxed{5} ", "6"), (r"5 \boxed{6}", "5"), (r"\boxed{5 or 6}", "5"), (r"\boxed{5, 6}", "6"),
    (r"\boxed{5, 6}", "56"),
    (r"\boxed{x}", "1"), (r"\boxed{1/0}", "0"), (r"\boxed{\frac{1}{0}}", "1"), (r"\boxed{0/0}", "0"),
    (r"\boxed{1e5}", "15"),
    (r"\boxed{\frac{1}{2}}", "12"), (r"\boxed{\frac{1}{2}}", "2"), (r"\boxed{1 2}", "12"), (r"\boxed{2^3}", "23"),
    (r"\boxed{--5}", "5"),
    (r"\boxed{-}", "0"), (r"\boxed{.}", "0"), (r"\boxed{,}", "0"), (r"\boxed{$}", "0"), (r"\boxed{\infty}", "8"),
    (r"\boxed{NaN}", "1"),
    (r"\boxed{1000}", "1,0"), (r"\boxed{\text{Evelyn}}", "Eve"), (r"\boxed{not even}", "even"),
    (r"\boxed{odd}", "even"),
    (r"\boxed{yes and no}", "yes"), ("The answer is 5", "4"), ("The answer is 5. Or 4.", "4"), ("#### 5\n4", "4"),
    ("4\n#### none", "4"),
    ("١٢", "12"), ("9" * 2000, "9"), ("9" * 5000, "9" * 5000 + "1"), ("0x10", "16"), ("twelve", "12"),
    ("1" + "0" * 20 + "1", "1" + "0" * 21),
    ("5.", "0.5"), ("1.0000000000000000000000000000001", "1"), ("3:30", "3"),
    ("100000000000000000001", "100000000000000000000"),
]  # fmt: skip


def test_tables_are_as_long_as_they_say():
    assert len(SAID) * sum(map(len, NUMBERS.values())) > 700 and len(RIGHT) + len(WRONG) > 85


@pytest.mark.parametrize("gold", NUMBERS)
def test_numbers_however_they_are_said(gold):
    texts = [template.replace("@", written) for template in SAID for written in NUMBERS[gold]]
    assert not [t for t in texts if not mathematics.check(t, {"answer": "worked out", "gold": gold})]
    assert {mathematics.extract(t.replace("x = ", "")) for t in texts} <= {
        gold,
    }  # fmt: skip
    for other in {*NUMBERS, "17.9", "0", "700000", "7", "-18", "1"} - {gold}:
        assert not [t for t in texts if mathematics.check(t, {"answer": other})]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right(text, gold):
    assert mathematics.check(text, {"answer": "worked out", "gold": gold})


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong(text, gold):
    assert not mathematics.check(text, {"answer": gold})


# (equal, answer, right answer): these need math-verify.
LATEX = [
    (True, r"x^2+2x+1", "(x+1)^2"), (True, r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (True, "[2,5)", r"\left[2, 5\right)"),
    (False, "(2,5)", "[2,5)"), (True, r"\{2,1\}", r"\{1,2\}"), (False, r"\{1,3\}", r"\{1,2\}"),
    (True, "1,-2", "-2,1"),
    (True, r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    (False, r"(\frac{\pi}{2},3)", r"\left( 3, \frac{\pi}{2} \right)"),
    (True, "6-5i", "6 - 5i"), (False, "6+5i", "6 - 5i"), (True, r"3\sqrt{13}", r"3 \sqrt{13}"),
    (False, r"3\sqrt{12}", r"3 \sqrt{13}"),
    (True, r"\sqrt{117}", r"3 \sqrt{13}"), (True, "p-q", "p - q"), (False, "q-p", "p - q"),
    (True, r"\pi r^2", r"\pi r^2"),
    (True, r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (False, r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), (True, "5", "x=5"),
    (False, "6", "x=5"),
    (True, r"2\cdot 3^5", "486x^0"), (True, r"(-\infty,0)\cup(0,\infty)", r"(-\infty, 0) \cup (0, \infty)"),
    (False, r"(-\infty,0)", r"(-\infty, 0) \cup (0, \infty)"), (True, r"\frac{3\pi}{4}", r"0.75\pi"),
    (True, "(C)", r"\text{(C)}"),
    (False, "(B)", r"\text{(C)}"), (True, "e^{2x}", "(e^x)^2"), (True, r"\log_2 8", "\\sqrt{9}"),
    (True, "2516_8", "2516_8"),
    (False, "no idea", "x^2"), (False, "", "x^2"), (False, "}{", "x^2"), (False, r"\frac{", "x^2"),
    (False, r"\sqrt", "x^2"),
]  # fmt: skip


def test_latex():
    pytest.importorskip("math_verify")
    wrong = [
        (f, g) for equal, f, g in LATEX if mathematics.check(rf"\boxed{{{f}}}", {"gold": g, "answer": ""}) != equal
    ]
    assert not wrong


# What is stated without dollars or a box, and the answer in it.
STATED = [
    ("2x+5", "2x+5"), ("2x + 5.", "2x + 5"), ("2x + 5 for all x > 3", "2x + 5"), ("y = 2x + 5", "y = 2x + 5"),
    ("x^2 - 3x + 2, as shown", "x^2 - 3x + 2"), ("a^2+b^2", "a^2+b^2"), ("2xy + 1", "2xy + 1"), ("2 x + 1", "2 x + 1"),
    ("n(n+1)/2 in general", "n(n+1)/2"), ("3*(4+5)", "3*(4+5)"), ("2^10", "2^10"), ("1 + 2i", "1 + 2i"), ("6i", "6i"),
    ("sqrt(2)", "sqrt(2)"), ("3\\sqrt{2}", "3\\sqrt{2}"), ("\\frac{x}{2} + 1 or so", "\\frac{x}{2} + 1"),
    ("e^{2x}", "e^{2x}"), ("(2,3)", "(2,3)"), ("[0, 1)", "[0, 1)"), ("(0, 1) and nothing else", "(0, 1)"),
    ("1, 2, 3", "1, 2, 3"), ("x < 5", "x < 5"), ("- x", "- x"), ("$2x+5$", "2x+5"), ("$ 2x+5 $", "2x+5"),
    ("$x$, not $y$", "x"), ("\\(x+1\\)", "x+1"), ("**2x+5**", "2x+5"), ("sin(x) + cos x", "sin(x) + cos x"),
    # Numbers stay numbers, and words words.
    ("5 apples", "5"), ("5 m^2", "5"), ("\\frac{1}{2}", "1/2"), ("\\frac{1}{2} of it", "1/2"), ("x = 5", "5"),
    ("20 + 5 = 25 apples", "25"), ("20 + 5 apples, so 25", "25"), ("x + 3 = 8, so x = 5", "5"), ("5 x 3 = 15", "15"),
    ("5 a day", "5"), ("5-year plans", "5"), ("5, which is odd", "5"), ("$5 + $3 = $8", "8"), ("3 - so, three", "3"),
    ("12 because 3+4", "12"), ("3/4 of 20, 15", "15"), ("70,000", "70000"), ("a mixture", "a mixture"), ("k", "k"),
    ("x-ray", "x-ray"), ("New York", "New York"), ("2x", "2x"), ("3ab", "3ab"), ("5 cm", "5"), ("5 h", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "answer"), STATED)
def test_a_stated_answer_is_the_whole_formula(said, answer):
    assert mathematics.extract(f"First 7.\nThe answer is {said}") == mathematics.normal(answer)


def test_formulas_stated_in_words_are_compared():
    pytest.importorskip("math_verify")
    for found, gold, equal in (
        ("5 + 2x", "2x+5", True), ("5", "2x+5", False), ("2x + 5 for all x", "2x+5", True), ("y = 2x+5", "2x+5", True),
        ("2", "2x", False), ("x + x", "2x", True), ("6", "6i", False), ("(2, 3)", "(2,3)", True), ("3", "(2,3)", False),
    ):  # fmt: skip
        assert mathematics.check(f"The answer is {found}.", {"answer": gold}) is equal, (found, gold)


def test_an_endless_comparison_is_wrong_and_the_next_one_goes_on():
    pytest.importorskip("math_verify")
    verifier = Verifier(seconds=1.5)
    assert verifier("x^2", "x \\cdot x")
    started = time.monotonic()
    assert not verifier("x^2", "9^{9^{9^9}}")
    assert time.monotonic() - started < 30
    verifier.seconds = 60
    found = []
    threads = [threading.Thread(target=lambda: found.append(verifier("2x", "x+x"))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [True] * 4
    child = verifier._child
    verifier.close()
    assert child.poll() is not None


def test_what_needs_math_verify_is_said_before_a_model_runs(monkeypatch):
    assert [mathematics.needs_verifier(g) for g in ("5", "1/2", "yes", r"\text{Evelyn}", "in New York", "x")] == [
        False
    ] * 6
    assert all(mathematics.needs_verifier(g) for g in ("x^2", "x - y", r"\sqrt{2}", "(1,2)", "x=5", "a b"))
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda name: None)
    mathematics.require(["5", "yes"], "sums")
    with pytest.raises(ModuleNotFoundError, match=r"task sums compares answers such as 'x\^2' .*diffmas\[data\]"):
        mathematics.require(["5", "x^2"], "sums")


@given(st.fractions(), st.sampled_from(["{}", "{} apples", "${}", "{}%", r"\text{{{}}}"]))
def test_every_number_reads_back(value, form):
    written = numbers.normal(value)
    assert numbers.parse(written) == value
    assert mathematics.normal(form.format(written)) == written
    assert mathematics.check(rf"\boxed{{{form.format(written)}}}", {"answer": written})


@given(st.integers(0, 10**12))
def test_thousands_separators(value):
    assert numbers.parse(f"{value:,}") == value == numbers.parse(f"{value:,}.00")
    assert numbers.parse(numbers.last(f"it is {value:,}.")) == value


PIECES = [
    r"\boxed{", r"\boxed", r"\text{", "}", "{", "####", "answer is ", "Answer: ", "A", "b", "(", ")", "$", "\\",
    "1", "0", ",", ".",
    "/", r"\frac", "-", "%", "\n", " ", "```python\n", "```", "def f():", "    return 1", "^", "é", "🦆", "\0",
    "\ud800", "٣", "½", "１", "x", "+", "=", "sqrt", "_", "<", "answer is 2x + ",
]  # fmt: skip


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_nothing_raises(text):
    for kind in (mathematics, choice, code):
        found = kind.extract(text)
        assert found is None or isinstance(found, str)
        assert kind.extract(text) == found
    assert mathematics.check(text, {"answer": "7"}) in (True, False)
    assert choice.check(text, {"gold": "A", "options": ["x", "y"]}) in (True, False)
    final.boxed(text), final.unwrapped(text), numbers.parse(text)


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_are_read_in_no_time(piece):
    text = piece * 20_000
    started = time.monotonic()
    for kind in (mathematics, choice, code):
        kind.extract(text)
    assert time.monotonic() - started < 10, sys.getsizeof(text)


def test_normal_forms():
    assert [numbers.normal(Fraction(*f)) for f in ((1, 2), (-5, 4), (1, 3), (70000, 1), (0, 1), (1, 1000))] == [
        "0.5", "-1.25", "1/3", "70000", "0", "0.001",
    ]  # fmt: skip
    assert mathematics.extract(r"\boxed{\dfrac{x}{2}}") == mathematics.extract(r"\boxed{ \frac{x}{2} }")


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("The answer is 42 which is 2 more than 40", "42", "40"),
        ("The answer is 42 and the remainder is 2", "42", "2"),
        ("The answer is 42, and there are 2 left.", "42", "2"), ("The answer is 42 while Ann has 2.", "42", "2"),
        ("The answer is $42 although 2 were lost", "42", "2"), ("The answer is 12 to the nearest 10.", "12", "10"),
        ("The answer is 3.14 to 2 decimal places", "3.14", "2"), ("The answer is 7, going from 5 to 12", "7", "12"),
        ("The answer is 5 dozen which is 60", "60", "5"), ("The answer is 20 in 5, and so it is 4", "4", "20"),
        ("#### The answer is 12", "12", "0"), ("#### So she has 12 apples left", "12", "0"),
        ("#### It is 12, not 13.", "12", "13"), ("<answer>The answer is 12</answer>", "12", "0"),
        ("The answer is ２", "2", "0"), ("答えは：２", "2", "0"), ("\\boxed{１，０００}", "1000", "1"),
        ("½", "0.5", "2"),
        ("The answer is 1½.", "1.5", "2"), ("It takes 2 ¾ hours", "2.75", "2"), ("an area of 18 m²", "18", "2"),
        (r"\boxed{\frac{2}{-3}}", "-2/3", "2/3"), (r"\boxed{\frac{-2}{-3}}", "2/3", "-2/3"),
        ("The answer is 2/-3", "-2/3", "2"),
        (r"\boxed{1 000 000}", "1000000", "0"), ("The answer is 1 000 000 dollars.", "1000000", "0"),
        ("#### 12 500", "12500", "500"), ("The answer is -1 000.5", "-1000.5", "0.5"),
        ("I count 100 200 300", "300", "100200300"),
    ],
)  # fmt: skip
def test_what_goes_on_behind_a_number_and_how_it_is_typed(text, right, wrong):
    assert mathematics.check(text, {"answer": right}) and not mathematics.check(text, {"answer": wrong})


@pytest.mark.parametrize(
    ("text", "golds"),
    [
        ("The answer is 2³", "2 3 23"), ("The answer is 42²", "42 2"), ("It is 42².", "42 2"), ("It is 2^3", "2 3"),
        ("It is 10⁻³", "10 3 -3"), ("about 3 × 10^{5}", "3 10 5"), ("The answer is 10 to 12", "10 12"),
        ("The answer is 10–12", "10 12"), ("The answer is from 10 to 12 apples", "10 12"),
        ("The answer is $10 up to $12", "10 12"),
        ("The answer is 10 and 12", "10 12"), ("The answer is 10 through 12.", "10 12"),
        ("#### 10 to 12 apples", "10 12"),
        ("#### 5 or 6", "5 6"), (r"\boxed{\frac{2}{-0}}", "0"), (r"\boxed{1 00}", "100"), (r"\boxed{1 0000}", "10000"),
        ("#### not 12", "12"),
    ],
)  # fmt: skip
def test_powers_and_ranges_are_none_of_their_numbers(text, golds):
    assert not [gold for gold in golds.split() if mathematics.check(text, {"answer": gold})]
