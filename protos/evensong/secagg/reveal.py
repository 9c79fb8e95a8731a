"""Secrets from shares, as these come in: each is checked against what its owner committed to."""

from __future__ import annotations

from collections.abc import Callable

from evensong.secagg import shamir


class Reveal:
    """One secret, that of ``owner`` (a place), for whichever of the two kinds is asked for.

    ``fits`` says whether 32 bytes are the secret that its owner committed to.
    """

    def __init__(self, owner: int, threshold: int, fits: Callable[[bytes], bool]) -> None:
        self.owner = owner
        self.secret: bytes | None = None
        self.wrong: set[int] = set()  #: holders whose share is certain not to be what the others' say, by their number
        self._threshold = threshold
        self._fits = fits
        self._shares: dict[int, int] = {}
        self._decode_at = threshold + 2

    def add(self, holder: int, share: int, suspects: set[int]) -> None:
        """Takes the share of ``holder`` and tries to open the secret. ``suspects`` were wrong about other secrets."""
        self._shares[holder] = share
        if self.secret is None and len(self._shares) >= self._threshold:
            self._try(suspects)

    def finish(self, suspects: set[int]) -> None:
        """No more shares will come: tries what else there is."""
        if self.secret is None and len(self._shares) >= self._threshold:
            self._decode_at = len(self._shares)
            self._try(suspects)

    def is_owners_fault(self, corrupted: int) -> bool:
        """After :meth:`finish`: whether it stays closed though at most ``corrupted`` holders lie. Decoding would have
        left those out, so the owner dealt no polynomial, or committed to another secret."""
        return self.secret is None and len(self._shares) >= self._threshold + 2 * corrupted

    def _try(self, suspects: set[int]) -> None:
        # Suspects come last, but they do come: whoever dealt them a wrong share may have framed them.
        ranked = sorted(self._shares, key=suspects.__contains__)[: self._threshold]
        if self._accept(shamir.reconstruct({holder: self._shares[holder] for holder in ranked})):
            return
        if len(self._shares) == self._threshold + 1:
            for holder, secret in shamir.without_one(self._shares):
                if self._accept(secret):
                    self.wrong = {holder}
                    return
        if len(self._shares) >= max(self._decode_at, self._threshold + 2):
            # Each time with twice the excess: an owner whose shares fit nothing costs few decodings.
            self._decode_at = 2 * len(self._shares) - self._threshold
            decoded = shamir.decode(self._shares, self._threshold)
            if decoded is not None and self._accept(decoded[0]):
                self.wrong = set(decoded[1])

    def _accept(self, secret: bytes | None) -> bool:
        if secret is None or not self._fits(secret):
            return False
        self.secret = secret
        self._shares = {}
        return True
