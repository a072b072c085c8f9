"""Files of questions: what is in them, and where they are wrong."""

import pytest

from vllm_squeeze.offline_tools.questions import (
    GENERAL,
    GENERAL_HELD_BACK,
    MOST_QUESTIONS,
    general_questions,
    hold_back,
    read_questions,
    spread,
)


def written(tmp_path, content: str | bytes):
    path = tmp_path / "questions"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "questions"),
    [
        ("Who?", ["Who?"]),
        ("Who?\r\n\n \n  What {x}?\nWhy\u2028not?\n", ["Who?", "  What {x}?", "Why\u2028not?"]),
        ('\n{"question": "Who?"}\n{"id": 7, "question": "\\n\\nQ: Why?\\nA:"}\n', ["Who?", "\n\nQ: Why?\nA:"]),
    ],
    ids=["one", "lines", "json-lines"],
)
def test_questions_are_read_as_they_are(tmp_path, content, questions):
    assert read_questions(written(tmp_path, content)) == questions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": empty"),
        (b" \n\t\n", ": empty"),
        (b"\xff\xfeWho?", "utf-8"),
        ('{"question": "Who?"}\n\n{"question": ', ", line 3: not JSON"),
        ('{"question": "Who?"}\nWhat?', ", line 2: not JSON"),
        ('{"question": "Who?"}\n["What?"]', ', line 2: must be a JSON object with a text "question"'),
        ('{"prompt": "Who?"}', ', line 1: must be a JSON object with a text "question"'),
        ('{"question": 7}', ', line 1: must be a JSON object with a text "question"'),
        ('{"question": " "}', ', line 1: must be a JSON object with a text "question"'),
    ],
)
def test_what_is_no_question_is_named_by_file_and_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"--questions: {path}") and message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^--questions: .*nowhere.*No such file"):
        read_questions(tmp_path / "nowhere")


@pytest.mark.parametrize("count", [1, MOST_QUESTIONS, 10 * MOST_QUESTIONS + 7])
def test_of_many_questions_some_are_taken_from_all_of_the_file(count):
    questions = [str(i) for i in range(count)]
    taken = spread(questions)
    assert len(taken) == min(count, MOST_QUESTIONS) == len(set(taken))
    assert taken == sorted(taken, key=int) and int(taken[-1]) >= count - 1 - count / MOST_QUESTIONS


def test_general_questions_follow_a_raw_text_after_a_blank_line():
    assert general_questions(chat=True) == list(GENERAL)
    assert all(question.startswith("\n\n") for question in general_questions(chat=False))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_some_of_many_questions_are_held_back(count):
    given = [f"question {number}" for number in range(count)]
    calibrating, held_back = hold_back(given)
    assert sorted(calibrating + held_back) == sorted(given)
    assert len(held_back) == (count // 4 if count >= 8 else 0)
    assert calibrating == [question for question in given if question not in held_back]


@pytest.mark.parametrize("chat", [True, False])
def test_general_questions_that_are_held_back_are_others(chat):
    asked, held_back = general_questions(chat), general_questions(chat, GENERAL_HELD_BACK)
    assert len(held_back) == 8 and not set(asked) & set(held_back)
    assert chat or all(question.endswith("\nAnswer:") for question in held_back)
