"""What all tests share: a Ctrl-C that works. A shell's background job ignores it, and so would every child of ours.

And no telemetry of the libraries that tests load before anything of ours.
"""

import signal

import compress  # noqa: F401 - switches the telemetry off

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
