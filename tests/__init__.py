"""Tests: behaviour through the real thing."""

from benchmarks.gpu.preflight import ZOO_PACKAGES, absent_packages

# All at once, where the first import would name one: on a machine to which packages are carried.
if absent := absent_packages(*ZOO_PACKAGES, "hypothesis", "pytest-timeout"):
    raise SystemExit(f"tests: these packages are not installed: {', '.join(absent)}")

from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine, not of the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
