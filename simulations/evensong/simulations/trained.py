"""An artifact with other initial values: what training came to, as one file that any device can load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from evensong.wire.artifact import artifact_hash, decode_artifact, encode_artifact
from evensong.wire.errors import ArtifactError


def with_parameters(artifact: bytes, parameters: Mapping[str, npt.ArrayLike], **notes: str) -> bytes:
    """``artifact`` with ``parameters`` (author's shapes, float32) in place of its own initial values.

    The manifest names the artifact that it came from as ``trained_from`` and takes up ``notes``.
    """
    original = decode_artifact(artifact)
    variables = {variable.name: variable for variable in original.variables}
    state = bytearray(original.state)
    for name, value in parameters.items():
        variable = variables.get(name)
        array = np.asarray(value, np.float32)
        if variable is None or array.shape != variable.shape:
            raise ArtifactError(
                f"the artifact has no such variable: {name!r}",
                expected=None if variable is None else variable.shape,
                got=array.shape,
            )
        stored = array.transpose(np.argsort(variable.perm)).astype("<f4").tobytes()
        state[variable.offset : variable.offset + len(stored)] = stored
    manifest = {**original.manifest, "trained_from": artifact_hash(artifact), **notes}
    return encode_artifact(replace(original, manifest=manifest, state=bytes(state)))
