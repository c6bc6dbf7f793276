"""Imported before the libraries: look for cycles seldom, which takes a tenth of the tests' time.

Imports and tests leave few of them.
"""

import gc

gc.set_threshold(50_000, 20, 100)
