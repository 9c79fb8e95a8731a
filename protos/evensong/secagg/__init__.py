"""In what order it is said: secure aggregation as two state machines, device and coordinator, without any I/O.

``docs/secagg.md`` is the protocol, ``protos/vectors/secagg.json`` pins its bytes for every language.
"""

from evensong.secagg.device import DeviceMachine
from evensong.secagg.errors import AbortedError, ParameterError, ProtocolError, SecureError
from evensong.secagg.masks import apply_masks
from evensong.secagg.parameters import Parameters, parameters_for
from evensong.secagg.primitives import Primitives, SharedPrimitives
from evensong.secagg.server import ServerMachine, Unmasking
from evensong.secagg.session import Policy, Session
from evensong.secagg.states import DeviceState, ServerStage

__all__ = [
    "AbortedError",
    "DeviceMachine",
    "DeviceState",
    "ParameterError",
    "Parameters",
    "Policy",
    "Primitives",
    "ProtocolError",
    "SecureError",
    "ServerMachine",
    "ServerStage",
    "Session",
    "SharedPrimitives",
    "Unmasking",
    "apply_masks",
    "parameters_for",
]
