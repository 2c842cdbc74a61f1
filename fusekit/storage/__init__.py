"""The commit protocol: what was committed survives, what was not leaves no trace.

``publish``: build a folder beside its final path and move it there in one step. ``lock``: one writer per output.
"""

from fusekit.storage.faults import disk_fault
from fusekit.storage.lock import output_lock
from fusekit.storage.publish import Staging, recover, staging

__all__ = ["Staging", "disk_fault", "output_lock", "recover", "staging"]
