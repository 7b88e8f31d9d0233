"""Export, evaluation, timing and shipping of bundles."""

import compress.errors  # noqa: F401 - switches the telemetry of the runtimes off before a module here loads one
