"""A handler's session: of the caller's tenant."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlmodel import Session

from service.auth import Caller, caller
from service.db.session import READERS, tenant_session
from service.db.tables import AuditRow, new_id, now

Who = Annotated[Caller, Depends(caller)]


def _session(request: Request, who: Who) -> Iterator[Session]:
    with tenant_session(request.app.state.engine, who.tenant) as session:
        session.info["audit"] = AuditRow(
            id=new_id("aud"),
            time=now(),
            key=who.key,
            operation=request.scope["endpoint"].__name__,
            path=request.scope["path"][:500],
            request_id=request.state.id,
            address=request.client.host if request.client else None,
        )
        yield session


async def _read_session(request: Request, who: Who) -> AsyncIterator[Session]:
    # Opening one does nothing yet, so it needs no thread; closing it talks to a database that is not in this process.
    session = tenant_session(request.app.state.engine, who.tenant, reads=True)
    try:
        yield session
    finally:
        if request.app.state.engine.dialect.name == "sqlite":
            session.close()
        else:
            await run_in_threadpool(session.close)


# Both end before the response is sent: a client that reads slowly holds neither lock nor connection. A handler with `Db`
# commits itself. Readers are counted: each keeps its connection until a thread is free to write its answer, and without a
# limit all threads could be waiting for a connection meanwhile.
Db = Annotated[Session, Depends(_session, scope="function")]
ReadDb = Annotated[Session, Depends(_read_session, scope="function", max_concurrency=READERS)]
