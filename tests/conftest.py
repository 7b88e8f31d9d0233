"""What all tests share: a Ctrl-C that works. A shell's background job ignores it, and so would every child of ours."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
