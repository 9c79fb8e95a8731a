"""A call that changed something has one answer, however often it comes: stored with the change, in one transaction.

A refusal changes nothing and is not stored: the same request may be tried again and be judged anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from google.protobuf.message import Message
from sqlalchemy import bindparam, delete, insert, select

from evensong.coordinator import tables
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import RefusalError
from evensong.v1 import common_pb2

REQUEST_ID_BYTES = 16
OPERATOR = "operator"

_RECALL = select(tables.requests).where(
    tables.requests.c.caller == bindparam("caller"), tables.requests.c.request_id == bindparam("id")
)
_REMEMBER = insert(tables.requests)


@dataclass(frozen=True)
class RequestKey:
    """Who asked what. The same id with another method or body is a replay, and refused."""

    caller: str  #: device id, or OPERATOR
    request_id: bytes
    method: str
    body_sha256: str

    @classmethod
    def of(cls, caller: str, request_id: bytes, method: str, body: bytes) -> RequestKey:
        if len(request_id) != REQUEST_ID_BYTES:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_INVALID_REQUEST,
                "request_id is malformed",
                expected=f"{REQUEST_ID_BYTES} random bytes",
                got=f"{len(request_id)} bytes",
            )
        return cls(caller, request_id, method, hashlib.sha256(body).hexdigest())


def recall(tx: Transaction, key: RequestKey) -> bytes | None:
    """The stored answer to this very call, None for a new one; refuses another call under a used id."""
    row = tx.execute(_RECALL, {"caller": key.caller, "id": key.request_id}).one_or_none()
    if row is None:
        return None
    if (row.method, row.body_sha256) != (key.method, key.body_sha256):
        raise RefusalError(
            common_pb2.REFUSAL_REASON_REPLAY,
            "this request_id came before with other content",
            fix="Make a new request_id for every new request.",
        )
    response: bytes = row.response
    return response


def remember(tx: Transaction, key: RequestKey, response: Message, now: int) -> None:
    """Stores the answer along with what it answers."""
    values = {
        "caller": key.caller,
        "request_id": key.request_id,
        "method": key.method,
        "body_sha256": key.body_sha256,
        "response": response.SerializeToString(),
        "created_ms": now,
    }
    tx.execute(_REMEMBER, values)


def forget_before(tx: Transaction, unix_ms: int) -> None:
    """Drops answers that nobody asks for any more."""
    tx.execute(delete(tables.requests).where(tables.requests.c.created_ms < unix_ms))
