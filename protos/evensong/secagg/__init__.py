"""In what order it is said: secure aggregation as two state machines, device and coordinator, without any I/O.

``docs/secagg.md`` is the protocol, ``protos/vectors/secagg.json`` pins its bytes for every language.
"""
