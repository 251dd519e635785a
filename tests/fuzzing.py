"""The number of cases of a fuzz test: 100 in the suite, always the same; 2,000 in ``make fuzz``, new ones each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=2000, **COMMON)

fuzzed = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
