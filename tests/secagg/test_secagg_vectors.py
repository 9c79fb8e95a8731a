"""The golden vectors of secure aggregation: the code gives them, and so does a second implementation of the page."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_secagg as slow
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from evensong.secagg import (
    ParameterError,
    Policy,
    Primitives,
    ProtocolError,
    Session,
    apply_masks,
    bitmap,
    certificates,
    keys,
    parameters_for,
    shamir,
    transcript,
)
from evensong.secagg.graph import Graph
from evensong.secagg.keys import End
from evensong.secagg.primitives import check_agreement_key, check_order
from evensong.secagg.quorum import sample_size
from evensong.secagg.roster import check_member, make_roster, read_member
from evensong.v1 import secagg_pb2
from evensong.wire.signing import device_id_of, public_key_of

pytestmark = pytest.mark.secagg

FILE = Path(__file__).parents[2] / "protos" / "vectors" / "secagg.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text())
MAKER = runpy.run_path(str(Path(__file__).with_name("make_secagg_vectors.py")))
PRIMITIVES = Primitives()


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def session() -> Session:
    given = {name: value for name, value in VECTORS["session"].items() if name != "context"}
    return Session(**given | {name: raw(given[name]) for name in ("bundle_sha256", "manifest_sha256")})


def test_the_file_is_what_its_maker_writes() -> None:
    assert FILE.read_text() == MAKER["to_json"](MAKER["build"]())


def test_the_slow_implementation_is_independent() -> None:
    source = Path(slow.__file__).read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "evensong" in line or "numpy" in line]


# -------------------------------------------------------------------------------------------------- one thing at a time


def test_context() -> None:
    assert slow.context_of(VECTORS["session"]).hex() == VECTORS["session"]["context"]
    assert session().context.hex() == VECTORS["session"]["context"]


def test_certificate() -> None:
    entry = VECTORS["certificate"]
    authority, public_key, serial = raw(entry["authority"]), raw(entry["public_key"]), raw(entry["serial"])
    population, not_after = entry["population"], entry["not_after_unix_ms"]
    assert slow.certificate_signed(public_key, population, serial, not_after).hex() == entry["signed"]
    assert slow.certificate(authority, public_key, population, serial, not_after).hex() == entry["certificate"]

    signer = Ed25519PrivateKey.from_private_bytes(authority)
    assert certificates.issue(signer, public_key, population, not_after, serial).hex() == entry["certificate"]
    authority_key = raw(entry["authority_public_key"])
    certificates.check(raw(entry["certificate"]), public_key, population, authority_key, not_after)
    with pytest.raises(ProtocolError, match="expired"):
        certificates.check(raw(entry["certificate"]), public_key, population, authority_key, not_after + 1)


@pytest.mark.parametrize("entry", VECTORS["members"], ids=lambda entry: entry["id"][:8])
def test_member(entry: dict[str, Any]) -> None:
    context = raw(VECTORS["session"]["context"])
    member = slow.Member(
        slow.identity_of(raw(entry["identity"])),
        slow.agreement_key_of(raw(entry["channel"])),
        slow.agreement_key_of(raw(entry["mask"])),
        raw(entry["nonce"]),
        slow.sign(raw(entry["identity"]), raw(entry["signed"])),
        raw(entry["certificate"]),
    )
    assert member.id.hex() == entry["id"]
    signed = slow.advertise_signed(context, member.channel_key, member.mask_key, member.nonce)
    assert (signed.hex(), member.signature.hex(), member.encode().hex()) == (
        entry["signed"],
        entry["signature"],
        entry["member"],
    )

    identity = Ed25519PrivateKey.from_private_bytes(raw(entry["identity"]))
    assert (public_key_of(identity).hex(), device_id_of(public_key_of(identity))) == (entry["public_key"], entry["id"])
    read = read_member(secagg_pb2.SecureAdvertise.FromString(member.message()))
    check_member(read, context, PRIMITIVES)
    assert read.encode().hex() == entry["member"]
    assert (
        transcript.advertise_bytes(context, read.channel_key, read.mask_key, read.nonce).hex(),
        identity.sign(raw(entry["signed"])).hex(),
    ) == (entry["signed"], entry["signature"])


def test_roster() -> None:
    entry, context = VECTORS["roster"], raw(VECTORS["roster"]["context"])
    hashed = slow.roster_hash(context, [raw(member) for member in entry["members"]])
    assert hashed.hex() == entry["hash"]
    assert slow.roster_signed(context, hashed).hex() == entry["signed"]
    assert slow.sign(raw(entry["coordinator"]), raw(entry["signed"])).hex() == entry["signature"]

    advertised = [raw(message) for message in VECTORS["rounds"][0]["expected"]["advertise"]]
    members = [read_member(secagg_pb2.SecureAdvertise.FromString(message)) for message in advertised]
    roster = make_roster(members, session(), Policy(**VECTORS["rounds"][0]["given"]["policy"]))
    assert [member.encode().hex() for member in members] == entry["members"]
    assert roster.hash.hex() == entry["hash"]
    assert transcript.roster_bytes(roster.context, roster.hash).hex() == entry["signed"]
    PRIMITIVES.verify(raw(entry["coordinator_public_key"]), raw(entry["signature"]), raw(entry["signed"]), "the roster")


@pytest.mark.parametrize("entry", VECTORS["graphs"], ids=lambda entry: str(len(entry["ids"])))
def test_graph(entry: dict[str, Any]) -> None:
    roster_hash, ids = raw(entry["roster_hash"]), [raw(identifier) for identifier in entry["ids"]]
    order = slow.ring(roster_hash, ids)
    assert order == entry["ring"]
    around = [slow.neighbours(order, entry["degree"], place) for place in range(len(ids))]
    assert around == entry["neighbours"]

    graph = Graph(roster_hash, ids, entry["degree"])
    assert graph.ring == entry["ring"]
    assert [list(graph.neighbours(place)) for place in range(len(ids))] == entry["neighbours"]


@pytest.mark.parametrize(
    "entry",
    VECTORS["parameters"],
    ids=lambda entry: f"{entry['members']}-{entry['corrupted_share']}-{entry['dropout_share']}",
)
def test_parameters(entry: dict[str, Any]) -> None:
    asked = {name: entry[name] for name in ("corrupted_share", "dropout_share", "semi_malicious")}
    numbers = (entry["degree"], entry["threshold"], entry["quorum"])
    if entry["degree"] is None:
        assert slow.parameters(entry["members"], **asked) is None
        with pytest.raises(ParameterError):
            parameters_for(entry["members"], min_survivors=3, **asked)
        return
    assert slow.parameters(entry["members"], **asked) == numbers
    found = parameters_for(entry["members"], min_survivors=3, **asked)
    assert (found.degree, found.threshold, found.quorum) == numbers


@pytest.mark.parametrize("entry", VECTORS["checks"], ids=lambda entry: f"{entry['members']}-{entry['signatures']}")
def test_checks_of_a_quorum(entry: dict[str, int]) -> None:
    numbers = entry["members"], entry["corrupted"], entry["signatures"]
    assert slow.checks(*numbers) == sample_size(*numbers) == entry["checks"]


@pytest.mark.parametrize("entry", VECTORS["pairs"], ids=["to_the_next", "to_the_one_before"])
def test_pair(entry: dict[str, Any]) -> None:
    binding, one, other = raw(entry["binding"]), entry["one"], entry["other"]
    for end in (one, other):
        for name in ("channel", "mask"):
            assert slow.agreement_key_of(raw(end[name])).hex() == end[f"{name}_key"]
    this, that = (
        slow.Member(raw(end["public_key"]), raw(end["channel_key"]), raw(end["mask_key"]), b"", b"", b"")
        for end in (one, other)
    )
    assert (this.id.hex(), that.id.hex()) == (one["id"], other["id"])
    channel = slow.agree(raw(one["channel"]), that.channel_key)
    agreed = slow.agree(raw(one["mask"]), that.mask_key)
    outward, inward = (slow.channel_key(channel, binding, *ends) for ends in ((this, that), (that, this)))
    mask_key = slow.pairwise_mask_key(agreed, binding, this, that)
    assert mask_key == slow.pairwise_mask_key(agreed, binding, that, this)
    associated = slow.share_associated(binding, this.id, that.id)
    plaintext = raw(entry["share_of_seed"] + entry["share_of_mask_key"])
    assert {
        "channel_agreement": channel.hex(),
        "mask_agreement": agreed.hex(),
        "channel_key_one_to_other": outward.hex(),
        "channel_key_other_to_one": inward.hex(),
        "pairwise_mask_key": mask_key.hex(),
        "pairwise_mask_lanes": [f"{lane:016x}" for lane in slow.mask(mask_key, len(entry["pairwise_mask_lanes"]))],
        "sign_of_one": 1 if that.id > this.id else -1,
        "associated_data": associated.hex(),
        "ciphertext_one_to_other": slow.seal(outward, plaintext, associated).hex(),
    }.items() <= entry.items()

    channel_ends = [End(raw(end["id"]), raw(end["channel_key"])) for end in (one, other)]
    mask_ends = [End(raw(end["id"]), raw(end["mask_key"])) for end in (one, other)]
    mine, theirs = (X25519PrivateKey.from_private_bytes(raw(end["channel"])) for end in (one, other))
    assert PRIMITIVES.agree(mine, channel_ends[1].key) == PRIMITIVES.agree(theirs, channel_ends[0].key) == channel
    mine = X25519PrivateKey.from_private_bytes(raw(one["mask"]))
    assert PRIMITIVES.agree(mine, mask_ends[1].key) == agreed
    assert keys.channel_key(channel, binding, *channel_ends) == outward
    assert keys.channel_key(channel, binding, *channel_ends[::-1]) == inward
    assert keys.pairwise_mask_key(agreed, binding, *mask_ends) == mask_key
    assert keys.pairwise_mask_key(agreed, binding, *mask_ends[::-1]) == mask_key
    assert keys.share_associated_data(binding, this.id, that.id) == associated
    assert PRIMITIVES.seal(outward, plaintext, associated).hex() == entry["ciphertext_one_to_other"]
    assert PRIMITIVES.open(outward, raw(entry["ciphertext_one_to_other"]), associated) == plaintext
    assert PRIMITIVES.open(inward, raw(entry["ciphertext_one_to_other"]), associated) is None
    assert fast_mask(mask_key, len(entry["pairwise_mask_lanes"])) == entry["pairwise_mask_lanes"]


def fast_mask(key: bytes, count: int, first: int = 0) -> list[str]:
    lanes = np.zeros(count, np.uint64)
    apply_masks(lanes, [(key, 1)])
    return [f"{lane:016x}" for lane in lanes[first:]]


def test_self_mask() -> None:
    entry = VECTORS["self_mask"]
    seed, binding, identifier = raw(entry["seed"]), raw(entry["binding"]), raw(entry["id"])
    key, lanes = slow.self_mask_key(seed, binding, identifier), len(entry["lanes"])
    assert slow.seed_commitment(seed, binding, identifier).hex() == entry["commitment"]
    assert key.hex() == entry["key"]
    assert [f"{lane:016x}" for lane in slow.mask(key, lanes)] == entry["lanes"]
    assert f"{slow.mask_lane(key, 1_000_001):016x}" == entry["lane_1000001"]

    assert keys.seed_commitment(seed, binding, identifier).hex() == entry["commitment"]
    assert keys.self_mask_key(seed, binding, identifier) == key
    assert fast_mask(key, lanes) == entry["lanes"]
    assert fast_mask(key, 1_000_002, 1_000_001) == [entry["lane_1000001"]]


@pytest.mark.parametrize("entry", VECTORS["shamir"], ids=lambda entry: str(entry["threshold"]))
def test_shamir(entry: dict[str, Any]) -> None:
    secret, threshold = raw(entry["secret"]), entry["threshold"]
    coefficients = [int.from_bytes(raw(number), "little") for number in entry["coefficients"]]
    shares = {part["x"]: raw(part["share"]) for part in entry["shares"]}
    assert {x: slow.share(secret, coefficients, x) for x in shares} == shares

    highest_first = [*reversed(coefficients), int.from_bytes(secret, "little")]
    values = {x: shamir.evaluate(highest_first, x) for x in shares}
    assert {x: shamir.encode_share(value) for x, value in values.items()} == shares
    assert {x: shamir.decode_share(share) for x, share in shares.items()} == values

    for first in range(len(shares) - threshold + 1):
        chosen = list(shares)[first : first + threshold]
        assert slow.reconstruct({x: shares[x] for x in chosen}) == secret
        assert shamir.reconstruct({x: values[x] for x in chosen}) == secret


def test_signatures_of_vector_and_survivors() -> None:
    entry = VECTORS["signed"]
    identity, context, roster_hash = raw(entry["identity"]), raw(entry["context"]), raw(entry["roster_hash"])
    identifier, hashed = slow.id_of(slow.identity_of(identity)), hashlib.sha256(raw(entry["vector"])).digest()
    sharers, survivors = raw(entry["sharers"]), raw(entry["survivors"])
    masked = slow.masked_signed(context, roster_hash, identifier, sharers, hashed)
    survived = slow.survivors_signed(context, roster_hash, survivors)
    assert (masked.hex(), survived.hex()) == (entry["masked_signed"], entry["survivors_signed"])
    assert slow.sign(identity, masked).hex() == entry["masked_signature"]
    assert slow.sign(identity, survived).hex() == entry["survivors_signature"]

    assert transcript.masked_bytes(context, roster_hash, identifier, sharers, hashed) == masked
    assert transcript.survivors_bytes(context, roster_hash, survivors) == survived
    public_key = public_key_of(Ed25519PrivateKey.from_private_bytes(identity))
    PRIMITIVES.verify(public_key, raw(entry["masked_signature"]), masked, "the signature of the vector")
    PRIMITIVES.verify(public_key, raw(entry["survivors_signature"]), survived, "the signature of the survivors")


@pytest.mark.parametrize("entry", VECTORS["bitmaps"], ids=lambda entry: entry["bitmap"])
def test_bitmap(entry: dict[str, Any]) -> None:
    places, count = entry["places"], entry["members"]
    assert slow.bitmap(places, count).hex() == entry["bitmap"]
    assert bitmap.encode(bitmap.from_places(places), count).hex() == entry["bitmap"]
    assert bitmap.places(bitmap.decode(raw(entry["bitmap"]), count, "the members"), count) == places


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("key", VECTORS["refused"]["low_order_keys"])
def test_low_order_keys_are_refused(key: str) -> None:
    check_agreement_key(raw(key), "a key")
    with pytest.raises(ProtocolError):
        check_order(raw(key), "a key")
    with pytest.raises(ProtocolError):
        PRIMITIVES.agree(X25519PrivateKey.from_private_bytes(bytes(range(32))), raw(key))


@pytest.mark.parametrize("key", VECTORS["refused"]["malformed_keys"])
def test_malformed_keys_are_refused(key: str) -> None:
    with pytest.raises(ProtocolError):
        check_agreement_key(raw(key), "a key")


@pytest.mark.parametrize("share", VECTORS["refused"]["shares"])
def test_malformed_shares_are_refused(share: str) -> None:
    with pytest.raises(ProtocolError):
        shamir.decode_share(raw(share))


@pytest.mark.parametrize("entry", VECTORS["refused"]["bitmaps"], ids=lambda entry: entry["bitmap"])
def test_malformed_bitmaps_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        bitmap.decode(raw(entry["bitmap"]), entry["members"], "the members")


# --------------------------------------------------------------------------------------------------------- whole rounds


@pytest.mark.parametrize("entry", VECTORS["rounds"], ids=["dropped", "unshared_dropped_damaged"])
def test_round(entry: dict[str, Any]) -> None:
    expected = entry["expected"]
    assert slow.play(entry["given"]) == expected
    assert MAKER["play"](entry["given"]) == expected
    # What comes out is what went in.
    absent = {*entry["given"]["unshared"], *entry["given"]["dropped"]}
    devices = [device for place, device in enumerate(entry["given"]["devices"]) if place not in absent]
    assert expected["sum_fields"] == [sum(values) for values in zip(*(at["fields"] for at in devices), strict=True)]


def test_a_sparse_round_of_both_implementations() -> None:
    """Not in the file, as it is long: 40 members with 10 neighbours each."""
    devices = MAKER["_devices"]([f"sparse {number}" for number in range(40)], 5)
    policy = VECTORS["rounds"][0]["given"]["policy"] | {"dropout_share": 0.1}
    entry = MAKER["_round"](devices, policy, unshared=[7], dropped=[3, 21])
    assert entry["expected"]["degree"] == 10
    assert slow.play(entry["given"]) == entry["expected"]
