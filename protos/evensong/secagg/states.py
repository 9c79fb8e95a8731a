"""The states of both machines, each with one table of what leads from one to the next; nothing else moves them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from evensong.secagg.errors import ProtocolError


class DeviceState(StrEnum):
    NEW = "new"
    ADVERTISED = "advertised"  #: own keys are made and sent
    SHARED = "shared"  #: the cohort is known, shares are sent
    MASKING = "masking"  #: the neighbours' shares are here; the vector is masked and uploaded
    MASKED = "masked"
    COMMITTED = "committed"  #: signed one survivor set
    REVEALED = "revealed"  #: gave one share of each neighbour; all secrets forgotten
    ABORTED = "aborted"  #: all secrets forgotten


class DeviceTrigger(StrEnum):
    ADVERTISE = "advertise"
    ROSTER = "roster"
    DELIVERY = "delivery"
    SEALED = "sealed"  #: the masked vector is final
    SURVIVORS = "survivors"
    QUORUM = "quorum"
    STOP = "stop"  #: a bad message, or the owner's will


class ServerStage(StrEnum):
    ADVERTISE = "advertise"
    SHARES = "shares"
    MASKED = "masked"
    COMMIT = "commit"
    UNMASK = "unmask"
    DONE = "done"  #: the sum can be unmasked
    ABORTED = "aborted"


class ServerTrigger(StrEnum):
    CLOSE = "close"  #: enough have sent
    FAIL = "fail"  #: too few, or inconsistent


DEVICE_TRANSITIONS: Mapping[tuple[DeviceState, DeviceTrigger], DeviceState] = {
    (DeviceState.NEW, DeviceTrigger.ADVERTISE): DeviceState.ADVERTISED,
    (DeviceState.ADVERTISED, DeviceTrigger.ROSTER): DeviceState.SHARED,
    (DeviceState.SHARED, DeviceTrigger.DELIVERY): DeviceState.MASKING,
    (DeviceState.MASKING, DeviceTrigger.SEALED): DeviceState.MASKED,
    (DeviceState.MASKED, DeviceTrigger.SURVIVORS): DeviceState.COMMITTED,
    (DeviceState.COMMITTED, DeviceTrigger.QUORUM): DeviceState.REVEALED,
    **{(state, DeviceTrigger.STOP): DeviceState.ABORTED for state in DeviceState},
}

SERVER_TRANSITIONS: Mapping[tuple[ServerStage, ServerTrigger], ServerStage] = {
    (ServerStage.ADVERTISE, ServerTrigger.CLOSE): ServerStage.SHARES,
    (ServerStage.SHARES, ServerTrigger.CLOSE): ServerStage.MASKED,
    (ServerStage.MASKED, ServerTrigger.CLOSE): ServerStage.COMMIT,
    (ServerStage.COMMIT, ServerTrigger.CLOSE): ServerStage.UNMASK,
    (ServerStage.UNMASK, ServerTrigger.CLOSE): ServerStage.DONE,
    (ServerStage.ADVERTISE, ServerTrigger.FAIL): ServerStage.ABORTED,
    (ServerStage.SHARES, ServerTrigger.FAIL): ServerStage.ABORTED,
    (ServerStage.MASKED, ServerTrigger.FAIL): ServerStage.ABORTED,
    (ServerStage.COMMIT, ServerTrigger.FAIL): ServerStage.ABORTED,
    (ServerStage.UNMASK, ServerTrigger.FAIL): ServerStage.ABORTED,
}

_State = TypeVar("_State", bound=StrEnum)
_Trigger = TypeVar("_Trigger", bound=StrEnum)


def following(table: Mapping[tuple[_State, _Trigger], _State], state: _State, trigger: _Trigger) -> _State:
    """The state that ``trigger`` leads to; :class:`ProtocolError` if a stage would be skipped or repeated."""
    after = table.get((state, trigger))
    if after is None:
        awaited = [known.value for before, known in table if before is state]
        raise ProtocolError(
            f"{trigger.value} is out of turn",
            expected=" or ".join(awaited) or "nothing more",
            got=f"state {state.value}",
        )
    return after
