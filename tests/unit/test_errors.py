"""What an error says, and where it can go."""

from __future__ import annotations

import errno
import pickle

from weft.errors import KernelError


def test_an_error_of_the_kernel_passes_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(KernelError("create VXLAN device vx42", errno.EEXIST, "remove it")))
    assert (str(error), error.errno) == ("create VXLAN device vx42: File exists; remove it", errno.EEXIST)
