"""Where the final answer of a completion stands: boxes, then markers, then the end of the text."""

from __future__ import annotations

import pytest

from gspo_dist.rewards.final_answer import after_thinking, final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed {3}", "3"),
        (r"\boxed 42, I think", "42"),
        (r"\boxed -1.5.", "-1.5"),
        # signs and words around it
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("} } \\boxed{ 7 } }", "7"),
        ("\\boxed{a\\\nb}", "a\\\nb"),
        # the last one with something in it that is closed
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{5} no, \boxed{3}", "3"),
        (r"\boxed{5} no, \boxed 3", "3"),
        (r"\boxed 5 no, \boxed{3}", "3"),
        (r"\boxed{1}, or so. \boxed{}", "1"),
        (r"\boxed{1} and a cut-off \boxed{2", "1"),
        (r"Answer: 4, that is \boxed{4} and more.", "4"),
        # a box in a box belongs to the outer one
        (r"\boxed{1 + \boxed{2}}", r"1 + \boxed{2}"),
        (r"\boxed{\boxed{1}}, \boxed{2}", r"\boxed{1}, 2"),
    ],
)
def test_the_last_box(text, answer):
    assert final_answer(text) == answer
    assert final_answer(text, boxed_only=True) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$; $\boxed{3}$", "1, 2, 3"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{1} or \boxed{2}", "1 or 2"),
        (r"\boxed{1}, \boxed{2\text{ for }x}", r"1, 2\text{ for }x"),
        (r"\boxed 1, \boxed{2}, and \boxed 3", "1, 2, 3"),
        (r"\boxed{9}. No: \boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1}, \boxed{2}\boxed{3}", "3"),  # nothing between them says that they are a list
        (r"\boxed{1}" + " " * 20 + r", \boxed{2}", "2"),
    ],
)
def test_boxes_side_by_side_are_a_list(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["42", "Answer: 42", r"\boxed{}", r"\boxed{42", ""])
def test_boxed_only_reads_nothing_else(text):
    assert final_answer(text, boxed_only=True) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1</think>2", "2"),
        (r"\boxed{1}</think>2", "2"),  # the prompt held the opening tag
        (r"2 <think>\boxed{1}", "2"),  # cut off
        (r"<think>1</think>2<think>\boxed{3}", "2"),
        (r"<think>\boxed{1}", None),
        ("<answer> 2 </answer> 3", "2"),
        ("<answer>1</answer> no <answer>2</answer> 3", "2"),
        (r"\boxed{1}</answer> \boxed{2}", "2"),  # never opened
        (r"\boxed{1} <answer> \boxed{2}", "2"),  # never closed
        (r"<think><answer>1</answer></think> \boxed{2}", "2"),
    ],
)
def test_thoughts_do_not_count_and_the_tagged_answer_does(text, answer):
    assert final_answer(text) == answer


def test_what_follows_the_thinking():
    assert after_thinking("plain") == "plain"
    assert after_thinking("<think>a</think>b") == "b"
    assert after_thinking("a</think>b</think>c") == "c"
    assert after_thinking("b<think>c") == "b"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("working\n\nAnswer: 42\n\n", "42"),
        ("The final answer is: 42", "42"),
        ("**Answer: 42**", "42"),
        ("The answers are $1, 2$.\nDone.", "$1, 2$"),
        ("### Final answer\n\n42\n\nI hope it helps!", "42"),
        ("答案：42。是", "42"),
        ("Answer: 42\nAnswer: 43\nbye", "43"),
        ("Answer: 42\nAnswer: **\n", "42"),  # the last one announces nothing
        ("Answer: x = 42, y = 3\nbye", "x = 42, y = 3"),
        ("Answer: the area = ab\nbye", "the area = ab"),  # what is named may be part of it
        ("Answer: \n$$\n42\n$$\nbye", "42"),
        ("Answer: \\[ 42 \\] bye", "42"),
        ("Answer: 4 and a cut-off \\boxed{5", "4"),
        ("Answer: 4, see \\boxed{5} <think>", "5"),
    ],
)
def test_the_last_marker(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Paris. It rains", "Paris"),
        ("Paris。It", "Paris"),
        ("Paris.", "Paris"),
        ("Paris.<br>", "Paris"),
        ("no. 5.5 of them. Then 6", "no"),
        ("v1.5beta of it. Then 6", "v1.5beta of it"),
        ("$a. b$ and so on. Then $c$", "$a. b$"),  # the only formula of its sentence
        (r"\$5. Then \$6", r"\$5"),  # dollars of money
        ("$5. Then 6 more", "$5"),
        ("about $5. Then 6 more", "$5"),
    ],
)
def test_a_marker_announces_one_sentence(text, sentence):
    """A full stop inside a formula, a number or a name ends none."""
    assert final_answer(f"Answer: {text}\nbye") == sentence


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("first\n\n  # 42.\n---\n", "42"),
        ("**\\{1, 2\\}", r"\{1, 2\}"),
        ("answers vary", "answers vary"),
        ("so\n$$x\n= 42$$ .\n", "x\n= 42"),
        ("so\n\\[ 42 \\]", "42"),
        ("$$1$$ and then\n7", "7"),
        (r"5 \text{ apples}", r"5 \text{ apples}"),  # nothing but mathematics
        # one formula, bold text or number among words
        ("So we get $42$ of them.", "$42$"),
        (r"So we get \(42\) of them.", r"\(42\)"),
        ("So we get **42 apples** of 50.", "42 apples"),
        ("So we get 1,234.5 of them.", "1,234.5"),
        ("So we get 3/4 of them.", "3/4"),
        ("So we get 42.", "42"),
        # several of them: none is taken
        ("between 3 and 5", "between 3 and 5"),
        ("$a$ or $b$, but **c** not", "$a$ or $b$, but **c** not"),
        ("it is not 42", "it is not 42"),
        # what the last line says something equals
        ("so the area = ab", "ab"),
        ("so the area = ab = cd", "cd"),
        ("so the area =", None),
        ("", None),
        (" \n ", None),
        ("***\n---", None),
        ("so\n!!!", None),
        ("$$ $$", None),
    ],
)
def test_the_end_of_the_text(text, answer):
    assert final_answer(text) == answer


def test_how_far_back_markers_and_formulas_are_looked_for():
    """20,000 signs for a marker. 2,200 for a formula set off, which has 2,000 at most."""
    text = "Answer: 42\n" + "word\n" * 3997 + "last"
    assert len(text) == 20_000
    assert final_answer(text) == "42"
    assert final_answer(text + "s") == "lasts"
    formula = "$$" + "1" * 2000 + "$$" + " " * 196
    assert final_answer(formula) == "1" * 2000
    assert final_answer(formula + " ") == "$$" + "1" * 2000 + "$$"
