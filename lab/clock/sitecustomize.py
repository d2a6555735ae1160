"""A Python program with this folder in its PYTHONPATH has a clock that is LAB_CLOCK_OFFSET seconds ahead.

There are no namespaces for the time of day, and libfaketime (0.9.10) makes Python's time.sleep() fail and its threads
hang. What counts seconds (time.monotonic) stays true, as on a machine whose clock was set wrong.
"""

import datetime
import os
import time

_OFFSET = int(os.environ["LAB_CLOCK_OFFSET"])
_time, _time_ns = time.time, time.time_ns


class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Datetime":
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> "_Datetime":
        return cls.now(datetime.UTC).replace(tzinfo=None)


time.time = lambda: _time() + _OFFSET
time.time_ns = lambda: _time_ns() + _OFFSET * 10**9
datetime.datetime = _Datetime  # type: ignore[misc]
