"""The coordinator's side of one attempt at a secure sum. It does no input or output, and has no clock or randomness.

The machine is a function of the messages and closes that it got, so a coordinator that restarts builds it anew from
what it stored. A stage takes messages with :meth:`ServerMachine.receive` until :meth:`ServerMachine.close`; after that
:meth:`ServerMachine.answer` has the next message for each device. It never has, nor asks for, both secrets of a member.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import bitmap, certificates, keys, shamir
from evensong.secagg.device import CIPHERTEXT_BYTES
from evensong.secagg.errors import AbortedError, ParameterError, ProtocolError
from evensong.secagg.masks import Mask
from evensong.secagg.parameters import MIN_MEMBERS, Parameters
from evensong.secagg.primitives import Primitives, check_order
from evensong.secagg.reveal import Reveal
from evensong.secagg.roster import Member, Roster, check_member, make_roster, read_member, sign_roster
from evensong.secagg.session import Policy, Session
from evensong.secagg.states import SERVER_TRANSITIONS, ServerStage, ServerTrigger, following
from evensong.secagg.transcript import SIGNATURE_BYTES, masked_bytes, survivors_bytes
from evensong.v1 import secagg_pb2

DeviceMessage = (
    secagg_pb2.SecureAdvertise
    | secagg_pb2.SecureShares
    | secagg_pb2.SecureMasked
    | secagg_pb2.SecureCommit
    | secagg_pb2.SecureUnmask
)
Answer = secagg_pb2.SecureRoster | secagg_pb2.SecureDelivery | secagg_pb2.SecureSurvivors | secagg_pb2.SecureQuorum

#: The stage in which a device sends each message.
STAGE_OF: dict[type[DeviceMessage], ServerStage] = {
    secagg_pb2.SecureAdvertise: ServerStage.ADVERTISE,
    secagg_pb2.SecureShares: ServerStage.SHARES,
    secagg_pb2.SecureMasked: ServerStage.MASKED,
    secagg_pb2.SecureCommit: ServerStage.COMMIT,
    secagg_pb2.SecureUnmask: ServerStage.UNMASK,
}
#: Those in which devices send, in order.
SENDING = tuple(STAGE_OF.values())

_Message = tuple[DeviceMessage, bytes | None]  # and the vector's SHA-256


@dataclass(frozen=True)
class Unmasking:
    """What the lane-wise sum of the survivors' vectors still holds besides the sum of their inputs: ``masks`` (key,
    sign), as :func:`evensong.secagg.masks.apply_masks` takes them, remove it."""

    masks: list[Mask] = field(repr=False)


class ServerMachine:
    """One attempt. ``excluded`` are devices that may not take part, such as those blamed in an earlier attempt."""

    def __init__(
        self,
        session: Session,
        policy: Policy,
        *,
        signer: Ed25519PrivateKey,
        authority_public_key: bytes,
        excluded: frozenset[str] = frozenset(),
        primitives: Primitives | None = None,
    ) -> None:
        self.session = session
        self.policy = policy
        self.stage = ServerStage.ADVERTISE
        self.reason = ""  #: why the attempt was aborted
        self.blamed: set[str] = set()  #: devices that broke the protocol
        self.may_repeat = True  #: until devices have been asked to sign the survivors: what is signed may be revealed
        self._signer = signer
        self._authority_public_key = authority_public_key
        self._excluded = excluded
        self._primitives = primitives or Primitives()
        self._received: dict[ServerStage, dict[str, _Message]] = {stage: {} for stage in SENDING}
        self._keys: set[bytes] = set()  # all that were advertised
        self._joining: dict[str, Member] = {}
        self._cohort: Roster | None = None
        self._ciphertexts: dict[int, bytes] = {}
        self._accusers: dict[int, set[int]] = {}  # by the place of whom they accuse
        self._sets: dict[ServerStage, int] = {}  # of closed stages: who sent
        self._answers: dict[ServerStage, Answer] = {}  # those that are the same for all
        self._reveals: dict[int, Reveal] = {}
        self._suspects: set[int] = set()

    # --------------------------------------------------------------------------------------------------- who is in it

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of all who advertised (so far), in the order of the roster; likewise the following."""
        return self._senders(ServerStage.ADVERTISE)

    @property
    def sharers(self) -> tuple[str, ...]:
        return self._senders(ServerStage.SHARES)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose vectors are in the sum."""
        return self._senders(ServerStage.MASKED)

    @property
    def signers(self) -> tuple[str, ...]:
        return self._senders(ServerStage.COMMIT)

    @property
    def revealers(self) -> tuple[str, ...]:
        return self._senders(ServerStage.UNMASK)

    @property
    def arrived(self) -> tuple[str, ...]:
        """Who has sent in the stage that is open."""
        return self._senders(self.stage) if self.stage in SENDING else ()

    @property
    def parameters(self) -> Parameters | None:
        """Of the cohort, once the roster is closed."""
        return self._cohort.parameters if self._cohort else None

    def _senders(self, stage: ServerStage) -> tuple[str, ...]:
        return tuple(sorted(self._received[stage]))

    # -------------------------------------------------------------------------------------------------------- receive

    def receive(
        self, device_id: str, message: DeviceMessage, *, vector_sha256: bytes | None = None, now_unix_ms: int
    ) -> bool:
        """Takes a message that the transport authenticated as this device's. False if the very same came before.

        ``vector_sha256`` goes with SecureMasked: of the vector's bytes as they were committed. :class:`ProtocolError`
        if anything is wrong; then nothing has changed.
        """
        stage = STAGE_OF[type(message)]
        earlier = self._received[stage].get(device_id)
        if earlier is not None:
            if earlier != (message, vector_sha256):
                raise ProtocolError(f"the device sent another {stage.value} before", blamed=device_id)
            return False
        if stage is not self.stage:
            raise ProtocolError(
                f"{stage.value} is out of turn", expected=f"a message of stage {self.stage.value}", got=stage.value
            )
        place = self._admit(device_id)
        try:
            if isinstance(message, secagg_pb2.SecureAdvertise):
                self._accept_advertise(device_id, message, now_unix_ms)
            elif isinstance(message, secagg_pb2.SecureShares):
                self._accept_shares(place, message)
            elif isinstance(message, secagg_pb2.SecureMasked):
                self._accept_masked(place, message, vector_sha256)
            elif isinstance(message, secagg_pb2.SecureCommit):
                self._accept_commit(place, message)
            else:
                self._accept_unmask(place, message)
        except ProtocolError as error:
            error.blamed = device_id
            raise
        self._received[stage][device_id] = (message, vector_sha256)
        return True

    def _admit(self, device_id: str) -> int:
        """The device's place, which is -1 before there is a roster; being late or turned away is nobody's fault."""
        if self.stage is not ServerStage.ADVERTISE:
            before = SENDING[SENDING.index(self.stage) - 1]
            if device_id not in self._received[before]:
                raise ProtocolError(f"the device did not complete stage {before.value} in time")
            return self._roster().places[device_id]
        if device_id in self._excluded:
            raise ProtocolError("the device is excluded from this round")
        if len(self._joining) >= self.policy.max_cohort:
            raise ProtocolError("the cohort is full", expected=f"at most {self.policy.max_cohort}")
        return -1

    def _accept_advertise(self, device_id: str, message: secagg_pb2.SecureAdvertise, now_unix_ms: int) -> None:
        member = read_member(message)
        if member.device_id != device_id:
            raise ProtocolError("the device advertised another identity", expected=device_id, got=member.device_id)
        keys_ = {member.channel_key, member.mask_key}
        if len(keys_) < 2 or keys_ & self._keys:
            raise ProtocolError("a key was advertised before", expected="fresh keys")
        for key, what in ((member.channel_key, "the channel key"), (member.mask_key, "the mask key")):
            check_order(key, what)
        certificates.check(
            member.certificate,
            member.public_key,
            self.session.population,
            self._authority_public_key,
            now_unix_ms,
            self._primitives,
        )
        check_member(member, self.session.context, self._primitives)
        self._joining[device_id] = member
        self._keys |= keys_

    def _accept_shares(self, place: int, message: secagg_pb2.SecureShares) -> None:
        expected = CIPHERTEXT_BYTES * self._roster().parameters.degree
        ciphertexts = message.ciphertexts
        if len(ciphertexts) != expected:
            raise ProtocolError("the shares have a wrong length", expected=f"{expected} bytes", got=len(ciphertexts))
        if len(message.seed_commitment) != keys.SEED_BYTES:
            raise ProtocolError("the commitment is malformed", expected="32 bytes", got=len(message.seed_commitment))
        self._ciphertexts[place] = ciphertexts

    def _accept_masked(self, place: int, message: secagg_pb2.SecureMasked, vector_sha256: bytes | None) -> None:
        roster = self._roster()
        if vector_sha256 is None or len(vector_sha256) != 32:
            raise ProtocolError("the vector's hash is missing", expected="32 bytes")
        if message.attempt != self.session.attempt:
            raise ProtocolError("the vector is of another attempt", expected=self.session.attempt, got=message.attempt)
        accused, around = list(message.complaints), self._around(place)
        if accused != sorted(set(accused) & set(around)):
            raise ProtocolError("complaints are not in order, or not about neighbours that shared")
        member = roster.members[place]
        sharers = self._bitmap(ServerStage.SHARES)
        signed = masked_bytes(roster.context, roster.hash, member.id, sharers, vector_sha256)
        self._primitives.verify(member.public_key, message.signature, signed, "the signature of the vector")
        for other in accused:
            accusers = self._accusers.setdefault(other, set())
            accusers.add(place)
            if len(accusers) >= roster.parameters.threshold:  # so many cannot all be corrupted
                self.blamed.add(self._id(other))

    def _accept_commit(self, place: int, message: secagg_pb2.SecureCommit) -> None:
        roster = self._roster()
        signed = survivors_bytes(roster.context, roster.hash, self._bitmap(ServerStage.MASKED))
        public_key = roster.members[place].public_key
        self._primitives.verify(public_key, message.signature, signed, "the signature of the survivors")

    def _accept_unmask(self, place: int, message: secagg_pb2.SecureUnmask) -> None:
        around, data, size = self._around(place), message.shares, shamir.SHARE_BYTES
        if len(data) != size * len(around):
            raise ProtocolError(
                "the shares have a wrong length", expected=f"{size} bytes of {len(around)} neighbours", got=len(data)
            )
        parts = [data[size * turn : size * (turn + 1)] for turn in range(len(around))]
        shares = [None if part == shamir.NO_SHARE else shamir.decode_share(part) for part in parts]
        for owner, share in zip(around, shares, strict=True):
            if share is not None:
                self._reveals[owner].add(place + 1, share, self._suspects)
                self._suspects |= self._reveals[owner].wrong

    # ---------------------------------------------------------------------------------------------------------- close

    def is_complete(self) -> bool:
        """Whether waiting longer gains nothing: all who can still send in this stage have, or every secret is open."""
        if self.stage is ServerStage.ADVERTISE:
            return len(self._joining) == self.policy.max_cohort
        if self.stage not in SENDING:
            return True
        before = SENDING[SENDING.index(self.stage) - 1]
        if len(self._received[self.stage]) == len(self._received[before]):
            return True
        return self.stage is ServerStage.UNMASK and not self._sealed()

    def can_close(self) -> bool:
        """Whether enough have sent for the next stage."""
        return self.stage in SENDING and self._obstacle() is None

    def close(self) -> ServerStage:
        """Ends the stage, with DONE after the last. To ABORTED if there are too few; then :attr:`reason` tells more."""
        following(SERVER_TRANSITIONS, self.stage, ServerTrigger.CLOSE)
        closing = self.stage
        if closing is ServerStage.UNMASK:
            for reveal in self._reveals.values():
                reveal.finish(self._suspects)
                self._suspects |= reveal.wrong
            self.blamed |= {self._id(holder - 1) for holder in self._suspects}
            parameters = self._roster().parameters
            corrupted = min(parameters.corrupted, parameters.threshold - 1)  # of the holders of one secret
            faulty = [place for place, reveal in self._reveals.items() if reveal.is_owners_fault(corrupted)]
            self.blamed |= {self._id(place) for place in faulty}
        obstacle = self._obstacle()
        if obstacle is not None:
            return self.abort(obstacle)
        if closing is ServerStage.ADVERTISE:
            self._close_advertise()
        self._sets[closing] = bitmap.from_places(self._places(closing))
        if closing is ServerStage.MASKED:
            self.may_repeat = False
        if closing is ServerStage.COMMIT:
            self._reveals = {place: self._reveal(place) for place in self._places(ServerStage.SHARES)}
        self.stage = following(SERVER_TRANSITIONS, closing, ServerTrigger.CLOSE)
        return self.stage

    def abort(self, reason: str) -> ServerStage:
        """Gives the attempt up. Nothing was revealed, unless it was in UNMASK; nothing of that is used."""
        self.stage = following(SERVER_TRANSITIONS, self.stage, ServerTrigger.FAIL)
        self.reason = reason
        self._reveals = {}
        return self.stage

    def _obstacle(self) -> str | None:
        """Why the stage cannot close well; None if it can."""
        count = len(self._received[self.stage])
        if self.stage is ServerStage.ADVERTISE:
            if count < MIN_MEMBERS:
                return f"{count} devices advertised"
            try:
                self.policy.parameters(count)
            except ParameterError as error:
                return str(error)
            return None
        if self.stage is ServerStage.UNMASK:
            sealed = self._sealed()
            return f"the secrets of {len(sealed)} members cannot be opened" if sealed else None
        parameters = self._roster().parameters
        least = max(parameters.quorum, parameters.min_survivors)
        if self.stage is ServerStage.COMMIT:
            least = parameters.quorum
        if count < least:
            return f"{count} devices reached the end of stage {self.stage.value}, {least} are needed"
        alone = int(np.count_nonzero(self._holders(self.stage) < parameters.threshold))
        if alone:
            return (
                f"of {alone} members fewer than {parameters.threshold} neighbours are left in stage {self.stage.value}"
            )
        return None

    def _sealed(self) -> list[int]:
        return [place for place, reveal in self._reveals.items() if reveal.secret is None]

    def _holders(self, stage: ServerStage) -> npt.NDArray[np.int64]:
        """For each sharer how many neighbours hold its shares and sent in ``stage``."""
        roster, sharers = self._roster(), self._places(ServerStage.SHARES)
        present = np.zeros(len(roster.members), np.bool_)
        present[self._places(stage)] = True
        holders = present[roster.graph.table].sum(axis=1)
        for accused, accusers in self._accusers.items():
            holders[accused] -= sum(present[accuser] for accuser in accusers)
        return np.asarray(holders[sharers], np.int64)

    def _close_advertise(self) -> None:
        ids = self._senders(ServerStage.ADVERTISE)
        self._cohort = make_roster([self._joining[device_id] for device_id in ids], self.session, self.policy)
        messages = [self._received[ServerStage.ADVERTISE][device_id][0] for device_id in ids]
        self._answers[ServerStage.ADVERTISE] = sign_roster(self._cohort, messages, self._signer, self._primitives)  # type: ignore[arg-type]

    def _reveal(self, place: int) -> Reveal:
        """Of a survivor the seed, of a sharer that dropped the mask key: never both."""
        member, binding = self._roster().members[place], self._roster().binding
        message, _ = self._received[ServerStage.SHARES][member.device_id]
        assert isinstance(message, secagg_pb2.SecureShares)
        commitment = message.seed_commitment

        def is_seed(secret: bytes) -> bool:
            return keys.seed_commitment(secret, binding, member.id) == commitment

        def is_mask_key(secret: bytes) -> bool:
            return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == member.mask_key

        survived = self._sets[ServerStage.MASKED] >> place & 1
        fits: Callable[[bytes], bool] = is_seed if survived else is_mask_key
        return Reveal(place, self._roster().parameters.threshold, fits)

    # --------------------------------------------------------------------------------------------------------- answer

    def answer(self, device_id: str, step: ServerStage | type[DeviceMessage]) -> Answer | None:
        """What a device gets that completed ``step`` (a stage, or the type of its message); None while that stage is
        open, and after the last.

        :class:`ProtocolError` if the device is not one of those that completed it, :class:`AbortedError` if the attempt
        is over.
        """
        stage = step if isinstance(step, ServerStage) else STAGE_OF[step]
        if device_id not in self._received[stage]:
            raise ProtocolError(f"the device did not complete {stage.value}", got=device_id)
        if self.stage is ServerStage.ABORTED:
            raise AbortedError("the attempt was given up", got=self.reason)
        if stage not in self._sets or stage is ServerStage.UNMASK:
            return None
        if stage is ServerStage.SHARES:
            return self._delivery(self._roster().places[device_id])
        if stage is ServerStage.MASKED:
            return self._survivors(self._roster().places[device_id])
        if stage not in self._answers:
            self._answers[stage] = self._quorum()
        return self._answers[stage]

    def _delivery(self, place: int) -> secagg_pb2.SecureDelivery:
        parts = []
        for source in self._around(place):
            turn = bisect_left(self._roster().graph.neighbours(source), place)
            parts.append(self._ciphertexts[source][CIPHERTEXT_BYTES * turn : CIPHERTEXT_BYTES * (turn + 1)])
        return secagg_pb2.SecureDelivery(sharers=self._bitmap(ServerStage.SHARES), ciphertexts=b"".join(parts))

    def _survivors(self, place: int) -> secagg_pb2.SecureSurvivors:
        words, survivors = [], self._sets[ServerStage.MASKED]
        for neighbour in self._around(place):
            if survivors >> neighbour & 1:
                message, vector_sha256 = self._received[ServerStage.MASKED][self._id(neighbour)]
                assert isinstance(message, secagg_pb2.SecureMasked) and vector_sha256 is not None
                words += [vector_sha256, message.signature]
        return secagg_pb2.SecureSurvivors(survivors=self._bitmap(ServerStage.MASKED), neighbours=b"".join(words))

    def _quorum(self) -> secagg_pb2.SecureQuorum:
        commits = [self._received[ServerStage.COMMIT][device_id][0] for device_id in self.signers]
        signatures = b"".join(commit.signature for commit in commits if isinstance(commit, secagg_pb2.SecureCommit))
        assert len(signatures) == SIGNATURE_BYTES * len(commits)
        return secagg_pb2.SecureQuorum(
            survivors=self._bitmap(ServerStage.MASKED), signers=self._bitmap(ServerStage.COMMIT), signatures=signatures
        )

    # ------------------------------------------------------------------------------------------------------ unmasking

    def unmasking(self) -> Unmasking:
        """After DONE: the survivors' self masks, and the pairwise masks between them and the sharers that dropped."""
        if self.stage is not ServerStage.DONE:
            raise ProtocolError("there is nothing to unmask", expected="stage done", got=self.stage.value)
        roster, survivors = self._roster(), self._sets[ServerStage.MASKED]
        masks: list[Mask] = []
        for place, reveal in self._reveals.items():
            assert reveal.secret is not None
            member = roster.members[place]
            if survivors >> place & 1:
                masks.append((keys.self_mask_key(reveal.secret, roster.binding, member.id), -1))
                continue
            mask_key = X25519PrivateKey.from_private_bytes(reveal.secret)
            for neighbour in self._around(place):
                if survivors >> neighbour & 1:
                    other = roster.members[neighbour]
                    agreed = self._primitives.agree(mask_key, other.mask_key)
                    key = keys.pairwise_mask_key(agreed, roster.binding, member.mask_end, other.mask_end)
                    # The survivor added it if the dropped member's id is higher.
                    masks.append((key, -1 if member.id > other.id else 1))
        return Unmasking(masks)

    # -------------------------------------------------------------------------------------------------------- helpers

    def _roster(self) -> Roster:
        assert self._cohort is not None
        return self._cohort

    def _id(self, place: int) -> str:
        return self._roster().members[place].device_id

    def _places(self, stage: ServerStage) -> list[int]:
        """Of those that sent in ``stage``, ascending."""
        places = self._roster().places
        return sorted(places[device_id] for device_id in self._received[stage])

    def _bitmap(self, stage: ServerStage) -> bytes:
        return bitmap.encode(self._sets[stage], len(self._roster().members))

    def _around(self, place: int) -> Sequence[int]:
        """The neighbours that shared."""
        sharers = self._sets[ServerStage.SHARES]
        return [neighbour for neighbour in self._roster().graph.neighbours(place) if sharers >> neighbour & 1]
