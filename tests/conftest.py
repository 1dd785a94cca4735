"""Settings of every test: the same examples on every run, and no verdict on a slow machine's time."""

from hypothesis import settings

settings.register_profile("headrace", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("headrace")
