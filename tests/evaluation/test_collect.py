"""Several evaluators: each result is written before the next evaluator runs, and each fails alone."""

import json
import logging

import pytest

from eco_m2f.evaluation.collect import EvaluationError, Evaluators, RowEvaluator, without_nan


class Counts(RowEvaluator):
    """Counts its image rows. May fail at an image or at the end."""

    fails_at, fails_with = None, ValueError("the file x.png is gone")

    def row(self, x, y):
        if x["image_id"] == self.fails_at:
            raise self.fails_with
        return y

    def summary(self, rows):
        if self.fails_at == "end":
            raise self.fails_with
        return {type(self).__name__: {"rows": len(rows), "nothing": float("nan")}}


class First(Counts):
    pass


class Second(Counts):
    pass


class Looks(Counts):
    """Reads the written results when its own are computed."""

    def summary(self, rows):
        self.seen = json.loads(self.path.read_text())
        return super().summary(rows)


def run(evaluators, count: int = 3):
    evaluators.reset()
    for i in range(count):
        evaluators.process([{"image_id": i}], [i])
    return evaluators.evaluate()


@pytest.mark.parametrize("fails_at", [1, "end"])
def test_one_that_fails_costs_its_own_result_alone(tmp_path, fails_at, caplog):
    second = Second()
    second.fails_at = fails_at
    evaluators = Evaluators([First(), second, Looks()], str(tmp_path))
    evaluators._evaluators["Looks"].path = tmp_path / "results.json"
    result = run(evaluators)
    assert set(result) == {"First", "Looks"} and result["First"]["rows"] == 3
    assert evaluators.failures == {"Second": "ValueError: the file x.png is gone"}
    assert evaluators.errors == [Counts.fails_with]
    assert json.loads((tmp_path / "results.json").read_text()) == without_nan(result)
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1 and "Second" in errors[0].getMessage() and "x.png" in errors[0].getMessage()


def test_each_result_is_written_before_the_next_evaluator_runs(tmp_path):
    looks = Looks()
    looks.path = tmp_path / "results.json"
    run(Evaluators([First(), looks], str(tmp_path)))
    assert looks.seen == {"First": {"rows": 3, "nothing": None}}


@pytest.mark.parametrize("error, shown", [(KeyError("fault of the program"), True), (OSError("disk full"), False)])
def test_a_fault_of_the_program_shows_its_trace(error, shown, caplog):
    second = Second()
    second.fails_at, second.fails_with = "end", error
    assert set(run(Evaluators([First(), second]))) == {"First"}
    assert [bool(r.exc_info) for r in caplog.records if r.levelno == logging.ERROR] == [shown]


def test_a_new_run_starts_afresh():
    second = Second()
    second.fails_at = 0
    evaluators = Evaluators([First(), second])
    run(evaluators)
    second.fails_at = None
    assert set(run(evaluators)) == {"First", "Second"} and evaluators.failures == {} and evaluators.errors == []


def test_the_error_names_all_that_failed_and_keeps_the_results():
    error = EvaluationError({"A on x": "ValueError: a", "B on y": "OSError: b"}, {"C": {}})
    assert str(error).startswith("2 evaluator(s) failed") and "A on x: ValueError: a; B on y: OSError: b" in str(error)
    assert error.results == {"C": {}}
