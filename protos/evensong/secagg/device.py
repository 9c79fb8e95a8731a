"""A device's side of one attempt at a secure sum. It does no input or output, and reads neither clock nor randomness.

The order of calls is the protocol's: :meth:`~DeviceMachine.advertise`, :meth:`~DeviceMachine.on_roster`,
:meth:`~DeviceMachine.on_delivery`, :meth:`~DeviceMachine.mask` and :meth:`~DeviceMachine.masked`,
:meth:`~DeviceMachine.on_survivors`, :meth:`~DeviceMachine.on_quorum`. Whatever else happens, a bad message or a call
out of turn, ends in ABORTED with all secrets forgotten. Each secret is forgotten as soon as it is not needed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import bitmap, keys, shamir
from evensong.secagg.errors import ProtocolError
from evensong.secagg.masks import Mask, apply_masks
from evensong.secagg.parameters import Parameters
from evensong.secagg.primitives import Primitives
from evensong.secagg.quorum import draw_sample, sample_size
from evensong.secagg.roster import Roster, check_member, read_member, read_roster
from evensong.secagg.session import Policy, Session
from evensong.secagg.states import DEVICE_TRANSITIONS, DeviceState, DeviceTrigger, following
from evensong.secagg.transcript import (
    KEY_BYTES,
    NONCE_BYTES,
    SIGNATURE_BYTES,
    WORD_BYTES,
    advertise_bytes,
    masked_bytes,
    survivors_bytes,
)
from evensong.v1 import secagg_pb2
from evensong.wire.signing import public_key_of

CIPHERTEXT_BYTES = 2 * shamir.SHARE_BYTES + 16  #: two shares and the tag, for one neighbour


@dataclass
class _Secrets:
    """What exists in memory only, for this attempt only."""

    channel: X25519PrivateKey | None = None
    mask: X25519PrivateKey | None = None
    seed: bytes = b""
    channels_in: dict[int, bytes] = field(default_factory=dict)  # place -> key of its ciphertext
    held: dict[int, tuple[bytes, bytes] | None] = field(default_factory=dict)  # place -> shares of its seed, mask key

    def __repr__(self) -> str:
        return "_Secrets()"


class DeviceMachine:
    """One device in one attempt. A device that restarts makes a new machine: keys are never stored.

    ``certificate`` is the authority's word on ``identity``; ``draw(n)`` gives n random bytes, outside of tests from the
    operating system's generator. ``threads`` share the two long computations: certificates of the cohort, and masks.
    """

    def __init__(
        self,
        session: Session,
        policy: Policy,
        *,
        identity: Ed25519PrivateKey,
        certificate: bytes,
        authority_public_key: bytes,
        coordinator_public_key: bytes,
        draw: Callable[[int], bytes],
        primitives: Primitives | None = None,
        threads: int = 1,
    ) -> None:
        self.session = session
        self.policy = policy
        self.state = DeviceState.NEW
        self._identity = identity
        self._certificate = certificate
        self._authority_public_key = authority_public_key
        self._coordinator_public_key = coordinator_public_key
        self._draw = draw
        self._primitives = primitives or Primitives()
        self._threads = threads
        self._secrets = _Secrets()
        self._advertised: secagg_pb2.SecureAdvertise | None = None
        self._known_roster: Roster | None = None
        self._place = -1
        self._neighbours: tuple[int, ...] = ()
        self._sharers = 0
        self._is_masked = False
        self._survivors = 0
        self._commit: secagg_pb2.SecureCommit | None = None

    @property
    def parameters(self) -> Parameters | None:
        """Of the cohort, once its roster is known."""
        return self._known_roster.parameters if self._known_roster else None

    @property
    def members(self) -> int:
        """Of the cohort; 0 before its roster is known."""
        return len(self._known_roster.members) if self._known_roster else 0

    def abort(self) -> None:
        """Leaves the cohort for good and forgets all secrets."""
        self.state = following(DEVICE_TRANSITIONS, self.state, DeviceTrigger.STOP)
        self._secrets = _Secrets()

    def __repr__(self) -> str:
        return f"DeviceMachine(state={self.state.value})"

    def __getstate__(self) -> NoReturn:
        raise TypeError("a DeviceMachine holds keys that must not be stored")

    # -------------------------------------------------------------------------------------------------- 0, advertise

    def advertise(self) -> secagg_pb2.SecureAdvertise:
        """Makes the attempt's keys; the first message."""
        with self._step(DeviceTrigger.ADVERTISE):
            own, draw = self._secrets, self._draw
            own.channel = X25519PrivateKey.from_private_bytes(draw(KEY_BYTES))
            own.mask = X25519PrivateKey.from_private_bytes(draw(KEY_BYTES))
            channel_key = own.channel.public_key().public_bytes_raw()
            mask_key = own.mask.public_key().public_bytes_raw()
            nonce = draw(NONCE_BYTES)
            signed = advertise_bytes(self.session.context, channel_key, mask_key, nonce)
            self._advertised = secagg_pb2.SecureAdvertise(
                channel_key=channel_key,
                mask_key=mask_key,
                nonce=nonce,
                signature=self._primitives.sign(self._identity, signed),
                public_key=public_key_of(self._identity),
                certificate=self._certificate,
            )
        return self._advertised

    # ----------------------------------------------------------------------------------------------------- 1, shares

    def on_roster(self, message: secagg_pb2.SecureRoster, now_unix_ms: int) -> secagg_pb2.SecureShares:
        """Checks the cohort, and gives each neighbour shares of this device's two secrets.

        :class:`ParameterError` if the cohort gives no security.
        """
        with self._step(DeviceTrigger.ROSTER):
            roster = self._join(message, now_unix_ms)
            own, place, binding = self._secrets, self._place, roster.binding
            assert own.channel is not None and own.mask is not None
            own.seed = self._draw(keys.SEED_BYTES)
            holders = [neighbour + 1 for neighbour in self._neighbours]
            threshold = roster.parameters.threshold
            of_seed = shamir.split(own.seed, threshold, holders, self._draw)
            of_mask_key = shamir.split(own.mask.private_bytes_raw(), threshold, holders, self._draw)
            this = roster.members[place]
            ciphertexts = []
            for neighbour, *pair in zip(self._neighbours, of_seed, of_mask_key, strict=True):
                other = roster.members[neighbour]
                agreed = self._primitives.agree(own.channel, other.channel_key)
                outward = keys.channel_key(agreed, binding, this.channel_end, other.channel_end)
                own.channels_in[neighbour] = keys.channel_key(agreed, binding, other.channel_end, this.channel_end)
                plaintext = b"".join(map(shamir.encode_share, pair))
                associated = keys.share_associated_data(binding, this.id, other.id)
                ciphertexts.append(self._primitives.seal(outward, plaintext, associated))
            own.channel = None
            commitment = keys.seed_commitment(own.seed, binding, this.id)
        return secagg_pb2.SecureShares(ciphertexts=b"".join(ciphertexts), seed_commitment=commitment)

    def _join(self, message: secagg_pb2.SecureRoster, now_unix_ms: int) -> Roster:
        assert self._advertised is not None
        reader = (self.session, self.policy, self._authority_public_key, self._coordinator_public_key, now_unix_ms)
        roster = self._primitives.once(
            message,
            reader,
            lambda: read_roster(
                message,
                self.session,
                self.policy,
                authority_public_key=self._authority_public_key,
                coordinator_public_key=self._coordinator_public_key,
                now_unix_ms=now_unix_ms,
                primitives=self._primitives,
                threads=self._threads,
            ),
        )
        this = read_member(self._advertised)
        place = roster.places.get(this.device_id)
        if place is None or roster.members[place] != this:
            raise ProtocolError("the roster shows this device changed, or not at all", expected="what it advertised")
        self._known_roster, self._place = roster, place
        self._neighbours = roster.graph.neighbours(place)
        for neighbour in self._neighbours:
            check_member(roster.members[neighbour], roster.context, self._primitives)
        return roster

    # --------------------------------------------------------------------------------------------- 2, masked vector

    def on_delivery(self, message: secagg_pb2.SecureDelivery) -> None:
        """Takes the neighbours' shares into keeping; those that do not open are complained about later."""
        with self._step(DeviceTrigger.DELIVERY):
            roster, own = self._roster(), self._secrets
            self._sharers = bitmap.decode(message.sharers, self.members, "the sharers")
            if not self._sharers >> self._place & 1:
                raise ProtocolError("this device is not among the sharers, though it shared")
            sources = self._present(self._sharers)
            if len(sources) < roster.parameters.threshold:
                raise ProtocolError(
                    "too few neighbours shared", expected=f"at least {roster.parameters.threshold}", got=len(sources)
                )
            ciphertexts = message.ciphertexts
            if len(ciphertexts) != CIPHERTEXT_BYTES * len(sources):
                raise ProtocolError(
                    "the delivery has a wrong length",
                    expected=f"{CIPHERTEXT_BYTES} bytes of each of {len(sources)} neighbours",
                    got=len(ciphertexts),
                )
            this = roster.members[self._place]
            for turn, source in enumerate(sources):
                ciphertext = ciphertexts[CIPHERTEXT_BYTES * turn : CIPHERTEXT_BYTES * (turn + 1)]
                associated = keys.share_associated_data(roster.binding, roster.members[source].id, this.id)
                own.held[source] = _open_pair(self._primitives.open(own.channels_in[source], ciphertext, associated))
            own.channels_in = {}

    def mask(self, lanes: npt.NDArray[np.uint64]) -> None:
        """Hides the vector in place: adds this device's masks to its lanes, modulo 2^64. Once."""
        with self._guarded():
            if self.state is not DeviceState.MASKING or self._is_masked:
                raise ProtocolError("mask is out of turn", expected="once, after the delivery", got=self.state.value)
            masks = self._masks()
            self._is_masked = True
            apply_masks(lanes, masks, self._threads)

    def _masks(self) -> list[Mask]:
        roster, own = self._roster(), self._secrets
        assert own.mask is not None
        this = roster.members[self._place]
        masks = [(keys.self_mask_key(own.seed, roster.binding, this.id), 1)]
        for neighbour in self._present(self._sharers):
            other = roster.members[neighbour]
            agreed = self._primitives.agree(own.mask, other.mask_key)
            key = keys.pairwise_mask_key(agreed, roster.binding, this.mask_end, other.mask_end)
            masks.append((key, 1 if other.id > this.id else -1))
        own.seed, own.mask = b"", None
        return masks

    def masked(self, vector_sha256: bytes) -> secagg_pb2.SecureMasked:
        """Ends the vector, whose masked bytes have this hash."""
        with self._step(DeviceTrigger.SEALED):
            if not self._is_masked:
                raise ProtocolError("the vector is not masked yet")
            roster = self._roster()
            this = roster.members[self._place]
            sharers = bitmap.encode(self._sharers, self.members)
            signed = masked_bytes(roster.context, roster.hash, this.id, sharers, vector_sha256)
            signature = self._primitives.sign(self._identity, signed)
            complaints = [place for place, pair in self._secrets.held.items() if pair is None]
        return secagg_pb2.SecureMasked(signature=signature, complaints=complaints, attempt=self.session.attempt)

    # ----------------------------------------------------------------------------------------------------- 3, commit

    def on_survivors(self, message: secagg_pb2.SecureSurvivors) -> secagg_pb2.SecureCommit:
        """Signs who is in the sum. The same set again gets the same answer; another set ends the attempt here.

        Before the signature leaves, the caller writes down that the update is spent: from then on it may be part of a
        sum.
        """
        if self.state is DeviceState.COMMITTED:
            return self._repeat(message)
        with self._step(DeviceTrigger.SURVIVORS):
            roster = self._roster()
            self._survivors = bitmap.decode(message.survivors, self.members, "the survivors")
            self._check_survivors(roster.parameters)
            self._check_neighbours(message.neighbours)
            signed = survivors_bytes(roster.context, roster.hash, message.survivors)
            self._commit = secagg_pb2.SecureCommit(signature=self._primitives.sign(self._identity, signed))
        return self._commit

    def _check_survivors(self, parameters: Parameters) -> None:
        survivors, least = self._survivors, max(parameters.min_survivors, parameters.quorum)
        if survivors & ~self._sharers:
            raise ProtocolError("a survivor never shared")
        if not survivors >> self._place & 1:
            raise ProtocolError("this device is not among the survivors")
        if survivors.bit_count() < least:
            raise ProtocolError("too few survivors", expected=f"at least {least}", got=survivors.bit_count())
        around = len(self._present(survivors))
        if around < parameters.threshold:
            raise ProtocolError("too few neighbours survived", expected=f"at least {parameters.threshold}", got=around)

    def _check_neighbours(self, words: bytes) -> None:
        """Each neighbour that survived masked towards the same sharers as this device: only then do the masks between
        survivors hide it, and may its seed be opened."""
        roster, around = self._roster(), self._present(self._survivors)
        if len(words) != WORD_BYTES * len(around):
            raise ProtocolError(
                "the neighbours' words have a wrong length",
                expected=f"{WORD_BYTES} bytes of each of {len(around)} neighbours",
                got=len(words),
            )
        sharers = bitmap.encode(self._sharers, self.members)
        for turn, neighbour in enumerate(around):
            other, word = roster.members[neighbour], words[WORD_BYTES * turn : WORD_BYTES * (turn + 1)]
            vector_sha256, signature = word[:-SIGNATURE_BYTES], word[-SIGNATURE_BYTES:]
            signed = masked_bytes(roster.context, roster.hash, other.id, sharers, vector_sha256)
            self._primitives.verify(other.public_key, signature, signed, f"the word of {other.device_id} on its vector")

    def _repeat(self, message: secagg_pb2.SecureSurvivors) -> secagg_pb2.SecureCommit:
        with self._guarded():
            if message.survivors != bitmap.encode(self._survivors, self.members) or self._commit is None:
                raise ProtocolError("the coordinator shows a second set of survivors", expected="the one signed before")
            return self._commit

    # ----------------------------------------------------------------------------------------------------- 4, unmask

    def on_quorum(self, message: secagg_pb2.SecureQuorum) -> secagg_pb2.SecureUnmask:
        """If a quorum signed the same survivors: one share of each neighbour that shared, of the seed if it survived,
        of the mask key if not."""
        with self._step(DeviceTrigger.QUORUM):
            self._check_quorum(message)
            shares = []
            for neighbour, pair in self._secrets.held.items():
                survived = self._survivors >> neighbour & 1
                shares.append(shamir.NO_SHARE if pair is None else pair[0] if survived else pair[1])
            self._secrets = _Secrets()
        return secagg_pb2.SecureUnmask(shares=b"".join(shares))

    def _check_quorum(self, message: secagg_pb2.SecureQuorum) -> None:
        roster, parameters = self._roster(), self._roster().parameters
        if message.survivors != bitmap.encode(self._survivors, self.members):
            raise ProtocolError("the quorum is about other survivors", expected="those that this device signed")
        signers = bitmap.decode(message.signers, self.members, "the signers")
        if signers & ~self._survivors:
            raise ProtocolError("a signer is no survivor")
        places, signatures = bitmap.places(signers, self.members), message.signatures
        if len(places) < parameters.quorum:
            raise ProtocolError("no quorum", expected=f"at least {parameters.quorum} signers", got=len(places))
        if len(signatures) != SIGNATURE_BYTES * len(places):
            raise ProtocolError(
                "the signatures have a wrong length",
                expected=f"{SIGNATURE_BYTES} bytes of each of {len(places)} signers",
                got=len(signatures),
            )
        signed = survivors_bytes(roster.context, roster.hash, message.survivors)
        size = sample_size(parameters.members, parameters.corrupted, len(places))
        for turn in draw_sample(len(places), size, self._draw):
            signer = roster.members[places[turn]]
            signature = signatures[SIGNATURE_BYTES * turn : SIGNATURE_BYTES * (turn + 1)]
            self._primitives.verify(signer.public_key, signature, signed, f"the signature of {signer.device_id}")

    # ------------------------------------------------------------------------------------------------------- helpers

    @contextmanager
    def _step(self, trigger: DeviceTrigger) -> Iterator[None]:
        """Along one line of the table, or, whatever goes wrong, to ABORTED."""
        with self._guarded():
            after = following(DEVICE_TRANSITIONS, self.state, trigger)
            yield
            self.state = after

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _roster(self) -> Roster:
        assert self._known_roster is not None
        return self._known_roster

    def _present(self, among: int) -> list[int]:
        """The neighbours in this set."""
        return [neighbour for neighbour in self._neighbours if among >> neighbour & 1]


def _open_pair(plaintext: bytes | None) -> tuple[bytes, bytes] | None:
    """The shares of seed and mask key, as they travel; None if they did not open or are no shares."""
    if plaintext is None:
        return None
    pair = plaintext[: shamir.SHARE_BYTES], plaintext[shamir.SHARE_BYTES :]
    try:
        for share in pair:
            shamir.decode_share(share)
    except ProtocolError:
        return None
    return pair
