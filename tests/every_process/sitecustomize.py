"""In every process of the tests, with those that they start: garbage is collected seldom.

All that vLLM imports would else be gone through again and again as it is imported, which takes a fifth of that time.
"""

import gc

gc.set_threshold(100_000, 50, 50)
