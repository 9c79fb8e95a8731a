"""The coordinator: hands out work, adds up what comes back, and commits a better model."""
