"""Settings of every test: the same examples on every run, and no verdict on a slow machine's time."""

import os

from hypothesis import settings

# Before torch is loaded: test processes share the cores, and idle threads that spin cost a multiple of the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("headrace", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("headrace")
