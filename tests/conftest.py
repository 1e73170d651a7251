"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Time says nothing of correctness, and these limits fail on a busy machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
