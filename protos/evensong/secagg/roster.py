"""The cohort: who takes part with which keys, in one order, signed by the coordinator.

``R = H(roster ‖ ctx ‖ n ‖ members)`` stands in everything that is signed or derived afterwards: two rosters make two
cohorts whose keys do not fit each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.secagg import certificates
from evensong.secagg.errors import ProtocolError
from evensong.secagg.graph import Graph
from evensong.secagg.keys import End
from evensong.secagg.parameters import MIN_MEMBERS, Parameters
from evensong.secagg.primitives import Primitives, check_agreement_key
from evensong.secagg.session import Policy, Session
from evensong.secagg.transcript import KEY_BYTES, NONCE_BYTES, SIGNATURE_BYTES, advertise_bytes, label, roster_bytes
from evensong.v1 import secagg_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import device_id_of

_ROSTER = label("roster")


@dataclass(frozen=True)
class Member:
    """One device of a cohort, and the keys that it made for it."""

    device_id: str
    public_key: bytes
    channel_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes
    certificate: bytes

    @cached_property
    def id(self) -> bytes:
        """16 bytes."""
        return bytes.fromhex(self.device_id)

    @cached_property
    def channel_end(self) -> End:
        return End(self.id, self.channel_key)

    @cached_property
    def mask_end(self) -> End:
        return End(self.id, self.mask_key)

    def encode(self) -> bytes:
        """264 bytes."""
        keys = self.public_key + self.channel_key + self.mask_key
        return keys + self.nonce + self.signature + self.certificate


@dataclass(frozen=True)
class Roster:
    """A cohort whose form is right; places count from 0 in the order of ids."""

    members: tuple[Member, ...]
    hash: bytes  #: R
    context: bytes  #: ctx
    parameters: Parameters

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.hash, [member.id for member in self.members], self.parameters.degree)

    @cached_property
    def places(self) -> dict[str, int]:
        """By device id."""
        return {member.device_id: place for place, member in enumerate(self.members)}

    @cached_property
    def binding(self) -> bytes:
        """``ctx ‖ R``: what keys are derived under."""
        return self.context + self.hash


# ------------------------------------------------------------------------------------------------------------- members


def read_member(message: secagg_pb2.SecureAdvertise) -> Member:
    """The member that a message describes; :class:`ProtocolError` if a field has no right form. Checks no signature."""
    public_key = message.public_key
    member = Member(
        device_id_of(public_key),
        public_key,
        message.channel_key,
        message.mask_key,
        message.nonce,
        message.signature,
        message.certificate,
    )
    for what, value, size in (
        ("the public key", public_key, KEY_BYTES),
        ("the nonce", member.nonce, NONCE_BYTES),
        ("the signature", member.signature, SIGNATURE_BYTES),
        ("the certificate", member.certificate, certificates.CERTIFICATE_BYTES),
    ):
        if len(value) != size:
            raise ProtocolError(
                f"{what} of a member is malformed", expected=f"{size} bytes", got=len(value), blamed=member.device_id
            )
    check_agreement_key(member.channel_key, "the channel key of a member")
    check_agreement_key(member.mask_key, "the mask key of a member")
    return member


def check_member(member: Member, context: bytes, primitives: Primitives) -> None:
    """:class:`ProtocolError` unless the member's identity signed its keys for this attempt."""
    signed = advertise_bytes(context, member.channel_key, member.mask_key, member.nonce)
    primitives.verify(member.public_key, member.signature, signed, f"the signature of member {member.device_id}")


def check_distinct(members: Sequence[Member]) -> None:
    """:class:`ProtocolError` if the members are not in the order of their ids, or one key is there twice."""
    for before, after in pairwise(members):
        if before.device_id >= after.device_id:
            raise ProtocolError("the roster is not in the order of ids, each once", got=after.device_id)
    keys = {key for member in members for key in (member.channel_key, member.mask_key)}
    if len(keys) != 2 * len(members):
        raise ProtocolError("the roster repeats a key", expected=f"{2 * len(members)} keys", got=len(keys))


# -------------------------------------------------------------------------------------------------------------- roster


def make_roster(members: Sequence[Member], session: Session, policy: Policy) -> Roster:
    """Of members in the order of their ids; :class:`ParameterError` if so many give no security."""
    context = session.context
    head = _ROSTER + context + len(members).to_bytes(4, "little")
    digest = sha256(head + b"".join(member.encode() for member in members))
    return Roster(tuple(members), digest, context, policy.parameters(len(members)))


def sign_roster(
    roster: Roster,
    messages: Sequence[secagg_pb2.SecureAdvertise],
    signer: Ed25519PrivateKey,
    primitives: Primitives,
) -> secagg_pb2.SecureRoster:
    """The message; ``messages`` are those of the members, in the same order."""
    signature = primitives.sign(signer, roster_bytes(roster.context, roster.hash))
    return secagg_pb2.SecureRoster(members=messages, signature=signature)


def read_roster(
    message: secagg_pb2.SecureRoster,
    session: Session,
    policy: Policy,
    *,
    authority_public_key: bytes,
    coordinator_public_key: bytes,
    now_unix_ms: int,
    primitives: Primitives,
    threads: int = 1,
) -> Roster:
    """The cohort, if the coordinator signed it for this attempt and the authority certified every member.

    :class:`ProtocolError` otherwise; :class:`ParameterError` if so many members give no security. The members' own
    signatures are left to :func:`check_member`: a device needs those of its neighbours, as it uses no other's keys.
    """
    count = len(message.members)
    if not MIN_MEMBERS <= count <= policy.max_cohort:  # before anything is computed for each of them
        raise ProtocolError("the cohort has a wrong size", expected=f"3 to {policy.max_cohort}", got=count)
    members = [read_member(member) for member in message.members]
    check_distinct(members)
    roster = make_roster(members, session, policy)
    signed = roster_bytes(roster.context, roster.hash)
    primitives.verify(coordinator_public_key, message.signature, signed, "the coordinator's signature on the roster")

    def check_certificates(part: Sequence[Member]) -> None:
        for member in part:
            certificates.check(
                member.certificate, member.public_key, session.population, authority_public_key, now_unix_ms, primitives
            )

    if threads == 1:
        check_certificates(members)
    else:
        with ThreadPoolExecutor(threads) as pool:  # Ed25519 releases the interpreter's lock
            list(pool.map(check_certificates, [members[first::threads] for first in range(threads)]))
    return roster
