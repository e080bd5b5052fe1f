"""The page pool keeps account of every page, whatever is asked of it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.pages import PagePool


class Pool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 4)
        self.held: list[list[int]] = [[] for _ in range(3)]

    @rule(who=st.integers(0, 2), tokens=st.integers(0, 60))
    def cover(self, who: int, tokens: int) -> None:
        missing = self.pool.missing(len(self.held[who]), tokens)
        if missing <= self.pool.free:
            before = list(self.held[who])
            granted = self.pool.grant(self.held[who], missing)
            assert self.held[who] == before + granted
            assert len(self.held[who]) * 4 >= tokens

    @rule(who=st.integers(0, 2))
    def release(self, who: int) -> None:
        free = self.pool.free + len(self.held[who])
        self.pool.release(self.held[who])
        assert self.held[who] == [] and self.pool.free == free

    @invariant()
    def no_page_is_lost_or_held_twice(self) -> None:
        self.pool.check(self.held)


Pool.TestCase.settings = settings(max_examples=50, deadline=None)
TestPool = Pool.TestCase


def test_exactly_the_pages_that_are_missing_are_counted() -> None:
    pool = PagePool(4, 16)
    assert [pool.missing(0, n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pool.missing(3, 17) == 0
