"""The final answer of worked texts as models write them: what is right counts, what is wrong does not."""

import time

import pytest

from diffmas.answers import choice, code, exact, final, mathematics, reasoning, text
from diffmas.tasks import procedural, relay

KINDS = {"maths": mathematics, "text": text, "exact": exact, "choice": choice}

#: Kind, text, right answer, whether it counts.
SAID = [
    # Reasoning blocks.
    ("choice", "<think>Maybe the answer is A? No.</think>\n\nB", "B", True),
    ("choice", "<think>Maybe the answer is A? No.</think>\n\nB", "A", False),
    ("maths", "<think>\\boxed{12}? wrong.</think>\nThe result is 15.", "15", True),
    ("maths", "<think>\\boxed{12}? wrong.</think>\nThe result is 15.", "12", False),
    ("maths", "<think>The answer is 15.", "15", False),
    ("maths", "The answer is 15. <think>Let me check:", "15", False),
    ("maths", "So it is 12? No.\n</think>\n\n\\boxed{15}", "15", True),
    ("maths", "\\boxed{12}, I think.\n</think>\n\nIt is 15", "12", False),
    ("maths", "<thinking>\\boxed{12}</thinking>15", "15", True),
    ("maths", "<reasoning>\\boxed{12}</reasoning>15", "15", True),
    ("maths", "<THINK>\\boxed{12}</THINK>15", "15", True),
    ("maths", "[THINK]\\boxed{12}[/THINK]15", "15", True),
    ("maths", "<|begin_of_thought|>\\boxed{12}<|end_of_thought|>15", "15", True),
    ("maths", "◁think▷\\boxed{12}◁/think▷15", "15", True),
    ("maths", "<|channel|>analysis<|message|>\\boxed{12}<|end|><|start|>assistant<|channel|>final<|message|>15", "15",
     True),
    ("maths", "analysisWe get \\boxed{12}.assistantfinalIt is 15.", "15", True),
    ("maths", "analysisWe get \\boxed{12}.", "12", False),
    ("maths", "<think>a</think>It is \\boxed{15}. <think>\\boxed{12}?</think>", "15", True),
    ("maths", "<think>I open <think> again</think>\n15", "15", True),
    ("maths", "<think>a <think>12</think> \\boxed{12}</think>\n15", "15", True),
    ("text", "<think>Is it London?</think>Paris", "Paris", True),
    ("text", "<think>Paris</think>", "Paris", False),
    ("text", "<think>\nParis", "Paris", False),
    ("exact", "<think>x</think>\nParis", "Paris", True),
    ("choice", "<think>Answer: C</think>\n\n**Answer: B**", "B", True),
    ("choice", "<think>\n\n</think>\n\n\\boxed{B}", "B", True),
    ("choice", "The answer is B.<|end|>", "B", True),
    # Boxes left blank, and remarks on the answer.
    ("maths", "\\boxed{7}. (I put my answer inside \\boxed{}.)", "7", True),
    ("maths", "\\boxed{7}. (Inside \\boxed{...}, as asked.)", "7", True),
    ("maths", "\\boxed{7} goes into \\boxed{\\text{answer}}", "7", True),
    ("maths", "I give it inside \\boxed{}. The answer is 12.", "12", True),
    ("maths", "\\boxed{7}, no: \\boxed{8}. (In \\boxed{}.)", "7", False),
    ("choice", "\\boxed{B} (the letter inside \\boxed{})", "B", True),
    ("text", "\\boxed{\\text{Paris}} is in \\boxed{ }.", "Paris", True),
    ("maths", "Answer: 72 clips total (48 + 24).", "72", True),
    ("maths", "Answer: 72 clips total (48 + 24).", "24", False),
    ("maths", "**Final Answer:** 72 (i.e., 48 + 24)", "72", True),
    ("maths", "Answer: 72 (48 + 24)", "72", True),
    ("maths", "Answer: 72 = 48 + 24", "72", True),
    ("maths", "Answer: 48 + 24 = 72", "72", True),
    ("maths", "Answer: 72 clips: 48 in April and 24 in May", "72", True),
    ("maths", "Answer: 72 clips — 48 in April and 24 in May", "72", True),
    ("maths", "**Answer: 72** clips (48 + 24)", "72", True),
    ("maths", "Answer: **72** (that is 48 + 24)", "72", True),
    ("maths", "Answer: 2 (x + 1)", "2", False),
    ("maths", "Answer: 20 + 5 apples, so 25", "25", True),
    ("maths", "Answer: 20 + 5 apples, so 25", "20", False),
    # Units, mixed numbers, powers of ten, signs.
    ("maths", "\\boxed{18 km/h}", "18", True),
    ("maths", "\\boxed{18\\text{ km/h}}", "18", True),
    ("maths", "\\boxed{9.8 m/s^2}", "9.8", True),
    ("maths", "\\boxed{\\$18/hour}", "18", True),
    ("maths", "\\boxed{3/x}", "3", False),
    ("maths", "\\boxed{3x/y}", "3", False),
    ("maths", "\\boxed{1\\frac{1}{2}}", "1.5", True),
    ("maths", "\\boxed{1\\frac{1}{2}}", "0.5", False),
    ("maths", "\\boxed{-2\\tfrac34}", "-2.75", True),
    ("maths", "It takes 1 1/2 cups", "1.5", True),
    ("maths", "\\boxed{2\\frac{3}{2}}", "3.5", False),
    ("maths", "\\boxed{11 \\frac{1}{2}}", "5.5", False),
    ("maths", "1e3", "1000", True),
    ("maths", "1000", "1e3", True),
    ("maths", "\\boxed{1.5 \\times 10^{3}}", "1500", True),
    ("maths", "1e3", "13", False),
    ("maths", "−5", "-5", True),
    ("maths", "−5", "5", False),
    ("maths", "The answer is −5.", "-5", True),
    ("maths", "51", "51.0", True),
    # Words.
    ("text", "The answer is Paris.", "Paris", True),
    ("text", "\\boxed{\\text{Paris}}", "Paris", True),
    ("text", "**Answer:** paris", "Paris", True),
    ("text", "The final answer is: **Paris**.", "Paris", True),
    ("text", "Answer: Paris, because it is the capital.", "Paris", True),
    ("text", "Answer: Paris (the capital of France)", "Paris", True),
    ("text", "The capital of France is Paris.", "Paris", True),
    ("text", "The capital of France is **Paris**.", "Paris", True),
    ("text", "Let me think. London is British.\n\nParis", "Paris", True),
    ("text", "<answer>Paris</answer>", "Paris", True),
    ("text", "Not Paris but London", "Paris", False),
    ("text", "Paris or London", "Paris", False),
    ("text", "The answer is not Paris.", "Paris", False),
    ("text", "I doubt that the answer is Paris.", "Paris", False),
    ("text", "It isn't **Paris**.", "Paris", False),
    ("text", "The capital is not Paris.", "Paris", False),
    ("text", "The answer is Paris. Wait, no. The answer is London.", "Paris", False),
    ("text", "Is it Paris?", "Paris", False),
    ("text", "Parisian", "Paris", False),
    ("text", "Paris, Texas", "Paris", False),
    ("text", "", "Paris", False),
    ("text", "Yes, since 7 is prime.", "Yes", True),
    ("text", "yes", "Yes", True),
    ("text", "**Yes**, it is.", "yes", True),
    ("text", "No, it is not.", "yes", False),
    ("text", "No. Wait. Yes.", "no", False),
    ("text", "Yes, it seems so.\nBut the answer is no.", "no", True),
    ("text", "Yes, it seems so.\nBut the answer is no.", "yes", False),
    ("text", "The answer is yes.", "Yes", True),
    ("text", "Nope", "no", False),
    ("text", "The answer is 12/30.", "12:30", False),
    ("text", "The answer is 12:30.", "12:30", True),
    ("text", "12:30", "12/30", False),
    ("text", "The answer is 2024-01-05.", "2024-01-05", True),
    ("text", "2024-01-06", "2024-01-05", False),
    ("text", "2018", "2024-01-05", False),
    ("text", "Answer: (1,2)", "(1, 2)", True),
    ("text", "( 1, 2 )", "(1,2)", True),
    ("text", "(2, 1)", "(1, 2)", False),
    ("text", "12", "(1, 2)", False),
    ("text", "NEW  YORK.", "New York", True),
    ("text", "York", "New York", False),
    ("text", "The answer is Dr. Who.", "Dr. Who", True),
    ("text", "J. K. Rowling", "J. K. Rowling", True),
    ("text", "The author is J. K. Rowling.", "J. K. Rowling", True),
    ("text", "the Nile", "Nile", True),
    ("text", "C", "C++", False),
    ("text", "C++", "C++", True),
    ("text", "Ｐａｒｉｓ", "Paris", True),
    ("text", "It costs 1000 dollars", "1e3", True),
    ("text", "The answer is 5.", "5", True),
    ("text", "−5", "-5", True),
    ("text", "5", "-5", False),
    ("text", "10", "10 Downing Street", False),
    ("text", "10 Downing Street", "10 Downing Street", True),
    ("text", "?", "!", False),
    ("exact", "Paris", "Paris", True),
    ("exact", "The answer is Paris.", "Paris", True),
    ("exact", "paris", "Paris", False),
    ("exact", "1000", "1e3", False),
    ("exact", "(1,2)", "(1, 2)", False),
    # Times and dates are no sums, and other remarks.
    ("maths", "12/30", "12:30", False),
    ("maths", "12:30", "12:30", True),
    ("maths", "The answer is 12:30.", "12:30", True),
    ("maths", "2018", "2024-01-05", False),
    ("maths", "\\boxed{2024-01-05}", "2024-01-05", True),
    ("maths", "#### 72 (48 + 24)", "72", True),
    ("maths", "The answer is 5. Wait, no. The answer is 6.", "6", True),
    ("maths", "Answer: 5 or 6", "6", False),
    ("maths", "\\boxed{€500}", "500", True),
    ("maths", "<answer>72</answer> (48 + 24)", "72", True),
    ("maths", "x^2+1", "x^2+1", True),
    ("text", "The answer is Paris? No, London.", "Paris", False),
    ("text", "The answer is Guess Who's Coming to Dinner?", "Guess Who's Coming to Dinner?", True),
    ("text", "Answer: **What?**", "What?", True), ("text", "The answer is who?", "Who?", True),
    ("text", "The answer is What? No, Who?", "What?", False), ("text", "The answer is Paris?", "Paris", False),
    ("text", "The capital is Paris, not London.", "Paris", True),
    ("text", "- Paris", "Paris", True),
    ("text", "yes and no", "yes", False),
    ("text", "Yes or no? I cannot say.", "yes", False),
    ("text", "Hamlet is by Shakespeare, not by Marlowe.", "Marlowe", False),
    ("choice", "<answer>B</answer>", "B", True),
    # Ten options.
    ("choice", "\\boxed{J}", "J", True),
    ("choice", "The answer is (I).", "I", True),
    ("choice", "Answer: I", "I", True),
    ("choice", "Answer: I think", "I", False),
    ("choice", "The answer is (J). I am sure.", "J", True),
    ("choice", "So the answer is option j.", "J", True),
    ("choice", "I) x", "J", False),
    ("choice", "The answer is B, I believe.", "B", True),
    ("choice", "Answer: I or J", "I", False),
    ("choice", "J is correct", "J", True),
    ("choice", "\\boxed{K}", "J", False),
]  # fmt: skip


def test_the_table_is_as_long_as_it_says():
    assert len(SAID) >= 130 and sum(not right for *_, right in SAID) >= 45


@pytest.mark.parametrize(("kind", "said", "gold", "right"), SAID)
def test_what_counts(kind, said, gold, right):
    item = {"gold": gold, "answer": gold, "options": [f"option {i}" for i in range(10)]}
    assert KINDS[kind].check(said, item) is right, KINDS[kind].extract(said)


#: As above: what is said around an answer, and full stops, marks and words within it.
AROUND = [
    # Scale words, denials, degrees, signs, units.
    ("maths", "The answer is $2 million", "2", False),
    ("maths", "The answer is $2 million", "2000000", True),
    ("maths", "\\boxed{1.5 million}", "1500000", True),
    ("maths", "Answer: 18 thousand", "18", False),
    ("maths", "Answer: 2 dozen", "24", True),
    ("maths", "Answer: 2 dozen eggs", "24", True),
    ("maths", "\\boxed{3\\text{ million people}}", "3000000", True),
    ("maths", "The answer is not 18", "18", False),
    ("maths", "The answer is not 19, it is 18", "18", True),
    ("maths", "The answer is not 19 but 18", "18", True),
    ("maths", "The answer is not 1,900, but 18.", "18", True),
    ("maths", "\\boxed{72°}", "72", True),
    ("maths", "The answer is 72°", "72", True),
    ("maths", "The answer is 72$^\\circ$", "72", True),
    ("maths", "\\boxed{72\\text{ }^\\circ\\text{C}}", "72", True),
    ("maths", "\\boxed{{72}}", "72", True),
    ("maths", "\\boxed{72°C}", "72", True),
    ("maths", "The answer is $–5$", "-5", True),
    ("maths", "The answer is $–5$", "5", False),
    ("maths", "x = –5", "-5", True),
    ("maths", "between 3–5", "5", True),
    ("maths", "\\boxed{72\\text{ clips (48 + 24)}}", "72", True),
    ("maths", "\\boxed{18 \\frac{\\text{km}}{\\text{h}}}", "18", True),
    ("maths", "\\boxed{72^\\circ}", "72", True),
    ("maths", "It costs $2 million.", "2", False),
    ("maths", "It costs $2 million.", "2000000", True),
    ("maths", "She has 3 dozen eggs", "36", True),
    ("maths", "#### 2 million", "2000000", True),
    ("maths", "\\boxed{2\\text{ billion}}", "2000000000", True),
    ("maths", "The answer is 2 hundred", "2", False),
    ("maths", "The answer isn't 19, it is 18", "18", True),
    ("maths", "The answer isn't 18", "18", False),
    ("maths", "The answer is $72$ clips", "72", True),
    ("maths", "#### $72$ clips", "72", True),
    ("maths", "The answer is 18, as 3 of the 5 left.", "18", True),
    ("maths", "The answer is 18, as 3 of the 5 left.", "5", False),
    ("maths", "The answer is 18 per 100 km.", "18", True),
    ("maths", "The answer is 18 per 100 km.", "100", False),
    ("maths", "Answer: 18 for 3 people", "18", True),
    ("maths", "Answer: 18 for 3 people", "3", False),
    ("maths", "The answer is 72 clips in 2 months", "72", True),
    ("maths", "The answer is 72 clips in 2 months", "2", False),
    ("maths", "The answer is 72 clips, 24 of them in May", "72", True),
    ("maths", "The answer is 72 clips, 24 of them in May", "24", False),
    ("maths", "#### 72 clips in 2 months", "72", True),
    ("maths", "The answer is **18** in 3 days", "18", True),
    ("maths", "The answer is $72$ clips in $2$ months", "72", True),
    ("maths", "The answer is $18 for 3 tickets", "18", True),
    ("maths", "The answer is 18°C at 5 p.m.", "18", True),
    ("maths", "Answer: 18, as 20 - 2 = 18", "18", True),
    ("maths", "The answer is 3 * 6 = 18 eggs for 3 people", "18", True),
    ("maths", "The answer is -18 after 3 days", "-18", True),
    ("maths", "The answer is 18 clips, which 3 people made", "18", True),
    ("maths", "The answer is 18 million in 2 years", "18000000", True),
    ("maths", "The answer is x + 3 = 18", "18", True),
    ("maths", "The answer is x + 3 = 18", "3", False),
    ("maths", "The answer is 20 eggs in 5 boxes, so 4", "4", True),
    ("maths", "The answer is 20 eggs in 5 boxes, so 4", "20", False),
    ("maths", "Answer: 3/4 of 24, 18", "18", True),
    ("maths", "Answer: 3 + 15 for 3 people, thus 18", "18", True),
    ("maths", "Answer: x + 3 = 8 for x = 5", "5", True),
    ("maths", "Answer: 5, 10 and 18", "5", False),
    ("maths", "Answer: 1, 2, 18", "1", False),
    ("maths", "Answer: 15.4 bags in a month, meaning 16 bags", "16", True),
    ("maths", "Answer: 18°C", "18", True),
    ("maths", "Answer: 18°C", "19", False),
    # Full stops and colons in an answer.
    ("text", "The time is 12:30 PM.", "12:30 PM", True),
    ("text", "It is 12:30.", "12:30", True),
    ("text", "The date is 2024-01-05.", "2024-01-05", True),
    ("text", "The answer is Mt. Everest.", "Mt. Everest", True),
    ("text", "The answer is Prof. Snape.", "Prof. Snape", True),
    ("text", "The answer is No. 5", "No", False),
    ("text", "The answer is No. 5", "No. 5", True),
    ("text", "The answer is No. It is wrong.", "No", True),
    ("text", "The answer is Vol. 2.", "Vol. 2", True),
    ("text", "The answer is Paris. This answer is correct.", "Paris", True),
    ("text", "Answer: Paris\n\nThis result is final.", "Paris", True),
    ("text", "The answer is clear: Paris", "Paris", True),
    ("text", "The answer is correct.", "correct", True),
    ("text", "It is Mt. Everest.", "Mt. Everest", True),
    ("text", "The city is St. Louis.", "St. Louis", True),
    ("text", "It costs 3.5 dollars. It is blue.", "blue", True),
    ("text", "The time needed is 2.5 hours.", "2.5 hours", True),
    ("text", "The time needed is 2.5 hours.", "2", False),
    ("text", "The time needed is 2.5 hours.", "5 hours", False),
    ("text", "His height is 1.8 m", "1.8 m", True),
    ("text", "The price is $5.50 each", "$5.50 each", True),
    ("text", "The price is $5.50 each", "50 each", False),
    ("text", "The ratio is 3:2.", "3:2", True),
    ("text", "The ratio is 3:2.", "3", False),
    ("text", "The IP address is 192.168.0.1.", "192.168.0.1", True),
    ("text", "The IP address is 192.168.0.1.", "192", False),
    ("text", "The version is v1.2", "v1.2", True),
    ("text", "The version is v1.2.3.", "v1.2.3", True),
    ("text", "The version is v1.2.3.", "v1.2", False),
    ("text", "The answer is Jan. 5, 2024", "Jan. 5, 2024", True),
    ("text", "The date is Jan. 5, 2024.", "Jan. 5, 2024", True),
    ("text", "The answer is Jan. 5, 2024", "Jan", False),
    ("text", "The answer is Dec. It is cold.", "Dec", True),
    ("text", "It is Sept. 3.", "Sept. 3", True),
    ("text", "The answer is 10:30 a.m. on Monday", "10:30 a.m. on Monday", True),
    ("text", "The meeting is at 10:30 a.m. on Monday.", "at 10:30 a.m. on Monday", True),
    ("text", "The answer is 10:30 a.m. on Monday", "10:30 a.m.", False),
    ("text", "The answer is 5 p.m. It is late.", "5 p.m.", True),
    ("text", "The answer is 5 p.m. sharp", "5 p.m.", False),
    ("text", "The meeting is on Monday: 10:30", "10:30", False),
    ("text", "The verse is John 3:16.", "John 3:16", True),
    ("text", "The page is https://a.org/b.html", "https://a.org/b.html", True),
    ("text", "The file is a.txt.", "a.txt", True),
    ("text", "The file is a.txt.", "a", False),
    ("text", "On Jan. 3 at 2.5 km it was 8:05:09.", "8:05:09", True),
    ("text", "It is 2.5 km from Mt. Etna. The name is Mt. Everest.", "Mt. Everest", True),
    ("text", "The currency is the U.S. dollar.", "U.S. dollar", True),
    ("text", "The answer is:\n\\[\n\\text{Paris}\n\\]", "Paris", True),
    ("text", "The answer is:\n$$\nParis\n$$", "Paris", True),
    ("text", "The answer is:\n\\[\n\\text{Rome}\n\\]", "Paris", False),
    ("text", "**Answer: Paris**", "Paris", True),
    # The same characters.
    ("exact", "<answer>*args</answer>", "*args", True),
    ("exact", "\\boxed{*args}", "*args", True),
    ("exact", "#### *args", "*args", True),
    ("exact", "Answer: *args", "*args", True),
    ("exact", "The answer is *args", "*args", True),
    ("exact", "<answer>**kw</answer>", "**kw", True),
    ("exact", "\\boxed{**kw}", "**kw", True),
    ("exact", "#### **kw", "**kw", True),
    ("exact", "Answer: **kw", "**kw", True),
    ("exact", "The answer is **kw", "**kw", True),
    ("exact", "<answer>$5</answer>", "$5", True),
    ("exact", "\\boxed{$5}", "$5", True),
    ("exact", "#### $5", "$5", True),
    ("exact", "Answer: $5", "$5", True),
    ("exact", "The answer is $5", "$5", True),
    ("exact", "<answer>*</answer>", "*", True),
    ("exact", "\\boxed{*}", "*", True),
    ("exact", "#### *", "*", True),
    ("exact", "Answer: *", "*", True),
    ("exact", "The answer is *", "*", True),
    ("exact", "<answer>a; b</answer>", "a; b", True),
    ("exact", "\\boxed{a; b}", "a; b", True),
    ("exact", "#### a; b", "a; b", True),
    ("exact", "Answer: a; b", "a; b", True),
    ("exact", "The answer is a; b", "a; b", True),
    ("exact", "<answer>yes!</answer>", "yes!", True),
    ("exact", "\\boxed{yes!}", "yes!", True),
    ("exact", "#### yes!", "yes!", True),
    ("exact", "Answer: yes!", "yes!", True),
    ("exact", "The answer is yes!", "yes!", True),
    ("exact", "<answer>Hello, world.</answer>", "Hello, world.", True),
    ("exact", "\\boxed{Hello, world.}", "Hello, world.", True),
    ("exact", "#### Hello, world.", "Hello, world.", True),
    ("exact", "Answer: Hello, world.", "Hello, world.", True),
    ("exact", "The answer is Hello, world.", "Hello, world.", True),
    ("exact", "<answer>3 (three dozen)</answer>", "3 (three dozen)", True),
    ("exact", "\\boxed{3 (three dozen)}", "3 (three dozen)", True),
    ("exact", "#### 3 (three dozen)", "3 (three dozen)", True),
    ("exact", "Answer: 3 (three dozen)", "3 (three dozen)", True),
    ("exact", "The answer is 3 (three dozen)", "3 (three dozen)", True),
    ("exact", "<answer>$x$ and $y$</answer>", "$x$ and $y$", True),
    ("exact", "\\boxed{$x$ and $y$}", "$x$ and $y$", True),
    ("exact", "#### $x$ and $y$", "$x$ and $y$", True),
    ("exact", "Answer: $x$ and $y$", "$x$ and $y$", True),
    ("exact", "The answer is $x$ and $y$", "$x$ and $y$", True),
    ("exact", "<answer>\\text{a}</answer>", "\\text{a}", True),
    ("exact", "\\boxed{\\text{a}}", "\\text{a}", True),
    ("exact", "#### \\text{a}", "\\text{a}", True),
    ("exact", "Answer: \\text{a}", "\\text{a}", True),
    ("exact", "The answer is \\text{a}", "\\text{a}", True),
    ("exact", "<answer>\\(a\\) or \\(b\\)</answer>", "\\(a\\) or \\(b\\)", True),
    ("exact", "\\boxed{\\(a\\) or \\(b\\)}", "\\(a\\) or \\(b\\)", True),
    ("exact", "#### \\(a\\) or \\(b\\)", "\\(a\\) or \\(b\\)", True),
    ("exact", "Answer: \\(a\\) or \\(b\\)", "\\(a\\) or \\(b\\)", True),
    ("exact", "The answer is \\(a\\) or \\(b\\)", "\\(a\\) or \\(b\\)", True),
    ("exact", "<answer>U.S.</answer>", "U.S.", True),
    ("exact", "\\boxed{U.S.}", "U.S.", True),
    ("exact", "#### U.S.", "U.S.", True),
    ("exact", "Answer: U.S.", "U.S.", True),
    ("exact", "The answer is U.S.", "U.S.", True),
    ("exact", '<answer>"x"</answer>', '"x"', True),
    ("exact", '\\boxed{"x"}', '"x"', True),
    ("exact", '#### "x"', '"x"', True),
    ("exact", 'Answer: "x"', '"x"', True),
    ("exact", 'The answer is "x"', '"x"', True),
    ("exact", "#### a\nb", "a\nb", True),
    ("exact", "<answer>a\nb</answer>", "a\nb", True),
    ("exact", "#### a\nb", "a", True),
    ("exact", "<answer>*args</answer>", "args", False),
    ("exact", "#### *args", "args", False),
    ("exact", "Answer: *args", "args", False),
    ("exact", "\\boxed{*args}", "args", False),
    ("exact", "<answer>$5</answer>", "5", False),
    ("exact", "#### $5", "5", False),
    ("exact", "\\boxed{$5$}", "5", False),
    ("exact", '<answer>"x"</answer>', "x", False),
    ("exact", "<answer>x.</answer>", "x", False),
    ("exact", "#### x.", "x", False),
    ("exact", "\\boxed{x.}", "x", False),
    ("exact", "Answer: $5", "5", False),
    ("exact", "Answer: `x`", "x", False),
    ("exact", "<answer>**x**</answer>", "x", False),
    ("exact", "<answer>\\text{a}</answer>", "a", False),
    ("exact", "Answer: \\(a\\)", "a", False),
    ("exact", "#### **x**", "x", False),
    ("exact", "Answer: x", "X", False),
    ("exact", "Answer: a b", "a  b", False),
    ("exact", "Answer: **kw", "kw", False),
    ("exact", "The answer is *x*", "x", False),
    ("exact", "**Answer: Paris**", "Paris", True),
    ("exact", "Answer: **Paris**", "Paris", True),
    ("exact", "The answer is **Paris**.", "Paris", True),
    ("exact", "**The answer is Paris.**", "Paris", True),
    ("exact", "\\boxed{\\text{Paris}}", "Paris", True),
    ("exact", "The capital is **Paris**.", "Paris", True),
    ("exact", "Answer: Paris (the capital of France)", "Paris", True),
    ("exact", "Answer: Paris, because it is.", "Paris", True),
    ("exact", "The answer is Paris. This answer is correct.", "Paris", True),
    ("exact", "The answer is:\n\nParis", "Paris", True),
    *[
        ("maths", f"{said}{display}", gold, gold == "18")
        for said in ("The answer is:\n", "The answer is ", "**Answer:**\n\n", "First 7.\n\nFinal answer: ")
        for display in (
            "\\[\n18\n\\]",
            "$$\n18\n$$\nas 3 of 5",
            "\\[ 18 \\]",
            "\\[\nx = 18\n\\]",
            "\\[\n3 \\times 6\n= 18\n\\]",
        )
        for gold in ("18", "3", "7")
    ],
]


@pytest.mark.parametrize(("kind", "said", "gold", "right"), AROUND)
def test_what_is_said_around_an_answer(kind, said, gold, right):
    assert KINDS[kind].check(said, {"gold": gold, "answer": gold}) is right, KINDS[kind].extract(said)


@pytest.mark.parametrize(
    ("question", "said", "gold", "right"),
    [
        ("How many dozen eggs are there?", "The answer is 26 dozen.", "26", True),
        ("How many dozens are there?", "There are 26 dozen eggs", "26", True),
        ("How many more dozen eggs?", "\\boxed{26\\text{ dozen}}", "26", True),
        ("What is it worth, in millions?", "$4 million", "4", True),
        ("How many eggs are in 26 dozen?", "The answer is 26 dozen.", "26", False),
        ("How many eggs are there?", "The answer is 26 dozen.", "26", False),
        ("How many eggs are there?", "The answer is 26 dozen.", "312", True),
        ("How many dozen eggs are there?", "The answer is 26 million dozen.", "26", False),
    ],
)
def test_a_scale_that_the_question_asks_for(question, said, gold, right):
    assert mathematics.check(said, {"question": question, "gold": gold, "answer": gold}) is right


F = "def f(x):\n    return x + 1\n"
INDENTED = "".join(f"   {line}\n" for line in F.splitlines())


@pytest.mark.parametrize(
    "said",
    [
        f"1. So:\n\n   ```python\n{INDENTED}   ```\n",
        f"- ```python\n{INDENTED}   ```\n",
        *(f"```{name}\n{F}```" for name in ("py3", "python3.10", "Python", "{python}", "{.python}", "python3", "py")),
        f'```python title="f.py"\n{F}```',
        f"<think>\n```python\ndef f(x):\n    ...\n</think>\n```python\n{F}```",
        f"<think>Use ``` here</think>```python\n{F}```",
        f"Open fence:\n```python\ndef f(\n</think>\n\n```python\n{F}```",
    ],
)
def test_programs(said):
    assert code.program(said, "f") == F


def test_tags_in_a_program_are_strings():
    for line in ("s.split('</think>')[-1]", "re.sub(r'<think>.*?</think>', '', s)", "'<think>' in s", '"<think>" + s'):
        program = f"def f(s):\n    return {line}\n"
        assert code.program(f"```python\n{program}```") == program
        assert code.program(f"<think>Hm.</think>\n```python\n{program}```") == program


def test_other_fences_are_no_programs():
    assert code.program("```pyramid\nx\n```") is None and code.program("```bash\nls\n```") is None


@pytest.mark.parametrize("kind", [mathematics, choice, code, text, exact, relay, procedural])
def test_a_block_that_never_ends_has_no_answer(kind):
    for said in ("<think>\\boxed{B} 12", "12\n```python\nx = 1\n```\n<think>", "B <think>"):
        assert kind.extract(said) is None


def test_the_other_tasks_leave_reasoning_out():
    assert relay.check("<think>3 or 4?</think> 7", {"answer": "7"})
    assert not relay.check("<think>3 or 4?</think> 7", {"answer": "3"})
    assert procedural.extract("<think><answer>1</answer></think><answer>2</answer>") == "2"


def test_a_block_that_the_prompt_opened():
    for prompt in ("<|im_start|>assistant\n<think>\n", "[THINK]"):
        assert reasoning.removed(reasoning.continued(prompt, "12 it is")) == ""
        assert (
            reasoning.removed(
                reasoning.continued(
                    prompt, "12?</think>7".replace("</think>", "[/THINK]" if "[" in prompt else "</think>")
                )
            )
            == "7"
        )
    assert reasoning.continued("<think>\n\n</think>\n\n", "12") == "12"


def test_letters_beyond_the_options_are_no_answers():
    assert choice.extract("\\boxed{J}") == "J"
    assert not any(choice.check("\\boxed{J}", {"gold": gold, "options": list("pqrs")}) for gold in "ABCD")


PIECES = [
    "<think>", "</think>", "'<think>'", "**", "is ", "the answer is ", "not ", "Yes. ", "(a ", "<answer>", "\\boxed{}",
    "\\boxed{.", "1 1/2 ", "72 (", "x/", "km/", ": 1", " = 1", "\u202f1", "no\n", "Dr. ", ",", "( ", "\\boxed{\\text{",
    "<|channel|>analysis<|message|>", "- ```py\n", "   \n", "a ", ". ", "1e", "J, ",
    "answer is \\[", "answer is $$", "a.b.", "U.S. ", "U.S", "A.b", "p.m. 3 ", "Jan. 5 ", "No. ", "a:b:", "is a.b ",
    "18 per ", "answer is 3 in 4, ", "2 dozen ", "answer: **",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_are_read_in_no_time(piece):
    """Linear time: what grows with the square takes minutes here."""
    said = piece * (100_000 // len(piece))
    for kind in (mathematics, choice, code, text, exact):
        started = time.process_time()
        kind.extract(said)
        assert time.process_time() - started < 5, kind.__name__
    assert final.boxed(said) is None or piece.startswith("\\boxed")
