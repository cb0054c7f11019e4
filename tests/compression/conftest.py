"""Workers for the tests of compressors: threads of this process, which hypothesis can shrink, and real Horovod processes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the laws are also run by Horovod workers, without pytest
