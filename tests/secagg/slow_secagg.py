"""Secure aggregation a second time, slowly, as docs/secagg.md and secagg.proto tell it, to check the golden vectors.

Nothing of ``evensong`` is imported. Numbers are ``int``, probabilities are counted exactly, AES-CTR goes block by block
and protobuf byte by byte; X25519, Ed25519, AES and AES-GCM come from ``cryptography``. It plays honest devices and an
honest coordinator, and checks no more than that signatures hold and secrets are those committed to.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PRIME = 2**256 + 297
LANE = 2**64


def label(name: str) -> bytes:
    return f"evensong/v1/secagg/{name}".encode() + b"\0"


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def little(number: int, size: int) -> bytes:
    return bytes(number >> 8 * place & 255 for place in range(size))


# ---------------------------------------------------------------------------------------------------- keys, signatures


def sign(private: bytes, message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(public).verify(signature, message)


def identity_of(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def id_of(public: bytes) -> bytes:
    return sha256(public)[:16]


def agreement_key_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869; 16 bytes are part of its first block."""
    extracted = hmac.new(salt, secret, "sha256").digest()
    return hmac.new(extracted, info + b"\1", "sha256").digest()[:16]


# ------------------------------------------------------------------------------------------- session, members, roster


def context_of(session: Mapping[str, Any]) -> bytes:
    return sha256(
        label("context")
        + bytes.fromhex(session["bundle_sha256"])
        + bytes.fromhex(session["manifest_sha256"])
        + bytes.fromhex(session["task_id"])
        + little(session["work"], 1)
        + little(session["round"], 8)
        + little(session["attempt"], 4)
    )


def certificate_signed(public: bytes, population: str, serial: bytes, not_after: int) -> bytes:
    return label("certificate") + sha256(population.encode()) + public + serial + little(not_after, 8)


def certificate(authority: bytes, public: bytes, population: str, serial: bytes, not_after: int) -> bytes:
    signature = sign(authority, certificate_signed(public, population, serial, not_after))
    return serial + little(not_after, 8) + signature


def advertise_signed(context: bytes, channel_key: bytes, mask_key: bytes, nonce: bytes) -> bytes:
    return label("advertise") + context + channel_key + mask_key + nonce


@dataclass(frozen=True)
class Member:
    public_key: bytes
    channel_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes
    certificate: bytes

    @property
    def id(self) -> bytes:
        return id_of(self.public_key)

    def encode(self) -> bytes:
        return self.public_key + self.channel_key + self.mask_key + self.nonce + self.signature + self.certificate

    def message(self) -> bytes:
        """SecureAdvertise."""
        return (
            field(1, self.channel_key)
            + field(2, self.mask_key)
            + field(3, self.nonce)
            + field(4, self.signature)
            + field(5, self.public_key)
            + field(6, self.certificate)
        )


def roster_hash(context: bytes, members: Sequence[bytes]) -> bytes:
    return sha256(label("roster") + context + little(len(members), 4) + b"".join(members))


def roster_signed(context: bytes, roster: bytes) -> bytes:
    return label("roster-signature") + context + roster


def masked_signed(context: bytes, roster: bytes, identifier: bytes, sharers: bytes, vector_hash: bytes) -> bytes:
    return label("masked") + context + roster + identifier + sha256(sharers) + vector_hash


def survivors_signed(context: bytes, roster: bytes, survivors: bytes) -> bytes:
    return label("survivors") + context + roster + sha256(survivors)


def bitmap(places: Iterable[int], members: int) -> bytes:
    data = bytearray(-(-members // 8))
    for place in places:
        data[place // 8] |= 1 << place % 8
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------- graph


def ring(roster: bytes, ids: Sequence[bytes]) -> list[int]:
    return sorted(range(len(ids)), key=lambda place: hmac.new(roster, ids[place], "sha256").digest())


def neighbours(order: Sequence[int], degree: int, place: int) -> list[int]:
    members = len(order)
    if degree == members - 1:
        return [other for other in range(members) if other != place]
    turn = order.index(place)
    around = [order[(turn + step) % members] for step in range(-(degree // 2), degree // 2 + 1) if step]
    return sorted(around)


# ------------------------------------------------------------------------------------------- degree, threshold, quorum


def parameters(
    members: int, corrupted_share: float, dropout_share: float, semi_malicious: bool
) -> tuple[int, int, int] | None:
    """k, t and Q; None if there are none."""
    corrupted = math.floor(corrupted_share * members)
    dropped = math.floor(dropout_share * members)
    quorum = (members + corrupted) // 2 + 1
    if members - dropped < quorum:
        return None
    if members > 32:
        for degree in range(2, members - 1, 2):
            threshold = _sparse_threshold(members, corrupted, degree, semi_malicious)
            if _stays_connected(members, corrupted + dropped, degree) and _enough_stay(
                members, dropped, degree, threshold
            ):
                return degree, threshold, quorum
    degree = members - 1
    threshold = min(max(corrupted + 1, 2 * degree // 3 + 1), members - dropped - 1)
    if semi_malicious:
        threshold = min(max((degree + corrupted) // 2 + 1, 2 * degree // 3 + 1), members - dropped - 1)
    secure = 2 * threshold > degree + corrupted if semi_malicious else threshold > corrupted
    return (degree, threshold, quorum) if secure and threshold >= 2 else None


def _stays_connected(members: int, bad: int, degree: int) -> bool:
    return members * (members - degree - 1) * math.perm(bad, degree) * 2**40 < math.perm(members, degree)


def _sparse_threshold(members: int, corrupted: int, degree: int, semi_malicious: bool) -> int:
    tolerated, beyond = degree, 0
    while True:
        beyond += _ways(members, corrupted, degree, [tolerated])
        if beyond * members * 2**41 > math.comb(members, degree):
            break
        tolerated -= 1
    if semi_malicious:
        tolerated = math.ceil((tolerated + degree - 1.25) / 2)
    return max(tolerated + 1, 2)


def _enough_stay(members: int, dropped: int, degree: int, threshold: int) -> bool:
    few = _ways(members, members - dropped, degree, range(threshold))
    return few * members * 2**20 <= math.comb(members, degree)


def _ways(members: int, marked: int, draws: int, hits: Iterable[int]) -> int:
    """Of the ``comb(members, draws)`` equally likely draws, those with so many hits."""
    return sum(math.comb(marked, hit) * math.comb(members - marked, draws - hit) for hit in hits if hit <= draws)


def checks(members: int, corrupted: int, signatures: int) -> int:
    """How many signatures of a quorum a device checks."""
    quorum = (members + corrupted) // 2 + 1
    forged = 1 - (members + corrupted) / (2 * signatures)
    if forged <= 0:
        return quorum
    sample = math.ceil((40 + math.log2(members)) / -math.log2(1 - forged))
    return min(sample, quorum)


# ---------------------------------------------------------------------------------------------------- what is derived


def channel_key(shared: bytes, binding: bytes, source: Member, destination: Member) -> bytes:
    ends = source.id + destination.id + source.channel_key + destination.channel_key
    return hkdf(shared, binding, label("channel") + ends)


def pairwise_mask_key(shared: bytes, binding: bytes, one: Member, other: Member) -> bytes:
    lower, higher = sorted((one, other), key=lambda member: member.id)
    return hkdf(shared, binding, label("mask") + lower.id + higher.id + lower.mask_key + higher.mask_key)


def self_mask_key(seed: bytes, binding: bytes, identifier: bytes) -> bytes:
    return hkdf(seed, binding, label("self-mask") + identifier)


def seed_commitment(seed: bytes, binding: bytes, identifier: bytes) -> bytes:
    return sha256(label("seed") + binding + identifier + seed)


def share_associated(binding: bytes, source: bytes, destination: bytes) -> bytes:
    return label("share") + binding + source + destination


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    return AESGCM(key).encrypt(bytes(12), plaintext, associated)


def open_sealed(key: bytes, ciphertext: bytes, associated: bytes) -> bytes | None:
    try:
        return AESGCM(key).decrypt(bytes(12), ciphertext, associated)
    except InvalidTag:
        return None


def mask(key: bytes, lanes: int) -> list[int]:
    """The first lanes of the keystream."""
    return [mask_lane(key, lane) for lane in range(lanes)]


def mask_lane(key: bytes, lane: int) -> int:
    """Half a block of AES-CTR, whose counter is the number of the block."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update((lane // 2).to_bytes(16, "big"))
    return int.from_bytes(block[8:] if lane % 2 else block[:8], "little")


def add(lanes: Sequence[int], other: Sequence[int], sign: int = 1) -> list[int]:
    return [(one + sign * two) % LANE for one, two in zip(lanes, other, strict=True)]


def lanes_to_bytes(lanes: Sequence[int]) -> bytes:
    return b"".join(little(lane, 8) for lane in lanes)


def pack(fields: Sequence[int], width: int) -> list[int]:
    per_lane = 64 // width
    parts = [fields[start : start + per_lane] for start in range(0, len(fields), per_lane)]
    return [sum(value << width * place for place, value in enumerate(part)) for part in parts]


def unpack(lanes: Sequence[int], width: int) -> list[int]:
    return [lane >> width * place & (1 << width) - 1 for lane in lanes for place in range(64 // width)]


# ------------------------------------------------------------------------------------------------------------- shares


def share(secret: bytes, coefficients: Sequence[int], x: int) -> bytes:
    """``coefficients`` of x^1, x^2, ..."""
    powers = enumerate([int.from_bytes(secret, "little"), *coefficients])
    return little(sum(coefficient * x**power for power, coefficient in powers) % PRIME, 33)


def reconstruct(shares: Mapping[int, bytes]) -> bytes:
    secret = 0
    for x, value in shares.items():
        above = math.prod(-other for other in shares if other != x)
        below = math.prod(x - other for other in shares if other != x)
        secret += int.from_bytes(value, "little") * above * pow(below, -1, PRIME)
    return little(secret % PRIME, 32)


# ------------------------------------------------------------------------------------------------------------ protobuf


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, value: bytes | int) -> bytes:
    """A singular field; proto3 leaves out what is empty or zero."""
    if not value:
        return b""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


# --------------------------------------------------------------------------------------------------------- whole round


def play(given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the round ``given`` in the golden vectors sends and computes, from its secrets."""
    return SlowRound(given).play()


class SlowRound:
    """Devices come in the order of their ids, so that a device's number is its place.

    ``unshared`` ones only advertise, ``dropped`` ones share and send no more; of each pair in ``damaged`` (source,
    destination) the last byte of the ciphertext is changed on its way.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.devices = given["devices"]
        self.context = context_of(given["session"])
        self.members = [self._member(device) for device in self.devices]
        self.roster = roster_hash(self.context, [member.encode() for member in self.members])
        self.binding = self.context + self.roster
        policy, count = given["policy"], len(self.members)
        found = parameters(count, policy["corrupted_share"], policy["dropout_share"], policy["semi_malicious"])
        assert found is not None
        self.degree, self.threshold, self.quorum = found
        order = ring(self.roster, [member.id for member in self.members])
        self.around = [neighbours(order, self.degree, place) for place in range(count)]
        self.sharers = [place for place in range(count) if place not in given["unshared"]]
        self.survivors = [place for place in self.sharers if place not in given["dropped"]]

    def play(self) -> dict[str, Any]:
        shares = {place: self._shares(place) for place in self.sharers}
        deliveries = {place: self._delivery(place, shares) for place in self.sharers}
        held = {place: self._open(place, deliveries[place]) for place in self.survivors}
        vectors = {place: self._masked_vector(place) for place in self.survivors}
        words = {place: self._word(place, vectors[place]) for place in self.survivors}
        commits = [self._sign(place, self._survivors_signed()) for place in self.survivors]
        unmask = {place: self._unmask_shares(held[place]) for place in self.survivors}
        secrets = self._reconstruct(unmask)
        total = self._unmask(vectors, secrets)
        survivors = self._bitmap(self.survivors)
        return {
            "context": self.context.hex(),
            "roster_hash": self.roster.hex(),
            "degree": self.degree,
            "threshold": self.threshold,
            "quorum": self.quorum,
            "neighbours": self.around,
            "advertise": [member.message().hex() for member in self.members],
            "roster": self._roster_message().hex(),
            "shares": [
                (field(1, b"".join(parts.values())) + field(2, self._commitment(place))).hex()
                for place, parts in shares.items()
            ],
            "deliveries": [
                (field(1, self._bitmap(self.sharers)) + field(2, b"".join(parts.values()))).hex()
                for parts in deliveries.values()
            ],
            "vectors": [lanes_to_bytes(vector).hex() for vector in vectors.values()],
            "masked": [self._masked_message(place, words[place], held[place]).hex() for place in self.survivors],
            "survivors": [
                (field(1, survivors) + field(2, self._neighbours_words(place, words))).hex() for place in self.survivors
            ],
            "commits": [field(1, signature).hex() for signature in commits],
            "quorum_message": (field(1, survivors) + field(2, survivors) + field(3, b"".join(commits))).hex(),
            "unmask": [field(1, b"".join(parts.values())).hex() for parts in unmask.values()],
            "reconstructed": [secret.hex() for secret in secrets.values()],
            "sum": lanes_to_bytes(total).hex(),
            "sum_fields": unpack(total, self.given["width"]),
        }

    # ---------------------------------------------------------------------------------------------------- 0, advertise

    def _member(self, device: Mapping[str, Any]) -> Member:
        channel, mask_key = (agreement_key_of(bytes.fromhex(device[name])) for name in ("channel", "mask"))
        identity, nonce = bytes.fromhex(device["identity"]), bytes.fromhex(device["nonce"])
        public_key = identity_of(identity)
        authority, serial = bytes.fromhex(self.given["authority"]), bytes.fromhex(device["serial"])
        population, not_after = self.given["session"]["population"], self.given["not_after_unix_ms"]
        return Member(
            public_key,
            channel,
            mask_key,
            nonce,
            sign(identity, advertise_signed(self.context, channel, mask_key, nonce)),
            certificate(authority, public_key, population, serial, not_after),
        )

    def _roster_message(self) -> bytes:
        signature = sign(bytes.fromhex(self.given["coordinator"]), roster_signed(self.context, self.roster))
        return b"".join(field(1, member.message()) for member in self.members) + field(2, signature)

    # ------------------------------------------------------------------------------------------------------- 1, shares

    def _shares(self, place: int) -> dict[int, bytes]:
        """The ciphertext for each neighbour."""
        device, this, ciphertexts = self.devices[place], self.members[place], {}
        for other in self.around[place]:
            to = self.members[other]
            pair = b""
            for secret, coefficients in (("seed", "seed_coefficients"), ("mask", "mask_coefficients")):
                numbers = [int.from_bytes(bytes.fromhex(number), "little") for number in device[coefficients]]
                pair += share(bytes.fromhex(device[secret]), numbers, other + 1)
            key = channel_key(self._agreed(place, other), self.binding, this, to)
            ciphertexts[other] = seal(key, pair, share_associated(self.binding, this.id, to.id))
        return ciphertexts

    def _commitment(self, place: int) -> bytes:
        return seed_commitment(bytes.fromhex(self.devices[place]["seed"]), self.binding, self.members[place].id)

    def _delivery(self, place: int, shares: Mapping[int, Mapping[int, bytes]]) -> dict[int, bytes]:
        """The ciphertext from each neighbour that shared."""
        parts = {source: shares[source][place] for source in self.around[place] if source in shares}
        for source, destination in self.given["damaged"]:
            if destination == place:
                parts[source] = parts[source][:-1] + bytes([parts[source][-1] ^ 1])
        return parts

    def _open(self, place: int, delivery: Mapping[int, bytes]) -> dict[int, tuple[bytes, bytes] | None]:
        """By owner: the shares of its seed and of its mask key."""
        this, held = self.members[place], {}
        for source, ciphertext in delivery.items():
            by = self.members[source]
            key = channel_key(self._agreed(place, source), self.binding, by, this)
            pair = open_sealed(key, ciphertext, share_associated(self.binding, by.id, this.id))
            held[source] = None if pair is None else (pair[:33], pair[33:])
        return held

    # ----------------------------------------------------------------------------------------------- 2, masked vector

    def _masked_vector(self, place: int) -> list[int]:
        device, this = self.devices[place], self.members[place]
        lanes = pack(device["fields"], self.given["width"])
        lanes = add(lanes, mask(self_mask_key(bytes.fromhex(device["seed"]), self.binding, this.id), len(lanes)))
        for other in self.around[place]:
            if other in self.sharers:
                key = self._mask_key(bytes.fromhex(device["mask"]), place, other)
                lanes = add(lanes, mask(key, len(lanes)), 1 if self.members[other].id > this.id else -1)
        return lanes

    def _word(self, place: int, vector: Sequence[int]) -> bytes:
        """96 bytes: the vector's hash, and the signature."""
        vector_hash, sharers = sha256(lanes_to_bytes(vector)), self._bitmap(self.sharers)
        signed = masked_signed(self.context, self.roster, self.members[place].id, sharers, vector_hash)
        return vector_hash + self._sign(place, signed)

    def _masked_message(self, place: int, word: bytes, held: Mapping[int, tuple[bytes, bytes] | None]) -> bytes:
        complaints = b"".join(varint(source) for source in self.around[place] if held.get(source, ()) is None)
        return field(1, word[32:]) + field(2, complaints) + field(3, self.given["session"]["attempt"])

    # ------------------------------------------------------------------------------------------- 3, commit; 4, unmask

    def _neighbours_words(self, place: int, words: Mapping[int, bytes]) -> bytes:
        return b"".join(words[other] for other in self.around[place] if other in words)

    def _survivors_signed(self) -> bytes:
        return survivors_signed(self.context, self.roster, self._bitmap(self.survivors))

    def _unmask_shares(self, held: Mapping[int, tuple[bytes, bytes] | None]) -> dict[int, bytes]:
        return {
            owner: b"\xff" * 33 if pair is None else pair[0] if owner in self.survivors else pair[1]
            for owner, pair in held.items()
        }

    # ----------------------------------------------------------------------------------------------------- coordinator

    def _reconstruct(self, unmask: Mapping[int, Mapping[int, bytes]]) -> dict[int, bytes]:
        """Of each sharer the seed if it survived, else the mask key."""
        secrets = {}
        for owner in self.sharers:
            shares = {holder + 1: parts[owner] for holder, parts in unmask.items() if owner in parts}
            usable = [(x, value) for x, value in shares.items() if value != b"\xff" * 33]
            secret = reconstruct(dict(usable[-self.threshold :]))
            if owner in self.survivors:
                assert seed_commitment(secret, self.binding, self.members[owner].id) == self._commitment(owner)
            else:
                assert agreement_key_of(secret) == self.members[owner].mask_key
            secrets[owner] = secret
        return secrets

    def _unmask(self, vectors: Mapping[int, Sequence[int]], secrets: Mapping[int, bytes]) -> list[int]:
        count = len(next(iter(vectors.values())))
        total = [0] * count
        for vector in vectors.values():
            total = add(total, vector)
        for owner, secret in secrets.items():
            this = self.members[owner]
            if owner in vectors:
                total = add(total, mask(self_mask_key(secret, self.binding, this.id), count), -1)
                continue
            for other in set(self.around[owner]) & set(vectors):
                # What a survivor of lower id added is taken away, what one of higher id subtracted is added.
                sign_ = -1 if self.members[other].id < this.id else 1
                total = add(total, mask(self._mask_key(secret, owner, other), count), sign_)
        return total

    # --------------------------------------------------------------------------------------------------------- helpers

    def _bitmap(self, places: Iterable[int]) -> bytes:
        return bitmap(places, len(self.members))

    def _sign(self, place: int, message: bytes) -> bytes:
        signature = sign(bytes.fromhex(self.devices[place]["identity"]), message)
        verify(self.members[place].public_key, signature, message)
        return signature

    def _agreed(self, place: int, other: int) -> bytes:
        return agree(bytes.fromhex(self.devices[place]["channel"]), self.members[other].channel_key)

    def _mask_key(self, private: bytes, place: int, other: int) -> bytes:
        shared = agree(private, self.members[other].mask_key)
        return pairwise_mask_key(shared, self.binding, self.members[place], self.members[other])
