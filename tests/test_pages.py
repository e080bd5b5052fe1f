"""The page pool keeps account of every page, whatever is asked of it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.pages import PagePool, page_key, salt_key

SIZE = 4  # tokens of a page


def keys_of(text: tuple[int, ...], salt: str = "") -> list[bytes]:
    """The identities of the text's full pages."""
    keys, parent = [], salt_key(salt)
    for first in range(0, len(text) - SIZE + 1, SIZE):
        parent = page_key(parent, text[first : first + SIZE])
        keys.append(parent)
    return keys


class Pool(RuleBasedStateMachine):
    """Four sequences begin texts of two different tokens, which often begin alike, grow, and let go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, SIZE)
        self.held: list[list[int]] = [[] for _ in range(4)]
        self.keys: list[list[bytes]] = [[] for _ in range(4)]
        self.content: dict[int, bytes] = {}  # what a page holds, as whoever filled it knows

    @rule(who=st.integers(0, 3), pages=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def begin(self, who: int, pages: list[int]) -> None:
        if self.held[who]:
            return
        self.keys[who] = keys_of(tuple(token for page in pages for token in [page] * SIZE))
        found = self.pool.find(self.keys[who])
        assert [self.content[page] for page in found] == self.keys[who][: len(found)]
        free, idle = self.pool.free, self.pool.idle(found)
        self.pool.share(self.held[who], found, len(pages) * SIZE)
        assert self.held[who] == found and self.pool.free == free - idle

    @rule(who=st.integers(0, 3), tokens=st.integers(0, 60))
    def cover(self, who: int, tokens: int) -> None:
        missing = self.pool.missing(len(self.held[who]), tokens)
        if missing <= self.pool.free:
            before, in_use = list(self.held[who]), {page for pages in self.held for page in pages}
            granted = self.pool.grant(self.held[who], missing)
            assert self.held[who] == before + granted and in_use.isdisjoint(granted)
            assert len(self.held[who]) * SIZE >= tokens
            for page in granted:
                self.content.pop(page, None)

    @rule(who=st.integers(0, 3))
    def fill(self, who: int) -> None:
        for page, key in zip(self.held[who], self.keys[who], strict=False):
            if page not in self.content:
                self.content[page] = key
                self.pool.register(page, key)

    @rule(who=st.integers(0, 3))
    def release(self, who: int) -> None:
        alone = [p for p in self.held[who] if sum(p in pages for pages in self.held) == 1]
        free = self.pool.free + len(alone)
        self.pool.release(self.held[who])
        assert self.held[who] == [] and self.pool.free == free

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check(self.held)


Pool.TestCase.settings = settings(max_examples=60, deadline=None)
TestPool = Pool.TestCase


def filled(pool: PagePool, text: tuple[int, ...]) -> list[int]:
    """Pages that hold the text and are registered."""
    pages: list[int] = []
    keys = keys_of(text)
    pool.grant(pages, len(keys))
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key)
    return pages


def test_exactly_the_pages_that_are_missing_are_counted() -> None:
    pool = PagePool(4, 16)
    assert [pool.missing(0, n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pool.missing(3, 17) == 0


def test_the_page_released_longest_ago_goes_first_and_a_texts_end_before_its_beginning() -> None:
    pool = PagePool(6, SIZE)
    one, two = filled(pool, (1,) * 12), filled(pool, (2,) * 12)
    order = [*reversed(two), *reversed(one)]
    pool.release(two)
    pool.release(one)
    new: list[int] = []
    assert pool.free == 6 and pool.grant(new, 6) == order
    assert pool.find(keys_of((1,) * 12)) == pool.find(keys_of((2,) * 12)) == []


def test_a_text_that_is_read_again_stays() -> None:
    pool = PagePool(4, SIZE)
    one, two = filled(pool, (1,) * 8), filled(pool, (2,) * 8)
    pool.release(one)
    pool.release(two)
    reader: list[int] = []
    pool.share(reader, pool.find(keys_of((1,) * 8)), 8)
    pool.release(reader)
    pool.grant(reader, 2)
    assert len(pool.find(keys_of((1,) * 8))) == 2 and not pool.find(keys_of((2,) * 8))


def test_a_page_in_use_is_never_taken() -> None:
    pool = PagePool(4, SIZE)
    first = filled(pool, (1,) * 12)
    second: list[int] = []
    pool.share(second, pool.find(keys_of((1,) * 8)), 8)
    shared = list(second)
    pool.release(first)
    assert pool.free == 2
    third: list[int] = []
    assert not set(pool.grant(third, 2)) & set(shared)
    pool.check([second, third])
    assert pool.find(keys_of((1,) * 12)) == shared


def test_pages_nobody_has_read_are_taken_only_when_no_other_is_left() -> None:
    pool = PagePool(4, SIZE)
    pool.release(filled(pool, (1,) * 8))
    pages: list[int] = []
    pool.grant(pages, 2, home=0)
    assert len(pool.find(keys_of((1,) * 8))) == 2


def test_of_two_pages_with_one_text_the_first_is_known() -> None:
    pool = PagePool(4, SIZE)
    first, second = filled(pool, (1,) * 4), filled(pool, (1,) * 4)
    assert pool.find(keys_of((1,) * 4)) == first
    pool.release(second)
    pool.check([first])
    assert pool.find(keys_of((1,) * 4)) == first and pool.idle(first) == 0


def test_a_page_is_known_by_its_salt_and_by_all_tokens_up_to_its_end() -> None:
    texts = [(1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 9), (0, 2, 3, 4, 5, 6, 7, 8)]
    last = [keys_of(text, salt)[-1] for text in texts for salt in ("", "a", "b")]
    assert len(set(last)) == len(last)
    assert keys_of(texts[0])[0] == keys_of(texts[1])[0] != keys_of(texts[2])[0]
