"""Writes ``protos/vectors/secagg.json``: all that secure aggregation derives, signs and sends, and two whole rounds.

Run ``python tests/secagg/make_secagg_vectors.py``; only for a new version of the protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import (
    DeviceMachine,
    ParameterError,
    Policy,
    Primitives,
    ServerMachine,
    Session,
    apply_masks,
    bitmap,
    certificates,
    keys,
    parameters_for,
    shamir,
    transcript,
)
from evensong.secagg.device import CIPHERTEXT_BYTES
from evensong.secagg.graph import Graph
from evensong.secagg.packing import Fields
from evensong.secagg.quorum import sample_size
from evensong.secagg.roster import Member, make_roster
from evensong.v1 import secagg_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import device_id_of, public_key_of

FILE = Path(__file__).parents[2] / "protos" / "vectors" / "secagg.json"

NOW = 1_795_392_000_000  # ms since 1970
NOT_AFTER = NOW + 86_400_000
WIDTH = 32
SESSION = {
    "bundle_sha256": bytes(range(32)).hex(),
    "manifest_sha256": bytes(range(32, 64)).hex(),
    "task_id": "0123456789abcdef" * 2,
    "work": 1,
    "round": 2**33 + 7,
    "attempt": 258,
    "population": "bells/glöckner",
}
POLICY = {
    "corrupted_share": 0.1,
    "dropout_share": 0.3,
    "min_survivors": 3,
    "max_cohort": 100,
    "semi_malicious": False,
}
AUTHORITY, COORDINATOR = "authority", "coordinator"


def main() -> None:
    FILE.write_text(to_json(build()))


def to_json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


def build() -> dict[str, Any]:
    devices = _devices("abcd", 2)
    return {
        "session": SESSION | {"context": Session(**_raw(SESSION)).context.hex()},
        "certificate": _certificate(devices[0]),
        "members": [_member(device) for device in devices],
        "roster": _roster([_member(device) for device in devices]),
        "graphs": [_graph(5, 4), _graph(40, 10)],
        "parameters": [_parameters(*case) for case in _PARAMETERS],
        "checks": [
            {"members": n, "corrupted": c, "signatures": m, "checks": sample_size(n, c, m)}
            for n, c, m in [(4, 0, 3), (40, 4, 23), (40, 4, 40), (1000, 50, 526), (1000, 50, 700), (10000, 500, 10000)]
        ],
        "pairs": [_pair(devices[0], devices[1]), _pair(devices[3], devices[2])],
        "self_mask": _self_mask(devices[0]),
        "shamir": [
            _shamir(threshold, holders) for threshold, holders in [(2, [1, 2, 4]), (5, [3, 17, 1, 40, 9, 1000])]
        ],
        "signed": _signed(devices[1]),
        "bitmaps": [
            {"members": count, "places": places, "bitmap": bitmap.encode(bitmap.from_places(places), count).hex()}
            for count, places in [(4, [0, 1, 3]), (8, [7]), (9, [8]), (20, [0, 1, 2, 3, 9, 19])]
        ],
        "refused": _refused(),
        "rounds": [
            _round(_devices("abcd", 2), POLICY, dropped=[2]),
            _round(
                _devices("efghijk", 3), POLICY | {"dropout_share": 0.49}, unshared=[4], dropped=[1], damaged=[[2, 6]]
            ),
        ],
    }


# ------------------------------------------------------------------------------------------------------ fixed secrets


def _fixed(name: str, size: int) -> bytes:
    return hashlib.shake_256(b"evensong golden vectors " + name.encode()).digest(size)


def _devices(names: Sequence[str], threshold: int) -> list[dict[str, Any]]:
    """In the order of their ids."""
    return sorted((_device(name, threshold) for name in names), key=lambda device: _id(device["identity"]))


def _device(name: str, threshold: int) -> dict[str, Any]:
    return {
        "identity": _fixed(f"{name} identity", 32).hex(),
        "serial": _fixed(f"{name} serial", 16).hex(),
        "channel": _fixed(f"{name} channel", 32).hex(),
        "mask": _fixed(f"{name} mask", 32).hex(),
        "nonce": _fixed(f"{name} nonce", 16).hex(),
        "seed": _fixed(f"{name} seed", 32).hex(),
        "seed_coefficients": _coefficients(f"{name} seed", threshold),
        "mask_coefficients": _coefficients(f"{name} mask", threshold),
        "fields": [int(value) for value in np.frombuffer(_fixed(f"{name} fields", 24), "<u2")],
    }


def _coefficients(name: str, threshold: int) -> list[str]:
    """Of x^1, x^2, ..."""
    return [
        shamir.encode_share(int.from_bytes(_fixed(f"{name} coefficient {power}", 48), "little") % shamir.PRIME).hex()
        for power in range(1, threshold)
    ]


def _raw(session: dict[str, Any]) -> dict[str, Any]:
    return session | {name: bytes.fromhex(session[name]) for name in ("bundle_sha256", "manifest_sha256")}


def _identity(private: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private))


def _id(private: str) -> str:
    return device_id_of(public_key_of(_identity(private)))


def _named_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_fixed(name, 32))


def _agreement(private: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(private))


def _machine(device: dict[str, Any], policy: dict[str, Any] = POLICY) -> DeviceMachine:
    """What it draws, in the order in which it does: keys, nonce, seed, coefficients (the highest power first), and then
    which signatures to check, which no message shows."""
    drawn = [device[name] for name in ("channel", "mask", "nonce", "seed")]
    for name in ("seed_coefficients", "mask_coefficients"):
        drawn += [number + "00" * 15 for number in reversed(device[name])]
    return DeviceMachine(
        Session(**_raw(SESSION)),
        Policy(**policy),
        identity=_identity(device["identity"]),
        certificate=_issue(device),
        authority_public_key=public_key_of(_named_key(AUTHORITY)),
        coordinator_public_key=public_key_of(_named_key(COORDINATOR)),
        draw=_draw_from(bytes.fromhex("".join(drawn)) + bytes(16 * 100)),
    )


def _draw_from(drawn: bytes) -> Callable[[int], bytes]:
    position = 0

    def draw(size: int) -> bytes:
        nonlocal position
        position += size
        assert position <= len(drawn)
        return drawn[position - size : position]

    return draw


def _issue(device: dict[str, Any]) -> bytes:
    return certificates.issue(
        _named_key(AUTHORITY),
        public_key_of(_identity(device["identity"])),
        SESSION["population"],
        NOT_AFTER,
        bytes.fromhex(device["serial"]),
    )


# ------------------------------------------------------------------------------------------------ one thing at a time


def _certificate(device: dict[str, Any]) -> dict[str, Any]:
    public_key, serial = public_key_of(_identity(device["identity"])), bytes.fromhex(device["serial"])
    head = serial + NOT_AFTER.to_bytes(8, "little")
    signed = transcript.label("certificate") + sha256(SESSION["population"].encode()) + public_key + head
    return {
        "authority": _fixed(AUTHORITY, 32).hex(),
        "authority_public_key": public_key_of(_named_key(AUTHORITY)).hex(),
        "public_key": public_key.hex(),
        "population": SESSION["population"],
        "not_after_unix_ms": NOT_AFTER,
        "serial": device["serial"],
        "signed": signed.hex(),
        "certificate": _issue(device).hex(),
    }


def _member_of(device: dict[str, Any]) -> Member:
    sent = _machine(device).advertise()
    return Member(
        _id(device["identity"]),
        sent.public_key,
        sent.channel_key,
        sent.mask_key,
        sent.nonce,
        sent.signature,
        sent.certificate,
    )


def _member(device: dict[str, Any]) -> dict[str, Any]:
    member, context = _member_of(device), Session(**_raw(SESSION)).context
    signed = transcript.advertise_bytes(context, member.channel_key, member.mask_key, member.nonce)
    return {name: device[name] for name in ("identity", "channel", "mask", "nonce")} | {
        "public_key": member.public_key.hex(),
        "id": member.device_id,
        "channel_key": member.channel_key.hex(),
        "mask_key": member.mask_key.hex(),
        "certificate": member.certificate.hex(),
        "signed": signed.hex(),
        "signature": member.signature.hex(),
        "member": member.encode().hex(),
    }


def _roster(entries: list[dict[str, Any]]) -> dict[str, Any]:
    members = [Member(entry["id"], *(bytes.fromhex(entry[name]) for name in _MEMBER_FIELDS)) for entry in entries]
    roster = make_roster(members, Session(**_raw(SESSION)), Policy(**POLICY))
    signed = transcript.roster_bytes(roster.context, roster.hash)
    return {
        "context": roster.context.hex(),
        "members": [member.encode().hex() for member in members],
        "hash": roster.hash.hex(),
        "coordinator": _fixed(COORDINATOR, 32).hex(),
        "coordinator_public_key": public_key_of(_named_key(COORDINATOR)).hex(),
        "signed": signed.hex(),
        "signature": _named_key(COORDINATOR).sign(signed).hex(),
    }


_MEMBER_FIELDS = ("public_key", "channel_key", "mask_key", "nonce", "signature", "certificate")


def _graph(members: int, degree: int) -> dict[str, Any]:
    roster_hash = _fixed(f"roster {members}", 32)
    ids = sorted(_fixed(f"id {place}", 16) for place in range(members))
    graph = Graph(roster_hash, ids, degree)
    return {
        "roster_hash": roster_hash.hex(),
        "ids": [identifier.hex() for identifier in ids],
        "degree": degree,
        "ring": graph.ring,
        "neighbours": [list(graph.neighbours(place)) for place in range(members)],
    }


_PARAMETERS = [
    (3, 0.0, 0.0, False),
    (4, 0.1, 0.3, False),
    (5, 0.1, 0.3, False),
    (10, 0.1, 0.45, False),
    (10, 0.3, 0.3, True),  # none
    (20, 0.3, 0.3, True),
    (32, 0.2, 0.2, True),
    (33, 0.2, 0.2, False),
    (40, 0.1, 0.1, False),
    (40, 0.45, 0.1, False),
    (40, 0.45, 0.45, False),  # none
    (100, 0.29, 0.1, False),  # 0.29 * 100 is 28.999... in float64
    (100, 0.05, 0.3, True),
    (200, 0.1, 0.3, False),
    (1000, 0.05, 0.3, False),
    (1000, 0.05, 0.3, True),
    (10000, 0.05, 0.3, False),
]


def _parameters(members: int, corrupted_share: float, dropout_share: float, semi_malicious: bool) -> dict[str, Any]:
    shares = {"corrupted_share": corrupted_share, "dropout_share": dropout_share, "semi_malicious": semi_malicious}
    try:
        found = parameters_for(members, min_survivors=3, **shares)
    except ParameterError:
        return {"members": members, **shares, "degree": None, "threshold": None, "quorum": None}
    numbers = {"degree": found.degree, "threshold": found.threshold, "quorum": found.quorum}
    return {"members": members, **shares, **numbers}


def _binding() -> bytes:
    return _fixed("context", 32) + _fixed("roster", 32)


def _pair(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What ``one`` and ``other`` share, and the ciphertext from ``one`` to ``other``."""
    binding, this, that = _binding(), _member_of(one), _member_of(other)
    channel = Primitives().agree(_agreement(one["channel"]), that.channel_key)
    pairwise = Primitives().agree(_agreement(one["mask"]), that.mask_key)
    outward = keys.channel_key(channel, binding, this.channel_end, that.channel_end)
    mask_key = keys.pairwise_mask_key(pairwise, binding, this.mask_end, that.mask_end)
    of_seed, of_mask_key = (_coefficients(f"share of {what}", 2)[0] for what in ("seed", "mask"))
    associated = keys.share_associated_data(binding, this.id, that.id)
    plaintext = bytes.fromhex(of_seed + of_mask_key)
    return {
        "binding": binding.hex(),
        "one": _end(one),
        "other": _end(other),
        "channel_agreement": channel.hex(),
        "mask_agreement": pairwise.hex(),
        "channel_key_one_to_other": outward.hex(),
        "channel_key_other_to_one": keys.channel_key(channel, binding, that.channel_end, this.channel_end).hex(),
        "pairwise_mask_key": mask_key.hex(),
        "pairwise_mask_lanes": _lanes(mask_key, 5),
        "sign_of_one": 1 if that.id > this.id else -1,
        "share_of_seed": of_seed,
        "share_of_mask_key": of_mask_key,
        "associated_data": associated.hex(),
        "ciphertext_one_to_other": Primitives().seal(outward, plaintext, associated).hex(),
    }


def _end(device: dict[str, Any]) -> dict[str, Any]:
    names = ("public_key", "id", "channel", "channel_key", "mask", "mask_key")
    member = _member(device)
    return {name: member[name] for name in names}


def _self_mask(device: dict[str, Any]) -> dict[str, Any]:
    seed, identifier = bytes.fromhex(device["seed"]), bytes.fromhex(_id(device["identity"]))
    key = keys.self_mask_key(seed, _binding(), identifier)
    return {
        "binding": _binding().hex(),
        "id": identifier.hex(),
        "seed": seed.hex(),
        "commitment": keys.seed_commitment(seed, _binding(), identifier).hex(),
        "key": key.hex(),
        "lanes": _lanes(key, 7),
        "lane_1000001": _lanes(key, 1_000_002, 1_000_001)[0],
    }


def _lanes(key: bytes, count: int, first: int = 0) -> list[str]:
    """Those from ``first`` to ``count``, each as a number in hex: most significant digit first."""
    lanes = np.zeros(count, np.uint64)
    apply_masks(lanes, [(key, 1)])
    return [f"{lane:016x}" for lane in lanes[first:]]


def _shamir(threshold: int, holders: list[int]) -> dict[str, Any]:
    secret, coefficients = _fixed(f"secret {threshold}", 32), _coefficients(f"shamir {threshold}", threshold)
    drawn = bytes.fromhex("".join(number + "00" * 15 for number in reversed(coefficients)))
    shares = shamir.split(secret, threshold, holders, _draw_from(drawn))
    assert shamir.reconstruct(dict(list(zip(holders, shares, strict=True))[-threshold:])) == secret
    return {
        "threshold": threshold,
        "secret": secret.hex(),
        "coefficients": coefficients,
        "shares": [
            {"x": holder, "share": shamir.encode_share(share).hex()}
            for holder, share in zip(holders, shares, strict=True)
        ],
    }


def _signed(device: dict[str, Any]) -> dict[str, Any]:
    identity, (context, roster_hash) = _identity(device["identity"]), (_binding()[:32], _binding()[32:])
    identifier, vector = bytes.fromhex(_id(device["identity"])), _fixed("vector", 48)
    sharers, survivors = b"\x0f\x01", b"\x0b\x01"
    masked = transcript.masked_bytes(context, roster_hash, identifier, sharers, sha256(vector))
    survived = transcript.survivors_bytes(context, roster_hash, survivors)
    return {
        "identity": device["identity"],
        "context": context.hex(),
        "roster_hash": roster_hash.hex(),
        "sharers": sharers.hex(),
        "vector": vector.hex(),
        "masked_signed": masked.hex(),
        "masked_signature": identity.sign(masked).hex(),
        "survivors": survivors.hex(),
        "survivors_signed": survived.hex(),
        "survivors_signature": identity.sign(survived).hex(),
    }


def _refused() -> dict[str, Any]:
    """Low orders are those of RFC 7748's curve (https://cr.yp.to/ecdh.html#validate); encodings are not canonical."""
    prime = 2**255 - 19
    order_8 = [
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ]
    return {
        "low_order_keys": [number.to_bytes(32, "little").hex() for number in (0, 1, prime - 1)] + order_8,
        "malformed_keys": [
            number.to_bytes(32, "little").hex() for number in (prime, prime + 1, prime + 9, 2**255 - 1, 2**255 + 9)
        ],
        "shares": [
            shamir.PRIME.to_bytes(33, "little").hex(),
            (2**264 - 1).to_bytes(33, "little").hex(),
            bytes(32).hex(),
            bytes(34).hex(),
        ],
        "bitmaps": [
            {"members": 4, "bitmap": "1f"},
            {"members": 8, "bitmap": "ff00"},
            {"members": 9, "bitmap": "ff"},
            {"members": 9, "bitmap": "ff03"},
        ],
    }


# ---------------------------------------------------------------------------------------------------- whole rounds


def _round(
    devices: list[dict[str, Any]],
    policy: dict[str, Any],
    *,
    unshared: Sequence[int] = (),
    dropped: Sequence[int] = (),
    damaged: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    given = {
        "session": SESSION,
        "policy": policy,
        "authority": _fixed(AUTHORITY, 32).hex(),
        "coordinator": _fixed(COORDINATOR, 32).hex(),
        "not_after_unix_ms": NOT_AFTER,
        "now_unix_ms": NOW,
        "width": WIDTH,
        "devices": devices,
        "unshared": list(unshared),
        "dropped": list(dropped),
        "damaged": list(damaged),
    }
    return {"given": given, "expected": play(given)}


def play(given: dict[str, Any]) -> dict[str, Any]:
    """Both machines through the round: ``unshared`` devices only advertise, ``dropped`` ones share and send no more; of
    each pair in ``damaged`` (source, destination) the last byte of the ciphertext is changed on its way."""
    devices, now = given["devices"], given["now_unix_ms"]
    ids = [_id(device["identity"]) for device in devices]
    sharers = [place for place in range(len(devices)) if place not in given["unshared"]]
    survivors = [place for place in sharers if place not in given["dropped"]]
    machines = [_machine(device, given["policy"]) for device in devices]
    fields = Fields(len(devices[0]["fields"]), given["width"])
    server = ServerMachine(
        Session(**_raw(given["session"])),
        Policy(**given["policy"]),
        signer=_identity(given["coordinator"]),
        authority_public_key=public_key_of(_identity(given["authority"])),
    )

    def send(messages: dict[int, Any]) -> list[Any]:
        """The messages of one stage, by place; the answers."""
        for place, message in messages.items():
            hashed = sha256(vectors[place]) if isinstance(message, secagg_pb2.SecureMasked) else None
            server.receive(ids[place], message, vector_sha256=hashed, now_unix_ms=now)
        server.close()
        return [server.answer(ids[place], type(message)) for place, message in messages.items()]

    vectors: dict[int, bytes] = {}
    advertised = {place: machine.advertise() for place, machine in enumerate(machines)}
    roster = send(advertised)[0]
    shares = {place: machines[place].on_roster(roster, now) for place in sharers}
    found = server._roster()
    deliveries = dict(zip(sharers, send(shares), strict=True))
    for source, destination in given["damaged"]:
        _damage(deliveries[destination], source, [at for at in found.graph.neighbours(destination) if at in sharers])
    masked = {}
    for place in survivors:
        machines[place].on_delivery(deliveries[place])
        lanes = fields.pack(np.array(devices[place]["fields"], np.uint64))
        machines[place].mask(lanes)
        vectors[place] = lanes.astype("<u8").tobytes()
        masked[place] = machines[place].masked(sha256(vectors[place]))
    survived = dict(zip(survivors, send(masked), strict=True))
    commits = {place: machines[place].on_survivors(message) for place, message in survived.items()}
    quorum = send(commits)[0]
    unmask = {place: machines[place].on_quorum(quorum) for place in survivors}
    send(unmask)
    total = np.sum([np.frombuffer(vector, "<u8") for vector in vectors.values()], axis=0, dtype=np.uint64)
    apply_masks(total, server.unmasking().masks)
    return {
        "context": found.context.hex(),
        "roster_hash": found.hash.hex(),
        "degree": found.parameters.degree,
        "threshold": found.parameters.threshold,
        "quorum": found.parameters.quorum,
        "neighbours": [list(found.graph.neighbours(place)) for place in range(len(devices))],
        "advertise": _encoded(advertised),
        "roster": _hex(roster),
        "shares": _encoded(shares),
        "deliveries": _encoded(deliveries),
        "vectors": [vector.hex() for vector in vectors.values()],
        "masked": _encoded(masked),
        "survivors": _encoded(survived),
        "commits": _encoded(commits),
        "quorum_message": _hex(quorum),
        "unmask": _encoded(unmask),
        "reconstructed": [server._reveals[place].secret.hex() for place in sharers],  # type: ignore[union-attr]
        "sum": total.astype("<u8").tobytes().hex(),
        "sum_fields": fields.unpack(total).tolist(),
    }


def _damage(delivery: secagg_pb2.SecureDelivery, source: int, sources: list[int]) -> None:
    ciphertexts = bytearray(delivery.ciphertexts)
    ciphertexts[CIPHERTEXT_BYTES * (sources.index(source) + 1) - 1] ^= 1
    delivery.ciphertexts = bytes(ciphertexts)


def _encoded(messages: dict[int, Any]) -> list[str]:
    return [_hex(message) for message in messages.values()]


def _hex(message: Any) -> str:
    return message.SerializeToString(deterministic=True).hex()


if __name__ == "__main__":
    main()
