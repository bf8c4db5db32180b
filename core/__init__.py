"""What two scripts share. Set here, because libgomp reads it when torch is loaded, and every script imports this first:
threads that wait for each other spin, which beside other work makes a step many times slower. A person's own word wins.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # turns, then they sleep
