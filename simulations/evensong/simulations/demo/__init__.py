"""``evensong demo``: a real coordinator and real devices, each a process of its own, learn from real data."""
