"""Webhooks: where a tenant wants to be told what becomes of its jobs."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlmodel import Session, col, select

from service import webhooks
from service.api.paging import Cursor, Limit, page
from service.api.schemas import Message, NewWebhook, Page, SecretWebhook, Webhook
from service.api.sessions import Db, ReadDb
from service.db.tables import MessageRow, WebhookRow, new_id, now
from service.problems import ApiError, not_found, responses

router = APIRouter(prefix="/webhooks", tags=["webhooks"])
MOST = 20


@router.post("", status_code=201, responses=responses(409, 413))
def create_webhook(wanted: NewWebhook, request: Request, session: Db) -> SecretWebhook:
    """Be told by HTTP POST. Messages are signed, by Standard Webhooks, with the secret that only this answer has."""
    url = webhooks.check_url(wanted.url, request.app.state.settings.webhook_private)
    if len(session.exec(select(WebhookRow.id)).all()) >= MOST:
        raise ApiError(409, "too_many_webhooks", f"There are {MOST} webhooks already: delete one first.")
    row = WebhookRow(id=new_id("whk"), url=url, events=list(wanted.events), secret=webhooks.new_secret(), created_at=now())
    session.add(row)
    session.commit()
    return SecretWebhook(**_shown(row).model_dump(), secret=row.secret)


@router.get("", responses=responses())
def list_webhooks(session: ReadDb, cursor: Cursor = None, limit: Limit = 20) -> Page[Webhook]:
    """Webhooks, without their secrets, newest first."""
    return page(session, select(WebhookRow), WebhookRow, cursor, limit, _shown)


@router.get("/{webhook_id}", responses=responses(404))
def get_webhook(webhook_id: str, session: ReadDb) -> Webhook:
    """One webhook, without its secret."""
    return _shown(_find(session, webhook_id))


@router.post("/{webhook_id}/test", status_code=202, responses=responses(404))
def test_webhook(webhook_id: str, session: Db) -> Message:
    """Send a message of the type `test`, also to one that was disabled: then it counts again."""
    hook = _find(session, webhook_id)
    hook.disabled_at = None
    row = webhooks.post(session, hook, "test", {})
    session.commit()
    return _message(row)


@router.get("/{webhook_id}/messages", responses=responses(404))
def list_messages(
    webhook_id: str,
    session: ReadDb,
    cursor: Cursor = None,
    limit: Limit = 20,
    pending: Annotated[bool, Query(description="Only those that are still to be delivered.")] = False,
) -> Page[Message]:
    """What was sent or will be, newest first."""
    _find(session, webhook_id)
    statement = select(MessageRow).where(MessageRow.webhook_id == webhook_id)
    if pending:
        statement = statement.where(col(MessageRow.next_at).is_not(None))
    return page(session, statement, MessageRow, cursor, limit, _message)


@router.delete("/{webhook_id}", status_code=204, responses=responses(404))
def delete_webhook(webhook_id: str, session: Db) -> None:
    """Be told nothing more, not even what is still to be delivered."""
    session.delete(_find(session, webhook_id))
    session.commit()


def _find(session: Session, webhook_id: str) -> WebhookRow:
    row = session.get(WebhookRow, webhook_id)
    if row is None:
        raise not_found("webhook", webhook_id)
    return row


def _shown(row: WebhookRow) -> Webhook:
    return Webhook.model_validate(row.model_dump(exclude={"secret"}))


def _message(row: MessageRow) -> Message:
    return Message.model_validate({**row.model_dump(), "type": row.body["type"]})
