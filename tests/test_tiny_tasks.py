"""The task generator: deterministic, its splits disjoint, its answers right."""

import ast
import json
import re
from random import Random

import pytest

from engine.tiny.tasks import FAMILIES, Task, draw_task, evaluation_tasks


def drawn(family: str | None, count: int, held_out: bool = False, seed: int = 0) -> list[Task]:
    draw = Random(seed)
    return [draw_task(draw, held_out, family) for _ in range(count)]


def final_request(task: Task) -> str:
    return task.prompt[-1]["content"]


def test_the_same_seed_draws_the_same_tasks() -> None:
    assert drawn(None, 200) == drawn(None, 200)
    assert drawn(None, 200) != drawn(None, 200, seed=1)


def test_a_held_out_prompt_is_never_in_training() -> None:
    held_out = {json.dumps(task.prompt) for task in evaluation_tasks(300)}
    assert held_out.isdisjoint(json.dumps(task.prompt) for task in drawn(None, 5000))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_chat_that_ends_with_an_answer(family: str) -> None:
    for task in drawn(family, 200) + drawn(family, 20, held_out=True):
        roles = [message["role"] for message in task.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert task.family == family
        assert task.answer


@pytest.mark.parametrize("family", ["sum", "word problem"])
def test_the_equations_of_an_answer_are_true(family: str) -> None:
    for task in drawn(family, 500):
        left, operator, right, result = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", task.answer)[-1]
        assert eval(f"{left} {operator} {right}") == int(result)  # noqa: S307
        asked = [int(number) for number in re.findall(r"\d+", final_request(task))]
        assert sorted(asked) == sorted((int(left), int(right)))


def test_the_steps_of_an_addition_are_true() -> None:
    for task in drawn("sum", 500):
        for terms, total in re.findall(r"(?:ones|tens|hundreds) ([\d +-]+) = (\d+)", task.answer):
            assert eval(terms) == int(total)  # noqa: S307


def test_sorted_lists_are_sorted_and_complete() -> None:
    for task in drawn("sort", 300):
        result = task.answer.rpartition(": ")[2].split(", ")
        request = final_request(task)
        assert sorted(result, reverse="largest first" in request.lower() or "descending" in request or
                      "from largest" in request) == result  # fmt: skip
        assert all(item in request for item in result)
        asked = re.findall(r"\d+", request)
        assert not asked or sorted(asked) == sorted(result)


def test_json_answers_parse() -> None:
    for task in drawn("json", 300):
        if task.answer.startswith("{"):
            record = json.loads(task.answer)
            assert list(record) == ["name", "age", "city", "likes"]
            assert all(str(value) in final_request(task) for value in record.values())


def test_functions_compile_under_the_requested_name() -> None:
    for task in drawn("code", 300):
        source = re.findall(r"```python\n(.*)```", task.answer, re.DOTALL)[0]
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        wanted = re.findall(r"(?:Call|Name) it (\w+)\.", final_request(task))
        assert not wanted or function.name == wanted[0]


def test_stories_use_every_requested_word() -> None:
    for task in drawn("story", 100):
        place = re.findall(r"in the (\w+)", final_request(task))[0]
        assert f"in the {place}" in task.answer
