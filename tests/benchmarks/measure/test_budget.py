"""A run that must end says what it left out."""

from benchmarks.measure.budget import Budget


def test_a_budget_notes_what_it_left_out():
    budget = Budget(10.0)
    assert budget.allows("short", 1.0)
    assert not budget.allows("long", 100.0)
    assert [row["left out"] for row in budget.left_out] == ["long"]
    assert Budget(None).allows("anything", 1e9)
