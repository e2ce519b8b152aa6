"""What all tests share: properties are checked without a clock, since machines are noisy, and Ctrl-C works."""

import signal

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell ignores it, and what it starts too
    signal.signal(signal.SIGINT, signal.default_int_handler)
