"""The pool of KV pages: who holds what, and which pages hold text that another sequence may begin with.

A full page is known by its tokens and all before them: causal KV depends on nothing else, so that every mode may read
what any mode has written.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile


def salt_key(salt: str) -> bytes:
    """The identity of an empty text. Texts under different salts share no page."""
    return blake2b(salt.encode(), digest_size=16, person=b"salt").digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The identity of a page with these tokens after the page `parent`, or after `salt_key` for a first page."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Page ids 0..total-1. A page is free, held by as many lists as share it, or idle: registered under a key and held
    by none. Idle pages count as free; the one released longest ago is the first to be given to somebody else.

    Pages that follow one another are read without a copy on a CPU, so a sequence gets the page after its last one, or
    its home for the first, where they are free.
    """

    def __init__(self, total: int, page_size: int) -> None:
        self.total, self.page_size = total, page_size
        self.asked_tokens = self.hit_tokens = 0  # of texts that were looked up, so far
        self.version = 0  # changes whenever `find` or `idle` may answer otherwise than before
        self._free = set(range(total))
        self._holders = [0] * total
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free) + len(self._idle)

    def missing(self, held: int, tokens: int) -> int:
        """Pages that `held` pages lack to cover `tokens` slots."""
        return max(0, -(-tokens // self.page_size) - held)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages registered under the keys, up to the first key without one."""
        found = (self._pages.get(key, -1) for key in keys)
        return list(takewhile(lambda page: page >= 0, found))

    def idle(self, pages: Iterable[int]) -> int:
        """How many of the pages are held by nobody."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: list[int], found: list[int], tokens: int) -> None:
        """Moves what `find` found for a text of `tokens` tokens to a sequence's empty list, to be read only."""
        assert not pages
        self.version += 1
        self.asked_tokens += tokens
        self.hit_tokens += len(found) * self.page_size
        for page in found:
            self._idle.pop(page, None)
            self._holders[page] += 1
        pages.extend(found)

    def grant(self, pages: list[int], count: int, home: int = 0) -> list[int]:
        """Moves `count` free pages to the end of a sequence's list; returns them. The pool must have them."""
        held = len(pages)
        for _ in range(count):
            wanted = pages[-1] + 1 if pages else home
            if wanted in self._free:
                self._free.remove(wanted)
                page = wanted
            elif self._free:
                page = self._free.pop()
            else:
                self.version += 1
                page, _ = self._idle.popitem(last=False)
                del self._pages[self._keys.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages[held:]

    def register(self, page: int, key: bytes) -> None:
        """Makes a held page known by its key. Where another page is known by it already, this one stays private."""
        if key not in self._pages:
            assert self._holders[page] and page not in self._keys, "what a page holds has changed"
            self._keys[page], self._pages[key] = key, page
            self.version += 1

    def release(self, pages: list[int]) -> None:
        """Takes all pages of a sequence back and empties its list. Of a text's pages the last is the first to go."""
        self.version += 1
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.add(page)
        pages.clear()

    def check(self, held: list[list[int]]) -> None:
        """Asserts that every page is accounted for, where these lists are all that hold any."""
        holders = [0] * self.total
        for pages in held:
            assert len(set(pages)) == len(pages), "a list holds a page twice"
            for page in pages:
                holders[page] += 1
        assert holders == self._holders, "holders miscounted"
        idle = {page for page in self._keys if not holders[page]}
        assert idle == set(self._idle), "the idle pages are not those that are registered and held by none"
        unheld = {page for page in range(self.total) if not holders[page]}
        assert self._free == unheld - idle, "pages lost"
        assert {key: page for page, key in self._keys.items()} == self._pages, "keys and pages do not match"
