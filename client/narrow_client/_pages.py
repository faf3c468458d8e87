"""Lists of the service, which come in pages: iterate over all, or page by page."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class Page(Protocol[Item]):
    """A page of a list, as the generated models have them."""

    @property
    def data(self) -> Sequence[Item]: ...

    @property
    def next_cursor(self) -> str | None: ...


class Pages(Generic[T]):
    """A list, newest first: `for job in client.jobs.list(): ...` goes over all of it, and fetches pages as they are needed.

    `pages()` gives the pages themselves, with `data` and the `next_cursor` with which a later `list(cursor=...)` goes on.
    """

    def __init__(self, fetch: Callable[[str | None], Page[T]], cursor: str | None = None) -> None:
        self._fetch, self._cursor = fetch, cursor

    def pages(self) -> Iterator[Page[T]]:
        """The pages, each fetched when it is asked for."""
        cursor = self._cursor
        while True:
            page = self._fetch(cursor)
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return

    def __iter__(self) -> Iterator[T]:
        for page in self.pages():
            yield from page.data


class AsyncPages(Generic[T]):
    """A list, newest first: `async for job in client.jobs.list(): ...`. The twin of `Pages`."""

    def __init__(self, fetch: Callable[[str | None], Awaitable[Page[T]]], cursor: str | None = None) -> None:
        self._fetch, self._cursor = fetch, cursor

    async def pages(self) -> AsyncIterator[Page[T]]:
        """The pages, each fetched when it is asked for."""
        cursor = self._cursor
        while True:
            page = await self._fetch(cursor)
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return

    async def __aiter__(self) -> AsyncIterator[T]:
        async for page in self.pages():
            for item in page.data:
                yield item
