"""The pool of KV pages: who holds what, and nothing about what lies in them."""


class PagePool:
    """Page ids 0..total-1. A page is free or held by one sequence's list.

    Pages that follow one another are read without a copy on a CPU, so a sequence gets the page after its last one, or
    its home for the first, where they are free.
    """

    def __init__(self, total: int, page_size: int) -> None:
        self.total, self.page_size = total, page_size
        self._free = set(range(total))

    @property
    def free(self) -> int:
        return len(self._free)

    def missing(self, held: int, tokens: int) -> int:
        """Pages that `held` pages lack to cover `tokens` slots."""
        return max(0, -(-tokens // self.page_size) - held)

    def grant(self, pages: list[int], count: int, home: int = 0) -> list[int]:
        """Moves `count` free pages to the end of a sequence's list; returns them. The pool must have them."""
        held = len(pages)
        for _ in range(count):
            wanted = pages[-1] + 1 if pages else home
            if wanted in self._free:
                self._free.remove(wanted)
                pages.append(wanted)
            else:
                pages.append(self._free.pop())
        return pages[held:]

    def release(self, pages: list[int]) -> None:
        """Takes all pages of a sequence back and empties its list."""
        self._free.update(pages)
        pages.clear()

    def check(self, held: list[list[int]]) -> None:
        """Asserts that every page is free or in exactly one of the lists."""
        everything = sorted([*self._free, *(page for pages in held for page in pages)])
        assert everything == list(range(self.total)), "pages lost or held twice"
