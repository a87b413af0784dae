"""Makes an uninstalled checkout importable and sets hypothesis's profile."""

import os
import sys
from pathlib import Path

from hypothesis import settings

# Appended, never put first: the checkout's `kernels` and `profiling` must not shadow installed packages of those names.
sys.path.append(str(Path(__file__).resolve().parent.parent))

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("slow", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
