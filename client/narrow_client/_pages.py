"""Lists of the service, which come in pages: iterate over all, or page by page."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from narrow_client._calls import PAGE
from narrow_client._errors import InvalidArgument

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class Page(Protocol[Item]):
    """A page of a list, as the generated models have them."""

    @property
    def data(self) -> Sequence[Item]: ...

    @property
    def next_cursor(self) -> str | None: ...


def _check_limit(limit: object) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidArgument(f"limit is a whole number, 1 or more, or None for all, and not {limit!r}.")


class Pages(Generic[T]):
    """A list, newest first: `for job in client.jobs.list(): ...` goes over all of it, and fetches pages as they are needed.

    `pages()` gives the pages themselves, with `data` and the `next_cursor` with which a later `list(cursor=...)` goes on. With
    `list(limit=...)` it ends after so many items, in pages of so many if they fit into one.
    """

    def __init__(self, fetch: Callable[[str | None, int], Page[T]], cursor: str | None, limit: int | None) -> None:
        _check_limit(limit)
        self._fetch, self._cursor, self._limit = fetch, cursor, limit

    def __repr__(self) -> str:
        return "Pages: iterate over it with 'for item in ...', or over its .pages()"

    def pages(self) -> Iterator[Page[T]]:
        """The pages, each fetched when it is asked for."""
        cursor, left = self._cursor, self._limit
        while left != 0:
            page = self._fetch(cursor, PAGE if left is None else min(left, PAGE))
            yield page
            left = left and max(0, left - len(page.data))
            cursor = page.next_cursor
            if cursor is None:
                return

    def __iter__(self) -> Iterator[T]:
        for page in self.pages():
            yield from page.data


class AsyncPages(Generic[T]):
    """A list, newest first: `async for job in client.jobs.list(): ...`. The twin of `Pages`."""

    def __init__(self, fetch: Callable[[str | None, int], Awaitable[Page[T]]], cursor: str | None, limit: int | None) -> None:
        _check_limit(limit)
        self._fetch, self._cursor, self._limit = fetch, cursor, limit

    def __repr__(self) -> str:
        return "AsyncPages: iterate over it with 'async for item in ...', or over its .pages()"

    async def pages(self) -> AsyncIterator[Page[T]]:
        """The pages, each fetched when it is asked for."""
        cursor, left = self._cursor, self._limit
        while left != 0:
            page = await self._fetch(cursor, PAGE if left is None else min(left, PAGE))
            yield page
            left = left and max(0, left - len(page.data))
            cursor = page.next_cursor
            if cursor is None:
                return

    async def __aiter__(self) -> AsyncIterator[T]:
        async for page in self.pages():
            for item in page.data:
                yield item
